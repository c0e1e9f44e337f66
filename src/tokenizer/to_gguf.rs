//! The tokenizer files of a Hugging Face checkpoint as GGUF metadata.
//!
//! GGUF names its pre-tokenizers and has no room for most settings of a `tokenizer.json`: whatever
//! it cannot say is refused, so that what is written means what was read.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Model as _;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

use super::chat::special_tokens;
use super::gguf::{GgufVocabulary, PreTokenizer, TokenKind};
use super::stop::{end_token_ids, eos_ids};
use super::{ChatTemplate, Source, Tokenizer, guarded, quoted, shortened, stop_ids};
use crate::error::{Error, Result};

/// The files of a Hugging Face checkpoint that concern text.
#[derive(Debug, Clone, Copy)]
pub struct HuggingFaceFiles<'a> {
    /// `tokenizer.json`.
    pub tokenizer: Source<'a>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Source<'a>>,
    /// `chat_template.jinja`.
    pub chat_template: Option<Source<'a>>,
    /// Those of `generation_config.json` and `config.json` that there are.
    pub configs: &'a [Source<'a>],
}

#[derive(Deserialize)]
struct TokenizerJson {
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Bpe,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
struct Bpe {
    vocab: HashMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    dropout: Option<f32>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    /// As older files have it.
    Text(String),
}

impl GgufVocabulary {
    /// The metadata that a GGUF file of this checkpoint gets: as many tokens as the model has, ids
    /// without one as unused `[PAD…]`. `file` is that of `tokenizer.json`.
    ///
    /// # Errors
    /// As reading the files for a model; [`Error::Tokenizer`] with the part of them that GGUF
    /// cannot say; or as [`Tokenizer::from_gguf`].
    pub fn from_hugging_face(
        files: HuggingFaceFiles<'_>,
        architecture: &str,
        model_vocab_size: usize,
    ) -> Result<Self> {
        let tokenizer = Tokenizer::from_json(files.tokenizer, model_vocab_size)?;
        let stop_ids = stop_ids(&tokenizer, files.configs, model_vocab_size)?;
        let chat = ChatTemplate::from_files(files.tokenizer_config, files.chat_template)?;

        let file = files.tokenizer.file;
        let json = parse(files.tokenizer)?;
        let pre = pre_tokenizer(file, &json)?;
        check_added(file, &json, &tokenizer)?;
        let (tokens, token_types) = tokens(file, &json, model_vocab_size)?;
        let (before, after) = frame(&json.post_processor).ok_or_else(|| {
            let expected = "a template with at most a token before and one after the text";
            unsupported(file, "post_processor", expected, &json.post_processor)
        })?;

        let config = files.tokenizer_config.map(|source| source.json()).transpose()?;
        let named = special_tokens(&config.unwrap_or_default());
        let id = |name: &str| tokenizer.token_id(named.get(name)?);
        let mut ends = Vec::new();
        for config in files.configs {
            ends.extend(eos_ids(*config, model_vocab_size)?);
        }
        let eos_id = after.or_else(|| id("eos_token")).or(ends.first().copied());
        // The well-known ones need no key; readers find them by name.
        let others = || ends.iter().copied().filter(|&end| Some(end) != eos_id);
        let well_known: Vec<u32> = end_token_ids(&tokenizer).collect();
        let eot_id = others().find(|end| !well_known.contains(end)).or_else(|| others().next());

        let vocabulary = Self {
            file: file.to_owned(),
            architecture: architecture.to_owned(),
            model: "gpt2".to_owned(),
            pre: Some(pre.name().to_owned()),
            tokens,
            token_types,
            scores: Vec::new(),
            merges: json.model.merges.iter().map(Merge::text).collect(),
            bos_id: before.or_else(|| id("bos_token")),
            eos_id,
            eot_id,
            unknown_id: id("unk_token"),
            padding_id: id("pad_token"),
            add_bos: Some(before.is_some()),
            add_eos: Some(after.is_some()),
            add_space_prefix: None,
            chat_template: chat.map(ChatTemplate::into_template),
        };
        let written = Tokenizer::from_gguf(&vocabulary, model_vocab_size)?;
        check_merging(&vocabulary, pre, json.model.ignore_merges)?;
        let kept = vocabulary.stop_ids(&written);
        match stop_ids.iter().find(|id| !kept.contains(id)) {
            None => Ok(vocabulary),
            Some(id) => {
                let problem = format!(
                    "eos_token_id: GGUF has room for two ids beside the well-known ones, \
                     and none is left for {id}"
                );
                Err(Error::Tokenizer { file: file.to_owned(), problem })
            }
        }
    }
}

impl Merge {
    fn text(&self) -> String {
        match self {
            Self::Pair(left, right) => format!("{left} {right}"),
            Self::Text(text) => text.clone(),
        }
    }
}

fn unsupported(file: &str, key: &str, expected: &str, found: &Value) -> Error {
    let found = shortened(&found.to_string(), 250);
    let problem = format!("{key}: GGUF can say {expected}, found {found}");
    Error::Tokenizer { file: file.to_owned(), problem }
}

fn parse(source: Source<'_>) -> Result<TokenizerJson> {
    let file = source.file;
    let json = source.json()?;
    let kind = &json["model"]["type"];
    if kind != "BPE" {
        return Err(unsupported(file, "model.type", "a byte-level BPE", kind));
    }
    let json: TokenizerJson = serde_json::from_value(json)
        .map_err(|source| Error::Json { file: file.to_owned(), source })?;
    let model = &json.model;
    let is_empty = |text: &Option<String>| text.as_deref().unwrap_or_default().is_empty();
    let plain = !model.byte_fallback
        && model.dropout.unwrap_or_default() == 0.0
        && is_empty(&model.continuing_subword_prefix)
        && is_empty(&model.end_of_word_suffix);
    if !plain {
        let problem = "model: GGUF can say a byte-level BPE; found one with byte_fallback, \
                       dropout, continuing_subword_prefix or end_of_word_suffix";
        return Err(Error::Tokenizer { file: file.to_owned(), problem: problem.to_owned() });
    }
    if json.decoder["type"] != "ByteLevel" {
        return Err(unsupported(file, "decoder", "ByteLevel", &json.decoder));
    }
    Ok(json)
}

fn check_added(file: &str, json: &TokenizerJson, tokenizer: &Tokenizer) -> Result<()> {
    for Added { id, content, single_word, lstrip, rstrip, .. } in &json.added_tokens {
        let found = tokenizer.token_id(content);
        let problem = if *single_word || *lstrip || *rstrip {
            "GGUF cannot say single_word, lstrip or rstrip".to_owned()
        } else if found != Some(*id) {
            // The tokenizers crate counts on from the vocabulary, whatever the file says.
            let found = found.map_or("none".to_owned(), |found| found.to_string());
            format!("expected id {id}, as the file has it, found {found}, as it is read")
        } else {
            continue;
        };
        let problem = format!("added token {}: {problem}", quoted(content));
        return Err(Error::Tokenizer { file: file.to_owned(), problem });
    }
    Ok(())
}

/// The texts and kinds of all ids.
fn tokens(file: &str, json: &TokenizerJson, n_tokens: usize) -> Result<(Vec<String>, Vec<i32>)> {
    let refused = |problem: String| Err(Error::Tokenizer { file: file.to_owned(), problem });
    let mut tokens: Vec<Option<(&str, TokenKind)>> = vec![None; n_tokens];
    let plain = json.model.vocab.iter().map(|(text, &id)| (text, id, TokenKind::Normal));
    let added = json.added_tokens.iter().map(|added| {
        let kind = if added.special { TokenKind::Control } else { TokenKind::UserDefined };
        (&added.content, added.id, kind)
    });
    for (text, id, kind) in plain.chain(added) {
        let Some(token) = tokens.get_mut(id as usize) else {
            return refused(format!(
                "token {}: expected an id below {n_tokens}, found {id}",
                quoted(text)
            ));
        };
        if let Some((other, _)) = token.filter(|(other, _)| other != text) {
            let (other, text) = (quoted(other), quoted(text));
            return refused(format!("id {id}: expected one token, found {other} and {text}"));
        }
        *token = Some((text, kind));
    }
    let all = tokens.into_iter().enumerate().map(|(id, token)| match token {
        Some((text, kind)) => (text.to_owned(), kind as i32),
        None => (format!("[PAD{id}]"), TokenKind::Unused as i32),
    });
    Ok(all.unzip())
}

/// The parts of a `Sequence`, or the one that there is.
fn steps<'a>(value: &'a Value, key: &str) -> Vec<&'a Value> {
    match &value[key] {
        Value::Array(list) if value["type"] == "Sequence" => list.iter().collect(),
        _ if value.is_null() => Vec::new(),
        _ => vec![value],
    }
}

