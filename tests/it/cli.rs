//! The program as a process: what it prints where, how it exits, what it leaves behind.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// `sterna` with arguments separated by spaces.
pub(crate) fn sterna(arguments: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sterna"));
    command.args(arguments.split_whitespace()).stdin(Stdio::null());
    command.env_remove("RUST_BACKTRACE");
    // Without it, some graphics drivers print a complaint of their own.
    command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    // Nothing that is kept from other runs, and nothing kept.
    command.env("STERNA_CACHE", std::env::temp_dir().join("no-such-directory/sterna"));
    command
}

/// `sterna run` of a golden model on the scalar reference.
fn run_golden(arguments: &str) -> Command {
    sterna(&format!("run -m {GOLDEN}/bitnet-a-packed --device ref {arguments}"))
}

fn output(mut command: Command) -> Output {
    command.output().expect("the program starts")
}

fn utf8(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

#[track_caller]
pub(crate) fn stdout(command: Command) -> String {
    let output = output(command);
    assert_eq!(output.status.code(), Some(0), "{}", utf8(&output.stderr));
    utf8(&output.stdout).to_owned()
}

#[track_caller]
pub(crate) fn json(command: Command) -> Value {
    serde_json::from_str(&stdout(command)).expect("JSON")
}

/// A failure: this exit code, nothing but what precedes it on standard output, and one line on
/// standard error, which is returned.
#[track_caller]
pub(crate) fn failure(command: Command, code: i32) -> String {
    let output = output(command);
    let message = utf8(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(message.starts_with("error: ") && message.ends_with('\n'), "{message:?}");
    assert_eq!(message.lines().count(), 1, "{message}");
    assert!(!message.contains("panicked") && !message.contains("bug"), "{message}");
    message.to_owned()
}

/// A copy of the packed golden model that a test may damage.
pub(crate) fn copy_of_golden() -> TempDir {
    let directory = TempDir::new().unwrap();
    for entry in fs::read_dir(format!("{GOLDEN}/bitnet-a-packed")).unwrap() {
        let entry = entry.unwrap();
        let bytes = fs::read(entry.path()).unwrap();
        fs::write(directory.path().join(entry.file_name()), bytes).unwrap();
    }
    directory
}

fn run_in(directory: &Path) -> Command {
    sterna(&format!("run --device ref -n 2 -m {} Hello", directory.display()))
}

#[test]
fn help_teaches() {
    let text = stdout(sterna("--help"));
    for command in
        ["run", "bench", "compare", "devices", "inspect", "pull", "logits", "tune", "verify"]
    {
        assert!(text.contains(command), "{text}");
        let help = stdout(sterna(&format!("{command} --help")));
        assert!(help.contains("Usage: sterna"), "{help}");
    }
    let run = stdout(sterna("run --help"));
    assert!(run.contains("Examples:") && run.contains("[default: 0.7]"), "{run}");
    assert!(stdout(sterna("--version")).starts_with("sterna "));
    let bare = output(sterna(""));
    assert_eq!(bare.status.code(), Some(2));
    assert!(utf8(&bare.stderr).contains("Usage:"));
}

#[test]
fn wrong_usage_exits_with_2() {
    for (arguments, part) in [
        ("run --colour x", "--colour"),
        ("run", "<PROMPT>"),
        ("dance", "dance"),
        ("run --device cuda x", "expected auto, gpu, gpu:N, cpu or ref"),
        ("run --device gpu:x x", "gpu:x"),
        ("run --temp -1 x", "temperature"),
        ("run --temp nan x", "temperature"),
        ("run --top-p 1.5 x", "top_p"),
        ("run --min-p -1 x", "min_p"),
        ("run --top-k 0 x", "--top-k"),
        ("run --repeat-penalty 0 x", "repetition_penalty"),
        ("run --threads 0 x", "--threads"),
        ("run --context 0 x", "--context"),
        ("run -n many x", "many"),
        ("run --kv f64 x", "int8"),
        ("run --on-overflow slide x", "shift"),
        ("run --chat --load-session s x", "--load-session"),
        ("run --system x x", "--chat"),
        ("logits --tokens 1", "--out"),
        ("logits --tokens 1,x --out nowhere", "x"),
        ("logits --tokens -1 --out nowhere", "-1"),
        ("run --tune maybe x", "maybe"),
        ("run --sparse maybe x", "maybe"),
        ("run --speculate always x", "always"),
        ("tune --device cpu", "expected gpu or gpu:N"),
        ("tune --budget -1", "0 to 3600"),
        ("tune --budget nan", "0 to 3600"),
        ("tune --synthetic gpt-5", "bitnet-2b4t"),
        ("tune --synthetic bitnet-large -m x", "--model"),
    ] {
        let message = failure(sterna(arguments), 2);
        assert!(message.contains(part), "{arguments}: {message}");
    }
    assert!(!Path::new("nowhere").exists());
}

#[test]
fn failures_are_one_line_that_says_where() {
    let message = failure(sterna("run -m /no/such/model x"), 1);
    assert!(message.contains("/no/such/model"), "{message}");
    assert_eq!(message.matches("No such file").count(), 1, "{message}");
    let message = failure(run_golden("--device gpu:4711 x"), 2);
    assert!(message.contains("--device"), "{message}");
    let message = failure(sterna(&format!("run -m {GOLDEN}/bitnet-a-packed/config.json x")), 1);
    assert!(message.contains("config.json"), "{message}");
    let message = failure(sterna(&format!("run -m {GOLDEN} x")), 1);
    assert!(message.contains("no "), "{message}");
    failure(sterna("run --device gpu:4711 x"), 1);
}

#[test]
fn text_is_prompt_and_continuation() {
    let result = output(run_golden("-n 12 --seed 5 Hello"));
    let (text, status) = (utf8(&result.stdout), utf8(&result.stderr));
    assert_eq!(result.status.code(), Some(0));
    assert!(text.starts_with("Hello") && text.ends_with('\n') && text.len() > 12, "{text:?}");
    assert_eq!(status.lines().count(), 1, "{status}");
    for part in ["ref (", "tokens/s", "seed 5", "generated 12 tokens"] {
        assert!(status.contains(part), "{status}");
    }
    let json = json(run_golden("-n 12 --seed 5 --json Hello"));
    assert_eq!(text, format!("Hello{}\n", json["text"].as_str().unwrap()));
}

#[test]
fn json_tells_everything() {
    let result = output(run_golden("-n 12 --seed 5 --json Hello"));
    assert!(result.stderr.is_empty(), "{}", utf8(&result.stderr));
    let json: Value = serde_json::from_slice(&result.stdout).unwrap();
    assert_eq!(json["token_ids"].as_array().unwrap().len(), 12);
    assert_eq!(json["prompt_token_ids"][0], 992);
    assert_eq!(json["device"], "ref");
    assert_eq!(json["finish_reason"], "length");
    assert_eq!(json["seed"], 5);
    assert!(json["timings"]["prompt_tokens_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn guessing_ahead_changes_no_text_and_is_reported() {
    for options in ["--temp 0 --repeat-penalty 0.5", "--seed 5 --temp 0.8 --repeat-penalty 0.3"] {
        let arguments = format!("-n 24 {options} Hello");
        let off = json(run_golden(&format!("--json {arguments}")));
        let on = json(run_golden(&format!("--json --speculate prompt {arguments}")));
        assert_eq!(on["token_ids"], off["token_ids"]);
        assert_eq!(off.get("speculation"), None);
        let number = |key: &str| on["speculation"][key].as_f64().unwrap();
        let [proposed, accepted, passes] = ["proposed", "accepted", "passes"].map(number);
        assert!(proposed >= accepted && accepted > 0.0, "{on}");
        assert_eq!(passes + accepted + 1.0, 24.0, "{on}");
        assert_eq!(number("tokens_per_pass"), (passes + accepted) / passes);
        let result = output(run_golden(&format!("--speculate prompt {arguments}")));
        let (text, status) = (utf8(&result.stdout), utf8(&result.stderr));
        assert_eq!(text, stdout(run_golden(&format!("--speculate off {arguments}"))));
        let found = format!("guessed {proposed} tokens, {accepted} right (");
        assert!(status.contains(&found) && status.contains("tokens a pass"), "{status}");
    }
}

#[test]
fn a_seed_fixes_the_text() {
    let text = |options: &str| stdout(run_golden(&format!("-n 24 {options} Hello")));
    assert_eq!(text("--seed 1"), text("--seed 1"));
    assert_ne!(text("--seed 1"), text("--seed 2"));
    assert_eq!(text("--temp 0"), text("--temp 0 --seed 9"));
    assert_eq!(text("--top-k 1 --seed 3"), text("--temp 0"));
    // Without a seed, the report names the one that was drawn.
    let drawn = json(run_golden("-n 24 --json Hello"));
    let again = format!("-n 24 --json --seed {} Hello", drawn["seed"]);
    assert_eq!(json(run_golden(&again))["token_ids"], drawn["token_ids"]);
    // Penalised so hard that no token occurs twice.
    let json = json(run_golden("-n 40 --temp 0 --repeat-penalty 1e9 --json Hello"));
    let ids: Vec<u64> =
        json["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
    let mut unique = ids.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), ids.len(), "{ids:?}");
}

#[test]
fn a_prompt_comes_from_standard_input() {
    let from_stdin = |bytes: &[u8]| {
        let mut child = run_golden("-n 4 --temp 0 --json -")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(bytes).unwrap();
        child.wait_with_output().unwrap()
    };
    let expected = json(run_golden("-n 4 --temp 0 --json Hello"));
    for bytes in [b"Hello".as_slice(), b"Hello\n", b"Hello\r\n"] {
        let json: Value = serde_json::from_slice(&from_stdin(bytes).stdout).unwrap();
        assert_eq!(json["prompt_token_ids"], expected["prompt_token_ids"]);
        assert_eq!(json["token_ids"], expected["token_ids"]);
    }
    let invalid = from_stdin(b"Hell\xff");
    assert_eq!(invalid.status.code(), Some(1));
    assert!(utf8(&invalid.stderr).starts_with("error: reading standard input"));
}

#[test]
fn the_kv_cache_has_the_format_asked_for() {
    // Three layers of two heads of 64 or so: what matters is how the formats compare.
    let bytes = |arguments: &str| {
        let report = json(run_golden(&format!("{arguments} -n 2 --temp 0 --json Hello")));
        let kv = &report["kv"];
        assert_eq!(kv["context"], 4096, "{report}");
        (kv["format"].as_str().unwrap().to_owned(), kv["bytes"].as_u64().unwrap())
    };
    let (format, whole) = bytes("");
    assert_eq!((format.as_str(), bytes("--kv f32")), ("f32", ("f32".to_owned(), whole)));
    assert_eq!(bytes("--kv f16"), ("f16".to_owned(), whole / 2));
    let (format, int8) = bytes("--kv int8");
    assert!(format == "int8" && int8 > whole / 4 && int8 < whole / 3, "{int8} of {whole}");
    let result = output(run_golden("-n 2 --kv f16 Hello"));
    assert!(utf8(&result.stderr).contains("KV cache f16"), "{}", utf8(&result.stderr));
}

#[test]
fn a_session_is_saved_and_continued() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("s").display().to_string();
    let ids = |report: &Value| {
        let ids = report["token_ids"].as_array().unwrap();
        ids.iter().map(|id| id.as_u64().unwrap()).collect::<Vec<_>>()
    };
    let whole = ids(&json(run_golden("-n 16 --temp 0 --json Hello")));
    let first =
        ids(&json(run_golden(&format!("-n 8 --temp 0 --save-session {file} --json Hello"))));
    let mut command = run_golden(&format!("-n 8 --temp 0 --load-session {file} --json"));
    command.arg("");
    let second = json(command);
    assert_eq!([first, ids(&second)].concat(), whole);
    let timings = &second["timings"];
    let prompt = second["prompt_token_ids"].as_array().unwrap().len() as u64;
    assert_eq!(timings["cached_prompt_tokens"], prompt - 1);
    // On another device; with a text of its own; into what it does not fit.
    let cpu = sterna(&format!(
        "run -m {GOLDEN}/bitnet-a-packed --device cpu -n 8 --temp 0 --load-session {file} --json x"
    ));
    assert_eq!(json(cpu)["prompt_token_ids"].as_array().unwrap().len() as u64, prompt + 1);
    let message = failure(run_golden(&format!("--kv int8 --load-session {file} x")), 1);
    assert!(message.contains("--kv f32"), "{message}");
    let message = failure(sterna(&format!("run --device ref --load-session {file} x")), 1);
    assert!(message.contains("another model"), "{message}");
    fs::write(&file, "no session").unwrap();
    let message = failure(run_golden(&format!("--load-session {file} x")), 1);
    assert!(message.contains("not a valid session file"), "{message}");
}

#[test]
fn the_context_is_a_limit() {
    let full = json(run_golden("-n 99 --temp 0 --context 8 --json Hello"));
    let (prompt, tokens) = (&full["prompt_token_ids"], &full["token_ids"]);
    // The last token need not fit: nothing follows it.
    let total = prompt.as_array().unwrap().len() + tokens.as_array().unwrap().len();
    assert_eq!((total, full["finish_reason"].as_str()), (9, Some("context")));
    let shifted = json(run_golden("-n 20 --temp 0 --context 8 --on-overflow shift --json Hello"));
    assert_eq!(shifted["token_ids"].as_array().unwrap().len(), 20);
    let message = failure(run_golden("--context 3 Hello"), 1);
    assert!(message.contains("do not fit the context of 3"), "{message}");
    let message = failure(run_golden("--context 999999 Hello"), 1);
    assert!(message.contains("4096"), "{message}");
    let none = json(run_golden("-n 0 --json Hello"));
    assert_eq!((none["text"].as_str(), none["finish_reason"].as_str()), (Some(""), Some("length")));
}

#[test]
fn a_stop_token_ends_the_text() {
    let directory = copy_of_golden();
    let first = json(run_golden("-n 1 --temp 0 --json Hello"))["token_ids"][0].clone();
    let config = serde_json::json!({ "eos_token_id": [1, first] });
    fs::write(directory.path().join("generation_config.json"), config.to_string()).unwrap();
    let command =
        format!("run --device ref --temp 0 --json -m {} Hello", directory.path().display());
    let json = json(sterna(&command));
    assert_eq!(json["finish_reason"], "stop");
    assert_eq!(json["token_ids"], serde_json::json!([first]));
    assert_eq!(json["text"], "", "a stop token is no text");
}

#[test]
fn chat_uses_the_template() {
    let json = json(run_golden("-n 3 --temp 0 --json --chat --system Short. Bye?"));
    let tokens: Value =
        serde_json::from_slice(&fs::read(format!("{GOLDEN}/expected/tokens.json")).unwrap())
            .unwrap();
    // Both end in "User: Bye?<|eot_id|>Assistant: ".
    let golden = tokens["chat"]["ids"].as_array().unwrap();
    let prompt = json["prompt_token_ids"].as_array().unwrap();
    assert_eq!(prompt[0], 992);
    assert_ne!(prompt[1], 992, "the template writes BOS; the tokenizer must not");
    assert_eq!(prompt[prompt.len() - 16..], golden[golden.len() - 16..]);

    let directory = copy_of_golden();
    fs::write(directory.path().join("tokenizer_config.json"), "{}").unwrap();
    let chat = format!("run --device ref --chat -m {} Hello", directory.path().display());
    let message = failure(sterna(&chat), 1);
    assert!(message.contains("no chat template"), "{message}");
    let template = "{{ raise_exception('not\ntoday') }}";
    fs::write(directory.path().join("chat_template.jinja"), template).unwrap();
    let message = failure(sterna(&chat), 1);
    assert!(message.contains("not today"), "{message}");
}

#[test]
fn damaged_models_are_refused() {
    type Damage = fn(Vec<u8>) -> Vec<u8>;
    let cases: [(&str, Damage); 12] = [
        ("model.safetensors", |bytes| bytes[..bytes.len() / 2].to_vec()),
        ("model.safetensors", |bytes| bytes[..5].to_vec()),
        ("model.safetensors", |_| Vec::new()),
        ("model.safetensors", |bytes| [&[0xff; 8], &bytes[8..]].concat()),
        ("config.json", |_| b"{".to_vec()),
        ("config.json", |_| b"[]".to_vec()),
        ("config.json", |_| "[".repeat(1_000_000).into_bytes()),
        ("tokenizer.json", |bytes| bytes[..bytes.len() - 100].to_vec()),
        ("tokenizer.json", |_| b"{}".to_vec()),
        ("tokenizer_config.json", |_| b"\xff".to_vec()),
        ("generation_config.json", |_| br#"{"eos_token_id": 1000}"#.to_vec()),
        ("generation_config.json", |_| br#"{"eos_token_id": "\u001b[2J\n"}"#.to_vec()),
    ];
    for (name, damage) in cases {
        let directory = copy_of_golden();
        let path = directory.path().join(name);
        fs::write(&path, damage(fs::read(&path).unwrap())).unwrap();
        let message = failure(run_in(directory.path()), 1);
        assert!(message.contains(name), "{name}: {message}");
    }
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        let directory = copy_of_golden();
        fs::remove_file(directory.path().join(name)).unwrap();
        let message = failure(run_in(directory.path()), 1);
        assert!(message.contains(name), "{name}: {message}");
    }
    // What only helps may be missing.
    let directory = copy_of_golden();
    for name in ["generation_config.json", "tokenizer_config.json"] {
        fs::remove_file(directory.path().join(name)).unwrap();
    }
    stdout(run_in(directory.path()));
}

/// A `sterna logits` run into a directory of its own.
fn logits_in(directory: &TempDir, arguments: &str) -> (Command, PathBuf) {
    let out = directory.path().join("out.safetensors");
    let model = format!("-m {GOLDEN}/bitnet-a-packed --device ref");
    (sterna(&format!("logits {model} --out {} {arguments}", out.display())), out)
}

fn files_in(directory: &TempDir) -> usize {
    fs::read_dir(directory.path()).unwrap().count()
}

#[test]
fn logits_go_to_a_file() {
    let directory = TempDir::new().unwrap();
    // More tokens than one batch holds.
    let tokens: Vec<String> = (0..100).map(|i| (i * 7 % 1000).to_string()).collect();
    let (command, out) = logits_in(&directory, &format!("--tokens {}", tokens.join(",")));
    assert_eq!(stdout(command), "");
    assert_eq!(files_in(&directory), 1);
    let bytes = fs::read(&out).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = file.tensor("logits").unwrap();
    assert_eq!(logits.dtype(), safetensors::Dtype::F32);
    assert_eq!(logits.shape(), [100, 1000]);
    let values: Vec<f32> = logits
        .data()
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
        .collect();
    assert!(values.iter().all(|value| value.is_finite()));
    assert_ne!(values[..1000], values[99_000..]);

    // A shorter run replaces the file, and has the same rows.
    let (command, _) = logits_in(&directory, &format!("--tokens {}", tokens[..3].join(",")));
    stdout(command);
    let shorter = fs::read(&out).unwrap();
    let file = safetensors::SafeTensors::deserialize(&shorter).unwrap();
    assert_eq!(file.tensor("logits").unwrap().data(), &logits.data()[..12_000]);
}

#[test]
fn a_failed_logits_run_leaves_nothing() {
    let directory = TempDir::new().unwrap();
    // The last token is wrong: it shows when the first batch has been written.
    let tokens = "1,".repeat(99) + "1000";
    let (command, _) = logits_in(&directory, &format!("--tokens {tokens}"));
    let message = failure(command, 1);
    assert!(message.contains("token 1000"), "{message}");
    assert_eq!(files_in(&directory), 0);
    let (command, out) = logits_in(&directory, &format!("--tokens {}1", "1,".repeat(4096)));
    assert!(failure(command, 1).contains("4096"));
    assert_eq!(files_in(&directory), 0);
    // What was there before stays.
    fs::write(&out, "before").unwrap();
    let (command, _) = logits_in(&directory, "--tokens 1000");
    failure(command, 1);
    assert_eq!((fs::read_to_string(&out).unwrap().as_str(), files_in(&directory)), ("before", 1));
    // Places where no file can be.
    let (command, _) = logits_in(&directory, "--tokens 1 --out /no/such/directory/file");
    failure(command, 2);
    for out in ["/no/such/directory/file", directory.path().to_str().unwrap()] {
        let model = format!("logits -m {GOLDEN}/bitnet-a-packed --device ref --tokens 1");
        let message = failure(sterna(&format!("{model} --out {out}")), 1);
        assert!(message.contains(out), "{message}");
    }
}

#[test]
fn devices_are_listed() {
    let list = json(sterna("devices --json"));
    let devices = list["devices"].as_array().unwrap();
    assert!(devices.iter().any(|device| device["name"] == "cpu"));
    assert_eq!(devices.iter().filter(|device| device["chosen"] == true).count(), 1);
    let text = stdout(sterna("devices"));
    let is_energy = |line: &&str| line.starts_with("energy: ") || line.starts_with("no ");
    assert_eq!(text.lines().filter(|line| !is_energy(line)).count(), devices.len());
    assert_eq!(text.lines().filter(|line| line.starts_with('*')).count(), 1);
    // Meters, or one line that names everything that was looked for.
    let energy = &list["energy"];
    let (meters, missing) = (energy["meters"].as_array(), energy["missing"].as_array().unwrap());
    assert_eq!(
        text.lines().filter(|line| line.starts_with("energy: ")).count(),
        meters.unwrap().len()
    );
    let line = text.lines().find(|line| line.starts_with("no ")).unwrap_or_default();
    assert_eq!(line.starts_with("no energy counter: "), meters.unwrap().is_empty(), "{text}");
    assert!(missing.iter().all(|missing| line.contains(missing.as_str().unwrap())), "{text}");
}

#[test]
fn inspect_counts_zeros() {
    let found = json(sterna("inspect --sparsity --json"));
    let share = |key: &str| found[key].as_f64().unwrap();
    // relu² closes about half of the gates, and never opens one again.
    assert!((0.3..0.9).contains(&share("gated_zeros")), "{found}");
    assert!((share("gated_zeros")..1.0).contains(&share("down_input_zeros")), "{found}");
    let (all, needed) = (share("up_down_bytes"), share("needed_bytes"));
    let zeros = share("gated_zeros") + share("down_input_zeros");
    assert!((needed - all / 2.0 * (2.0 - zeros)).abs() < 1e-6 * all);
    assert_eq!(found["layers"].as_array().unwrap().len(), 4);
    // SiLU is zero only where its input is.
    let llama = format!("inspect --sparsity --json {GOLDEN}/llama-a-bitlinear --text");
    let text = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(text.path(), "a b c d").unwrap();
    let llama = json(sterna(&format!("{llama} {}", text.path().display())));
    assert!(llama["gated_zeros"].as_f64().unwrap() < 0.01, "{llama}");
    assert!(stdout(sterna("inspect --sparsity")).contains("closed gates"));
    failure(sterna("inspect --sparsity --text /no/such/file"), 1);
    failure(sterna("inspect --text /no/such/file"), 2);
}

#[test]
fn inspect_counts_what_is_there() {
    for name in ["bitnet-a-packed", "bitnet-a-bf16", "llama-a-bitlinear"] {
        let json = json(sterna(&format!("inspect --json {GOLDEN}/{name}")));
        let memory = &json["memory"];
        let bytes = |key: &str| memory[key].as_u64().unwrap();
        let parts = ["ternary_bytes", "embedding_bytes", "lm_head_bytes", "norms_bytes"];
        let sum: u64 = parts.iter().map(|part| bytes(part)).sum();
        assert_eq!(sum + bytes("kv_cache_bytes"), bytes("total_bytes"));
        assert!(json["tensors"].as_array().unwrap().len() > 20);
        let text = stdout(sterna(&format!("inspect {GOLDEN}/{name}")));
        assert!(text.contains("ternary matrices") && text.contains("q_proj"), "{text}");
    }
    let packed = json(sterna(&format!("inspect --json {GOLDEN}/bitnet-a-packed")));
    let master = json(sterna(&format!("inspect --json {GOLDEN}/bitnet-a-bf16")));
    assert_eq!(packed["parameters"], master["parameters"]);
    failure(sterna("inspect /no/such/model"), 1);
    stdout(sterna("inspect"));
}

#[test]
fn the_built_in_model_runs() {
    let json = json(sterna("run --device ref -n 4 --json Once"));
    assert_eq!(json["model"], "built-in model");
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let mut child =
        run_golden("-n 2000 Hello").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 5];
    child.stdout.take().unwrap().read_exact(&mut first).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), utf8(&output.stderr)), (Some(0), ""));
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_text() {
    let mut child = run_golden("-n 4000 --seed 1 Hello")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut text = vec![0; 20];
    stdout.read_exact(&mut text).unwrap();
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    stdout.read_to_end(&mut text).unwrap();
    let mut status = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut status).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{status}");
    assert!(status.contains("interrupted") && text.ends_with(b"\n"), "{status}");
}

