//! The transformer, written once over the `Backend` steps: prefill and decode.

use crate::backend::{self, Backend, Batch, Device, DeviceInfo, HeadWork, LoadOptions};
use crate::backend::{MAX_DRAFT, OnProgress, Output, Tap, Tokens, Want};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::kv_cache::SequenceId;
use crate::sampler::Sampler;
use crate::weights::WeightSource;

/// A model on a device, with one sequence in its KV cache.
pub struct Transformer {
    config: ModelConfig,
    backend: Box<dyn Backend>,
    /// The sequence that is fed.
    sequence: SequenceId,
    /// Tokens fed, of those whose successor was asked for.
    position: usize,
    /// Tokens in the KV cache: chosen ones may be fed before they are asked for.
    fed: usize,
    /// Tokens that the backend has chosen and that were not taken.
    untaken: usize,
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
    pub fn new(config: ModelConfig, mut backend: Box<dyn Backend>) -> Self {
        let sequence = backend.sequences().open();
        Self { config, backend, sequence, position: 0, fed: 0, untaken: 0 }
    }

    /// The model's dimensions.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device it runs on.
    pub fn device(&self) -> &DeviceInfo {
        self.backend.device()
    }

    /// How the int8 head has worked since the model was loaded; `None` if there is none.
    pub fn head_work(&self) -> Option<HeadWork> {
        self.backend.head_work()
    }

    /// Positions there is room for.
    pub fn capacity(&self) -> usize {
        self.backend.capacity()
    }

    /// Tokens fed so far; a chosen token counts when the one after it has been taken.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Forgets the sequence; the next token fed is at position 0.
    pub fn reset(&mut self) {
        self.position = 0;
        self.forget();
    }

    /// How tokens are chosen from now on; greedily at first. Those that were chosen and not taken are forgotten.
    ///
    /// # Errors
    /// If the device fails.
    pub fn choose_with(&mut self, sampler: Sampler) -> Result<()> {
        self.forget();
        self.backend.choose_with(sampler)
    }

    /// What was fed ahead of the caller is not part of the sequence.
    fn forget(&mut self) {
        (self.fed, self.untaken) = (self.position, 0);
    }

    /// Feeds a prompt, after which [`Transformer::next_token`] hands out tokens.
    ///
    /// # Errors
    /// As for [`Transformer::feed`].
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<()> {
        self.feed_chunks(tokens, Want::Token, &mut None)?;
        self.untaken = 1;
        Ok(())
    }

    /// The next token of a text. The device may be given tokens to feed and choose before they are
    /// asked for, at most `limit` in all, this one included, and no more than the context holds.
    ///
    /// # Errors
    /// If the device fails, the logits are NaN, or the context is full.
    pub fn next_token(&mut self, limit: usize) -> Result<u32> {
        let wanted = self.backend.lead().min(limit).max(1);
        while self.untaken < wanted && (self.untaken == 0 || self.fed < self.capacity()) {
            let batch = Batch {
                sequence: self.sequence,
                tokens: Tokens::Chosen,
                start: self.fed,
                want: Want::Token,
            };
            self.forward(batch, &mut None)?;
            self.fed += 1;
            self.untaken += 1;
        }
        let token = self.backend.take().inspect_err(|_| self.forget())?;
        self.untaken -= 1;
        self.position = self.fed - self.untaken;
        Ok(token)
    }

    /// The longest draft that [`Transformer::check_draft`] takes here; 0 also where the next token has
    /// not been taken.
    pub fn draft_limit(&self) -> usize {
        let room = self.capacity() - self.position;
        let tokens = room.min(self.backend.max_batch()).min(MAX_DRAFT + 1);
        if self.untaken == 0 { tokens.saturating_sub(1) } else { 0 }
    }

