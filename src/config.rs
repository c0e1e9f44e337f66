//! `config.json` → validated numbers.
//!
//! The file decides, never a guess: what it leaves out has the default of the original class where
//! that is documented and an error otherwise; what it says twice must agree; what this version does
//! not compute is refused by name.

use serde::Deserialize;
use serde_json::{Map, Value};

pub use cpu_ref::mlp::Activation;

use crate::error::{Error, Result};
use crate::format::{quoted, shortened};
use crate::shape::MAX_DIMENSION;

/// Most layers.
const MAX_LAYERS: usize = 1 << 12;

/// Most heads, and values a head.
const MAX_HEADS: usize = 1 << 16;

/// What `max_position_embeddings` is where the file leaves it out: the default of both classes.
const DEFAULT_MAX_POSITION_EMBEDDINGS: usize = 2048;

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

impl Architecture {
    /// All, in the words of an error message.
    const NAMES: &str = "BitNetForCausalLM and LlamaForCausalLM";

    /// The class of that name. `BitnetForCausalLM` (1bitLLM) is another architecture than
    /// `BitNetForCausalLM`.
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "BitNetForCausalLM" => Some(Self::BitNet),
            "LlamaForCausalLM" => Some(Self::Llama),
            _ => None,
        }
    }

    /// As `architectures` spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::BitNet => "BitNetForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }

    /// The `model_type` of the class.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::BitNet => "bitnet",
            Self::Llama => "llama",
        }
    }

    /// The default `hidden_act` of the class.
    fn default_hidden_act(self) -> Activation {
        match self {
            Self::BitNet => Activation::Relu2,
            Self::Llama => Activation::Silu,
        }
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
        let raw: Raw = serde_json::from_slice(json)
            .map_err(|source| Error::Json { file: file.to_owned(), source })?;
        raw.check(&File(file))
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

/// The keys of `config.json` that decide what is computed. A repeated key is an error of serde's.
#[derive(Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    quantization_config: Option<RawQuantization>,
    vocab_size: Option<u64>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    hidden_act: Option<String>,
    max_position_embeddings: Option<u64>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    rope_parameters: Option<Map<String, Value>>,
    partial_rotary_factor: Option<f64>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
    quantization_mode: Option<String>,
    use_rms_norm: Option<bool>,
    modules_to_not_convert: Option<Vec<String>>,
}

/// The file's name, for errors.
struct File<'a>(&'a str);

impl File<'_> {
    fn error(
        &self,
        key: &'static str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Config {
            file: self.0.to_owned(),
            key,
            expected: expected.into(),
            found: found.into(),
        }
    }

    /// A dimension that the file must give, 1 to `max`.
    fn dimension(&self, key: &'static str, value: Option<u64>, max: usize) -> Result<usize> {
        let expected = || format!("1 to {max}");
        let value = value.ok_or_else(|| self.error(key, expected(), "nothing"))?;
        match usize::try_from(value) {
            Ok(size) if (1..=max).contains(&size) => Ok(size),
            _ => Err(self.error(key, expected(), value.to_string())),
        }
    }

    /// A number that is finite and positive as f32.
    fn positive(&self, key: &'static str, value: Option<f64>) -> Result<f32> {
        const EXPECTED: &str = "a positive number";
        let value = value.ok_or_else(|| self.error(key, EXPECTED, "nothing"))?;
        let narrowed = value as f32;
        if narrowed.is_finite() && narrowed > 0.0 {
            Ok(narrowed)
        } else {
            Err(self.error(key, EXPECTED, format!("{value:?}")))
        }
    }

    fn must_be_false(&self, key: &'static str, value: Option<bool>) -> Result<()> {
        match value {
            Some(true) => Err(self.error(key, "false", "true")),
            Some(false) | None => Ok(()),
        }
    }
}

