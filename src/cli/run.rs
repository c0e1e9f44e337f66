//! `sterna run`: a prompt in, text out.

use std::hash::{BuildHasher, Hasher};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;
use sterna::backend::HeadWork;
use sterna::generate::{GenerateOptions, Generation, Model, Overflow};
use sterna::sampler::Sampling;
use sterna::session::snapshot::format_name;
use sterna::speculate::{Speculate, SpeculationWork};
use sterna::tokenizer::{Message, Role};

use super::progress::Bar;
use super::{ModelArguments, at_least_one, interrupt_flag, print, print_json, say, say_notes};

/// Continue a text, or answer a question
///
/// Writes the prompt and its continuation to standard output as it is made, and one line about
/// device and speed to standard error. With --chat, the prompt is a question in the form of the
/// model's chat template, and only the answer is written.
///
/// The text ends where the model ends it, after -n tokens, when the context is full, or on Ctrl-C.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The text to continue; "-" reads it from standard input
    ///
    /// A newline at the end of standard input is dropped.
    prompt: String,

    #[command(flatten)]
    model: ModelArguments,

    /// Most tokens to generate
    #[arg(short = 'n', long = "tokens", value_name = "TOKENS", default_value_t = 512)]
    max_tokens: usize,

    /// Temperature: 0 always takes the most probable token, more is more varied
    ///
    /// The logits are divided by it: below 1, the text is more careful than the model's
    /// probabilities say; above 1, more adventurous.
    #[arg(long = "temp", value_name = "T", default_value_t = 0.7, allow_negative_numbers = true)]
    temperature: f32,

    /// Choose among the K most probable tokens [default: all]
    #[arg(long, value_name = "K", value_parser = at_least_one)]
    top_k: Option<usize>,

    /// Choose among the fewest tokens that together have probability P
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,

    /// Choose among tokens at least P times as probable as the most probable one
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    min_p: f32,

    /// Above 1: tokens that have occurred become less probable
    #[arg(
        long = "repeat-penalty",
        value_name = "R",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    repetition_penalty: f32,

    /// Where the random numbers start; the same seed gives the same text [default: random]
    #[arg(long)]
    seed: Option<u64>,

    /// Guess tokens from where the same ones stood before, and check several in one pass
    ///
    /// "prompt" looks in the prompt and in the text so far. The text is the same, but for rounding on
    /// some GPUs; it comes faster where it repeats itself or the prompt, as code, lists and quotations do.
    #[arg(long, value_name = "HOW", value_enum, default_value_t = SpeculateArgument::Off)]
    speculate: SpeculateArgument,

    /// Most tokens of prompt and text together [default: the model's maximum, at most 32768]
    ///
    /// Memory is taken 64 tokens at a time as they come, so a short text takes no more for a large
    /// context.
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    context: Option<usize>,

    /// What happens when the context is full: stop, or shift
    ///
    /// "stop" ends the text. "shift" forgets the middle: the first 64 tokens stay and the newest, half a
    /// context in all; they run again, and the text goes on. A prompt that is longer than the context
    /// is an error either way.
    #[arg(long, value_enum, value_name = "HOW", default_value = "stop")]
    on_overflow: OverflowChoice,

    /// Continue the text in FILE: the prompt is appended to it
    ///
    /// The file is one that --save-session has written, with the same model (on any device) and --kv.
    #[arg(long, value_name = "FILE", conflicts_with = "chat")]
    load_session: Option<PathBuf>,

    /// Write the text, with what the model has computed of it, to FILE at the end
    #[arg(long, value_name = "FILE")]
    save_session: Option<PathBuf>,

    /// Put the prompt into the model's chat template
    #[arg(long)]
    chat: bool,

    /// Instructions for the whole chat
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,

    /// Write one JSON object at the end instead of text
    ///
    /// It has text (without the prompt), token_ids (with the stop token, if there is one),
    /// prompt_token_ids, model, device, finish_reason (stop, length, context or interrupted), seed
    /// timings, the KV cache (kv: format, bytes, context), for an int8 head how many rows a greedy token
    /// needed of the model's own (head_candidates: mean and most), and with --speculate how it went
    /// (speculation: tokens proposed and accepted, forward passes, and tokens_per_pass).
    #[arg(long)]
    json: bool,
}

