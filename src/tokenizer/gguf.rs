//! Tokenizers from the metadata of a GGUF file.
//!
//! The container's reader fills a [`GgufVocabulary`] with what stands under `tokenizer.*`;
//! everything is checked here. Two kinds exist: `gpt2`, a byte-level BPE with merges, whose
//! pre-tokenizer is only named ([`PreTokenizer`]), and `llama`, SentencePiece pieces with scores.

use std::collections::{BTreeMap, HashMap, HashSet};

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::sentencepiece::{Fallback, Piece, SentencePiece, byte_of};
use super::stop::{end_token_ids, sorted_ids};
use super::{Inner, Tokenizer, guarded, quoted, stream};
use crate::error::{Error, Result};
use crate::format::gguf::{Array, Metadata, Strings, Value};

/// What a GGUF file says about its tokenizer, unchecked. Without a key, a list is empty and
/// anything else `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GgufVocabulary {
    /// Path of the file, for messages.
    pub file: String,
    /// `general.architecture`.
    pub architecture: String,
    /// `tokenizer.ggml.model`: `gpt2` or `llama`.
    pub model: String,
    /// `tokenizer.ggml.pre`: name of the pre-tokenizer of a `gpt2`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`, by id: a [`TokenKind`]; all are normal without it.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.scores`, by id; of meaning for a `llama` only.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.merges`: `left right`, the first ones first; of meaning for a `gpt2` only.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos_id: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos_id: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`.
    pub eot_id: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown_id: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub padding_id: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

/// `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum TokenKind {
    /// A piece of text.
    Normal = 1,
    /// Stands for what has no token.
    Unknown = 2,
    /// A special token: no text of its own.
    Control = 3,
    /// Text that is always this token, whatever stands beside it.
    UserDefined = 4,
    /// An id that nothing is encoded as, such as padding of the vocabulary.
    Unused = 5,
    /// One byte of a `llama`, spelled `<0x0A>`.
    Byte = 6,
}

impl TokenKind {
    fn from_number(number: i32) -> Option<Self> {
        use TokenKind::{Byte, Control, Normal, Unknown, Unused, UserDefined};
        [Normal, Unknown, Control, UserDefined, Unused, Byte]
            .into_iter()
            .find(|&kind| kind as i32 == number)
    }
}

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TOKEN_TYPE: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS_ID: &str = "tokenizer.ggml.bos_token_id";
const EOS_ID: &str = "tokenizer.ggml.eos_token_id";
const EOT_ID: &str = "tokenizer.ggml.eot_token_id";
const UNKNOWN_ID: &str = "tokenizer.ggml.unknown_token_id";
const PADDING_ID: &str = "tokenizer.ggml.padding_token_id";
const ADD_BOS: &str = "tokenizer.ggml.add_bos_token";
const ADD_EOS: &str = "tokenizer.ggml.add_eos_token";
const ADD_SPACE_PREFIX: &str = "tokenizer.ggml.add_space_prefix";
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// How a byte-level BPE cuts a text before it merges (llama.cpp, `llama-vocab.cpp`; the regular
/// expressions are those of the models' own `tokenizer.json`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PreTokenizer {
    Llama3,
    Qwen2,
    Qwen35,
    Gpt2,
    Falcon,
}

/// Llama 3: digits by threes.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2 and 3: digits one by one.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 3.5: combining marks belong to words.
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// The first Falcon: punctuation apart, then as GPT-2, then digits by threes.
const FALCON: [&str; 3] = [r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"];

impl PreTokenizer {
    /// The names in use; for Falcon3 and Falcon-E, llama.cpp takes the expression of Llama 3.
    const NAMES: [(&str, Self); 9] = [
        ("llama-bpe", Self::Llama3),
        ("llama3", Self::Llama3),
        ("llama-v3", Self::Llama3),
        ("falcon3", Self::Llama3),
        ("falcon_e", Self::Llama3),
        ("qwen2", Self::Qwen2),
        ("qwen35", Self::Qwen35),
        ("gpt-2", Self::Gpt2),
        ("falcon", Self::Falcon),
    ];

    /// Every pre-tokenizer once.
    pub(super) fn all() -> impl Iterator<Item = Self> {
        [Self::Llama3, Self::Qwen2, Self::Qwen35, Self::Gpt2, Self::Falcon].into_iter()
    }

    /// The first name of each, for writing.
    pub(super) fn name(self) -> &'static str {
        let name = Self::NAMES.iter().find(|(_, pre)| *pre == self);
        name.expect("every variant has a name").0
    }

    /// One after the other, each on the pieces of the one before.
    pub(super) fn expressions(self) -> &'static [&'static str] {
        match self {
            Self::Llama3 => &[LLAMA3],
            Self::Qwen2 => &[QWEN2],
            Self::Qwen35 => &[QWEN35],
            Self::Gpt2 => &[GPT2],
            Self::Falcon => &FALCON,
        }
    }

    /// Whether a piece that is a token stays one, even if no merges lead there.
    pub(super) fn ignores_merges(self) -> bool {
        self == Self::Llama3
    }

    /// Whether the text is composed first (é as one character).
    pub(super) fn normalizes(self) -> bool {
        matches!(self, Self::Qwen2 | Self::Qwen35)
    }

    fn adds_bos(self) -> bool {
        self == Self::Llama3
    }
}

impl GgufVocabulary {
    /// Whether the file says anything about a tokenizer.
    pub fn is_in(metadata: &Metadata) -> bool {
        metadata.iter().any(|(key, _)| key.starts_with("tokenizer."))
    }