/// The pre-tokenizer that cuts a text as this file does.
fn pre_tokenizer(file: &str, json: &TokenizerJson) -> Result<PreTokenizer> {
    let pre = expressions(&json.pre_tokenizer).and_then(|expressions| {
        PreTokenizer::all().find(|pre| pre.expressions() == expressions.as_slice())
    });
    let pre = pre.ok_or_else(|| {
        let names: Vec<&str> = PreTokenizer::all().map(PreTokenizer::name).collect();
        let expected = format!("the expressions of {}", names.join(", "));
        unsupported(file, "pre_tokenizer", &expected, &json.pre_tokenizer)
    })?;
    let normalizers = steps(&json.normalizer, "normalizers");
    let expected = if pre.normalizes() { "NFC" } else { "none" };
    let is_expected = match normalizers.as_slice() {
        [] => !pre.normalizes(),
        [only] => pre.normalizes() && only["type"] == "NFC",
        _ => false,
    };
    if !is_expected {
        let expected = format!("{expected} with the expression of {}", pre.name());
        return Err(unsupported(file, "normalizer", &expected, &json.normalizer));
    }
    Ok(pre)
}

/// The regular expressions of a pre-tokenizer that ends in the byte alphabet.
fn expressions(pre_tokenizer: &Value) -> Option<Vec<&str>> {
    let steps = steps(pre_tokenizer, "pretokenizers");
    let (last, splits) = steps.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] != false {
        return None;
    }
    let mut expressions = Vec::new();
    for split in splits {
        let cuts = split["behavior"] == "Isolated" && split["invert"] == false;
        if split["type"] != "Split" || !cuts {
            return None;
        }
        expressions.push(split["pattern"]["Regex"].as_str()?);
    }
    // Its own expression, unless it says otherwise.
    if last["use_regex"] != false {
        expressions.extend(PreTokenizer::Gpt2.expressions());
    }
    Some(expressions)
}

