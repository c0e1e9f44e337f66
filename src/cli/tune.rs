//! `sterna tune`: which kernels are fastest on an adapter, and how fast that is.

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::builder::PossibleValuesParser;
use sterna::backend::Device;
use sterna::backend::gpu::tune::{self, CandidateReport, Report, StepShape};
use sterna::backend::gpu::{AdapterKind, Capabilities, Gpu};
use sterna::config::ModelConfig;
use sterna::synthetic;
use sterna::weights::WeightSource;

use super::{FileArguments, open, print, print_json, say};

/// Find the fastest kernels for a model on a GPU
///
/// Runs each step of a decoded token with every kernel that is exact on the adapter, on weights that
/// no cache holds, and keeps the fastest for later runs. "sterna run" does the same in less than two
/// seconds when it first meets an adapter or a model's shapes; this takes its time and shows the
/// numbers.
///
/// The times are of whole steps: norm, quantisation, matrix and what comes after. GB/s are bytes of
/// weights; the percentage is their share of what the adapter copies (bytes read and written). The tiles
/// of prompts are measured on the largest matrix, in 10⁹ multiplications and additions a second.
///
/// The winners are kept in the directory STERNA_CACHE, or sterna in the user's cache directory, for
/// this adapter, driver and version. Those of a software rasteriser are not.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    /// What to measure: gpu or gpu:N
    #[arg(long, value_name = "DEVICE", default_value = "gpu", value_parser = gpu_index)]
    device: GpuIndex,

    /// The model whose shapes are measured: a file, a directory, or a name on the Hugging Face hub
    #[arg(short, long, value_name = "MODEL", conflicts_with = "synthetic")]
    model: Option<PathBuf>,

    #[command(flatten)]
    files: FileArguments,

    /// Measure the shapes of a published model, without its files
    #[arg(
        long,
        value_name = "NAME",
        default_value = "bitnet-2b4t",
        value_parser = PossibleValuesParser::new(synthetic::NAMES)
    )]
    synthetic: String,

    /// When to stop; what was not measured by then is not chosen
    #[arg(long, value_name = "SECONDS", default_value = "20", allow_negative_numbers = true, value_parser = seconds)]
    budget: Duration,

    /// Write one JSON object
    ///
    /// It has device, adapter, kind, api, driver, wgpu, kernels (a hash of their sources), clock,
    /// rotated_bytes, copy_gb_s, dispatch_us, seconds, kept, not_kept, and shapes: of each step (qkv,
    /// o, gate_up, down) n, k, candidates and the winner. A candidate has variant, slices, rows, unroll, fused, us,
    /// gb_s, share, exact and refused. gemms has kernel, m, n, k, candidates and the winner of the
    /// tiles of prompts; a candidate has rows, tokens, cooperative (size and subgroup, or null), us,
    /// gop_s, exact and refused. What was not reached in time is null.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  sterna tune                              the shapes of BitNet b1.58 2B4T, on the best GPU
  sterna tune -m MODEL --device gpu:1      a model's shapes, on another adapter
  sterna tune --synthetic llama3-8b --json | jq '.shapes[] | {step, winner}'";

/// There was no time for it.
const NOT_REACHED: &str = "not reached";

/// N of `gpu:N`.
#[derive(Clone, Copy)]
struct GpuIndex(Option<usize>);

