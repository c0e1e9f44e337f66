//! SentencePiece BPE: pieces with scores, as Llama 1 and 2 have them (google/sentencepiece,
//! `bpe_model.cc`; llama.cpp, `llm_tokenizer_spm`).
//!
//! ```text
//! write U+2581 for each space, one more in front; cut into characters
//! while two neighbours together are a piece:
//!     join those whose piece has the highest score, the leftmost on ties
//! what is no piece becomes its bytes, or the unknown token
//! ```
//!
//! That is not a BPE by merge ranks: all pairs that make one piece have the same score, and between
//! those the place in the text decides. So the `tokenizers` crate's model does not fit.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use aho_corasick::{AhoCorasick, MatchKind};

use super::gguf::TokenKind;

/// What a piece has for a space.
const SPACE: &str = "\u{2581}";

/// One entry of the vocabulary.
pub(super) struct Piece {
    pub(super) text: String,
    pub(super) kind: TokenKind,
    /// Finite.
    pub(super) score: f32,
}

/// A vocabulary of scored pieces.
pub(super) struct SentencePiece {
    /// By id.
    pieces: Vec<Piece>,
    ids: HashMap<String, u32>,
    /// The longest piece that merging may give; no candidate beyond it needs a look-up.
    longest_bytes: usize,
    /// Finds special and user-defined tokens; a pattern's index is that of its id in `marked_ids`.
    marked: Option<AhoCorasick>,
    marked_ids: Vec<u32>,
    fallback: Fallback,
    space_prefix: bool,
}

/// What a character without a piece becomes.
pub(super) enum Fallback {
    /// The token of each of its bytes.
    Bytes(Box<[u32; 256]>),
    /// The unknown token, once for a run of them.
    Unknown(u32),
}

impl SentencePiece {
    /// From pieces whose texts differ. `None` if the special tokens are too much for the matcher.
    pub(super) fn new(pieces: Vec<Piece>, fallback: Fallback, space_prefix: bool) -> Option<Self> {
        let with_ids = || (0u32..).zip(&pieces);
        let marked = with_ids().filter(|(_, piece)| piece.is_marked());
        let (marked_ids, texts): (Vec<u32>, Vec<&str>) =
            marked.map(|(id, piece)| (id, piece.text.as_str())).unzip();
        let marked = match texts.as_slice() {
            [] => None,
            texts => {
                let mut builder = AhoCorasick::builder();
                builder.match_kind(MatchKind::LeftmostLongest);
                Some(builder.build(texts).ok()?)
            }
        };
        let merged = pieces.iter().filter(|piece| piece.may_be_merged());
        Some(Self {
            longest_bytes: merged.map(|piece| piece.text.len()).max().unwrap_or_default(),
            ids: with_ids().map(|(id, piece)| (piece.text.clone(), id)).collect(),
            pieces,
            marked,
            marked_ids,
            fallback,
            space_prefix,
        })
    }

    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut start = 0;
        for found in self.marked.iter().flat_map(|marked| marked.find_iter(text)) {
            self.encode_plain(&text[start..found.start()], &mut ids);
            ids.push(self.marked_ids[found.pattern().as_usize()]);
            start = found.end();
        }
        self.encode_plain(&text[start..], &mut ids);
        ids
    }

    pub(super) fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            self.append_bytes(id, skip_special, &mut bytes);
        }
        let prefix = if self.space_prefix { " " } else { "" }.as_bytes();
        String::from_utf8_lossy(bytes.strip_prefix(prefix).unwrap_or(&bytes)).into_owned()
    }

    pub(super) fn special_ids(&self) -> Vec<u32> {
        let special = (0u32..).zip(&self.pieces).filter(|(_, piece)| piece.is_special());
        special.map(|(id, _)| id).collect()
    }

    /// The bytes of a token: none for an id without one, or a special one that is to be skipped.
    pub(super) fn append_bytes(&self, id: u32, skip_special: bool, bytes: &mut Vec<u8>) {
        let Some(piece) = self.piece(id) else { return };
        match piece.kind {
            TokenKind::Control | TokenKind::Unknown if skip_special => {}
            TokenKind::Control | TokenKind::Unknown => bytes.extend(piece.text.bytes()),
            TokenKind::Byte => bytes.extend(byte_of(&piece.text)),
            TokenKind::Normal | TokenKind::UserDefined | TokenKind::Unused => {
                bytes.extend(piece.text.replace(SPACE, " ").bytes());
            }
        }
    }

    /// Whether all of these ids together are no text, special tokens aside.
    pub(super) fn is_empty_text(&self, ids: &[u32]) -> bool {
        let mut bytes = Vec::new();
        ids.iter().all(|&id| {
            self.append_bytes(id, true, &mut bytes);
            bytes.is_empty()
        })
    }

    /// Whether the first space of a text is one that encoding had put there.
    pub(super) fn space_prefix(&self) -> bool {
        self.space_prefix
    }

    pub(super) fn piece(&self, id: u32) -> Option<&Piece> {
        self.pieces.get(usize::try_from(id).ok()?)
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.ids.get(text).copied()
    }

    /// Encodes text between special tokens; each such stretch starts with a space of its own, as in
    /// llama.cpp.
    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) {
        if text.is_empty() {
            return;
        }
        let prefix = if self.space_prefix { SPACE } else { "" };
        let text = prefix.to_owned() + &text.replace(' ', SPACE);
        let mut merging = Merging::new(self, &text);
        merging.run();
        let Merging { symbols, unused_splits, .. } = merging;

        let mut last_unknown = None;
        // Pieces that are to be avoided are taken apart again, as they were put together.
        let mut pending: Vec<&str> = Vec::new();
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            pending.push(&text[symbol.start..symbol.start + symbol.len]);
            while let Some(text) = pending.pop() {
                match (self.mergeable(text), unused_splits.get(text)) {
                    (Some((_, TokenKind::Unused)), Some(&at)) => {
                        pending.extend([&text[at..], &text[..at]]);
                    }
                    (Some((id, _)), _) => ids.push(id),
                    (None, _) => match &self.fallback {
                        Fallback::Bytes(of) => {
                            ids.extend(text.bytes().map(|byte| of[usize::from(byte)]));
                        }
                        Fallback::Unknown(id) => {
                            if last_unknown != Some(ids.len()) {
                                ids.push(*id);
                            }
                            last_unknown = Some(ids.len());
                        }
                    },
                }
            }
        }
    }

    fn mergeable(&self, text: &str) -> Option<(u32, TokenKind)> {
        if text.len() > self.longest_bytes {
            return None;
        }
        let id = self.id(text)?;
        let piece = self.piece(id)?;
        piece.may_be_merged().then_some((id, piece.kind))
    }
}

