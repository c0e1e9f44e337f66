//! `sterna bench`: what a model asks of a device.

use std::fmt::Write;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use serde_json::{Map, Number, Value, json};
use sterna::backend::Device;
use sterna::backend::gpu::account::{Account, DryRun, DryRunOptions, Part, dry_run};
use sterna::backend::gpu::{Capabilities, GemvPlan, Variant, WorkDone};
use sterna::synthetic::{self, Shapes};
use sterna::weights::WeightSource;

use super::progress::Bar;
use super::{ModelArguments, Usage, at_least_one, print, print_json};

/// Count what a model has a GPU do
///
/// With --dry-run, records a prompt and then tokens as for a GPU, on a device that computes nothing,
/// and counts: dispatches, submits, bytes of weights read, bytes written and read back. No GPU is
/// needed, and the weights take no memory.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,

    /// The dimensions of a published model in the place of a model
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "model",
        value_parser = PossibleValuesParser::new(synthetic::NAMES)
    )]
    synthetic: Option<String>,

    /// Count, and compute nothing: required, as nothing else is measured
    #[arg(long, required = true)]
    dry_run: bool,

    /// Tokens of the prompt
    #[arg(short, long, value_name = "TOKENS", default_value_t = 64, value_parser = at_least_one)]
    prompt: usize,

    /// Tokens to decode after the prompt
    #[arg(
        short = 'n',
        long = "tokens",
        value_name = "TOKENS",
        default_value_t = 16,
        value_parser = at_least_one
    )]
    tokens: usize,

    /// Most tokens of a sequence [default: the model's maximum, at most 32768]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    context: Option<usize>,

    /// The kernel of matrices with one scale, for one token
    #[arg(
        long,
        value_name = "KERNEL",
        default_value = Variant::PackedDot.gemv().name,
        value_parser = PossibleValuesParser::new(Variant::ALL.map(|variant| variant.gemv().name))
    )]
    gemv: String,

    /// WebGPU's default limits: bindings of at most 128 MiB, so that large tables come in shards
    #[arg(long)]
    webgpu_limits: bool,

    /// Write one JSON object
    ///
    /// decode is per token: dispatches, passes, submits, bytes of weights read, and bytes written
    /// and read back; weight_bytes_by says whose weights; steps has each step of all layers; prefill
    /// is the whole prompt.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  sterna bench --dry-run --device gpu --synthetic bitnet-2b4t
  sterna bench --dry-run --device gpu -m FILE.gguf --json | jq .decode";

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let label = arguments.synthetic.as_deref();
    let report = match label.and_then(synthetic::published) {
        Some(config) => count(arguments, &Shapes::new(config))?,
        None => count(arguments, &arguments.model.checkpoint()?)?,
    };
    let path = arguments.model.model.as_ref().map(|path| path.display().to_string());
    let label = label.map(str::to_owned).or(path).unwrap_or_else(|| "built-in model".to_owned());
    if arguments.json { print_json(&json(&label, &report)) } else { print(&text(&label, &report)?) }
}

/// Counts on a dry device, which stands for any GPU.
fn count(arguments: &Arguments, source: &dyn WeightSource) -> Result<DryRun> {
    if !matches!(arguments.model.device, Device::Auto | Device::Gpu(None)) {
        return Err(Usage("--dry-run counts what a GPU would be given: --device gpu").into());
    }
    let variant = Variant::ALL.into_iter().find(|v| v.gemv().name == arguments.gemv);
    let options = DryRunOptions {
        plan: GemvPlan::from(variant.expect("one of the possible values")),
        capabilities: if arguments.webgpu_limits {
            Capabilities::WebGpuDefault
        } else {
            Capabilities::Adapter
        },
        n_prompt: arguments.prompt,
        n_decode: arguments.tokens,
        load: arguments.model.load_options(arguments.context),
    };
    let mut bar = Bar::load();
    Ok(dry_run(source, &options, &mut |at| bar.layers(at))?)
}

/// A total by so many: whole where it is.
fn per(total: u64, count: u64) -> Number {
    match total.is_multiple_of(count) {
        true => (total / count).into(),
        false => Number::from_f64(total as f64 / count as f64).expect("finite"),
    }
}

/// Whose weights a part reads.
fn weights_of(part: Part) -> &'static str {
    match part {
        Part::Embed => "embedding",
        Part::Head | Part::Choose | Part::Pass => "head",
        Part::Qkv | Part::Attend | Part::ProjectOut | Part::GateUp | Part::Down => "layers",
    }
}

