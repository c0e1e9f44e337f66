//! The machine that is measured, and the memory of this process.

use std::fs;

use serde::{Deserialize, Serialize};
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use crate::backend::LoadOptions;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::kv_cache::{BLOCK, KvShape};
use crate::weights::MemorySummary;

/// What a machine is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Operating system and its version.
    pub os: String,
    /// Version of the kernel.
    pub kernel: String,
    /// Instruction set.
    pub arch: String,
    /// The processor's name.
    pub cpu: String,
    /// Cores.
    pub physical_cores: Option<usize>,
    /// Threads that can run at once.
    pub logical_cores: usize,
    /// Bytes of memory, or what the process may use of it.
    pub memory_bytes: u64,
}

const UNKNOWN: &str = "unknown";

fn system() -> System {
    let kind = RefreshKind::nothing()
        .with_cpu(CpuRefreshKind::nothing())
        .with_memory(MemoryRefreshKind::nothing().with_ram());
    System::new_with_specifics(kind)
}

impl Machine {
    /// This one.
    pub fn this() -> Self {
        let system = system();
        let or_unknown = |text: Option<String>| text.unwrap_or_else(|| UNKNOWN.to_owned());
        let name = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned());
        let total = system.total_memory();
        Self {
            os: or_unknown(System::long_os_version()),
            kernel: or_unknown(System::kernel_version()),
            arch: std::env::consts::ARCH.to_owned(),
            cpu: or_unknown(name.filter(|name| !name.is_empty())),
            physical_cores: System::physical_core_count(),
            logical_cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: limits(&system).map_or(total, |(limit, _)| limit.min(total)),
        }
    }
}

/// The most memory that the process's group may have, and what is left of it.
fn limits(system: &System) -> Option<(u64, u64)> {
    let limits = system.cgroup_limits()?;
    Some((limits.total_memory, limits.free_memory))
}

/// Bytes of memory that can be taken without others losing theirs.
pub fn available_memory() -> u64 {
    let system = system();
    let available = system.available_memory();
    limits(&system).map_or(available, |(_, free)| free.min(available))
}

/// Bytes that a model of random weights takes at most: its weights as they are packed, its tables, the
/// int8 copy of one, a layer on its way, and the KV cache of `positions`.
///
/// # Errors
/// If the options do not fit the model.
pub fn synthetic_bytes(
    config: &ModelConfig,
    options: &LoadOptions,
    positions: usize,
) -> Result<u64> {
    let memory = MemorySummary::synthetic(config);
    let table = (config.vocab_size * config.hidden_size) as u64;
    let kv = KvShape::new(config, options.kv_format(config)?);
    let layer = memory.ternary.div_ceil(config.num_hidden_layers.max(1) as u64);
    // Unpacked, a layer is a byte a weight.
    let weights = memory.ternary + memory.norms + memory.embedding + memory.lm_head + 4 * layer;
    Ok(weights + table + (positions.div_ceil(BLOCK) * kv.block_bytes()) as u64)
}

/// Fails if a model does not fit the memory that is free.
///
/// # Errors
/// [`Error::ModelMemory`], naming both.
pub fn check_memory(model: &str, needed: u64) -> Result<()> {
    check_available(model, needed, available_memory())
}

/// [`check_memory`] with so much available.
///
/// # Errors
/// [`Error::ModelMemory`].
pub fn check_available(model: &str, needed: u64, available: u64) -> Result<()> {
    if needed <= available {
        return Ok(());
    }
    Err(Error::ModelMemory { model: model.to_owned(), needed, available })
}

/// A line of `/proc/self/status`, in bytes.
fn status(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// How the process's memory grows from here: its resident set, with what it has touched of mapped files.
#[derive(Debug, Clone, Copy)]
pub struct MemoryMark(Option<u64>);

impl MemoryMark {
    /// Starts the system's high-water mark again, where it can be.
    pub fn set() -> Self {
        let is_reset = fs::write("/proc/self/clear_refs", "5").is_ok();
        Self(status("VmRSS").filter(|_| is_reset))
    }

    /// The most that the process has had since then, less what it had; `None` where the system does not
    /// say (only Linux does).
    pub fn peak(self) -> Option<u64> {
        Some(status("VmHWM")?.saturating_sub(self.0?))
    }
}

/// Seconds that the process has spent on all processors together; `None` where the system does not say
/// (only Linux does).
pub fn processor_seconds() -> Option<f64> {
    /// Ticks a second of what the kernel shows to programs, on every architecture.
    const USER_HZ: f64 = 100.0;
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name, in parentheses, may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks: [u64; 2] = [fields.next()?.parse().ok()?, fields.next()?.parse().ok()?];
    Some((ticks[0] + ticks[1]) as f64 / USER_HZ)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_known() {
        let machine = Machine::this();
        assert!(machine.memory_bytes > 1 << 28 && machine.logical_cores > 0, "{machine:?}");
        assert!(available_memory() <= machine.memory_bytes && !machine.cpu.is_empty());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        check_available("m", 7, 7).unwrap();
        let error = check_available("bonsai-8b", 9_000_000_000, 4_000_000_000).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("bonsai-8b") && text.contains("9.0 GB") && text.contains("4.0 GB"));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn time_of_this_process_passes_while_it_works() {
        let (start, before) = (std::time::Instant::now(), processor_seconds().unwrap());
        while processor_seconds().unwrap() < before + 0.05 {
            assert!(start.elapsed().as_secs() < 60, "a minute of work and no time");
        }
    }
}
