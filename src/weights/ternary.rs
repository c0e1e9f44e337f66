//! A ternary or binary matrix as its file stores it.

use cpu_ref::ternarize_absmean::ABSMEAN_FLOOR;
use rayon::prelude::*;

use super::Input;
use crate::error::{Error, Result};
use crate::format::TensorView;
use crate::format::float::{Float, f16_to_f32, first_non_finite};
use crate::format::ggml::TernaryType;
use crate::shape::MatShape;

/// A ternary matrix as its file stores it; rows are decoded on demand, so that loading never holds
/// an unpacked matrix.
pub struct TernaryMatrix {
    shape: MatShape,
    scale: WeightScale,
    alphabet: Alphabet,
    rows: Rows,
    /// Head dimension, where each head's rows are stored even ones of a pair first.
    interleaved: Option<usize>,
    input: Input,
}

/// What multiplies a trit back to the effective weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum WeightScale {
    /// One number for the whole matrix.
    Tensor(f32),
    /// One for every `group` consecutive inputs of a row: see [`TernaryMatrix::row_with_scales`].
    /// `group` is a multiple of 64 and divides K.
    Groups {
        /// Inputs a scale.
        group: usize,
    },
}

/// The weights that occur.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Alphabet {
    /// −1 and +1.
    Binary,
    /// −1, 0 and +1.
    Ternary,
}

enum Rows {
    /// Hugging Face "bitnet" packing, U8 `[ceil(N/4), K]`: bits `2q+1..2q` of byte `[r, k]` hold
    /// `w + 1` of row `q·ceil(N/4) + r`.
    HfPacked(TensorView),
    /// Master weights `[N, K]` and `1/m`.
    Master { tensor: TensorView, float: Float, inv_scale: f32 },
    /// MLX: codes U32 `[N, K·bits/32]`, lowest bits first, and F16 scales `[N, K/group]`, which are
    /// twice the weight's for one bit.
    Mlx { codes: TensorView, scales: TensorView },
    /// GGML blocks. With `one_scale`, the blocks' own scales are all the same (or 0, which makes
    /// weights 0) and not given along.
    Ggml { tensor: TensorView, ty: TernaryType, one_scale: bool },
    /// Floats `[N, K]` of three values.
    ThreeValues { tensor: TensorView, float: Float },
    /// Plain trits `[N, K]`, and f16 scales `[N, K/group]` where there are groups.
    Trits { trits: Vec<i8>, scales: Vec<u16> },
    /// Random trits and scales, a function of the row.
    Synthetic { seed: u64 },
}

impl TernaryMatrix {
    fn new(shape: MatShape, scale: WeightScale, alphabet: Alphabet, rows: Rows) -> Self {
        Self { shape, scale, alphabet, rows, interleaved: None, input: Input::default() }
    }

    /// A matrix from plain trits `[N, K]` and the scale that multiplies them.
    ///
    /// # Panics
    /// If the length does not match the shape.
    pub fn from_trits(shape: MatShape, trits: Vec<i8>, scale: f32) -> Self {
        assert_eq!(trits.len(), shape.len());
        let rows = Rows::Trits { trits, scales: Vec::new() };
        Self::new(shape, WeightScale::Tensor(scale), Alphabet::Ternary, rows)
    }

    /// A matrix from plain trits `[N, K]` and f16 scales `[N, K/group]`.
    ///
    /// # Panics
    /// If the lengths do not match the shape, or the group is no multiple of 64.
    pub fn from_groups(
        shape: MatShape,
        trits: Vec<i8>,
        scales: Vec<u16>,
        group: usize,
        alphabet: Alphabet,
    ) -> Self {
        assert!(group.is_multiple_of(64) && shape.k().is_multiple_of(group));
        assert!(trits.len() == shape.len() && scales.len() == shape.len() / group);
        assert!(alphabet == Alphabet::Ternary || !trits.contains(&0), "binary has no zeros");
        let rows = Rows::Trits { trits, scales };
        Self::new(shape, WeightScale::Groups { group }, alphabet, rows)
    }

    /// A matrix of random trits that take no memory.
    pub(crate) fn synthetic(
        shape: MatShape,
        seed: u64,
        scale: WeightScale,
        alphabet: Alphabet,
    ) -> Self {
        Self::new(shape, scale, alphabet, Rows::Synthetic { seed })
    }

