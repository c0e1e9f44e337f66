//! The answers of the original implementation, and the tolerances of `tests/golden/README.md`.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use sterna::backend::{Output, Want};
use sterna::weights::{TernaryMatrix, WeightSource};
use sterna::{Checkpoint, Transformer};

/// The golden checkpoints.
pub const MODELS: [&str; 3] = ["bitnet-a-bf16", "bitnet-a-packed", "llama-a-bitlinear"];

/// Bonsai's MLX form: binary weights with a scale for every 128 inputs, float activations.
#[allow(dead_code, reason = "a device may not run it")]
pub const BONSAI: &str = "qwen3-1bit-mlx";

#[allow(dead_code, reason = "a device may not run them")]
/// The same weights in GGUF files, q/k rows permuted where the architecture asks for it; the
/// embeddings and the scales of TQ2_0 are rounded to IEEE half.
pub const GGUF: [&str; 4] = [
    "gguf/bitnet-a-i2_s.gguf",
    "gguf/bitnet-a-tq2_0.gguf",
    "gguf/llama-a-i2_s.gguf",
    "gguf/qwen3-1bit-q1_0.gguf",
];

fn golden(path: impl AsRef<Path>) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(path)
}

/// A golden checkpoint.
pub fn checkpoint(model: &str) -> Checkpoint {
    Checkpoint::open(&golden(model)).expect("the golden checkpoints are valid")
}

/// What the original implementation answers on a checkpoint.
struct Expected {
    tensors: Vec<u8>,
    json: serde_json::Value,
}

impl Expected {
    fn of(model: &str) -> Self {
        let name = match model {
            "gguf/bitnet-a-i2_s.gguf" | "gguf/bitnet-a-tq2_0.gguf" => "bitnet-a-packed",
            "gguf/llama-a-i2_s.gguf" => "llama-a-bitlinear",
            "gguf/qwen3-1bit-q1_0.gguf" | BONSAI => "qwen3-1bit",
            name => name,
        };
        let path = golden(format!("expected/{name}"));
        let read = |extension| std::fs::read(path.with_extension(extension)).expect("golden file");
        let json = serde_json::from_slice(&read("json")).expect("golden JSON");
        Self { tensors: read("safetensors"), json }
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.tensors).expect("golden tensors");
        let view = tensors.tensor(name).expect("golden tensor");
        let floats = view.data().chunks_exact(4);
        floats.map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
    }

    fn tensor_names(&self) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.tensors).expect("golden tensors");
        tensors.names().into_iter().map(str::to_owned).collect()
    }

    fn numbers(&self, pointer: &str) -> Vec<f64> {
        let value = self.json.pointer(pointer).expect("golden value");
        let list = value.as_array().expect("golden list");
        list.iter().map(|number| number.as_f64().expect("golden number")).collect()
    }

    fn tokens(&self, pointer: &str) -> Vec<u32> {
        self.numbers(pointer).into_iter().map(|number| number as u32).collect()
    }
}

fn logits(model: &mut Transformer, tokens: &[u32], want: Want) -> Result<Vec<f32>, String> {
    match model.feed(tokens, want).map_err(|error| error.to_string())? {
        Output::Logits(logits) => Ok(logits),
        other => Err(format!("expected logits, found {other:?}")),
    }
}

/// Logits of every prompt at every kept position, within the tolerance of its noise.
pub fn check_logits(model: &str, transformer: &mut Transformer) -> Result<(), String> {
    let expected = Expected::of(model);
    let vocab_size = transformer.config().vocab_size;
    for prompt in ["p1", "p1b", "p5", "p17", "p233"] {
        let tokens = expected.tokens(&format!("/prompts/{prompt}"));
        let positions = expected.numbers(&format!("/kept_positions/{prompt}"));
        let noise = expected.numbers(&format!("/noise/{prompt}"));
        let std = expected.json.pointer(&format!("/logit_std/{prompt}"));
        let std = std.and_then(serde_json::Value::as_f64).expect("logit_std");
        let rows = expected.tensor(&format!("logits.{prompt}.float32"));
        transformer.reset();
        let found = logits(transformer, &tokens, Want::AllLogits)?;
        assert_eq!(found.len(), tokens.len() * vocab_size);
        let rows = rows.chunks_exact(vocab_size);
        for ((position, noise), expected) in positions.iter().zip(&noise).zip(rows) {
            let position = *position as usize;
            let found = &found[position * vocab_size..][..vocab_size];
            let what = format!("{model} {prompt} position {position}");
            check_row(&what, found, expected, *noise < 2e-4 * std, std)?;
        }
    }
    Ok(())
}

