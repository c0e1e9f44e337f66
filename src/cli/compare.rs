//! `sterna compare`: devices in turns, with energy.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use sterna::backend::{Device, LoadOptions, resolve_auto, simd};
use sterna::energy::{Found, Host, discover};
use sterna::measure::compare::{CompareOptions, Subject as Loaded, compare};
use sterna::measure::{DeviceReport, Event, Report, Spread};
use sterna::synthetic;
use tempfile::NamedTempFile;

use super::bench::{aligned, observe};
use super::progress::{Bar, Stage};
use super::subject::{Subject, bandwidth};
use super::{
    FileArguments, LoadArguments, Usage, at_least_one, html, interrupt_flag, print, print_json, say,
};

/// Compare devices: latency and energy
///
/// Runs one model on each device in turns, and says which is done first, how fast each is, and what a
/// token costs in joules, where the machine has meters that may be read ("sterna devices" lists them).
/// Joules are measured or missing, never estimated.
///
/// Without a meter this takes a minute or so; with one, each window is as long as the meter asks for:
/// 10 to 60 seconds, four for each round of two devices.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    /// A GGUF file, a directory, or a name on the Hugging Face hub [default: built in]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,

    #[command(flatten)]
    files: FileArguments,

    /// Random weights in the shapes of a published model, in the place of a model
    #[arg(
        long,
        value_name = "NAME",
        conflicts_with = "model",
        value_parser = PossibleValuesParser::new(synthetic::NAMES)
    )]
    synthetic: Option<String>,

    /// Devices, as cpu,gpu:0; the first is what the others are compared with [default: cpu and the
    /// hardware GPU, if there is one]
    #[arg(long, value_name = "DEVICES", value_delimiter = ',')]
    devices: Option<Vec<Device>>,

    #[command(flatten)]
    load: LoadArguments,

    /// Tokens of the prompt
    #[arg(short, long, value_name = "TOKENS", default_value_t = 128, value_parser = at_least_one)]
    prompt: usize,

    /// Tokens of a reply, after its first
    #[arg(
        short = 'n',
        long = "tokens",
        value_name = "TOKENS",
        default_value_t = 128,
        value_parser = at_least_one
    )]
    tokens: usize,

    /// Tokens in the KV cache at which the speed of replies is measured [default: 0,256,512 as far as
    /// they fit]
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',')]
    depth: Option<Vec<usize>>,

    /// Most tokens of a sequence [default: the model's maximum, at most 32768]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    context: Option<usize>,

    /// Windows of each kind on each device
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    rounds: usize,

    /// Length of a window [default: what the meters ask for; 3 without one]
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = seconds)]
    window: Option<Duration>,

    /// How long each device works before anything counts [default: 10 with a meter, else 2]
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = seconds)]
    warm_up: Option<Duration>,

    /// Length of the idle baselines before and after [default: 10 with a meter, else 0]
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = seconds)]
    idle: Option<Duration>,

    /// Write a page with tables and charts to FILE, and its data beside it, as FILE.json
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,

    /// Measure nothing: put the data of other runs into one report
    #[arg(
        long,
        value_name = "FILE.json",
        num_args = 1..,
        requires = "report",
        conflicts_with_all = [
            "model", "synthetic", "devices", "prompt", "tokens", "depth", "context", "rounds",
            "window", "warm_up", "idle", "json"
        ]
    )]
    merge: Vec<PathBuf>,

    /// Write one JSON object: the data of a report
    ///
    /// docs/report.schema.json describes it: machine, model, method, meters, devices (each with its speeds,
    /// latencies, memory, energy and tokens), same_tokens, windows, power and verdicts.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  sterna compare                                                the built-in model
  sterna compare --synthetic bitnet-2b4t --report report.html   random weights: no download
  sterna compare -m FILE.gguf --devices cpu,gpu:0,gpu:1
  sterna compare --merge laptop.json server.json --report both.html";

/// Depths that are measured where they fit.
const DEPTHS: [usize; 3] = [0, 256, 512];

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.0..=3600.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "expected 0 to 3600 seconds".to_owned())
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    // Before minutes of work: can the report be written?
    let files = arguments.report.as_deref().map(ReportFiles::open).transpose()?;
    if !arguments.merge.is_empty() {
        let reports = arguments.merge.iter().map(|path| Report::read(path));
        let reports: Vec<Report> = reports.collect::<Result<_, _>>()?;
        let files = files.context("--report is required")?;
        return files.write(&html::page(&reports)?, None);
    }
    let report = measure(arguments)?;
    if let Some(files) = files {
        let json = serde_json::to_string(&report).context("writing JSON")?;
        files.write(&html::page(std::slice::from_ref(&report))?, Some(&json))?;
    }
    if arguments.json { print_json(&report) } else { print(&text(&report)?) }
}

