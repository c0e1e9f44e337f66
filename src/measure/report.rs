//! What a comparison found: a document that other machines' can be put beside.
//!
//! `docs/report.schema.json` describes it for programs.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::bandwidth::Bandwidth;
use super::machine::Machine;
use super::{Latencies, Spread};
use crate::error::{Error, Result};

/// The version of the document.
pub const FORMAT: u32 = 1;
/// A longer file is no report.
pub const MAX_REPORT_BYTES: u64 = 64 << 20;
/// A report of more is none that was measured.
const MAX_DEVICES: usize = 64;
const MAX_METERS: usize = 256;
const MAX_WINDOWS: usize = 4096;
/// Of one meter: five hours of ten a second.
const MAX_POINTS: usize = 180_000;
/// Nothing that is measured is larger, in any unit.
const MAX_NUMBER: f64 = 1e18;

/// What a comparison of devices found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// [`FORMAT`].
    pub format: u32,
    /// Name and version of the program.
    pub program: String,
    /// When it was made, in UTC.
    pub made: String,
    /// The machine.
    pub machine: Machine,
    /// The model.
    pub model: ModelReport,
    /// How it was measured.
    pub method: Method,
    /// The energy meters that were there.
    pub meters: Vec<MeterReport>,
    /// What was looked for in vain.
    pub no_meters: Option<String>,
    /// What was measured on each device.
    pub devices: Vec<DeviceReport>,
    /// Whether all of them wrote the same tokens; `None` for one device.
    pub same_tokens: Option<bool>,
    /// What each window of time was spent on, in their order.
    pub windows: Vec<WindowReport>,
    /// What each meter showed in them.
    pub power: Vec<PowerTrace>,
    /// What that means, in words.
    pub verdicts: Vec<String>,
}

/// A model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelReport {
    /// Its path, or the name of its shapes.
    pub name: String,
    /// Whether its weights are random.
    pub is_synthetic: bool,
    /// Layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Tokens that it knows.
    pub vocab_size: usize,
    /// Bytes of packed matrices.
    pub ternary_bytes: u64,
    /// Bytes of the embedding table.
    pub embedding_bytes: u64,
    /// Bytes of the LM head; 0 if it is the embedding table.
    pub lm_head_bytes: u64,
    /// Bytes of norms.
    pub norms_bytes: u64,
}

/// How a comparison was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Method {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of a reply.
    pub reply_tokens: usize,
    /// Windows of each kind on each device.
    pub rounds: usize,
    /// The least length of a window.
    pub window_seconds: f64,
    /// The least time that a device works before anything counts.
    pub warm_up_seconds: f64,
    /// The length of each baseline, before and after.
    pub idle_seconds: f64,
    /// CPU threads.
    pub threads: usize,
    /// In words.
    pub steps: Vec<String>,
    /// What makes the numbers less certain.
    pub cautions: Vec<String>,
}

/// An energy meter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeterReport {
    /// The source's own name for it.
    pub name: String,
    /// What it measures.
    pub domain: String,
    /// That in words.
    pub covers: String,
    /// Whose numbers they are.
    pub source: String,
    /// How they become joules.
    pub method: String,
    /// A shorter window says little.
    pub min_window_seconds: f64,
}

/// What was measured on a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceReport {
    /// As `--device` takes it.
    pub name: String,
    /// Adapter and driver, or instruction set and threads.
    pub description: String,
    /// The kernels of matrices.
    pub kernel: String,
    /// The kernel of the LM head.
    pub head: String,
    /// How the KV cache is held.
    pub kv: String,
    /// What there is to say about the load.
    pub notes: Vec<String>,
    /// Of the load.
    pub load_seconds: f64,
    /// The most at once.
    pub memory: MemoryReport,
    /// What its memory gives; `None` where it was not measured.
    pub bandwidth: Option<Bandwidth>,
    /// From the prompt to the first token, of each window its median.
    pub first_token_ms: Spread,
    /// Of the prompt, of each window its median.
    pub prompt_tokens_per_second: Spread,
    /// Of replies, of each window its median.
    pub tokens_per_second: Spread,
    /// From token to token, in all windows.
    pub token_ms: Latencies,
    /// Bytes of weights that a token of a reply reads.
    pub weight_bytes_per_token: Option<f64>,
    /// Bytes of the KV cache that it reads.
    pub cache_bytes_per_token: Option<f64>,
    /// Both at the median speed, in 10⁹ bytes a second.
    pub read_gb_per_second: Option<f64>,
    /// Of replies: processor time of this program by time; `None` where the system does not say.
    pub processors_busy: Option<f64>,
    /// Speed of replies against what is in the KV cache.
    pub depths: Vec<DepthReport>,
    /// `None` where no meter covers the device.
    pub energy: Option<EnergyReport>,
    /// Why there is no energy, or less than there could be.
    pub energy_problem: Option<String>,
    /// The greedy reply to the prompt.
    pub token_ids: Vec<u32>,
}

