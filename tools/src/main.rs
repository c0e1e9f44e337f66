//! Developer programs of Sterna.

mod synth;

use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use sterna::config::ModelConfig;
use sterna::synthetic::{self, SyntheticModel};

#[derive(Parser)]
#[command(about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write a checkpoint of random weights, in the packed form and with the dimensions of a real one.
    Synth {
        /// Dimensions.
        #[arg(long, value_enum)]
        shape: Shape,
        /// Directory to write; it must not exist yet, or be empty.
        #[arg(long)]
        out: PathBuf,
        /// Seed of all weights.
        #[arg(long, default_value_t = 0)]
        seed: u64,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Shape {
    /// BitNet b1.58 2B4T: 1.18 GB.
    #[value(name = "bitnet-2b4t")]
    Bitnet2b4t,
    /// A BitNet of 3 layers and 120 features.
    TinyBitnet,
    /// A Llama of 3 layers and 120 features, head not tied.
    TinyLlama,
}

impl Shape {
    fn config(self) -> ModelConfig {
        match self {
            Self::Bitnet2b4t => synthetic::bitnet_2b4t(),
            Self::TinyBitnet => synthetic::tiny_bitnet(),
            Self::TinyLlama => synthetic::tiny_llama(),
        }
    }
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Synth { shape, out, seed } => {
            synth::write(&SyntheticModel::new(shape.config(), seed), &out)
        }
    }
}
