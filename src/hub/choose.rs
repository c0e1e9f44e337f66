//! Which files of a repository make a model.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use serde::Deserialize;

use super::name::{ModelName, is_gguf, is_relative_path};
use crate::error::{Error, Result};
use crate::format::{quoted, shortened};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// What a checkpoint may have beside its configuration and weights.
const SIDE_FILES: [&str; 5] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
];
/// A message lists no more names than this.
const MAX_LISTED: usize = 20;

/// The files that a repository or a snapshot holds, with their sizes if known.
pub(super) type Listing = BTreeMap<String, Option<u64>>;

/// The files to have, weights last: where they are, the rest is too.
#[derive(Debug, PartialEq)]
pub(super) enum Choice {
    /// A directory with `config.json` and `model.safetensors`, or an index whose shards are still
    /// to be added.
    Checkpoint { files: Vec<String>, sharded: bool },
    /// One GGUF file, or the parts of one; the first part is what a program opens.
    Gguf(Vec<String>),
}

/// `model.safetensors.index.json`, of which only the names of the shards matter here.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// A checkpoint goes before GGUF files; a sharded one before a single file, as in
/// [`crate::format::ModelFiles::open`].
pub(super) fn choose(name: &ModelName, listing: &Listing) -> Result<Choice> {
    if let Some(file) = name.file() {
        return gguf_file(name, file, listing);
    }
    let sharded = listing.contains_key(INDEX);
    if !sharded && !listing.contains_key(SINGLE) {
        return only_gguf(name, listing);
    }
    if !listing.contains_key(CONFIG) {
        return Err(no_model(name, format!("{CONFIG} is missing")));
    }
    let side_files = SIDE_FILES.into_iter().filter(|file| listing.contains_key(*file));
    let weights = if sharded { INDEX } else { SINGLE };
    let files = [CONFIG].into_iter().chain(side_files).chain([weights]);
    Ok(Choice::Checkpoint { files: files.map(str::to_owned).collect(), sharded })
}

/// The shards that an index names, all of which the repository must have.
pub(super) fn shards(name: &ModelName, json: &[u8], listing: &Listing) -> Result<Vec<String>> {
    let index: Index = serde_json::from_slice(json)
        .map_err(|source| Error::Json { file: format!("{name}: {INDEX}"), source })?;
    let names: BTreeSet<String> = index.weight_map.into_values().collect();
    for shard in &names {
        check_name(name, shard)?;
        if shard.contains('/') {
            return Err(Error::HubFileName { name: name.to_string(), found: quoted(shard) });
        }
        if !listing.contains_key(shard) {
            return Err(no_model(name, format!("{} is missing", quoted(shard))));
        }
    }
    Ok(names.into_iter().collect())
}

fn gguf_file(name: &ModelName, file: &str, listing: &Listing) -> Result<Choice> {
    if !listing.contains_key(file) {
        return Err(no_model(name, held(listing)));
    }
    let Some((stem, _, count)) = split_part(file) else {
        return Ok(Choice::Gguf(vec![file.to_owned()]));
    };
    let mut parts = Vec::new();
    // Stops at the first part that is missing, however many the name claims.
    for part in 1..=count {
        let part = format!("{stem}-{part:05}-of-{count:05}.gguf");
        if !listing.contains_key(&part) {
            return Err(no_model(name, format!("{} is missing", quoted(&part))));
        }
        parts.push(part);
    }
    Ok(Choice::Gguf(parts))
}

fn only_gguf(name: &ModelName, listing: &Listing) -> Result<Choice> {
    let mut models = listing.keys().filter(|file| is_gguf(file) && is_first_part(file));
    match (models.next(), models.next()) {
        (None, _) => Err(no_model(name, held(listing))),
        (Some(file), None) => {
            check_name(name, file)?;
            gguf_file(name, file, listing)
        }
        _ => Err(Error::HubAmbiguous { name: name.to_string(), found: models_of(listing) }),
    }
}

/// `STEM-00001-of-00003.gguf`: stem, part and count.
fn split_part(file: &str) -> Option<(&str, u32, u32)> {
    let digits = |text: &str| {
        let is_number = text.len() == 5 && text.bytes().all(|c| c.is_ascii_digit());
        is_number.then(|| text.parse().ok()).flatten()
    };
    let (rest, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, part) = rest.rsplit_once('-')?;
    let (part, count) = (digits(part)?, digits(count)?);
    (1..=count).contains(&part).then_some((stem, part, count))
}

fn is_first_part(file: &str) -> bool {
    split_part(file).is_none_or(|(_, part, _)| part == 1)
}

pub(super) fn check_name(name: &ModelName, file: &str) -> Result<()> {
    if is_relative_path(file) {
        return Ok(());
    }
    Err(Error::HubFileName { name: name.to_string(), found: quoted(file) })
}

fn no_model(name: &ModelName, problem: String) -> Error {
    Error::HubNoModel { name: name.to_string(), problem }
}

/// The GGUF models of a listing with their sizes, as `:FILE (SIZE)`.
fn models_of(listing: &Listing) -> String {
    let models = listing.keys().filter(|file| is_gguf(file) && is_first_part(file));
    list(models.map(|file| format!(":{} ({})", shortened(file), size_of(file, listing))))
}

