//! RAPL through perf: the events `energy-*` of the PMU `power`.
//!
//! The kernel extends the counters to 64 bits. An event is opened once on one CPU of each package
//! (`cpumask`), and stays open; it cannot share a group with others.

use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use super::counter::Unit;
use super::files::{Files, Values, value};
use super::{CounterMeter, Domain, Found, Meter, MeterInfo, Method, Resolution, Socket, Source};
use crate::error::{Error, Result};
use crate::format::quoted;

const PMU: &str = "sys/bus/event_source/devices/power";
const PARANOID: &str = "proc/sys/kernel/perf_event_paranoid";
const FIX: &str =
    "sudo sysctl kernel.perf_event_paranoid=0, or give the program the capability CAP_PERFMON";
/// No machine has more packages and dies.
const MAX_CPUS: usize = 1024;

/// An event of a PMU on one CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PerfEvent {
    /// The PMU's number.
    pub pmu: u32,
    /// The event's.
    pub config: u64,
    /// The CPU.
    pub cpu: usize,
}

/// What an open event has counted.
pub type CountEvent = Box<dyn FnMut() -> io::Result<u64>>;

/// The kernel's perf events.
pub trait PerfEvents {
    /// Opens an event of the whole system and starts it.
    ///
    /// # Errors
    /// The system's.
    fn open(&self, event: PerfEvent) -> io::Result<CountEvent>;
}

#[cfg(target_os = "linux")]
struct Kernel;

#[cfg(target_os = "linux")]
impl PerfEvents for Kernel {
    fn open(&self, event: PerfEvent) -> io::Result<CountEvent> {
        use perf_event::Builder;
        use perf_event::events::Raw;

        let mut builder = Builder::new(Raw::new(event.config));
        builder.attrs_mut().type_ = event.pmu;
        // The PMU cannot tell who uses the energy, and refuses to be asked.
        builder.any_pid().one_cpu(event.cpu).include_kernel().include_hv();
        let mut counter = builder.build()?;
        counter.enable()?;
        Ok(Box::new(move || counter.read()))
    }
}

/// Perf events where there are some.
pub(super) fn of_this_system() -> Option<Rc<dyn PerfEvents>> {
    #[cfg(target_os = "linux")]
    return Some(Rc::new(Kernel));
    #[cfg(not(target_os = "linux"))]
    None
}

pub(super) fn find(files: &Rc<dyn Files>, events: &Rc<dyn PerfEvents>, found: &mut Found) {
    let values = Values::new(Rc::clone(files), "");
    let offers = meters(&values, events.as_ref()).unwrap_or_else(|error| vec![Err(error)]);
    let nothing = format!("no event energy-* of a PMU \"power\" under /{PMU}/events");
    found.take(Source::Perf, offers, &nothing);
}

fn meters(values: &Values, events: &dyn PerfEvents) -> Result<Vec<Result<Box<dyn Meter>>>> {
    let names = values.list(&format!("{PMU}/events"))?;
    let names: Vec<&String> =
        names.iter().filter(|name| name.starts_with("energy-") && !name.contains('.')).collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let pmu_path = format!("{PMU}/type");
    let pmu = u32::try_from(values.number(&pmu_path)?)
        .map_err(|_| value(&pmu_path, "the number of a PMU", "more than 32 bits"))?;
    let sockets = sockets(values)?;
    let mut offers = Vec::new();
    for name in names {
        for &(cpu, socket) in &sockets {
            let domain = match name.as_str() {
                "energy-pkg" => Domain::Package(socket),
                "energy-cores" => Domain::Core(socket),
                "energy-gpu" => Domain::Uncore(socket),
                "energy-ram" => Domain::Dram(socket),
                // There is one platform, whatever the number of its packages.
                "energy-psys" if cpu == sockets[0].0 => Domain::Platform,
                _ => continue,
            };
            offers.push(meter(values, events, name, pmu, cpu, domain));
        }
    }
    Ok(offers)
}