/// `--speculate`.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum SpeculateArgument {
    /// One token a pass
    Off,
    /// Prompt lookup
    Prompt,
}

impl From<SpeculateArgument> for Speculate {
    fn from(argument: SpeculateArgument) -> Self {
        match argument {
            SpeculateArgument::Off => Self::Off,
            SpeculateArgument::Prompt => Self::Prompt,
        }
    }
}

/// `--on-overflow`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum OverflowChoice {
    /// The text ends.
    Stop,
    /// The middle of the text is forgotten.
    Shift,
}

const EXAMPLES: &str = "\
Examples:
  sterna run \"Once upon a time\"
  sterna run --temp 0 -n 50 \"The little dog\"         always the same text
  sterna run --seed 7 --top-p 0.9 \"The little dog\"   the same text for the same seed
  cat story.txt | sterna run -                       continue a file
  sterna run --speculate prompt \"One, two, one, two\"   the same text in fewer passes
  sterna run \"Once\" --save-session s.kv; sterna run --load-session s.kv \" Then\"
  sterna run -m DIR --chat --system \"Be brief.\" \"Why is the sky blue?\"
  sterna run --json \"Once\" | jq .text";

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    text: &'a str,
    token_ids: &'a [u32],
    prompt_token_ids: &'a [u32],
    model: &'a str,
    device: &'a str,
    device_description: &'a str,
    kernel: &'a str,
    finish_reason: &'a str,
    seed: Option<u64>,
    timings: ReportTimings,
    kv: ReportKv,
    #[serde(skip_serializing_if = "Option::is_none")]
    head_candidates: Option<ReportCandidates>,
    #[serde(skip_serializing_if = "Option::is_none")]
    speculation: Option<ReportSpeculation>,
}

#[derive(Serialize)]
struct ReportSpeculation {
    proposed: u64,
    accepted: u64,
    passes: u64,
    tokens_per_pass: Option<f64>,
}

impl From<SpeculationWork> for ReportSpeculation {
    fn from(work: SpeculationWork) -> Self {
        let SpeculationWork { proposed, accepted, passes } = work;
        Self { proposed, accepted, passes, tokens_per_pass: work.tokens_per_pass() }
    }
}

#[derive(Serialize)]
struct ReportKv {
    format: &'static str,
    /// Allocated at the end of the text.
    bytes: u64,
    /// Most tokens.
    context: usize,
}

#[derive(Serialize)]
struct ReportCandidates {
    mean: f64,
    most: u64,
}

impl ReportCandidates {
    fn of(work: HeadWork) -> Option<Self> {
        let HeadWork { tokens, candidates, most } = work;
        (tokens > 0).then(|| Self { mean: candidates as f64 / tokens as f64, most })
    }
}

#[derive(Serialize)]
struct ReportTimings {
    load_seconds: f64,
    time_to_first_token_seconds: f64,
    cached_prompt_tokens: usize,
    decode_seconds: f64,
    prompt_tokens_per_second: Option<f64>,
    decode_tokens_per_second: Option<f64>,
}

