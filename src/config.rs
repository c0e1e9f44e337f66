//! `config.json` → validated numbers.

pub use cpu_ref::mlp::Activation;

/// The transformer architectures this version runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `BitNetForCausalLM`: BitNet b1.58 2B4T. Sub-norms before `o_proj` and `down_proj`.
    BitNet,
    /// `LlamaForCausalLM` with ternary linears: Falcon3-1.58, Falcon-E, Llama3-8B-1.58.
    Llama,
}

/// How the ternary weights are stored, as `quantization_config` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightForm {
    /// Packed U8; the stored `weight_scale` multiplies (`autobitlinear`, `offline`).
    PackedMultiply,
    /// Packed U8; the stored `weight_scale` divides (`bitlinear`).
    PackedDivide,
    /// Master weights, ternarised at load by absmean (`autobitlinear`, `online`).
    Online,
}

/// The model's dimensions and switches, spelled as in `config.json`; checked against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which transformer.
    pub architecture: Architecture,
    /// How the ternary weights are stored.
    pub weight_form: WeightForm,
    /// V.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// H, query heads.
    pub num_attention_heads: usize,
    /// G, key/value heads; divides H.
    pub num_key_value_heads: usize,
    /// D, values a head; even.
    pub head_dim: usize,
    /// The gate's activation function.
    pub hidden_act: Activation,
    /// The most positions the model was made for.
    pub max_position_embeddings: usize,
    /// eps of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Whether the LM head is the embedding table.
    pub tie_word_embeddings: bool,
}

impl ModelConfig {
    /// Query width: `H·D`.
    pub fn query_size(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Key (and value) width: `G·D`.
    pub fn kv_size(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Whether a layer has RMSNorms before `o_proj` and `down_proj`.
    pub fn has_sub_norms(&self) -> bool {
        self.architecture == Architecture::BitNet
    }

    /// Head counts as the attention kernels take them.
    pub fn heads(&self) -> cpu_ref::attention::Heads {
        cpu_ref::attention::Heads {
            query: self.num_attention_heads,
            kv: self.num_key_value_heads,
            dim: self.head_dim,
        }
    }
}