/// Of a file, or of all parts of one.
fn size_of(file: &str, listing: &Listing) -> String {
    let sizes: Vec<Option<u64>> = match split_part(file) {
        None => vec![listing.get(file).copied().flatten()],
        Some((stem, _, count)) => {
            let is_part = |(name, _): &(&String, &Option<u64>)| {
                split_part(name).is_some_and(|(other, _, n)| (other, n) == (stem, count))
            };
            listing.iter().filter(is_part).map(|(_, size)| *size).collect()
        }
    };
    let total = sizes.into_iter().try_fold(0_u64, |sum, size| sum.checked_add(size?));
    total.map_or_else(|| "size unknown".to_owned(), super::size_text)
}

fn held(listing: &Listing) -> String {
    if listing.is_empty() {
        return "it is empty".to_owned();
    }
    let models = models_of(listing);
    if models.is_empty() {
        return format!("it holds {}", list(listing.keys().map(|file| shortened(file))));
    }
    format!("it holds {models}")
}

fn list(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.map(|name| name.replace(char::is_control, "\u{fffd}")).collect();
    let mut text = names[..names.len().min(MAX_LISTED)].join(", ");
    if names.len() > MAX_LISTED {
        let _ = write!(text, " and {} more", names.len() - MAX_LISTED);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> Listing {
        names.iter().map(|name| ((*name).to_owned(), Some(1_500_000_000))).collect()
    }

    fn choice(name: &str, names: &[&str]) -> Result<Choice> {
        choose(&name.parse().unwrap(), &listing(names))
    }

    fn gguf(names: &[&str]) -> Choice {
        Choice::Gguf(names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn checkpoints() {
        let all = [CONFIG, SINGLE, "tokenizer.json", "README.md", "pytorch_model.bin", "a.gguf"];
        let files = [CONFIG, "tokenizer.json", SINGLE].map(str::to_owned).to_vec();
        assert_eq!(choice("a/b", &all).unwrap(), Choice::Checkpoint { files, sharded: false });
        let files = [CONFIG, INDEX].map(str::to_owned).to_vec();
        let sharded = choice("a/b", &[CONFIG, SINGLE, INDEX]).unwrap();
        assert_eq!(sharded, Choice::Checkpoint { files, sharded: true });
        assert_eq!(choice("a/b:a.gguf", &all).unwrap(), gguf(&["a.gguf"]));
        let error = choice("a/b", &[SINGLE]).unwrap_err().to_string();
        assert!(error.contains(CONFIG), "{error}");
        let error = choice("a/b", &["adapter.safetensors"]).unwrap_err().to_string();
        assert!(error.contains("it holds adapter.safetensors"), "{error}");
        assert!(choice("a/b", &[]).unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn gguf_files() {
        let parts = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"];
        assert_eq!(choice("a/b", &["README.md", "m.gguf"]).unwrap(), gguf(&["m.gguf"]));
        assert_eq!(choice("a/b", &parts).unwrap(), gguf(&parts));
        assert_eq!(choice(&format!("a/b:{}", parts[1]), &parts).unwrap(), gguf(&parts));
        let error = choice("a/b", &[parts[0], parts[1], "n.gguf"]).unwrap_err().to_string();
        assert!(error.contains(":n.gguf (1.40 GiB)"), "{error}");
        assert!(error.contains(":q/m-00001-of-00002.gguf (2.79 GiB)"), "{error}");
        assert!(!error.contains("00002-of"), "{error}");
        let error = choice("a/b", &parts[..1]).unwrap_err().to_string();
        assert!(error.contains("00002-of-00002.gguf") && error.contains("missing"), "{error}");
        let error = choice("a/b:o.gguf", &parts).unwrap_err().to_string();
        assert!(error.contains(":q/m-00001-of-00002.gguf"), "{error}");
        for hostile in ["../m.gguf", "/m.gguf", "C:\\m.gguf", "a\n.gguf"] {
            let error = choice("a/b", &[hostile]).unwrap_err();
            assert!(matches!(error, Error::HubFileName { .. }), "{error}");
        }
        let many: Vec<String> = (0..500).map(|i| format!("{i}{}.gguf", "x".repeat(900))).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert!(choice("a/b", &many).unwrap_err().to_string().len() < 4000);
    }

    #[test]
    fn shards_of_an_index() {
        let name = "a/b".parse().unwrap();
        let files = listing(&["s1", "s2"]);
        let found = shards(&name, br#"{"weight_map": {"x": "s2", "y": "s1", "z": "s2"}}"#, &files);
        assert_eq!(found.unwrap(), ["s1", "s2"]);
        for (json, part) in [
            (r#"{"weight_map": {"x": "s3"}}"#, "\"s3\" is missing"),
            (r#"{"weight_map": {"x": "../s1"}}"#, "../s1"),
            (r#"{"weight_map": {"x": "d/s1"}}"#, "d/s1"),
            (r#"{"weight_map": {"x": 1}}"#, INDEX),
            ("{}", "weight_map"),
        ] {
            let error = shards(&name, json.as_bytes(), &files).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