impl Raw {
    fn check(self, file: &File<'_>) -> Result<ModelConfig> {
        let architecture = self.architecture(file)?;
        let weight_form = match &self.quantization_config {
            Some(quantization) => quantization.weight_form(file)?,
            None => {
                let expected = "a BitNet quantization (this version runs ternary weights only)";
                return Err(file.error("quantization_config", expected, "nothing"));
            }
        };
        let hidden_size = file.dimension("hidden_size", self.hidden_size, MAX_DIMENSION)?;
        let num_attention_heads =
            file.dimension("num_attention_heads", self.num_attention_heads, MAX_HEADS)?;
        let num_key_value_heads = file.dimension(
            "num_key_value_heads",
            self.num_key_value_heads.or(self.num_attention_heads),
            num_attention_heads,
        )?;
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(file.error(
                "num_key_value_heads",
                format!("a divisor of num_attention_heads = {num_attention_heads}"),
                num_key_value_heads.to_string(),
            ));
        }
        let config = ModelConfig {
            architecture,
            weight_form,
            vocab_size: file.dimension("vocab_size", self.vocab_size, MAX_DIMENSION)?,
            hidden_size,
            intermediate_size: file.dimension(
                "intermediate_size",
                self.intermediate_size,
                MAX_DIMENSION,
            )?,
            num_hidden_layers: file.dimension(
                "num_hidden_layers",
                self.num_hidden_layers,
                MAX_LAYERS,
            )?,
            num_attention_heads,
            num_key_value_heads,
            head_dim: self.head_dim(file, architecture, hidden_size, num_attention_heads)?,
            hidden_act: match self.hidden_act.as_deref() {
                None => architecture.default_hidden_act(),
                Some("relu2") => Activation::Relu2,
                Some("silu") => Activation::Silu,
                Some(other) => {
                    return Err(file.error("hidden_act", "relu2 or silu", quoted(other)));
                }
            },
            max_position_embeddings: match self.max_position_embeddings {
                None => DEFAULT_MAX_POSITION_EMBEDDINGS,
                some => file.dimension("max_position_embeddings", some, MAX_DIMENSION)?,
            },
            rms_norm_eps: file.positive("rms_norm_eps", self.rms_norm_eps)?,
            rope_theta: self.rope_theta(file)?,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
        };
        file.must_be_false("attention_bias", self.attention_bias)?;
        file.must_be_false("mlp_bias", self.mlp_bias)?;
        Ok(config)
    }

    fn architecture(&self, file: &File<'_>) -> Result<Architecture> {
        let name = match self.architectures.as_deref() {
            Some([name]) => name,
            other => {
                let found = other.map_or("nothing".to_owned(), |names| format!("{}", names.len()));
                return Err(file.error("architectures", "one name", found));
            }
        };
        let architecture =
            Architecture::from_name(name).ok_or_else(|| Error::UnknownArchitecture {
                file: file.0.to_owned(),
                found: shortened(name),
                expected: Architecture::NAMES,
            })?;
        match self.model_type.as_deref() {
            Some(model_type) if model_type != architecture.model_type() => Err(file.error(
                "model_type",
                format!("{:?} for {}", architecture.model_type(), architecture.name()),
                quoted(model_type),
            )),
            _ => Ok(architecture),
        }
    }

    /// D: given, or `hidden_size / num_attention_heads`.
    fn head_dim(
        &self,
        file: &File<'_>,
        architecture: Architecture,
        hidden_size: usize,
        num_attention_heads: usize,
    ) -> Result<usize> {
        const KEY: &str = "head_dim";
        let head_dim = match self.head_dim {
            Some(_) => file.dimension(KEY, self.head_dim, MAX_HEADS)?,
            None if hidden_size.is_multiple_of(num_attention_heads) => {
                hidden_size / num_attention_heads
            }
            None => {
                let expected = format!("a divisor of hidden_size = {hidden_size}");
                let found = num_attention_heads.to_string();
                return Err(file.error("num_attention_heads", expected, found));
            }
        };
        if !head_dim.is_multiple_of(2) {
            return Err(file.error(KEY, "an even number", head_dim.to_string()));
        }
        // Both factors are at most 2^16, so that the product fits u64 everywhere.
        let query_size = num_attention_heads as u64 * head_dim as u64;
        if query_size > MAX_DIMENSION as u64 {
            let expected = format!("num_attention_heads x head_dim at most {MAX_DIMENSION}");
            return Err(file.error(KEY, expected, query_size.to_string()));
        }
        // The original class gives attn_sub_norm the width of the residual stream.
        if architecture == Architecture::BitNet && query_size != hidden_size as u64 {
            let expected = format!("num_attention_heads x head_dim = hidden_size = {hidden_size}");
            return Err(file.error(KEY, expected, query_size.to_string()));
        }
        Ok(head_dim)
    }

    /// The rotary base, which stands at the top level or in one of two objects; and a refusal of
    /// everything but plain RoPE.
    fn rope_theta(&self, file: &File<'_>) -> Result<f32> {
        let scaling = RopeObject::check(
            file,
            self.rope_scaling.as_ref(),
            ["rope_scaling", "rope_scaling.rope_theta"],
        )?;
        let parameters = RopeObject::check(
            file,
            self.rope_parameters.as_ref(),
            ["rope_parameters", "rope_parameters.rope_theta"],
        )?;
        if let Some(factor) = self.partial_rotary_factor.filter(|&factor| factor != 1.0) {
            return Err(file.error("partial_rotary_factor", "1", factor.to_string()));
        }
        let mut given = [self.rope_theta.map(|theta| ("rope_theta", theta)), parameters, scaling]
            .into_iter()
            .flatten();
        let (key, theta) = given.next().map_or(("rope_theta", None), |(k, theta)| (k, Some(theta)));
        if let Some((other, second)) = given.find(|&(_, second)| Some(second) != theta) {
            let expected = format!("the same as {key} = {}", theta.unwrap_or_default());
            return Err(file.error(other, expected, second.to_string()));
        }
        file.positive(key, theta)
    }
}

