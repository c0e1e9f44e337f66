//! The transformer, written once over the `Backend` steps: prefill and decode.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use crate::backend::{self, Backend, Batch, Device, DeviceInfo, HeadWork, LoadOptions};
use crate::backend::{
    MAX_DRAFT, OnProgress, Output, PartTime, Profiling, Tap, Tokens, Traffic, Want,
};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::kv_cache::{KvFormat, KvShape};
use crate::sampler::Sampler;
use crate::session::{Identity, Owner, Session, snapshot};
use crate::wait::block_on;
use crate::weights::WeightSource;

/// A model on a device, with the sessions in its KV cache, one of which is current.
pub struct Transformer {
    config: ModelConfig,
    backend: Box<dyn Backend>,
    /// The session that is fed.
    session: Session,
    /// Tokens of it in the KV cache: chosen ones may be fed before they are asked for.
    fed: usize,
    /// Tokens that the backend has chosen and that were not taken.
    untaken: usize,
    /// Tokens that a checked draft has made, fed but for the last, and that were not taken.
    checked: VecDeque<u32>,
    /// Whether the session's last token is the last one that the backend chose and handed out.
    is_chosen: bool,
    /// Times of the steps, while they are measured.
    steps: Option<Vec<PartTime>>,
}

/// Sees the result of every step: which step, which layer (0 for `embed`), and its values.
pub type OnTap<'a> = &'a mut dyn FnMut(Tap, usize, &[f32]);