/// The ids that a post-processor puts before and after a text; `None` if it does anything else.
fn frame(post_processor: &Value) -> Option<(Option<u32>, Option<u32>)> {
    let mut templates = Vec::new();
    for step in steps(post_processor, "processors") {
        match step["type"].as_str()? {
            // Concerns offsets only.
            "ByteLevel" => {}
            "TemplateProcessing" => templates.push(step),
            _ => return None,
        }
    }
    let template = match templates.as_slice() {
        [] => return Some((None, None)),
        [template] => template,
        _ => return None,
    };
    let special = |piece: &Value| {
        let name = piece["SpecialToken"]["id"].as_str()?;
        match template["special_tokens"][name]["ids"].as_array()?.as_slice() {
            [id] => u32::try_from(id.as_u64()?).ok(),
            _ => None,
        }
    };
    let is_text = |piece: &Value| piece["Sequence"]["id"] == "A";
    match template["single"].as_array()?.as_slice() {
        [text] if is_text(text) => Some((None, None)),
        [before, text] if is_text(text) => Some((Some(special(before)?), None)),
        [text, after] if is_text(text) => Some((None, Some(special(after)?))),
        [before, text, after] if is_text(text) => {
            Some((Some(special(before)?), Some(special(after)?)))
        }
        _ => None,
    }
}

