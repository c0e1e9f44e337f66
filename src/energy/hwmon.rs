//! Sensors of GPU drivers: `/sys/class/hwmon/hwmon*`.
//!
//! | driver | file | what |
//! | --- | --- | --- |
//! | amdgpu | `power1_average`, else `power1_input` | µW of a board; of CPU and GPU on an APU |
//! | xe | `energyN_input` | µJ of the board (label `card`) or of the chip (`pkg`) |
//! | i915 | `energy1_input` | µJ of the chip |
//!
//! xe and i915 have them for discrete GPUs only. The kernel extends their counters to 64 bits, which
//! needs a reading before the hardware's 32 bits wrap twice.

use std::rc::Rc;
use std::time::Duration;

use super::counter::Unit;
use super::files::{Files, Values, value};
use super::{
    CounterMeter, Domain, Found, Meter, MeterInfo, Method, PowerMeter, Resolution, Source,
};
use crate::error::Result;
use crate::format::quoted;

const CLASS: &str = "sys/class/hwmon";
const FIX: &str = "the GPU sleeps, or the file's mode forbids it";
const MIN_WINDOW: Duration = Duration::from_secs(30);

pub(super) fn find(files: &Rc<dyn Files>, found: &mut Found) {
    let values = Values::new(Rc::clone(files), FIX);
    let sensors = match values.list(CLASS) {
        Ok(sensors) => sensors,
        Err(error) => return found.lacks(Source::Hwmon, error),
    };
    let offers = sensors.iter().flat_map(|sensor| meters(&values, sensor)).collect();
    let nothing = "no amdgpu, xe or i915 sensor under /sys/class/hwmon";
    found.take(Source::Hwmon, offers, nothing);
}

fn meters(values: &Values, sensor: &str) -> Vec<Result<Box<dyn Meter>>> {
    let directory = format!("{CLASS}/{sensor}");
    let gpu = || {
        let address = values.target_name(&format!("{directory}/device"));
        address.unwrap_or_else(|| sensor.to_owned())
    };
    let driver = match values.optional_text(&format!("{directory}/name")) {
        Ok(driver) => driver,
        Err(error) => return vec![Err(error)],
    };
    match driver.as_deref() {
        Some("amdgpu") => amdgpu(values, &directory, gpu()).into_iter().collect(),
        Some(driver @ ("xe" | "i915")) => intel(values, &directory, driver, &gpu()),
        _ => Vec::new(),
    }
}

/// `None` if the GPU has no sensor.
fn amdgpu(values: &Values, directory: &str, gpu: String) -> Option<Result<Box<dyn Meter>>> {
    let files = values.list(directory);
    let files = match files {
        Ok(files) => files,
        Err(error) => return Some(Err(error)),
    };
    let file = ["power1_average", "power1_input"]
        .into_iter()
        .find(|&file| files.iter().any(|name| name == file))?;
    let is_apu = values.optional_text(&format!("{directory}/in1_label"));
    Some(is_apu.and_then(|label| {
        // The voltage of the north bridge, which only an APU has.
        let is_apu = label.as_deref() == Some("vddnb");
        let info = MeterInfo {
            name: format!("amdgpu {gpu}"),
            domain: if is_apu { Domain::Apu(gpu) } else { Domain::Board(gpu) },
            source: Source::Hwmon,
            method: Method::PowerSamples,
            resolution: Resolution { step_joules: None, update: Duration::from_millis(100) },
            min_window: MIN_WINDOW,
        };
        let (values, path) = (values.clone(), format!("{directory}/{file}"));
        PowerMeter::new(info, move || values.number(&path)).checked()
    }))
}

fn intel(values: &Values, directory: &str, driver: &str, gpu: &str) -> Vec<Result<Box<dyn Meter>>> {
    let files = match values.list(directory) {
        Ok(files) => files,
        Err(error) => return vec![Err(error)],
    };
    let counters = files.iter().filter_map(|file| {
        file.strip_prefix("energy")?.strip_suffix("_input").filter(|n| n.parse::<u8>().is_ok())
    });
    counters.map(|n| intel_counter(values, directory, driver, gpu, n)).collect()
}

fn intel_counter(
    values: &Values,
    directory: &str,
    driver: &str,
    gpu: &str,
    n: &str,
) -> Result<Box<dyn Meter>> {
    let label_path = format!("{directory}/energy{n}_label");
    let domain = match (values.optional_text(&label_path)?.as_deref(), driver) {
        (Some("card"), _) => Domain::Board(gpu.to_owned()),
        (Some("pkg"), _) | (None, "i915") => Domain::GpuChip(gpu.to_owned()),
        (None, _) => return Err(value(&label_path, "card or pkg", "no such file")),
        (Some(label), _) => return Err(value(&label_path, "card or pkg", quoted(label))),
    };
    let unit = Unit { name: "µJ", joules: 1e-6, range: None };
    let info = MeterInfo {
        name: format!("{driver} {gpu}"),
        domain,
        source: Source::Hwmon,
        method: Method::Counter,
        resolution: Resolution {
            step_joules: Some(unit.joules),
            update: Duration::from_millis(100),
        },
        min_window: MIN_WINDOW,
    };
    let (values, path) = (values.clone(), format!("{directory}/energy{n}_input"));
    CounterMeter::new(info, unit, move || values.number(&path)).checked()
}
