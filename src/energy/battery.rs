//! Battery gauges: `/sys/class/power_supply/*`, while they discharge.
//!
//! | files | how |
//! | --- | --- |
//! | `energy_now` | µWh that are left |
//! | `charge_now`, `voltage_now` | µAh that are left, at the mean of the voltages before and after |
//! | `power_now` | µW, integrated |
//!
//! The first that is there is read. A gauge changes about once a second, some once a minute.

use std::rc::Rc;
use std::time::{Duration, Instant};

use super::counter::{Fault, Integral};
use super::files::{Files, Values, value};
use super::{Domain, Found, Meter, MeterInfo, Method, Reading, Resolution, Source};
use crate::error::{Error, Result};
use crate::format::shortened;

const CLASS: &str = "sys/class/power_supply";
const JOULES_PER_UWH: f64 = 3.6e-3;
const COULOMBS_PER_UAH: f64 = 3.6e-3;

pub(super) fn find(files: &Rc<dyn Files>, found: &mut Found) {
    let values = Values::new(Rc::clone(files), "");
    let supplies = match values.list(CLASS) {
        Ok(supplies) => supplies,
        Err(error) => return found.lacks(Source::PowerSupply, error),
    };
    let offers = supplies.iter().filter_map(|name| meter(&values, name).transpose()).collect();
    found.take(Source::PowerSupply, offers, "no battery under /sys/class/power_supply");
}

/// `None` for what is no battery, or feeds a mouse.
fn meter(values: &Values, name: &str) -> Result<Option<Box<dyn Meter>>> {
    let file = |file: &str| format!("{CLASS}/{name}/{file}");
    let is_battery = values.optional_text(&file("type"))?.as_deref() == Some("Battery");
    let is_of_device = values.optional_text(&file("scope"))?.as_deref() == Some("Device");
    let is_absent = values.optional_number(&file("present"))? == Some(0);
    if !is_battery || is_of_device || is_absent {
        return Ok(None);
    }
    let files = values.list(&format!("{CLASS}/{name}"))?;
    let has = |file: &str| files.iter().any(|name| name == file);
    let (gauge, step_joules) = if has("energy_now") {
        (Gauge::Energy, Some(JOULES_PER_UWH))
    } else if has("charge_now") && has("voltage_now") {
        (Gauge::Charge, None)
    } else if has("power_now") {
        (Gauge::Power, None)
    } else {
        let expected = "energy_now, charge_now with voltage_now, or power_now";
        return Err(value(&format!("{CLASS}/{name}"), expected, "none of them"));
    };
    let info = MeterInfo {
        name: name.to_owned(),
        domain: Domain::Battery(shortened(name)),
        source: Source::PowerSupply,
        method: if gauge == Gauge::Power { Method::PowerSamples } else { Method::Counter },
        resolution: Resolution { step_joules, update: Duration::from_secs(1) },
        min_window: Duration::from_secs(60),
    };
    let mut battery = Battery {
        info,
        values: values.clone(),
        gauge,
        last: None,
        joules: 0.0,
        integral: Integral::default(),
        fault: None,
    };
    battery.start(Instant::now())?;
    Ok(Some(Box::new(battery)))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gauge {
    Energy,
    Charge,
    Power,
}

/// What a gauge shows.
#[derive(Debug, Clone, Copy)]
struct Level {
    /// µWh or µAh that are left, or µW.
    amount: f64,
    /// Joules of one unit of the amount.
    joules: f64,
}

struct Battery {
    info: MeterInfo,
    values: Values,
    gauge: Gauge,
    last: Option<(Level, Instant)>,
    joules: f64,
    integral: Integral,
    fault: Option<Fault>,
}

impl Battery {
    fn number(&self, file: &str) -> Result<f64> {
        let path = format!("{CLASS}/{}/{file}", self.info.name);
        let number = self.values.number(&path)?;
        // 1 MWh, 1 MAh, 1 MV, 1 MW.
        if number > 1_000_000_000_000 {
            return Err(value(&path, "at most 1000000000000", number.to_string()));
        }
        Ok(number as f64)
    }

    fn level(&self) -> Result<Level> {
        let (amount, joules) = match self.gauge {
            Gauge::Energy => (self.number("energy_now")?, JOULES_PER_UWH),
            Gauge::Charge => {
                let volts = self.number("voltage_now")? * 1e-6;
                (self.number("charge_now")?, COULOMBS_PER_UAH * volts)
            }
            Gauge::Power => (self.number("power_now")?, 0.0),
        };
        Ok(Level { amount, joules })
    }

    /// The status, if it is another than discharging.
    fn other_status(&self) -> Result<Option<String>> {
        let status = self.values.text(&format!("{CLASS}/{}/status", self.info.name))?;
        Ok((status != "Discharging").then(|| shortened(&status)))
    }

    fn advance(&mut self, level: Level, at: Instant) -> std::result::Result<Reading, Fault> {
        if self.gauge == Gauge::Power {
            return Ok(self.integral.advance(level.amount * 1e-6, at));
        }
        let (before, then) = self.last.replace((level, at)).unwrap_or((level, at));
        if level.amount > before.amount {
            return Err(Fault::Rose { before: before.amount, after: level.amount });
        }
        let step = (before.amount - level.amount) * (before.joules + level.joules) / 2.0;
        let (max_watts, slack) = (self.info.domain.max_watts(), self.info.domain.update_slack());
        let elapsed = at.saturating_duration_since(then);
        if step > max_watts * (elapsed + slack).as_secs_f64() {
            let seconds = elapsed.as_secs_f64();
            return Err(Fault::Leapt { joules: step, seconds, max_watts });
        }
        self.joules += step;
        Ok(Reading { joules: self.joules, caution: None })
    }

    fn fail(&mut self, fault: Fault) -> Error {
        let error = fault.error(&self.info.name);
        self.fault = Some(fault);
        error
    }
}

impl Meter for Battery {
    fn describe(&self) -> &MeterInfo {
        &self.info
    }

    fn start(&mut self, at: Instant) -> Result<()> {
        if let Some(status) = self.other_status()? {
            return Err(self.fail(Fault::NotDischarging { status }));
        }
        let level = self.level()?;
        (self.last, self.joules, self.fault) = (Some((level, at)), 0.0, None);
        self.integral.start(level.amount * 1e-6, at);
        Ok(())
    }

    fn read(&mut self, at: Instant) -> Result<Reading> {
        if let Some(fault) = &self.fault {
            return Err(fault.error(&self.info.name));
        }
        if let Some(status) = self.other_status()? {
            return Err(self.fail(Fault::NotDischarging { status }));
        }
        let level = self.level()?;
        self.advance(level, at).map_err(|fault| self.fail(fault))
    }
}
