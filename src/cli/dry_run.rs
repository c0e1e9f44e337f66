//! `sterna bench --dry-run`: what a model asks of a GPU.

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;
use serde_json::{Map, Number, Value, json};
use sterna::backend::gpu::WorkDone;
use sterna::backend::gpu::account::{Account, DryRun, DryRunOptions, Part, dry_run};
use sterna::weights::WeightSource;

use super::progress::Bar;
use super::{print, print_json};

/// What is counted.
pub(super) struct Count<'a> {
    /// The name of the model.
    pub(super) label: &'a str,
    pub(super) source: &'a dyn WeightSource,
    pub(super) options: DryRunOptions,
    pub(super) json: bool,
}

/// Prints the count of a dry device, which stands for any GPU.
pub(super) fn run(count: &Count<'_>) -> Result<()> {
    let mut bar = Bar::load();
    let report = dry_run(count.source, &count.options, &mut |at| bar.layers(at))?;
    drop(bar);
    match count.json {
        true => print_json(&json(count.label, &report)),
        false => print(&text(count.label, &report)?),
    }
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
