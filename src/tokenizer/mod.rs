//! Text ↔ token ids, by the model's own `tokenizer.json` or GGUF metadata, chat template and stop
//! tokens.
//!
//! - [`Tokenizer`]: encode and decode;
//! - [`GgufVocabulary`]: what a GGUF file says about all of these;
//! - [`DecodeStream`]: decode token by token, without broken characters;
//! - [`ChatTemplate`]: messages → the text that the model was trained on;
//! - [`stop_ids`]: the tokens that end a text.

mod chat;
mod gguf;
mod sentencepiece;
mod stop;
mod stream;
mod to_gguf;

pub use chat::{ChatTemplate, Message, Role};
pub use gguf::{GgufVocabulary, TokenKind};
pub use stop::stop_ids;
pub use stream::DecodeStream;
pub use to_gguf::HuggingFaceFiles;

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, Result};
use sentencepiece::SentencePiece;

/// A file of the model, for the functions here: its name for messages, and its contents.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    /// Path, or name of an embedded file.
    pub file: &'a str,
    /// The contents.
    pub bytes: &'a [u8],
}

impl Source<'_> {
    fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_slice(self.bytes)
            .map_err(|source| Error::Json { file: self.file.to_owned(), source })
    }
}

/// A model's tokenizer.
pub struct Tokenizer {
    file: String,
    inner: Inner,
    vocab_size: usize,
    /// What [`Tokenizer::encode`] puts before and after a text, other than what `inner` does.
    bos: Option<u32>,
    eos: Option<u32>,
}

enum Inner {
    /// Of a `tokenizer.json`, or the byte-level BPE of a GGUF file.
    HuggingFace {
        tokenizer: Box<tokenizers::Tokenizer>,
        /// What the model gives for a byte that the vocabulary lacks; not a token.
        missing_id: Option<u32>,
    },
    /// The SentencePiece BPE of a GGUF file.
    SentencePiece(Box<SentencePiece>),
}

impl Tokenizer {
    /// Reads `tokenizer.json` for a model of `model_vocab_size` tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the file is malformed or has a token that the model lacks.
    pub fn from_json(source: Source<'_>, model_vocab_size: usize) -> Result<Self> {
        let file = source.file.to_owned();
        // The crate takes JSON for granted in places; this tells where it is wrong, too.
        source.json()?;
        let mut inner = guarded(&file, || tokenizers::Tokenizer::from_bytes(source.bytes))?;
        // The file may keep settings of its training, which would cut prompts without a word.
        inner.with_padding(None);
        guarded(&file, || inner.with_truncation(None).map(|_| ()))?;
        let vocab = inner.get_vocab(true);
        let largest = vocab.iter().max_by_key(|&(token, &id)| (id, token));
        let problem = match largest {
            None => "the vocabulary is empty".to_owned(),
            Some((token, &id)) if id as usize >= model_vocab_size => {
                format!("token {token:?} has id {id}, the model's vocab_size is {model_vocab_size}")
            }
            Some(_) => {
                let inner = Inner::HuggingFace { tokenizer: Box::new(inner), missing_id: None };
                return Ok(Self { file, inner, vocab_size: vocab.len(), bos: None, eos: None });
            }
        };
        Err(Error::Tokenizer { file, problem })
    }