    /// What the metadata of a GGUF file say.
    ///
    /// # Errors
    /// [`Error::Metadata`] if there is no tokenizer, or a key has another type.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self> {
        let strings = |key: &str| -> Result<Vec<String>> {
            let strings: Option<&Strings> = metadata.get(key)?;
            Ok(strings.into_iter().flat_map(|list| list.iter()).map(str::to_owned).collect())
        };
        let text = |key: &str| -> Result<Option<String>> {
            Ok(metadata.get::<&str>(key)?.map(str::to_owned))
        };
        Ok(Self {
            file: metadata.file().to_owned(),
            architecture: text("general.architecture")?.unwrap_or_default(),
            model: metadata.require::<&str>(MODEL)?.to_owned(),
            pre: text(PRE)?,
            tokens: strings(TOKENS)?,
            token_types: metadata.get(TOKEN_TYPE)?.unwrap_or_default(),
            scores: metadata.get(SCORES)?.unwrap_or_default(),
            merges: strings(MERGES)?,
            bos_id: metadata.get(BOS_ID)?,
            eos_id: metadata.get(EOS_ID)?,
            eot_id: metadata.get(EOT_ID)?,
            unknown_id: metadata.get(UNKNOWN_ID)?,
            padding_id: metadata.get(PADDING_ID)?,
            add_bos: metadata.get(ADD_BOS)?,
            add_eos: metadata.get(ADD_EOS)?,
            add_space_prefix: metadata.get(ADD_SPACE_PREFIX)?,
            chat_template: text(CHAT_TEMPLATE)?,
        })
    }

    /// The same as pairs of key and value for a GGUF file; what is not there has no key.
    pub(crate) fn to_metadata(&self) -> Vec<(&'static str, Value)> {
        let strings = |list: &[String]| {
            Value::Array(Array::String(list.iter().map(String::as_str).collect()))
        };
        let mut pairs = vec![(MODEL, Value::String(self.model.clone()))];
        let mut add = |key, value: Option<Value>| pairs.extend(value.map(|value| (key, value)));
        add(PRE, self.pre.clone().map(Value::String));
        add(TOKENS, Some(strings(&self.tokens)));
        let types = Value::Array(Array::I32(self.token_types.clone()));
        add(TOKEN_TYPE, (!self.token_types.is_empty()).then_some(types));
        let scores = Value::Array(Array::F32(self.scores.clone()));
        add(SCORES, (!self.scores.is_empty()).then_some(scores));
        add(MERGES, (!self.merges.is_empty()).then(|| strings(&self.merges)));
        for (key, id) in [
            (BOS_ID, self.bos_id),
            (EOS_ID, self.eos_id),
            (EOT_ID, self.eot_id),
            (UNKNOWN_ID, self.unknown_id),
            (PADDING_ID, self.padding_id),
        ] {
            add(key, id.map(Value::U32));
        }
        for (key, switch) in [
            (ADD_BOS, self.add_bos),
            (ADD_EOS, self.add_eos),
            (ADD_SPACE_PREFIX, self.add_space_prefix),
        ] {
            add(key, switch.map(Value::Bool));
        }
        add(CHAT_TEMPLATE, self.chat_template.clone().map(Value::String));
        pairs
    }

    /// The tokens that end a text, ascending: `eos_token_id` and `eot_token_id`, and the well-known
    /// end tokens that are special in `tokenizer`, which is this vocabulary's.
    pub fn stop_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let named = end_token_ids(tokenizer);
        sorted_ids(named.chain(self.eos_id).chain(self.eot_id))
    }

    /// What is done otherwise than the file says, or said nowhere in it, a line each; to be shown
    /// with the model. `is_2b4t`: as for [`super::ChatTemplate::from_gguf`].
    pub fn notes(&self, is_2b4t: bool) -> Vec<String> {
        let mut notes = Vec::new();
        if self.model == "gpt2" && self.pre_is_unsaid() && self.is_bitnet_llama3() {
            notes
                .push(format!("{}: no {PRE}; taken as llama-bpe, which this model has", self.file));
        }
        if self.has_wrong_template(is_2b4t) {
            notes.push(format!(
                "{}: tokenizer.chat_template is not the one that this model was trained on; \
                 the template of the original checkpoint is used instead",
                self.file
            ));
        }
        notes
    }

    /// Whether this is bitnet.cpp's placeholder instead of the template of BitNet b1.58 2B4T.
    pub(super) fn has_wrong_template(&self, is_2b4t: bool) -> bool {
        let is_2b4t = is_2b4t || self.architecture == "bitnet-b1.58";
        is_2b4t && self.chat_template.as_ref().is_some_and(|text| text.contains("BITNETAssistant"))
    }

    /// The special tokens by the names that templates have for them.
    pub(super) fn special_tokens(&self) -> BTreeMap<String, String> {
        let ids = [
            ("bos_token", self.bos_id),
            ("eos_token", self.eos_id),
            ("unk_token", self.unknown_id),
            ("pad_token", self.padding_id),
        ];
        let text = |id: Option<u32>| self.tokens.get(usize::try_from(id?).ok()?);
        let tokens = ids.into_iter().filter_map(|(name, id)| Some((name.to_owned(), text(id)?)));
        tokens.map(|(name, text)| (name, text.clone())).collect()
    }

    fn pre_is_unsaid(&self) -> bool {
        self.pre.as_deref().is_none_or(|name| name == "default")
    }

    /// Whether this is a conversion of BitNet b1.58 2B4T, which has Llama 3's vocabulary; the
    /// published file does not name its pre-tokenizer.
    fn is_bitnet_llama3(&self) -> bool {
        let names = ["bitnet-b1.58", "bitnet-25", "bitnet"];
        names.contains(&self.architecture.as_str()) && self.tokens.len() == 128_256
    }

    fn error(&self, key: &'static str, expected: impl Into<String>, found: String) -> Error {
        Error::Config {
            file: self.file.clone(),
            key: key.to_owned(),
            expected: expected.into(),
            found,
        }
    }

    /// The named pre-tokenizer.
    fn pre_tokenizer(&self) -> Result<PreTokenizer> {
        if self.pre_is_unsaid() && self.is_bitnet_llama3() {
            return Ok(PreTokenizer::Llama3);
        }
        let known = PreTokenizer::NAMES.into_iter();
        let named = known.clone().find(|(name, _)| self.pre.as_deref() == Some(*name));
        named.map(|(_, pre)| pre).ok_or_else(|| {
            let names: Vec<&str> = known.map(|(name, _)| name).collect();
            let found = self.pre.as_deref().map_or("none".to_owned(), quoted);
            self.error(PRE, format!("one of {}", names.join(", ")), found)
        })
    }

    /// Checks what both kinds have in common; gives the kind of each token.
    fn check(&self, model_vocab_size: usize) -> Result<Vec<TokenKind>> {
        let n_tokens = self.tokens.len();
        if n_tokens == 0 || n_tokens > model_vocab_size {
            let expected = format!("1 to {model_vocab_size} tokens, the model's vocab_size");
            return Err(self.error(TOKENS, expected, n_tokens.to_string()));
        }
        for (key, len) in [(TOKEN_TYPE, self.token_types.len()), (SCORES, self.scores.len())] {
            if len != 0 && len != n_tokens {
                let expected = format!("{n_tokens} of them, one for each token");
                return Err(self.error(key, expected, len.to_string()));
            }
        }
        self.check_texts()?;
        self.check_ids()?;
        if self.token_types.is_empty() {
            return Ok(vec![TokenKind::Normal; n_tokens]);
        }
        let kinds = self.token_types.iter().enumerate().map(|(id, &number)| {
            TokenKind::from_number(number).ok_or_else(|| {
                self.error(TOKEN_TYPE, "types from 1 to 6", format!("{number} for token {id}"))
            })
        });
        kinds.collect()
    }

    fn check_texts(&self) -> Result<()> {
        let mut ids = HashMap::with_capacity(self.tokens.len());
        for (id, text) in self.tokens.iter().enumerate() {
            if let Some(first) = ids.insert(text, id) {
                let found = format!("{} for the ids {first} and {id}", quoted(text));
                return Err(self.error(TOKENS, "tokens that differ", found));
            }
        }
        Ok(())
    }

    fn check_ids(&self) -> Result<()> {
        for (key, id) in [
            (BOS_ID, self.bos_id),
            (EOS_ID, self.eos_id),
            (EOT_ID, self.eot_id),
            (UNKNOWN_ID, self.unknown_id),
            (PADDING_ID, self.padding_id),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= self.tokens.len()) {
                let expected = format!("an id below {}, the number of tokens", self.tokens.len());
                return Err(self.error(key, expected, id.to_string()));
            }
        }
        Ok(())
    }

    /// An id that is put around every text, if it is wanted.
    fn framing_id(
        &self,
        wanted: bool,
        key: &'static str,
        id: Option<u32>,
        wanted_by: &'static str,
    ) -> Result<Option<u32>> {
        if wanted && id.is_none() {
            let expected = format!("an id, as {wanted_by} asks for it");
            return Err(self.error(key, expected, "none".to_owned()));
        }
        Ok(id.filter(|_| wanted))
    }

    /// A byte-level BPE, and the id that its model gives for bytes without a token.
    fn byte_level(
        &self,
        kinds: &[TokenKind],
        pre: PreTokenizer,
    ) -> Result<(tokenizers::Tokenizer, Option<u32>)> {
        let used = || (0u32..).zip(self.tokens.iter().zip(kinds));
        let used = || used().filter(|(_, (_, kind))| **kind != TokenKind::Unused);
        let mut vocab: Vocab = used().map(|(id, (text, _))| (text.clone(), id)).collect();
        let merges = self.merges_of(&vocab)?;

        let mut model = BPE::builder().ignore_merges(pre.ignores_merges());
        let lacks_bytes =
            !stream::byte_alphabet().all(|c| vocab.contains_key(c.to_string().as_str()));
        let missing_id = lacks_bytes.then_some(u32::MAX);
        if let Some(id) = missing_id {
            // The crate's model drops what it has no token for, unless there is an unknown token.
            let mut unknown = String::from("\0");
            while vocab.contains_key(&unknown) {
                unknown.push('\0');
            }
            vocab.insert(unknown.clone(), id);
            model = model.unk_token(unknown);
        }

        let special = used().filter_map(|(_, (text, kind))| match kind {
            TokenKind::Control | TokenKind::Unknown => Some(AddedToken::from(text, true)),
            TokenKind::UserDefined => Some(AddedToken::from(text, false).normalized(false)),
            _ => None,
        });
        let inner = guarded(&self.file, || {
            let model = model.vocab_and_merges(vocab, merges).build()?;
            let mut inner = tokenizers::Tokenizer::new(model);
            inner.with_normalizer(pre.normalizes().then_some(NFC))?;
            inner.with_pre_tokenizer(Some(splitter(pre)?));
            inner.with_decoder(Some(ByteLevel::default()));
            inner.add_tokens(special)?;
            Ok(inner)
        })?;
        Ok((inner, missing_id))
    }

    /// The merges, each listed once, that `vocab` has all tokens for.
    fn merges_of(&self, vocab: &Vocab) -> Result<Merges> {
        let mut merges = Merges::with_capacity(self.merges.len());
        let mut seen = HashSet::with_capacity(self.merges.len());
        for (index, merge) in self.merges.iter().enumerate() {
            let wrong = |expected: &str| {
                self.error(MERGES, expected, format!("{} as number {index}", quoted(merge)))
            };
            let pair = merge.split_once(' ').filter(|(left, right)| {
                !left.is_empty() && !right.is_empty() && !right.contains(' ')
            });
            let (left, right) = pair.ok_or_else(|| wrong("two tokens with a space between"))?;
            let merged = [left, right].concat();
            if ![left, right, &merged].into_iter().all(|token| vocab.contains_key(token)) {
                return Err(wrong("tokens of the vocabulary that make another"));
            }
            if seen.insert(merge) {
                merges.push((left.to_owned(), right.to_owned()));
            }
        }
        Ok(merges)
    }

    fn sentencepiece(&self, kinds: &[TokenKind]) -> Result<SentencePiece> {
        if self.scores.is_empty() {
            let expected = format!("{} of them, one for each token", self.tokens.len());
            return Err(self.error(SCORES, expected, "none".to_owned()));
        }
        if let Some((id, score)) = self.scores.iter().enumerate().find(|(_, s)| !s.is_finite()) {
            let found = format!("{score} for token {id}");
            return Err(self.error(SCORES, "finite numbers", found));
        }
        let mut bytes = [None; 256];
        let mut unknown = self.unknown_id;
        for (id, (text, kind)) in (0u32..).zip(self.tokens.iter().zip(kinds)) {
            match kind {
                TokenKind::Byte => {
                    let byte = byte_of(text).ok_or_else(|| {
                        let found = format!("{} for token {id}", quoted(text));
                        self.error(TOKENS, "byte tokens such as \"<0x0A>\"", found)
                    })?;
                    bytes[usize::from(byte)] = Some(id);
                }
                TokenKind::Unknown => unknown = unknown.or(Some(id)),
                _ => {}
            }
        }
        let fallback = match bytes.iter().copied().collect::<Option<Vec<u32>>>() {
            Some(bytes) => bytes.try_into().ok().map(Fallback::Bytes),
            None => unknown.map(Fallback::Unknown),
        };
        let fallback = fallback.ok_or_else(|| {
            let missing = bytes.iter().position(Option::is_none).unwrap_or_default();
            let expected = "a token for each byte, or an unknown token";
            self.error(TOKENS, expected, format!("neither <0x{missing:02X}> nor that"))
        })?;

        let texts = self.tokens.iter().zip(kinds).zip(&self.scores);
        let pieces = texts
            .map(|((text, &kind), &score)| Piece { text: text.clone(), kind, score })
            .collect();
        let space_prefix = self.add_space_prefix.unwrap_or(true);
        SentencePiece::new(pieces, fallback, space_prefix).ok_or_else(|| {
            self.error(TOKENS, "special tokens that a matcher can hold", "too many".to_owned())
        })
    }
}