fn meter(
    values: &Values,
    events: &dyn PerfEvents,
    event: &str,
    pmu: u32,
    cpu: usize,
    domain: Domain,
) -> Result<Box<dyn Meter>> {
    let path = format!("{PMU}/events/{event}");
    let config = config(&path, &values.text(&path)?)?;
    let joules = scale(values, &path)?;
    let name = format!("power/{event}/ on CPU {cpu}");
    let failure =
        |source: io::Error, name: &str| Error::PerfEvent { event: name.to_owned(), source };
    let mut count =
        events.open(PerfEvent { pmu, config, cpu }).map_err(|source| match source.kind() {
            io::ErrorKind::PermissionDenied => {
                let found = values.text(PARANOID).unwrap_or_else(|_| "unknown".to_owned());
                Error::PerfPermission { event: name.clone(), paranoid: found, fix: FIX }
            }
            _ => failure(source, &name),
        })?;
    let info = MeterInfo {
        name: name.clone(),
        domain,
        source: Source::Perf,
        method: Method::Counter,
        resolution: Resolution { step_joules: Some(joules), update: Duration::from_millis(1) },
        min_window: Duration::from_secs(10),
    };
    let unit = Unit { name: "counts", joules, range: None };
    let read = move || count().map_err(|source| failure(source, &name));
    CounterMeter::new(info, unit, read).checked()
}

/// `event=0x02`; the PMU has no other field.
fn config(path: &str, text: &str) -> Result<u64> {
    let digits = text.strip_prefix("event=0x");
    digits
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .ok_or_else(|| value(path, "event=0x and a number", quoted(text)))
}

/// Joules of one count: the file `.scale`, in the unit of the file `.unit`.
fn scale(values: &Values, event: &str) -> Result<f64> {
    let unit_path = format!("{event}.unit");
    let unit = values.text(&unit_path)?;
    if unit != "Joules" {
        return Err(value(&unit_path, "Joules", quoted(&unit)));
    }
    let path = format!("{event}.scale");
    let text = values.text(&path)?;
    let scale = text.parse().ok().filter(|scale| (1e-15..=1.0).contains(scale));
    scale.ok_or_else(|| value(&path, "joules of one count, 1e-15 to 1", quoted(&text)))
}

/// A CPU of each package or die, as the PMU names them.
fn sockets(values: &Values) -> Result<Vec<(usize, Socket)>> {
    let path = format!("{PMU}/cpumask");
    let text = values.text(&path)?;
    let cpus = cpu_list(&text).filter(|cpus| !cpus.is_empty());
    let cpus = cpus.ok_or_else(|| value(&path, "a list of CPUs such as 0,28", quoted(&text)))?;
    let mut of_package = BTreeMap::new();
    for cpu in cpus {
        let topology = |file: &str| format!("sys/devices/system/cpu/cpu{cpu}/topology/{file}");
        let package_path = topology("physical_package_id");
        let package = u32::try_from(values.number(&package_path)?)
            .map_err(|_| value(&package_path, "the number of a package", "more than 32 bits"))?;
        let die = values.optional_number(&topology("die_id"))?;
        let die = die.and_then(|die| u32::try_from(die).ok());
        of_package.entry(package).or_insert_with(Vec::new).push((cpu, die));
    }
    let mut sockets = Vec::new();
    for (package, cpus) in of_package {
        // One CPU for a package counts for all of it, whatever die it is on.
        let is_whole = cpus.len() == 1;
        for (cpu, die) in cpus {
            sockets.push((cpu, Socket { package, die: if is_whole { None } else { die } }));
        }
    }
    Ok(sockets)
}

/// `0,28` or `0-1,4`; `None` if it is something else, or longer than any machine's.
fn cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        let count = last.checked_sub(first)?.checked_add(1)?;
        if count > MAX_CPUS - cpus.len() {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}