/// The most memory at once, while a device loaded the model and ran it for the first time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryReport {
    /// Of this program; `None` where the system does not say.
    pub host_bytes: Option<u64>,
    /// Of the device's own buffers; `None` where there are none, or they are not counted.
    pub device_bytes: Option<u64>,
}

/// The speed at a depth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DepthReport {
    /// Tokens in the KV cache.
    pub depth: usize,
    /// Of each run.
    pub tokens_per_second: Spread,
}

/// The energy of a device's windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnergyReport {
    /// The meters whose sum it is, as indices; no two overlap.
    pub meters: Vec<usize>,
    /// What they measure.
    pub domain: String,
    /// Idle power before.
    pub idle_watts_before: Option<f64>,
    /// Idle power after.
    pub idle_watts_after: Option<f64>,
    /// Of prompts.
    pub prompt: PhaseEnergy,
    /// Of replies.
    pub reply: PhaseEnergy,
}

/// The energy of prompts, or of replies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PhaseEnergy {
    /// All joules of a window by its tokens.
    pub gross_joules_per_token: Spread,
    /// Those less what an idle machine would have used; `None` without a baseline.
    pub net_joules_per_token: Option<Spread>,
    /// 1 by the median of the gross ones.
    pub tokens_per_joule: f64,
    /// Mean power of each window.
    pub watts: Spread,
    /// Median gross joules a token of each meter, in the order of [`EnergyReport::meters`].
    pub joules_per_token_by_meter: Vec<f64>,
}

/// What a window was spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PhaseKind {
    /// Nothing.
    Idle,
    /// Prompts.
    Prompt,
    /// Replies.
    Reply,
}

/// A window of time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowReport {
    /// Index of the device; `None` for an idle one.
    pub device: Option<usize>,
    /// What for.
    pub phase: PhaseKind,
    /// Since the first window began.
    pub start_seconds: f64,
    /// Its length.
    pub seconds: f64,
    /// Fed in prompts, or handed out in replies.
    pub tokens: usize,
    /// The median speed of its runs; `None` for an idle one.
    pub tokens_per_second: Option<f64>,
    /// Of each meter; `None` where it failed.
    pub joules: Vec<Option<f64>>,
    /// What failed or is less certain.
    pub problems: Vec<String>,
}

/// What a meter showed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerTrace {
    /// Index of the meter.
    pub meter: usize,
    /// Seconds since the first window began, and mean watts since the reading before.
    pub points: Vec<[f64; 2]>,
}

impl Report {
    /// Reads a report that may come from anywhere.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Report`] with the first key that is not what it should be.
    pub fn read(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let file = path.display().to_string();
        let mut text = Vec::new();
        let opened = fs::File::open(path).map_err(io)?;
        opened.take(MAX_REPORT_BYTES + 1).read_to_end(&mut text).map_err(io)?;
        if text.len() as u64 > MAX_REPORT_BYTES {
            let found = format!("more than {MAX_REPORT_BYTES} bytes");
            return Err(problem(&file, "the file", "a report of sterna compare", found));
        }
        Self::from_json(&file, &text)
    }

    /// The report in a JSON text; `file` is named in errors.
    ///
    /// # Errors
    /// [`Error::Report`].
    pub fn from_json(file: &str, text: &[u8]) -> Result<Self> {
        /// What every version has.
        #[derive(Deserialize)]
        struct Versioned {
            format: u32,
        }
        let versioned: Versioned = parse(file, text)?;
        if versioned.format != FORMAT {
            let found = versioned.format.to_string();
            return Err(problem(file, "format", &FORMAT.to_string(), found));
        }
        let report: Self = parse(file, text)?;
        report.check(file)?;
        Ok(report)
    }