/// A prompt that takes the reference many seconds ends at Ctrl-C, too.
#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_a_prompt() {
    let mut command = run_golden("-n 5 --temp 0 --json");
    command.arg("Why? ".repeat(1000));
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The signals that it handles itself, as a mask: the second bit is SIGINT.
    let status = format!("/proc/{}/status", child.id());
    let handles = || {
        let status = fs::read_to_string(&status).unwrap();
        let mask = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(mask.trim(), 16).unwrap() & 2 != 0
    };
    while !handles() {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", utf8(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["finish_reason"], "interrupted");
    assert_eq!((&report["text"], report["token_ids"].as_array().unwrap().len()), (&"".into(), 0));
}

/// Whether there is an adapter; a test that is skipped without one says so.
#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn has_adapter() -> bool {
    let found = sterna::backend::gpu::adapters().iter().any(|adapter| adapter.api != "gl");
    if !found {
        let required = std::env::var_os("STERNA_REQUIRE_GPU").is_some_and(|value| value == "1");
        assert!(!required, "there is no adapter");
        eprintln!("skipped: no adapter");
    }
    found
}

#[test]
fn tune_reports_every_candidate() {
    if !has_adapter() {
        return;
    }
    let cache = TempDir::new().unwrap();
    let mut command = sterna("tune --json --budget 0.3 --synthetic bitnet-large");
    command.env("STERNA_CACHE", cache.path());
    let report = json(command);
    for key in ["device", "adapter", "kind", "api", "driver", "wgpu", "kernels", "clock"] {
        assert!(report[key].as_str().is_some_and(|text| !text.is_empty()), "{key}: {report}");
    }
    for key in ["copy_gb_s", "dispatch_us", "seconds", "kept", "not_kept", "rotated_bytes"] {
        assert!(report.get(key).is_some(), "{key}: {report}");
    }
    // A step begun before the end may take as long as it takes.
    assert!(report["seconds"].as_f64().unwrap() < 10.0, "{report}");
    let shapes = report["shapes"].as_array().unwrap();
    let steps: Vec<_> = shapes.iter().map(|shape| shape["step"].as_str().unwrap()).collect();
    assert_eq!(steps, ["qkv", "o", "gate_up", "down"]);
    assert_eq!((&shapes[3]["n"], &shapes[3]["k"]), (&1536.into(), &4096.into()));
    for shape in shapes {
        let candidates = shape["candidates"].as_array().unwrap();
        assert!(candidates.len() >= 2, "{shape}");
        for candidate in candidates {
            for key in [
                "variant", "slices", "rows", "unroll", "fused", "us", "gb_s", "share", "exact",
                "refused",
            ] {
                assert!(candidate.get(key).is_some(), "{key}: {candidate}");
            }
            assert_ne!(candidate["exact"], false, "{candidate}");
        }
        for key in ["variant", "slices", "rows", "unroll", "fused"] {
            assert!(shape["winner"].get(key).is_some(), "{shape}");
        }
    }
    let is_software = report["kind"] == "software rasteriser";
    assert_eq!(report["kept"].is_null(), is_software, "{report}");
    assert_eq!(cache.path().join("tune").exists(), !is_software);
}

