//! `sterna bench`: how fast a model runs on a device.

use std::fmt::Write;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use sterna::backend::gpu::account::DryRunOptions;
use sterna::backend::gpu::{Capabilities, GemvPlan, Variant};
use sterna::backend::{Device, LoadOptions, resolve_auto, simd};
use sterna::measure::bandwidth::Bandwidth;
use sterna::measure::bench::{BenchOptions, Profile, TestResult, bench, profile};
use sterna::measure::machine::{Machine, MemoryMark};
use sterna::measure::{Event, MemoryReport, ModelReport};
use sterna::session::snapshot::format_name;
use sterna::synthetic::{self, Shapes};
use sterna::{Checkpoint, Transformer};

use super::progress::{Bar, Stage};
use super::subject::{Subject, bandwidth};
use super::{
    ModelArguments, Usage, at_least_one, dry_run, interrupt_flag, print, print_json, say, say_notes,
};

/// Measure how fast a model runs on a device
///
/// Times prompts (pp: up to the first token after them) and replies (tg: from the first token to the
/// last), each at the given depths of the KV cache, after one run of each that does not count. Beside
/// the speed stands its share of what the device's memory gives, which is measured first: the weights
/// and the KV cache are read once a token.
///
/// With --dry-run, records a prompt and then tokens as for a GPU, on a device that computes nothing,
/// and counts: dispatches, submits, bytes of weights read, bytes written and read back. No GPU is
/// needed, and the weights take no memory.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,

    /// Random weights in the shapes of a published model, in the place of a model
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "model",
        value_parser = PossibleValuesParser::new(synthetic::NAMES)
    )]
    synthetic: Option<String>,

    /// Tokens of prompts, as 128,512; 0: none [default: 512, or 64 with --dry-run]
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',')]
    prompt: Option<Vec<usize>>,

    /// Tokens of replies, as 64,128; 0: none [default: 128, or 16 with --dry-run]
    #[arg(short = 'n', long = "tokens", value_name = "TOKENS", value_delimiter = ',')]
    tokens: Option<Vec<usize>>,

    /// Tokens in the KV cache before each, as 0,1000
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,

    /// Timed runs of each test
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    repetitions: usize,

    /// Most tokens of a sequence [default: the model's maximum, at most 32768]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    context: Option<usize>,

    /// Then time the parts of a token: kernels by a GPU's clock, or steps on a CPU
    ///
    /// Each kernel gets a pass of its own, which takes longer in all than the timed runs above: the
    /// shares are what it is for.
    #[arg(long)]
    profile: bool,

    /// Write one JSON object
    ///
    /// It has the machine, the model, the device, memory, bandwidth and the tests, each with its runs.
    /// With --dry-run:
    /// decode is per token: dispatches, passes, submits, bytes of weights read, and bytes written
    /// and read back; weight_bytes_by says whose weights; steps has each step of all layers; prefill
    /// is the whole prompt.
    #[arg(long, group = "form")]
    json: bool,

    /// Write a table of comma-separated values
    #[arg(long, group = "form")]
    csv: bool,

    /// Write a Markdown table
    #[arg(long, group = "form")]
    markdown: bool,

    /// Count, and compute nothing
    #[arg(long, conflicts_with_all = ["depth", "repetitions", "profile", "csv", "markdown"])]
    dry_run: bool,

    /// The kernel of matrices with one scale, for one token
    #[arg(
        long,
        value_name = "KERNEL",
        default_value = Variant::PackedDot.gemv().name,
        value_parser = PossibleValuesParser::new(Variant::ALL.map(|variant| variant.gemv().name)),
        requires = "dry_run"
    )]
    gemv: String,

    /// WebGPU's default limits: bindings of at most 128 MiB, so that large tables come in shards
    #[arg(long, requires = "dry_run")]
    webgpu_limits: bool,
}

const EXAMPLES: &str = "\
Examples:
  sterna bench                                           the built-in model on the best device
  sterna bench --synthetic bitnet-2b4t --device cpu      random weights: no download
  sterna bench -m FILE.gguf -p 128,512 -n 64 -d 0,1000   lengths and depths
  sterna bench -m FILE.gguf --device gpu:1 --profile     which kernels take the time
  sterna bench --dry-run --device gpu --synthetic bitnet-2b4t
  sterna bench --dry-run --device gpu -m FILE.gguf --json | jq .decode";

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    program: &'static str,
    machine: Machine,
    model: ModelReport,
    device: String,
    description: String,
    kernel: String,
    head: String,
    kv: &'static str,
    threads: usize,
    load_seconds: f64,
    memory: MemoryReport,
    bandwidth: Option<Bandwidth>,
    tests: Vec<Test>,
    profile: Option<Profile>,
}

