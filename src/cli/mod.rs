//! The commands of the program. Only this module and `main.rs` print.

mod bench;
mod charts;
mod compare;
mod convert;
mod devices;
mod dry_run;
mod html;
mod inspect;
mod logits;
mod progress;
mod pull;
mod run;
mod subject;
mod tune;
mod verify;
mod web;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use sterna::backend::{
    Device, DeviceInfo, HeadChoice, KeepPacked, LoadOptions, Packing, Sparse, Tune,
};
use sterna::kv_cache::KvFormat;
use sterna::{Checkpoint, I2sLayout, OpenOptions};

/// Runs ternary language models (BitNet b1.58 and relatives) on any GPU, and on the CPU.
#[derive(Parser)]
#[command(version, about, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  sterna run \"Once upon a time\"                    a story by the built-in model
  sterna run -m FILE.gguf --chat \"Why?\"           a question to a model of your own
  sterna pull ORG/NAME                             a model from the Hugging Face hub
  sterna devices                                   what it can run on
  sterna run --help                                more options, and what they mean";

#[derive(Subcommand)]
enum Command {
    Run(run::Arguments),
    Bench(bench::Arguments),
    Compare(compare::Arguments),
    Convert(convert::Arguments),
    Devices(devices::Arguments),
    Inspect(inspect::Arguments),
    Pull(pull::Arguments),
    Logits(logits::Arguments),
    Tune(tune::Arguments),
    Verify(verify::Arguments),
    Web(web::Arguments),
}

/// Runs the command.
pub(crate) fn run(arguments: Arguments) -> Result<()> {
    match arguments.command {
        Command::Run(arguments) => run::run(arguments),
        Command::Bench(arguments) => bench::run(&arguments),
        Command::Compare(arguments) => compare::run(&arguments),
        Command::Convert(arguments) => convert::run(&arguments),
        Command::Devices(arguments) => devices::run(&arguments),
        Command::Inspect(arguments) => inspect::run(&arguments),
        Command::Pull(arguments) => pull::run(&arguments),
        Command::Logits(arguments) => logits::run(&arguments),
        Command::Tune(arguments) => tune::run(&arguments),
        Command::Verify(arguments) => verify::run(&arguments),
        Command::Web(arguments) => web::run(&arguments),
    }
}

