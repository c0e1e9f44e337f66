//! `--keep-packed`: what an earlier load has packed is used, and only if it is right.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

use crate::cli::{copy_of_golden, failure, sterna};

struct Case {
    model: TempDir,
    cache: TempDir,
}

impl Case {
    fn new() -> Self {
        Self { model: copy_of_golden(), cache: TempDir::new().unwrap() }
    }

    fn command(&self, arguments: &str) -> Command {
        let model = self.model.path().display();
        let mut command =
            sterna(&format!("run -m {model} --device cpu --temp 0 -n 8 --json {arguments} Hello"));
        command.env("STERNA_CACHE", self.cache.path());
        command
    }

    /// Token ids and kernels, and what was said.
    fn run(&self, arguments: &str) -> (Vec<Value>, String) {
        let output = self.command(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{said}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (vec![report["token_ids"].clone(), report["kernel"].clone()], said)
    }

    /// The files that are kept.
    fn files(&self) -> Vec<PathBuf> {
        let directory = self.cache.path().join("packed");
        let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
        let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        files
    }

    fn only_file(&self) -> PathBuf {
        let files = self.files();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }
}

const KEPT: &str = "packed weights are kept for the next load\n";

#[test]
fn a_second_start_uses_what_the_first_has_packed() {
    let case = Case::new();
    let plain = case.run("");
    assert_eq!((plain.1.as_str(), case.files().len()), ("", 0));
    for packing in ["2bit", "base3"] {
        for head in ["int8", "exact"] {
            let before = case.files();
            let arguments = format!("--packing {packing} --head {head} --keep-packed on");
            let first = case.run(&arguments);
            assert!(first.1.ends_with(KEPT), "{}", first.1);
            assert_eq!(first.0[0], plain.0[0]);
            let kernel = first.0[1].as_str().unwrap();
            assert_eq!(kernel.contains("base3"), packing == "base3", "{kernel}");
            assert_eq!(case.files().len(), before.len() + 1);
            // Nothing is said, because nothing was made.
            assert_eq!(case.run(&arguments), (first.0.clone(), String::new()));
            let check = arguments.replace("on", "check");
            assert_eq!(case.run(&check), (first.0, String::new()));
        }
    }
}

/// What reads the file gets what is in it: scales that are no numbers.
#[test]
fn damaged_contents_are_found_by_who_looks() {
    let case = Case::new();
    let (expected, _) = case.run("--keep-packed on");
    let path = case.only_file();
    let whole = fs::read(&path).unwrap();
    let mut bytes = whole.clone();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, &bytes).unwrap();
    let message = failure(case.command("--keep-packed on"), 1);
    assert!(message.contains("not numbers"), "{message}");
    let (found, said) = case.run("--keep-packed check");
    assert_eq!(found, expected);
    assert!(said.contains("not used: section") && said.ends_with(KEPT), "{said}");
    assert_eq!(fs::read(&path).unwrap(), whole);
}

#[test]
fn stale_and_broken_files_are_made_again() {
    let case = Case::new();
    let (expected, _) = case.run("--keep-packed on");
    let path = case.only_file();
    let whole = fs::read(&path).unwrap();
    let made_again = |reason: &str| {
        let (found, said) = case.run("--keep-packed on");
        assert_eq!(found, expected, "{reason}");
        assert!(said.contains(&format!("not used: {reason}")) && said.ends_with(KEPT), "{said}");
        assert_eq!(said.lines().count(), 2, "{said}");
        assert_eq!(case.run("--keep-packed on"), (expected.clone(), String::new()));
    };
    for (bytes, reason) in [
        (&whole[..0], "failed to fill whole buffer"),
        (&whole[..whole.len() - 1], "expected "),
        (&[&whole[..], &[0]].concat(), "expected "),
        (&[b"x", &whole[1..]].concat(), "its magic number is another"),
        (&[&whole[..90], &[!whole[90]], &whole[91..]].concat(), "its header is damaged"),
    ] {
        fs::write(&path, bytes).unwrap();
        made_again(reason);
    }
    // The same bytes, written again: the file may be another one.
    touch(&case.model.path().join("model.safetensors"));
    made_again("made from other files, or otherwise");
}

fn touch(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(1000)).unwrap();
}

#[test]
fn what_cannot_be_kept_is_said() {
    let case = Case::new();
    fs::write(case.cache.path().join("packed"), "a file where the directory belongs").unwrap();
    let (_, said) = case.run("--keep-packed on");
    assert!(said.contains("packed weights are not kept: ") && said.lines().count() == 1, "{said}");
    let mut built_in = sterna("run --device cpu -n 1 --temp 0 --json --keep-packed on Once");
    built_in.env("STERNA_CACHE", case.cache.path());
    let output = built_in.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "packed weights are not kept: the model is not made of files\n");
}
