//! A loaded model.

use std::ops::ControlFlow;

use js_sys::{Function, Promise};
use serde::Serialize;
use sterna::backend::{self, Progress, Tune, gpu};
use sterna::format::ModelFiles;
use sterna::generate::Generation;
use sterna::weights::WeightSource;
use sterna::{Checkpoint, Device, Error, LoadOptions, Model, verify};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;

use crate::error::to_js;
use crate::files::Files;
use crate::options::{Generate, Load, Prompt, TuneChoice, parse};

/// A model on a device.
#[wasm_bindgen]
pub struct Engine {
    model: Model,
    info: Info,
}

/// What there is to know of a loaded model.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Info {
    model: String,
    architecture: String,
    device: String,
    description: String,
    kernels: String,
    head: String,
    notes: Vec<String>,
    context: usize,
    has_chat: bool,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
}

/// What came of a text.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Summary {
    /// `stop`, `length`, `context`, or `abort`.
    finish_reason: &'static str,
    prompt_tokens: usize,
    cached_tokens: usize,
    generated_tokens: usize,
    time_to_first_token_ms: f64,
    decode_ms: f64,
    prompt_tokens_per_second: Option<f64>,
    tokens_per_second: Option<f64>,
}

#[wasm_bindgen]
impl Engine {
    /// Loads a model: `device` is `auto`, `gpu`, `cpu` or `ref`, `options` is JSON, and
    /// `on_progress(done, total)` hears of layers. The files are read here and not after.
    ///
    /// # Errors
    /// As `Model::from_checkpoint`, with the variant's name as the `code`.
    pub async fn load(
        label: String,
        files: Files,
        device: String,
        options: String,
        on_progress: Function,
    ) -> Result<Engine, JsValue> {
        let Load { context, threads, tune } = parse("load options", &options)?;
        let device: Device = device.parse().map_err(to_js)?;
        let files = ModelFiles::from_readers(&label, files.files).map_err(to_js)?;
        let checkpoint = Checkpoint::new(files).map_err(to_js)?;
        let tune = match tune {
            TuneChoice::Auto => Tune::Auto,
            TuneChoice::Off => Tune::Off,
        };
        // Nothing drafts here.
        let options =
            LoadOptions { context, threads, tune, max_logit_rows: 1, ..LoadOptions::default() };
        let mut progress = |Progress { done, total }| {
            // Who listens may fail: that is no reason to stop.
            let _ = on_progress.call2(&JsValue::NULL, &done.into(), &total.into());
        };
        let model = Model::from_checkpoint_async(&checkpoint, device, &options, &mut progress);
        let model = model.await.map_err(to_js)?;
        let info = Info::of(&checkpoint, &model).map_err(to_js)?;
        Ok(Engine { model, info })
    }

    /// What there is to know of the model and its device, as JSON.
    pub fn info(&self) -> String {
        json(&self.info)
    }

    /// Resolves if the device is well.
    ///
    /// # Errors
    /// As for `Model::ready`, with the variant's name as the `code`.
    pub async fn check(&mut self) -> Result<(), JsValue> {
        self.model.ready().await.map_err(to_js)
    }

    /// Continues a prompt: JSON `{"text": …}` or `{"messages": […]}`. `on_piece(token, text)` is called
    /// for each token, `on_piece(done, total)` with numbers alone while the prompt runs; where it
    /// returns `true`, or a promise of that, the text ends.
    ///
    /// Returns the summary as JSON.
    ///
    /// # Errors
    /// As `Model::generate`, with the variant's name as the `code`.
    pub async fn generate(
        &mut self,
        prompt: String,
        options: String,
        on_piece: Function,
        on_prompt: Function,
    ) -> Result<String, JsValue> {
        let prompt: Prompt = parse("prompt", &prompt)?;
        let options = parse::<Generate>("options", &options)?.options();
        let generation = match &prompt {
            Prompt::Text(text) => self.model.generate(text, &options),
            Prompt::Messages(messages) => self.model.generate_chat(messages, &options),
        };
        let mut generation = generation.map_err(to_js)?;
        let mut progress = |done: usize, total: usize| {
            let stop = on_prompt.call2(&JsValue::NULL, &done.into(), &total.into());
            match stop {
                Ok(stop) if !stop.is_truthy() => ControlFlow::Continue(()),
                _ => ControlFlow::Break(()),
            }
        };
        match generation.prefill_async(&mut progress).await {
            Ok(()) => {}
            Err(Error::Cancelled) => return Ok(json(&Summary::of(&generation, true))),
            Err(error) => return Err(to_js(error)),
        }
        let mut is_stopped = false;
        while !is_stopped && let Some(piece) = generation.next_async().await {
            let piece = piece.map_err(to_js)?;
            let stop = on_piece.call2(&JsValue::NULL, &piece.token.into(), &piece.text.into())?;
            is_stopped = awaited(stop).await?.is_truthy();
        }
        Ok(json(&Summary::of(&generation, is_stopped)))
    }
}

