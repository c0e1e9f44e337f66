//! The metadata of a GGUF file.

use super::{
    Activation, Activations, Architecture, File, MAX_HEADS, MAX_LAYERS, ModelConfig, RopeScaling,
    WeightForm,
};
use crate::error::{Error, Result};
use crate::format::gguf::{FromValue, Metadata};
use crate::format::{quoted, shortened};
use crate::shape::MAX_DIMENSION;

/// The architectures of GGUF that this version runs, in the words of an error message.
const NAMES: &str = "bitnet, bitnet-25, bitnet-b1.58, llama and qwen3";

/// Keys after the architecture's name that change the computation in a way this version does not
/// know, unless they have this value.
const NEUTRAL: [(&str, f64); 14] = [
    ("attention.scale", 0.0),
    ("attention.sliding_window", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("logit_scale", 1.0),
    ("expert_count", 0.0),
    ("expert_used_count", 0.0),
    ("rope.scaling.yarn_ext_factor", 1.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
    ("rope.scale_linear", 1.0),
];

/// What the tensors of the file say, which the metadata leave out.
pub(crate) struct FromTensors {
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// Whether there is an LM head of its own.
    pub has_lm_head: bool,
    /// Whether linear layers have norms inside.
    pub has_linear_norms: bool,
    /// What the weights' scales say of the activations.
    pub activations: Activations,
}

/// The architecture that the file names; `None` in the second place is the architecture's own
/// activation function.
pub(crate) fn architecture(metadata: &Metadata) -> Result<Architecture> {
    let name: &str = metadata.require("general.architecture")?;
    Ok(match name {
        "bitnet" | "bitnet-25" | "bitnet-b1.58" => Architecture::BitNet,
        "llama" => Architecture::Llama,
        "qwen3" => Architecture::Qwen3,
        _ => {
            return Err(Error::UnknownArchitecture {
                file: metadata.file().to_owned(),
                found: shortened(name),
                expected: NAMES,
            });
        }
    })
}

/// Whether queries and keys have their rows reordered for interleaved RoPE: converters do that for
/// this architecture alone.
pub(crate) fn has_interleaved_heads(architecture: Architecture) -> bool {
    architecture == Architecture::Llama
}

/// Reads the configuration.
pub(crate) fn config(metadata: &Metadata, tensors: &FromTensors) -> Result<ModelConfig> {
    let keys = Keys { metadata, arch: metadata.require("general.architecture")? };
    let architecture = architecture(metadata)?;
    keys.check_neutral()?;
    let hidden_size = keys.dimension("embedding_length", MAX_DIMENSION)?;
    let intermediate_size = keys.dimension("feed_forward_length", MAX_DIMENSION)?;
    let num_hidden_layers = keys.dimension("block_count", MAX_LAYERS)?;
    let num_attention_heads = keys.dimension("attention.head_count", MAX_HEADS)?;
    let num_key_value_heads = match keys.get::<usize>("attention.head_count_kv")? {
        None => num_attention_heads,
        Some(_) => keys.dimension("attention.head_count_kv", num_attention_heads)?,
    };
    if !num_attention_heads.is_multiple_of(num_key_value_heads) {
        let expected = format!("a divisor of attention.head_count = {num_attention_heads}");
        let found = num_key_value_heads.to_string();
        return Err(keys.error("attention.head_count_kv", expected, found));
    }
    let head_dim = keys.head_dim(hidden_size, num_attention_heads)?;
    let query_size = num_attention_heads * head_dim;
    if architecture.has_sub_norms() && query_size != hidden_size {
        let expected = format!("embedding_length / attention.head_count, for {}", keys.arch);
        return Err(keys.error("attention.key_length", expected, head_dim.to_string()));
    }
    let shape = (num_hidden_layers, hidden_size, intermediate_size);
    Ok(ModelConfig {
        architecture,
        weight_form: WeightForm::Ggml,
        activations: tensors.activations,
        vocab_size: tensors.vocab_size,
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        head_dim,
        hidden_act: keys.hidden_act(architecture, shape)?,
        max_position_embeddings: keys.dimension("context_length", MAX_DIMENSION)?,
        rms_norm_eps: keys.positive("attention.layer_norm_rms_epsilon", None)?,
        linear_norm_eps: match tensors.has_linear_norms {
            true => Some(keys.positive("attention.layer_norm_rms_epsilon", None)?),
            false => None,
        },
        rope_theta: keys.positive("rope.freq_base", Some(10_000.0))?,
        rope_scaling: keys.rope_scaling()?,
        // The graph of the BitNet architectures uses the table even if there is a head.
        tie_word_embeddings: !tensors.has_lm_head || architecture == Architecture::BitNet,
    })
}

/// The keys that begin with the architecture's name.
struct Keys<'a> {
    metadata: &'a Metadata,
    arch: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn get<'a, T: FromValue<'a>>(&'a self, name: &str) -> Result<Option<T>> {
        self.metadata.get(&self.key(name))
    }

    fn error(&self, name: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
        File(self.metadata.file()).error(&self.key(name), expected, found)
    }

    /// A dimension that the file must give, 1 to `max`.
    fn dimension(&self, name: &str, max: usize) -> Result<usize> {
        let value = self.get::<u64>(name)?;
        File(self.metadata.file()).dimension(&self.key(name), value, max)
    }

    /// A number that is positive as f32.
    fn positive(&self, name: &str, default: Option<f64>) -> Result<f32> {
        let value = self.get::<f64>(name)?.or(default);
        File(self.metadata.file()).positive(&self.key(name), value)
    }

    /// A number of any type.
    fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.get::<f64>(name) {
            Err(_) => Ok(self.get::<u64>(name)?.map(|value| value as f64)),
            value => value,
        }
    }

    /// Refuses what this version would leave out of the computation.
    fn check_neutral(&self) -> Result<()> {
        for (name, neutral) in NEUTRAL {
            // −1 stands for "as the scaling says".
            let is_neutral =
                |value: f64| value == neutral || (name.ends_with("ext_factor") && value == -1.0);
            if let Some(value) = self.number(name)?.filter(|&value| !is_neutral(value)) {
                return Err(self.error(name, neutral.to_string(), value.to_string()));
            }
        }
        if self.get::<bool>("attention.causal")? == Some(false) {
            return Err(self.error("attention.causal", "true", "false"));
        }
        Ok(())
    }

    /// D: given for keys and values alike, or `embedding_length / attention.head_count`; rotated as
    /// a whole.
    fn head_dim(&self, hidden_size: usize, heads: usize) -> Result<usize> {
        const KEY: &str = "attention.key_length";
        let head_dim = match self.get::<u64>(KEY)? {
            Some(_) => self.dimension(KEY, MAX_HEADS)?,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let expected = format!("a divisor of embedding_length = {hidden_size}");
                return Err(self.error("attention.head_count", expected, heads.to_string()));
            }
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(len) = self.get::<u64>(name)?.filter(|&len| len != head_dim as u64) {
                let expected = format!("{head_dim}, as {KEY}");
                return Err(self.error(name, expected, len.to_string()));
            }
        }
        if !head_dim.is_multiple_of(2) {
            return Err(self.error(KEY, "an even number", head_dim.to_string()));
        }
        // Both factors are at most 2^16, so that the product fits u64 everywhere.
        let query_size = heads as u64 * head_dim as u64;
        if query_size > MAX_DIMENSION as u64 {
            let expected = format!("attention.head_count x key_length at most {MAX_DIMENSION}");
            return Err(self.error(KEY, expected, query_size.to_string()));
        }
        Ok(head_dim)
    }

    /// The gate's activation: `hidden_activation` where a newer converter wrote it; else SiLU for
    /// `bitnet`, which the 1bitLLM models carry, and relu² for its successors. Files of 2B4T that
    /// were converted before those had names of their own carry `bitnet` too: its dimensions tell.
    fn hidden_act(
        &self,
        architecture: Architecture,
        shape: (usize, usize, usize),
    ) -> Result<Activation> {
        for name in ["hidden_activation", "hidden_act"] {
            match self.get::<&str>(name)? {
                None => {}
                Some("silu" | "swiglu") => return Ok(Activation::Silu),
                Some("relu2" | "relu_sqr") => return Ok(Activation::Relu2),
                Some(other) => return Err(self.error(name, "silu or relu2", quoted(other))),
            }
        }
        Ok(match self.arch {
            "bitnet" if shape != SHAPE_OF_2B4T => Activation::Silu,
            _ => architecture.default_hidden_act(),
        })
    }

    fn rope_scaling(&self) -> Result<RopeScaling> {
        const TYPE: &str = "rope.scaling.type";
        const ATTN_FACTOR: &str = "rope.scaling.attn_factor";
        let kind = self.get::<&str>(TYPE)?;
        if let Some(factor) = self.number(ATTN_FACTOR)?.filter(|&factor| factor != 1.0)
            && kind != Some("yarn")
        {
            return Err(self.error(ATTN_FACTOR, "1 without yarn", factor.to_string()));
        }
        Ok(match kind {
            None | Some("none") => RopeScaling::None,
            Some("linear") => {
                RopeScaling::Linear { factor: self.positive("rope.scaling.factor", None)? }
            }
            Some("yarn") => {
                let factor = self.positive("rope.scaling.factor", None)?;
                let context = self.get::<u64>("context_length")?;
                let original = self.get::<u64>("rope.scaling.original_context_length")?.or(context);
                let extra = self.positive(ATTN_FACTOR, Some(1.0))?;
                RopeScaling::Yarn {
                    factor,
                    original_context: File(self.metadata.file()).dimension(
                        &self.key("rope.scaling.original_context_length"),
                        original,
                        MAX_DIMENSION,
                    )? as f32,
                    beta_fast: self.positive("rope.scaling.yarn_beta_fast", Some(32.0))?,
                    beta_slow: self.positive("rope.scaling.yarn_beta_slow", Some(1.0))?,
                    attention_factor: extra * RopeScaling::yarn_attention_factor(factor),
                }
            }
            Some(other) => return Err(self.error(TYPE, "none, linear or yarn", quoted(other))),
        })
    }
}

/// Layers, embedding and feed-forward length of BitNet b1.58 2B4T.
pub(crate) const SHAPE_OF_2B4T: (usize, usize, usize) = (30, 2560, 6912);
