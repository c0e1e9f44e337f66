//! `config.json` of a Hugging Face or MLX checkpoint.

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Activation, Activations, Architecture, File, MAX_HEADS, MAX_LAYERS, ModelConfig, RopeScaling,
    WeightForm,
};
use crate::error::{Error, Result};
use crate::format::{quoted, shortened};
use crate::shape::MAX_DIMENSION;

/// What `max_position_embeddings` is where the file leaves it out: the default of the classes.
const DEFAULT_MAX_POSITION_EMBEDDINGS: usize = 2048;

/// The rotary base of the 1bitLLM class where the file leaves it out.
const BITNET_1BITLLM_THETA: f64 = 10_000.0;

/// Reads `config.json`; `file` names it in errors.
pub(super) fn parse(file: &str, json: &[u8]) -> Result<ModelConfig> {
    let raw: Raw = serde_json::from_slice(json)
        .map_err(|source| Error::Json { file: file.to_owned(), source })?;
    raw.check(&File(file))
}

/// The keys of `config.json` that decide what is computed. A repeated key is an error of serde's.
#[derive(Deserialize)]
struct Raw {
    architectures: Option<Vec<String>>,
    model_type: Option<String>,
    quantization_config: Option<RawQuantization>,
    quantization: Option<RawMlx>,
    weight_bits: Option<u64>,
    input_bits: Option<u64>,
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
    use_sliding_window: Option<bool>,
    tie_word_embeddings: Option<bool>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
    linear_class: Option<String>,
    quantization_mode: Option<String>,
    use_rms_norm: Option<bool>,
    rms_norm_eps: Option<f64>,
    modules_to_not_convert: Option<Vec<String>>,
    // MLX repeats its `quantization` here.
    bits: Option<u64>,
}

/// `quantization` of MLX; a key of a module's name would give that module other numbers.
#[derive(Deserialize)]
struct RawMlx {
    group_size: Option<u64>,
    bits: Option<u64>,
    mode: Option<String>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

impl Raw {
    fn check(self, file: &File<'_>) -> Result<ModelConfig> {
        let architecture = self.architecture(file)?;
        let weight_form = self.weight_form(file, architecture)?;
        let (rope_theta, rope_scaling) = self.rope(file, architecture)?;
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
            activations: match weight_form {
                WeightForm::Mlx { .. } => Activations::Float,
                _ => Activations::Int8Token,
            },
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
            linear_norm_eps: match &self.quantization_config {
                Some(quantization) => quantization.linear_norm_eps(file)?,
                None => None,
            },
            rope_theta,
            rope_scaling,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
        };
        file.must_be_false("attention_bias", self.attention_bias)?;
        file.must_be_false("mlp_bias", self.mlp_bias)?;
        file.must_be_false("use_sliding_window", self.use_sliding_window)?;
        Ok(config)
    }

    fn weight_form(&self, file: &File<'_>, architecture: Architecture) -> Result<WeightForm> {
        if let Some(mlx) = &self.quantization {
            if let Some(method) =
                self.quantization_config.as_ref().and_then(|q| q.quant_method.as_deref())
            {
                let expected = "nothing beside MLX's quantization";
                return Err(file.error(
                    "quantization_config.quant_method",
                    expected,
                    quoted(method),
                ));
            }
            return mlx.weight_form(file);
        }
        match &self.quantization_config {
            Some(quantization) => quantization.weight_form(file),
            None if architecture == Architecture::Bitnet1bitLlm => {
                for (key, bits, expected) in
                    [("weight_bits", self.weight_bits, 1), ("input_bits", self.input_bits, 8)]
                {
                    if let Some(bits) = bits.filter(|&bits| bits != expected) {
                        return Err(file.error(key, expected.to_string(), bits.to_string()));
                    }
                }
                Ok(WeightForm::Online)
            }
            None => {
                let expected = "a BitNet or MLX quantization (this version runs ternary weights \
                                only; dense weights of a ternary model do not tell its scales)";
                Err(file.error("quantization_config", expected, "nothing"))
            }
        }
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
            // The default of that class, whatever the other sizes.
            None if architecture == Architecture::Qwen3 => 128,
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
        // The original classes give attn_sub_norm the width of the residual stream.
        if architecture.has_sub_norms() && query_size != hidden_size as u64 {
            let expected = format!("num_attention_heads x head_dim = hidden_size = {hidden_size}");
            return Err(file.error(KEY, expected, query_size.to_string()));
        }
        Ok(head_dim)
    }

