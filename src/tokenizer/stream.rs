//! Decoding token by token, without broken characters.
//!
//! The pieces concatenate to the text that decoding all tokens at once gives, and each byte is
//! handed out as soon as it belongs to a whole character.

use tokenizers::DecoderWrapper;

use super::{Inner, Tokenizer};
use crate::error::Result;

/// Turns one token after another into text; holds back the bytes of an unfinished character.
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    state: State,
}

enum State {
    /// Byte-level BPE and SentencePiece of a GGUF file: a token is a string of bytes, at most three
    /// of which wait for the rest of their character. `drop_space`: the text has not begun yet, and
    /// its first space is none of it.
    Bytes { waiting: Vec<u8>, drop_space: bool },
    /// Any other decoder: a token's text may depend on its neighbours. `tokens[..read]` have been
    /// handed out, and are kept as context for the others, which wait.
    Window { tokens: Vec<u32>, read: usize },
}

/// Context that a non-byte-level decoder may look back on.
const CONTEXT_TOKENS: usize = 8;
/// A character has at most four bytes, so at most four tokens: whatever waits longer is invalid.
const MAX_WAITING_TOKENS: usize = 4;

impl<'a> DecodeStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer, context: &[u32]) -> Result<Self> {
        let decoder = match &tokenizer.inner {
            Inner::HuggingFace { tokenizer, .. } => tokenizer.get_decoder(),
            Inner::SentencePiece(pieces) => {
                let drop_space = pieces.space_prefix() && pieces.is_empty_text(context);
                let waiting = Vec::with_capacity(64);
                return Ok(Self { tokenizer, state: State::Bytes { waiting, drop_space } });
            }
        };
        let state = match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => {
                State::Bytes { waiting: Vec::with_capacity(64), drop_space: false }
            }
            _ => {
                let tokens = context[context.len().saturating_sub(CONTEXT_TOKENS)..].to_vec();
                State::Window { read: tokens.len(), tokens }
            }
        };
        Ok(Self { tokenizer, state })
    }

    /// The text that `token` completes; often the token's own, sometimes nothing.
    ///
    /// # Errors
    /// [`crate::Error::Tokenizer`] if the file's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String> {
        match &mut self.state {
            State::Bytes { waiting, drop_space } => {
                self.tokenizer.append_bytes(token, waiting);
                if *drop_space && !waiting.is_empty() {
                    *drop_space = false;
                    if waiting.starts_with(b" ") {
                        waiting.remove(0);
                    }
                }
                Ok(take_characters(waiting))
            }
            State::Window { tokens, .. } => {
                tokens.push(token);
                self.advance_window(false)
            }
        }
    }

    /// What still waits, with U+FFFD for what is no character.
    ///
    /// # Errors
    /// [`crate::Error::Tokenizer`] if the file's decoder fails.
    pub fn finish(mut self) -> Result<String> {
        self.flush()
    }

    pub(crate) fn flush(&mut self) -> Result<String> {
        match &mut self.state {
            State::Bytes { waiting, .. } => {
                Ok(String::from_utf8_lossy(&std::mem::take(waiting)).into_owned())
            }
            State::Window { .. } => self.advance_window(true),
        }
    }

    /// Hands out the text of the waiting tokens: what they add to the text of the tokens before.
    fn advance_window(&mut self, at_end: bool) -> Result<String> {
        let State::Window { tokens, read } = &mut self.state else { return Ok(String::new()) };
        let before = self.tokenizer.decode(&tokens[..*read], true)?;
        let after = self.tokenizer.decode(tokens, true)?;
        let unfinished = after.ends_with('\u{fffd}') && tokens.len() - *read < MAX_WAITING_TOKENS;
        if unfinished && !at_end {
            return Ok(String::new());
        }
        // A decoder that rewrites what it gave before cannot be followed; none known does.
        let piece = after.get(before.len()..).unwrap_or_default().to_owned();
        if !piece.is_empty() || tokens.len() > 2 * CONTEXT_TOKENS {
            tokens.drain(..tokens.len().saturating_sub(CONTEXT_TOKENS).min(*read));
            *read = tokens.len();
        }
        Ok(piece)
    }
}

/// Takes all whole characters, and U+FFFD for each invalid sequence, as
/// [`String::from_utf8_lossy`] would; leaves the start of a character that may yet be completed.
fn take_characters(waiting: &mut Vec<u8>) -> String {
    let mut text = String::with_capacity(waiting.len());
    let mut taken = 0;
    for chunk in waiting.utf8_chunks() {
        text.push_str(chunk.valid());
        taken += chunk.valid().len();
        let is_last = taken + chunk.invalid().len() == waiting.len();
        if is_last && may_be_completed(chunk.invalid()) {
            break;
        }
        if !chunk.invalid().is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            taken += chunk.invalid().len();
        }
    }
    waiting.drain(..taken);
    text
}

/// Whether `bytes` are the start of a character, rather than wrong.
fn may_be_completed(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes).is_err_and(|error| error.error_len().is_none())
}

