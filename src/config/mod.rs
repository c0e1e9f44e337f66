//! A model's dimensions and switches: metadata in, validated numbers out.
//!
//! The file decides, never a guess: what it leaves out has the default of the original class where
//! that is documented and an error otherwise; what it says twice must agree; what this version does
//! not compute is refused by name.

pub(crate) mod gguf;
mod hf;

pub use cpu_ref::mlp::Activation;
pub use cpu_ref::rope::Scaling as RopeScaling;

use crate::error::{Error, Result};

/// Most layers.
const MAX_LAYERS: usize = 1 << 12;

/// Most heads, and values a head.
const MAX_HEADS: usize = 1 << 16;

/// The transformer architectures this version runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `BitNetForCausalLM`: BitNet b1.58 2B4T. Sub-norms before `o_proj` and `down_proj`.
    BitNet,
    /// `BitnetForCausalLM`: the 1bitLLM reproductions of BitNet b1.58. As [`Architecture::BitNet`],
    /// with SiLU and other tensor names.
    Bitnet1bitLlm,
    /// `LlamaForCausalLM` with ternary linears: Falcon3-1.58, Falcon-E, Llama3-8B-1.58.
    Llama,
    /// `Qwen3ForCausalLM`: Bonsai and Ternary-Bonsai. RMSNorm on every query and key head.
    Qwen3,
}

/// How the linear layers' weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightForm {
    /// Packed U8; the stored `weight_scale` multiplies (`autobitlinear`, `offline`).
    PackedMultiply,
    /// Packed U8; the stored `weight_scale` divides (`bitlinear`).
    PackedDivide,
    /// Master weights, ternarised at load by absmean (`autobitlinear`, `online`; 1bitLLM).
    Online,
    /// MLX affine packs: `bits` a weight, one scale for every `group` inputs.
    Mlx {
        /// 1 (binary) or 2 (ternary).
        bits: usize,
        /// Inputs a scale.
        group: usize,
    },
    /// GGML types, which each tensor of a GGUF file names for itself.
    Ggml,
}

/// What the linear layers multiply their weights with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activations {
    /// int8, one scale a token: BitNet and its relatives.
    Int8Token,
    /// f32, as models define it whose weights alone are quantised.
    Float,
    /// int8, one scale a token and group of inputs: a faster stand-in for [`Activations::Float`].
    Int8Group,
}

/// The model's dimensions and switches, spelled as in `config.json`; checked against each other.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which transformer.
    pub architecture: Architecture,
    /// How the linear layers' weights are stored.
    pub weight_form: WeightForm,
    /// What they are multiplied with, as the model defines it.
    pub activations: Activations,
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
    /// eps of every RMSNorm but those inside linear layers.
    pub rms_norm_eps: f32,
    /// eps of the RMSNorm inside each linear layer (`use_rms_norm`); `None` if there is none.
    pub linear_norm_eps: Option<f32>,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Whether the LM head is the embedding table.
    pub tie_word_embeddings: bool,
}

impl Architecture {
    /// All, in the words of an error message.
    const NAMES: &str =
        "BitNetForCausalLM, BitnetForCausalLM, LlamaForCausalLM and Qwen3ForCausalLM";

    /// The class of that name. `BitnetForCausalLM` (1bitLLM) is another architecture than
    /// `BitNetForCausalLM`.
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "BitNetForCausalLM" => Some(Self::BitNet),
            "BitnetForCausalLM" => Some(Self::Bitnet1bitLlm),
            "LlamaForCausalLM" => Some(Self::Llama),
            "Qwen3ForCausalLM" => Some(Self::Qwen3),
            _ => None,
        }
    }

    /// As `architectures` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::BitNet => "BitNetForCausalLM",
            Self::Bitnet1bitLlm => "BitnetForCausalLM",
            Self::Llama => "LlamaForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The `model_type` of the class.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::BitNet => "bitnet",
            Self::Bitnet1bitLlm | Self::Llama => "llama",
            Self::Qwen3 => "qwen3",
        }
    }

    /// The default `hidden_act` of the class.
    pub(crate) fn default_hidden_act(self) -> Activation {
        match self {
            Self::BitNet => Activation::Relu2,
            Self::Bitnet1bitLlm | Self::Llama | Self::Qwen3 => Activation::Silu,
        }
    }

    /// Whether a layer has RMSNorms before `o_proj` and `down_proj`.
    pub fn has_sub_norms(self) -> bool {
        matches!(self, Self::BitNet | Self::Bitnet1bitLlm)
    }

    /// Whether queries and keys pass an RMSNorm over each head.
    pub fn has_head_norms(self) -> bool {
        self == Self::Qwen3
    }
}

impl ModelConfig {
    /// Reads `config.json`; `file` names it in errors.
    ///
    /// # Errors
    /// [`Error::Json`] if it does not parse, [`Error::UnknownArchitecture`],
    /// [`Error::Config`] for a value that is missing, out of range, unsupported or contradicts
    /// another.
    pub fn parse(file: &str, json: &[u8]) -> Result<Self> {
        hf::parse(file, json)
    }

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
        self.architecture.has_sub_norms()
    }

    /// Whether queries and keys pass an RMSNorm over each head.
    pub fn has_head_norms(&self) -> bool {
        self.architecture.has_head_norms()
    }

    /// Head counts as the attention kernels take them.
    pub fn heads(&self) -> cpu_ref::attention::Heads {
        cpu_ref::attention::Heads {
            query: self.num_attention_heads,
            kv: self.num_key_value_heads,
            dim: self.head_dim,
        }
    }

    /// Rotary frequencies, `[D/2]`, and what multiplies cosine and sine.
    pub fn frequencies(&self) -> cpu_ref::rope::Frequencies {
        cpu_ref::rope::frequencies(self.rope_theta, self.head_dim, self.rope_scaling)
    }
}

/// The file's name, for errors.
pub(crate) struct File<'a>(pub(crate) &'a str);

impl File<'_> {
    pub(crate) fn error(
        &self,
        key: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Config {
            file: self.0.to_owned(),
            key: key.to_owned(),
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// A dimension that the file must give, 1 to `max`.
    pub(crate) fn dimension(&self, key: &str, value: Option<u64>, max: usize) -> Result<usize> {
        let expected = || format!("1 to {max}");
        let value = value.ok_or_else(|| self.error(key, expected(), "nothing"))?;
        match usize::try_from(value) {
            Ok(size) if (1..=max).contains(&size) => Ok(size),
            _ => Err(self.error(key, expected(), value.to_string())),
        }
    }

    /// A number that is finite and positive as f32.
    pub(crate) fn positive(&self, key: &str, value: Option<f64>) -> Result<f32> {
        const EXPECTED: &str = "a positive number";
        let value = value.ok_or_else(|| self.error(key, EXPECTED, "nothing"))?;
        let narrowed = value as f32;
        if narrowed.is_finite() && narrowed > 0.0 {
            Ok(narrowed)
        } else {
            Err(self.error(key, EXPECTED, format!("{value:?}")))
        }
    }

    fn must_be_false(&self, key: &str, value: Option<bool>) -> Result<()> {
        match value {
            Some(true) => Err(self.error(key, "false", "true")),
            Some(false) | None => Ok(()),
        }
    }
}
