//! Energy meters: joules that hardware counts, with what they cover and how well.
//!
//! ```no_run
//! use sterna::energy::{Host, Window, Workload, choose, discover, sum};
//!
//! let mut found = discover(&Host::this());
//! let mut window = Window::start(&mut found.meters);
//! for _ in 0..1000 {
//!     // … some of the work …
//!     window.poll();
//! }
//! let measured = window.end();
//! let infos: Vec<_> = measured.iter().map(|meter| meter.info.clone()).collect();
//! let whole: Vec<_> = choose(Workload::Package, &infos).iter().map(|&i| &measured[i]).collect();
//! if whole.is_empty() {
//!     println!("{}", found.summary());
//! } else {
//!     println!("{} J", sum(&whole)?);
//! }
//! # Ok::<(), sterna::Error>(())
//! ```
//!
//! A meter counts or says why it cannot; nothing is estimated, and domains that overlap are never
//! added. `docs/measuring.md` says what makes a measurement credible.

mod battery;
mod counter;
mod domain;
mod files;
mod hwmon;
mod ioreport;
mod nvml;
mod perf;
mod powercap;
mod window;

use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

pub use domain::{Domain, SocPart, Socket, Workload, choose, overlaps, sum};
pub use files::{Files, Tree};
pub use ioreport::{Channel, EnergyReport, OpenReport};
pub use nvml::{Gpu, Nvml};
pub use perf::{CountEvent, PerfEvent, PerfEvents};
pub use window::{Energy, Measured, Sample, Window};

use crate::error::{Error, Result};
use counter::{Counter, Integral, Unit};
use files::value;

/// A source of joules. It lives on the thread that found it.
pub trait Meter {
    /// What it measures, and how.
    fn describe(&self) -> &MeterInfo;
    /// Begins again at 0 J.
    ///
    /// # Errors
    /// If the source cannot be read.
    fn start(&mut self, at: Instant) -> Result<()>;
    /// Joules from the start to `at`, which is now.
    ///
    /// # Errors
    /// If the source cannot be read, or shows what cannot be energy: then every later reading
    /// fails too, until the next start.
    fn read(&mut self, at: Instant) -> Result<Reading>;
}

/// What a [`Meter`] has counted.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Joules since the start.
    pub joules: f64,
    /// What makes them less certain.
    pub caution: Option<String>,
}

/// What a meter measures, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct MeterInfo {
    /// The source's own name for it.
    pub name: String,
    /// What it measures.
    pub domain: Domain,
    /// Whose numbers they are.
    pub source: Source,
    /// How they become joules.
    pub method: Method,
    /// How fine they are.
    pub resolution: Resolution,
    /// A shorter window says little.
    pub min_window: Duration,
}

impl MeterInfo {
    /// The domain in words.
    pub fn covers(&self) -> &'static str {
        self.domain.covers()
    }
}

/// Who offers a meter; of two with the same domain the first is the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// RAPL through the kernel's perf events, which handle the counters' wraps.
    Perf,
    /// RAPL through the kernel's powercap files.
    Powercap,
    /// The counters of Apple's chips.
    IoReport,
    /// NVIDIA's management library.
    Nvml,
    /// Sensors of GPU drivers.
    Hwmon,
    /// Battery gauges.
    PowerSupply,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Perf => "perf",
            Self::Powercap => "powercap",
            Self::IoReport => "IOReport",
            Self::Nvml => "NVML",
            Self::Hwmon => "hwmon",
            Self::PowerSupply => "power_supply",
        })
    }
}

/// How a source's numbers become joules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The hardware or its driver counts energy.
    Counter,
    /// The source shows power now and then; what happens between samples is not seen.
    PowerSamples,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Counter => "energy counter",
            Self::PowerSamples => "integrated from power samples",
        })
    }
}

/// How fine a meter's numbers are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Resolution {
    /// The smallest difference that a counter's format can say; its hardware may be coarser.
    pub step_joules: Option<f64>,
    /// About how often the number changes.
    pub update: Duration,
}

/// Where meters are looked for.
pub struct Host {
    /// The files of `/sys`, on Linux.
    pub files: Option<Rc<dyn Files>>,
    /// Perf events, on Linux.
    pub perf: Option<Rc<dyn PerfEvents>>,
    /// IOReport, on Macs with Apple's chips.
    pub report: Option<Rc<OpenReport>>,
    /// NVIDIA's library, or why there is none.
    pub nvml: std::result::Result<Rc<dyn Nvml>, String>,
}

impl Host {
    /// This machine.
    pub fn this() -> Self {
        let files = cfg!(target_os = "linux").then(|| Rc::new(Tree("/".into())) as Rc<dyn Files>);
        Self {
            files,
            perf: perf::of_this_system(),
            report: ioreport::of_this_system(),
            nvml: nvml::load(),
        }
    }
}

/// What [`discover`] found, and what it did not.
#[derive(Default)]
pub struct Found {
    /// The meters that can be read now.
    pub meters: Vec<Box<dyn Meter>>,
    /// One line for each thing that was looked for in vain.
    pub missing: Vec<Missing>,
}

