//! Which model a session belongs to.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::config::ModelConfig;

/// SHA-256 of what makes a model: its configuration, and its tensors' names, types, shapes and some of
/// their bytes. The same files have the same identity on every backend; another quantisation of a
/// model is another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity(pub [u8; 32]);

impl fmt::Display for Identity {
    /// The first eight bytes in hexadecimal: enough to tell two models apart.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// An [`Identity`] in the making.
#[derive(Debug)]
pub struct IdentityHash(Sha256);

impl IdentityHash {
    /// Of a model with this configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let mut hash = Self(Sha256::new());
        hash.add(format!("{config:?}").as_bytes());
        hash
    }

    /// Adds one part; where it ends counts.
    pub fn add(&mut self, part: &[u8]) {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    /// The identity.
    pub fn finish(self) -> Identity {
        Identity(self.0.finalize().into())
    }
}
