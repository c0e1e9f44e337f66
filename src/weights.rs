//! Named tensors → typed weights, with every shape and scale checked here.

use cpu_ref::ternarize_absmean::ABSMEAN_FLOOR;
use rayon::prelude::*;

pub use crate::checkpoint::{Checkpoint, MemorySummary};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::format::TensorView;
use crate::format::float::{Float, bf16_to_f32, f16_to_f32, first_non_finite};
use crate::shape::MatShape;
use crate::tensor_names::{
    ATTN_SUB_NORM, DOWN_PROJ, FFN_SUB_NORM, GATE_PROJ, INPUT_LAYERNORM, K_PROJ, Linear, Norm,
    O_PROJ, POST_ATTENTION_LAYERNORM, Q_PROJ, UP_PROJ, V_PROJ,
};

/// A ternary matrix as its file stores it; rows are decoded on demand, so that loading never holds
/// an unpacked matrix.
pub struct TernaryMatrix {
    shape: MatShape,
    scale: f32,
    rows: Rows,
}

enum Rows {
    /// Hugging Face "bitnet" packing, U8 `[ceil(N/4), K]`: bits `2q+1..2q` of byte `[r, k]` hold
    /// `w + 1` of row `q·ceil(N/4) + r`.
    HfPacked(TensorView),
    /// Master weights `[N, K]` and `1/m`.
    Master { tensor: TensorView, float: Float, inv_scale: f32 },
    /// Plain trits `[N, K]`.
    Trits(Vec<i8>),
    /// Random trits, a function of the row.
    Synthetic { seed: u64 },
}

impl TernaryMatrix {
    /// A matrix from plain trits `[N, K]` and the scale that multiplies them.
    ///
    /// # Panics
    /// If the length does not match the shape.
    pub fn from_trits(shape: MatShape, trits: Vec<i8>, scale: f32) -> Self {
        assert_eq!(trits.len(), shape.len());
        Self { shape, scale, rows: Rows::Trits(trits) }
    }

    /// A matrix of random trits that take no memory.
    pub(crate) fn synthetic(shape: MatShape, seed: u64, scale: f32) -> Self {
        Self { shape, scale, rows: Rows::Synthetic { seed } }
    }

    /// A matrix in the "bitnet" packing of Hugging Face, U8 `[ceil(N/4), K]`, and the scale that
    /// multiplies it. The values are checked as rows are decoded.
    ///
    /// # Panics
    /// If the tensor's length does not match the shape.
    pub(crate) fn from_hf_packed(shape: MatShape, tensor: TensorView, scale: f32) -> Self {
        assert_eq!(tensor.bytes.len(), shape.n().div_ceil(4) * shape.k());
        Self { shape, scale, rows: Rows::HfPacked(tensor) }
    }

    /// A matrix from master weights `[N, K]`, ternarised by absmean: one scale
    /// `m = max(mean(|W|), 1e-5)` for the whole matrix, `t = clamp(round(w·(1/m)), −1, +1)`.
    ///
    /// The mean is summed in f64, in chunks of fixed size and order, so that it does not depend on
    /// the number of threads.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for NaN or infinity.
    ///
    /// # Panics
    /// If the tensor's length does not match the shape.
    pub(crate) fn from_master(shape: MatShape, tensor: TensorView, float: Float) -> Result<Self> {
        assert_eq!(tensor.bytes.len(), shape.len() * float.len_bytes());
        let row_bytes = shape.k() * float.len_bytes();
        let row_sums: Vec<f64> = tensor
            .bytes
            .par_chunks_exact(row_bytes)
            .enumerate()
            .map_init(
                || vec![0.0; shape.k()],
                |row, (n, bytes)| {
                    float.decode(bytes, row);
                    match first_non_finite(row) {
                        Some(k) => Err(value_error(&tensor, "finite weights", row[k], n, k)),
                        None => Ok(sum_of_magnitudes(row)),
                    }
                },
            )
            .collect::<Result<_>>()?;
        let mean = (row_sums.iter().sum::<f64>() / shape.len() as f64) as f32;
        let scale = mean.max(ABSMEAN_FLOOR);
        let rows = Rows::Master { tensor, float, inv_scale: 1.0 / scale };
        Ok(Self { shape, scale, rows })
    }

