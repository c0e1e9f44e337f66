//! The names and shapes of a checkpoint's tensors, as the files of each kind spell them.

use crate::config::{Architecture, ModelConfig, WeightForm};

/// How a checkpoint spells the names of its tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Naming {
    /// Hugging Face, and MLX after it.
    HuggingFace,
    /// Hugging Face, with the sub-norms of the 1bitLLM models.
    Bitnet1bitLlm,
    /// GGUF.
    Gguf,
}

impl Naming {
    /// The spelling of a checkpoint of this configuration.
    pub fn of(config: &ModelConfig) -> Self {
        match (config.weight_form, config.architecture) {
            (WeightForm::Ggml, _) => Self::Gguf,
            (_, Architecture::Bitnet1bitLlm) => Self::Bitnet1bitLlm,
            _ => Self::HuggingFace,
        }
    }

    /// The embedding table, `[V, hidden]`.
    pub fn embedding(self) -> &'static str {
        self.pick("model.embed_tokens.weight", "token_embd.weight")
    }

    /// The LM head, `[V, hidden]`.
    pub fn lm_head(self) -> &'static str {
        self.pick("lm_head.weight", "output.weight")
    }

    /// The last RMSNorm, `[hidden]`.
    pub fn final_norm(self) -> &'static str {
        self.pick("model.norm.weight", "output_norm.weight")
    }

    /// The layer whose tensor this name is.
    pub fn layer_of(self, name: &str) -> Option<usize> {
        let rest = name.strip_prefix(self.pick("model.layers.", "blk."))?;
        rest.split('.').next()?.parse().ok()
    }

    fn pick(self, hugging_face: &'static str, gguf: &'static str) -> &'static str {
        match self {
            Self::HuggingFace | Self::Bitnet1bitLlm => hugging_face,
            Self::Gguf => gguf,
        }
    }

    fn tensor(self, layer: usize, [hugging_face, bitnet_1bitllm, gguf]: [&str; 3]) -> String {
        match self {
            Self::HuggingFace => format!("model.layers.{layer}.{hugging_face}"),
            Self::Bitnet1bitLlm => format!("model.layers.{layer}.{bitnet_1bitllm}"),
            Self::Gguf => format!("blk.{layer}.{gguf}"),
        }
    }
}

/// A ternary matrix of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Linear {
    /// Between `model.layers.N.` and `.weight` in Hugging Face's spelling.
    pub path: &'static str,
    /// Between `blk.N.` and `.weight` in GGUF.
    gguf: &'static str,
    /// `(N, K)`: output and input features.
    pub shape: fn(&ModelConfig) -> (usize, usize),
}

/// An RMSNorm of a layer.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// Between `model.layers.N.` and `.weight` in Hugging Face's spelling.
    pub path: &'static str,
    /// The same in the 1bitLLM models.
    bitnet_1bitllm: &'static str,
    /// Between `blk.N.` and `.weight` in GGUF.
    gguf: &'static str,
    /// Its length.
    pub len: fn(&ModelConfig) -> usize,
    /// Whether a model of this configuration has it.
    pub is_in: fn(&ModelConfig) -> bool,
}

impl Linear {
    /// The matrix in layer `layer`.
    pub fn weight(&self, naming: Naming, layer: usize) -> String {
        self.with_suffix(naming, layer, ".weight")
    }

    /// Its scale, where it is packed as Hugging Face does.
    pub fn weight_scale(&self, naming: Naming, layer: usize) -> String {
        self.with_suffix(naming, layer, ".weight_scale")
    }

    /// A further scale that some GGUF files have beside it.
    pub fn ggml_scale(&self, layer: usize) -> String {
        self.with_suffix(Naming::Gguf, layer, ".scale")
    }

    /// The norm inside it, where the model has such norms: `rms_norm` in Hugging Face's classes.
    pub fn norm(&self, naming: Naming, layer: usize) -> String {
        match naming {
            Naming::Gguf => format!("blk.{layer}.{}_norm_in.weight", self.gguf),
            _ => self.with_suffix(naming, layer, ".rms_norm.weight"),
        }
    }

    fn with_suffix(&self, naming: Naming, layer: usize, suffix: &str) -> String {
        naming.tensor(layer, [self.path, self.path, self.gguf]) + suffix
    }
}