/// The crate's form of a pre-tokenizer.
fn splitter(pre: PreTokenizer) -> tokenizers::Result<Sequence> {
    let splits = pre.expressions().iter().map(|&expression| {
        let pattern = SplitPattern::Regex(expression.to_owned());
        Split::new(pattern, SplitDelimiterBehavior::Isolated, false).map(PreTokenizerWrapper::from)
    });
    let mut steps = splits.collect::<tokenizers::Result<Vec<_>>>()?;
    steps.push(ByteLevel::new(false, true, false).into());
    Ok(Sequence::new(steps))
}

impl Tokenizer {
    /// The tokenizer of a GGUF file, for a model of `model_vocab_size` tokens. Never panics and
    /// takes time and memory in proportion to the vocabulary, whatever that holds.
    ///
    /// # Errors
    /// [`Error::Config`] with the key whose value is missing, unsupported, or does not fit the
    /// model or another key.
    pub fn from_gguf(vocabulary: &GgufVocabulary, model_vocab_size: usize) -> Result<Self> {
        let file = vocabulary.file.clone();
        let vocab_size = vocabulary.tokens.len();
        let is_byte_level = match vocabulary.model.as_str() {
            "gpt2" => true,
            "llama" => false,
            other => {
                return Err(vocabulary.error(MODEL, "gpt2 or llama", quoted(other)));
            }
        };
        let kinds = vocabulary.check(model_vocab_size)?;
        let (inner, adds_bos) = if is_byte_level {
            let pre = vocabulary.pre_tokenizer()?;
            let (tokenizer, missing_id) = vocabulary.byte_level(&kinds, pre)?;
            (Inner::HuggingFace { tokenizer: Box::new(tokenizer), missing_id }, pre.adds_bos())
        } else {
            (Inner::SentencePiece(Box::new(vocabulary.sentencepiece(&kinds)?)), true)
        };
        let bos_wanted_by = match vocabulary.add_bos {
            Some(_) => ADD_BOS,
            None => "this kind of tokenizer",
        };
        let adds_bos = vocabulary.add_bos.unwrap_or(adds_bos);
        let adds_eos = vocabulary.add_eos.unwrap_or(false);
        let eos_wanted_by = ADD_EOS;
        let bos = vocabulary.framing_id(adds_bos, BOS_ID, vocabulary.bos_id, bos_wanted_by)?;
        let eos = vocabulary.framing_id(adds_eos, EOS_ID, vocabulary.eos_id, eos_wanted_by)?;
        Ok(Self { file, inner, vocab_size, bos, eos })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::Value;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};

