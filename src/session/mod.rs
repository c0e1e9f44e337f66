//! Sessions: texts whose keys and values a [`crate::Transformer`] keeps, and the files they are saved
//! to.

mod identity;
pub mod snapshot;

use std::sync::atomic::{AtomicU64, Ordering};

pub use identity::{Identity, IdentityHash};

use crate::kv_cache::SequenceId;

/// Which transformer a session is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner(u64);

impl Owner {
    /// One that no other transformer of this process has.
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A text in the KV cache of a [`crate::Transformer`], which opens, forks, switches and closes them.
#[derive(Debug)]
pub struct Session {
    pub(crate) owner: Owner,
    pub(crate) sequence: SequenceId,
    /// Tokens in the KV cache.
    pub(crate) position: usize,
    /// Those, and perhaps one that was chosen and has not been fed.
    pub(crate) tokens: Vec<u32>,
}

impl Session {
    pub(crate) fn new(owner: Owner, sequence: SequenceId) -> Self {
        Self { owner, sequence, position: 0, tokens: Vec::new() }
    }

    /// The text so far: prompts, and the tokens that were chosen and taken.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// How many of the tokens are in the KV cache: all, or all but the last.
    pub fn position(&self) -> usize {
        self.position
    }

    /// The token that was taken and has not been fed.
    pub(crate) fn pending(&self) -> Option<u32> {
        self.tokens.get(self.position).copied()
    }

    /// Keeps the first tokens.
    pub(crate) fn truncate(&mut self, positions: usize) {
        self.tokens.truncate(positions);
        self.position = self.position.min(positions);
    }

    /// Tokens have been fed after those in the cache.
    pub(crate) fn feed(&mut self, tokens: &[u32]) {
        self.tokens.truncate(self.position);
        self.tokens.extend_from_slice(tokens);
        self.position = self.tokens.len();
    }

    /// A chosen token has been taken, with `position` tokens before it.
    pub(crate) fn take(&mut self, token: u32, position: usize) {
        self.position = position;
        self.tokens.truncate(position);
        self.tokens.push(token);
    }

    /// All tokens, `position` of which are in the cache.
    pub(crate) fn set(&mut self, tokens: &[u32], position: usize) {
        self.tokens = tokens.to_vec();
        self.position = position;
    }
}