/// A page and its data, which appear when they are complete.
struct ReportFiles {
    page: (PathBuf, NamedTempFile),
    data: (PathBuf, NamedTempFile),
}

impl ReportFiles {
    fn open(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json")) {
            return Err(
                Usage("--report is the page, FILE.html; FILE.json is written beside it").into()
            );
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let temporary = || {
            NamedTempFile::new_in(parent)
                .with_context(|| format!("{}: cannot be written", path.display()))
        };
        let data = path.with_extension("json");
        Ok(Self { page: (path.to_owned(), temporary()?), data: (data, temporary()?) })
    }

    fn write(self, page: &str, data: Option<&str>) -> Result<()> {
        let put = |(path, mut file): (PathBuf, NamedTempFile), text: &str| {
            let named = || path.display().to_string();
            file.write_all(text.as_bytes()).with_context(named)?;
            file.as_file().sync_all().with_context(named)?;
            readable(&file).with_context(named)?;
            file.persist(&path).map_err(|error| error.error).with_context(named)?;
            say(&format!("written: {}", path.display()));
            Ok::<_, anyhow::Error>(())
        };
        if let Some(data) = data {
            put(self.data, data)?;
        }
        put(self.page, page)
    }
}

/// Temporary files are private; reports are for everybody who may look into the directory.
#[cfg(unix)]
fn readable(file: &NamedTempFile) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn readable(_: &NamedTempFile) -> std::io::Result<()> {
    Ok(())
}

/// The devices that are asked for, or the processor and the GPU that `auto` takes.
fn devices(arguments: &Arguments) -> Result<Vec<Device>> {
    let Some(asked) = &arguments.devices else {
        return Ok(match resolve_auto() {
            Device::Cpu => {
                say("there is no hardware GPU: the CPU alone is measured");
                vec![Device::Cpu]
            }
            gpu => vec![Device::Cpu, gpu],
        });
    };
    let mut devices = Vec::new();
    for &device in asked {
        let device = if device == Device::Auto { resolve_auto() } else { device };
        if devices.contains(&device) {
            return Err(Usage("--devices names a device twice").into());
        }
        devices.push(device);
    }
    Ok(devices)
}

fn measure(arguments: &Arguments) -> Result<Report> {
    let devices = devices(arguments)?;
    let load = arguments.load.options(arguments.context);
    let model = arguments.model.as_deref();
    let subject = Subject::open(arguments.synthetic.as_deref(), model, arguments.files)?;
    let mut found = discover(&Host::this());
    let capacity = load.capacity(subject.weights.config())?;
    let options = options(arguments, &found, capacity);
    options.check(capacity)?;
    let deepest = options.depths.iter().copied().max().unwrap_or_default().max(options.prompt);
    subject.check_memory(&devices, &load, deepest + options.reply + 1)?;

    let mut loaded = Vec::new();
    for &device in &devices {
        loaded.push(open(&subject, device, &load, &options)?);
    }
    let (interrupted, stage) = (interrupt_flag()?, Stage::new());
    let about = (subject.report(), subject.text.as_slice(), simd::threads(&load));
    let mut observe = |event: Event<'_>| observe(event, &interrupted, &stage);
    Ok(compare(&mut loaded, about, &mut found, &options, &mut observe)?)
}

fn open(
    subject: &Subject,
    device: Device,
    load: &LoadOptions,
    options: &CompareOptions,
) -> Result<Loaded> {
    let bandwidth = bandwidth(device, load)?;
    let mut bar = Bar::load();
    let (source, text) = (subject.weights.as_ref(), subject.text.as_slice());
    let loaded = Loaded::load(source, device, load, (text, options), &mut |at| bar.layers(at))?;
    Ok(match bandwidth {
        Some(bandwidth) => loaded.with_bandwidth(bandwidth),
        None => loaded,
    })
}