#[derive(Serialize)]
struct Test {
    #[serde(flatten)]
    result: TestResult,
    share_of_bandwidth: Option<f64>,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.dry_run {
        return count(arguments);
    }
    let options = BenchOptions {
        prompts: arguments.prompt.clone().unwrap_or_else(|| vec![512]),
        replies: arguments.tokens.clone().unwrap_or_else(|| vec![128]),
        depths: arguments.depth.clone(),
        repetitions: arguments.repetitions,
    };
    if options.positions() == 0 {
        return Err(Usage("nothing to measure: --prompt and --tokens are 0").into());
    }
    let load = arguments.model.load_options(arguments.context);
    let device = match arguments.model.device {
        Device::Auto => resolve_auto(),
        device => device,
    };
    let model = arguments.model.model.as_deref();
    let subject = Subject::open(arguments.synthetic.as_deref(), model, arguments.model.files)?;
    options.check(load.capacity(subject.weights.config())?)?;
    subject.check_memory(&[device], &load, options.positions())?;
    let report = measure(arguments, &subject, device, &load, &options)?;
    if let (true, None) = (arguments.profile, &report.profile) {
        say("no profile: the device has no timestamps");
    }
    if arguments.json {
        print_json(&report)
    } else if arguments.csv {
        print(&csv_table(&report)?)
    } else {
        let rows = table(&report);
        let form = if arguments.markdown { markdown } else { aligned };
        print(&format!("{}{}{}", head(&report)?, form(&rows), profile_text(&report, form)?))
    }
}

fn measure(
    arguments: &Arguments,
    subject: &Subject,
    device: Device,
    load: &LoadOptions,
    options: &BenchOptions,
) -> Result<Report> {
    let bandwidth = bandwidth(device, load)?;
    let mark = MemoryMark::set();
    let mut bar = Bar::load();
    let source = subject.weights.as_ref();
    let mut transformer = Transformer::load(source, device, load, &mut |at| bar.layers(at))?;
    let load_seconds = bar.elapsed().as_secs_f64();
    drop(bar);
    say_notes(transformer.device());

    let (interrupted, stage) = (interrupt_flag()?, Stage::new());
    let mut observe = |event: Event<'_>| observe(event, &interrupted, &stage);
    let results = bench(&mut transformer, &subject.text, options, &mut observe)?;
    let profile = match (arguments.profile, options.replies.iter().max()) {
        (true, Some(&tokens)) => {
            let depth = options.depths.iter().copied().max().unwrap_or_default();
            let tokens = tokens.max(1).min(transformer.capacity() - depth - 1);
            profile(&mut transformer, &subject.text, (depth, tokens), &mut observe)?
        }
        _ => None,
    };
    let share = |result: &TestResult| {
        let roof = bandwidth.as_ref()?.gb_per_second;
        Some(result.read_gb_per_second? / roof)
    };
    let tests = results
        .into_iter()
        .map(|result| Test { share_of_bandwidth: share(&result), result })
        .collect();
    let info = transformer.device();
    Ok(Report {
        program: concat!("sterna ", env!("CARGO_PKG_VERSION")),
        machine: Machine::this(),
        model: subject.report(),
        device: info.name.clone(),
        description: info.description.clone(),
        kernel: info.gemv.clone(),
        head: info.head.clone(),
        kv: format_name(transformer.kv_format()),
        threads: simd::threads(load),
        load_seconds,
        memory: MemoryReport { host_bytes: mark.peak(), device_bytes: transformer.device_bytes() },
        bandwidth,
        tests,
        profile,
    })
}

