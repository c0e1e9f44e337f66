//! NVIDIA's counter of a board's energy, through the driver's library, loaded at run time.
//!
//! Millijoules since the driver was loaded, on Volta and newer. The board's power is not used: on
//! some GPUs its sensor sees a quarter of the time.

use std::rc::Rc;
use std::time::Duration;

use super::counter::Unit;
use super::{CounterMeter, Domain, Found, Meter, MeterInfo, Method, Resolution, Source};
use crate::error::{Error, Result};
use crate::format::shortened;

/// More than any machine has.
const MAX_GPUS: u32 = 1024;

/// NVIDIA's management library. Errors are its own words.
pub trait Nvml {
    /// How many GPUs there are.
    ///
    /// # Errors
    /// The library's.
    fn count(&self) -> std::result::Result<u32, String>;
    /// Which GPU has an index.
    ///
    /// # Errors
    /// The library's.
    fn gpu(&self, index: u32) -> std::result::Result<Gpu, String>;
    /// `nvmlDeviceGetTotalEnergyConsumption`: millijoules since the driver was loaded.
    ///
    /// # Errors
    /// The library's.
    fn millijoules(&self, index: u32) -> std::result::Result<u64, String>;
}

/// A GPU as NVML names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// `00000000:65:00.0`, as NVML writes it.
    pub pci: String,
}

#[cfg(any(target_os = "linux", windows))]
mod library {
    use std::ffi::OsStr;
    use std::rc::Rc;

    use nvml_wrapper::Nvml as Library;
    use nvml_wrapper::error::NvmlError;

    use super::{Gpu, Nvml};

    impl Nvml for Library {
        fn count(&self) -> Result<u32, String> {
            self.device_count().map_err(|error| error.to_string())
        }

        fn gpu(&self, index: u32) -> Result<Gpu, String> {
            let gpu = self.device_by_index(index).map_err(|error| error.to_string())?;
            let name = gpu.name().map_err(|error| error.to_string())?;
            let pci = gpu.pci_info().map_err(|error| error.to_string())?.bus_id;
            Ok(Gpu { name, pci })
        }

        fn millijoules(&self, index: u32) -> Result<u64, String> {
            let gpu = self.device_by_index(index);
            gpu.and_then(|gpu| gpu.total_energy_consumption()).map_err(|error| error.to_string())
        }
    }

    pub(in super::super) fn load() -> Result<Rc<dyn Nvml>, String> {
        // The name without a version comes with the development package only.
        let name = if cfg!(windows) { "nvml.dll" } else { "libnvidia-ml.so.1" };
        match Library::builder().lib_path(OsStr::new(name)).init() {
            Ok(library) => Ok(Rc::new(library)),
            Err(NvmlError::LibloadingError(_)) => Err(format!("{name} not found")),
            Err(error) => Err(format!("{name}: {error}")),
        }
    }
}

#[cfg(any(target_os = "linux", windows))]
pub(super) use library::load;

#[cfg(not(any(target_os = "linux", windows)))]
pub(super) fn load() -> std::result::Result<Rc<dyn Nvml>, String> {
    Err("NVIDIA has no library for this system".to_owned())
}

pub(super) fn find(nvml: &std::result::Result<Rc<dyn Nvml>, String>, found: &mut Found) {
    let nvml = match nvml {
        Ok(nvml) => nvml,
        Err(problem) => return found.lacks(Source::Nvml, problem),
    };
    let offers = match nvml.count() {
        Ok(count) => (0..count.min(MAX_GPUS)).map(|index| meter(nvml, index)).collect(),
        Err(problem) => return found.lacks(Source::Nvml, problem),
    };
    found.take(Source::Nvml, offers, "the library sees no GPU");
}

fn meter(nvml: &Rc<dyn Nvml>, index: u32) -> Result<Box<dyn Meter>> {
    let failure = |problem: String, gpu: &str| Error::Nvml { gpu: gpu.to_owned(), problem };
    let gpu = nvml.gpu(index).map_err(|problem| failure(problem, &format!("GPU {index}")))?;
    let name = shortened(&gpu.name.replace(char::is_control, " "));
    nvml.millijoules(index).map_err(|problem| {
        failure(format!("{problem} (energy is counted on Volta and newer)"), &name)
    })?;
    let unit = Unit { name: "mJ", joules: 1e-3, range: None };
    let info = MeterInfo {
        name: name.clone(),
        domain: Domain::Board(pci_address(&gpu.pci)),
        source: Source::Nvml,
        method: Method::Counter,
        resolution: Resolution {
            step_joules: Some(unit.joules),
            update: Duration::from_millis(100),
        },
        min_window: Duration::from_secs(30),
    };
    let nvml = Rc::clone(nvml);
    let read = move || nvml.millijoules(index).map_err(|problem| failure(problem, &name));
    CounterMeter::new(info, unit, read).checked()
}

/// As the rest of the system writes it: a domain of four digits, small letters.
fn pci_address(nvml: &str) -> String {
    let address = shortened(&nvml.replace(char::is_control, " ")).to_ascii_lowercase();
    match address.strip_prefix("0000") {
        Some(rest) if rest.find(':') == Some(4) => rest.to_owned(),
        _ => address,
    }
}
