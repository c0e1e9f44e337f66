//! From what a counter or a power sensor shows to joules.

use std::time::{Duration, Instant};

use super::{Domain, Reading};
use crate::error::Error;

/// A longer gap between power samples is reported: what happened in it is not known.
const MAX_SAMPLE_GAP: Duration = Duration::from_secs(1);

/// What one step of a counter is worth, and where it starts again.
#[derive(Debug, Clone, Copy)]
pub(super) struct Unit {
    /// For messages.
    pub(super) name: &'static str,
    pub(super) joules: f64,
    /// The largest value of a counter that wraps; the next one is 0.
    pub(super) range: Option<u64>,
}

/// Why what a meter shows cannot be energy. It is said again at every later reading.
#[derive(Debug, Clone)]
pub(super) enum Fault {
    Fell { before: u64, after: u64, unit: &'static str, reason: String },
    Leapt { joules: f64, seconds: f64, max_watts: f64 },
    NotDischarging { status: String },
    Rose { before: f64, after: f64 },
}

impl Fault {
    pub(super) fn error(&self, meter: &str) -> Error {
        let meter = meter.to_owned();
        match self.clone() {
            Self::Fell { before, after, unit, reason } => {
                Error::CounterFell { meter, before, after, unit, reason }
            }
            Self::Leapt { joules, seconds, max_watts } => {
                Error::CounterLeapt { meter, joules, seconds, max_watts }
            }
            Self::NotDischarging { status } => Error::BatteryNotDischarging { meter, status },
            Self::Rose { before, after } => Error::BatteryRose { meter, before, after },
        }
    }
}

/// A counter's joules since its start.
#[derive(Debug)]
pub(super) struct Counter {
    unit: Unit,
    max_watts: f64,
    slack: Duration,
    last: Option<(u64, Instant)>,
    /// In units, so that nothing is rounded before the end.
    total: u128,
    fault: Option<Fault>,
}

impl Counter {
    pub(super) fn new(unit: Unit, domain: &Domain) -> Self {
        let (max_watts, slack) = (domain.max_watts(), domain.update_slack());
        Self { unit, max_watts, slack, last: None, total: 0, fault: None }
    }

    pub(super) fn start(&mut self, raw: u64, at: Instant) {
        *self = Self { last: Some((raw, at)), total: 0, fault: None, ..*self };
    }

    /// Adds what was used since the last reading.
    ///
    /// A counter that fell has wrapped if it has a range, and if the joules from there over the
    /// range's end can have been used in the time; if not, it was reset and nothing is known.
    pub(super) fn advance(&mut self, raw: u64, at: Instant) -> Result<Reading, Fault> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        let (before, then) = *self.last.get_or_insert((raw, at));
        let elapsed = at.saturating_duration_since(then);
        let step = self.step(before, raw, elapsed).inspect_err(|fault| {
            self.fault = Some(fault.clone());
        })?;
        self.total += u128::from(step);
        self.last = Some((raw, at));
        Ok(Reading { joules: self.total as f64 * self.unit.joules, caution: self.caution(elapsed) })
    }

    /// Units from `before` to `after`.
    fn step(&self, before: u64, after: u64, elapsed: Duration) -> Result<u64, Fault> {
        let seconds = elapsed.as_secs_f64();
        let limit = self.max_watts * (elapsed + self.slack).as_secs_f64();
        let fell = |reason: String| Fault::Fell { before, after, unit: self.unit.name, reason };
        if let Some(step) = after.checked_sub(before) {
            let joules = step as f64 * self.unit.joules;
            if joules > limit {
                return Err(Fault::Leapt { joules, seconds, max_watts: self.max_watts });
            }
            return Ok(step);
        }
        let Some(range) = self.unit.range else {
            return Err(fell("it does not wrap".to_owned()));
        };
        let step = range.checked_sub(before).and_then(|rest| rest.checked_add(after));
        let step = step.ok_or_else(|| fell(format!("its range is {range}")))?;
        let joules = step as f64 * self.unit.joules;
        if joules > limit {
            return Err(fell(format!(
                "a wrap at {range} would be {joules:.0} J in {seconds:.1} s, more than {} W",
                self.max_watts
            )));
        }
        Ok(step)
    }

    /// Whether a counter that was not read for `elapsed` may have wrapped twice.
    fn caution(&self, elapsed: Duration) -> Option<String> {
        let range_joules = self.unit.range? as f64 * self.unit.joules;
        let max_seconds = range_joules / self.max_watts;
        (elapsed.as_secs_f64() > max_seconds).then(|| {
            format!(
                "not read for {:.0} s: at {} W the counter wraps every {max_seconds:.0} s, so wraps may be missing",
                elapsed.as_secs_f64(),
                self.max_watts
            )
        })
    }
}

/// Power samples, integrated by the trapezoid rule.
#[derive(Debug, Default)]
pub(super) struct Integral {
    last: Option<(f64, Instant)>,
    joules: f64,
}

impl Integral {
    pub(super) fn start(&mut self, watts: f64, at: Instant) {
        *self = Self { last: Some((watts, at)), joules: 0.0 };
    }

    pub(super) fn advance(&mut self, watts: f64, at: Instant) -> Reading {
        let (before, then) = self.last.replace((watts, at)).unwrap_or((watts, at));
        let elapsed = at.saturating_duration_since(then);
        self.joules += (before + watts) / 2.0 * elapsed.as_secs_f64();
        let caution = (elapsed > MAX_SAMPLE_GAP)
            .then(|| format!("no power sample for {:.1} s", elapsed.as_secs_f64()));
        Reading { joules: self.joules, caution }
    }
}
