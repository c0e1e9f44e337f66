//! Developer programs of Sterna.

mod spirv;
mod wgsl;

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use sterna::convert::{write_gguf, write_hf};
use sterna::format::ggml::GgmlType;
use sterna::synthetic::{self, SyntheticModel};
use sterna::weights::WeightSource;

#[derive(Parser)]
#[command(about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write a model of random weights with the dimensions of a published one.
    Synth {
        /// Dimensions.
        #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(synthetic::NAMES))]
        shape: String,
        /// File or, for hf, directory to write; it must not exist yet.
        #[arg(long)]
        out: PathBuf,
        /// Format.
        #[arg(long, value_enum, default_value_t = Format::Hf)]
        format: Format,
        /// Seed of all weights.
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
    /// Write the kernels as SPIR-V, as wgpu gives them to a Vulkan driver: KERNEL.spv, entry main,
    /// with the constants of BitNet 2B4T where it has the kernel.
    Spirv {
        /// Directory to write to.
        #[arg(long)]
        out: PathBuf,
    },
    /// Write the kernels as WGSL, as a browser gets them: KERNEL.wgsl, and pipelines.json with the
    /// constants and bindings of every pipeline of published models.
    Wgsl {
        /// Directory to write to.
        #[arg(long)]
        out: PathBuf,
    },
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Format {
    /// The packed form of Hugging Face.
    Hf,
    /// GGUF, I2_S.
    I2S,
    /// GGUF, TQ2_0.
    Tq2,
    /// GGUF, binary Q1_0.
    Q1,
    /// GGUF, PQ2_0.
    Pq2,
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Synth { shape, out, format, seed } => {
            let config = synthetic::published(&shape).context("a shape from the list")?;
            write(&SyntheticModel::new(config, seed), format, &out)
        }
        Command::Spirv { out } => spirv::write(&out),
        Command::Wgsl { out } => wgsl::write(&out),
    }
}

/// Writes the model under another name, which becomes `out` when it is complete.
fn write(model: &SyntheticModel, format: Format, out: &Path) -> anyhow::Result<()> {
    if out.exists() {
        bail!("{}: it is there already", out.display());
    }
    let mut name = out.file_name().context("--out has no name")?.to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    let partial = Partial(out.with_file_name(name));
    let style = "{bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
    let bar = ProgressBar::no_length().with_style(ProgressStyle::with_template(style)?);
    let mut progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let ty = match format {
        Format::Hf => {
            fs::create_dir_all(&partial.0).with_context(|| partial.0.display().to_string())?;
            write_hf(model, &partial.0, &mut progress)?;
            let bos = model.config().vocab_size.saturating_sub(256);
            let generation = json!({"bos_token_id": bos, "eos_token_id": bos + 1});
            fs::write(partial.0.join("generation_config.json"), format!("{generation:#}\n"))?;
            None
        }
        Format::I2S => Some(GgmlType::I2S),
        Format::Tq2 => Some(GgmlType::Tq2_0),
        Format::Q1 => Some(GgmlType::Q1_0),
        Format::Pq2 => Some(GgmlType::Pq2_0),
    };
    if let Some(ty) = ty {
        let file = File::create_new(&partial.0).with_context(|| partial.0.display().to_string())?;
        let file = BufWriter::with_capacity(1 << 20, file);
        write_gguf(model, "synthetic", None, ty, (&partial.0, file), &mut progress)?;
    }
    bar.finish();
    fs::rename(&partial.0, out).with_context(|| out.display().to_string())
}

/// A file or directory that goes away unless it is renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename there is nothing here; on the way out of an error nothing else can be
        // done.
        let _ = fs::remove_dir_all(&self.0).or_else(|_| fs::remove_file(&self.0));
    }
}
