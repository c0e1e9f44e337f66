//! What is measured: a model's files, or random weights in a model's shapes.

use std::path::Path;

use anyhow::{Context, Result};
use sterna::Error;
use sterna::backend::gpu::{AdapterKind, adapters};
use sterna::backend::{Device, LoadOptions};
use sterna::generate::Model;
use sterna::measure::ModelReport;
use sterna::measure::bandwidth::Bandwidth;
use sterna::measure::machine::{check_memory, synthetic_bytes};
use sterna::random::Random;
use sterna::synthetic::{SyntheticModel, published};
use sterna::weights::{MemorySummary, WeightSource};

use super::{FileArguments, open, say};

/// What a model is asked to read where no text is given.
pub(super) const STORY: &str = "\
Once upon a time, there was a little girl who lived near a wide river. Every morning she walked to the \
bridge and looked at the boats. One day, an old man with a blue hat asked her for help. His small boat \
had a hole, and he was sad. \"Do not worry,\" said the girl. \"My mother has a hammer and some wood.\" \
They worked until the sun went down, and then the boat was as good as new. The man smiled and gave her \
a shell that he had found far away by the sea. From that day on, they were friends.";

/// Tokens of a random text, which is repeated where more are needed.
const RANDOM_TOKENS: usize = 4096;

/// A model that is measured, and what it reads.
pub(super) struct Subject {
    /// Its path, or the name of its shapes.
    pub(super) label: String,
    pub(super) weights: Box<dyn WeightSource>,
    pub(super) text: Vec<u32>,
    memory: MemorySummary,
    is_synthetic: bool,
}

impl Subject {
    /// Random weights in the shapes of `synthetic`, or else the model of that path, or the built-in one.
    pub(super) fn open(
        synthetic: Option<&str>,
        model: Option<&Path>,
        files: FileArguments,
    ) -> Result<Self> {
        if let Some(name) = synthetic {
            let config = published(name).context("a name from the list")?;
            return Ok(Self {
                label: name.to_owned(),
                text: random_text(config.vocab_size),
                memory: MemorySummary::synthetic(&config),
                weights: Box::new(SyntheticModel::new(config, 0)),
                is_synthetic: true,
            });
        }
        let checkpoint = open(model, files)?;
        let text = match Model::encode(&checkpoint, STORY) {
            Ok(tokens) if !tokens.is_empty() => tokens,
            problem => {
                let problem = problem.err().map(|error| format!(": {error}")).unwrap_or_default();
                say(&format!("the text is random tokens, as there is no tokenizer{problem}"));
                random_text(checkpoint.config().vocab_size)
            }
        };
        Ok(Self {
            label: checkpoint.files().label().to_owned(),
            text,
            memory: checkpoint.memory(),
            weights: Box::new(checkpoint),
            is_synthetic: false,
        })
    }

    /// The model, for reports.
    pub(super) fn report(&self) -> ModelReport {
        ModelReport::new(&self.label, self.weights.config(), self.memory, self.is_synthetic)
    }

    /// Fails if random weights would not fit the machine's memory on these devices together.
    pub(super) fn check_memory(
        &self,
        devices: &[Device],
        options: &LoadOptions,
        positions: usize,
    ) -> Result<()> {
        if !self.is_synthetic {
            return Ok(());
        }
        let needed = synthetic_bytes(self.weights.config(), options, positions)?;
        let on_host: u64 = devices.iter().map(|&device| needed * copies_on_host(device)).sum();
        // The tables are made there at least.
        let tables = self.memory.embedding + self.memory.lm_head;
        Ok(check_memory(&self.label, on_host.max(tables))?)
    }
}

/// How often a model's bytes are in the machine's memory when it is loaded on a device.
fn copies_on_host(device: Device) -> u64 {
    match device {
        // A byte a weight.
        Device::Reference => 4,
        Device::Gpu(index) => {
            let all = adapters();
            let adapter = index.map_or_else(|| all.first(), |index| all.get(index));
            u64::from(adapter.is_none_or(|adapter| adapter.kind != AdapterKind::Discrete))
        }
        Device::Auto | Device::Cpu => 1,
    }
}

fn random_text(vocab_size: usize) -> Vec<u32> {
    let mut random = Random::new(1);
    (0..RANDOM_TOKENS).map(|_| (random.bits() % vocab_size as u64) as u32).collect()
}

/// What the device's memory gives; what goes wrong is no reason not to measure the rest, unless the
/// device is not there.
pub(super) fn bandwidth(device: Device, options: &LoadOptions) -> Result<Option<Bandwidth>> {
    match Bandwidth::of(device, options) {
        Ok(bandwidth) => Ok(Some(bandwidth)),
        Err(error @ Error::NoAdapter { .. }) => Err(error.into()),
        Err(error) => {
            say(&format!("bandwidth not measured: {error}"));
            Ok(None)
        }
    }
}
