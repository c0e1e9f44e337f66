//! Named tensors → typed weights, with every shape and scale checked here.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::format::{Dtype, TensorView};
use crate::shape::MatShape;

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
    Master { tensor: TensorView, inv_scale: f32 },
    /// Plain trits `[N, K]`.
    Trits(Vec<i8>),
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

    /// Writes row `n`'s trits into `out[K]`.
    ///
    /// # Errors
    /// If the file holds a code that is no trit.
    ///
    /// # Panics
    /// If `n` is not below N or `out` is not K long.
    pub fn row(&self, n: usize, out: &mut [i8]) -> Result<()> {
        let k = self.shape.k();
        match &self.rows {
            Rows::Trits(trits) => out.copy_from_slice(&trits[n * k..][..k]),
            _ => todo!(),
        }
        Ok(())
    }

    /// `[N, K]`.
    pub fn shape(&self) -> MatShape {
        self.shape
    }

    /// Multiplies a trit back to the effective weight.
    pub fn scale(&self) -> f32 {
        self.scale
    }
}

/// A full-precision matrix `[N, K]`: the embedding table or an untied LM head.
pub struct DenseMatrix {
    shape: MatShape,
    data: DenseData,
}

impl DenseMatrix {
    /// Writes row `n` into `out[K]`.
    pub fn row(&self, n: usize, out: &mut [f32]) {
        todo!()
    }
    /// x
    pub fn data(&self) -> &DenseData {
        &self.data
    }
    /// x
    pub fn shape(&self) -> MatShape {
        self.shape
    }
}

/// The elements of a [`DenseMatrix`], in the precision of the file.
pub enum DenseData {
    /// bfloat16 bit patterns.
    Bf16(Vec<u16>),
    /// IEEE half bit patterns.
    F16(Vec<u16>),
    /// IEEE single.
    F32(Vec<f32>),
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