    /// The rotary base, which stands at the top level or in one of two objects, and the scaling,
    /// which stands in one of them or in both alike.
    fn rope(&self, file: &File<'_>, architecture: Architecture) -> Result<(f32, RopeScaling)> {
        if let Some(factor) = self.partial_rotary_factor.filter(|&factor| factor != 1.0) {
            return Err(file.error("partial_rotary_factor", "1", factor.to_string()));
        }
        let objects =
            [("rope_parameters", &self.rope_parameters), ("rope_scaling", &self.rope_scaling)];
        let mut thetas =
            Vec::from_iter(self.rope_theta.map(|theta| ("rope_theta".to_owned(), theta)));
        let mut scalings = Vec::new();
        for (key, object) in objects {
            let Some(object) = object else { continue };
            let rope = RopeObject { file, key, object };
            thetas.extend(
                rope.number("rope_theta")?.map(|theta| (format!("{key}.rope_theta"), theta)),
            );
            scalings.push((key, rope.scaling(self.max_position_embeddings)?));
        }
        let default = (architecture == Architecture::Bitnet1bitLlm).then_some(BITNET_1BITLLM_THETA);
        let (key, theta) = match thetas.first() {
            Some((key, theta)) => (key.as_str(), Some(*theta)),
            None => ("rope_theta", default),
        };
        if let Some((other, second)) = thetas.iter().find(|(_, second)| Some(*second) != theta) {
            let expected = format!("the same as {key} = {}", theta.unwrap_or_default());
            return Err(file.error(other, expected, second.to_string()));
        }
        let scaling = match scalings[..] {
            [] => RopeScaling::None,
            [(_, scaling)] => scaling,
            [(first, scaling), (second, other), ..] if scaling != other => {
                let expected = format!("the same as {first}");
                return Err(file.error(second, expected, "another scaling"));
            }
            [(_, scaling), ..] => scaling,
        };
        Ok((file.positive(key, theta)?, scaling))
    }
}

/// `rope_scaling` or `rope_parameters`.
struct RopeObject<'a> {
    file: &'a File<'a>,
    key: &'static str,
    object: &'a Map<String, Value>,
}

impl RopeObject<'_> {
    /// A number, if it is there; null counts as absent.
    fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.object.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                let key = format!("{}.{name}", self.key);
                self.file.error(&key, "a number", shortened(&value.to_string()))
            }),
        }
    }

    /// A number that must be there and positive.
    fn positive(&self, name: &str, value: Option<f64>) -> Result<f32> {
        self.file.positive(&format!("{}.{name}", self.key), value)
    }

    /// The kind of scaling and its numbers; whatever else the object says is refused.
    fn scaling(&self, max_position_embeddings: Option<u64>) -> Result<RopeScaling> {
        let kind = match self.object.get("rope_type").or_else(|| self.object.get("type")) {
            None | Some(Value::Null) => "default",
            Some(Value::String(kind)) => kind,
            Some(other) => {
                let found = shortened(&other.to_string());
                return Err(self.file.error(self.key, "a rope_type in quotes", found));
            }
        };
        let known: &[&str] = match kind {
            "default" => &[],
            "linear" => &["factor"],
            "yarn" => &[
                "factor",
                "original_max_position_embeddings",
                "beta_fast",
                "beta_slow",
                "attention_factor",
                "truncate",
            ],
            "llama3" => &[
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ],
            other => {
                let expected = "rope_type default, linear, yarn or llama3";
                return Err(self.file.error(self.key, expected, quoted(other)));
            }
        };
        for (name, value) in self.object {
            let allowed = match name.as_str() {
                "rope_type" | "type" | "rope_theta" => true,
                "partial_rotary_factor" => value.as_f64() == Some(1.0),
                "truncate" => known.contains(&"truncate") && value == true,
                name => known.contains(&name),
            };
            if !allowed && !value.is_null() {
                let expected = format!("rope_type {kind} and its own keys");
                let found = format!("{}: {}", quoted(name), shortened(&value.to_string()));
                return Err(self.file.error(self.key, expected, found));
            }
        }
        let given = |name: &str| self.positive(name, self.number(name)?);
        let or =
            |name: &str, default: f64| self.positive(name, self.number(name)?.or(Some(default)));
        Ok(match kind {
            "linear" => RopeScaling::Linear { factor: given("factor")? },
            "yarn" => {
                let factor = given("factor")?;
                let attention_factor = match self.number("attention_factor")? {
                    None => RopeScaling::yarn_attention_factor(factor),
                    some => self.positive("attention_factor", some)?,
                };
                let original = self.number("original_max_position_embeddings")?;
                let original = original.or(max_position_embeddings.map(|context| context as f64));
                RopeScaling::Yarn {
                    factor,
                    original_context: self
                        .positive("original_max_position_embeddings", original)?,
                    beta_fast: or("beta_fast", 32.0)?,
                    beta_slow: or("beta_slow", 1.0)?,
                    attention_factor,
                }
            }
            "llama3" => RopeScaling::Llama3 {
                factor: given("factor")?,
                low_freq_factor: given("low_freq_factor")?,
                high_freq_factor: given("high_freq_factor")?,
                original_context: given("original_max_position_embeddings")?,
            },
            _ => RopeScaling::None,
        })
    }
}