    /// A matrix in the "bitnet" packing of Hugging Face, U8 `[ceil(N/4), K]`, and the scale that
    /// multiplies it. The values are checked as rows are decoded.
    ///
    /// # Panics
    /// If the tensor's length does not match the shape.
    pub(crate) fn from_hf_packed(shape: MatShape, tensor: TensorView, scale: f32) -> Self {
        assert_eq!(tensor.bytes.len(), shape.n().div_ceil(4) * shape.k());
        let scale = WeightScale::Tensor(scale);
        Self::new(shape, scale, Alphabet::Ternary, Rows::HfPacked(tensor))
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
        Ok(Self::new(shape, WeightScale::Tensor(scale), Alphabet::Ternary, rows))
    }

    /// A matrix in an affine pack of MLX, `value = scale·q + bias`, whose biases say that the values
    /// are `±d` (1 bit: `scale = 2d`, `bias = −d`) or `{−d, 0, d}` (2 bits: `scale = d`,
    /// `bias = −d`). The codes are checked as rows are decoded.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for another bias, or a scale that is NaN or infinite.
    ///
    /// # Panics
    /// If a tensor's length does not match the shape.
    pub(crate) fn from_mlx(
        shape: MatShape,
        [codes, scales, biases]: [TensorView; 3],
        bits: usize,
        group: usize,
    ) -> Result<Self> {
        assert_eq!(codes.bytes.len() * 8, shape.len() * bits);
        assert!(scales.bytes.len() == biases.bytes.len());
        assert_eq!(scales.bytes.len() * group, 2 * shape.len());
        let (alphabet, of_scale) = match bits {
            1 => (Alphabet::Binary, 0.5),
            _ => (Alphabet::Ternary, 1.0),
        };
        let groups = shape.k() / group;
        let pairs = scales.bytes.as_chunks().0.iter().zip(biases.bytes.as_chunks().0);
        for (i, (&scale, &bias)) in pairs.enumerate() {
            let [scale, bias] = [scale, bias].map(|bytes| f16_to_f32(u16::from_le_bytes(bytes)));
            let (n, k) = (i / groups, i % groups * group);
            if !scale.is_finite() {
                return Err(value_error(&scales, "finite scales", scale, n, k));
            }
            if bias != -(scale * of_scale) {
                let expected = match bits {
                    1 => "-scale/2 (weights that are two opposite values)",
                    _ => "-scale (ternary weights)",
                };
                return Err(value_error(&biases, expected, bias, n, k));
            }
        }
        let rows = Rows::Mlx { codes, scales };
        Ok(Self::new(shape, WeightScale::Groups { group }, alphabet, rows))
    }

    /// A matrix in a type of GGML: rows of blocks, whose scales are checked here; `scale` for a type
    /// whose blocks have none. The codes are checked as rows are decoded.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for a scale that is NaN or infinite, or a group of inputs that no
    /// kernel takes.
    ///
    /// # Panics
    /// If the tensor is shorter than its shape, or `scale` does not go with the type.
    pub(crate) fn from_ggml(
        shape: MatShape,
        tensor: TensorView,
        ty: TernaryType,
        scale: Option<f32>,
    ) -> Result<Self> {
        let row_bytes = ty.row_bytes(shape.k()).expect("rows are whole blocks");
        assert!(tensor.bytes.len() >= shape.n() * row_bytes);
        let scale = match (ty.group(), scale) {
            (None, Some(scale)) => WeightScale::Tensor(scale),
            (Some(group), None) => WeightScale::Groups { group },
            _ => panic!("{ty:?} has scales of its own or needs one"),
        };
        let alphabet = if ty.is_binary() { Alphabet::Binary } else { Alphabet::Ternary };
        let one_scale = ty.group().is_none();
        let rows = Rows::Ggml { tensor, ty, one_scale };
        let matrix = Self::new(shape, scale, alphabet, rows);
        matrix.each_scale(|n, g, bits| {
            let scale = f16_to_f32(bits);
            if scale.is_finite() {
                return Ok(());
            }
            let Rows::Ggml { tensor, .. } = &matrix.rows else { unreachable!("made above") };
            let group = shape.k() / matrix.groups();
            Err(value_error(tensor, "finite scales", scale, n, g * group))
        })?;
        Ok(matrix)
    }