/// A source that gives no meter, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The source.
    pub source: Source,
    /// What was looked for, or what is wrong, with the fix if there is one.
    pub problem: String,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.problem)
    }
}

impl Found {
    /// One line about what is missing.
    pub fn summary(&self) -> String {
        let missing: Vec<String> = self.missing.iter().map(Missing::to_string).collect();
        let what = if self.meters.is_empty() { "no energy counter" } else { "no meter from" };
        format!("{what}: {}", missing.join("; "))
    }

    fn lacks(&mut self, source: Source, problem: impl fmt::Display) {
        self.missing.push(Missing { source, problem: problem.to_string() });
    }

    /// Adds a source's meters and its problems; `nothing` is said if it has neither.
    fn take(&mut self, source: Source, offers: Vec<Result<Box<dyn Meter>>>, nothing: &str) {
        if offers.is_empty() {
            self.lacks(source, nothing);
        }
        let mut denied: Vec<Error> = Vec::new();
        for offer in offers {
            match offer {
                Ok(meter) => self.meters.push(meter),
                Err(error @ (Error::MeterPermission { .. } | Error::PerfPermission { .. })) => {
                    denied.push(error)
                }
                Err(error) => self.lacks(source, error),
            }
        }
        // One fix is for all of them: one line.
        match denied.as_slice() {
            [] => {}
            [error] => self.lacks(source, error),
            [first, rest @ ..] => {
                self.lacks(source, format!("{first} ({} more like it)", rest.len()));
            }
        }
    }
}

/// Looks for every meter of a machine.
///
/// No failure ends the search: what cannot be used is a line in [`Found::missing`].
pub fn discover(host: &Host) -> Found {
    let mut found = Found::default();
    if let Some(files) = &host.files {
        if let Some(events) = &host.perf {
            perf::find(files, events, &mut found);
        }
        powercap::find(files, &mut found);
    }
    if let Some(report) = &host.report {
        ioreport::find(report.as_ref(), &mut found);
    }
    nvml::find(&host.nvml, &mut found);
    if let Some(files) = &host.files {
        hwmon::find(files, &mut found);
        battery::find(files, &mut found);
    }
    found
}

/// A counter that only grows, wraps apart.
struct CounterMeter<R> {
    info: MeterInfo,
    unit: Unit,
    read: R,
    counter: Counter,
}

impl<R: FnMut() -> Result<u64>> CounterMeter<R> {
    fn new(info: MeterInfo, unit: Unit, read: R) -> Self {
        let counter = Counter::new(unit, &info.domain);
        Self { info, unit, read, counter }
    }

    /// The meter, if it can be read.
    fn checked(mut self) -> Result<Box<dyn Meter>>
    where
        R: 'static,
    {
        self.raw()?;
        Ok(Box::new(self))
    }

    fn raw(&mut self) -> Result<u64> {
        let raw = (self.read)()?;
        match self.unit.range {
            Some(range) if raw > range => {
                Err(value(&self.info.name, format!("0 to {range}"), raw.to_string()))
            }
            _ => Ok(raw),
        }
    }
}

impl<R: FnMut() -> Result<u64>> Meter for CounterMeter<R> {
    fn describe(&self) -> &MeterInfo {
        &self.info
    }

    fn start(&mut self, at: Instant) -> Result<()> {
        let raw = self.raw()?;
        self.counter.start(raw, at);
        Ok(())
    }

    fn read(&mut self, at: Instant) -> Result<Reading> {
        let raw = self.raw()?;
        self.counter.advance(raw, at).map_err(|fault| fault.error(&self.info.name))
    }
}

/// A sensor that shows power.
struct PowerMeter<R> {
    info: MeterInfo,
    read: R,
    integral: Integral,
}

impl<R: FnMut() -> Result<u64>> PowerMeter<R> {
    /// `read` gives microwatts.
    fn new(info: MeterInfo, read: R) -> Self {
        Self { info, read, integral: Integral::default() }
    }

    /// The meter, if it can be read.
    fn checked(mut self) -> Result<Box<dyn Meter>>
    where
        R: 'static,
    {
        self.watts()?;
        Ok(Box::new(self))
    }

    fn watts(&mut self) -> Result<f64> {
        let (watts, max) = ((self.read)()? as f64 / 1e6, self.info.domain.max_watts());
        if watts > max {
            return Err(value(&self.info.name, format!("at most {max} W"), format!("{watts} W")));
        }
        Ok(watts)
    }
}

impl<R: FnMut() -> Result<u64>> Meter for PowerMeter<R> {
    fn describe(&self) -> &MeterInfo {
        &self.info
    }

    fn start(&mut self, at: Instant) -> Result<()> {
        let watts = self.watts()?;
        self.integral.start(watts, at);
        Ok(())
    }

    fn read(&mut self, at: Instant) -> Result<Reading> {
        let watts = self.watts()?;
        Ok(self.integral.advance(watts, at))
    }
}