impl RawMlx {
    /// Only the sizes that binary and ternary models have; tensors are checked as they are read.
    fn weight_form(&self, file: &File<'_>) -> Result<WeightForm> {
        if let Some(mode) = self.mode.as_deref().filter(|&mode| mode != "affine") {
            return Err(file.error("quantization.mode", "\"affine\"", quoted(mode)));
        }
        if let Some((module, _)) = self.rest.iter().next() {
            let expected = "the same numbers for every module";
            return Err(file.error("quantization", expected, quoted(module)));
        }
        let found = |value: Option<u64>| value.map_or("nothing".to_owned(), |v| v.to_string());
        let bits = match self.bits {
            Some(bits @ (1 | 2)) => bits as usize,
            other => {
                let expected = "1 (binary) or 2 (ternary)";
                return Err(file.error("quantization.bits", expected, found(other)));
            }
        };
        match self.group_size {
            Some(group @ (64 | 128 | 256)) => Ok(WeightForm::Mlx { bits, group: group as usize }),
            other => Err(file.error("quantization.group_size", "64, 128 or 256", found(other))),
        }
    }
}

impl RawQuantization {
    /// eps of the norm inside each linear layer; its default is that of the original
    /// `BitNetQuantConfig`.
    fn linear_norm_eps(&self, file: &File<'_>) -> Result<Option<f32>> {
        if self.use_rms_norm != Some(true) {
            return Ok(None);
        }
        let eps = self.rms_norm_eps.or(Some(1e-6));
        file.positive("quantization_config.rms_norm_eps", eps).map(Some)
    }