    /// Text → token ids. Special tokens that the text spells out (`<|eot_id|>`) are recognised.
    ///
    /// `add_special_tokens` adds what the tokenizer puts around every text, such as the BOS token;
    /// a chat template writes those itself.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer cannot represent the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let ids = match &self.inner {
            Inner::HuggingFace { tokenizer, missing_id } => {
                let encode = || tokenizer.encode_fast(text, add_special_tokens);
                let ids = guarded(&self.file, encode)?.get_ids().to_vec();
                if missing_id.is_some_and(|missing| ids.contains(&missing)) {
                    let problem = "the text has bytes that the vocabulary has no token for";
                    return Err(Error::Tokenizer {
                        file: self.file.clone(),
                        problem: problem.to_owned(),
                    });
                }
                ids
            }
            Inner::SentencePiece(pieces) => pieces.encode(text),
        };
        if !add_special_tokens || (self.bos.is_none() && self.eos.is_none()) {
            return Ok(ids);
        }
        Ok(self.bos.into_iter().chain(ids).chain(self.eos).collect())
    }

    /// Token ids → text; ids without a token give nothing, invalid UTF-8 gives U+FFFD.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the file's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        match &self.inner {
            Inner::HuggingFace { tokenizer, missing_id } => {
                let decode = |ids: &[u32]| tokenizer.decode(ids, skip_special_tokens);
                if missing_id.is_some_and(|missing| ids.contains(&missing)) {
                    let ids = ids.iter().copied().filter(|&id| Some(id) != *missing_id);
                    return guarded(&self.file, || decode(&ids.collect::<Vec<u32>>()));
                }
                guarded(&self.file, || decode(ids))
            }
            Inner::SentencePiece(pieces) => Ok(pieces.decode(ids, skip_special_tokens)),
        }
    }

    /// Starts decoding token by token what follows the tokens `context`; skips special tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the file's decoder fails on the context.
    pub fn stream(&self, context: &[u32]) -> Result<DecodeStream<'_>> {
        DecodeStream::new(self, context)
    }

    /// How many tokens there are, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token, as the vocabulary spells it.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        match &self.inner {
            Inner::HuggingFace { tokenizer, missing_id } => {
                tokenizer.token_to_id(token).filter(|&id| Some(id) != *missing_id)
            }
            Inner::SentencePiece(pieces) => pieces.id(token),
        }
    }

    /// The token of an id, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        match &self.inner {
            Inner::HuggingFace { missing_id, .. } if Some(id) == *missing_id => None,
            Inner::HuggingFace { tokenizer, .. } => {
                let added = tokenizer.get_added_vocabulary();
                added.simple_id_to_token(id).or_else(|| tokenizer.id_to_token(id))
            }
            Inner::SentencePiece(pieces) => pieces.piece(id).map(|piece| piece.text.clone()),
        }
    }

    /// The id of a token that the tokenizer marks as special.
    pub fn special_token_id(&self, token: &str) -> Option<u32> {
        let id = self.token_id(token)?;
        let is_special = match &self.inner {
            Inner::HuggingFace { tokenizer, .. } => {
                tokenizer.get_added_vocabulary().is_special_token(token)
            }
            Inner::SentencePiece(pieces) => pieces.piece(id)?.is_special(),
        };
        is_special.then_some(id)
    }

    /// The ids of all special tokens, ascending.
    pub fn special_ids(&self) -> Vec<u32> {
        match &self.inner {
            Inner::HuggingFace { tokenizer, .. } => {
                let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
                let special = added.iter().filter(|(_, token)| token.special);
                let mut ids: Vec<u32> = special.map(|(&id, _)| id).collect();
                ids.sort_unstable();
                ids
            }
            Inner::SentencePiece(pieces) => pieces.special_ids(),
        }
    }
}