    /// A matrix from floats `[N, K]` that are 0 or ± one number, as converters write ternary weights
    /// into dense files.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for another value.
    ///
    /// # Panics
    /// If the tensor's length does not match the shape.
    pub(crate) fn from_three_values(
        shape: MatShape,
        tensor: TensorView,
        float: Float,
    ) -> Result<Self> {
        assert_eq!(tensor.bytes.len(), shape.len() * float.len_bytes());
        let row_bytes = shape.k() * float.len_bytes();
        let decode = |bytes: &[u8]| {
            let mut row = vec![0.0; shape.k()];
            float.decode(bytes, &mut row);
            row
        };
        let rows = || tensor.bytes.par_chunks_exact(row_bytes);
        let largest = |row: Vec<f32>| row.iter().fold(0.0f32, |max, weight| max.max(weight.abs()));
        let scale = rows().map(|bytes| largest(decode(bytes))).reduce(|| 0.0, f32::max);
        // A matrix of zeros may have any scale.
        let scale = if scale > 0.0 { scale } else { 1.0 };
        rows().enumerate().try_for_each(|(n, bytes)| {
            let row = decode(bytes);
            let is_trit =
                |weight: f32| weight == 0.0 || (weight.abs() == scale && weight.is_finite());
            match row.iter().position(|&weight| !is_trit(weight)) {
                None => Ok(()),
                Some(k) => {
                    let expected = "0 and ± one number: ternary weights (convert the Hugging Face \
                                    checkpoint, which says how to make them ternary)";
                    Err(value_error(&tensor, expected, row[k], n, k))
                }
            }
        })?;
        let rows = Rows::ThreeValues { tensor, float };
        Ok(Self::new(shape, WeightScale::Tensor(scale), Alphabet::Ternary, rows))
    }

    /// The same matrix with one scale, if the scales of its groups are all the same positive number
    /// (or 0, which makes the group's weights 0); otherwise the matrix as it is.
    ///
    /// # Errors
    /// As [`TernaryMatrix::row`].
    pub(crate) fn collapse(self) -> Result<Self> {
        let Rows::Ggml { one_scale: false, .. } = &self.rows else { return Ok(self) };
        if self.alphabet == Alphabet::Binary {
            return Ok(self);
        }
        let mut common = None;
        let mut several = false;
        self.each_scale(|_, _, bits| {
            if bits & 0x7fff != 0 {
                several |= *common.get_or_insert(bits) != bits || bits & 0x8000 != 0;
            }
            Ok(())
        })?;
        if several {
            return Ok(self);
        }
        let scale = WeightScale::Tensor(common.map_or(1.0, f16_to_f32));
        let Rows::Ggml { tensor, ty, .. } = self.rows else { unreachable!("matched above") };
        Ok(Self { scale, rows: Rows::Ggml { tensor, ty, one_scale: true }, ..self })
    }

    /// Calls `see(n, g, bits)` with every group's scale of a matrix in GGML blocks.
    fn each_scale(&self, mut see: impl FnMut(usize, usize, u16) -> Result<()>) -> Result<()> {
        let Rows::Ggml { tensor, ty, .. } = &self.rows else { return Ok(()) };
        let k = self.shape.k();
        let row_bytes = ty.row_bytes(k).expect("rows are whole blocks");
        let rows = tensor.bytes.chunks_exact(row_bytes.max(1)).take(self.shape.n());
        for (n, row) in rows.enumerate() {
            for (g, bits) in ty.scales(row).enumerate() {
                see(n, g, bits)?;
            }
        }
        Ok(())
    }

    /// The same matrix times a number.
    ///
    /// # Panics
    /// If it has scales of groups.
    pub(crate) fn scaled(self, factor: f32) -> Self {
        let WeightScale::Tensor(scale) = self.scale else { panic!("scales of groups") };
        Self { scale: WeightScale::Tensor(scale * factor), ..self }
    }

    /// The same matrix, whose rows are stored in the order of interleaved RoPE: row `2i` of a head
    /// is its row `i`, row `2i + 1` its row `i + D/2`.
    ///
    /// # Panics
    /// If N is no whole number of heads of `head_dim` rows.
    pub(crate) fn with_interleaved_heads(self, head_dim: usize) -> Self {
        assert!(head_dim.is_multiple_of(2) && self.shape.n().is_multiple_of(head_dim));
        Self { interleaved: Some(head_dim), ..self }
    }

    /// Where row `n` is stored.
    fn stored_row(&self, n: usize) -> usize {
        let Some(head_dim) = self.interleaved else { return n };
        let (head, i) = (n / head_dim, n % head_dim);
        let half = head_dim / 2;
        head * head_dim + if i < half { 2 * i } else { 2 * (i - half) + 1 }
    }

    /// The same matrix, whose input passes `input` first.
    pub fn with_input(self, input: Input) -> Self {
        Self { input, ..self }
    }

    /// `[N, K]`.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// What multiplies a trit back to the effective weight.
    pub fn scale(&self) -> WeightScale {
        self.scale
    }