    /// Indices and numbers that types do not bound.
    fn check(&self, file: &str) -> Result<()> {
        let below = |key: String, index: usize, count: usize| match index < count {
            true => Ok(()),
            false => Err(problem(file, &key, &format!("less than {count}"), index.to_string())),
        };
        if self.devices.is_empty() {
            return Err(problem(file, "devices", "one or more", "none".to_owned()));
        }
        let points = self.power.iter().map(|trace| trace.points.len()).max().unwrap_or_default();
        for (key, found, max) in [
            ("devices", self.devices.len(), MAX_DEVICES),
            ("meters", self.meters.len(), MAX_METERS),
            ("windows", self.windows.len(), MAX_WINDOWS),
            ("power", self.power.len(), MAX_METERS),
            ("power.points", points, MAX_POINTS),
        ] {
            if found > max {
                return Err(problem(file, key, &format!("at most {max}"), found.to_string()));
            }
        }
        check_numbers(file, &mut String::new(), &serde_json::json!(self))?;
        for (at, window) in self.windows.iter().enumerate() {
            if let Some(device) = window.device {
                below(format!("windows[{at}].device"), device, self.devices.len())?;
            }
            let (found, expected) = (window.joules.len(), self.meters.len());
            if found != expected {
                let key = format!("windows[{at}].joules");
                return Err(problem(file, &key, &format!("{expected} values"), found.to_string()));
            }
        }
        for (at, trace) in self.power.iter().enumerate() {
            below(format!("power[{at}].meter"), trace.meter, self.meters.len())?;
        }
        for (at, device) in self.devices.iter().enumerate() {
            let key = |rest: &str| format!("devices[{at}].{rest}");
            for &meter in device.energy.iter().flat_map(|energy| &energy.meters) {
                below(key("energy.meters"), meter, self.meters.len())?;
            }
            let (found, expected) = (device.token_ms.quantiles.len(), Latencies::STEPS + 1);
            if found != expected {
                let expected = format!("{expected} values");
                return Err(problem(
                    file,
                    &key("token_ms.quantiles"),
                    &expected,
                    found.to_string(),
                ));
            }
            for (name, spread) in device.spreads() {
                let all = [spread.min, spread.median, spread.max];
                // Speeds and times of what has happened.
                if !(all[0] > 0.0 && all[0] <= all[1] && all[1] <= all[2]) {
                    let expected = "0 < min ≤ median ≤ max";
                    return Err(problem(file, &key(name), expected, format!("{all:?}")));
                }
            }
        }
        Ok(())
    }
}

impl DeviceReport {
    /// Those that are never 0 or less.
    fn spreads(&self) -> impl Iterator<Item = (&'static str, &Spread)> {
        let fixed = [
            ("first_token_ms", &self.first_token_ms),
            ("prompt_tokens_per_second", &self.prompt_tokens_per_second),
            ("tokens_per_second", &self.tokens_per_second),
        ];
        let depths = self.depths.iter().map(|depth| ("depths", &depth.tokens_per_second));
        fixed.into_iter().chain(depths)
    }
}

/// Fails at the first number that is larger than any that is measured.
fn check_numbers(file: &str, key: &mut String, value: &Value) -> Result<()> {
    let len = key.len();
    match value {
        Value::Number(number) if number.as_f64().is_none_or(|n| n.abs() > MAX_NUMBER) => {
            return Err(problem(file, key, &format!("at most {MAX_NUMBER:e}"), number.to_string()));
        }
        Value::Array(values) => {
            for (at, value) in values.iter().enumerate() {
                *key += &format!("[{at}]");
                check_numbers(file, key, value)?;
                key.truncate(len);
            }
        }
        Value::Object(values) => {
            for (name, value) in values {
                *key += if len == 0 { "" } else { "." };
                *key += name;
                check_numbers(file, key, value)?;
                key.truncate(len);
            }
        }
        _ => {}
    }
    Ok(())
}

fn problem(file: &str, key: &str, expected: &str, found: String) -> Error {
    let (file, key) = (file.to_owned(), key.to_owned());
    Error::Report { file, key, expected: expected.to_owned(), found }
}

/// Parses JSON; serde's messages end with what was expected, and where.
fn parse<'a, T: Deserialize<'a>>(file: &str, text: &'a [u8]) -> Result<T> {
    let mut json = serde_json::Deserializer::from_slice(text);
    let parsed = serde_path_to_error::deserialize(&mut json)
        .map_err(|error| (error.path().to_string(), error.into_inner()))
        .and_then(|value| match json.end() {
            Ok(()) => Ok(value),
            Err(error) => Err((String::new(), error)),
        });
    parsed.map_err(|(key, error)| {
        let key = if key.is_empty() || key == "." { "the file".to_owned() } else { key };
        let message = error.to_string();
        let (found, expected) = match message.split_once(", expected ") {
            Some((found, expected)) => (found.to_owned(), expected.to_owned()),
            None => (message, "a report of sterna compare".to_owned()),
        };
        problem(file, &key, &expected, found)
    })
}