pub(super) fn run(arguments: Arguments) -> Result<()> {
    let options = options(&arguments);
    // Before the load, which may take long.
    options.validate()?;
    let prompt = match arguments.prompt.as_str() {
        "-" => read_prompt()?,
        prompt => prompt.to_owned(),
    };

    let checkpoint = arguments.model.checkpoint()?;
    let load_options = arguments.model.load_options(arguments.context);
    let mut bar = Bar::load();
    let device = arguments.model.device;
    let mut model =
        Model::from_checkpoint(&checkpoint, device, &load_options, &mut |at| bar.layers(at))?;
    let load_time = bar.elapsed();
    drop(bar);
    for note in Model::notes(&checkpoint)? {
        say(&note);
    }
    say_notes(model.transformer().device());

    let (label, device) = (model.label().to_owned(), model.transformer().device().clone());
    let interrupted = interrupt_flag()?;
    if let Some(path) = &arguments.load_session {
        model.load_session(path)?;
    }
    let mut generation = if arguments.chat {
        let system = arguments.system.map(|text| Message::new(Role::System, text));
        let messages: Vec<_> =
            system.into_iter().chain([Message::new(Role::User, &prompt)]).collect();
        model.generate_chat(&messages, &options)?
    } else if arguments.load_session.is_some() {
        model.append(&prompt, &options)?
    } else {
        model.generate(&prompt, &options)?
    };

    let echo = if arguments.chat { "" } else { &prompt };
    let text = match read_prompt_tokens(&mut generation, &interrupted)? {
        true => make_text(&mut generation, (!arguments.json).then_some(echo), &interrupted)?,
        false => String::new(),
    };
    let finish_reason = generation.finish_reason().map_or("interrupted", |reason| reason.name());
    let seed = match options.sampling {
        Sampling::Greedy => None,
        Sampling::Random { seed, .. } => Some(seed),
    };
    let made = Made {
        timings: report_timings(&generation, load_time),
        speed: speed(&generation),
        token_ids: generation.tokens().to_vec(),
        prompt_token_ids: generation.prompt().to_vec(),
        candidates: generation.head_work().and_then(ReportCandidates::of),
        speculation: generation.speculation().map(ReportSpeculation::from),
        guesses: generation.speculation().map(guesses).unwrap_or_default(),
    };
    if let Some(path) = &arguments.save_session {
        model.save_session(path)?;
    }
    let transformer = model.transformer();
    let kv = ReportKv {
        format: format_name(transformer.kv_format()),
        bytes: transformer.kv_bytes(),
        context: transformer.capacity(),
    };
    if arguments.json {
        return print_json(&Report {
            text: &text,
            token_ids: &made.token_ids,
            prompt_token_ids: &made.prompt_token_ids,
            model: &label,
            device: &device.name,
            device_description: &device.description,
            kernel: &device.gemv,
            finish_reason,
            seed,
            timings: made.timings,
            kv,
            head_candidates: made.candidates,
            speculation: made.speculation,
        });
    }
    let seed = seed.map(|seed| format!("; seed {seed}")).unwrap_or_default();
    let device = format!("{} ({}), {}", device.name, device.description, device.gemv);
    let candidates = made
        .candidates
        .map(|ReportCandidates { mean, .. }| format!("; {mean:.1} rows a token re-ranked exactly"))
        .unwrap_or_default();
    let guesses = made.guesses;
    let ReportKv { format, bytes, .. } = kv;
    let kv = format!("; KV cache {format}, {:.1} MB", bytes as f64 / 1e6);
    let status =
        format!("{device}: {}{candidates}{guesses}{kv}; {finish_reason}{seed}", made.speed);
    // The text is out: a closed standard error is no failure.
    let _ = writeln!(io::stderr(), "{status}");
    Ok(())
}

/// What remains of a text when the model is needed again.
struct Made {
    timings: ReportTimings,
    speed: String,
    token_ids: Vec<u32>,
    prompt_token_ids: Vec<u32>,
    candidates: Option<ReportCandidates>,
    speculation: Option<ReportSpeculation>,
    guesses: String,
}

/// Runs the prompt under a bar; false if Ctrl-C has ended it.
fn read_prompt_tokens(generation: &mut Generation<'_>, interrupted: &AtomicBool) -> Result<bool> {
    let mut bar = Bar::prompt();
    let result = generation.prefill(&mut |done, total| {
        bar.update(done as u64, total as u64);
        match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    });
    match result {
        Err(sterna::Error::Cancelled) => Ok(false),
        result => Ok(result.map(|()| true)?),
    }
}