    fn weight_form(&self, file: &File<'_>) -> Result<WeightForm> {
        match self.quant_method.as_deref() {
            Some("bitnet") => {}
            None if self.bits.is_some() => {
                let expected = "MLX's quantization beside it";
                return Err(file.error("quantization_config", expected, "its copy alone"));
            }
            other => {
                let found = other.map_or("nothing".to_owned(), quoted);
                return Err(file.error("quantization_config.quant_method", "\"bitnet\"", found));
            }
        }
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
            activations: Activations::Int8Token,
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
            linear_norm_eps: None,
            rope_theta: 1_000_042.0,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: false,
        };
        assert_eq!(parse(&llama()).unwrap(), expected);
    }

    /// As Bonsai-8B in MLX form.
    fn bonsai() -> Value {
        json!({
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 151669,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "hidden_act": "silu",
            "max_position_embeddings": 65536,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16384,
            },
            "sliding_window": null,
            "use_sliding_window": false,
            "tie_word_embeddings": false,
            "attention_bias": false,
            "quantization": {"group_size": 128, "bits": 1},
            "quantization_config": {"group_size": 128, "bits": 1},
        })
    }

    #[test]
    fn bonsai_is_qwen3_with_scales_of_groups() {
        let config = parse(&bonsai()).unwrap();
        assert_eq!(config.architecture, Architecture::Qwen3);
        assert_eq!(config.weight_form, WeightForm::Mlx { bits: 1, group: 128 });
        assert_eq!(config.activations, Activations::Float);
        // The class's own default, not hidden_size / num_attention_heads.
        assert_eq!(config.head_dim, 128);
        let RopeScaling::Yarn { factor, original_context, attention_factor, .. } =
            config.rope_scaling
        else {
            panic!("{:?}", config.rope_scaling)
        };
        assert_eq!((factor, original_context), (4.0, 16384.0));
        assert!((attention_factor - 1.138_629_4).abs() < 1e-6);
        refusals(
            &bonsai(),
            &[
                (
                    "quantization.bits",
                    json!(4),
                    "quantization.bits: expected 1 (binary) or 2 (ternary), found 4",
                ),
                (
                    "quantization.group_size",
                    json!(32),
                    "quantization.group_size: expected 64, 128 or 256, found 32",
                ),
                (
                    "quantization.mode",
                    json!("mxfp4"),
                    "quantization.mode: expected \"affine\", found \"mxfp4\"",
                ),
                (
                    "quantization",
                    json!({"group_size": 128, "bits": 1, "lm_head": {"bits": 4}}),
                    "quantization: expected the same numbers for every module, found \"lm_head\"",
                ),
                (
                    "quantization",
                    Value::Null,
                    "quantization_config: expected MLX's quantization beside it, found its copy \
                 alone",
                ),
                (
                    "quantization_config",
                    json!({"quant_method": "bitnet"}),
                    "quantization_config.quant_method: expected nothing beside MLX's \
                 quantization, found \"bitnet\"",
                ),
            ],
        );
    }

    /// As bitnet_b1_58-3B.
    #[test]
    fn the_1bitllm_class_is_ternarised_at_load() {
        let value = json!({
            "architectures": ["BitnetForCausalLM"],
            "model_type": "llama",
            "vocab_size": 32002,
            "hidden_size": 3200,
            "intermediate_size": 8640,
            "num_hidden_layers": 26,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": true,
            "weight_bits": 1,
            "input_bits": 8,
        });
        let config = parse(&value).unwrap();
        assert_eq!(config.weight_form, WeightForm::Online);
        assert!(config.has_sub_norms());
        assert_eq!((config.head_dim, config.rope_theta), (100, 10_000.0));
        assert_eq!(config.hidden_act, Activation::Silu);
        refusals(
            &value,
            &[
                ("weight_bits", json!(2), "weight_bits: expected 1, found 2"),
                ("input_bits", json!(4), "input_bits: expected 8, found 4"),
            ],
        );
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
        let mut normed = bitnet();
        normed["quantization_config"]["use_rms_norm"] = true.into();
        assert_eq!(parse(&normed).unwrap().linear_norm_eps, Some(1e-6));
        refusals(
            &normed,
            &[(
                "quantization_config.rms_norm_eps",
                json!(0.0),
                "quantization_config.rms_norm_eps: expected a positive number, found 0.0",
            )],
        );
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
                    "model_type: expected \"llama\" for BitnetForCausalLM, found \"bitnet\"",
                ),
                (
                    "architectures",
                    json!(["Gemma3ForCausalLM"]),
                    "unknown architecture \"Gemma3ForCausalLM\"; this version runs \
                 BitNetForCausalLM, BitnetForCausalLM, LlamaForCausalLM and Qwen3ForCausalLM",
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
                    "quantization_config: expected a BitNet or MLX quantization (this version runs \
                 ternary weights only; dense weights of a ternary model do not tell its scales), \
                 found nothing",
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
                    json!({"factor": 4.0}),
                    "rope_scaling: expected rope_type default and its own keys, found \
                 \"factor\": 4.0",
                ),
                (
                    "rope_scaling",
                    json!({"type": "linear"}),
                    "rope_scaling.factor: expected a positive number, found nothing",
                ),
                (
                    "rope_scaling",
                    json!({"type": "yarn", "factor": 2, "mscale": 0.7}),
                    "rope_scaling: expected rope_type yarn and its own keys, found \"mscale\": 0.7",
                ),
                (
                    "rope_scaling",
                    json!({"rope_type": "longrope"}),
                    "rope_scaling: expected rope_type default, linear, yarn or llama3, found \
                 \"longrope\"",
                ),
                (
                    "rope_parameters",
                    json!({"rope_type": "llama3", "factor": "8"}),
                    "rope_parameters.factor: expected a number, found \"8\"",
                ),
                (
                    "use_sliding_window",
                    json!(true),
                    "use_sliding_window: expected false, found true",
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
                    "quantization_config: expected a BitNet or MLX quantization (this version runs \
                 ternary weights only; dense weights of a ternary model do not tell its scales), \
                 found nothing",
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