impl Piece {
    /// Whether this is no part of the text.
    pub(super) fn is_special(&self) -> bool {
        matches!(self.kind, TokenKind::Control | TokenKind::Unknown)
    }

    /// Whether the text of a prompt may spell this token out.
    fn is_marked(&self) -> bool {
        (self.is_special() || self.kind == TokenKind::UserDefined) && !self.text.is_empty()
    }

    fn may_be_merged(&self) -> bool {
        matches!(self.kind, TokenKind::Normal | TokenKind::Unused)
    }
}

/// The byte of a token `<0x0A>`.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// A piece of the text: a character at first. `len` 0: joined to one on its left.
#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    /// Neighbours that are left; [`NONE`] at the ends.
    previous: usize,
    next: usize,
}

const NONE: usize = usize::MAX;

/// Two neighbours that are a piece together, unless one of them has changed since.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        // Scores are finite.
        let by_score = self.score.partial_cmp(&other.score).unwrap_or(Ordering::Equal);
        by_score.then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

struct Merging<'a> {
    vocabulary: &'a SentencePiece,
    text: &'a str,
    symbols: Vec<Symbol>,
    candidates: BinaryHeap<Candidate>,
    /// Where the unused pieces that were candidates join.
    unused_splits: HashMap<&'a str, usize>,
}