/// The device that a name stands for in this browser: for `auto` that is `gpu:` with a number, or `cpu`.
///
/// # Errors
/// If the name is not one of a device, with the variant's name as the `code`.
#[wasm_bindgen]
pub async fn resolve(device: String) -> Result<String, JsValue> {
    let resolved = match device.parse().map_err(to_js)? {
        Device::Auto => backend::resolve_auto_async().await,
        _ => return Ok(device),
    };
    Ok(match resolved {
        Device::Gpu(Some(index)) => format!("gpu:{index}"),
        _ => "cpu".to_owned(),
    })
}

/// Checks every kernel of a device against the reference: JSON, as `sterna verify --json` has it for its
/// variants.
///
/// # Errors
/// As `sterna::verify`, with the variant's name as the `code`.
#[wasm_bindgen]
pub async fn verify(device: String) -> Result<String, JsValue> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Report {
        passed: bool,
        integer_hash: String,
        variants: Vec<Variant>,
    }
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Variant {
        device: String,
        description: String,
        variant: String,
        passed: bool,
        integer_hash: String,
        checks: Vec<Check>,
    }
    #[derive(Serialize)]
    struct Check {
        kernel: &'static str,
        cases: usize,
        problem: Option<String>,
    }
    let device: Device = device.parse().map_err(to_js)?;
    let variants = verify::verify_async(device).await.map_err(to_js)?.into_iter().map(|found| {
        let passed = found.passed();
        let checks = found.checks.into_iter().map(|check| Check {
            kernel: check.kernel,
            cases: check.cases,
            problem: check.problem,
        });
        Variant {
            device: found.device,
            description: found.description,
            variant: found.variant,
            passed,
            integer_hash: found.integer_hash,
            checks: checks.collect(),
        }
    });
    let variants: Vec<Variant> = variants.collect();
    let passed = variants.iter().all(|variant| variant.passed);
    Ok(json(&Report { passed, integer_hash: verify::integer_hash(), variants }))
}

/// Hands over what [`measured`] returned in another session: any text, which is used if it is of this
/// adapter and these kernels.
#[wasm_bindgen]
pub fn remember(measured: String) {
    gpu::tune::remember(measured);
}

/// What is known of the GPU's kernels, as text to be kept for other sessions.
#[wasm_bindgen]
pub fn measured() -> Option<String> {
    gpu::tune::remembered()
}

/// The value, or what it promises.
async fn awaited(value: JsValue) -> Result<JsValue, JsValue> {
    match value.dyn_into::<Promise>() {
        Ok(promise) => JsFuture::from(promise).await,
        Err(value) => Ok(value),
    }
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("strings and numbers")
}

impl Info {
    fn of(checkpoint: &Checkpoint, model: &Model) -> Result<Self, Error> {
        let (config, transformer) = (checkpoint.config(), model.transformer());
        let device = transformer.device();
        let notes = Model::notes(checkpoint)?.into_iter().chain(device.notes.iter().cloned());
        Ok(Self {
            model: model.label().to_owned(),
            architecture: format!("{:?}", config.architecture),
            device: device.name.clone(),
            description: device.description.clone(),
            kernels: device.gemv.clone(),
            head: device.head.clone(),
            notes: notes.collect(),
            context: transformer.capacity(),
            has_chat: model.has_chat(),
            layers: config.num_hidden_layers,
            hidden_size: config.hidden_size,
            vocab_size: config.vocab_size,
        })
    }
}

impl Summary {
    fn of(generation: &Generation<'_>, is_stopped: bool) -> Self {
        let timings = generation.timings();
        let milliseconds = |time: std::time::Duration| time.as_secs_f64() * 1e3;
        Self {
            finish_reason: match generation.finish_reason() {
                Some(reason) => reason.name(),
                None if is_stopped => "abort",
                None => "length",
            },
            prompt_tokens: timings.prompt_tokens,
            cached_tokens: timings.cached_tokens,
            generated_tokens: timings.generated_tokens,
            time_to_first_token_ms: milliseconds(timings.time_to_first_token),
            decode_ms: milliseconds(timings.decode_time),
            prompt_tokens_per_second: timings.prompt_rate(),
            tokens_per_second: timings.decode_rate(),
        }
    }
}
