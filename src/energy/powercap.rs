//! RAPL through powercap: `/sys/class/powercap/intel-rapl:*/energy_uj`, on AMD under the same name.
//!
//! A zone is `intel-rapl:0` (a package, or psys), a part of it `intel-rapl:0:1`; the file `name`
//! says which. Microjoules, starting again at `max_energy_range_uj`. `intel-rapl-mmio:*` shows the
//! packages a second time and is left out.

use std::rc::Rc;
use std::time::Duration;

use super::counter::Unit;
use super::files::{Files, Values, value};
use super::{CounterMeter, Domain, Found, Meter, MeterInfo, Method, Resolution, Socket, Source};
use crate::error::Result;
use crate::format::quoted;

const CLASS: &str = "sys/class/powercap";
/// Only root may read the counters, since software could spy on its neighbours with them
/// (CVE-2020-8694).
const FIX: &str = "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj lets everybody read it until the next boot";

pub(super) fn find(files: &Rc<dyn Files>, found: &mut Found) {
    let values = Values::new(Rc::clone(files), FIX);
    let zones = match values.list(CLASS) {
        Ok(zones) => zones,
        Err(error) => return found.lacks(Source::Powercap, error),
    };
    let zones = zones.iter().filter(|zone| zone.starts_with("intel-rapl:"));
    let offers = zones.map(|zone| meter(&values, zone)).collect();
    found.take(Source::Powercap, offers, "no intel-rapl zone under /sys/class/powercap");
}

fn meter(values: &Values, zone: &str) -> Result<Box<dyn Meter>> {
    let domain = domain(values, zone)?;
    let range_path = format!("{CLASS}/{zone}/max_energy_range_uj");
    let range = values.number(&range_path)?;
    if range == 0 {
        return Err(value(&range_path, "more than 0", "0"));
    }
    let unit = Unit { name: "µJ", joules: 1e-6, range: Some(range) };
    let info = MeterInfo {
        name: zone.to_owned(),
        domain,
        source: Source::Powercap,
        method: Method::Counter,
        resolution: Resolution { step_joules: Some(unit.joules), update: Duration::from_millis(1) },
        min_window: Duration::from_secs(10),
    };
    let (values, path) = (values.clone(), format!("{CLASS}/{zone}/energy_uj"));
    CounterMeter::new(info, unit, move || values.number(&path)).checked()
}

fn domain(values: &Values, zone: &str) -> Result<Domain> {
    let name_of = |zone: &str| format!("{CLASS}/{zone}/name");
    let path = name_of(zone);
    let name = values.text(&path)?;
    // `intel-rapl:0:1` is a part of `intel-rapl:0`.
    let Some((parent, _)) = zone.rsplit_once(':').filter(|(parent, _)| parent.contains(':')) else {
        return match name.as_str() {
            "psys" => Ok(Domain::Platform),
            package => socket(package)
                .map(Domain::Package)
                .ok_or_else(|| value(&path, "package-N, package-N-die-N or psys", quoted(package))),
        };
    };
    let parent_path = name_of(parent);
    let parent = values.text(&parent_path)?;
    let socket = socket(&parent)
        .ok_or_else(|| value(&parent_path, "package-N or package-N-die-N", quoted(&parent)))?;
    match name.as_str() {
        "core" => Ok(Domain::Core(socket)),
        "uncore" => Ok(Domain::Uncore(socket)),
        "dram" => Ok(Domain::Dram(socket)),
        other => Err(value(&path, "core, uncore or dram", quoted(other))),
    }
}

/// `package-0` or `package-0-die-1`.
fn socket(name: &str) -> Option<Socket> {
    let numbers = name.strip_prefix("package-")?;
    let (package, die) = match numbers.split_once("-die-") {
        Some((package, die)) => (package, Some(die.parse().ok()?)),
        None => (numbers, None),
    };
    Some(Socket { package: package.parse().ok()?, die })
}