impl<'a> Merging<'a> {
    fn new(vocabulary: &'a SentencePiece, text: &'a str) -> Self {
        let characters = text.char_indices().enumerate();
        let mut symbols: Vec<Symbol> = characters
            .map(|(index, (start, character))| Symbol {
                start,
                len: character.len_utf8(),
                previous: index.checked_sub(1).unwrap_or(NONE),
                next: index + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        let (candidates, unused_splits) = (BinaryHeap::new(), HashMap::new());
        Self { vocabulary, text, symbols, candidates, unused_splits }
    }

    fn run(&mut self) {
        for right in 1..self.symbols.len() {
            self.consider(right - 1, right);
        }
        while let Some(Candidate { left, right, len, .. }) = self.candidates.pop() {
            let (a, b) = (self.symbols[left], self.symbols[right]);
            if a.len == 0 || b.len == 0 || a.len + b.len != len {
                continue;
            }
            self.symbols[left].len = len;
            self.symbols[left].next = b.next;
            self.symbols[right].len = 0;
            if b.next != NONE {
                self.symbols[b.next].previous = left;
                self.consider(left, b.next);
            }
            if a.previous != NONE {
                self.consider(a.previous, left);
            }
        }
    }

    fn consider(&mut self, left: usize, right: usize) {
        let (a, b) = (self.symbols[left], self.symbols[right]);
        let len = a.len + b.len;
        let text = &self.text[a.start..a.start + len];
        let Some((id, kind)) = self.vocabulary.mergeable(text) else { return };
        let Some(piece) = self.vocabulary.piece(id) else { return };
        self.candidates.push(Candidate { score: piece.score, left, right, len });
        if kind == TokenKind::Unused {
            self.unused_splits.insert(text, a.len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{GgufVocabulary, Tokenizer};
    use super::*;
    use crate::random::Random;

    /// Vocabularies of Google's SentencePiece, and what it encodes (`tests/golden/README.md`).
    #[derive(serde::Deserialize)]
    struct Golden {
        texts: Vec<String>,
        vocabularies: HashMap<String, Vocabulary>,
    }

    #[derive(serde::Deserialize)]
    struct Vocabulary {
        tokens: Vec<String>,
        scores: Vec<f32>,
        types: Vec<i32>,
        ids: Vec<Vec<u32>>,
        decoded: Vec<String>,
    }

    fn golden() -> Golden {
        let json = include_bytes!("../../tests/golden/expected/sentencepiece.json");
        serde_json::from_slice(json).unwrap()
    }

    fn tokenizer(tokens: Vec<String>, token_types: Vec<i32>, scores: Vec<f32>) -> Tokenizer {
        let vocabulary = GgufVocabulary {
            model: "llama".into(),
            bos_id: Some(1),
            eos_id: Some(2),
            tokens,
            token_types,
            scores,
            ..GgufVocabulary::default()
        };
        Tokenizer::from_gguf(&vocabulary, vocabulary.tokens.len()).unwrap()
    }

    fn bytes() -> Tokenizer {
        let vocabulary = golden().vocabularies.remove("bytes").unwrap();
        tokenizer(vocabulary.tokens, vocabulary.types, vocabulary.scores)
    }

    #[test]
    fn every_text_is_as_in_sentencepiece() {
        let Golden { texts, vocabularies } = golden();
        assert_eq!(vocabularies.len(), 4);
        for (name, vocabulary) in vocabularies {
            let Vocabulary { tokens, scores, types, ids, decoded } = vocabulary;
            let tokenizer = tokenizer(tokens, types, scores);
            assert_eq!((texts.len(), texts.len()), (ids.len(), decoded.len()));
            for ((text, ids), decoded) in texts.iter().zip(ids).zip(decoded) {
                assert_eq!(tokenizer.encode(text, false).unwrap(), ids, "{name}: {text:?}");
                // It writes its unknown token as " ⁇ ", we as nothing.
                if !decoded.contains('\u{2047}') {
                    assert_eq!(tokenizer.decode(&ids, true).unwrap(), decoded, "{name}: {text:?}");
                }
            }
        }
    }

    /// The algorithm word for word: look at all pairs, join the best, again.
    fn naive(pieces: &HashMap<String, (u32, f32)>, text: &str) -> Vec<u32> {
        let text = format!("\u{2581}{}", text.replace(' ', "\u{2581}"));
        let mut symbols: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(usize, f32)> = None;
            for at in 1..symbols.len() {
                let joined = symbols[at - 1].clone() + &symbols[at];
                if let Some(&(_, score)) = pieces.get(&joined)
                    && best.is_none_or(|(_, other)| score > other)
                {
                    best = Some((at, score));
                }
            }
            let Some((at, _)) = best else { break };
            let right = symbols.remove(at);
            symbols[at - 1] += &right;
        }
        symbols.iter().map(|symbol| pieces[symbol].0).collect()
    }

    #[test]
    fn merging_is_greedy_by_score_then_place() {
        let mut random = Random::new(11);
        let alphabet = ["a", "b", "\u{2581}"];
        let word = |random: &mut Random, longest: usize| -> String {
            let len = 1 + random.below(longest);
            (0..len).map(|_| alphabet[random.below(3)]).collect()
        };
        for case in 0..300 {
            let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
            tokens.extend(alphabet.map(String::from));
            for _ in 0..20 {
                let token = word(&mut random, 5);
                if !tokens.contains(&token) {
                    tokens.push(token);
                }
            }
            // Few scores, so that many are equal.
            let scores: Vec<f32> = tokens.iter().map(|_| -(random.below(4) as f32)).collect();
            let mut types = vec![1; tokens.len()];
            types[..3].copy_from_slice(&[2, 3, 3]);
            let named = tokens.iter().zip(&scores).enumerate().skip(3);
            let pieces =
                named.map(|(id, (text, &score))| (text.clone(), (id as u32, score))).collect();
            let tokenizer = tokenizer(tokens, types, scores);
            for _ in 0..20 {
                let text = word(&mut random, 30).replace('\u{2581}', " ");
                let ids = tokenizer.encode(&text, false).unwrap();
                assert_eq!(ids, naive(&pieces, &text), "case {case}: {text:?}");
                assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "case {case}");
            }
        }
    }

    #[test]
    fn special_tokens_are_found_in_text() {
        let tokenizer = bytes();
        let [unk, bos, eos] =
            ["<unk>", "<s>", "</s>"].map(|t| tokenizer.special_token_id(t).unwrap());
        assert_eq!(tokenizer.special_ids(), [unk, bos, eos]);
        assert_eq!(tokenizer.encode("", true).unwrap(), [bos]);
        assert_eq!(tokenizer.encode("<s></s>", true).unwrap(), [bos, bos, eos]);
        let the = tokenizer.token_id("\u{2581}the").unwrap();
        // As llama.cpp has it: what follows a special token starts with a space, too.
        assert_eq!(tokenizer.encode("the</s>the", true).unwrap(), [bos, the, eos, the]);
        assert_eq!(tokenizer.decode(&[bos, the, eos, the], true).unwrap(), "the the");
        assert_eq!(tokenizer.decode(&[bos, the, eos], false).unwrap(), "<s> the</s>");
        assert_eq!(tokenizer.decode(&[the, 99_999], true).unwrap(), "the");
        assert_eq!(tokenizer.token(the).as_deref(), Some("\u{2581}the"));
        assert_eq!((tokenizer.token(99_999), tokenizer.token_id("no such")), (None, None));
        assert_eq!(tokenizer.special_token_id("a"), None);
    }

    #[test]
    fn the_space_in_front_can_be_off() {
        let Vocabulary { mut tokens, mut types, mut scores, .. } =
            golden().vocabularies.remove("bytes").unwrap();
        tokens.push("a word".into());
        types.push(4);
        scores.push(0.0);
        let vocabulary = GgufVocabulary {
            model: "llama".into(),
            tokens,
            token_types: types,
            scores,
            add_space_prefix: Some(false),
            add_bos: Some(false),
            ..GgufVocabulary::default()
        };
        let tokenizer = Tokenizer::from_gguf(&vocabulary, 601).unwrap();
        for text in ["the theme", " the", "  x", "", "\u{1f680}"] {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
        }
        let ids = tokenizer.encode("xa wordx", true).unwrap();
        let x = tokenizer.token_id("x").unwrap();
        assert_eq!(ids, [x, 600, x]);
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "xa wordx");
        assert_eq!(tokenizer.special_token_id("a word"), None);
    }

    #[test]
    fn texts_stream_as_they_decode() {
        let tokenizer = bytes();
        for text in golden().texts {
            for ids in
                [tokenizer.encode(&text, true).unwrap(), tokenizer.encode(&text, false).unwrap()]
            {
                let mut stream = tokenizer.stream(&[]).unwrap();
                let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
                let streamed = pieces.concat() + &stream.finish().unwrap();
                assert_eq!(streamed, tokenizer.decode(&ids, true).unwrap(), "{text:?}");
            }
        }
        // A text that continues another one keeps its first space; after a BOS alone it begins.
        let the = tokenizer.token_id("\u{2581}the").unwrap();
        assert_eq!(tokenizer.stream(&[1, the]).unwrap().push(the).unwrap(), " the");
        assert_eq!(tokenizer.stream(&[1]).unwrap().push(the).unwrap(), "the");
        let mut stream = tokenizer.stream(&[1]).unwrap();
        let space = tokenizer.token_id("\u{2581}").unwrap();
        let rocket = tokenizer.encode("\u{1f680}", false).unwrap();
        assert_eq!(rocket[0], space);
        let pieces: Vec<String> = rocket.iter().map(|&id| stream.push(id).unwrap()).collect();
        assert_eq!(pieces, ["", "", "", "", "\u{1f680}"]);
    }

    #[test]
    fn long_texts_take_little_time() {
        let tokenizer = bytes();
        let text = "a".repeat(300_000) + &" ".repeat(300_000);
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }

    #[test]
    fn bytes_have_tokens() {
        assert_eq!(byte_of("<0x0A>"), Some(10));
        assert_eq!(byte_of("<0xff>"), Some(255));
        for wrong in ["", "<0x>", "<0x0>", "<0x00A>", "<0x0G>", "<0x+1>", "0x0A", "<0xé>", "<0x0A"]
        {
            assert_eq!(byte_of(wrong), None, "{wrong}");
        }
    }
}
