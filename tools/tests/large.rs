//! The real dimensions of BitNet b1.58 2B4T, through a file on disk. Slow and large (1.2 GB on disk), so
//! run on request: `cargo test --release -p sterna-tools -- --ignored`.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use sterna::backend::simd::Level;
use sterna::backend::{Device, HeadChoice, LoadOptions, Output, Want};
use sterna::{Checkpoint, Error, Transformer};

/// Bytes of this process's resident memory, where the system tells: `VmHWM:` at its highest,
/// `RssAnon:` now and without the pages of files.
fn resident(kind: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with(kind))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// The ternary matrices `(N, K)` of a layer.
const BITNET_2B4T: [(u64, u64); 4] = [(3840, 2560), (2560, 2560), (13_824, 2560), (2560, 6912)];

/// Bytes of a packed matrix on this machine's level.
fn packed_bytes(n: u64, k: u64) -> u64 {
    let has_base3 = Level::detect().expect("a level").has_base3();
    let threads = sterna::backend::simd::threads(&LoadOptions::default());
    if has_base3 && threads > 1 { n * k / 5 } else { n * k / 4 }
}

fn greedy(model: &mut Transformer, n_tokens: usize) -> Vec<u32> {
    let mut token_ids = Vec::new();
    let mut next = vec![1, 20_000, 128_000];
    while token_ids.len() < n_tokens {
        let Ok(Output::Token(token)) = model.feed(&next, Want::Token) else {
            panic!("no token after {token_ids:?}");
        };
        token_ids.push(token);
        next = vec![token];
    }
    token_ids
}

#[test]
#[expect(clippy::print_stdout, reason = "the measured figures")]
#[ignore = "slow: writes and loads a checkpoint of 1.2 GB"]
fn bitnet_2b4t_loads_within_bounds_and_gpu_agrees_with_cpu() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("bitnet-2b4t");
    let status = Command::new(env!("CARGO_BIN_EXE_sterna-tools"))
        .args(["synth", "--shape", "bitnet-2b4t", "--seed", "1", "--out"])
        .arg(&path)
        .status()
        .expect("the program starts");
    assert!(status.success());
    // What is read of a token: the matrices as they are packed, and the head.
    let packed: u64 = BITNET_2B4T.iter().map(|&(n, k)| packed_bytes(n, k)).sum::<u64>() * 30;
    let table = 128_256 * 2560 * 2;
    let on_cpu = |head, head_bytes: u64| {
        let weights = packed + head_bytes;
        let cpu = load_and_decode(&path, Device::Cpu, head).expect("the CPU is always there");
        println!("CPU, {head:?}: {:.2} s to load; tokens {:?}", cpu.load_seconds, cpu.token_ids);
        assert!(cpu.load_seconds < 10.0, "{} s", cpu.load_seconds);
        if let Some(own) = cpu.own_memory {
            let ratio = own as f64 / weights as f64;
            println!("memory of its own {own} bytes, {ratio:.3} of the weights");
            assert!(ratio < 1.1, "{ratio}");
        }
        // Pages of the table that were read count as resident until the system takes them back.
        if let Some(peak) = resident("VmHWM:") {
            let ratio = peak as f64 / (weights + table) as f64;
            println!(
                "peak memory {peak} bytes, {ratio:.3} of the weights and what is read of the file"
            );
            assert!(ratio < 1.1, "{ratio}");
        }
        cpu
    };
    // A byte a code, and 16 a row: the table that they are made from stays in its file. First, because
    // the peak is that of the process.
    let cpu = on_cpu(HeadChoice::Int8, 128_256 * (2560 + 16));
    let exact = on_cpu(HeadChoice::Exact, table);
    assert_eq!(cpu.token_ids, exact.token_ids);

    match load_and_decode(&path, Device::Gpu(None), HeadChoice::Int8) {
        Ok(gpu) => {
            println!("{}: loaded in {:.2} s", gpu.device, gpu.load_seconds);
            assert_eq!(gpu.token_ids, cpu.token_ids, "{}", gpu.device);
        }
        Err(Error::NoAdapter { .. }) => {
            let required = std::env::var_os("STERNA_REQUIRE_GPU").is_some_and(|value| value == "1");
            assert!(!required, "no adapter");
            println!("no adapter: the GPU part is skipped");
        }
        Err(error) => panic!("{error}"),
    }
}

struct Run {
    device: String,
    load_seconds: f64,
    token_ids: Vec<u32>,
    /// After the tokens, where the system tells.
    own_memory: Option<u64>,
}

fn load_and_decode(path: &Path, device: Device, head: HeadChoice) -> Result<Run, Error> {
    let start = Instant::now();
    let checkpoint = Checkpoint::open(path)?;
    let options = LoadOptions { context: Some(512), head, ..LoadOptions::default() };
    let mut model = Transformer::load(&checkpoint, device, &options, &mut |_| {})?;
    let load_seconds = start.elapsed().as_secs_f64();
    let token_ids = greedy(&mut model, 8);
    let own_memory = resident("RssAnon:");
    Ok(Run { device: model.device().description.clone(), load_seconds, token_ids, own_memory })
}
