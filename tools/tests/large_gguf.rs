//! A GGUF file of the dimensions of Ternary-Bonsai-8B on the CPU, in a process of its own so that its
//! peak memory is known. Slow and large (2.2 GB on disk and in memory), so run on request:
//! `cargo test --release -p sterna-tools -- --ignored`.

use std::process::Command;
use std::time::Instant;

use sterna::backend::{Device, LoadOptions, Output, Want};
use sterna::{Checkpoint, Transformer};

#[test]
#[expect(clippy::print_stdout, reason = "the measured figures")]
#[ignore = "slow: writes and loads a file of 2.2 GB"]
fn ternary_bonsai_8b_needs_little_more_memory_than_its_file() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("model.gguf");
    let status = Command::new(env!("CARGO_BIN_EXE_sterna-tools"))
        .args(["synth", "--shape", "ternary-bonsai-8b", "--format", "pq2", "--out"])
        .arg(&path)
        .status()
        .expect("the program starts");
    assert!(status.success());
    let file_len = std::fs::metadata(&path).expect("the file").len();

    let start = Instant::now();
    let checkpoint = Checkpoint::open(&path).expect("the file opens");
    let options = LoadOptions { context: Some(64), ..LoadOptions::default() };
    let mut model = Transformer::load(&checkpoint, Device::Cpu, &options, &mut |_| {})
        .expect("the CPU is always there");
    println!("loaded in {:.2} s", start.elapsed().as_secs_f64());
    let start = Instant::now();
    let output = model.feed(&[1, 20_000, 151_000], Want::Token).expect("three tokens");
    assert!(matches!(output, Output::Token(_)), "{output:?}");
    println!("three tokens in {:.2} s", start.elapsed().as_secs_f64());

    let Ok(status) = std::fs::read_to_string("/proc/self/status") else {
        return println!("this system does not tell the peak memory");
    };
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("peak memory");
    let kib: u64 = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("KiB");
    let ratio = (kib * 1024) as f64 / file_len as f64;
    println!("file {file_len} bytes, peak memory {kib} KiB, {ratio:.3} of the file");
    assert!(ratio < 1.2, "{ratio}");
}
