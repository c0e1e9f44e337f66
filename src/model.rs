//! The transformer, written once over the `Backend` steps: prefill and decode.

use crate::backend::{self, Backend, Batch, Device, DeviceInfo, LoadOptions, OnProgress, Output};
use crate::backend::{Tap, Want};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::weights::WeightSource;

/// A model on a device, with one sequence in its KV cache.
pub struct Transformer {
    config: ModelConfig,
    backend: Box<dyn Backend>,
    position: usize,
}

/// Sees the result of every step: which step, which layer (0 for `embed`), and its values.
pub type OnTap<'a> = &'a mut dyn FnMut(Tap, usize, &[f32]);

impl Transformer {
    /// Loads a model's weights on a device.
    ///
    /// # Errors
    /// If the device is not there, or a tensor is missing or malformed.
    pub fn load(
        source: &dyn WeightSource,
        device: Device,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        let backend = backend::load(source, device, options, progress)?;
        Ok(Self::new(source.config().clone(), backend))
    }

    /// A transformer over a backend that has been loaded from a source of this configuration.
    pub fn new(config: ModelConfig, backend: Box<dyn Backend>) -> Self {
        Self { config, backend, position: 0 }
    }

    /// The model's dimensions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device it runs on.
    pub fn device(&self) -> &DeviceInfo {
        self.backend.device()
    }

    /// Positions there is room for.
    pub fn capacity(&self) -> usize {
        self.backend.capacity()
    }

    /// Tokens fed so far.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Forgets the sequence; the next token fed is at position 0.
    pub fn reset(&mut self) {
        self.position = 0;
    }

    /// Feeds tokens after the current position: a prompt in chunks, or one token of a decode.
    ///
    /// Returns what `want` asks for, of the last token (or of all, for [`Want::AllLogits`]). After
    /// an error the position is where it was.
    ///
    /// # Errors
    /// If the tokens do not fit the context or the vocabulary, the device fails, or the logits are
    /// NaN.
    pub fn feed(&mut self, tokens: &[u32], want: Want) -> Result<Output> {
        self.feed_chunks(tokens, want, &mut None)
    }

    /// [`Transformer::feed`] with every step's result shown to `tap`.
    ///
    /// # Errors
    /// As for [`Transformer::feed`].
    pub fn feed_tapped(&mut self, tokens: &[u32], want: Want, tap: OnTap<'_>) -> Result<Output> {
        self.feed_chunks(tokens, want, &mut Some(tap))
    }

    fn feed_chunks(
        &mut self,
        tokens: &[u32],
        want: Want,
        tap: &mut Option<OnTap<'_>>,
    ) -> Result<Output> {
        let (needed, capacity) = (self.position + tokens.len(), self.capacity());
        if needed > capacity {
            return Err(Error::ContextOverflow { needed, capacity });
        }
        let chunk_len = self.backend.max_batch();
        let chunks = tokens.len().div_ceil(chunk_len);
        let mut start = self.position;
        let mut all_logits = Vec::new();
        for (index, chunk) in tokens.chunks(chunk_len).enumerate() {
            let last = index + 1 == chunks;
            let want = if last || want == Want::AllLogits { want } else { Want::Nothing };
            let output = self.forward(Batch { tokens: chunk, start, want }, tap)?;
            start += chunk.len();
            match output {
                Output::Logits(logits) => all_logits.extend(logits),
                Output::Token(_) if last => {
                    self.position = start;
                    return Ok(output);
                }
                Output::Token(_) | Output::Nothing => {}
            }
        }
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        self.position = start;
        Ok(if want == Want::Nothing { Output::Nothing } else { Output::Logits(all_logits) })
    }

    /// One forward pass: embed, the five steps of every layer, head.
    fn forward(&mut self, batch: Batch<'_>, tap: &mut Option<OnTap<'_>>) -> Result<Output> {
        let backend = self.backend.as_mut();
        let mut show = |backend: &mut dyn Backend, step: Tap, layer: usize| match tap {
            Some(tap) => backend.read(step).map(|values| tap(step, layer, &values)),
            None => Ok(()),
        };
        backend.begin(batch)?;
        backend.embed()?;
        show(backend, Tap::Hidden, 0)?;
        for layer in 0..self.config.num_hidden_layers {
            backend.qkv(layer)?;
            show(backend, Tap::Query, layer)?;
            backend.attend(layer)?;
            show(backend, Tap::Attended, layer)?;
            backend.project_out(layer)?;
            show(backend, Tap::Hidden, layer)?;
            backend.gate_up(layer)?;
            show(backend, Tap::Gated, layer)?;
            backend.down(layer)?;
            show(backend, Tap::Hidden, layer)?;
        }
        if batch.want != Want::Nothing {
            backend.head()?;
        }
        if batch.want == Want::Token {
            backend.argmax()?;
        }
        backend.finish()
    }
}
