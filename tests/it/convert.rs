//! `sterna convert` as a process: what it writes, what it refuses, and what it leaves alone.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sterna::format::ModelFiles;
use sterna::{Checkpoint, Model};
use tempfile::TempDir;

use crate::cli::{GOLDEN, failure, json, stdout, sterna};
use crate::formats_common::{Form, cases};

/// `sterna convert` from a golden model into a directory.
fn convert(model: &str, out: &Path, options: &str) -> std::process::Command {
    sterna(&format!("convert {GOLDEN}/{model} {} {options}", out.display()))
}

/// What a directory holds, hidden files included.
fn entries(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn what_it_did_is_said() {
    let directory = TempDir::new().unwrap();
    let out = directory.path().join("m.gguf");
    let report = json(convert("bitnet-a-packed", &out, "--verify --json"));
    assert_eq!(report["format"], "i2_s");
    assert_eq!(report["lossless"], true);
    assert_eq!(report["rounded_scales"], 0);
    assert_eq!(report["path"], out.display().to_string());
    assert!(report["bytes"].as_u64().unwrap() < fs::metadata(&out).unwrap().len());
    // 21 matrices; the table, seven norms of 256 or 512 in three layers, and the last.
    assert_eq!(report["verified_weights"], 1_671_168 + 256_000 + 3 * 1280 + 256);

    let report = json(convert("llama-a-bitlinear", &out, "--to tq2_0 --force --json"));
    assert_eq!((&report["format"], &report["lossless"]), (&"tq2_0".into(), &false.into()));
    assert_eq!(report["rounded_scales"], 21);
    let rounding = report["largest_rounding"].as_f64().unwrap();
    assert!(rounding > 0.0 && rounding < 1.0 / 2048.0, "{rounding}");
    assert_eq!(report["verified_weights"], Value::Null);

    let text = stdout(convert("llama-a-bitlinear", &out, "--to tq1_0 --force --verify"));
    assert!(text.contains("21 scales rounded to IEEE half, by 2."), "{text}");
    assert!(text.contains("read back: 2359296 ternary weights and "), "{text}");
    let text = stdout(convert("qwen3-1bit-mlx", &out, "--force --verify"));
    assert!(text.contains("q1_0") && text.contains("lossless"), "{text}");
    assert_eq!(entries(directory.path()), ["m.gguf"]);
}

#[test]
fn texts_are_the_same_tokens_afterwards() {
    let golden = fs::read(format!("{GOLDEN}/expected/tokens.json")).unwrap();
    let golden: Value = serde_json::from_slice(&golden).unwrap();
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    for model in ["bitnet-a-packed", "llama-a-bitlinear"] {
        stdout(convert(model, &path("i2_s.gguf"), "--force"));
        // A GGUF file keeps its tokenizer, a directory its files.
        let again = format!(
            "convert {} {} --to tq2_0 --force",
            path("i2_s.gguf").display(),
            path("tq2_0.gguf").display()
        );
        stdout(sterna(&again));
        stdout(convert(model, &path("hf"), "--force"));
        for out in ["i2_s.gguf", "tq2_0.gguf", "hf"] {
            let checkpoint = Checkpoint::open(&path(out)).unwrap();
            let mut compared = 0;
            for case in golden["cases"].as_array().unwrap() {
                let text = case["text"].as_str().unwrap();
                let ids: Vec<u64> =
                    Model::encode(&checkpoint, text).unwrap().into_iter().map(u64::from).collect();
                assert_eq!(Value::from(ids), case["ids_with_bos"], "{out}: {text:?}");
                compared += 1;
            }
            assert!(compared > 10);
        }
        let tokenizer_of = |name: &str| -> Vec<_> {
            let files = ModelFiles::open(&path(name)).unwrap();
            let keys = files.metadata().unwrap().iter();
            let keys = keys.filter(|(key, _)| key.starts_with("tokenizer."));
            keys.map(|(key, value)| (key.to_owned(), value.clone())).collect()
        };
        let keys = tokenizer_of("i2_s.gguf");
        assert!(keys.len() > 4 && keys == tokenizer_of("tq2_0.gguf"));
        for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let original = fs::read(format!("{GOLDEN}/{model}/{name}")).unwrap();
            assert_eq!(fs::read(path("hf").join(name)).unwrap(), original);
        }
    }
}