/// `rope_scaling` or `rope_parameters`.
struct RopeObject;

impl RopeObject {
    /// Its `rope_theta`, if it asks for nothing but plain RoPE.
    fn check(
        file: &File<'_>,
        object: Option<&Map<String, Value>>,
        [key, theta_key]: [&'static str; 2],
    ) -> Result<Option<(&'static str, f64)>> {
        let mut theta = None;
        for (name, value) in object.into_iter().flatten() {
            let plain = match name.as_str() {
                "rope_type" | "type" => value == "default",
                "partial_rotary_factor" => value.as_f64() == Some(1.0),
                "rope_theta" => {
                    theta = value.as_f64();
                    theta.is_some()
                }
                _ => false,
            };
            if !plain && !value.is_null() {
                let found = format!("{}: {}", quoted(name), shortened(&value.to_string()));
                return Err(file.error(key, "rope_type default and nothing else", found));
            }
        }
        Ok(theta.map(|theta| (theta_key, theta)))
    }
}

impl RawQuantization {
    fn weight_form(&self, file: &File<'_>) -> Result<WeightForm> {
        match self.quant_method.as_deref() {
            Some("bitnet") => {}
            other => {
                let found = other.map_or("nothing".to_owned(), quoted);
                return Err(file.error("quantization_config.quant_method", "\"bitnet\"", found));
            }
        }
        file.must_be_false("quantization_config.use_rms_norm", self.use_rms_norm)?;
        for module in self.modules_to_not_convert.iter().flatten() {
            if !matches!(module.as_str(), "lm_head" | "embed_tokens" | "model.embed_tokens") {
                return Err(file.error(
                    "quantization_config.modules_to_not_convert",
                    "only lm_head and embed_tokens (every other matrix is ternary)",
                    quoted(module),
                ));
            }
        }
        // The defaults are the ones of the original `BitNetQuantConfig`.
        let class = self.linear_class.as_deref().unwrap_or("bitlinear");
        let mode = self.quantization_mode.as_deref().unwrap_or("offline");
        match (class, mode) {
            ("bitlinear", "offline") => Ok(WeightForm::PackedDivide),
            ("autobitlinear", "offline") => Ok(WeightForm::PackedMultiply),
            ("autobitlinear", "online") => Ok(WeightForm::Online),
            ("bitlinear", mode) => Err(file.error(
                "quantization_config.quantization_mode",
                "\"offline\" with linear_class bitlinear",
                quoted(mode),
            )),
            ("autobitlinear", mode) => Err(file.error(
                "quantization_config.quantization_mode",
                "\"offline\" or \"online\"",
                quoted(mode),
            )),
            (class, _) => Err(file.error(
                "quantization_config.linear_class",
                "\"bitlinear\" or \"autobitlinear\"",
                quoted(class),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn bitnet() -> Value {
        json!({
            "architectures": ["BitNetForCausalLM"],
            "model_type": "bitnet",
            "vocab_size": 128256,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 30,
            "num_attention_heads": 20,
            "num_key_value_heads": 5,
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "tie_word_embeddings": true,
            "attention_bias": false,
            "quantization_config": {
                "quant_method": "bitnet",
                "linear_class": "autobitlinear",
                "quantization_mode": "offline",
            },
        })
    }

    /// As Falcon3-7B-1.58bit.
    fn llama() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 131072,
            "hidden_size": 3072,
            "intermediate_size": 23040,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000042,
            "rope_scaling": null,
            "tie_word_embeddings": false,
            "attention_bias": false,
            "mlp_bias": false,
            "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "bitnet"},
        })
    }

    fn parse(value: &Value) -> Result<ModelConfig> {
        ModelConfig::parse("config.json", value.to_string().as_bytes())
    }

    #[test]
    fn real_configurations() {
        assert_eq!(parse(&bitnet()).unwrap(), crate::synthetic::bitnet_2b4t());
        let expected = ModelConfig {
            architecture: Architecture::Llama,
            weight_form: WeightForm::PackedDivide,
            vocab_size: 131_072,
            hidden_size: 3072,
            intermediate_size: 23_040,
            num_hidden_layers: 28,
            num_attention_heads: 12,
            num_key_value_heads: 4,
            head_dim: 256,
            hidden_act: Activation::Silu,
            max_position_embeddings: 32_768,
            rms_norm_eps: 1e-6,
            rope_theta: 1_000_042.0,
            tie_word_embeddings: false,
        };
        assert_eq!(parse(&llama()).unwrap(), expected);
    }

    #[test]
    fn keys_that_may_be_absent_have_the_defaults_of_the_class() {
        for (mut value, hidden_act, heads) in
            [(bitnet(), Activation::Relu2, 20), (llama(), Activation::Silu, 12)]
        {
            for key in [
                "model_type",
                "hidden_act",
                "max_position_embeddings",
                "tie_word_embeddings",
                "attention_bias",
                "num_key_value_heads",
                "head_dim",
            ] {
                value.as_object_mut().unwrap().remove(key);
            }
            let config = parse(&value).unwrap();
            assert_eq!(config.hidden_act, hidden_act);
            assert_eq!(config.max_position_embeddings, 2048);
            assert!(!config.tie_word_embeddings);
            assert_eq!(config.num_key_value_heads, heads);
            assert_eq!(config.head_dim, config.hidden_size / heads);
        }
    }

    #[test]
    fn the_weight_form_follows_from_class_and_mode() {
        for (quantization, expected) in [
            (json!({}), WeightForm::PackedDivide),
            (json!({"linear_class": "bitlinear"}), WeightForm::PackedDivide),
            (
                json!({"linear_class": null, "modules_to_not_convert": null}),
                WeightForm::PackedDivide,
            ),
            (json!({"quantization_mode": "offline"}), WeightForm::PackedDivide),
            (json!({"linear_class": "autobitlinear"}), WeightForm::PackedMultiply),
            (
                json!({"linear_class": "autobitlinear", "quantization_mode": "online"}),
                WeightForm::Online,
            ),
            (json!({"use_rms_norm": false, "rms_norm_eps": 1e-6}), WeightForm::PackedDivide),
        ] {
            let mut value = bitnet();
            value["quantization_config"] = quantization;
            value["quantization_config"]["quant_method"] = "bitnet".into();
            assert_eq!(parse(&value).unwrap().weight_form, expected, "{value}");
        }
    }

    #[test]
    fn the_rotary_base_may_stand_in_either_place() {
        for rope in [
            json!({"rope_theta": 500000.0}),
            json!({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
            json!({"rope_theta": 500000, "rope_parameters": {"rope_theta": 500000.0}}),
            json!({"rope_theta": 500000, "rope_scaling": {"type": "default"}}),
            json!({"rope_theta": 500000, "rope_scaling": {"rope_type": null}}),
            json!({"rope_scaling": {"rope_theta": 500000.0}, "partial_rotary_factor": 1.0}),
        ] {
            let mut value = bitnet();
            value.as_object_mut().unwrap().remove("rope_theta");
            value.as_object_mut().unwrap().extend(rope.as_object().unwrap().clone());
            assert_eq!(parse(&value).unwrap().rope_theta, 500_000.0, "{rope}");
        }
    }

    /// The dotted key, the value it is given (null: taken away), and the message that follows.
    fn refusals(base: &Value, cases: &[(&str, Value, &str)]) {
        for (key, given, expected) in cases {
            let mut value = base.clone();
            let pointer = format!("/{}", key.replace('.', "/"));
            let (parent, last) = pointer.rsplit_once('/').unwrap();
            value.pointer_mut(parent).unwrap()[last] = given.clone();
            let message = parse(&value).unwrap_err().to_string();
            assert_eq!(message, format!("config.json: {expected}"), "{key} = {given}");
        }
    }

    #[test]
    fn unsupported_and_contradictory_values_are_refused() {
        let null = Value::Null;
        refusals(
            &bitnet(),
            &[
                ("architectures", null.clone(), "architectures: expected one name, found nothing"),
                ("architectures", json!([]), "architectures: expected one name, found 0"),
                (
                    "architectures",
                    json!(["BitNetForCausalLM", "LlamaForCausalLM"]),
                    "architectures: expected one name, found 2",
                ),
                (
                    "architectures",
                    json!(["BitnetForCausalLM"]),
                    "unknown architecture \"BitnetForCausalLM\"; this version runs BitNetForCausalLM \
                 and LlamaForCausalLM",
                ),
                (
                    "architectures",
                    json!(["Qwen3ForCausalLM"]),
                    "unknown architecture \"Qwen3ForCausalLM\"; this version runs BitNetForCausalLM \
                 and LlamaForCausalLM",
                ),
                (
                    "architectures",
                    json!(["LlamaForCausalLM"]),
                    "model_type: expected \"llama\" for LlamaForCausalLM, found \"bitnet\"",
                ),
                (
                    "model_type",
                    json!("llama\nlama"),
                    "model_type: expected \"bitnet\" for BitNetForCausalLM, found \"llama\\nlama\"",
                ),
                (
                    "quantization_config",
                    null.clone(),
                    "quantization_config: expected a BitNet quantization (this version runs ternary \
                 weights only), found nothing",
                ),
                (
                    "quantization_config.quant_method",
                    json!("awq"),
                    "quantization_config.quant_method: expected \"bitnet\", found \"awq\"",
                ),
                (
                    "quantization_config.quant_method",
                    null.clone(),
                    "quantization_config.quant_method: expected \"bitnet\", found nothing",
                ),
                (
                    "quantization_config.linear_class",
                    json!("linear"),
                    "quantization_config.linear_class: expected \"bitlinear\" or \"autobitlinear\", \
                 found \"linear\"",
                ),
                (
                    "quantization_config.quantization_mode",
                    json!("dynamic"),
                    "quantization_config.quantization_mode: expected \"offline\" or \"online\", found \
                 \"dynamic\"",
                ),
                (
                    "quantization_config.use_rms_norm",
                    json!(true),
                    "quantization_config.use_rms_norm: expected false, found true",
                ),
                (
                    "quantization_config.modules_to_not_convert",
                    json!(["lm_head", "model.layers.0.mlp.up_proj"]),
                    "quantization_config.modules_to_not_convert: expected only lm_head and \
                 embed_tokens (every other matrix is ternary), found \
                 \"model.layers.0.mlp.up_proj\"",
                ),
                ("hidden_act", json!("gelu"), "hidden_act: expected relu2 or silu, found \"gelu\""),
                ("attention_bias", json!(true), "attention_bias: expected false, found true"),
                ("mlp_bias", json!(true), "mlp_bias: expected false, found true"),
                (
                    "rope_parameters",
                    json!({"rope_theta": 10000.0}),
                    "rope_parameters.rope_theta: expected the same as rope_theta = 500000, found 10000",
                ),
                (
                    "rope_scaling",
                    json!({"rope_type": "yarn", "factor": 4.0}),
                    "rope_scaling: expected rope_type default and nothing else, found \"factor\": 4.0",
                ),
                (
                    "rope_scaling",
                    json!({"type": "linear"}),
                    "rope_scaling: expected rope_type default and nothing else, found \"type\": \"linear\"",
                ),
                (
                    "rope_parameters",
                    json!({"rope_type": "llama3"}),
                    "rope_parameters: expected rope_type default and nothing else, found \"rope_type\": \"llama3\"",
                ),
                (
                    "partial_rotary_factor",
                    json!(0.5),
                    "partial_rotary_factor: expected 1, found 0.5",
                ),
            ],
        );
        refusals(
            &llama(),
            &[
                (
                    "quantization_config",
                    null,
                    "quantization_config: expected a BitNet quantization (this version runs ternary \
                 weights only), found nothing",
                ),
                (
                    "quantization_config.quantization_mode",
                    json!("online"),
                    "quantization_config.quantization_mode: expected \"offline\" with linear_class \
                 bitlinear, found \"online\"",
                ),
            ],
        );
    }

    #[test]
    fn sizes_are_checked() {
        let null = Value::Null;
        refusals(
            &bitnet(),
            &[
                ("vocab_size", null.clone(), "vocab_size: expected 1 to 16777216, found nothing"),
                ("vocab_size", json!(0), "vocab_size: expected 1 to 16777216, found 0"),
                (
                    "intermediate_size",
                    json!(u64::MAX),
                    "intermediate_size: expected 1 to 16777216, found 18446744073709551615",
                ),
                ("hidden_size", json!(0), "hidden_size: expected 1 to 16777216, found 0"),
                ("num_hidden_layers", json!(0), "num_hidden_layers: expected 1 to 4096, found 0"),
                (
                    "num_attention_heads",
                    json!(70000),
                    "num_attention_heads: expected 1 to 65536, found 70000",
                ),
                ("num_key_value_heads", json!(0), "num_key_value_heads: expected 1 to 20, found 0"),
                (
                    "num_key_value_heads",
                    json!(21),
                    "num_key_value_heads: expected 1 to 20, found 21",
                ),
                (
                    "num_key_value_heads",
                    json!(3),
                    "num_key_value_heads: expected a divisor of num_attention_heads = 20, found 3",
                ),
                (
                    "hidden_size",
                    json!(2561),
                    "num_attention_heads: expected a divisor of hidden_size = 2561, found 20",
                ),
                ("head_dim", json!(127), "head_dim: expected an even number, found 127"),
                (
                    "head_dim",
                    json!(64),
                    "head_dim: expected num_attention_heads x head_dim = hidden_size = 2560, found 1280",
                ),
                (
                    "max_position_embeddings",
                    json!(0),
                    "max_position_embeddings: expected 1 to 16777216, found 0",
                ),
                (
                    "rms_norm_eps",
                    null.clone(),
                    "rms_norm_eps: expected a positive number, found nothing",
                ),
                ("rms_norm_eps", json!(0.0), "rms_norm_eps: expected a positive number, found 0.0"),
                (
                    "rms_norm_eps",
                    json!(-1e-5),
                    "rms_norm_eps: expected a positive number, found -1e-5",
                ),
                ("rope_theta", null, "rope_theta: expected a positive number, found nothing"),
                ("rope_theta", json!(-1), "rope_theta: expected a positive number, found -1.0"),
                ("rope_theta", json!(1e40), "rope_theta: expected a positive number, found 1e40"),
            ],
        );
        let mut wide = llama();
        wide["num_attention_heads"] = 65_536.into();
        refusals(
            &wide,
            &[(
                "head_dim",
                json!(512),
                "head_dim: expected num_attention_heads x head_dim at most 16777216, found 33554432",
            )],
        );
    }

    #[test]
    fn what_is_not_json_or_has_other_types_is_refused() {
        for (json, expected) in [
            ("", "EOF while parsing a value at line 1 column 0"),
            ("[1]", "invalid type: integer `1`, expected a sequence at line 1 column 2"),
            (
                "{\"vocab_size\": \"big\"}",
                "invalid type: string \"big\", expected u64 at line 1 column 20",
            ),
            ("{\"vocab_size\": 1, \"vocab_size\": 2}", "duplicate field `vocab_size`"),
            ("{\"rope_theta\": 1e999}", "number out of range"),
        ] {
            let message =
                ModelConfig::parse("config.json", json.as_bytes()).unwrap_err().to_string();
            assert!(message.starts_with(&format!("config.json: {expected}")), "{message}");
        }
    }
}