/// Sees how far a prompt is: tokens done, and tokens in all; says whether to go on.
pub type OnPrompt<'a> = &'a mut dyn FnMut(usize, usize) -> ControlFlow<()>;

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
        block_on(Self::load_async(source, device, options, progress))
    }

    /// [`Transformer::load`] where nothing may block.
    ///
    /// # Errors
    /// As for [`Transformer::load`].
    pub async fn load_async(
        source: &dyn WeightSource,
        device: Device,
        options: &LoadOptions,
        progress: OnProgress<'_>,
    ) -> Result<Self> {
        let backend = backend::load_async(source, device, options, progress).await?;
        Ok(Self::new(source.config().clone(), backend))
    }

    /// A transformer over a backend that has been loaded from a source of this configuration.
    pub fn new(config: ModelConfig, mut backend: Box<dyn Backend>) -> Self {
        let session = Session::new(Owner::next(), backend.sequences().open());
        let checked = VecDeque::with_capacity(MAX_DRAFT + 1);
        let (untaken, is_chosen, steps) = (0, false, None);
        Self { config, backend, session, fed: 0, untaken, checked, is_chosen, steps }
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

    /// How the KV cache holds keys and values.
    pub fn kv_format(&self) -> KvFormat {
        self.backend.kv_format()
    }

    /// Bytes that the KV cache has allocated, for all sessions.
    pub fn kv_bytes(&self) -> u64 {
        self.backend.kv_bytes()
    }

    /// What passes have read since the model was loaded; `None` where nobody counts.
    pub fn traffic(&self) -> Option<Traffic> {
        self.backend.traffic()
    }

    /// Bytes on a device of its own; `None` where there is none, or where it is not known.
    pub fn device_bytes(&self) -> Option<u64> {
        self.backend.device_bytes()
    }

    /// Times kernels or steps from now on, as the device can; see [`Backend::start_profile`].
    pub fn start_profile(&mut self) -> Profiling {
        let profiling = self.backend.start_profile();
        self.steps = (profiling == Profiling::Steps).then(Vec::new);
        profiling
    }

    /// The times since [`Transformer::start_profile`], in the order of a pass.
    ///
    /// # Errors
    /// If the device fails.
    pub fn end_profile(&mut self) -> Result<Vec<PartTime>> {
        match self.steps.take() {
            Some(steps) => Ok(steps),
            None => self.backend.end_profile(),
        }
    }

    /// Tokens of the current session in the KV cache; a chosen token counts when the one after it has
    /// been taken.
    pub fn position(&self) -> usize {
        self.session.position
    }

    /// The session that is fed.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Forgets the current session's tokens; the next token fed is at position 0.
    pub fn reset(&mut self) {
        self.truncate(0);
    }

    /// Forgets the current session's tokens but the first `positions`.
    pub fn truncate(&mut self, positions: usize) {
        self.session.truncate(positions);
        self.forget();
    }

    /// An empty session beside the current one. Whoever no longer needs a session hands it to
    /// [`Transformer::close`]; the blocks of one that is dropped stay in use.
    pub fn open(&mut self) -> Session {
        Session::new(self.session.owner, self.backend.sequences().open())
    }

    /// A session with the first `positions` of the current one, which share their memory until one of
    /// the two goes on from the middle of a block.
    ///
    /// # Errors
    /// [`Error::ContextOverflow`] if the current session is shorter.
    pub fn fork(&mut self, positions: usize) -> Result<Session> {
        let capacity = self.session.position;
        if positions > capacity {
            return Err(Error::ContextOverflow { needed: positions, capacity });
        }
        let sequence = self.backend.sequences().fork(self.session.sequence, positions)?;
        let mut fork = Session::new(self.session.owner, sequence);
        fork.set(&self.session.tokens[..positions], positions);
        Ok(fork)
    }

    /// Makes a session the current one, and returns the one that was. What was chosen ahead of the
    /// caller is forgotten; a token that was taken and not fed is fed when the session goes on.
    ///
    /// # Errors
    /// [`Error::NoSequence`] if the session is of another transformer.
    pub fn switch(&mut self, session: Session) -> Result<Session> {
        self.check_owner(&session)?;
        self.forget();
        let before = std::mem::replace(&mut self.session, session);
        self.forget();
        Ok(before)
    }

    /// Ends a session and frees the blocks that no other has.
    ///
    /// # Errors
    /// [`Error::NoSequence`] if the session is of another transformer.
    pub fn close(&mut self, session: Session) -> Result<()> {
        self.check_owner(&session)?;
        self.backend.sequences().close(session.sequence)
    }

    fn check_owner(&self, session: &Session) -> Result<()> {
        if session.owner == self.session.owner { Ok(()) } else { Err(Error::NoSequence) }
    }

    /// Keeps of the current session what a prompt begins with, and returns how many tokens that are: the
    /// rest is to be fed, at least one token.
    pub fn resume(&mut self, prompt: &[u32]) -> usize {
        let cached = &self.session.tokens[..self.session.position];
        let common = cached.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        let kept = common.min(prompt.len().saturating_sub(1));
        self.truncate(kept);
        kept
    }

    /// Writes the current session to a file, which appears when it is complete.
    ///
    /// # Errors
    /// [`Error::Io`], or if the device fails.
    pub fn save(&mut self, path: &Path, identity: &Identity) -> Result<()> {
        let shape = KvShape::new(&self.config, self.backend.kv_format());
        let backend = self.backend.as_mut();
        let table = backend.sequences().table(self.session.sequence)?.to_vec();
        let header = snapshot::Header {
            identity: *identity,
            shape,
            positions: self.session.position,
            tokens: self.session.tokens.len(),
        };
        let tokens = &self.session.tokens;
        snapshot::write(path, &header, tokens, |index| backend.read_block(table[index]))
    }

    /// The session in a file that [`Transformer::save`] has written, on any backend.
    ///
    /// # Errors
    /// If the file is no snapshot, is damaged, belongs to another model, has another KV format (but
    /// f16 goes into f32), or has more tokens than the context.
    pub fn restore(&mut self, path: &Path, identity: &Identity) -> Result<Session> {
        let format = self.backend.kv_format();
        let expected = snapshot::Expected {
            identity: *identity,
            shape: KvShape::new(&self.config, format),
            capacity: self.backend.capacity(),
            vocab_size: self.config.vocab_size,
        };
        let mut file = snapshot::Reader::open(path, &expected)?;
        let tokens = file.tokens()?;
        let positions = file.header().positions;
        let mut session = self.open();
        let result = (|| {
            let sequences = self.backend.sequences();
            sequences.prepare(session.sequence, 0, positions)?;
            for block in sequences.table(session.sequence)?.to_vec() {
                self.backend.write_block(block, &file.block()?)?;
            }
            file.finish()
        })();
        if let Err(error) = result {
            self.close(session)?;
            return Err(error);
        }
        session.set(&tokens, positions);
        Ok(session)
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
        (self.fed, self.untaken, self.is_chosen) = (self.session.position, 0, false);
        self.checked.clear();
    }

    /// Feeds a prompt, after which [`Transformer::next_token`] hands out tokens.
    ///
    /// # Errors
    /// As for [`Transformer::feed`].
    pub fn prompt(&mut self, tokens: &[u32]) -> Result<()> {
        self.prompt_with(tokens, &mut |_, _| ControlFlow::Continue(()))
    }

    /// [`Transformer::prompt`], calling `progress` with the tokens done and the tokens in all before each
    /// pass and after the last one; it may end the prompt before its next pass.
    ///
    /// # Errors
    /// As for [`Transformer::feed`]; [`Error::Cancelled`] if `progress` says so. Either way the
    /// position is where it was.
    pub fn prompt_with(&mut self, tokens: &[u32], progress: OnPrompt<'_>) -> Result<()> {
        block_on(self.prompt_async(tokens, progress))
    }

    /// [`Transformer::prompt_with`] where nothing may block.
    ///
    /// # Errors
    /// As for [`Transformer::prompt_with`].
    pub async fn prompt_async(&mut self, tokens: &[u32], progress: OnPrompt<'_>) -> Result<()> {
        self.feed_chunks(tokens, Want::Token, &mut None, progress).await?;
        self.untaken = 1;
        Ok(())
    }

    /// The next token of the session's text. The device may be given tokens to feed and choose before they are
    /// asked for, at most `limit` in all, this one included, and no more than the context holds.
    ///
    /// # Errors
    /// If the device fails, the logits are NaN, the context is full, or the session is empty.
    pub fn next_token(&mut self, limit: usize) -> Result<u32> {
        block_on(self.next_token_async(limit))
    }

    /// [`Transformer::next_token`] where nothing may block. When the future is dropped, the token is the
    /// next one all the same.
    ///
    /// # Errors
    /// As for [`Transformer::next_token`].
    pub async fn next_token_async(&mut self, limit: usize) -> Result<u32> {
        if let Some(token) = self.checked.pop_front() {
            self.session.take(token, self.session.position + 1);
            return Ok(token);
        }
        let wanted = self.backend.lead().min(limit).max(1);
        let is_prompted = self.is_chosen || self.untaken > 0;
        if !is_prompted && self.session.pending().is_none() {
            // What follows the last token has been forgotten: it runs once more.
            self.session.position = self.session.position.saturating_sub(1);
            self.fed = self.session.position;
        }
        while self.untaken < wanted && (self.untaken == 0 || self.fed < self.capacity()) {
            let last = self.session.pending();
            let tokens = match &last {
                _ if self.is_chosen || self.untaken > 0 => Tokens::Chosen,
                // Another session has been here, or another backend.
                Some(token) => Tokens::Given(std::slice::from_ref(token)),
                None => return Err(Error::NoToken),
            };
            let sequence = self.session.sequence;
            self.forward(
                Batch { sequence, tokens, start: self.fed, want: Want::Token },
                &mut None,
            )?;
            self.fed += 1;
            self.untaken += 1;
        }
        let taken = self.ready().await.and_then(|()| self.backend.take());
        let token = taken.inspect_err(|_| self.forget())?;
        self.untaken -= 1;
        self.is_chosen = true;
        self.session.take(token, self.fed - self.untaken);
        Ok(token)
    }

    /// The longest draft that [`Transformer::check_draft`] takes here; 0 also where the next token has
    /// not been taken.
    pub fn draft_limit(&self) -> usize {
        let room = self.capacity() - self.position();
        let rows = self.backend.max_batch().min(self.backend.max_logit_rows());
        let tokens = room.min(rows).min(MAX_DRAFT + 1);
        if self.untaken + self.ahead() == 0 { tokens.saturating_sub(1) } else { 0 }
    }

    /// Tokens that [`Transformer::next_token`] hands out without another pass: of a checked draft.
    pub fn ahead(&self) -> usize {
        self.checked.len()
    }

    /// Checks what may come after `last`, the token that was taken and not yet fed, in one forward pass.
    /// Returns the tokens that [`Transformer::next_token`] will hand out: those of the draft as long as
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
            sequence: self.session.sequence,
            tokens: Tokens::Given(&tokens),
            start: self.session.position,
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
        self.session.take(last, self.session.position);
        self.fed = self.session.position + found.len();
        self.checked.extend(&found);
        self.is_chosen = true;
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

    /// Returns when the device can go on without waiting, where nothing may block.
    ///
    /// # Errors
    /// If the device has failed or was lost: a browser says so some time after what failed by it.
    pub async fn ready(&mut self) -> Result<()> {
        poll_fn(|context| self.backend.poll_ready(context)).await
    }

    fn feed_and_take(
        &mut self,
        tokens: &[u32],
        want: Want,
        tap: &mut Option<OnTap<'_>>,
    ) -> Result<Output> {
        let before = self.session.position;
        let mut progress = |_, _| ControlFlow::Continue(());
        let output = block_on(self.feed_chunks(tokens, want, tap, &mut progress))?;
        if want != Want::Token {
            return Ok(output);
        }
        self.untaken = 1;
        self.next_token(1).map(Output::Token).inspect_err(|_| {
            self.truncate(before);
        })
    }

    async fn feed_chunks(
        &mut self,
        tokens: &[u32],
        want: Want,
        tap: &mut Option<OnTap<'_>>,
        progress: OnPrompt<'_>,
    ) -> Result<Output> {
        self.forget();
        let (needed, capacity) = (self.fed + tokens.len(), self.capacity());
        if needed > capacity {
            return Err(Error::ContextOverflow { needed, capacity });
        }
        if tokens.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let (sequence, first) = (self.session.sequence, self.fed);
        let (mut start, mut rest) = (first, tokens);
        let mut all_logits = Vec::new();
        while !rest.is_empty() {
            if progress(start - first, tokens.len()).is_break() {
                return Err(Error::Cancelled);
            }
            self.ready().await?;
            let most = match want {
                Want::AllLogits => self.backend.chunk().min(self.backend.max_logit_rows()),
                Want::Tokens => self.backend.max_logit_rows(),
                Want::Nothing | Want::Token | Want::LastLogits => self.backend.chunk(),
            };
            let (chunk, after) = rest.split_at(most.min(rest.len()));
            let last = after.is_empty();
            let want = if last || want == Want::AllLogits { want } else { Want::Nothing };
            let batch = Batch { sequence, tokens: Tokens::Given(chunk), start, want };
            if let Output::Logits(logits) = self.forward(batch, tap)? {
                all_logits.extend(logits);
            }
            start += chunk.len();
            rest = after;
        }
        // Nobody is left to be told to stop.
        let _ = progress(tokens.len(), tokens.len());
        self.session.feed(tokens);
        self.fed = start;
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
        let times = &mut self.steps;
        backend.begin(batch)?;
        timed(times, "embed", || backend.embed())?;
        show(backend, Tap::Hidden, 0)?;
        for layer in 0..self.config.num_hidden_layers {
            timed(times, "qkv", || backend.qkv(layer))?;
            show(backend, Tap::Query, layer)?;
            timed(times, "attend", || backend.attend(layer))?;
            show(backend, Tap::Attended, layer)?;
            timed(times, "project_out", || backend.project_out(layer))?;
            show(backend, Tap::Hidden, layer)?;
            timed(times, "gate_up", || backend.gate_up(layer))?;
            show(backend, Tap::Gated, layer)?;
            timed(times, "down", || backend.down(layer))?;
            show(backend, Tap::Hidden, layer)?;
        }
        if batch.want != Want::Nothing {
            timed(times, "head", || backend.head())?;
        }
        if matches!(batch.want, Want::Token | Want::Tokens) {
            timed(times, "choose", || backend.choose())?;
        }
        backend.finish()
    }
}

/// Runs a step, on the clock if there is one.
fn timed(
    times: &mut Option<Vec<PartTime>>,
    name: &'static str,
    step: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let Some(times) = times else { return step() };
    let start = Instant::now();
    step()?;
    let time = start.elapsed();
    match times.iter_mut().find(|part| part.name == name) {
        Some(part) => (part.calls, part.time) = (part.calls + 1, part.time + time),
        None => times.push(PartTime { name, calls: 1, time }),
    }
    Ok(())
}
