//! What a meter measures, and which meters measure some of the same joules.

use std::fmt;
use std::time::Duration;

use super::{Measured, MeterInfo};
use crate::error::{Error, Result};

/// A CPU socket, or one die of it where dies have counters of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    /// The number of the physical package.
    pub package: u32,
    /// The die; `None` is the whole package.
    pub die: Option<u32>,
}

impl Socket {
    /// Whether one is a part of the other.
    fn shares(self, other: Self) -> bool {
        let same_die = match (self.die, other.die) {
            (Some(die), Some(other)) => die == other,
            _ => true,
        };
        self.package == other.package && same_die
    }
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.die {
            Some(die) => write!(f, "{} die {die}", self.package),
            None => write!(f, "{}", self.package),
        }
    }
}

/// A part of an Apple chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SocPart {
    /// The CPU's cores.
    Cpu,
    /// The GPU.
    Gpu,
    /// The neural engine.
    NeuralEngine,
    /// The memory.
    Dram,
}

impl SocPart {
    /// All that are counted.
    pub const ALL: [Self; 4] = [Self::Cpu, Self::Gpu, Self::NeuralEngine, Self::Dram];
}

impl fmt::Display for SocPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "CPU",
            Self::Gpu => "GPU",
            Self::NeuralEngine => "neural engine",
            Self::Dram => "memory",
        })
    }
}

/// What a meter measures. GPUs go by their PCI address, batteries by their name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Domain {
    /// A CPU package: cores, uncore, and an integrated GPU.
    Package(Socket),
    /// The cores of a package; on AMD only the package's first core.
    Core(Socket),
    /// What is in the package besides the cores; on Intel's desktop and mobile parts the GPU.
    Uncore(Socket),
    /// The memory modules of a socket.
    Dram(Socket),
    /// What the mainboard's regulators feed: psys.
    Platform,
    /// An AMD APU, by its GPU's sensor: CPU and GPU.
    Apu(String),
    /// A part of an Apple chip; no two parts overlap.
    Soc(SocPart),
    /// A discrete GPU's board, with its memory.
    Board(String),
    /// A discrete GPU without its board.
    GpuChip(String),
    /// A battery: everything that it feeds.
    Battery(String),
}

impl Domain {
    /// In words.
    pub fn covers(&self) -> &'static str {
        match self {
            Self::Package(_) => "CPU package: cores, caches, memory controller, integrated GPU",
            Self::Core(_) => "CPU cores; on AMD the first core of the package only",
            Self::Uncore(_) => "CPU package without its cores; on client parts the integrated GPU",
            Self::Dram(_) => "memory modules of the socket",
            Self::Platform => "platform: package, memory and what else the board's regulators feed",
            Self::Apu(_) => "APU: CPU and GPU",
            Self::Soc(SocPart::Cpu) => "the chip's CPU cores",
            Self::Soc(SocPart::Gpu) => "the chip's GPU, without the memory",
            Self::Soc(SocPart::NeuralEngine) => "the chip's neural engine",
            Self::Soc(SocPart::Dram) => "the chip's memory",
            Self::Board(_) => "GPU board with its memory, without the CPU",
            Self::GpuChip(_) => "GPU package, without the rest of its board",
            Self::Battery(_) => "the whole machine, screen included",
        }
    }

    /// More than anything of the kind draws, even for the length of an update: what a counter
    /// shows beyond it is a reset or a fault, not energy.
    pub(super) fn max_watts(&self) -> f64 {
        match self {
            Self::Package(_)
            | Self::Core(_)
            | Self::Uncore(_)
            | Self::Dram(_)
            | Self::Apu(_)
            | Self::Soc(_) => 2e3,
            Self::Board(_) | Self::GpuChip(_) | Self::Platform => 5e3,
            Self::Battery(_) => 1e3,
        }
    }

    /// How long a counter of this domain may stand still before it shows what was used meanwhile.
    pub(super) fn update_slack(&self) -> Duration {
        match self {
            Self::Battery(_) => Duration::from_secs(60),
            _ => Duration::from_secs(1),
        }
    }

    /// Whether every joule of `other` may be one of `self`.
    ///
    /// Where that depends on the machine (psys with a discrete GPU), it counts as contained.
    fn contains(&self, other: &Self) -> bool {
        use Domain::{Apu, Battery, Board, Core, GpuChip, Package, Platform, Uncore};
        match (self, other) {
            (Battery(_), Battery(_)) | (Platform, Battery(_)) => false,
            (Battery(_) | Platform, _) => true,
            (Package(socket), Core(part) | Uncore(part)) => socket.shares(*part),
            // An APU is the only package of its machine.
            (Apu(_), Apu(_) | Package(_) | Core(_) | Uncore(_)) => true,
            (Board(gpu), GpuChip(chip)) => gpu == chip,
            _ => false,
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        use Domain::{Core, Dram, Package, Uncore};
        match (self, other) {
            (Package(a), Package(b))
            | (Core(a), Core(b))
            | (Uncore(a), Uncore(b))
            | (Dram(a), Dram(b)) => a.shares(*b),
            _ => self == other,
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Package(socket) => write!(f, "package {socket}"),
            Self::Core(socket) => write!(f, "core {socket}"),
            Self::Uncore(socket) => write!(f, "uncore {socket}"),
            Self::Dram(socket) => write!(f, "dram {socket}"),
            Self::Platform => f.write_str("platform"),
            Self::Apu(gpu) => write!(f, "APU {gpu}"),
            Self::Soc(part) => write!(f, "chip's {part}"),
            Self::Board(gpu) => write!(f, "board {gpu}"),
            Self::GpuChip(gpu) => write!(f, "GPU {gpu}"),
            Self::Battery(name) => write!(f, "battery {name}"),
        }
    }
}

