//! What a device's memory gives: the roof of a token's speed.

use std::hint::black_box;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::backend::gpu::{AdapterKind, Capabilities, Gpu, tune};
use crate::backend::{Device, LoadOptions, resolve_auto, simd};
use crate::error::{Error, Result};

/// Bytes that are read again and again: more than caches hold.
const BYTES: usize = 256 << 20;
/// Passes, of which the fastest counts: everything else on the machine can only slow one down.
const PASSES: usize = 7;

/// Measured bytes a second, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bandwidth {
    /// 10⁹ bytes a second.
    pub gb_per_second: f64,
    /// What was done.
    pub method: String,
}

impl Bandwidth {
    /// Of what a model on this device reads its weights from.
    ///
    /// # Errors
    /// If the device is not there, or fails.
    pub fn of(device: Device, options: &LoadOptions) -> Result<Self> {
        match device {
            Device::Auto => Self::of(resolve_auto(), options),
            Device::Gpu(index) => Self::of_gpu(&Gpu::open(index, Capabilities::Adapter)?),
            Device::Cpu => Self::of_cpu(simd::threads(options)),
            Device::Reference => Self::of_cpu(1),
        }
    }

    /// Of reading memory with so many threads.
    ///
    /// # Errors
    /// [`Error::Threads`] if the system refuses them.
    pub fn of_cpu(threads: usize) -> Result<Self> {
        let words = vec![1u64; BYTES / size_of::<u64>()];
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|error| Error::Threads { threads, problem: error.to_string() })?;
        let mut fastest = Duration::MAX;
        for _ in 0..PASSES {
            let start = Instant::now();
            pool.scope(|scope| {
                for part in words.chunks(words.len().div_ceil(threads)) {
                    scope.spawn(move |_| {
                        black_box(sum(part));
                    });
                }
            });
            fastest = fastest.min(start.elapsed());
        }
        let plural = if threads == 1 { "" } else { "s" };
        Ok(Self {
            gb_per_second: BYTES as f64 / fastest.as_secs_f64() / 1e9,
            method: format!("read of {} MiB by {threads} thread{plural}", BYTES >> 20),
        })
    }

    /// Of copies within a GPU's memory, bytes read and written.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub fn of_gpu(gpu: &Gpu) -> Result<Self> {
        let bytes = (BYTES as u64).min(gpu.max_binding());
        let gb_per_second = tune::copy_gb_s(gpu, bytes, PASSES)?;
        let whose = match gpu.adapter.kind {
            AdapterKind::Software => " on a software rasteriser, by the CPU",
            _ => "",
        };
        let method = format!("copy of {} MiB, read and written{whose}", bytes >> 20);
        Ok(Self { gb_per_second, method })
    }
}

/// The sum of words, eight lanes at a time so that memory is what limits it.
fn sum(words: &[u64]) -> u64 {
    let mut lanes = [0u64; 8];
    let chunks = words.chunks_exact(8);
    let rest: u64 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().sum::<u64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        let words: Vec<u64> = (1..=1003).collect();
        assert_eq!(sum(&words), 1003 * 1004 / 2);
    }

    #[test]
    fn memory_has_a_speed() {
        let measured = Bandwidth::of_cpu(2).unwrap();
        assert!(measured.gb_per_second > 0.05 && measured.gb_per_second < 1e5, "{measured:?}");
        assert!(measured.method.contains("2 threads"), "{measured:?}");
    }
}