    use super::super::tests::{CONFIG, TOKENIZER, golden, source, tokenizer};
    use super::super::{ChatTemplate, Message, Role};
    use super::*;

    /// The golden tokenizer as a GGUF file has it.
    pub(in super::super) fn vocabulary() -> GgufVocabulary {
        let json: Value = serde_json::from_slice(TOKENIZER).unwrap();
        let config: Value = serde_json::from_slice(CONFIG).unwrap();
        let mut tokens = vec![String::new(); 1000];
        let mut token_types = vec![1; 1000];
        for (text, id) in json["model"]["vocab"].as_object().unwrap() {
            tokens[id.as_u64().unwrap() as usize] = text.clone();
        }
        for token in json["added_tokens"].as_array().unwrap() {
            let id = token["id"].as_u64().unwrap() as usize;
            tokens[id] = token["content"].as_str().unwrap().to_owned();
            token_types[id] = 3;
        }
        let merges = json["model"]["merges"].as_array().unwrap().iter();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        GgufVocabulary {
            file: "m.gguf".into(),
            architecture: "bitnet-b1.58".into(),
            model: "gpt2".into(),
            pre: Some("llama-bpe".into()),
            tokens,
            token_types,
            merges: merges.map(|pair| text(&pair[0]) + " " + &text(&pair[1])).collect(),
            bos_id: Some(992),
            eos_id: Some(996),
            add_bos: Some(true),
            chat_template: Some(text(&config["chat_template"])),
            ..GgufVocabulary::default()
        }
    }