#[test]
fn what_is_there_is_replaced_only_by_force_and_only_by_something_complete() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("m.gguf");
    fs::write(&file, "precious").unwrap();
    let kept = || assert_eq!(fs::read(&file).unwrap(), b"precious");

    let message = failure(convert("bitnet-a-packed", &file, ""), 1);
    let expected = "it is there already; --force replaces it";
    assert_eq!(message, format!("error: {}: {expected}\n", file.display()));
    kept();
    // Fails after the name has been found free to use.
    failure(convert("qwen3-1bit-mlx", &file, "--to i2_s --force"), 1);
    kept();
    let damaged = directory.path().join("damaged");
    fs::create_dir(&damaged).unwrap();
    for name in ["config.json", "tokenizer.json", "model.safetensors"] {
        let mut bytes = fs::read(format!("{GOLDEN}/bitnet-a-packed/{name}")).unwrap();
        if name == "model.safetensors" {
            // Code 3 in the last matrix or norm that is read.
            let len = bytes.len();
            bytes[len / 2..].fill(0xff);
        }
        fs::write(damaged.join(name), bytes).unwrap();
    }
    for to in ["i2_s", "hf"] {
        let command = format!("convert {} {} --to {to} --force", damaged.display(), file.display());
        failure(sterna(&command), 1);
        kept();
    }
    assert_eq!(entries(directory.path()), ["damaged", "m.gguf"]);

    stdout(convert("bitnet-a-packed", &file, "--force"));
    Checkpoint::open(&file).unwrap();

    // A directory is replaced as a whole: an older shard does not stay behind.
    let model = directory.path().join("model");
    stdout(convert("llama-a-bitlinear", &model, ""));
    fs::write(model.join("stale.safetensors"), "old").unwrap();
    failure(convert("bitnet-a-bf16", &model, ""), 1);
    assert!(model.join("stale.safetensors").exists());
    failure(convert("qwen3-1bit-mlx", &model, "--to hf --force"), 1);
    assert!(model.join("stale.safetensors").exists());
    stdout(convert("bitnet-a-bf16", &model, "--force"));
    assert!(!model.join("stale.safetensors").exists());
    let expected = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert!(expected.iter().all(|name| model.join(name).exists()));
    assert_eq!(entries(directory.path()), ["damaged", "m.gguf", "model"]);

    // Not a model's: nobody means to lose that.
    let home = directory.path().join("home");
    fs::create_dir_all(home.join("letters")).unwrap();
    let message = failure(convert("bitnet-a-bf16", &home, "--force"), 1);
    assert!(message.contains("holds other things than a model"), "{message}");
    assert_eq!(entries(&home), ["letters"]);
}

#[test]
fn a_failure_leaves_nothing_behind() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::write(path("file"), "").unwrap();
    fs::create_dir_all(path("directory.gguf/inner")).unwrap();
    let before = entries(directory.path());
    for (out, options, expected) in [
        (path("nowhere/m.gguf"), "", "nowhere"),
        (path("nowhere/m"), "", "nowhere"),
        (path("file/m.gguf"), "", "file"),
        (path("file/m"), "", "file"),
        (path("directory.gguf"), "", "it is there already"),
        (path("directory.gguf"), "--force", "directory.gguf"),
    ] {
        let message = failure(convert("bitnet-a-packed", &out, options), 1);
        assert!(message.contains(expected), "{message}");
        assert_eq!(entries(directory.path()), before, "{}", out.display());
        assert_eq!(entries(&path("directory.gguf")), ["inner"]);
    }
    let message = failure(sterna(&format!("convert nothing {}", path("m.gguf").display())), 1);
    assert!(message.contains("nothing"), "{message}");
    assert_eq!(entries(directory.path()), before);
}

#[test]
fn what_a_format_cannot_hold_is_refused() {
    let directory = TempDir::new().unwrap();
    let out = directory.path().join("out");
    /// A model of the table, on the disk.
    fn written(directory: &Path, name: &str, like: &str, form: impl Fn(Form) -> bool) -> PathBuf {
        let case = cases().into_iter().find(|case| case.like == like && form(case.form)).unwrap();
        let path = directory.join(name);
        fs::create_dir(&path).unwrap();
        case.write(&path);
        path
    }
    let golden = |name: &str| Path::new(GOLDEN).join(name);
    let odd = written(directory.path(), "odd", "2B4T, odd", |form| form == Form::WriteHf);
    let rotated = written(directory.path(), "rotated", "Bonsai 2", |_| true);
    let quantised = written(directory.path(), "quantised", "Llama3-1.58", |form| {
        format!("{form:?}").contains("Tq1_0")
    });
    let before = entries(directory.path());
    for (model, to, expected) in [
        (
            golden("qwen3-1bit-mlx"),
            "i2_s",
            "token_embd.weight: it has a scale for every 128 inputs, I2_S one for the whole matrix",
        ),
        (
            golden("qwen3-1bit-mlx"),
            "tq2_0",
            "token_embd.weight: it has a scale for every 128 inputs, TQ2_0 one for every 256 inputs",
        ),
        (
            golden("qwen3-1bit-mlx"),
            "hf",
            "the packing of Hugging Face has one scale a matrix, this model one for each group of \
             inputs; convert it to GGUF (Q1_0 or Q2_0)",
        ),
        (
            golden("bitnet-a-packed"),
            "q1_0",
            "blk.0.attn_q.weight: Q1_0 is binary, the matrix ternary",
        ),
        (
            golden("gguf/bitnet-a-i2_s.gguf"),
            "hf",
            "a GGUF file has no tokenizer.json; convert the Hugging Face checkpoint instead",
        ),
        (odd, "tq2_0", "blk.0.attn_q.weight: 120 columns are no whole number of TQ2_0 blocks"),
        (rotated, "q2_0", "token_embd.weight is stored rotated"),
        (quantised, "i2_s", "token_embd.weight is quantised; take the original file"),
    ] {
        let command = format!("convert {} {} --to {to}", model.display(), out.display());
        let message = failure(sterna(&command), 1);
        assert_eq!(message, format!("error: the model cannot be converted: {expected}\n"));
        assert_eq!(entries(directory.path()), before);
    }
    let usage = sterna(&format!("convert {GOLDEN}/bitnet-a-packed {} --to gguf", out.display()));
    assert!(failure(usage, 2).contains("--to <FORMAT>"));
}