/// Text of a file as a message shows it: a hostile file may have anything there, of any length.
fn quoted(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// The first characters of JSON, for a message.
fn shortened(text: &str, max_characters: usize) -> String {
    match text.char_indices().nth(max_characters) {
        Some((end, _)) => text[..end].to_owned() + "…",
        None => text.to_owned(),
    }
}

/// Runs a function of the tokenizers crate, which panics on some files that are valid JSON but not
/// a valid tokenizer.
fn guarded<T>(file: &str, run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    // Only `run` borrows what a panic may leave half-done, and the callers give that up.
    let problem = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(problem)) => problem.to_string(),
        Err(_) => "the tokenizer is invalid in a way that its reader does not handle".to_owned(),
    };
    Err(Error::Tokenizer { file: file.to_owned(), problem })
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) const TOKENIZER: &[u8] =
        include_bytes!("../../tests/golden/bitnet-a-packed/tokenizer.json");
    pub(super) const CONFIG: &[u8] =
        include_bytes!("../../tests/golden/bitnet-a-packed/tokenizer_config.json");
    const TOKENS: &[u8] = include_bytes!("../../tests/golden/expected/tokens.json");

    pub(super) fn source(bytes: &[u8]) -> Source<'_> {
        Source { file: "test.json", bytes }
    }

    pub(super) fn tokenizer() -> Tokenizer {
        Tokenizer::from_json(source(TOKENIZER), 1000).unwrap()
    }

    #[derive(serde::Deserialize)]
    pub(super) struct Golden {
        pub(super) cases: Vec<Case>,
        pub(super) chat: Chat,
        pub(super) vocab_size: usize,
    }

    #[derive(serde::Deserialize)]
    pub(super) struct Case {
        pub(super) text: String,
        pub(super) ids_with_bos: Vec<u32>,
        pub(super) ids: Vec<u32>,
        pub(super) decode_skip_special: String,
        pub(super) decode_keep_special: String,
    }

    #[derive(serde::Deserialize)]
    pub(super) struct Chat {
        pub(super) messages: Vec<Message>,
        pub(super) rendered: String,
        pub(super) rendered_no_gen: String,
        pub(super) ids: Vec<u32>,
    }

    pub(super) fn golden() -> Golden {
        serde_json::from_slice(TOKENS).unwrap()
    }

    #[test]
    fn every_golden_text_is_equal() {
        let (tokenizer, golden) = (tokenizer(), golden());
        assert_eq!(tokenizer.vocab_size(), golden.vocab_size);
        for case in &golden.cases {
            let text = &case.text;
            assert_eq!(tokenizer.encode(text, true).unwrap(), case.ids_with_bos, "{text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), case.ids, "{text:?}");
            let decode = |skip| tokenizer.decode(&case.ids_with_bos, skip).unwrap();
            assert_eq!(decode(true), case.decode_skip_special, "{text:?}");
            assert_eq!(decode(false), case.decode_keep_special, "{text:?}");
        }
    }

    #[test]
    fn tokens_have_names() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.special_ids(), (992..1000).collect::<Vec<u32>>());
        assert_eq!(tokenizer.token_id("<|eot_id|>"), Some(996));
        assert_eq!(tokenizer.token(996).as_deref(), Some("<|eot_id|>"));
        assert_eq!(tokenizer.special_token_id("<|eot_id|>"), Some(996));
        assert_eq!((tokenizer.token_id("a"), tokenizer.special_token_id("a")), (Some(64), None));
        assert_eq!((tokenizer.token_id("<|no|>"), tokenizer.token(1000)), (None, None));
    }

    #[test]
    fn a_tokenizer_must_fit_the_model() {
        let error = Tokenizer::from_json(source(TOKENIZER), 999).err().unwrap().to_string();
        assert!(error.contains("id 999, the model's vocab_size is 999"), "{error}");
        assert!(Tokenizer::from_json(source(TOKENIZER), 1001).is_ok());
    }

    #[test]
    fn settings_of_the_training_are_ignored() {
        let mut json: serde_json::Value = serde_json::from_slice(TOKENIZER).unwrap();
        json["truncation"] = serde_json::json!({
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0
        });
        json["padding"] = serde_json::json!({
            "strategy": { "Fixed": 64 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"
        });
        let bytes = serde_json::to_vec(&json).unwrap();
        let cut = Tokenizer::from_json(source(&bytes), 1000).unwrap();
        let text = "Hello, world!";
        assert_eq!(cut.encode(text, true).unwrap(), tokenizer().encode(text, true).unwrap());
    }

    #[test]
    fn malformed_files_are_errors() {
        let deep = "[".repeat(100_000);
        let cases: [&[u8]; 7] = [b"", b"{", b"[]", b"{}", b"\xff\xfe", deep.as_bytes(), b"null"];
        for bytes in cases {
            let error = Tokenizer::from_json(source(bytes), 1000).err().unwrap();
            assert!(matches!(error, Error::Tokenizer { .. } | Error::Json { .. }), "{error}");
        }
        // A normalizer that makes the tokenizers crate panic.
        let mut json: serde_json::Value = serde_json::from_slice(TOKENIZER).unwrap();
        json["normalizer"] = serde_json::json!({
            "type": "Precompiled", "precompiled_charsmap": "////"
        });
        let bytes = serde_json::to_vec(&json).unwrap();
        assert!(Tokenizer::from_json(source(&bytes), 1000).is_err());
        // Cut or damaged anywhere: an error, or a tokenizer that still works; never a panic.
        for cut in (0..TOKENIZER.len()).step_by(997) {
            assert!(Tokenizer::from_json(source(&TOKENIZER[..cut]), 1000).is_err(), "cut {cut}");
        }
        for at in (0..TOKENIZER.len()).step_by(397) {
            let mut bytes = TOKENIZER.to_vec();
            bytes[at] = b'9';
            if let Ok(tokenizer) = Tokenizer::from_json(source(&bytes), 1000) {
                let ids = tokenizer.encode("Hello, world! 123", true).unwrap_or_default();
                let _ = tokenizer.decode(&ids, true);
            }
        }
    }
}
