//! Guarded outputs and comparisons that say what differs.

use std::sync::OnceLock;

use libtest_mimic::Failed;
use sterna::Error;
use sterna::backend::gpu::{Call, Capabilities, Gpu, PassParams, Slice, WeightsRead, self_test};

/// The device that the tests share, so that each pipeline is compiled once.
pub fn open(capabilities: Capabilities) -> Result<Gpu, Error> {
    static WEBGPU_DEFAULT: OnceLock<Gpu> = OnceLock::new();
    static ADAPTER: OnceLock<Gpu> = OnceLock::new();
    let device = match capabilities {
        Capabilities::WebGpuDefault => &WEBGPU_DEFAULT,
        Capabilities::Adapter => &ADAPTER,
    };
    match device.get() {
        Some(gpu) => Ok(gpu.share()),
        None => {
            let gpu = Gpu::open(None, capabilities)?;
            Ok(device.get_or_init(|| gpu).share())
        }
    }
}

/// Words before and after an output: a multiple of every adapter's offset alignment.
const GUARD_WORDS: usize = 64;
const GUARD: u32 = 0xDEAD_BEEF;

/// Runs a kernel with guard words around every output and in it, and fails if one around it is
/// touched, or if the kernel writes more or fewer words than its call says. (A kernel that looks rows
/// up writes those of tokens that are in its shard.)
pub fn run_guarded(
    gpu: &Gpu,
    call: &Call,
    params: PassParams,
    inputs: &[&Slice],
    output_words: &[usize],
) -> Result<Vec<Vec<u32>>, Failed> {
    let name = call.kernel.name;
    let mut guarded = Vec::new();
    for &len in output_words {
        let padded = len.next_multiple_of(GUARD_WORDS);
        guarded.push((len, gpu.upload(name, &vec![GUARD; padded + 2 * GUARD_WORDS])?));
    }
    let outputs: Vec<_> = guarded.iter().map(|(len, all)| all.words(GUARD_WORDS, *len)).collect();
    let buffers: Vec<_> = inputs.iter().copied().chain(&outputs).collect();
    self_test::run(gpu, call, params, &buffers)?;
    let mut results = Vec::new();
    let mut changed = 0;
    for (len, all) in &guarded {
        let words = gpu.read(all, all.len_bytes() as usize / 4)?;
        let (before, rest) = words.split_at(GUARD_WORDS);
        let (result, after) = rest.split_at(*len);
        if before.iter().chain(after).any(|&word| word != GUARD) {
            return Err(format!("{name}: wrote outside its output").into());
        }
        changed += result.iter().filter(|&&word| word != GUARD).count() as u64;
        results.push(result.to_vec());
    }
    let stated = call.words_written(&params);
    let exact = call.weights == WeightsRead::All;
    if changed > stated || exact && changed != stated {
        return Err(format!("{name}: wrote {changed} words, and says {stated}").into());
    }
    Ok(results)
}

pub fn as_f32(words: &[u32]) -> Vec<f32> {
    words.iter().map(|&word| f32::from_bits(word)).collect()
}

pub fn as_i32(words: &[u32]) -> Vec<i32> {
    words.iter().map(|&word| word as i32).collect()
}

/// Fails on the first integer that differs.
pub fn same<T: PartialEq + std::fmt::Debug>(
    what: &str,
    found: &[T],
    expected: &[T],
) -> Result<(), Failed> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} values, expected {}", found.len(), expected.len()).into());
    }
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => {
            let (found, expected) = (&found[at], &expected[at]);
            Err(format!("{what}: [{at}]: found {found:?}, expected {expected:?}").into())
        }
    }
}

/// Fails on the first float that is further than `bound(index)` from what is expected.
pub fn close(
    what: &str,
    found: &[f32],
    expected: &[f32],
    bound: impl Fn(usize) -> f32,
) -> Result<(), Failed> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} values, expected {}", found.len(), expected.len()).into());
    }
    for (at, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let both_nan = found.is_nan() && expected.is_nan();
        let within = found == expected || (found - expected).abs() <= bound(at);
        if !both_nan && !within {
            let bound = bound(at);
            return Err(
                format!("{what}: [{at}]: found {found}, expected {expected} ± {bound}").into()
            );
        }
    }
    Ok(())
}