/// A pre-tokenizer's name also says whether a piece that is a token is taken without merging. Where
/// the file says otherwise, that must make no difference: merging leads to every token.
fn check_merging(
    vocabulary: &GgufVocabulary,
    pre: PreTokenizer,
    ignore_merges: bool,
) -> Result<()> {
    if pre.ignores_merges() == ignore_merges {
        return Ok(());
    }
    let named = (0u32..).zip(vocabulary.tokens.iter().zip(&vocabulary.token_types));
    let normal = || named.clone().filter(|(_, (_, kind))| **kind == TokenKind::Normal as i32);
    let vocab: Vocab = named.clone().map(|(id, (text, _))| (text.clone(), id)).collect();
    let pairs = vocabulary.merges.iter().filter_map(|merge| merge.split_once(' '));
    let merges: Merges = pairs.map(|(left, right)| (left.into(), right.into())).collect();
    let lost = guarded(&vocabulary.file, || {
        let model = BPE::builder().vocab_and_merges(vocab, merges).cache_capacity(0).build()?;
        for (id, (text, _)) in normal() {
            let found = model.tokenize(text)?;
            if !matches!(found.as_slice(), [only] if only.id == id) {
                return Ok(Some(text));
            }
        }
        Ok(None)
    })?;
    match lost {
        None => Ok(()),
        Some(text) => {
            let problem = format!(
                "model.ignore_merges: expected {} with the expression of {}, found {ignore_merges}, \
                 and merging does not lead to token {}",
                pre.ignores_merges(),
                pre.name(),
                quoted(text)
            );
            Err(Error::Tokenizer { file: vocabulary.file.clone(), problem })
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{CONFIG, TOKENIZER, golden, source};
    use super::*;

    const GENERATION: &[u8] =
        include_bytes!("../../tests/golden/bitnet-a-packed/generation_config.json");
    const STORIES: &[u8] = include_bytes!("../../models/stories/tokenizer.json");
    const STORIES_CONFIG: &[u8] = include_bytes!("../../models/stories/tokenizer_config.json");
    const STORIES_GENERATION: &[u8] = include_bytes!("../../models/stories/generation_config.json");

    fn convert(
        tokenizer: &[u8],
        config: &[u8],
        generation: &[u8],
        vocab_size: usize,
    ) -> Result<GgufVocabulary> {
        let files = HuggingFaceFiles {
            tokenizer: source(tokenizer),
            tokenizer_config: Some(source(config)),
            chat_template: None,
            configs: &[source(generation)],
        };
        GgufVocabulary::from_hugging_face(files, "bitnet-b1.58", vocab_size)
    }

    /// The golden files with one change.
    fn changed(change: impl FnOnce(&mut Value)) -> Result<GgufVocabulary> {
        let mut json: Value = serde_json::from_slice(TOKENIZER).unwrap();
        change(&mut json);
        convert(&serde_json::to_vec(&json).unwrap(), CONFIG, GENERATION, 1000)
    }

    #[test]
    fn the_golden_tokenizer_is_as_gguf_has_it() {
        let found = convert(TOKENIZER, CONFIG, GENERATION, 1000).unwrap();
        let expected = super::super::gguf::tests::vocabulary();
        let expected =
            GgufVocabulary { file: found.file.clone(), add_eos: Some(false), ..expected };
        assert_eq!(found, expected);
    }

    #[test]
    fn both_forms_give_the_same_tokens() {
        for (tokenizer, config, generation, vocab_size) in [
            (TOKENIZER, CONFIG, GENERATION, 1000),
            (STORIES, STORIES_CONFIG, STORIES_GENERATION, 3072),
        ] {
            let vocabulary = convert(tokenizer, config, generation, vocab_size).unwrap();
            let written = Tokenizer::from_gguf(&vocabulary, vocab_size).unwrap();
            let read = Tokenizer::from_json(source(tokenizer), vocab_size).unwrap();
            assert_eq!(written.vocab_size(), read.vocab_size());
            assert_eq!(written.special_ids(), read.special_ids());
            let ends = stop_ids(&read, &[source(generation)], vocab_size).unwrap();
            assert_eq!(vocabulary.stop_ids(&written), ends);
            let texts = golden().cases.into_iter().map(|case| case.text);
            let source_text = include_str!("to_gguf.rs").lines().map(str::to_owned);
            for text in texts.chain(source_text) {
                for special in [true, false] {
                    let ids = read.encode(&text, special).unwrap();
                    assert_eq!(written.encode(&text, special).unwrap(), ids, "{text:?}");
                    assert_eq!(
                        written.decode(&ids, special).unwrap(),
                        read.decode(&ids, special).unwrap()
                    );
                }
            }
            for id in 0..vocab_size as u32 {
                assert_eq!(written.token(id), read.token(id));
            }
        }
    }

    #[test]
    fn ids_without_a_token_are_unused() {
        let vocabulary = convert(TOKENIZER, CONFIG, GENERATION, 1024).unwrap();
        assert_eq!((vocabulary.tokens.len(), vocabulary.token_types.len()), (1024, 1024));
        assert_eq!(
            (vocabulary.tokens[1000].as_str(), vocabulary.token_types[1000]),
            ("[PAD1000]", 5)
        );
        let error = convert(TOKENIZER, CONFIG, GENERATION, 999).unwrap_err();
        assert!(error.to_string().contains("id 999"), "{error}");
    }

    #[test]
    fn ends_of_a_text_are_kept() {
        let ends = |generation: &str| convert(TOKENIZER, CONFIG, generation.as_bytes(), 1000);
        // eos_token is <|eot_id|>, 996.
        let found = ends(r#"{"eos_token_id": [993, 996]}"#).unwrap();
        assert_eq!((found.eos_id, found.eot_id), (Some(996), Some(993)));
        // 993 is known by its name.
        let found = ends(r#"{"eos_token_id": [993, 5, 996]}"#).unwrap();
        assert_eq!((found.eos_id, found.eot_id), (Some(996), Some(5)));
        let error = ends(r#"{"eos_token_id": [993, 5, 7]}"#).unwrap_err().to_string();
        assert!(error.contains("none is left for 7"), "{error}");
        let found = convert(TOKENIZER, b"{}", br#"{"eos_token_id": [993, 996]}"#, 1000).unwrap();
        assert_eq!((found.eos_id, found.eot_id), (Some(993), Some(996)));
        assert_eq!((found.bos_id, found.chat_template), (Some(992), None));
    }

    #[test]
    fn every_pre_tokenizer_is_found_by_its_expressions() {
        for pre in PreTokenizer::all() {
            let splits = pre.expressions().iter().map(|expression| {
                json!({ "type": "Split", "pattern": { "Regex": expression },
                        "behavior": "Isolated", "invert": false })
            });
            let last = json!({ "type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": false });
            let steps: Vec<Value> = splits.chain([last]).collect();
            let found = changed(|json| {
                json["pre_tokenizer"] = json!({ "type": "Sequence", "pretokenizers": steps });
                if pre.normalizes() {
                    json["normalizer"] = json!({ "type": "NFC" });
                }
            });
            assert_eq!(found.unwrap().pre.as_deref(), Some(pre.name()));
        }
        let own = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true });
        assert_eq!(changed(|json| json["pre_tokenizer"] = own).unwrap().pre.unwrap(), "gpt-2");
    }

    #[test]
    fn what_stands_around_a_text_is_found() {
        let frame = |single: Value| {
            super::frame(&json!({ "type": "Sequence", "processors": [
                { "type": "ByteLevel" },
                { "type": "TemplateProcessing", "single": single, "special_tokens": {
                    "b": { "ids": [7] }, "e": { "ids": [8] }, "two": { "ids": [7, 8] } } },
            ] }))
        };
        let [text, b, e, two] = ["A", "b", "e", "two"].map(|id| {
            let kind = if id == "A" { "Sequence" } else { "SpecialToken" };
            json!({ kind: { "id": id, "type_id": 0 } })
        });
        assert_eq!(frame(json!([text])), Some((None, None)));
        assert_eq!(frame(json!([b, text])), Some((Some(7), None)));
        assert_eq!(frame(json!([text, e])), Some((None, Some(8))));
        assert_eq!(frame(json!([b, text, e])), Some((Some(7), Some(8))));
        let wrong = [json!([]), json!([b]), json!([two, text]), json!([b, b, text]), json!(1)];
        for single in wrong {
            assert_eq!(frame(single.clone()), None, "{single}");
        }
        assert_eq!(super::frame(&Value::Null), Some((None, None)));
        assert_eq!(super::frame(&json!({ "type": "RobertaProcessing" })), None);
        assert!(!changed(|json| json["post_processor"] = Value::Null).unwrap().add_bos.unwrap());
    }

    #[test]
    fn what_gguf_cannot_say_is_refused() {
        type Change = fn(&mut Value);
        let cases: [(&str, Change); 16] = [
            ("pre_tokenizer: ", |j| {
                j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(r"\w+");
            }),
            ("pre_tokenizer: ", |j| {
                j["pre_tokenizer"]["pretokenizers"][0]["behavior"] = json!("Removed");
            }),
            ("pre_tokenizer: ", |j| {
                j["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = json!(true);
            }),
            ("pre_tokenizer: ", |j| j["pre_tokenizer"] = Value::Null),
            ("normalizer: ", |j| j["normalizer"] = json!({ "type": "NFC" })),
            ("normalizer: ", |j| j["normalizer"] = json!({ "type": "Lowercase" })),
            ("decoder: ", |j| j["decoder"] = Value::Null),
            ("post_processor: ", |j| {
                j["post_processor"] =
                    json!({ "type": "BertProcessing", "sep": ["a", 1], "cls": ["a", 1] });
            }),
            ("id 64: ", |j| j["model"]["vocab"]["Ġuses"] = json!(64)),
            ("added token \"<|eot_id|>\": ", |j| j["added_tokens"][4]["id"] = json!(500)),
            ("model: ", |j| j["model"]["byte_fallback"] = json!(true)),
            ("model: ", |j| j["model"]["dropout"] = json!(0.5)),
            ("added token \"<|eot_id|>\": ", |j| j["added_tokens"][4]["lstrip"] = json!(true)),
            ("added token \"<|eot_id|>\": ", |j| j["added_tokens"][4]["single_word"] = json!(true)),
            ("model.ignore_merges: ", |j| {
                // No merge leads to the last token.
                j["model"]["merges"].as_array_mut().unwrap().pop();
            }),
            ("model.type: ", |j| {
                j["model"] = json!({ "type": "WordLevel", "vocab": { "a": 0 }, "unk_token": "a" });
            }),
        ];
        for (key, change) in cases {
            let error = changed(change).err().unwrap_or_else(|| panic!("{key}: accepted"));
            let error = error.to_string();
            assert!(error.starts_with(&format!("test.json: {key}")), "{key}: {error}");
            assert!(error.len() < 700 && !error.contains('\n'), "{error}");
        }
        // The expression is named.
        let error = changed(cases[0].1).unwrap_err().to_string();
        assert!(error.contains(r"\\w+"), "{error}");
        // Said outright, taking pieces whole is no matter.
        let found = changed(|j| {
            j["model"]["merges"].as_array_mut().unwrap().pop();
            j["model"]["ignore_merges"] = json!(true);
        });
        assert!(found.is_ok());
        for (config, generation) in [("{", "{}"), ("{}", "{"), ("{}", r#"{"eos_token_id": 1000}"#)]
        {
            assert!(convert(TOKENIZER, config.as_bytes(), generation.as_bytes(), 1000).is_err());
        }
    }
}