fn gpu_index(text: &str) -> Result<GpuIndex, String> {
    match text.parse() {
        Ok(Device::Gpu(index)) => Ok(GpuIndex(index)),
        _ => Err("expected gpu or gpu:N; nothing else has kernels to choose from".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.0..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "expected 0 to 3600 seconds".to_owned())
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let (name, config) = shapes(arguments)?;
    let Some(steps) = StepShape::of(&config)? else {
        bail!("{name}: its matrices have scales of groups, and one kernel; there is no choice");
    };
    let gpu = Gpu::open(arguments.device.0, Capabilities::Adapter)?;
    let report = tune::tune(&gpu, &steps, arguments.budget, tune::directory().as_deref())?;
    let is_software = gpu.adapter.kind == AdapterKind::Software;
    if arguments.json {
        print_json(&report)?;
    } else {
        print(&table(&name, &report)?)?;
    }
    match (&report.kept, &report.not_kept) {
        (Some(path), _) => say(&format!("kept in {}", path.display())),
        (None, problem) => {
            let problem = format!("not kept: {}", problem.as_deref().unwrap_or_default());
            if !is_software {
                bail!(problem);
            }
            say(&problem);
        }
    }
    Ok(())
}

/// The model's name and dimensions.
fn shapes(arguments: &Arguments) -> Result<(String, ModelConfig)> {
    if arguments.model.is_some() {
        let checkpoint = open(arguments.model.as_deref(), arguments.files)?;
        return Ok((checkpoint.files().label().to_owned(), checkpoint.config().clone()));
    }
    let name = arguments.synthetic.clone();
    let config = synthetic::published(&name).context("a name from the list")?;
    Ok((name, config))
}

fn table(name: &str, report: &Report) -> Result<String> {
    let mut text = String::new();
    let Report { device, adapter, kind, api, driver, wgpu, kernels, .. } = report;
    writeln!(text, "{device}: {adapter} ({kind}, {api}, {driver}), wgpu {wgpu}")?;
    let (clock, bytes) = (report.clock, report.rotated_bytes >> 20);
    writeln!(text, "{name}, kernels {kernels}, clock {clock}, {bytes} MiB of weights take turns")?;
    let known = |value: Option<f64>, unit| match value {
        Some(value) => format!("{value:.2} {unit}"),
        None => NOT_REACHED.to_owned(),
    };
    writeln!(text, "copy      {}", known(report.copy_gb_s, "GB/s"))?;
    writeln!(text, "dispatch  {}", known(report.dispatch_us, "µs"))?;
    for shape in &report.shapes {
        writeln!(text, "{} {}x{}", shape.step.name(), shape.n, shape.k)?;
        let mut unreached = 0;
        for candidate in &shape.candidates {
            let mark = if candidate.plan == shape.winner { '*' } else { ' ' };
            let plan = candidate.plan.to_string();
            match measured(candidate) {
                Some(result) => writeln!(text, "{mark} {plan:48} {result}")?,
                None if mark == '*' => writeln!(text, "{mark} {plan:48} {NOT_REACHED}")?,
                None => unreached += 1,
            }
        }
        if unreached > 0 {
            writeln!(text, "  {unreached} more {NOT_REACHED}")?;
        }
    }
    for gemm in &report.gemms {
        writeln!(text, "{} {}x{}x{}", gemm.kernel, gemm.m, gemm.n, gemm.k)?;
        for candidate in &gemm.candidates {
            let mark = if candidate.plan == gemm.winner { '*' } else { ' ' };
            let plan = candidate.plan.to_string();
            let result = match (candidate.us, candidate.gop_s, &candidate.refused) {
                (Some(us), Some(gop_s), _) => format!("{us:10.2} µs {gop_s:9.1} Gop/s"),
                (_, _, Some(problem)) => format!("refused: {problem}"),
                _ => NOT_REACHED.to_owned(),
            };
            writeln!(text, "{mark} {plan:48} {result}")?;
        }
    }
    writeln!(text, "{:.1} s", report.seconds)?;
    Ok(text)
}

/// `None` if there was no time for it.
fn measured(candidate: &CandidateReport) -> Option<String> {
    let CandidateReport { us, gb_s, share, refused, .. } = candidate;
    match (us, gb_s, refused) {
        (Some(us), Some(gb_s), _) => {
            let share = share.map(|share| format!("{:6.1} %", 100.0 * share)).unwrap_or_default();
            Some(format!("{us:10.2} µs {gb_s:9.2} GB/s {share}"))
        }
        (_, _, Some(problem)) => Some(format!("refused: {problem}")),
        _ => None,
    }
}