fn options(arguments: &Arguments) -> GenerateOptions {
    let sampling = if arguments.temperature == 0.0 {
        Sampling::Greedy
    } else {
        Sampling::Random {
            temperature: arguments.temperature,
            top_k: arguments.top_k,
            top_p: arguments.top_p,
            min_p: arguments.min_p,
            seed: arguments.seed.unwrap_or_else(random_seed),
        }
    };
    let repetition_penalty = arguments.repetition_penalty;
    let overflow = match arguments.on_overflow {
        OverflowChoice::Stop => Overflow::Stop,
        OverflowChoice::Shift => Overflow::Shift,
    };
    let (max_tokens, speculate) = (arguments.max_tokens, arguments.speculate.into());
    GenerateOptions { max_tokens, sampling, repetition_penalty, overflow, speculate }
}

/// A seed that is short to type again; the standard library seeds its hash maps at random.
fn random_seed() -> u64 {
    std::collections::hash_map::RandomState::new().build_hasher().finish() % 1_000_000_000
}

/// All of standard input, without a newline at its end.
fn read_prompt() -> Result<String> {
    /// More than any context holds.
    const MAX_BYTES: u64 = 64 << 20;
    let mut prompt = String::new();
    let stdin = io::stdin().lock().take(MAX_BYTES + 1);
    let len = { stdin }.read_to_string(&mut prompt).context("reading standard input")?;
    if len as u64 > MAX_BYTES {
        bail!("standard input: the prompt is longer than {MAX_BYTES} bytes");
    }
    let line = prompt.strip_suffix('\n').unwrap_or(&prompt);
    Ok(line.strip_suffix('\r').unwrap_or(line).to_owned())
}

/// Generates until the end or Ctrl-C; with `echo`, prints that, then each piece, then a newline.
fn make_text(
    generation: &mut Generation<'_>,
    echo: Option<&str>,
    interrupted: &AtomicBool,
) -> Result<String> {
    let Some(echo) = echo else { return collect(generation, |_| Ok(()), interrupted) };
    print(echo)?;
    let text = collect(generation, print, interrupted);
    // After a failure, too: its message gets a line of its own.
    if !text.as_ref().is_ok_and(|text| text.ends_with('\n')) {
        print("\n")?;
    }
    text
}

fn collect(
    generation: &mut Generation<'_>,
    mut each: impl FnMut(&str) -> Result<()>,
    interrupted: &AtomicBool,
) -> Result<String> {
    let mut text = String::new();
    for piece in generation {
        let piece = piece?;
        each(&piece.text)?;
        text.push_str(&piece.text);
        if interrupted.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(text)
}

fn speed(generation: &Generation<'_>) -> String {
    let timings = generation.timings();
    let rate = |rate: Option<f64>| rate.map(|rate| format!(" ({rate:.1} tokens/s)"));
    format!(
        "prompt {} tokens{}; generated {} tokens{}",
        timings.prompt_tokens,
        rate(timings.prompt_rate()).unwrap_or_default(),
        timings.generated_tokens,
        rate(timings.decode_rate()).unwrap_or_default()
    )
}

fn guesses(work: SpeculationWork) -> String {
    let SpeculationWork { proposed, accepted, .. } = work;
    let rate = match proposed {
        0 => String::new(),
        _ => format!(" ({:.0} %)", 100.0 * accepted as f64 / proposed as f64),
    };
    let tokens = work.tokens_per_pass().map(|tokens| format!(", {tokens:.2} tokens a pass"));
    format!("; guessed {proposed} tokens, {accepted} right{rate}{}", tokens.unwrap_or_default())
}

fn report_timings(generation: &Generation<'_>, load_time: Duration) -> ReportTimings {
    let timings = generation.timings();
    ReportTimings {
        load_seconds: load_time.as_secs_f64(),
        time_to_first_token_seconds: timings.time_to_first_token.as_secs_f64(),
        cached_prompt_tokens: timings.cached_tokens,
        decode_seconds: timings.decode_time.as_secs_f64(),
        prompt_tokens_per_second: timings.prompt_rate(),
        decode_tokens_per_second: timings.decode_rate(),
    }
}
