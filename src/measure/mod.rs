//! Measuring: how fast devices run a model, how much memory it takes, and how many joules.
//!
//! [`bench`](bench::bench) times prompts and replies on one device; [`compare`](compare::compare)
//! does so on several in turns, with energy meters where there are any, and makes a [`Report`], which
//! other machines' reports can be put beside. `docs/measuring.md` says what makes the numbers
//! credible.
//!
//! Nothing is dropped as an outlier: a [`Spread`] is the median with the least and the largest value.

pub mod bandwidth;
pub mod bench;
pub mod compare;
mod energy;
pub mod machine;
mod report;
mod runs;
mod stats;
mod verdict;

use std::ops::ControlFlow;

pub use report::{
    DepthReport, DeviceReport, EnergyReport, FORMAT, MAX_REPORT_BYTES, MemoryReport, MeterReport,
    Method, ModelReport, PhaseEnergy, PhaseKind, PowerTrace, Report, WindowReport,
};
pub use stats::{Latencies, Spread};

/// What is going on; a measurement tells of each as it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// Something begins that takes a while.
    Stage(&'a str),
    /// So many tokens of a prompt were fed.
    Fed(usize),
    /// A token of a reply was handed out.
    Token,
    /// Nothing runs; comes ten times a second.
    Idle,
}

/// Sees what is going on, and says whether to go on.
pub type OnEvent<'a> = &'a mut dyn FnMut(Event<'_>) -> ControlFlow<()>;