/// Options that do not go together.
#[derive(Debug)]
pub(crate) struct Usage(&'static str);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Usage {}

/// Which model, and where it runs.
#[derive(Args)]
struct ModelArguments {
    /// A GGUF file, a directory (config.json, model.safetensors, tokenizer.json), or a name on the
    /// Hugging Face hub, ORG/NAME or ORG/NAME:FILE.gguf [default: built in]
    ///
    /// A directory has the layout of Hugging Face or MLX; model.safetensors may be shards with an
    /// index. Any part opens a GGUF model of several parts. A name
    /// that is no path is looked up in the cache, and pulled if it is not there (see "sterna pull
    /// --help"). Without this option, the built-in teller of stories runs.
    #[arg(short, long, value_name = "MODEL")]
    model: Option<PathBuf>,

    #[command(flatten)]
    files: FileArguments,

    /// What to run on: auto, gpu, gpu:N, cpu or ref
    ///
    /// "gpu" is the best GPU, "gpu:N" the one that `sterna devices` lists as N,
    /// "cpu" the SIMD code, "ref" the slow scalar reference. "auto" takes a hardware GPU if there
    /// is one, else the CPU. If the device is not there, that is an error.
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Device,

    #[command(flatten)]
    load: LoadArguments,
}

/// How a model is loaded.
#[derive(Args)]
struct LoadArguments {
    /// CPU threads [default: one per physical core]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    threads: Option<usize>,

    /// Bind each CPU thread but the first to a processor of its own (Linux)
    ///
    /// Where threads are few and other programs run, the system moves them about; bound ones keep their
    /// caches, and wait for whoever else is bound there. --threads must not exceed the processors that
    /// the program may use.
    #[arg(long)]
    pin: bool,

    /// What linear layers multiply with, for models whose weights alone are quantised (Bonsai)
    ///
    /// "model" is what the model defines: f32. "int8" rounds activations to int8 in the groups that
    /// share a weight scale: faster, with slightly other logits. BitNet models have int8
    /// activations by definition and take no choice.
    #[arg(long, value_enum, value_name = "KIND", default_value = "model")]
    activations: ActivationChoice,

    /// What tokens are chosen by: int8 rows of the LM head, or the model's own
    ///
    /// "int8" reads half the bytes or less; for greedy tokens the CPU reads six bits of each code. They
    /// are still those of the model's own rows: every row that could be the best is computed from those,
    /// too. With --temp above 0, the draw follows the int8 logits.
    #[arg(long, value_enum, value_name = "KIND", default_value = "int8")]
    head: HeadKind,

    /// How the CPU holds ternary matrices: in 2 bits a weight, or five weights a byte
    ///
    /// "base3" (1.6 bits) reads a fifth less from memory, with the same results; decoding it takes
    /// AVX-512 VBMI to be no bottleneck. "auto" takes it with that, for two threads or more, where the
    /// matrices are more than a cache holds. Matrices with scales of groups (Bonsai) and other devices have no choice. What is in
    /// use is named with the kernels: gemv_i2 or gemv_base3.
    #[arg(long, value_enum, value_name = "KIND", default_value = "auto")]
    packing: PackingChoice,

    /// Keep the packed weights in a file for the next start on the CPU: off, on or check
    ///
    /// The file lies in STERNA_CACHE or the user's cache directory and is about as large as the weights in
    /// memory. While the model's files have the same lengths, times and first and last bytes of each
    /// tensor, the next start with the same --packing and --head maps it and computes nothing. "on" checks
    /// its header and length, "check" all of its contents. A file that is stale or damaged is made again,
    /// which is said. BitNet models only: matrices with scales of groups are not kept.
    #[arg(long, value_enum, value_name = "HOW", default_value = "off")]
    keep_packed: KeepPackedChoice,

    #[command(flatten)]
    kv: KvArguments,

    /// Whether a CPU leaves out weights whose inputs are 0, for models with relu² (BitNet)
    ///
    /// "auto" keeps down_proj a second time by columns and up_proj by rows, and reads only those whose
    /// input is not 0, or whose gate is open, wherever that is faster: the same text, sooner, for a third
    /// more memory or so. "sterna inspect --sparsity" says how much of a model is 0. Other models and
    /// devices take no notice.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "off")]
    sparse: SparseChoice,

    /// How a GPU's kernels are chosen
    ///
    /// "auto" takes the fastest that an earlier run on this adapter found, or looks for them now,
    /// which takes less than two seconds and is kept (see "sterna tune --help"). "off" goes by the
    /// adapter's vendor. Either way, a kernel that is not exact here does not run. Software
    /// rasterisers and other devices have nothing to tune.
    #[arg(long, value_enum, value_name = "HOW", default_value = "auto")]
    tune: TuneChoice,
}

/// `--sparse`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum SparseChoice {
    /// Where it is faster.
    Auto,
    /// Never.
    Off,
}

/// How the KV cache is held.
#[derive(Args, Clone, Copy)]
struct KvArguments {
    /// How keys and values are kept: f32, f16 or int8
    ///
    /// f16 takes half the memory of f32 and int8 a quarter (and one f32 scale a head and position), and
    /// the time per token of a long context goes with it. "auto" takes f32 where a whole context
    /// fits 64 MiB, f16 up to 2 GiB, int8 beyond.
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "auto")]
    kv: KvChoice,
}

/// `--kv`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum KvChoice {
    /// By the bytes of a whole context.
    Auto,
    /// As they are.
    F32,
    /// IEEE half.
    F16,
    /// With a scale for each head and position.
    Int8,
}

impl KvArguments {
    fn format(self) -> Option<KvFormat> {
        match self.kv {
            KvChoice::Auto => None,
            KvChoice::F32 => Some(KvFormat::F32),
            KvChoice::F16 => Some(KvFormat::F16),
            KvChoice::Int8 => Some(KvFormat::Int8),
        }
    }
}

/// `--head`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum HeadKind {
    /// int8 rows, and the model's own where they decide.
    Int8,
    /// The model's own rows.
    Exact,
}

/// `--packing`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum PackingChoice {
    /// By processor and model.
    Auto,
    /// Two bits a weight.
    #[value(name = "2bit")]
    TwoBits,
    /// Five weights a byte.
    Base3,
}