    /// The weights that occur.
    pub fn alphabet(&self) -> Alphabet {
        self.alphabet
    }

    /// What happens to the vector before it is multiplied.
    pub fn input(&self) -> &Input {
        &self.input
    }

    /// Scales a row: K/group, or 0 where one number scales the matrix.
    pub fn groups(&self) -> usize {
        match self.scale {
            WeightScale::Tensor(_) => 0,
            WeightScale::Groups { group } => self.shape.k() / group,
        }
    }

    /// Decodes the trits of row `n` into `out[K]`.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for a code that stands for no weight.
    ///
    /// # Panics
    /// If `n` is not below N or `out` is not K long.
    pub fn row(&self, n: usize, out: &mut [i8]) -> Result<()> {
        self.row_with_scales(n, out, &mut vec![0; self.groups()])
    }

    /// Decodes row `n`: trits into `out[K]`, and into `scales[K/group]` the IEEE half bits of what
    /// multiplies each group; none where one number scales the matrix.
    ///
    /// # Errors
    /// [`Error::TensorValue`] for a code that stands for no weight, or a scale that is NaN or
    /// infinite.
    ///
    /// # Panics
    /// If `n` is not below N, or a slice has another length.
    pub fn row_with_scales(&self, n: usize, out: &mut [i8], scales: &mut [u16]) -> Result<()> {
        let (k, groups) = (self.shape.k(), self.groups());
        assert!(n < self.shape.n() && out.len() == k && scales.len() == groups);
        let n = self.stored_row(n);
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
            Rows::Mlx { codes, scales: stored } => {
                let words = codes.bytes[n * codes.bytes.len() / self.shape.n()..].as_chunks().0;
                let stored = stored.bytes[2 * n * groups..].as_chunks().0;
                for (scale, &bytes) in scales.iter_mut().zip(stored) {
                    *scale = u16::from_le_bytes(bytes);
                }
                match self.alphabet {
                    Alphabet::Binary => {
                        decode_mlx_bits(words, out);
                        scales.iter_mut().for_each(|scale| *scale = half_of(*scale));
                        Ok(())
                    }
                    Alphabet::Ternary if decode_mlx_pairs(words, out) => Ok(()),
                    Alphabet::Ternary => {
                        let column = out.iter().position(|&trit| trit == 2).unwrap_or_default();
                        Err(value_error(codes, "codes 0, 1 and 2", 3, n, column))
                    }
                }
            }
            Rows::Ggml { tensor, ty, one_scale } => {
                let row_bytes = ty.row_bytes(k).expect("rows are whole blocks");
                let bytes = &tensor.bytes[n * row_bytes..][..row_bytes];
                let decoded = match (one_scale, ty.group()) {
                    (true, Some(group)) => {
                        let mut own = vec![0; k / group];
                        let decoded = ty.decode_row(bytes, out, &mut own);
                        for (trits, scale) in out.chunks_exact_mut(group).zip(own) {
                            if scale & 0x7fff == 0 {
                                trits.fill(0);
                            }
                        }
                        decoded
                    }
                    _ => ty.decode_row(bytes, out, scales),
                };
                decoded.map_err(|bad| value_error(tensor, "codes 0, 1 and 2", 3, n, bad.column))
            }
            Rows::ThreeValues { tensor, float } => {
                let row_bytes = k * float.len_bytes();
                let mut row = vec![0.0; k];
                float.decode(&tensor.bytes[n * row_bytes..][..row_bytes], &mut row);
                for (out, weight) in out.iter_mut().zip(row) {
                    *out = i8::from(weight > 0.0) - i8::from(weight < 0.0);
                }
                Ok(())
            }
            Rows::Trits { trits, scales: stored } => {
                out.copy_from_slice(&trits[n * k..][..k]);
                scales.copy_from_slice(&stored[n * groups..][..groups]);
                Ok(())
            }
            Rows::Synthetic { seed } => {
                crate::synthetic::row(*seed, self.alphabet, n, out, scales);
                Ok(())
            }
        }
    }
}

/// Bits, lowest first: 1 is +1, 0 is −1.
fn decode_mlx_bits(words: &[[u8; 4]], out: &mut [i8]) {
    for (&word, out) in words.iter().zip(out.chunks_mut(32)) {
        let word = u32::from_le_bytes(word);
        for (bit, out) in out.iter_mut().enumerate() {
            *out = 2 * (word >> bit & 1) as i8 - 1;
        }
    }
}