fn options(arguments: &Arguments, found: &Found, capacity: usize) -> CompareOptions {
    let has_meter = !found.meters.is_empty();
    let or = |asked: Option<Duration>, with_meter, without| {
        asked.unwrap_or(Duration::from_secs(if has_meter { with_meter } else { without }))
    };
    let room = capacity.saturating_sub(arguments.tokens + 1);
    let fitting = || DEPTHS.into_iter().filter(|&depth| depth <= room).collect();
    CompareOptions {
        prompt: arguments.prompt,
        reply: arguments.tokens,
        depths: arguments.depth.clone().unwrap_or_else(fitting),
        rounds: arguments.rounds,
        window: arguments.window,
        warm_up: or(arguments.warm_up, 10, 2),
        idle: or(arguments.idle, 10, 0),
    }
}

/// A row of the table: its name, and each device's value.
type Row = (&'static str, fn(&DeviceReport) -> Option<String>);

const ROWS: [Row; 13] = [
    ("ms to first token", |d| Some(spread(&d.first_token_ms))),
    ("prompt, tokens/s", |d| Some(spread(&d.prompt_tokens_per_second))),
    ("reply, tokens/s", |d| Some(spread(&d.tokens_per_second))),
    ("ms/token p50", |d| Some(number(d.token_ms.p50))),
    ("ms/token p95", |d| Some(number(d.token_ms.p95))),
    ("reply, J/token gross", |d| Some(spread(&d.energy.as_ref()?.reply.gross_joules_per_token))),
    ("reply, J/token net", |d| d.energy.as_ref()?.reply.net_joules_per_token.as_ref().map(spread)),
    ("reply, tokens/J", |d| Some(number(d.energy.as_ref()?.reply.tokens_per_joule))),
    ("prompt, J/token gross", |d| Some(spread(&d.energy.as_ref()?.prompt.gross_joules_per_token))),
    ("peak memory, MB", |d| Some(format!("{:.1}", d.memory.host_bytes? as f64 / 1e6))),
    ("device buffers, MB", |d| Some(format!("{:.1}", d.memory.device_bytes? as f64 / 1e6))),
    ("MB read per token", |d| {
        Some(number((d.weight_bytes_per_token? + d.cache_bytes_per_token?) / 1e6))
    }),
    ("of bandwidth", |d| {
        let share = d.read_gb_per_second? / d.bandwidth.as_ref()?.gb_per_second;
        Some(format!("{:.1} %", 100.0 * share))
    }),
];

fn number(value: f64) -> String {
    let digits = (2.0 - value.abs().max(1e-9).log10().floor()).clamp(0.0, 6.0) as usize;
    format!("{value:.digits$}")
}

fn spread(spread: &Spread) -> String {
    format!("{} ({}–{})", number(spread.median), number(spread.min), number(spread.max))
}

fn text(report: &Report) -> Result<String> {
    let mut text = String::new();
    let Report { model, machine, devices, .. } = report;
    writeln!(text, "{} on {}, {}", model.name, machine.cpu, machine.os)?;
    for device in devices {
        let DeviceReport { name, description, kernel, .. } = device;
        writeln!(text, "  {name:6} {description}, {kernel}")?;
    }
    writeln!(text)?;
    let names = devices.iter().map(|device| device.name.clone());
    let mut rows = vec![[String::new()].into_iter().chain(names).collect()];
    for (name, value) in ROWS {
        let values: Vec<_> = devices.iter().map(value).collect();
        if values.iter().any(Option::is_some) {
            let values = values.into_iter().map(|value| value.unwrap_or_else(|| "-".to_owned()));
            rows.push([name.to_owned()].into_iter().chain(values).collect());
        }
    }
    writeln!(text, "{}", aligned(&rows))?;
    for device in devices {
        if let Some(energy) = &device.energy {
            writeln!(text, "{}: energy of {}", device.name, energy.domain)?;
        }
    }
    for (names, problem) in html::energy_problems(devices) {
        writeln!(text, "{names}: {problem}")?;
    }
    match report.same_tokens {
        Some(true) => writeln!(text, "all devices wrote the same tokens")?,
        Some(false) => writeln!(text, "the devices did not write the same tokens")?,
        None => {}
    }
    for verdict in &report.verdicts {
        writeln!(text, "{verdict}")?;
    }
    for caution in &report.method.cautions {
        writeln!(text, "caution: {caution}")?;
    }
    Ok(text)
}
