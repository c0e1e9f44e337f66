//! Names: of models, as the user writes them, and of files, as a server does.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};
use crate::format::quoted;

/// What the hub and its other programs allow for `ORG/NAME`.
const MAX_REPO_BYTES: usize = 96;
/// What common file systems allow for one component, less the suffixes of a cache.
const MAX_COMPONENT_BYTES: usize = 200;
const MAX_PATH_BYTES: usize = 1024;

/// A model on the hub: `ORG/NAME`, or `ORG/NAME:FILE.gguf` for one of several GGUF files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelName {
    repo: String,
    file: Option<String>,
}

impl ModelName {
    /// `ORG/NAME`.
    pub fn repo(&self) -> &str {
        &self.repo
    }

    /// The GGUF file that is asked for.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }
}

impl FromStr for ModelName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (repo, file) = match text.split_once(':') {
            Some((repo, file)) => (repo, Some(file)),
            None => (text, None),
        };
        let parts: Vec<&str> = repo.split('/').collect();
        let repo_fits = parts.len() == 2
            && repo.len() <= MAX_REPO_BYTES
            && parts.iter().all(|part| is_repo_part(part));
        let file_fits = file.is_none_or(|file| is_gguf(file) && is_relative_path(file));
        if !repo_fits || !file_fits {
            return Err(Error::HubName { found: quoted(text) });
        }
        Ok(Self { repo: repo.to_owned(), file: file.map(str::to_owned) })
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.file {
            Some(file) => write!(f, "{}:{file}", self.repo),
            None => f.write_str(&self.repo),
        }
    }
}

/// The hub's own rule; `--` separates the parts in the names of the cache.
fn is_repo_part(part: &str) -> bool {
    let is_edge = |c: char| c.is_ascii_alphanumeric() || c == '_';
    part.starts_with(is_edge)
        && part.ends_with(is_edge)
        && part.chars().all(|c| is_edge(c) || c == '-' || c == '.')
        && !part.contains("--")
        && !part.contains("..")
}

pub(super) fn is_gguf(name: &str) -> bool {
    name.ends_with(".gguf")
}

/// A commit as the hub writes it: a SHA-1 in hexadecimal.
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

pub(super) fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
}

/// A branch, a tag or a commit; it becomes a path below `refs/`.
pub(super) fn check_revision(revision: &str) -> Result<()> {
    if is_relative_path(revision) {
        return Ok(());
    }
    Err(Error::HubRevision { found: quoted(revision) })
}

/// Whether `name`, joined to a directory, stays inside it and is a file's name on every system: no
/// root, drive, parent, backslash, device name, or character that a terminal obeys.
pub(super) fn is_relative_path(name: &str) -> bool {
    name.len() <= MAX_PATH_BYTES && name.split('/').all(is_component)
}

fn is_component(name: &str) -> bool {
    const DEVICES: [&str; 6] = ["CON", "PRN", "AUX", "NUL", "COM", "LPT"];
    let stem = name.split('.').next().unwrap_or(name).trim_end().to_ascii_uppercase();
    // COM and LPT stand for COM0 to COM9; the few other names that this refuses are no loss.
    let stem = stem.trim_end_matches(|c: char| c.is_ascii_digit());
    (1..=MAX_COMPONENT_BYTES).contains(&name.len())
        && !name.contains(|c: char| c.is_control() || "\\:*?\"<>|".contains(c))
        && !name.ends_with(['.', ' '])
        && !DEVICES.contains(&stem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models() {
        for name in ["a/b", "microsoft/bitnet-b1.58-2B-4T", "_a/b_", "a/b:c.gguf", "a/b:q/c.gguf"] {
            assert_eq!(name.parse::<ModelName>().unwrap().to_string(), name);
        }
        let long = format!("a/{}", "b".repeat(95));
        for name in [
            "",
            "a",
            "/a",
            "a/",
            "a/b/c",
            "../b",
            "a/..",
            "./b",
            "a/b.",
            "-a/b",
            "a/b--c",
            "a/b..c",
            "a/b c",
            "a/b:",
            "a/b:c",
            "a/b:../c.gguf",
            "a/b:/c.gguf",
            "a/b:c.gguf:d",
            "a\\b/c",
            "C:/a",
            "a/b?x",
            "a/b#c",
            "a/é",
            &long,
        ] {
            assert!(name.parse::<ModelName>().is_err(), "{name}");
        }
    }

    #[test]
    fn names_of_files() {
        for name in ["config.json", "a/b.gguf", "a b", "é", "..a", ".a", "console.txt"] {
            assert!(is_relative_path(name), "{name}");
        }
        let (long, longer) = ("a".repeat(201), "a/".repeat(600) + "a");
        for name in [
            "",
            "/a",
            "a/",
            "a//b",
            ".",
            "..",
            "../a",
            "a/../b",
            "a/./b",
            "C:a",
            "a\\b",
            "..\\a",
            "a\nb",
            "a\0",
            "\u{1b}[2J",
            "a.",
            "a ",
            "nul",
            "NUL.txt",
            "com1.gguf",
            "a/aux.h",
            "a:b",
            &long,
            &longer,
        ] {
            assert!(!is_relative_path(name), "{name:?}");
        }
    }
}