/// Pairs of bits, lowest first, less one; false if one of them is code 3 (which becomes 2).
fn decode_mlx_pairs(words: &[[u8; 4]], out: &mut [i8]) -> bool {
    let mut invalid = 0;
    for (&word, out) in words.iter().zip(out.chunks_mut(16)) {
        let word = u32::from_le_bytes(word);
        invalid |= word & (word >> 1) & 0x5555_5555;
        for (pair, out) in out.iter_mut().enumerate() {
            *out = (word >> (2 * pair) & 3) as i8 - 1;
        }
    }
    invalid == 0
}

/// Half of an IEEE half's value, which [`TernaryMatrix::from_mlx`] has found to be one as well (the
/// bias): one off the exponent, or a subnormal shifted.
fn half_of(bits: u16) -> u16 {
    let (sign, magnitude) = (bits & 0x8000, bits & 0x7fff);
    sign | if magnitude >= 0x0800 { magnitude - 0x0400 } else { magnitude >> 1 }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::float::bf16_to_f32;
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
            let WeightScale::Tensor(found) = matrix.scale() else { panic!("one scale") };
            assert!((found - scale).abs() <= scale * f32::EPSILON);
            let mut row = vec![0; k];
            for (n, expected) in expected.chunks_exact(k).enumerate() {
                matrix.row(n, &mut row).unwrap();
                assert_eq!(row, expected);
            }
        }
    }

    #[test]
    fn half_of_an_ieee_half() {
        for bits in 0..0x7c00u16 {
            let half = f16_to_f32(bits) / 2.0;
            if bits >= 0x0800 || bits % 2 == 0 {
                assert_eq!(f16_to_f32(half_of(bits)), half, "{bits:#x}");
                assert_eq!(f16_to_f32(half_of(bits | 0x8000)), -half, "{bits:#x}");
            }
        }
    }

    fn mlx(bits: usize, words: &[u32], scale: u16, bias: u16) -> Result<TernaryMatrix> {
        let shape = MatShape::new(1, words.len() * 32 / bits).unwrap();
        let groups = shape.k() / 64;
        let codes = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let halves =
            |bits: u16| std::iter::repeat_n(bits.to_le_bytes(), groups).flatten().collect();
        let tensors = [
            view(Dtype::U32, [1, words.len()], codes),
            view(Dtype::F16, [1, groups], halves(scale)),
            view(Dtype::F16, [1, groups], halves(bias)),
        ];
        TernaryMatrix::from_mlx(shape, tensors, bits, 64)
    }

    #[test]
    fn mlx_packs_are_lowest_bits_first() {
        let (mut row, mut scales) = ([0; 64], [0; 1]);
        // Scale 2, bias −1: ±1.
        let binary = mlx(1, &[0b1011, 1 << 31], 0x4000, 0xbc00).unwrap();
        binary.row_with_scales(0, &mut row, &mut scales).unwrap();
        assert_eq!((&row[..5], row[63], scales), (&[1, 1, -1, 1, -1][..], 1, [0x3c00]));
        // Codes 2, 1, 0, 0.
        let ternary = mlx(2, &[0x06, 0x5555_5555, 0x5555_5555, 0x5555_5555], 0x3c00, 0xbc00);
        ternary.unwrap().row_with_scales(0, &mut row, &mut scales).unwrap();
        assert_eq!((&row[..5], row[63], scales), (&[1, 0, -1, -1, -1][..], 0, [0x3c00]));
        let refused = |matrix: Result<TernaryMatrix>| {
            let mut row = [0; 64];
            let result = matrix.and_then(|matrix| matrix.row(0, &mut row));
            result.unwrap_err().to_string()
        };
        assert_eq!(
            refused(mlx(2, &[0x0600_0000, 3, 0, 0], 0x3c00, 0xbc00)),
            "file: tensor tensor: expected codes 0, 1 and 2, found 3 at row 0, column 16"
        );
        assert_eq!(
            refused(mlx(2, &[0; 4], 0x3c00, 0xc000)),
            "file: tensor tensor: expected -scale (ternary weights), found -2 at row 0, column 0"
        );
        assert_eq!(
            refused(mlx(1, &[0; 2], 0x3c00, 0xbc00)),
            "file: tensor tensor: expected -scale/2 (weights that are two opposite values), found \
             -1 at row 0, column 0"
        );
        assert_eq!(
            refused(mlx(1, &[0; 2], 0x7e00, 0xbc00)),
            "file: tensor tensor: expected finite scales, found NaN at row 0, column 0"
        );
    }
}
