//! `sterna inspect`: what a checkpoint holds and what running it takes.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use anyhow::Result;
use serde::Serialize;
use sterna::Checkpoint;
use sterna::backend::LoadOptions;
use sterna::config::{Activations, ModelConfig, WeightForm};
use sterna::kv_cache::{BLOCK, KvShape};
use sterna::session::snapshot::format_name;
use sterna::tensor_names::{LINEARS, norms};
use sterna::weights::WeightSource;

use super::{FileArguments, open, print, print_json};

/// Show what a model's files hold, and the memory that running it takes
///
/// Reads the configuration and the headers of the safetensors or GGUF files, checks them against
/// each other, and prints the dimensions, the tensors, the bytes of each part, and what the model
/// takes on a device. Of the weights no more is read than the kind of their scales.
#[derive(clap::Args)]
pub(super) struct Arguments {
    /// GGUF file or directory of the model, or its name on the Hugging Face hub [default: built in]
    model: Option<PathBuf>,

    #[command(flatten)]
    files: FileArguments,

    /// Write one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    model: String,
    architecture: String,
    weights: &'static str,
    activations: &'static str,
    config: Dimensions,
    parameters: u64,
    memory: Memory,
    unused_tensors: Vec<String>,
    tensors: Vec<Tensor>,
}

/// Spelled as in `config.json`.
#[derive(Serialize)]
struct Dimensions {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
}

/// Bytes on a device.
#[derive(Serialize)]
struct Memory {
    ternary_bytes: u64,
    embedding_bytes: u64,
    lm_head_bytes: u64,
    norms_bytes: u64,
    kv_cache_format: &'static str,
    kv_cache_bytes_per_position: u64,
    context: usize,
    kv_cache_bytes: u64,
    total_bytes: u64,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<usize>,
    bytes: u64,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = open(arguments.model.as_deref(), arguments.files)?;
    let report = report(&checkpoint)?;
    if arguments.json { print_json(&report) } else { print(&text(&report)?) }
}

fn report(checkpoint: &Checkpoint) -> Result<Report> {
    let config = checkpoint.config();
    let tensor = |info: &sterna::format::TensorInfo| Tensor {
        name: info.name.clone(),
        dtype: info.dtype.clone(),
        shape: info.shape.clone(),
        bytes: info.len_bytes,
    };
    Ok(Report {
        model: checkpoint.files().label().to_owned(),
        architecture: format!("{:?}", config.architecture),
        weights: match config.weight_form {
            WeightForm::PackedMultiply => "packed ternary, scale multiplies",
            WeightForm::PackedDivide => "packed ternary, scale divides",
            WeightForm::Online => "master weights, ternarised at load",
            WeightForm::Mlx { bits: 1, .. } => "MLX, 1 bit, a scale for each group of inputs",
            WeightForm::Mlx { .. } => "MLX, 2 bits, a scale for each group of inputs",
            WeightForm::Ggml => "GGML types, see the tensors",
        },
        activations: match config.activations {
            Activations::Int8Token => "int8, one scale a token",
            Activations::Float => "f32",
            Activations::Int8Group => "int8, one scale a group",
        },
        config: dimensions(config),
        parameters: parameters(config),
        memory: memory(checkpoint)?,
        unused_tensors: checkpoint.unused_tensors().to_vec(),
        tensors: checkpoint.files().infos().map(tensor).collect(),
    })
}

fn dimensions(config: &ModelConfig) -> Dimensions {
    Dimensions {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
        max_position_embeddings: config.max_position_embeddings,
        tie_word_embeddings: config.tie_word_embeddings,
    }
}

/// Embeddings, matrices and norms; a tied LM head counts once.
fn parameters(config: &ModelConfig) -> u64 {
    let [vocab, hidden, intermediate, layers, query, kv] = [
        config.vocab_size,
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.query_size(),
        config.kv_size(),
    ]
    .map(|size| size as u64);
    let tables = if config.tie_word_embeddings { 1 } else { 2 };
    let matrices = 2 * query * hidden + 2 * kv * hidden + 3 * intermediate * hidden;
    let norms: u64 = norms(config).map(|norm| (norm.len)(config) as u64).sum();
    let linear_norms = match config.linear_norm_eps {
        Some(_) => LINEARS.iter().map(|linear| (linear.shape)(config).1 as u64).sum(),
        None => 0,
    };
    tables * vocab * hidden + layers * (matrices + norms + linear_norms) + hidden
}

fn memory(checkpoint: &Checkpoint) -> Result<Memory> {
    let summary = checkpoint.memory();
    let options = LoadOptions::default();
    let context = options.capacity(checkpoint.config())?;
    let kv = KvShape::new(checkpoint.config(), options.kv_format(checkpoint.config())?);
    let kv_cache_bytes = (context.div_ceil(BLOCK) * kv.block_bytes()) as u64;
    Ok(Memory {
        ternary_bytes: summary.ternary,
        embedding_bytes: summary.embedding,
        lm_head_bytes: summary.lm_head,
        norms_bytes: summary.norms,
        kv_cache_format: format_name(kv.format),
        kv_cache_bytes_per_position: kv.position_bytes() as u64,
        context,
        kv_cache_bytes,
        total_bytes: summary.ternary
            + summary.embedding
            + summary.lm_head
            + summary.norms
            + kv_cache_bytes,
    })
}

fn text(report: &Report) -> Result<String> {
    let Report { config, memory, .. } = report;
    let mut text = String::new();
    let out = &mut text;
    writeln!(out, "{}", report.model)?;
    writeln!(out, "  architecture  {} ({})", report.architecture, report.weights)?;
    writeln!(out, "  activations   {}", report.activations)?;
    writeln!(
        out,
        "  dimensions    {} layers, hidden {}, intermediate {}, {}/{} heads of {}, vocabulary {}",
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size
    )?;
    writeln!(out, "  parameters    {}", report.parameters)?;
    writeln!(out, "  context       {} positions at most", config.max_position_embeddings)?;

    writeln!(out, "\nOn a device")?;
    let context = format!("KV cache, {} positions in {}", memory.context, memory.kv_cache_format);
    for (part, bytes) in [
        ("ternary matrices, packed", memory.ternary_bytes),
        ("embedding", memory.embedding_bytes),
        ("LM head", memory.lm_head_bytes),
        ("norms", memory.norms_bytes),
        (context.as_str(), memory.kv_cache_bytes),
        ("together", memory.total_bytes),
    ] {
        writeln!(out, "  {part:34} {:>12}", mebibytes(bytes))?;
    }

    writeln!(out, "\nIn the files")?;
    let mut by_dtype = BTreeMap::<&str, (usize, u64)>::new();
    for tensor in &report.tensors {
        let (count, bytes) = by_dtype.entry(&tensor.dtype).or_default();
        *count += 1;
        *bytes += tensor.bytes;
    }
    for (dtype, (count, bytes)) in by_dtype {
        writeln!(out, "  {:34} {:>12}", format!("{count} tensors of {dtype}"), mebibytes(bytes))?;
    }
    for Tensor { name, dtype, shape, bytes } in &report.tensors {
        writeln!(out, "  {name:50} {dtype:5} {:16} {bytes:>12} bytes", format!("{shape:?}"))?;
    }
    if !report.unused_tensors.is_empty() {
        writeln!(out, "\nNot used: {}", report.unused_tensors.join(", "))?;
    }
    Ok(text)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.2} MiB", bytes as f64 / f64::from(1 << 20))
}