fn check_row(
    what: &str,
    found: &[f32],
    expected: &[f32],
    quiet: bool,
    std: f64,
) -> Result<(), String> {
    let differences = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
    let max = differences.clone().fold(0.0, f64::max) / std;
    let mean = differences.sum::<f64>() / found.len() as f64 / std;
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
    };
    let cosine = dot(found, expected) / (dot(found, found) * dot(expected, expected)).sqrt();
    let (max_bound, mean_bound) = if quiet { (1e-4, 1e-4) } else { (0.2, 0.03) };
    // Written so that NaN fails.
    if max < max_bound && mean < mean_bound && cosine > 0.999 {
        return Ok(());
    }
    Err(format!(
        "{what}: max {max:.2e} (bound {max_bound}), mean {mean:.2e} (bound {mean_bound}) of the \
         standard deviation, cosine {cosine:.6}"
    ))
}

/// The 64 greedy tokens after `p17`, each fed as listed and compared where its gap allows.
pub fn check_greedy(model: &str, transformer: &mut Transformer) -> Result<(), String> {
    let expected = Expected::of(model);
    let std = expected.json.pointer("/logit_std/p17").and_then(serde_json::Value::as_f64);
    let std = std.expect("logit_std");
    let greedy = expected.tokens("/runs/float32/greedy64_from_p17");
    let gaps = expected.numbers("/runs/float32/greedy_gap");
    let mut fed = expected.tokens("/prompts/p17");
    transformer.reset();
    let mut compared = 0;
    for (index, (&token, &gap)) in greedy.iter().zip(&gaps).enumerate() {
        let output = transformer.feed(&fed, Want::Token).map_err(|error| error.to_string())?;
        if gap > 0.4 * std {
            compared += 1;
            if output != Output::Token(token) {
                return Err(format!("{model}: token {index}: expected {token}, found {output:?}"));
            }
        }
        fed = vec![token];
    }
    if compared == 0 {
        return Err(format!("{model}: no gap was wide enough to compare"));
    }
    Ok(())
}

/// A ternary linear layer on one token, as a backend computes it.
pub type BitLinear<'a> = &'a dyn Fn(&TernaryMatrix, &[f32]) -> Result<Vec<f32>, String>;

/// Every matrix of layer 0 on its recorded input, within 1e-5 of its largest output.
pub fn check_io(model: &str, bitlinear: BitLinear<'_>) -> Result<(), String> {
    let expected = Expected::of(model);
    let layer = checkpoint(model).layer(0).map_err(|error| error.to_string())?;
    let mut checked = 0;
    for name in expected.tensor_names() {
        let Some(record) = name.strip_prefix("io.model.layers.0.") else { continue };
        let Some(linear) = record.strip_suffix(".in") else { continue };
        let matrix = match linear {
            "self_attn.q_proj" => &layer.q_proj,
            "self_attn.k_proj" => &layer.k_proj,
            "self_attn.v_proj" => &layer.v_proj,
            "self_attn.o_proj" => &layer.o_proj,
            "mlp.gate_proj" => &layer.gate_proj,
            "mlp.up_proj" => &layer.up_proj,
            "mlp.down_proj" => &layer.down_proj,
            other => return Err(format!("{model}: unknown record {other}")),
        };
        let inputs = expected.tensor(&name);
        let outputs = expected.tensor(&format!("io.model.layers.0.{linear}.out"));
        let (n, k) = (matrix.shape().n(), matrix.shape().k());
        for (x, y) in inputs.chunks_exact(k).zip(outputs.chunks_exact(n)) {
            let found = bitlinear(matrix, x)?;
            let largest = y.iter().fold(0.0f32, |max, value| max.max(value.abs()));
            for (at, (found, expected)) in found.iter().zip(y).enumerate() {
                let within = (found - expected).abs() <= 1e-5 * largest;
                if !within {
                    let what = format!("{model} {linear} row {at}");
                    return Err(format!("{what}: expected {expected}, found {found}"));
                }
            }
        }
        checked += 1;
    }
    if checked != 7 {
        return Err(format!("{model}: {checked} of 7 matrices have a record"));
    }
    Ok(())
}