/// `--keep-packed`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum KeepPackedChoice {
    /// No file.
    Off,
    /// Mapped as it is.
    On,
    /// Mapped if its contents are right.
    Check,
}

/// `--tune`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum TuneChoice {
    /// By speed.
    Auto,
    /// By vendor.
    Off,
}

/// `--activations`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum ActivationChoice {
    /// As the model defines them.
    Model,
    /// int8 a group.
    Int8,
}

/// How a model's files are found and read.
#[derive(Args, Clone, Copy)]
struct FileArguments {
    #[command(flatten)]
    hub: pull::Offline,

    /// Layout of I2_S tensors in a GGUF file, which the file does not say
    ///
    /// "x86" is blocks of 128 weights, as in every published file; "arm64" blocks of 64, which
    /// bitnet.cpp's own quantiser has written on Arm since November 2025. The wrong one is wrong
    /// text.
    #[arg(long, value_enum, value_name = "LAYOUT", default_value = "x86")]
    i2s_layout: I2sLayoutChoice,
}

/// `--i2s-layout`.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum I2sLayoutChoice {
    /// Blocks of 128 weights.
    X86,
    /// Blocks of 64 weights.
    Arm64,
}

impl FileArguments {
    fn open_options(self) -> OpenOptions {
        OpenOptions {
            i2s_layout: match self.i2s_layout {
                I2sLayoutChoice::X86 => I2sLayout::Blocks128,
                I2sLayoutChoice::Arm64 => I2sLayout::Arm64,
            },
        }
    }
}

/// An option's value of 1 or more.
fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

impl ModelArguments {
    fn checkpoint(&self) -> Result<Checkpoint> {
        open(self.model.as_deref(), self.files)
    }

    fn load_options(&self, context: Option<usize>) -> LoadOptions {
        self.load.options(context)
    }
}

impl LoadArguments {
    fn options(&self, context: Option<usize>) -> LoadOptions {
        let int8_activations = self.activations == ActivationChoice::Int8;
        let head = match self.head {
            HeadKind::Int8 => HeadChoice::Int8,
            HeadKind::Exact => HeadChoice::Exact,
        };
        let tune = match self.tune {
            TuneChoice::Auto => Tune::Auto,
            TuneChoice::Off => Tune::Off,
        };
        let packing = match self.packing {
            PackingChoice::Auto => Packing::Auto,
            PackingChoice::TwoBits => Packing::TwoBits,
            PackingChoice::Base3 => Packing::Base3,
        };
        let (threads, kv) = (self.threads, self.kv.format());
        let max_batch = LoadOptions::default().max_batch;
        let keep_packed = match self.keep_packed {
            KeepPackedChoice::Off => KeepPacked::Off,
            KeepPackedChoice::On => KeepPacked::On,
            KeepPackedChoice::Check => KeepPacked::Check,
        };
        let sparse = match self.sparse {
            SparseChoice::Auto => Sparse::Auto,
            SparseChoice::Off => Sparse::Off,
        };
        LoadOptions {
            context,
            kv,
            max_batch,
            threads,
            pin: self.pin,
            int8_activations,
            head,
            packing,
            keep_packed,
            tune,
            sparse,
            ..LoadOptions::default()
        }
    }
}

fn open(model: Option<&Path>, files: FileArguments) -> Result<Checkpoint> {
    Ok(match model {
        Some(model) => {
            Checkpoint::open_with(&pull::resolve_model(model, files.hub)?, files.open_options())?
        }
        None => sterna::built_in::checkpoint()?,
    })
}

/// Says on standard error what happened while a model was loaded.
fn say_notes(device: &DeviceInfo) {
    device.notes.iter().for_each(|note| say(note));
}

/// Says something about the model on standard error; a closed one is no failure.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Prints text on standard output, at once.
fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let result = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    result.context("writing standard output")
}

/// Prints a value as one line of JSON on standard output.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let json = serde_json::to_string(value).context("writing JSON")?;
    print(&(json + "\n"))
}

/// Becomes true when Ctrl-C is pressed; a second press ends the program at once.
fn interrupt_flag() -> Result<Arc<AtomicBool>> {
    const INTERRUPTED: i32 = 130;
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    let handler = move || {
        if set.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED);
        }
    };
    ctrlc::set_handler(handler).context("listening for Ctrl-C")?;
    Ok(flag)
}