    /// `[N, K]`.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// Multiplies a trit back to the effective weight.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Decodes row `n` into `out[K]`.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for the code 3, which stands for no weight.
    ///
    /// # Panics
    /// If `n` is not below N or `out` is not K long.
    pub fn row(&self, n: usize, out: &mut [i8]) -> Result<()> {
        let k = self.shape.k();
        assert!(n < self.shape.n() && out.len() == k);
        match &self.rows {
            Rows::HfPacked(tensor) => {
                let packed_rows = self.shape.n().div_ceil(4);
                let (quarter, packed_row) = (n / packed_rows, n % packed_rows);
                let bytes = &tensor.bytes[packed_row * k..][..k];
                let valid = match quarter {
                    0 => decode_quarter::<0>(bytes, out),
                    1 => decode_quarter::<1>(bytes, out),
                    2 => decode_quarter::<2>(bytes, out),
                    _ => decode_quarter::<3>(bytes, out),
                };
                if valid {
                    return Ok(());
                }
                let column = out.iter().position(|&trit| trit == 2).unwrap_or_default();
                Err(value_error(tensor, "codes 0, 1 and 2", 3, n, column))
            }
            Rows::Master { tensor, float, inv_scale } => {
                let size = float.len_bytes();
                let mut part = [0.0; 256];
                let row = &tensor.bytes[n * k * size..][..k * size];
                for (bytes, out) in row.chunks(part.len() * size).zip(out.chunks_mut(part.len())) {
                    let part = &mut part[..out.len()];
                    float.decode(bytes, part);
                    for (&weight, out) in part.iter().zip(out) {
                        *out = ternarize(weight, *inv_scale);
                    }
                }
                Ok(())
            }
            Rows::Trits(trits) => {
                out.copy_from_slice(&trits[n * k..][..k]);
                Ok(())
            }
            Rows::Synthetic { seed } => {
                crate::synthetic::trits(*seed, n, out);
                Ok(())
            }
        }
    }
}

/// Field `QUARTER` of each byte, less one; false if one of them is code 3 (which becomes 2).
fn decode_quarter<const QUARTER: usize>(bytes: &[u8], out: &mut [i8]) -> bool {
    let mut invalid = 0;
    for (&byte, out) in bytes.iter().zip(out) {
        let code = (byte >> (2 * QUARTER)) & 3;
        // Bit 0 is set where both bits of the code are.
        invalid |= code & (code >> 1);
        *out = code as i8 - 1;
    }
    invalid == 0
}

/// `cpu_ref::ternarize_absmean::ternarize` for a finite weight, as two comparisons: half to even
/// takes ±½ to 0, and everything beyond is clamped to ±1.
fn ternarize(weight: f32, inv_scale: f32) -> i8 {
    let scaled = weight * inv_scale;
    i8::from(scaled > 0.5) - i8::from(scaled < -0.5)
}

/// `Σ|w|` in f64, in eight lanes.
fn sum_of_magnitudes(weights: &[f32]) -> f64 {
    let (groups, rest) = weights.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for group in groups {
        for (lane, weight) in lanes.iter_mut().zip(group) {
            *lane += f64::from(weight.abs());
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|weight| f64::from(weight.abs())).sum::<f64>()
}

fn value_error(
    tensor: &TensorView,
    expected: &'static str,
    found: impl std::fmt::Display,
    row: usize,
    column: usize,
) -> Error {
    Error::TensorValue {
        file: tensor.file.clone(),
        tensor: tensor.name.clone(),
        expected,
        found: format!("{found} at row {row}, column {column}"),
    }
}

/// A full-precision matrix `[N, K]`: the embedding table or an untied LM head.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseMatrix {
    shape: MatShape,
    data: DenseData,
}

/// The elements of a [`DenseMatrix`], row-major, in the precision of the file.
#[derive(Debug, Clone, PartialEq)]
pub enum DenseData {
    /// bfloat16 bit patterns.
    Bf16(Vec<u16>),
    /// IEEE half bit patterns.
    F16(Vec<u16>),
    /// IEEE single.
    F32(Vec<f32>),
}