/// What `--json` prints of a token.
#[derive(Serialize)]
struct Decode {
    dispatches_per_layer: Number,
    dispatches_per_token: Number,
    passes_per_token: Number,
    submits_per_token: Number,
    readback_bytes_per_token: Number,
    weight_bytes_per_token: Number,
    bytes_written_per_token: Number,
}

impl Decode {
    fn new(account: &Account, layers: u64) -> Self {
        let (total, n) = (account.total(), account.n_tokens);
        let of_layers = account.sum(Part::is_of_layers);
        Self {
            dispatches_per_layer: per(of_layers.dispatches, n * layers),
            dispatches_per_token: per(total.dispatches, n),
            passes_per_token: per(total.passes, n),
            submits_per_token: per(total.submits, n),
            readback_bytes_per_token: per(total.readback_bytes, n),
            weight_bytes_per_token: per(total.weight_bytes, n),
            bytes_written_per_token: per(total.bytes_written, n),
        }
    }
}

fn json(label: &str, report: &DryRun) -> Value {
    let (decode, prompt) = (&report.decode, &report.prompt);
    let n = decode.n_tokens;
    let weights = |whose| decode.sum(|part| weights_of(part) == whose).weight_bytes;
    let by = ["layers", "head", "embedding"]
        .map(|whose| (whose.to_owned(), per(weights(whose), n).into()));
    let steps = Part::ALL.into_iter().filter(|&part| part != Part::Pass).map(|part| {
        let WorkDone { dispatches, weight_bytes, cache_bytes, bytes_written, .. } =
            decode.part(part);
        let step = json!({
            "dispatches": per(dispatches, n),
            "weight_bytes": per(weight_bytes, n),
            "kv_cache_bytes": per(cache_bytes, n),
            "bytes_written": per(bytes_written, n),
        });
        (part.name().to_owned(), step)
    });
    let total = prompt.total();
    json!({
        "model": label,
        "device": "dry",
        "kernel": report.gemv,
        "head": report.head,
        "layers": report.n_layers,
        "decode": Decode::new(decode, report.n_layers as u64),
        "weight_bytes_by": by.into_iter().collect::<Map<_, _>>(),
        "kv_cache_bytes_per_token": per(decode.total().cache_bytes, n),
        "positions": [decode.start, decode.start + n as usize],
        "steps": steps.collect::<Map<_, _>>(),
        "prefill": {
            "tokens": prompt.n_tokens,
            "dispatches": total.dispatches,
            "passes": total.passes,
            "submits": total.submits,
            "readback_bytes": total.readback_bytes,
            "weight_bytes": total.weight_bytes,
            "kv_cache_bytes": total.cache_bytes,
            "bytes_written": total.bytes_written,
        },
    })
}

fn text(label: &str, report: &DryRun) -> Result<String> {
    let mut text = String::new();
    let decode = &report.decode;
    let n = decode.n_tokens;
    let end = decode.start + n as usize;
    writeln!(text, "{label}: {} layers, {}, head {}", report.n_layers, report.gemv, report.head)?;
    writeln!(text, "per token, at positions {} to {end}:", decode.start)?;
    let row = |name: &str, work: WorkDone| {
        let megabytes = |bytes: u64| bytes as f64 / n as f64 / 1e6;
        format!(
            "  {name:12} {:>10} {:>12.3} {:>12.3} {:>12.3}",
            per(work.dispatches, n).to_string(),
            megabytes(work.weight_bytes),
            megabytes(work.cache_bytes),
            megabytes(work.bytes_written),
        )
    };
    let (weights, cache, written) = ("weights MB", "KV cache MB", "written MB");
    writeln!(text, "  {:12} {:>10} {weights:>12} {cache:>12} {written:>12}", "step", "dispatches")?;
    for part in Part::ALL.into_iter().filter(|&part| part != Part::Pass) {
        writeln!(text, "{}", row(part.name(), decode.part(part)))?;
    }
    let total = decode.total();
    writeln!(text, "{}", row("together", total))?;
    let Decode { passes_per_token, submits_per_token, readback_bytes_per_token, .. } =
        Decode::new(decode, report.n_layers as u64);
    writeln!(
        text,
        "  passes {passes_per_token}, submits {submits_per_token}, bytes read back \
         {readback_bytes_per_token}"
    )?;
    let prompt = report.prompt.total();
    writeln!(
        text,
        "prompt of {} tokens: {} dispatches in {} submits, {:.1} MB of weights, {:.1} MB written",
        report.prompt.n_tokens,
        prompt.dispatches,
        prompt.submits,
        prompt.weight_bytes as f64 / 1e6,
        prompt.bytes_written as f64 / 1e6,
    )?;
    Ok(text)
}
