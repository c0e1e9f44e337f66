//! `sterna verify`: proof that this machine's devices compute what they should.

use std::fmt::Write;

use anyhow::{Result, bail};
use serde::Serialize;
use sterna::backend::{Device, LoadOptions, Output, Want};
use sterna::verify::{self, Verification};
use sterna::weights::{Checkpoint, WeightSource};
use sterna::{Model, Transformer};

use super::progress::Bar;
use super::{FileArguments, KvArguments, at_least_one, open, print, print_json};

/// Prove that the devices of this machine compute what they should
///
/// Runs every kernel and variant on fixed pseudo-random vectors and compares with the scalar
/// reference: integers must be equal, floats within a few roundings. Then each device continues a
/// short text greedily; the token ids must be equal. Ends with exit code 1 if anything differs.
///
/// The integer hash covers every integer result. It is the same on every machine and device.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    /// Directory of the model whose text is compared, or its name on the Hugging Face hub
    /// [default: built in]
    #[arg(short, long, value_name = "MODEL")]
    model: Option<std::path::PathBuf>,

    #[command(flatten)]
    files: FileArguments,

    /// What to check: auto, gpu, gpu:N, cpu or ref [default: every device there is]
    #[arg(long, value_name = "DEVICE")]
    device: Option<Device>,

    /// CPU threads [default: one per physical core]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,

    #[command(flatten)]
    kv: KvArguments,

    /// Most tokens of the text [default: the model's maximum, at most 32768]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    context: Option<usize>,

    /// Write one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  sterna verify                  every device
  sterna verify --device gpu:0   one adapter, all kernel variants
  sterna verify --json | jq .integer_hash";

/// Tokens that each device generates.
const TOKENS: usize = 24;

/// The reference is not asked to run models of more ternary weights than this.
const REFERENCE_WEIGHTS: u64 = 200_000_000;

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    passed: bool,
    /// Of the integer results of every kernel, the same everywhere.
    integer_hash: String,
    variants: Vec<Variant>,
    model: String,
    generations: Vec<GreedyText>,
}

#[derive(Serialize)]
struct Variant {
    device: String,
    description: String,
    variant: String,
    passed: bool,
    integer_hash: String,
    checks: Vec<KernelCheck>,
}

#[derive(Serialize)]
struct KernelCheck {
    kernel: &'static str,
    cases: usize,
    problem: Option<String>,
}

#[derive(Serialize)]
struct GreedyText {
    device: String,
    kernel: String,
    token_ids: Vec<u32>,
    /// Whether the tokens are those of the first device of the list.
    same_tokens: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = open(arguments.model.as_deref(), arguments.files)?;
    let devices = verify::devices(arguments.device)?;
    let mut variants = Vec::new();
    for &device in &devices {
        variants.extend(verify::verify(device)?.into_iter().map(Variant::from));
    }
    let options = LoadOptions {
        context: arguments.context,
        kv: arguments.kv.format(),
        threads: arguments.threads,
        ..LoadOptions::default()
    };
    let generations = generations(&checkpoint, judged_devices(&checkpoint, &devices), &options)?;
    let report = Report {
        passed: variants.iter().all(|variant| variant.passed)
            && generations.iter().all(|text| text.same_tokens),
        integer_hash: verify::integer_hash(),
        variants,
        model: checkpoint.files().label().to_owned(),
        generations,
    };
    if arguments.json {
        print_json(&report)?;
    } else {
        print(&table(&report)?)?;
    }
    if !report.passed {
        bail!("a device computes wrong results; do not trust its text");
    }
    Ok(())
}

impl From<Verification> for Variant {
    fn from(verification: Verification) -> Self {
        let passed = verification.passed();
        let Verification { device, description, variant, checks, integer_hash } = verification;
        let checks = checks.into_iter().map(|check| {
            let verify::Check { kernel, cases, problem } = check;
            KernelCheck { kernel, cases, problem }
        });
        let checks = checks.collect();
        Self { device, description, variant, passed, integer_hash, checks }
    }
}

/// The devices whose texts are compared: a judge first (the reference, or the CPU for a model that
/// is too large for it), then those that were asked for.
fn judged_devices(checkpoint: &Checkpoint, devices: &[Device]) -> Vec<Device> {
    let weights = checkpoint.memory().ternary * 4;
    let judge = if weights <= REFERENCE_WEIGHTS { Device::Reference } else { Device::Cpu };
    let others = devices.iter().copied().filter(|&device| {
        device != judge && (device != Device::Reference || weights <= REFERENCE_WEIGHTS)
    });
    [judge].into_iter().chain(others).collect()
}

fn generations(
    checkpoint: &Checkpoint,
    devices: Vec<Device>,
    options: &LoadOptions,
) -> Result<Vec<GreedyText>> {
    let vocab_size = checkpoint.config().vocab_size as u32;
    // A model without a tokenizer continues made-up tokens.
    let prompt = if checkpoint.files().file("tokenizer.json")?.is_some() {
        Model::encode(checkpoint, "Once upon a time")?
    } else {
        (1..9).map(|i| i * 7919 % vocab_size).collect()
    };
    let mut texts: Vec<GreedyText> = Vec::new();
    for device in devices {
        let mut bar = Bar::load();
        let mut model = Transformer::load(checkpoint, device, options, &mut |at| bar.layers(at))?;
        drop(bar);
        let token_ids = greedy(&mut model, &prompt)?;
        let device = model.device();
        texts.push(GreedyText {
            device: format!("{} ({})", device.name, device.description),
            kernel: device.gemv.clone(),
            same_tokens: texts.first().is_none_or(|first| first.token_ids == token_ids),
            token_ids,
        });
    }
    Ok(texts)
}

fn greedy(model: &mut Transformer, prompt: &[u32]) -> Result<Vec<u32>> {
    let mut token_ids = Vec::with_capacity(TOKENS);
    let mut next = prompt.to_vec();
    while token_ids.len() < TOKENS && model.position() + next.len() <= model.capacity() {
        let Output::Token(token) = model.feed(&next, Want::Token)? else { break };
        token_ids.push(token);
        next = vec![token];
    }
    Ok(token_ids)
}

fn table(report: &Report) -> Result<String> {
    let mut text = String::new();
    for variant in &report.variants {
        writeln!(text, "{}: {}, {}", variant.device, variant.description, variant.variant)?;
        for check in &variant.checks {
            let verdict = check.problem.as_deref().unwrap_or("ok");
            writeln!(text, "  {:22} {:3} cases  {verdict}", check.kernel, check.cases)?;
        }
        writeln!(text, "  {:22} {}", "integer hash", variant.integer_hash)?;
    }
    writeln!(text, "greedy text of {}, {TOKENS} tokens", report.model)?;
    for generation in &report.generations {
        let verdict = if generation.same_tokens { "same tokens" } else { "OTHER TOKENS" };
        writeln!(text, "  {}, {}: {verdict}", generation.device, generation.kernel)?;
    }
    writeln!(text, "integer hash {}", report.integer_hash)?;
    writeln!(text, "{}", if report.passed { "passed" } else { "FAILED" })?;
    Ok(text)
}
