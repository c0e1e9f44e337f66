//! Named tensors → typed weights, with every shape and scale checked here.

mod int8_rows;
mod packed;
mod stored;
mod table;
mod ternary;

use std::sync::Arc;

pub use crate::checkpoint::{Checkpoint, MemorySummary};
pub use int8_rows::Int8Rows;
pub use packed::{PackedRun, RunScales, is_binary};
pub use stored::StoredRows;
pub use table::{Codes, Rows, Table, TableData};
pub use ternary::{Alphabet, TernaryMatrix, WeightScale};

use crate::config::ModelConfig;
use crate::error::Result;
use crate::session::{Identity, IdentityHash};
use crate::tensor_names::{
    ATTN_SUB_NORM, DOWN_PROJ, FFN_SUB_NORM, GATE_PROJ, INPUT_LAYERNORM, K_NORM, K_PROJ, Linear,
    Norm, O_PROJ, POST_ATTENTION_LAYERNORM, Q_NORM, Q_PROJ, UP_PROJ, V_PROJ,
};

/// What a linear layer does to its input before it multiplies; usually nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Input {
    /// An RMSNorm of its own, `[K]`, with the eps of `ModelConfig::linear_norm_eps`; comes first.
    pub norm: Option<Arc<[f32]>>,
    /// The rotation that the weights are stored in; comes second.
    pub rotation: Option<Arc<Rotation>>,
}

/// A blockwise Hadamard rotation: see `cpu_ref::hadamard`.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    /// Values a block, a power of two.
    pub block: usize,
    /// ±1, `[K]`.
    pub signs: Vec<f32>,
}

impl Rotation {
    /// `x → H(s∘x)`: what a rotated matrix wants as input.
    pub fn rotate(&self, x: &[f32]) -> Vec<f32> {
        cpu_ref::hadamard::rotate(x, &self.signs, self.block)
    }

    /// `z → s∘H(z)`: a row of a rotated table in its own basis.
    pub fn rotate_back(&self, z: &[f32]) -> Vec<f32> {
        cpu_ref::hadamard::rotate_back(z, &self.signs, self.block)
    }
}

/// Splits matrices that read the same vector into runs that take it through the same [`Input`] and
/// have scales of the same groups, so that each run is one matrix to a backend: usually one run.
pub fn runs_of_input<'a, 'b>(matrices: &'b [&'a TernaryMatrix]) -> Vec<&'b [&'a TernaryMatrix]> {
    let alike =
        |a: &&TernaryMatrix, b: &&TernaryMatrix| a.input() == b.input() && a.groups() == b.groups();
    matrices.chunk_by(alike).collect()
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
    /// RMSNorm of every query head, `[D]`, where the architecture has one.
    pub q_norm: Option<Vec<f32>>,
    /// RMSNorm of every key head, `[D]`, where the architecture has one.
    pub k_norm: Option<Vec<f32>>,
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
            (Q_NORM, self.q_norm.as_ref()),
            (K_NORM, self.k_norm.as_ref()),
            (ATTN_SUB_NORM, self.attn_sub_norm.as_ref()),
            (POST_ATTENTION_LAYERNORM, Some(&self.post_attention_layernorm)),
            (FFN_SUB_NORM, self.ffn_sub_norm.as_ref()),
        ]
        .into_iter()
        .filter_map(|(norm, weights)| weights.map(|weights| (norm, weights.as_slice())))
    }
}

/// A state of a model's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    /// The model's path.
    pub label: String,
    /// Length and time of last change of each file.
    pub bytes: Vec<u8>,
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
    fn embedding(&self) -> Result<Table>;
    /// The LM head `[V, hidden]`; `None` if it is the embedding table.
    ///
    /// # Errors
    /// If the tensor is missing or malformed.
    fn lm_head(&self) -> Result<Option<Table>>;
    /// [`WeightSource::embedding`] of a source whose [`WeightSource::stamp`] is that of an earlier load:
    /// what was checked then need not be read now.
    ///
    /// # Errors
    /// As [`WeightSource::embedding`].
    fn checked_embedding(&self) -> Result<Table> {
        self.embedding()
    }
    /// The same for [`WeightSource::lm_head`].
    ///
    /// # Errors
    /// As [`WeightSource::lm_head`].
    fn checked_lm_head(&self) -> Result<Option<Table>> {
        self.lm_head()
    }
    /// [`WeightSource::embedding`] for who goes through it once: its rows may still be in their file
    /// ([`TableData::Stored`]).
    ///
    /// # Errors
    /// As [`WeightSource::embedding`].
    fn stored_embedding(&self) -> Result<Table> {
        self.embedding()
    }
    /// The same for [`WeightSource::lm_head`].
    ///
    /// # Errors
    /// As [`WeightSource::lm_head`].
    fn stored_lm_head(&self) -> Result<Option<Table>> {
        self.lm_head()
    }
    /// What tells whether the source's files are still the same; `None` if it is not made of files.
    ///
    /// # Errors
    /// If the system does not tell.
    fn stamp(&self) -> Result<Option<Stamp>> {
        Ok(None)
    }
    /// The last RMSNorm's weight `[hidden]`.
    ///
    /// # Errors
    /// If the tensor is missing or malformed.
    fn final_norm(&self) -> Result<Vec<f32>>;
    /// Rotary frequencies: those of the configuration, unless the checkpoint has its own.
    ///
    /// # Errors
    /// If the tensor is malformed.
    fn frequencies(&self) -> Result<cpu_ref::rope::Frequencies> {
        Ok(self.config().frequencies())
    }
    /// Which model this is. Without files there are only some values to tell by.
    ///
    /// # Errors
    /// If a tensor is missing or malformed.
    fn identity(&self) -> Result<Identity> {
        let mut hash = IdentityHash::new(self.config());
        let mut row = vec![0.0; self.config().hidden_size];
        self.embedding()?.row(0, &mut row)?;
        hash.add(bytemuck::cast_slice(&row));
        hash.add(bytemuck::cast_slice(&self.final_norm()?));
        Ok(hash.finish())
    }
    /// The weights of layer `index`.
    ///
    /// # Errors
    /// If a tensor is missing or malformed.
    fn layer(&self, index: usize) -> Result<LayerWeights>;
}