/// Whether two domains share joules, so that their sum would count some twice.
pub fn overlaps(a: &Domain, b: &Domain) -> bool {
    a.is_same(b) || a.contains(b) || b.contains(a)
}

/// What ran, for the choice of its meters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload<'a> {
    /// On the CPU, or on a GPU inside its package.
    Package,
    /// On a discrete GPU: the one at this PCI address (`0000:65:00.0`), or all there are.
    DiscreteGpu(Option<&'a str>),
}

/// The meters whose sum is the energy of a run, as indices; no two of them overlap.
///
/// For the CPU: every package and its memory, else the APU, else all parts of an Apple chip, else
/// the platform, else the batteries.
/// For a discrete GPU: its board (else its chip), and the packages and their memory beside it.
/// Where two meters have the same domain, the source that [`super::Source`] names first is taken.
/// Parts (cores, uncore) never stand for the whole: without a meter for that the list is empty.
pub fn choose(workload: Workload<'_>, meters: &[MeterInfo]) -> Vec<usize> {
    let mut chosen = Vec::new();
    if let Workload::DiscreteGpu(address) = workload {
        let is_it = |gpu: &str| address.is_none_or(|address| address == gpu);
        add(&mut chosen, meters, |domain| matches!(domain, Domain::Board(gpu) if is_it(gpu)));
        add(&mut chosen, meters, |domain| matches!(domain, Domain::GpuChip(gpu) if is_it(gpu)));
        if chosen.is_empty() {
            return chosen;
        }
    }
    let n_gpu = chosen.len();
    let ladder: [fn(&Domain) -> bool; 5] = [
        |domain| matches!(domain, Domain::Package(_)),
        |domain| matches!(domain, Domain::Apu(_)),
        |domain| matches!(domain, Domain::Soc(_)),
        |domain| matches!(domain, Domain::Platform),
        |domain| matches!(domain, Domain::Battery(_)),
    ];
    for is_base in ladder {
        add(&mut chosen, meters, is_base);
        if chosen.len() > n_gpu {
            add(&mut chosen, meters, |domain| matches!(domain, Domain::Dram(_)));
            break;
        }
    }
    chosen
}

/// Adds the meters of some domains that overlap none of those chosen before.
fn add(chosen: &mut Vec<usize>, meters: &[MeterInfo], wanted: impl Fn(&Domain) -> bool) {
    let mut candidates: Vec<usize> =
        (0..meters.len()).filter(|&index| wanted(&meters[index].domain)).collect();
    candidates.sort_by_key(|&index| meters[index].source);
    for index in candidates {
        let is_new =
            chosen.iter().all(|&other| !overlaps(&meters[index].domain, &meters[other].domain));
        if is_new {
            chosen.push(index);
        }
    }
}

/// The joules of several meters together.
///
/// # Errors
/// If two of them overlap, or one has no energy.
pub fn sum(measured: &[&Measured]) -> Result<f64> {
    let mut joules = 0.0;
    for (index, meter) in measured.iter().enumerate() {
        for other in &measured[..index] {
            if overlaps(&meter.info.domain, &other.info.domain) {
                return Err(Error::MetersOverlap {
                    first: other.info.domain.to_string(),
                    second: meter.info.domain.to_string(),
                });
            }
        }
        let energy = meter.energy.as_ref().ok_or_else(|| Error::NotMeasured {
            meter: meter.info.name.clone(),
            problem: meter.problems.join("; "),
        })?;
        joules += energy.joules;
    }
    Ok(joules)
}
