//! The counters of Apple's chips, by IOReport: no rights are needed.
//!
//! | part | group `CLPC` | group `Energy Model` |
//! | --- | --- | --- |
//! | CPU | `CPU Energy` | `CPU Energy`, `DIE_0_CPU Energy`, … |
//! | GPU | `GPU Energy` | `GPU Energy` |
//! | neural engine | `ANE` | `ANE`, `ANE0`, … |
//! | memory | | `DRAM`, `DRAM0`, … |
//!
//! A part is counted by CLPC where that is, as the Energy Model stands still on newer systems.
//! Apple documents none of this, so the names are those that the crate `macmon` has collected.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::{Domain, Found, Meter, MeterInfo, Method, Reading, Resolution, SocPart, Source};
use crate::error::{Error, Result};

/// A chip's CPU uses some energy in this time, so that a counter of none stands still.
const MAX_STANDSTILL: Duration = Duration::from_secs(1);

/// A counter of IOReport.
#[derive(Debug, Clone, PartialEq)]
pub struct Channel {
    /// `CLPC` or `Energy Model`.
    pub group: String,
    /// What is counted.
    pub name: String,
    /// Joules since the last report.
    pub joules: f64,
}

/// The counters of IOReport.
pub trait EnergyReport {
    /// What was counted since the last call.
    ///
    /// # Errors
    /// The system's words.
    fn advance(&mut self) -> std::result::Result<Vec<Channel>, String>;
}

/// Subscribes to the counters.
pub type OpenReport = dyn Fn() -> std::result::Result<Box<dyn EnergyReport>, String>;

#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod system {
    use macmon::sources::{IOReport, cfio_integer_value};

    use super::{Channel, EnergyReport};

    impl EnergyReport for IOReport {
        fn advance(&mut self) -> Result<Vec<Channel>, String> {
            let mut channels = Vec::new();
            for (report, _) in self.get_samples(0, 1) {
                for item in report {
                    let unit = match item.unit.as_str() {
                        "mJ" => 1e-3,
                        "uJ" => 1e-6,
                        "nJ" => 1e-9,
                        _ => continue,
                    };
                    let joules = cfio_integer_value(item.item) as f64 * unit;
                    channels.push(Channel { group: item.group, name: item.channel, joules });
                }
            }
            Ok(channels)
        }
    }

    pub(super) fn open() -> Result<Box<dyn EnergyReport>, String> {
        let groups = vec![("CLPC", Some("Energy Counters")), ("Energy Model", None)];
        IOReport::new(groups)
            .map(|report| Box::new(report) as Box<dyn EnergyReport>)
            .map_err(|error| error.to_string())
    }
}

/// IOReport where it is.
pub(super) fn of_this_system() -> Option<Rc<OpenReport>> {
    #[cfg(all(target_os = "macos", target_arch = "aarch64"))]
    return Some(Rc::new(system::open));
    #[cfg(not(all(target_os = "macos", target_arch = "aarch64")))]
    None
}

pub(super) fn find(open: &OpenReport, found: &mut Found) {
    let channels = match open().and_then(|mut report| report.advance()) {
        Ok(channels) => channels,
        Err(problem) => return found.lacks(Source::IoReport, problem),
    };
    let parts = SocPart::ALL.into_iter().filter(|&part| joules(part, &channels).is_some());
    let offers = parts.map(|part| meter(open, part)).collect();
    found.take(Source::IoReport, offers, "no energy counter in the groups CLPC and Energy Model");
}

fn meter(open: &OpenReport, part: SocPart) -> Result<Box<dyn Meter>> {
    let report = open().map_err(|problem| Error::IoReport { part: part.to_string(), problem })?;
    let info = MeterInfo {
        name: format!("energy of the {part}"),
        domain: Domain::Soc(part),
        source: Source::IoReport,
        method: Method::Counter,
        resolution: Resolution { step_joules: None, update: Duration::from_millis(100) },
        min_window: Duration::from_secs(10),
    };
    Ok(Box::new(SocMeter {
        info,
        part,
        report,
        started: None,
        last: None,
        joules: 0.0,
        fault: None,
    }))
}

/// The joules of a part; `None` if no channel counts it.
fn joules(part: SocPart, channels: &[Channel]) -> Option<f64> {
    let of = |group: &str| {
        let counted = channels.iter().filter(|channel| {
            let Channel { name, .. } = channel;
            channel.group == group
                && match part {
                    SocPart::Cpu => name.ends_with("CPU Energy"),
                    SocPart::Gpu => name == "GPU Energy",
                    SocPart::NeuralEngine => name.starts_with("ANE"),
                    SocPart::Dram => name.starts_with("DRAM"),
                }
        });
        counted.map(|channel| channel.joules).reduce(|sum, joules| sum + joules)
    };
    of("CLPC").or_else(|| of("Energy Model"))
}

struct SocMeter {
    info: MeterInfo,
    part: SocPart,
    report: Box<dyn EnergyReport>,
    started: Option<Instant>,
    last: Option<Instant>,
    joules: f64,
    /// A report that fails takes its joules with it, so nothing after it counts.
    fault: Option<String>,
}

impl SocMeter {
    fn report(&mut self) -> std::result::Result<f64, String> {
        let channels = self.report.advance()?;
        joules(self.part, &channels).ok_or_else(|| "its counter is gone".to_owned())
    }

    fn advance(&mut self, at: Instant) -> std::result::Result<f64, String> {
        let step = self.report()?;
        let last = self.last.replace(at).unwrap_or(at);
        let elapsed = at.saturating_duration_since(last);
        let domain = &self.info.domain;
        let limit = domain.max_watts() * (elapsed + domain.update_slack()).as_secs_f64();
        if !(0.0..=limit).contains(&step) {
            let seconds = elapsed.as_secs_f64();
            return Err(format!(
                "the counter moved by {step} J in {seconds:.1} s, expected 0 to {limit:.0} J; measure again"
            ));
        }
        self.joules += step;
        let stands =
            self.started.is_some_and(|start| at.saturating_duration_since(start) >= MAX_STANDSTILL);
        if self.part == SocPart::Cpu && self.joules == 0.0 && stands {
            return Err("the counter stands still on this system".to_owned());
        }
        Ok(self.joules)
    }

    fn error(&self, problem: String) -> Error {
        Error::IoReport { part: self.part.to_string(), problem }
    }
}

impl Meter for SocMeter {
    fn describe(&self) -> &MeterInfo {
        &self.info
    }

    fn start(&mut self, at: Instant) -> Result<()> {
        self.report().map_err(|problem| self.error(problem))?;
        (self.started, self.last) = (Some(at), Some(at));
        (self.joules, self.fault) = (0.0, None);
        Ok(())
    }

    fn read(&mut self, at: Instant) -> Result<Reading> {
        let result = match self.fault.clone() {
            Some(fault) => Err(fault),
            None => self.advance(at),
        };
        match result {
            Ok(joules) => Ok(Reading { joules, caution: None }),
            Err(problem) => {
                self.fault = Some(problem.clone());
                Err(self.error(problem))
            }
        }
    }
}
