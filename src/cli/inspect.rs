//! `sterna inspect`: what a checkpoint holds and what running it takes.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use sterna::Checkpoint;
use sterna::Transformer;
use sterna::backend::{Device, LoadOptions};
use sterna::config::{Activations, ModelConfig, WeightForm};
use sterna::generate::Model;
use sterna::kv_cache::{BLOCK, KvShape};
use sterna::session::snapshot::format_name;
use sterna::sparsity::{LayerZeros, Sparsity};
use sterna::synthetic::{self, published};
use sterna::tensor_names::{LINEARS, norms};
use sterna::weights::{MemorySummary, WeightSource};

use super::progress::Bar;
use super::subject::STORY;
use super::{FileArguments, open, print, print_json, say};

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

    /// The shapes of a published model in the place of a model, as bench and compare fill them with
    /// random weights
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with_all = ["model", "sparsity"],
        value_parser = PossibleValuesParser::new(synthetic::NAMES)
    )]
    synthetic: Option<String>,

    /// Run a text through the model, and count the zeros that its MLPs multiply
    ///
    /// Where the activation is relu², the gate is often closed: that row of the up matrix and that column of
    /// the down matrix add nothing, and need not be read. Shows the share of each layer. Runs on the
    /// CPU.
    #[arg(long)]
    sparsity: bool,

    /// The text for --sparsity [default: a short story]
    #[arg(long, value_name = "FILE", requires = "sparsity")]
    text: Option<PathBuf>,

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
    if let Some(name) = &arguments.synthetic {
        let config = published(name).context("a name from the list")?;
        let report = shapes(name, &config, MemorySummary::synthetic(&config))?;
        return if arguments.json { print_json(&report) } else { print(&text(&report)?) };
    }
    let checkpoint = open(arguments.model.as_deref(), arguments.files)?;
    if arguments.sparsity {
        let sparsity = measure_sparsity(&checkpoint, arguments.text.as_deref())?;
        let report = SparsityReport::new(&checkpoint, &sparsity);
        return if arguments.json { print_json(&report) } else { print(&sparsity_text(&report)?) };
    }
    let report = report(&checkpoint)?;
    if arguments.json { print_json(&report) } else { print(&text(&report)?) }
}

/// What `--sparsity --json` prints.
#[derive(Serialize)]
struct SparsityReport {
    model: String,
    activation: String,
    tokens: usize,
    /// Share of all layers.
    gated_zeros: f64,
    /// Share of all layers; the same as `gated_zeros` where the model does not quantise.
    down_input_zeros: f64,
    /// Bytes of packed up and down matrices of all layers, and those of them that a token needs.
    up_down_bytes: f64,
    needed_bytes: f64,
    layers: Vec<LayerReport>,
}

#[derive(Serialize)]
struct LayerReport {
    gated_zeros: f64,
    down_input_zeros: f64,
}

impl SparsityReport {
    fn new(checkpoint: &Checkpoint, sparsity: &Sparsity) -> Self {
        let config = checkpoint.config();
        let total = sparsity.total();
        // Two bits a weight.
        let matrix = (config.hidden_size * config.intermediate_size) as f64 / 4.0;
        let matrices = matrix * sparsity.layers.len() as f64;
        let of = |layer: &LayerZeros| LayerReport {
            gated_zeros: layer.gated_share(),
            down_input_zeros: layer.code_share(),
        };
        Self {
            model: checkpoint.files().label().to_owned(),
            activation: format!("{:?}", config.hidden_act),
            tokens: sparsity.tokens,
            gated_zeros: total.gated_share(),
            down_input_zeros: total.code_share(),
            up_down_bytes: 2.0 * matrices,
            needed_bytes: matrices * (2.0 - total.gated_share() - total.code_share()),
            layers: sparsity.layers.iter().map(of).collect(),
        }
    }
}

fn measure_sparsity(checkpoint: &Checkpoint, text: Option<&Path>) -> Result<Sparsity> {
    let text = match text {
        Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
        None => STORY.to_owned(),
    };
    let mut tokens = Model::encode(checkpoint, &text)?;
    let mut bar = Bar::load();
    let options = LoadOptions::default();
    let mut model = Transformer::load(checkpoint, Device::Cpu, &options, &mut |at| bar.layers(at))?;
    drop(bar);
    if tokens.len() > model.capacity() {
        say(&format!("read the first {} of {} tokens", model.capacity(), tokens.len()));
        tokens.truncate(model.capacity());
    }
    Ok(Sparsity::measure(&mut model, checkpoint, &tokens)?)
}

fn sparsity_text(report: &SparsityReport) -> Result<String> {
    let mut text = String::new();
    let SparsityReport { model, activation, tokens, .. } = report;
    writeln!(text, "{model}: zeros in the MLPs ({activation}) over {tokens} tokens")?;
    writeln!(text, "  {:8} {:>14} {:>18}", "layer", "closed gates", "zero down inputs")?;
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    for (index, layer) in report.layers.iter().enumerate() {
        let (gated, codes) = (percent(layer.gated_zeros), percent(layer.down_input_zeros));
        writeln!(text, "  {index:<8} {gated:>14} {codes:>18}")?;
    }
    let (gated, codes) = (percent(report.gated_zeros), percent(report.down_input_zeros));
    writeln!(text, "  {:8} {gated:>14} {codes:>18}", "all")?;
    let megabytes = |bytes: f64| bytes / 1e6;
    writeln!(
        text,
        "Of {:.2} MB of up and down weights, a token needs {:.2} MB on average.",
        megabytes(report.up_down_bytes),
        megabytes(report.needed_bytes)
    )?;
    Ok(text)
}

fn report(checkpoint: &Checkpoint) -> Result<Report> {
    let config = checkpoint.config();
    let tensor = |info: &sterna::format::TensorInfo| Tensor {
        name: info.name.clone(),
        dtype: info.dtype.clone(),
        shape: info.shape.clone(),
        bytes: info.len_bytes,
    };
    let report = shapes(checkpoint.files().label(), config, checkpoint.memory())?;
    Ok(Report {
        unused_tensors: checkpoint.unused_tensors().to_vec(),
        tensors: checkpoint.files().infos().map(tensor).collect(),
        ..report
    })
}

/// A report without tensors.
fn shapes(name: &str, config: &ModelConfig, summary: MemorySummary) -> Result<Report> {
    Ok(Report {
        model: name.to_owned(),
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
        memory: memory(config, summary)?,
        unused_tensors: Vec::new(),
        tensors: Vec::new(),
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

fn memory(config: &ModelConfig, summary: MemorySummary) -> Result<Memory> {
    let options = LoadOptions::default();
    let context = options.capacity(config)?;
    let kv = KvShape::new(config, options.kv_format(config)?);
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

    if report.tensors.is_empty() {
        return Ok(text);
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