    /// Checks what may come after `last`, the token that was taken and not yet fed, in one forward pass.
    /// Returns the tokens that [`Transformer::next_token`] would have: those of the draft as long as
    /// they are right, then the one that comes instead, or after them. A token that `ends` the text is
    /// the last one.
    ///
    /// # Errors
    /// If the draft is longer than [`Transformer::draft_limit`], a token is outside the vocabulary,
    /// the device fails, or logits are NaN; then what had been checked is not part of the sequence.
    pub fn check_draft(
        &mut self,
        last: u32,
        draft: &[u32],
        ends: impl Fn(u32) -> bool,
    ) -> Result<Vec<u32>> {
        let (found, max) = (draft.len(), self.draft_limit());
        if found > max {
            return Err(Error::Dimension { name: "tokens of a draft", found, max });
        }
        let tokens = [&[last], draft].concat();
        self.forget();
        let batch = Batch {
            sequence: self.sequence,
            tokens: Tokens::Given(&tokens),
            start: self.position,
            want: Want::Tokens,
        };
        self.forward(batch, &mut None)?;
        let mut found = Vec::with_capacity(tokens.len());
        let mut drafted = draft.iter();
        loop {
            let token = self.backend.take()?;
            found.push(token);
            if drafted.next() != Some(&token) || ends(token) {
                break;
            }
        }
        self.backend.keep(found.len())?;
        self.position += found.len();
        self.forget();
        Ok(found)
    }

    /// Feeds tokens after the current position: a prompt in chunks, or one token of a decode.
    ///
    /// Returns what `want` asks for, of the last token (or of all, for [`Want::AllLogits`]). After an
    /// error the position is where it was.
    ///
    /// # Errors
    /// If the tokens do not fit the context or the vocabulary, the device fails, or the logits are
    /// NaN.
    pub fn feed(&mut self, tokens: &[u32], want: Want) -> Result<Output> {
        self.feed_and_take(tokens, want, &mut None)
    }

    /// [`Transformer::feed`] with every step's result shown to `tap`.
    ///
    /// # Errors
    /// As for [`Transformer::feed`].
    pub fn feed_tapped(&mut self, tokens: &[u32], want: Want, tap: OnTap<'_>) -> Result<Output> {
        self.feed_and_take(tokens, want, &mut Some(tap))
    }

    fn feed_and_take(
        &mut self,
        tokens: &[u32],
        want: Want,
        tap: &mut Option<OnTap<'_>>,
    ) -> Result<Output> {
        let before = self.position;
        let output = self.feed_chunks(tokens, want, tap)?;
        if want != Want::Token {
            return Ok(output);
        }
        self.untaken = 1;
        self.next_token(1).map(Output::Token).inspect_err(|_| {
            self.position = before;
            self.forget();
        })
    }

    fn feed_chunks(
        &mut self,
        tokens: &[u32],
        want: Want,
        tap: &mut Option<OnTap<'_>>,
    ) -> Result<Output> {
        self.forget();
        let (needed, capacity) = (self.fed + tokens.len(), self.capacity());
        if needed > capacity {
            return Err(Error::ContextOverflow { needed, capacity });
        }
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let (sequence, mut start, mut rest) = (self.sequence, self.fed, tokens);
        let mut all_logits = Vec::new();
        while !rest.is_empty() {
            let most = match want {
                Want::AllLogits => self.backend.chunk().min(self.backend.max_logit_rows()),
                Want::Tokens => self.backend.max_logit_rows(),
                Want::Nothing | Want::Token | Want::LastLogits => self.backend.chunk(),
            };
            let (chunk, after) = rest.split_at(most.min(rest.len()));
            let last = after.is_empty();
            let want = if last || want == Want::AllLogits { want } else { Want::Nothing };
            let tokens = Tokens::Given(chunk);
            if let Output::Logits(logits) =
                self.forward(Batch { sequence, tokens, start, want }, tap)?
            {
                all_logits.extend(logits);
            }
            start += chunk.len();
            rest = after;
        }
        (self.position, self.fed) = (start, start);
        Ok(match want {
            Want::Nothing | Want::Token | Want::Tokens => Output::Nothing,
            Want::LastLogits | Want::AllLogits => Output::Logits(all_logits),
        })
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
        if matches!(batch.want, Want::Token | Want::Tokens) {
            backend.choose()?;
        }
        backend.finish()
    }
}
