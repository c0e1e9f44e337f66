//! Single runs: a prompt, a reply.

use std::ops::ControlFlow;
use std::time::Instant;

use super::{Event, OnEvent};
use crate::backend::Traffic;
use crate::error::{Error, Result};
use crate::model::Transformer;

/// A model with a text that it reads, of which every run takes the part that it needs.
pub(super) struct Runner<'a> {
    pub(super) transformer: &'a mut Transformer,
    text: &'a [u32],
    /// Positions of the KV cache that hold the text.
    filled: usize,
}

/// A prompt and the token after it.
pub(super) struct PromptRun {
    /// From the first token fed to the first token handed out.
    pub(super) seconds: f64,
    pub(super) traffic: Option<Traffic>,
}

/// A reply, from its second token on.
pub(super) struct ReplyRun {
    /// From the first token handed out to the last.
    pub(super) seconds: f64,
    /// From each token to the next, as the reader sees them.
    pub(super) token_seconds: Vec<f64>,
    pub(super) traffic: Option<Traffic>,
    /// All of the reply, the first one too.
    pub(super) tokens: Vec<u32>,
}

/// Goes on unless the observer objects.
pub(super) fn tell(observe: OnEvent<'_>, event: Event<'_>) -> Result<()> {
    match observe(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Cancelled),
    }
}

impl<'a> Runner<'a> {
    /// `text` is repeated where more of it is needed.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] without a text.
    pub(super) fn new(transformer: &'a mut Transformer, text: &'a [u32]) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        transformer.reset();
        Ok(Self { transformer, text, filled: 0 })
    }

    fn part(&self, from: usize, len: usize) -> Vec<u32> {
        self.text.iter().cycle().skip(from % self.text.len()).take(len).copied().collect()
    }

    /// Has the first `depth` tokens of the text in the KV cache, and nothing else.
    pub(super) fn fill(&mut self, depth: usize, observe: OnEvent<'_>) -> Result<()> {
        let kept = self.filled.min(depth);
        self.transformer.truncate(kept);
        // Before the next step, which may fail.
        self.filled = kept;
        if depth > kept {
            let part = self.part(kept, depth - kept);
            self.feed(&part, observe)?;
            // It chooses a token, which completes what the device was given.
            self.transformer.next_token(1)?;
            self.transformer.truncate(depth);
            self.filled = depth;
        }
        Ok(())
    }

    fn feed(&mut self, tokens: &[u32], observe: OnEvent<'_>) -> Result<()> {
        let mut before = 0;
        self.transformer.prompt_with(tokens, &mut |done, _| {
            let fed = done - before;
            before = done;
            if fed == 0 { ControlFlow::Continue(()) } else { observe(Event::Fed(fed)) }
        })
    }

    fn traffic_since(&self, before: Option<Traffic>) -> Option<Traffic> {
        Some(self.transformer.traffic()?.since(before?))
    }

    /// Times a prompt of `n` tokens that follows `depth` others.
    pub(super) fn prompt(
        &mut self,
        depth: usize,
        n: usize,
        observe: OnEvent<'_>,
    ) -> Result<PromptRun> {
        self.fill(depth, observe)?;
        let tokens = self.part(depth, n);
        let before = self.transformer.traffic();
        let start = Instant::now();
        self.feed(&tokens, observe)?;
        self.transformer.next_token(1)?;
        let seconds = start.elapsed().as_secs_f64();
        self.filled = depth + n;
        Ok(PromptRun { seconds, traffic: self.traffic_since(before) })
    }

    /// Times `n` tokens of a reply after its first one, which follows `depth` tokens and one more.
    pub(super) fn reply(
        &mut self,
        depth: usize,
        n: usize,
        observe: OnEvent<'_>,
    ) -> Result<ReplyRun> {
        self.fill(depth, observe)?;
        let first = self.part(depth, 1);
        self.feed(&first, observe)?;
        self.filled = depth + 1;
        let mut tokens = Vec::with_capacity(n + 1);
        let mut token_seconds = Vec::with_capacity(n);
        // Nothing runs ahead of the clock.
        tokens.push(self.transformer.next_token(1)?);
        let before = self.transformer.traffic();
        let start = Instant::now();
        let mut last = start;
        for left in (1..=n).rev() {
            tokens.push(self.transformer.next_token(left)?);
            let now = Instant::now();
            token_seconds.push((now - last).as_secs_f64());
            last = now;
            tell(observe, Event::Token)?;
        }
        let (seconds, traffic) = ((last - start).as_secs_f64(), self.traffic_since(before));
        Ok(ReplyRun { seconds, token_seconds, traffic, tokens })
    }
}