impl Tokenizer {
    /// Appends the bytes of a token; special and unknown tokens have none.
    fn append_bytes(&self, id: u32, bytes: &mut Vec<u8>) {
        let tokenizer = match &self.inner {
            Inner::HuggingFace { tokenizer, .. } => tokenizer,
            Inner::SentencePiece(pieces) => return pieces.append_bytes(id, true, bytes),
        };
        let Some(token) = self.token(id) else { return };
        if tokenizer.get_added_vocabulary().is_special_token(&token) {
            return;
        }
        let start = bytes.len();
        for character in token.chars() {
            match byte_of(character) {
                Some(byte) => bytes.push(byte),
                // An added token that is spelled as plain text, not in the byte alphabet.
                None => {
                    bytes.truncate(start);
                    bytes.extend_from_slice(token.as_bytes());
                    return;
                }
            }
        }
    }
}

/// The byte that a character of the byte-level alphabet stands for (GPT-2, `bytes_to_unicode`):
/// the printable characters of Latin-1 stand for themselves; the other 68 bytes, in order, are
/// U+0100 and up.
fn byte_of(character: char) -> Option<u8> {
    match u32::from(character) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The byte-level alphabet.
pub(super) fn byte_alphabet() -> impl Iterator<Item = char> {
    (0..=0x143).filter_map(char::from_u32).filter(|&character| byte_of(character).is_some())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{golden, source, tokenizer};
    use super::*;

    fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> (Vec<String>, String) {
        let mut stream = tokenizer.stream(&[]).unwrap();
        let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        let text = pieces.concat() + &stream.finish().unwrap();
        (pieces, text)
    }

    #[test]
    fn pieces_concatenate_to_the_whole() {
        let tokenizer = tokenizer();
        for case in golden().cases {
            let (_, text) = stream(&tokenizer, &case.ids_with_bos);
            assert_eq!(text, case.decode_skip_special);
        }
        // Random ids: mostly invalid UTF-8, with special tokens and ids without a token between.
        let mut state = 1u32;
        for _ in 0..300 {
            let mut id = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // The first 256 tokens are single bytes.
                (state >> 8) % if state & 128 == 0 { 256 } else { 1010 }
            };
            let ids: Vec<u32> = (0..40).map(|_| id()).collect();
            let (_, text) = stream(&tokenizer, &ids);
            assert_eq!(text, tokenizer.decode(&ids, true).unwrap(), "{ids:?}");
        }
    }

    #[test]
    fn characters_come_whole_and_at_once() {
        let tokenizer = tokenizer();
        let byte = |byte: u8| (0..256).find(|&id| bytes_of(&tokenizer, id) == [byte]).unwrap();
        let ids = |bytes: &[u8]| bytes.iter().map(|&b| byte(b)).collect::<Vec<_>>();
        let (pieces, text) = stream(&tokenizer, &ids("a🙂é".as_bytes()));
        assert_eq!(pieces, ["a", "", "", "", "🙂", "", "é"]);
        assert_eq!(text, "a🙂é");
        // An invalid byte is reported when it is certain, not at the end of the text.
        let (pieces, _) = stream(&tokenizer, &ids(b"\xf0\x9fa\xffb\x80"));
        assert_eq!(pieces, ["", "", "\u{fffd}a", "\u{fffd}", "b", "\u{fffd}"]);
        let (pieces, text) = stream(&tokenizer, &ids(b"a\xe2\x82"));
        assert_eq!((pieces.concat().as_str(), text.as_str()), ("a", "a\u{fffd}"));
    }

    fn bytes_of(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        tokenizer.append_bytes(id, &mut bytes);
        bytes
    }

    #[test]
    fn the_byte_alphabet_has_every_byte_once() {
        let mut bytes: Vec<u8> = byte_alphabet().filter_map(byte_of).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!((byte_of('Ġ'), byte_of('Ċ')), (Some(b' '), Some(b'\n')));
    }

    /// A tokenizer of the SentencePiece kind, as Llama 2 has it: `▁` for spaces, bytes as `<0x0A>`,
    /// and one space dropped from the start of a text.
    fn sentencepiece() -> Tokenizer {
        let mut vocab = serde_json::json!({ "<unk>": 0, "▁once": 1, "▁upon": 2, "a": 3, "▁": 4 });
        for byte in 0..256 {
            vocab[format!("<0x{byte:02X}>")] = serde_json::json!(5 + byte);
        }
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [],
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "ByteFallback" },
                { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            ] },
            "model": { "type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>",
                "byte_fallback": true },
        });
        Tokenizer::from_json(source(&serde_json::to_vec(&json).unwrap()), 300).unwrap()
    }

    #[test]
    fn other_decoders_stream_through_a_window() {
        let tokenizer = sentencepiece();
        let bytes = |text: &str| text.bytes().map(|byte| 5 + u32::from(byte)).collect::<Vec<_>>();
        let mut ids = vec![1, 2, 3, 4, 4, 1];
        ids.extend(bytes("🙂é"));
        ids.extend([2; 30]);
        ids.extend(bytes("\n"));
        let (pieces, text) = stream(&tokenizer, &ids);
        assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
        assert_eq!(pieces[..6], ["once", " upon", "a", " ", " ", " once"]);
        assert_eq!(pieces[6..12], ["", "", "", "🙂", "", "é"]);
        // A text that continues another one keeps its first space.
        let mut continued = tokenizer.stream(&[1, 2]).unwrap();
        assert_eq!(continued.push(1).unwrap(), " once");
        // Invalid bytes do not wait for ever.
        let (pieces, _) = stream(&tokenizer, &[5 + 0xff; 50]);
        assert!(pieces.concat().chars().count() >= 40, "{pieces:?}");
    }
}
