//! The tokens that end a text.

use serde_json::Value;

use super::{Source, Tokenizer, shortened};
use crate::error::{Error, Result};

/// Tokens that end a text or a turn wherever they are special tokens; checkpoints often list only
/// one of those that their model produces.
const END_TOKENS: [&str; 6] =
    ["<|eot_id|>", "<|im_end|>", "<|end_of_turn|>", "<|endoftext|>", "<|end_of_text|>", "</s>"];

/// Those of the well-known end tokens that `tokenizer` marks as special.
pub(super) fn end_token_ids(tokenizer: &Tokenizer) -> impl Iterator<Item = u32> {
    END_TOKENS.iter().filter_map(|token| tokenizer.special_token_id(token))
}

/// Each id once, ascending.
pub(super) fn sorted_ids(ids: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut ids: Vec<u32> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// The tokens that end a text, ascending: `eos_token_id` (a number or a list) of each of `configs`
/// (`generation_config.json` and `config.json`), and the well-known end tokens that `tokenizer`
/// marks as special.
///
/// # Errors
/// [`Error::Json`] if a file does not parse, [`Error::Config`] if an id is not one of the model's
/// `vocab_size` tokens.
pub fn stop_ids(
    tokenizer: &Tokenizer,
    configs: &[Source<'_>],
    vocab_size: usize,
) -> Result<Vec<u32>> {
    let mut ids: Vec<u32> = end_token_ids(tokenizer).collect();
    for config in configs {
        ids.extend(eos_ids(*config, vocab_size)?);
    }
    Ok(sorted_ids(ids.into_iter()))
}

/// `eos_token_id` of a file, in its order.
pub(super) fn eos_ids(config: Source<'_>, vocab_size: usize) -> Result<Vec<u32>> {
    let json = config.json()?;
    let ids = match json.get("eos_token_id") {
        None | Some(Value::Null) => &[],
        Some(Value::Array(list)) => list.as_slice(),
        Some(id) => std::slice::from_ref(id),
    };
    ids.iter().map(|id| token_id(config.file, id, vocab_size)).collect()
}

fn token_id(file: &str, id: &Value, vocab_size: usize) -> Result<u32> {
    let valid = id.as_u64().and_then(|id| u32::try_from(id).ok());
    valid.filter(|&id| (id as usize) < vocab_size).ok_or_else(|| {
        // A hostile file may have anything here, of any length.
        let found = shortened(&id.to_string(), 40);
        Error::Config {
            file: file.to_owned(),
            key: "eos_token_id".to_owned(),
            expected: format!("token ids below {vocab_size}"),
            found,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{source, tokenizer};
    use super::*;

    fn stop(json: &str) -> Result<Vec<u32>> {
        stop_ids(&tokenizer(), &[source(json.as_bytes())], 1000)
    }

    #[test]
    fn ids_come_from_files_and_names() {
        // 993 and 996 are <|end_of_text|> and <|eot_id|>.
        assert_eq!(stop("{}").unwrap(), [993, 996]);
        assert_eq!(stop(r#"{"eos_token_id": null}"#).unwrap(), [993, 996]);
        assert_eq!(stop(r#"{"eos_token_id": 996}"#).unwrap(), [993, 996]);
        assert_eq!(stop(r#"{"eos_token_id": [999, 7, 7]}"#).unwrap(), [7, 993, 996, 999]);
        let both = [source(br#"{"eos_token_id": 1}"#), source(br#"{"eos_token_id": 2}"#)];
        assert_eq!(stop_ids(&tokenizer(), &both, 1000).unwrap(), [1, 2, 993, 996]);
    }

    #[test]
    fn ids_outside_the_vocabulary_are_errors() {
        for id in ["1000", "-1", "1.5", "\"a\"", "[1, [2]]", "{}", "true", "4294967296", "1e300"] {
            let error = stop(&format!(r#"{{"eos_token_id": {id}}}"#)).unwrap_err();
            assert!(
                matches!(error, Error::Config { ref key, .. } if key == "eos_token_id"),
                "{error}"
            );
        }
        let long = stop(&format!(r#"{{"eos_token_id": "{}"}}"#, "ä".repeat(10_000))).unwrap_err();
        assert!(long.to_string().len() < 300);
        assert!(matches!(stop("{").unwrap_err(), Error::Json { .. }));
        assert!(stop(&"[".repeat(100_000)).is_err());
    }
}