impl DenseData {
    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Self::Bf16(bits) | Self::F16(bits) => bits.len(),
            Self::F32(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl DenseMatrix {
    /// A matrix of finite elements.
    ///
    /// # Panics
    /// If the length does not match the shape.
    pub fn new(shape: MatShape, data: DenseData) -> Self {
        assert_eq!(data.len(), shape.len());
        Self { shape, data }
    }

    /// `[N, K]`.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// The elements `[N, K]`.
    pub fn data(&self) -> &DenseData {
        &self.data
    }

    /// The elements `[N, K]`, to keep.
    pub fn into_data(self) -> DenseData {
        self.data
    }

    /// Row `n` as f32, into `out[K]`.
    ///
    /// # Panics
    /// If `n` is not below N or `out` is not K long.
    pub fn row(&self, n: usize, out: &mut [f32]) {
        let k = self.shape.k();
        assert!(n < self.shape.n() && out.len() == k);
        let range = n * k..(n + 1) * k;
        match &self.data {
            DenseData::Bf16(bits) => {
                out.iter_mut().zip(&bits[range]).for_each(|(out, &bits)| *out = bf16_to_f32(bits));
            }
            DenseData::F16(bits) => {
                out.iter_mut().zip(&bits[range]).for_each(|(out, &bits)| *out = f16_to_f32(bits));
            }
            DenseData::F32(values) => out.copy_from_slice(&values[range]),
        }
    }
}

/// The weights of one layer.
pub struct LayerWeights {
    /// RMSNorm before attention, `[hidden]`.
    pub input_layernorm: Vec<f32>,
    /// `[H·D, hidden]`.
    pub q_proj: TernaryMatrix,
    /// `[G·D, hidden]`.
    pub k_proj: TernaryMatrix,
    /// `[G·D, hidden]`.
    pub v_proj: TernaryMatrix,
    /// RMSNorm before `o_proj`, `[H·D]`, where the architecture has one.
    pub attn_sub_norm: Option<Vec<f32>>,
    /// `[hidden, H·D]`.
    pub o_proj: TernaryMatrix,
    /// RMSNorm before the MLP, `[hidden]`.
    pub post_attention_layernorm: Vec<f32>,
    /// `[intermediate, hidden]`.
    pub gate_proj: TernaryMatrix,
    /// `[intermediate, hidden]`.
    pub up_proj: TernaryMatrix,
    /// RMSNorm before `down_proj`, `[intermediate]`, where the architecture has one.
    pub ffn_sub_norm: Option<Vec<f32>>,
    /// `[hidden, intermediate]`.
    pub down_proj: TernaryMatrix,
}

impl LayerWeights {
    /// The ternary matrices with their names, in the order of the forward pass.
    pub fn linears(&self) -> [(Linear, &TernaryMatrix); 7] {
        [
            (Q_PROJ, &self.q_proj),
            (K_PROJ, &self.k_proj),
            (V_PROJ, &self.v_proj),
            (O_PROJ, &self.o_proj),
            (GATE_PROJ, &self.gate_proj),
            (UP_PROJ, &self.up_proj),
            (DOWN_PROJ, &self.down_proj),
        ]
    }

    /// The RMSNorm weights with their names, in the order of the forward pass.
    pub fn norms(&self) -> impl Iterator<Item = (Norm, &[f32])> {
        [
            (INPUT_LAYERNORM, Some(&self.input_layernorm)),
            (ATTN_SUB_NORM, self.attn_sub_norm.as_ref()),
            (POST_ATTENTION_LAYERNORM, Some(&self.post_attention_layernorm)),
            (FFN_SUB_NORM, self.ffn_sub_norm.as_ref()),
        ]
        .into_iter()
        .filter_map(|(norm, weights)| weights.map(|weights| (norm, weights.as_slice())))
    }
}

/// Where a backend gets a model's weights from: a checkpoint, or a test's random model.
///
/// A backend asks for one layer at a time and drops it before the next, so that a load needs little
/// more memory than the packed result.
pub trait WeightSource {
    /// The model's dimensions.
    fn config(&self) -> &ModelConfig;
    /// The embedding table `[V, hidden]`.
    ///
    /// # Errors
    /// If the tensor is missing or malformed.
    fn embedding(&self) -> Result<DenseMatrix>;
    /// The LM head `[V, hidden]`; `None` if it is the embedding table.
    ///
    /// # Errors
    /// If the tensor is missing or malformed.
    fn lm_head(&self) -> Result<Option<DenseMatrix>>;
    /// The last RMSNorm's weight `[hidden]`.
    ///
    /// # Errors
    /// If the tensor is missing or malformed.
    fn final_norm(&self) -> Result<Vec<f32>>;
    /// The weights of layer `index`.
    ///
    /// # Errors
    /// If a tensor is missing or malformed.
    fn layer(&self, index: usize) -> Result<LayerWeights>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{Bytes, Dtype};

    fn view(dtype: Dtype, shape: [usize; 2], bytes: Vec<u8>) -> TensorView {
        TensorView {
            file: "file".to_owned(),
            name: "tensor".to_owned(),
            dtype,
            shape: shape.to_vec(),
            bytes: Bytes::Owned(bytes.into()),
        }
    }

    /// Every byte in every quarter, against the definition.
    #[test]
    fn quarters_decode_to_their_bits() {
        let bytes: Vec<u8> = (0..=255).collect();
        let mut out = [0; 256];
        let valid = [
            decode_quarter::<0>(&bytes, &mut out),
            decode_quarter::<1>(&bytes, &mut out),
            decode_quarter::<2>(&bytes, &mut out),
            decode_quarter::<3>(&bytes, &mut out),
        ];
        assert_eq!(valid, [false; 4]);
        let shape = MatShape::new(4, 256).unwrap();
        let matrix = TernaryMatrix::from_hf_packed(shape, view(Dtype::U8, [1, 256], bytes), 1.0);
        for n in 0..4 {
            // The first byte with code 3 in this quarter.
            let column = 3 << (2 * n);
            let message = matrix.row(n, &mut out).unwrap_err().to_string();
            assert_eq!(
                message,
                format!(
                    "file: tensor tensor: expected codes 0, 1 and 2, found 3 at row {n}, column \
                     {column}"
                )
            );
            for (byte, &trit) in out.iter().enumerate() {
                assert_eq!(trit, (byte >> (2 * n) & 3) as i8 - 1);
            }
        }
    }

    /// Every finite bf16 weight at scales around it, against the twin.
    #[test]
    fn two_comparisons_round_like_the_twin() {
        for bits in 0..=u16::MAX {
            let weight = bf16_to_f32(bits);
            if !weight.is_finite() {
                continue;
            }
            let exact = 1.0 / (2.0 * weight.abs()).max(ABSMEAN_FLOOR);
            for inv_scale in [exact, exact.next_up(), exact.next_down(), exact / 3.0, 1.0, 1e5] {
                assert_eq!(
                    ternarize(weight, inv_scale),
                    cpu_ref::ternarize_absmean::ternarize(weight, inv_scale),
                    "{weight} {inv_scale}"
                );
            }
        }
    }

    #[test]
    fn master_weights_ternarise_like_the_twin() {
        // The worked example, then sizes that are no multiple of anything.
        let example = vec![0.9, -0.1, 0.4, -1.2, 0.05, 0.61];
        let random: Vec<f32> = (0..13 * 301u32)
            .map(|i| (i.wrapping_mul(2_654_435_769) >> 8) as f32 / 1e7 - 0.8)
            .collect();
        for (n, k, weights) in [(2, 3, example), (13, 301, random), (3, 5, vec![0.0; 15])] {
            let bytes = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
            let (expected, scale) = cpu_ref::ternarize_absmean::ternarize_absmean(&weights);
            let shape = MatShape::new(n, k).unwrap();
            let tensor = view(Dtype::F32, [n, k], bytes);
            let matrix = TernaryMatrix::from_master(shape, tensor, Float::F32).unwrap();
            // The sums differ in order, the results in at most the last bit.
            assert!((matrix.scale() - scale).abs() <= scale * f32::EPSILON);
            let mut row = vec![0; k];
            for (n, expected) in expected.chunks_exact(k).enumerate() {
                matrix.row(n, &mut row).unwrap();
                assert_eq!(row, expected);
            }
        }
    }

    #[test]
    fn dense_rows_keep_the_precision_of_the_file() {
        let shape = MatShape::new(2, 2).unwrap();
        let mut row = [0.0; 2];
        for data in [
            DenseData::Bf16(vec![0, 0, 0x3f80, 0xc040]),
            DenseData::F16(vec![0, 0, 0x3c00, 0xc200]),
            DenseData::F32(vec![0.0, 0.0, 1.0, -3.0]),
        ] {
            let matrix = DenseMatrix::new(shape, data);
            matrix.row(1, &mut row);
            assert_eq!(row, [1.0, -3.0]);
            matrix.row(0, &mut row);
            assert_eq!(row, [0.0, 0.0]);
        }
    }
}