#[test]
fn with_no_time_the_defaults_win() {
    if !has_adapter() {
        return;
    }
    let cache = TempDir::new().unwrap();
    let mut command = sterna("tune --json --budget 0");
    command.env("STERNA_CACHE", cache.path());
    let report = json(command);
    assert!(report["copy_gb_s"].is_null() && report["dispatch_us"].is_null(), "{report}");
    let shapes = report["shapes"].as_array().unwrap();
    assert_eq!(shapes.len(), 4);
    for shape in shapes {
        let first = &shape["candidates"][0];
        for key in ["variant", "slices", "rows", "unroll", "fused"] {
            assert_eq!(shape["winner"][key], first[key], "{shape}");
        }
        assert!(first["us"].is_null() && first["exact"].is_null(), "{shape}");
    }
}

#[test]
fn tune_refuses_what_has_no_choice() {
    let message = failure(sterna("tune --synthetic bonsai-1.7b"), 1);
    assert!(message.contains("bonsai-1.7b") && message.contains("scales of groups"), "{message}");
}

/// A second run takes what the first one measured, and both write what an untuned one writes; a
/// software rasteriser is not measured.
#[test]
fn a_run_tunes_once() {
    if !has_adapter() {
        return;
    }
    let cache = TempDir::new().unwrap();
    let run = |tune: &str| {
        let mut command = sterna(&format!("run --device gpu --tune {tune} --temp 0 -n 8 Once"));
        command.env("STERNA_CACHE", cache.path());
        let output = output(command);
        assert_eq!(output.status.code(), Some(0), "{}", utf8(&output.stderr));
        (utf8(&output.stdout).to_owned(), utf8(&output.stderr).to_owned())
    };
    let (text, notes) = run("off");
    assert!(!notes.contains("tuned"), "{notes}");
    assert!(!cache.path().join("tune").exists());
    let (first, notes) = run("auto");
    let was_tuned = notes.contains("tuned 4 matrix steps");
    assert_eq!(was_tuned, !notes.contains("software rasteriser"), "{notes}");
    let (second, notes) = run("auto");
    assert!(!notes.contains("tuned"), "{notes}");
    assert_eq!([&first, &second], [&text, &text]);
    assert_eq!(cache.path().join("tune").exists(), was_tuned);
}
