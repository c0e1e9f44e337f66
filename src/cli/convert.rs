//! `sterna convert`: a model in another format.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::ValueEnum;
use serde::Serialize;
use sterna::convert::{Comparison, Summary, Target, compare, convert};
use sterna::format::ggml::GgmlType;
use sterna::weights::{Alphabet, WeightScale, WeightSource};
use sterna::{Checkpoint, Model};

use super::progress::Bar;
use super::{FileArguments, open, print, print_json, say};

/// Convert a model to packed safetensors or to GGUF
///
/// Weights are carried over exactly. Types with a scale for each block (all but i2_s) store it as
/// an IEEE half: where that rounds, the command says how much. What a type cannot hold is refused
/// before anything is written, and a file appears only when it is complete.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Arguments {
    /// GGUF file or directory of the model, or its name on the Hugging Face hub
    #[arg(value_name = "IN")]
    model: PathBuf,

    /// File (.gguf) or directory to write
    #[arg(value_name = "OUT")]
    out: PathBuf,

    /// What to convert to [default: for a .gguf file i2_s, or q1_0 or q2_0 for a model with scales
    /// of groups; else hf]
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<Format>,

    /// Replace OUT if it is there
    #[arg(long)]
    force: bool,

    /// Read OUT back and compare every weight
    #[arg(long)]
    verify: bool,

    #[command(flatten)]
    files: FileArguments,

    /// Write one JSON object
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  sterna convert DIR model.gguf --verify        I2_S, for bitnet.cpp and Sterna
  sterna convert DIR model.gguf --to tq2_0      for llama.cpp
  sterna convert DIR PACKED                     bf16 master weights to packed ones";

/// `--to`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Directory in the packed form of Hugging Face, 2 bits a weight
    Hf,
    /// GGUF, 2 bits a weight, one scale a matrix (bitnet.cpp)
    #[value(name = "i2_s")]
    I2S,
    /// GGUF, 2.06 bits, a scale for every 256 inputs (llama.cpp)
    #[value(name = "tq2_0")]
    Tq2_0,
    /// GGUF, 1.69 bits, a scale for every 256 inputs (llama.cpp)
    #[value(name = "tq1_0")]
    Tq1_0,
    /// GGUF, 2.25 bits, a scale for every 64 inputs (llama.cpp)
    #[value(name = "q2_0")]
    Q2_0,
    /// GGUF, binary, 1.13 bits, a scale for every 128 inputs (llama.cpp)
    #[value(name = "q1_0")]
    Q1_0,
}

impl Format {
    fn target(self) -> Target {
        match self {
            Self::Hf => Target::HuggingFace,
            Self::I2S => Target::Gguf(GgmlType::I2S),
            Self::Tq2_0 => Target::Gguf(GgmlType::Tq2_0),
            Self::Tq1_0 => Target::Gguf(GgmlType::Tq1_0),
            Self::Q2_0 => Target::Gguf(GgmlType::Q2_0),
            Self::Q1_0 => Target::Gguf(GgmlType::Q1_0),
        }
    }

    /// The one that suits a model and the name of the output.
    fn default_for(checkpoint: &Checkpoint, out: &Path) -> Result<Self> {
        if !out.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
            return Ok(Self::Hf);
        }
        let layer = checkpoint.layer(0)?;
        Ok(match (layer.q_proj.scale(), layer.q_proj.alphabet()) {
            (WeightScale::Tensor(_), _) => Self::I2S,
            (WeightScale::Groups { .. }, Alphabet::Binary) => Self::Q1_0,
            (WeightScale::Groups { .. }, Alphabet::Ternary) => Self::Q2_0,
        })
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    path: &'a Path,
    format: String,
    bytes: u64,
    lossless: bool,
    rounded_scales: usize,
    largest_rounding: f32,
    verified_weights: Option<u64>,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = open(Some(&arguments.model), arguments.files)?;
    let out = &arguments.out;
    let format = match arguments.to {
        Some(format) => format,
        None => Format::default_for(&checkpoint, out)?,
    };
    for note in Model::notes(&checkpoint)? {
        say(&note);
    }
    let mut bar = Bar::write();
    let summary =
        convert(&checkpoint, format.target(), out, arguments.force, &mut |done, total| {
            bar.update(done, total);
        })?;
    drop(bar);
    let comparison = match arguments.verify {
        true => Some(verify(&checkpoint, out)?),
        false => None,
    };
    let name = format.to_possible_value().map_or_else(String::new, |v| v.get_name().to_owned());
    if arguments.json {
        return print_json(&Report {
            path: out,
            format: name,
            bytes: summary.bytes,
            lossless: summary.rounded_scales == 0,
            rounded_scales: summary.rounded_scales,
            largest_rounding: summary.largest_rounding,
            verified_weights: comparison.map(|comparison| comparison.trits + comparison.floats),
        });
    }
    print(&text(out, &name, &summary, comparison.as_ref()))
}

fn verify(checkpoint: &Checkpoint, out: &Path) -> Result<Comparison> {
    let mut bar = Bar::compare();
    let written = Checkpoint::open(out)?;
    let comparison = compare(checkpoint, &written, &mut |done, total| {
        bar.update(done as u64, total as u64);
    })?;
    Ok(comparison)
}

fn text(out: &Path, format: &str, summary: &Summary, comparison: Option<&Comparison>) -> String {
    let loss = match summary.rounded_scales {
        0 => "lossless".to_owned(),
        count => format!(
            "{count} scales rounded to IEEE half, by {:.1e} at most; weights exact",
            summary.largest_rounding
        ),
    };
    let verified = comparison.map_or(String::new(), |comparison| {
        format!(
            "read back: {} ternary weights and {} floats are equal\n",
            comparison.trits, comparison.floats
        )
    });
    format!("{}: {format}, {} bytes, {loss}\n{verified}", out.display(), summary.bytes)
}
