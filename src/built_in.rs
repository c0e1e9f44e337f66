//! The model inside the program: a small teller of stories.

use crate::checkpoint::Checkpoint;
use crate::error::Result;

const LABEL: &str = "built-in model";

macro_rules! files {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_bytes!(concat!("../tests/golden/bitnet-a-packed/", $name)).as_slice())),*]
    };
}

static FILES: &[(&str, &[u8])] = files![
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The checkpoint of the built-in model.
///
/// # Errors
/// None, if the program was built from a sound `models/stories`.
pub fn checkpoint() -> Result<Checkpoint> {
    Checkpoint::embedded(LABEL, FILES)
}