impl Norm {
    /// The norm in layer `layer`.
    pub fn weight(&self, naming: Naming, layer: usize) -> String {
        naming.tensor(layer, [self.path, self.bitnet_1bitllm, self.gguf]) + ".weight"
    }
}

/// Queries.
pub const Q_PROJ: Linear =
    Linear { path: "self_attn.q_proj", gguf: "attn_q", shape: |c| (c.query_size(), c.hidden_size) };
/// Keys.
pub const K_PROJ: Linear =
    Linear { path: "self_attn.k_proj", gguf: "attn_k", shape: |c| (c.kv_size(), c.hidden_size) };
/// Values.
pub const V_PROJ: Linear =
    Linear { path: "self_attn.v_proj", gguf: "attn_v", shape: |c| (c.kv_size(), c.hidden_size) };
/// Attention's output.
pub const O_PROJ: Linear = Linear {
    path: "self_attn.o_proj",
    gguf: "attn_output",
    shape: |c| (c.hidden_size, c.query_size()),
};
/// The MLP's gate.
pub const GATE_PROJ: Linear = Linear {
    path: "mlp.gate_proj",
    gguf: "ffn_gate",
    shape: |c| (c.intermediate_size, c.hidden_size),
};
/// What the gate multiplies.
pub const UP_PROJ: Linear =
    Linear { path: "mlp.up_proj", gguf: "ffn_up", shape: |c| (c.intermediate_size, c.hidden_size) };
/// The MLP's output.
pub const DOWN_PROJ: Linear = Linear {
    path: "mlp.down_proj",
    gguf: "ffn_down",
    shape: |c| (c.hidden_size, c.intermediate_size),
};

/// The ternary matrices of a layer, in the order of the forward pass.
pub const LINEARS: [Linear; 7] = [Q_PROJ, K_PROJ, V_PROJ, O_PROJ, GATE_PROJ, UP_PROJ, DOWN_PROJ];

/// Before attention.
pub const INPUT_LAYERNORM: Norm = Norm {
    path: "input_layernorm",
    bitnet_1bitllm: "input_layernorm",
    gguf: "attn_norm",
    len: |c| c.hidden_size,
    is_in: |_| true,
};
/// Of every query head.
pub const Q_NORM: Norm = Norm {
    path: "self_attn.q_norm",
    bitnet_1bitllm: "self_attn.q_norm",
    gguf: "attn_q_norm",
    len: |c| c.head_dim,
    is_in: ModelConfig::has_head_norms,
};
/// Of every key head.
pub const K_NORM: Norm = Norm {
    path: "self_attn.k_norm",
    bitnet_1bitllm: "self_attn.k_norm",
    gguf: "attn_k_norm",
    len: |c| c.head_dim,
    is_in: ModelConfig::has_head_norms,
};
/// Before `o_proj`.
pub const ATTN_SUB_NORM: Norm = Norm {
    path: "self_attn.attn_sub_norm",
    bitnet_1bitllm: "self_attn.inner_attn_ln",
    gguf: "attn_sub_norm",
    len: ModelConfig::query_size,
    is_in: ModelConfig::has_sub_norms,
};
/// Before the MLP.
pub const POST_ATTENTION_LAYERNORM: Norm = Norm {
    path: "post_attention_layernorm",
    bitnet_1bitllm: "post_attention_layernorm",
    gguf: "ffn_norm",
    len: |c| c.hidden_size,
    is_in: |_| true,
};
/// Before `down_proj`.
pub const FFN_SUB_NORM: Norm = Norm {
    path: "mlp.ffn_sub_norm",
    bitnet_1bitllm: "mlp.ffn_layernorm",
    gguf: "ffn_sub_norm",
    len: |c| c.intermediate_size,
    is_in: ModelConfig::has_sub_norms,
};

/// The RMSNorms that a layer may have, in the order of the forward pass.
pub const NORMS: [Norm; 6] =
    [INPUT_LAYERNORM, Q_NORM, K_NORM, ATTN_SUB_NORM, POST_ATTENTION_LAYERNORM, FFN_SUB_NORM];

/// The RMSNorms of a layer of this configuration, in the order of the forward pass.
pub fn norms(config: &ModelConfig) -> impl Iterator<Item = Norm> {
    NORMS.into_iter().filter(|norm| (norm.is_in)(config))
}