    fn load(vocabulary: &GgufVocabulary) -> Result<Tokenizer> {
        Tokenizer::from_gguf(vocabulary, 1000)
    }

    #[test]
    fn every_golden_text_is_equal() {
        let tokenizer = load(&vocabulary()).unwrap();
        let golden = golden();
        assert_eq!(tokenizer.vocab_size(), golden.vocab_size);
        for case in &golden.cases {
            let text = &case.text;
            assert_eq!(tokenizer.encode(text, true).unwrap(), case.ids_with_bos, "{text:?}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), case.ids, "{text:?}");
            let decode = |skip| tokenizer.decode(&case.ids_with_bos, skip).unwrap();
            assert_eq!(decode(true), case.decode_skip_special, "{text:?}");
            assert_eq!(decode(false), case.decode_keep_special, "{text:?}");
        }
        assert_eq!(tokenizer.encode(&golden.chat.rendered, false).unwrap(), golden.chat.ids);
        let chat = ChatTemplate::from_gguf(&vocabulary(), false).unwrap();
        assert_eq!(chat.render(&golden.chat.messages, true).unwrap(), golden.chat.rendered);
        assert_eq!(tokenizer.special_ids(), super::super::tests::tokenizer().special_ids());
    }

    #[test]
    fn pieces_are_as_in_hugging_face_tokenizers() {
        let json = include_bytes!("../../tests/golden/expected/pre_tokenizers.json");
        let golden: Value = serde_json::from_slice(json).unwrap();
        let texts = golden["texts"].as_array().unwrap();
        let named = golden["pieces"].as_object().unwrap();
        assert_eq!(named.len(), 5);
        for (name, expected) in named {
            let known = PreTokenizer::NAMES.iter().find(|(known, _)| known == name);
            let pre = known.unwrap().1;
            assert_eq!(pre.name(), name);
            // Without the last step, which writes the pieces in the byte alphabet.
            let mut steps = splitter(pre).unwrap().as_ref().to_vec();
            steps.pop();
            let steps = Sequence::new(steps);
            for (text, expected) in texts.iter().zip(expected.as_array().unwrap()) {
                let text = text.as_str().unwrap();
                let mut pieces = PreTokenizedString::from(text);
                steps.pre_tokenize(&mut pieces).unwrap();
                let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
                let pieces: Vec<&str> =
                    pieces.into_iter().map(|piece| piece.0).filter(|p| !p.is_empty()).collect();
                let expected: Vec<&str> =
                    expected.as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
                assert_eq!(pieces, expected, "{name}: {text:?}");
            }
        }
    }

    /// A vocabulary of the byte alphabet and `more`, with a merge for each pair that makes one.
    fn bytes_and(more: &[(&str, i32)], merges: &[&str], pre: &str) -> GgufVocabulary {
        let alphabet = stream::byte_alphabet().map(|c| (c.to_string(), 1));
        let more = more.iter().map(|&(text, kind)| (text.to_owned(), kind));
        let (tokens, token_types) = alphabet.chain(more).unzip();
        GgufVocabulary {
            file: "m.gguf".into(),
            model: "gpt2".into(),
            pre: Some(pre.into()),
            tokens,
            token_types,
            merges: merges.iter().map(|&merge| merge.to_owned()).collect(),
            add_bos: Some(false),
            ..GgufVocabulary::default()
        }
    }

    fn texts(vocabulary: &GgufVocabulary, text: &str) -> Vec<String> {
        let tokenizer = load(vocabulary).unwrap();
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect()
    }

    #[test]
    fn llama_3_takes_whole_pieces_without_merges() {
        let whole = |pre| texts(&bytes_and(&[("abc", 1), ("ab", 1)], &["a b"], pre), "abc");
        assert_eq!(whole("llama-bpe"), ["abc"]);
        assert_eq!(whole("falcon3"), ["abc"]);
        assert_eq!(whole("qwen2"), ["ab", "c"]);
        assert_eq!(whole("gpt-2"), ["ab", "c"]);
    }

    #[test]
    fn the_first_merge_wins() {
        let more = [("ab", 1), ("bc", 1)];
        assert_eq!(texts(&bytes_and(&more, &["b c", "a b"], "gpt-2"), "abc"), ["a", "bc"]);
        // Listed again, a merge keeps its first place.
        let merges = ["b c", "a b", "b c"];
        assert_eq!(texts(&bytes_and(&more, &merges, "gpt-2"), "abc"), ["a", "bc"]);
    }

    #[test]
    fn qwen_composes_characters() {
        let composed = |pre| {
            let tokenizer = load(&bytes_and(&[], &[], pre)).unwrap();
            tokenizer.decode(&tokenizer.encode("e\u{301}", true).unwrap(), true).unwrap()
        };
        assert_eq!(composed("qwen2"), "\u{e9}");
        assert_eq!(composed("qwen35"), "\u{e9}");
        assert_eq!(composed("llama-bpe"), "e\u{301}");
    }

    #[test]
    fn marked_tokens_are_found_the_longest_first() {
        let more = [("<a", 4), ("<a>", 3), ("<a><b>", 4), ("<c>", 1), ("two words", 4)];
        let vocabulary = bytes_and(&more, &[], "llama-bpe");
        assert_eq!(texts(&vocabulary, "<a><b>"), ["<a><b>"]);
        assert_eq!(texts(&vocabulary, "<a><a"), ["<a>", "<a"]);
        assert_eq!(texts(&vocabulary, "xtwo wordsx"), ["x", "two words", "x"]);
        assert_eq!(texts(&vocabulary, "<c>"), ["<", "c", ">"]);
        let tokenizer = load(&vocabulary).unwrap();
        assert_eq!(tokenizer.special_ids(), [257]);
        assert_eq!(tokenizer.decode(&[256, 257, 260], true).unwrap(), "<atwo words");
    }

    #[test]
    fn unused_tokens_have_no_text() {
        let tokenizer = load(&bytes_and(&[("[PAD256]", 5)], &[], "llama-bpe")).unwrap();
        assert_eq!(tokenizer.decode(&[64, 256], false).unwrap(), "a");
        assert_eq!((tokenizer.token(256), tokenizer.vocab_size()), (None, 257));
    }

    #[test]
    fn a_byte_without_a_token_is_an_error() {
        let mut vocabulary = bytes_and(&[], &[], "llama-bpe");
        vocabulary.tokens[64] = "abc".into();
        let tokenizer = load(&vocabulary).unwrap();
        assert!(tokenizer.encode("bcd", true).is_ok());
        assert!(tokenizer.encode("abc", true).is_ok());
        let error = tokenizer.encode("xax", true).unwrap_err().to_string();
        assert!(error.contains("m.gguf") && error.contains("no token for"), "{error}");
        assert_eq!((tokenizer.token(u32::MAX), tokenizer.token_id("\0")), (None, None));
    }

    #[test]
    fn bos_and_eos_are_put_around() {
        let framed = |change: fn(&mut GgufVocabulary)| {
            let mut vocabulary = GgufVocabulary { add_bos: None, ..vocabulary() };
            change(&mut vocabulary);
            let tokenizer = load(&vocabulary).unwrap();
            assert_eq!(tokenizer.encode("a", false).unwrap(), [64]);
            tokenizer.encode("a", true).unwrap()
        };
        assert_eq!(framed(|_| {}), [992, 64]);
        assert_eq!(framed(|v| v.add_bos = Some(false)), [64]);
        assert_eq!(framed(|v| v.add_eos = Some(true)), [992, 64, 996]);
        assert_eq!(framed(|v| v.pre = Some("qwen2".into())), [64]);
        assert_eq!(framed(|v| v.pre = Some("gpt-2".into())), [64]);
        assert_eq!(framed(|v| (v.pre, v.add_bos) = (Some("falcon".into()), Some(true))), [992, 64]);
    }

    /// The error of the golden vocabulary with one change: one line with the file and a key.
    fn refused(key: &str, change: impl FnOnce(&mut GgufVocabulary)) -> String {
        let mut vocabulary = vocabulary();
        change(&mut vocabulary);
        let error = load(&vocabulary).err().unwrap_or_else(|| panic!("{key}: accepted"));
        assert!(matches!(&error, Error::Config { key: found, .. } if *found == key), "{error}");
        let error = error.to_string();
        assert!(error.starts_with(&format!("m.gguf: {key}: expected ")), "{error}");
        assert!(error.len() < 400 && !error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn inconsistent_vocabularies_are_refused() {
        let contains = |error: String, part: &str| assert!(error.contains(part), "{error}");
        contains(refused(MODEL, |v| v.model = "bert".into()), "gpt2 or llama, found \"bert\"");
        refused(MODEL, |v| v.model.clear());
        refused(MODEL, |v| v.model = "\n".repeat(100_000));
        contains(refused(TOKENS, |v| v.tokens.clear()), "found 0");
        contains(refused(TOKENS, |v| v.tokens.push("x".into())), "1 to 1000 tokens");
        contains(refused(TOKENS, |v| v.tokens[7] = "a".into()), "\"a\" for the ids 7 and 64");
        contains(refused(TOKEN_TYPE, |v| v.token_types.truncate(999)), "found 999");
        contains(refused(TOKEN_TYPE, |v| v.token_types[5] = 0), "found 0 for token 5");
        refused(TOKEN_TYPE, |v| v.token_types[5] = 7);
        refused(TOKEN_TYPE, |v| v.token_types[5] = i32::MIN);
        contains(refused(SCORES, |v| v.scores = vec![0.0; 3]), "found 3");
        contains(refused(BOS_ID, |v| v.bos_id = Some(1000)), "below 1000, the number of tokens");
        contains(refused(BOS_ID, |v| v.bos_id = None), "add_bos_token asks for it, found none");
        refused(BOS_ID, |v| (v.bos_id, v.add_bos) = (None, None));
        refused(EOS_ID, |v| (v.eos_id, v.add_eos) = (None, Some(true)));
        refused(EOS_ID, |v| v.eos_id = Some(u32::MAX));
        refused("tokenizer.ggml.eot_token_id", |v| v.eot_id = Some(1000));
        refused("tokenizer.ggml.unknown_token_id", |v| v.unknown_id = Some(1000));
        refused("tokenizer.ggml.padding_token_id", |v| v.padding_id = Some(1000));
        for wrong in ["", " ", "a", "a ", " b", "a b c", "Ġ  t"] {
            refused(MERGES, |v| v.merges[3] = wrong.into());
        }
        for unknown in ["Ġ zzz", "zzz Ġ", "a #"] {
            contains(refused(MERGES, |v| v.merges[3] = unknown.into()), "as number 3");
        }
        // Of an unused token, nothing can be made.
        refused(MERGES, |v| v.token_types[64] = 5);
        let smaller = Tokenizer::from_gguf(&vocabulary(), 1001).unwrap();
        assert_eq!(smaller.vocab_size(), 1000);
    }

    #[test]
    fn inconsistent_pieces_are_refused() {
        let llama = |v: &mut GgufVocabulary| {
            v.model = "llama".into();
            v.scores = vec![0.0; 1000];
            v.unknown_id = Some(0);
        };
        assert!(
            load(&{
                let mut vocabulary = vocabulary();
                llama(&mut vocabulary);
                vocabulary
            })
            .is_ok()
        );
        let refused = |key, change: fn(&mut GgufVocabulary)| {
            refused(key, |v| {
                llama(v);
                change(v);
            })
        };
        refused(SCORES, |v| v.scores.clear());
        refused(SCORES, |v| v.scores[9] = f32::NAN);
        refused(SCORES, |v| v.scores[9] = f32::INFINITY);
        let error = refused(TOKENS, |v| v.unknown_id = None);
        assert!(error.contains("<0x00>"), "{error}");
        refused(TOKENS, |v| v.token_types[64] = 6);
        refused(BOS_ID, |v| (v.bos_id, v.add_bos) = (None, None));
    }

    #[test]
    fn an_unknown_pre_tokenizer_is_refused() {
        for (name, found) in [
            (Some("deepseek-llm"), "\"deepseek-llm\""),
            (Some("default"), "\"default\""),
            (Some(""), "\"\""),
            (Some("LLAMA-BPE"), "\"LLAMA-BPE\""),
            (None, "none"),
        ] {
            let error = refused(PRE, |v| v.pre = name.map(str::to_owned));
            assert!(error.ends_with(&format!("found {found}")), "{error}");
            assert!(error.contains("llama-bpe") && error.contains("qwen2"), "{error}");
        }
        for (name, _) in PreTokenizer::NAMES {
            assert!(load(&GgufVocabulary { pre: Some(name.into()), ..vocabulary() }).is_ok());
        }
    }

    /// As many tokens as BitNet b1.58 2B4T has, and no name of a pre-tokenizer, as in its file.
    fn bitnet_2b4t(architecture: &str, pre: Option<&str>) -> GgufVocabulary {
        let mut vocabulary = bytes_and(&[], &[], "");
        let more = (256..128_256).map(|id| format!("<|{id}|>"));
        vocabulary.tokens.extend(more);
        vocabulary.token_types.clear();
        vocabulary.pre = pre.map(str::to_owned);
        vocabulary.architecture = architecture.into();
        (vocabulary.add_bos, vocabulary.bos_id) = (Some(true), Some(128_000));
        vocabulary
    }

    #[test]
    fn the_published_2b4t_needs_no_name() {
        for architecture in ["bitnet-b1.58", "bitnet-25", "bitnet"] {
            for pre in [None, Some("default")] {
                let vocabulary = bitnet_2b4t(architecture, pre);
                assert_eq!(vocabulary.pre_tokenizer().unwrap(), PreTokenizer::Llama3);
                let notes = vocabulary.notes(false);
                assert!(notes.len() == 1 && notes[0].contains("llama-bpe"), "{notes:?}");
            }
        }
        let vocabulary = bitnet_2b4t("bitnet-b1.58", None);
        let tokenizer = Tokenizer::from_gguf(&vocabulary, 128_256).unwrap();
        assert_eq!(tokenizer.encode("a", true).unwrap(), [128_000, 64]);
        assert!(bitnet_2b4t("llama", None).pre_tokenizer().is_err());
        assert!(bitnet_2b4t("bitnet", Some("other")).pre_tokenizer().is_err());
        assert!(bitnet_2b4t("bitnet", Some("gpt-2")).notes(false).is_empty());
        let mut other = bitnet_2b4t("bitnet", None);
        other.tokens.pop();
        assert!(other.pre_tokenizer().is_err() && other.notes(false).is_empty());
    }

    #[test]
    fn the_placeholder_template_of_2b4t_is_replaced() {
        // As convert-ms-to-gguf-bitnet.py writes it.
        let placeholder = "{% for message in messages %}{% if loop.first %}{{ bos_token }}\
            {% endif %}{% if message['role'] == 'user' %}{{ 'Human: ' + message['content'] + \
            '\n\nBITNETAssistant: ' + eos_token }}{% elif message['role'] == 'assistant' %}\
            {{ message['content'] + eos_token }}{% endif %}{% endfor %}";
        let messages = [Message::new(Role::User, " Hi\n")];
        let render = |architecture: &str, template: &str, is_2b4t| {
            let vocabulary = GgufVocabulary {
                architecture: architecture.into(),
                chat_template: Some(template.into()),
                ..vocabulary()
            };
            let chat = ChatTemplate::from_gguf(&vocabulary, is_2b4t).unwrap();
            (chat.render(&messages, true).unwrap(), vocabulary.notes(is_2b4t))
        };
        for (architecture, is_2b4t) in [("bitnet-b1.58", false), ("bitnet-25", true)] {
            let (text, notes) = render(architecture, placeholder, is_2b4t);
            assert_eq!(text, "<|begin_of_text|>User: Hi<|eot_id|>Assistant: ");
            assert!(notes.len() == 1 && notes[0].contains("tokenizer.chat_template"), "{notes:?}");
            let (text, notes) = render(architecture, "{{ eos_token }}!", is_2b4t);
            assert_eq!((text.as_str(), notes.len()), ("<|eot_id|>!", 0));
        }
        let (text, notes) = render("bitnet-25", placeholder, false);
        assert!(text.contains("BITNETAssistant") && notes.is_empty());
        let none = GgufVocabulary { chat_template: None, ..vocabulary() };
        assert!(ChatTemplate::from_gguf(&none, true).is_none());
    }

    #[test]
    fn the_template_of_2b4t_is_as_published() {
        let vocabulary =
            GgufVocabulary { chat_template: Some("BITNETAssistant".into()), ..vocabulary() };
        let chat = ChatTemplate::from_gguf(&vocabulary, true).unwrap();
        let golden = golden().chat;
        assert_eq!(chat.render(&golden.messages, true).unwrap(), golden.rendered);
        assert_eq!(chat.render(&golden.messages, false).unwrap(), golden.rendered_no_gen);
    }

    #[test]
    fn texts_end_at_eos_eot_and_known_names() {
        let stop = |change: fn(&mut GgufVocabulary)| {
            let mut vocabulary = vocabulary();
            change(&mut vocabulary);
            vocabulary.stop_ids(&load(&vocabulary).unwrap())
        };
        // 993 and 996 are <|end_of_text|> and <|eot_id|>.
        assert_eq!(stop(|_| {}), [993, 996]);
        assert_eq!(stop(|v| (v.eos_id, v.eot_id) = (Some(5), Some(999))), [5, 993, 996, 999]);
        assert_eq!(stop(|v| v.eos_id = None), [993, 996]);
        assert_eq!(stop(|v| v.token_types[993] = 1), [996]);
        for (id, name) in [(994, "<|im_end|>"), (995, "<|endoftext|>"), (997, "</s>")] {
            let mut vocabulary = vocabulary();
            vocabulary.tokens[id] = name.into();
            let stop = vocabulary.stop_ids(&load(&vocabulary).unwrap());
            assert!(stop.contains(&(id as u32)), "{name}: {stop:?}");
        }
        let from_files = super::super::stop_ids(&tokenizer(), &[source(CONFIG)], 1000).unwrap();
        assert_eq!(stop(|_| {}), from_files);
    }

    #[test]
    fn long_texts_are_cut_to_their_end() {
        // More steps back than a regular expression may take, were it to take one for each space.
        let tokenizer = load(&bytes_and(&[("Ġx", 1)], &["Ġ x"], "llama-bpe")).unwrap();
        for unit in [" ", "\n", " \n", "a", "'s"] {
            let text = unit.repeat(1_100_000 / unit.len()) + " x";
            let ids = tokenizer.encode(&text, true).unwrap();
            assert_eq!(ids.last(), Some(&256), "{unit:?}");
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{unit:?}");
        }
    }

    #[test]
    fn tokens_that_start_all_alike_take_little_time() {
        let lengths = 1..1000;
        let tokens: Vec<String> = lengths.map(|length| "a".repeat(length)).collect();
        let with = |model: &str, kind| GgufVocabulary {
            model: model.into(),
            pre: Some("qwen2".into()),
            token_types: vec![kind; 999],
            scores: vec![0.0; 999],
            unknown_id: Some(0),
            add_bos: Some(false),
            tokens: tokens.clone(),
            ..GgufVocabulary::default()
        };
        let text = "a".repeat(200_000);
        for vocabulary in [with("llama", 1), with("llama", 3), with("gpt2", 4)] {
            let ids = load(&vocabulary).unwrap().encode(&text, false).unwrap();
            assert!(ids.len() < 300, "{}", ids.len());
        }
    }

    #[test]
    fn random_vocabularies_do_no_harm() {
        let mut random = crate::random::Random::new(5);
        let mut loaded = 0;
        for _ in 0..2000 {
            let mut pick = |n| random.below(n);
            let words =
                ["a", "b", "ab", "Ġ", "▁", "<0x41>", "<s>", "é", "", "\0", " ", "a b", "abab"];
            let n = pick(14);
            let mut tokens: Vec<String> = words.iter().map(|&w| w.to_owned()).collect();
            for _ in 0..20 {
                let (i, j) = (pick(13), pick(13));
                tokens.swap(i, j);
            }
            tokens.truncate(n);
            let types = if pick(3) == 0 { 0 } else { n };
            let id = |k: usize| (k < 8).then_some(k as u32);
            let vocabulary = GgufVocabulary {
                file: "m.gguf".into(),
                architecture: "llama".into(),
                model: ["gpt2", "llama"][pick(2)].into(),
                pre: Some(PreTokenizer::NAMES[pick(9)].0.into()),
                token_types: (0..types).map(|_| [1, 1, 1, 2, 3, 4, 5, 6][pick(8)]).collect(),
                scores: (0..n).map(|_| [-0.0, 0.0, 1.0, -3.4e38][pick(4)]).collect(),
                merges: (0..pick(2)).map(|_| ["a b", "ab ab"][pick(2)].to_owned()).collect(),
                bos_id: id(pick(16)),
                eos_id: id(pick(16)),
                unknown_id: id(pick(10)),
                add_bos: [None, Some(false), Some(true)][pick(3)],
                add_eos: [None, Some(false), Some(true)][pick(3)],
                add_space_prefix: [None, Some(false), Some(true)][pick(3)],
                tokens,
                ..GgufVocabulary::default()
            };
            let Ok(tokenizer) = load(&vocabulary) else { continue };
            loaded += 1;
            if let Ok(ids) = tokenizer.encode("abab ab<s>é\0 a b▁<0x41>", true) {
                assert!(ids.iter().all(|&id| (id as usize) < n), "{vocabulary:?}");
                tokenizer.decode(&ids, false).unwrap();
            }
            let ids: Vec<u32> = (0..20).chain([u32::MAX]).collect();
            let mut stream = tokenizer.stream(&[]).unwrap();
            let streamed: String = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
            let streamed = streamed + &stream.finish().unwrap();
            assert_eq!(streamed, tokenizer.decode(&ids, true).unwrap(), "{vocabulary:?}");
        }
        assert!(loaded > 300, "{loaded}");
    }
}
