//! The names and shapes of a checkpoint's tensors, as Hugging Face writes them.

use crate::config::ModelConfig;

/// The embedding table, `[V, hidden]`.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The LM head, `[V, hidden]`.
pub const LM_HEAD: &str = "lm_head.weight";
/// The last RMSNorm, `[hidden]`.
pub const FINAL_NORM: &str = "model.norm.weight";

/// A ternary matrix of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    /// Between `model.layers.N.` and `.weight`.
    pub path: &'static str,
    /// `(N, K)`: output and input features.
    pub shape: fn(&ModelConfig) -> (usize, usize),
}

/// An RMSNorm of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// Between `model.layers.N.` and `.weight`.
    pub path: &'static str,
    /// Its length.
    pub len: fn(&ModelConfig) -> usize,
    /// Whether only architectures with sub-norms have it.
    pub is_sub_norm: bool,
}

impl Linear {
    /// The matrix in layer `layer`.
    pub fn weight(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.weight", self.path)
    }

    /// Its scale, where it is packed.
    pub fn weight_scale(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.weight_scale", self.path)
    }
}

impl Norm {
    /// The norm in layer `layer`.
    pub fn weight(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}.weight", self.path)
    }
}

/// Queries.
pub const Q_PROJ: Linear =
    Linear { path: "self_attn.q_proj", shape: |c| (c.query_size(), c.hidden_size) };
/// Keys.
pub const K_PROJ: Linear =
    Linear { path: "self_attn.k_proj", shape: |c| (c.kv_size(), c.hidden_size) };
/// Values.
pub const V_PROJ: Linear =
    Linear { path: "self_attn.v_proj", shape: |c| (c.kv_size(), c.hidden_size) };
/// Attention's output.
pub const O_PROJ: Linear =
    Linear { path: "self_attn.o_proj", shape: |c| (c.hidden_size, c.query_size()) };
/// The MLP's gate.
pub const GATE_PROJ: Linear =
    Linear { path: "mlp.gate_proj", shape: |c| (c.intermediate_size, c.hidden_size) };
/// What the gate multiplies.
pub const UP_PROJ: Linear =
    Linear { path: "mlp.up_proj", shape: |c| (c.intermediate_size, c.hidden_size) };
/// The MLP's output.
pub const DOWN_PROJ: Linear =
    Linear { path: "mlp.down_proj", shape: |c| (c.hidden_size, c.intermediate_size) };

/// The ternary matrices of a layer, in the order of the forward pass.
pub const LINEARS: [Linear; 7] = [Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ];

/// Before attention.
pub const INPUT_LAYERNORM: Norm =
    Norm { path: "input_layernorm", len: |c| c.hidden_size, is_sub_norm: false };
/// Before `o_proj`.
pub const ATTN_SUB_NORM: Norm =
    Norm { path: "self_attn.attn_sub_norm", len: ModelConfig::query_size, is_sub_norm: true };
/// Before the MLP.
pub const POST_ATTENTION_LAYERNORM: Norm =
    Norm { path: "post_attention_layernorm", len: |c| c.hidden_size, is_sub_norm: false };
/// Before `down_proj`.
pub const FFN_SUB_NORM: Norm =
    Norm { path: "mlp.ffn_sub_norm", len: |c| c.intermediate_size, is_sub_norm: true };

/// The RMSNorms of a layer of this architecture, in the order of the forward pass.
pub fn norms(config: &ModelConfig) -> impl Iterator<Item = Norm> + use<> {
    let has_sub_norms = config.has_sub_norms();
    [INPUT_LAYERNORM, ATTN_SUB_NORM, POST_ATTENTION_LAYERNORM, FFN_SUB_NORM]
        .into_iter()
        .filter(move |norm| has_sub_norms || !norm.is_sub_norm)
}