/// Shows the stages, and ends at Ctrl-C.
pub(super) fn observe(
    event: Event<'_>,
    interrupted: &AtomicBool,
    stage: &Stage,
) -> ControlFlow<()> {
    if let Event::Stage(what) = event {
        stage.show(what);
    }
    match interrupted.load(Ordering::Relaxed) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

/// Counts on a dry device, which stands for any GPU.
fn count(arguments: &Arguments) -> Result<()> {
    if !matches!(arguments.model.device, Device::Auto | Device::Gpu(None)) {
        return Err(Usage("--dry-run counts what a GPU would be given: --device gpu").into());
    }
    let one = |values: &Option<Vec<usize>>, default| match values.as_deref() {
        None => Some(default),
        Some(&[value]) if value > 0 => Some(value),
        Some(_) => None,
    };
    let lengths = one(&arguments.prompt, 64).zip(one(&arguments.tokens, 16));
    let Some((n_prompt, n_decode)) = lengths else {
        return Err(Usage("--dry-run takes one --prompt and one --tokens, at least 1").into());
    };
    let variant = Variant::ALL.into_iter().find(|v| v.gemv().name == arguments.gemv);
    let options = DryRunOptions {
        plan: GemvPlan::from(variant.context("a name from the list")?),
        capabilities: if arguments.webgpu_limits {
            Capabilities::WebGpuDefault
        } else {
            Capabilities::Adapter
        },
        n_prompt,
        n_decode,
        load: arguments.model.load_options(arguments.context),
    };
    let json = arguments.json;
    let name = arguments.synthetic.as_deref();
    if let Some((label, config)) = name.and_then(|name| Some((name, synthetic::published(name)?))) {
        return dry_run::run(&dry_run::Count {
            label,
            source: &Shapes::new(config),
            options,
            json,
        });
    }
    let source: &Checkpoint = &arguments.model.checkpoint()?;
    let path = arguments.model.model.as_ref().map(|path| path.display().to_string());
    let label = path.as_deref().unwrap_or("built-in model");
    dry_run::run(&dry_run::Count { label, source, options, json })
}

/// Lines before the table.
fn head(report: &Report) -> Result<String> {
    let Report { model, device, description, kernel, head, kv, load_seconds, memory, .. } = report;
    let mut text = String::new();
    let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
    writeln!(text, "{}: {device} ({description}), {kernel}, {head}, KV cache {kv}", model.name)?;
    write!(text, "loaded in {load_seconds:.2} s")?;
    match memory.host_bytes {
        Some(bytes) => write!(text, "; took {} of memory at most", megabytes(bytes))?,
        None => write!(text, "; what memory it took is not known on this system")?,
    }
    if let Some(bytes) = memory.device_bytes {
        write!(text, "; buffers of the device {}", megabytes(bytes))?;
    }
    if let Some(Bandwidth { gb_per_second, method }) = &report.bandwidth {
        write!(text, "; bandwidth {gb_per_second:.1} GB/s ({method})")?;
    }
    writeln!(text, "\n")?;
    Ok(text)
}

const COLUMNS: [&str; 10] = [
    "test",
    "tokens/s",
    "min",
    "max",
    "ms to first",
    "ms/token p50",
    "p95",
    "MB/token",
    "GB/s",
    "of bandwidth",
];

type Rows = Vec<Vec<String>>;

fn table(report: &Report) -> Rows {
    let number = |value: Option<f64>, digits: usize| match value {
        Some(value) => format!("{value:.digits$}"),
        None => "-".to_owned(),
    };
    let row = |Test { result, share_of_bandwidth }: &Test| {
        let speed = &result.tokens_per_second;
        let times = result.token_ms.as_ref();
        let bytes = result.weight_bytes_per_token.zip(result.cache_bytes_per_token);
        vec![
            result.test.clone(),
            number(Some(speed.median), 2),
            number(Some(speed.min), 2),
            number(Some(speed.max), 2),
            number(result.first_token_ms.as_ref().map(|spread| spread.median), 2),
            number(times.map(|times| times.p50), 3),
            number(times.map(|times| times.p95), 3),
            number(bytes.map(|(weights, cache)| (weights + cache) / 1e6), 3),
            number(result.read_gb_per_second, 2),
            share_of_bandwidth.map_or("-".to_owned(), |share| format!("{:.1} %", 100.0 * share)),
        ]
    };
    let header = COLUMNS.map(str::to_owned).to_vec();
    [header].into_iter().chain(report.tests.iter().map(row)).collect()
}

/// The first column to the left, numbers to the right.
pub(super) fn aligned(rows: &Rows) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let mut text = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            let width = width(column).unwrap_or_default();
            text += &match column {
                0 => format!("{cell:width$}"),
                _ => format!("  {cell:>width$}"),
            };
        }
        text = text.trim_end().to_owned() + "\n";
    }
    text
}

fn markdown(rows: &Rows) -> String {
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        text += &format!("| {} |\n", row.join(" | "));
        if index == 0 {
            text += &format!("| --- |{}\n", " ---: |".repeat(row.len() - 1));
        }
    }
    text
}

/// A row a test, with what tells machines, models and devices apart.
fn csv_table(report: &Report) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let fixed = ["machine", "model", "device", "description", "kernel", "kv"];
    writer.write_record(fixed.into_iter().chain(COLUMNS))?;
    let Report { machine, model, device, description, kernel, kv, .. } = report;
    let fixed = [&machine.cpu, &model.name, device, description, kernel, &(*kv).to_owned()];
    for row in table(report).iter().skip(1) {
        let cells = row.iter().map(|cell| if cell == "-" { "" } else { cell.as_str() });
        writer.write_record(fixed.iter().map(|cell| cell.as_str()).chain(cells))?;
    }
    let bytes = writer.into_inner().map_err(|error| error.into_error()).context("writing CSV")?;
    String::from_utf8(bytes).context("writing CSV")
}

fn profile_text(report: &Report, form: fn(&Rows) -> String) -> Result<String> {
    let Some(Profile { clock, parts }) = &report.profile else { return Ok(String::new()) };
    let header = ["part", "calls/token", "µs/token", "share"].map(str::to_owned).to_vec();
    let rows = parts.iter().map(|part| {
        vec![
            part.name.to_owned(),
            format!("{:.1}", part.calls_per_token),
            format!("{:.1}", part.us_per_token),
            format!("{:.1} %", 100.0 * part.share),
        ]
    });
    let table = form(&[header].into_iter().chain(rows).collect());
    Ok(format!("\nparts of a token, by {clock} clock; apart from the runs above\n\n{table}"))
}
