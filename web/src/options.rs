//! Options as JSON, checked.

use serde::Deserialize;
use sterna::{GenerateOptions, Message, Sampling};
use wasm_bindgen::JsValue;

use crate::error::with_code;

/// Of `generate`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(crate) struct Generate {
    pub(crate) max_tokens: usize,
    /// 0 is greedy.
    temperature: f32,
    top_k: Option<usize>,
    top_p: f32,
    min_p: f32,
    seed: u64,
    repetition_penalty: f32,
}

impl Default for Generate {
    fn default() -> Self {
        let max_tokens = GenerateOptions::default().max_tokens;
        Self {
            max_tokens,
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            seed: 0,
            repetition_penalty: 1.0,
        }
    }
}

impl Generate {
    /// As the library takes them.
    pub(crate) fn options(&self) -> GenerateOptions {
        let Self { temperature, top_k, top_p, min_p, seed, .. } = *self;
        let sampling = match temperature == 0.0 {
            true => Sampling::Greedy,
            false => Sampling::Random { temperature, top_k, top_p, min_p, seed },
        };
        GenerateOptions {
            max_tokens: self.max_tokens,
            sampling,
            repetition_penalty: self.repetition_penalty,
            ..GenerateOptions::default()
        }
    }
}

/// Of `load`.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "camelCase", default)]
pub(crate) struct Load {
    /// Most positions of a text.
    pub(crate) context: Option<usize>,
    /// Of the CPU.
    pub(crate) threads: Option<usize>,
    /// How the kernels of a GPU are chosen.
    pub(crate) tune: TuneChoice,
}

/// As `sterna run --tune` has it.
#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub(crate) enum TuneChoice {
    /// By speed.
    #[default]
    Auto,
    /// By what the adapter is.
    Off,
}

/// A text, a conversation, or tokens.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Prompt {
    /// Text to continue.
    Text(String),
    /// Messages to answer.
    Messages(Vec<Message>),
}

/// Parses JSON.
pub(crate) fn parse<'a, T: Deserialize<'a>>(what: &str, json: &'a str) -> Result<T, JsValue> {
    serde_json::from_str(json)
        .map_err(|error| with_code("InvalidOptions", &format!("{what}: {error}")))
}
