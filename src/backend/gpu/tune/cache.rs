//! What was measured, kept in a file for each adapter.
//!
//! ```json
//! {"key": {"adapter": "…", "driver": "…", "api": "vulkan", "wgpu": "30.0.1", "kernels": "…",
//!   "capabilities": "Adapter"},
//!  "plans": {"down 2560x6912 norm": {"variant": "packed_dot", "slices": 8, "fused": true}}}
//! ```

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;
use serde::{Deserialize, Serialize};

use super::super::device::Gpu;
use super::super::kernels::GemvPlan;
use super::super::shader::KERNELS;
use crate::error::{Error, Result};

/// The version of wgpu that `Cargo.lock` has: another one may compile kernels otherwise.
const WGPU: &str = "30.0.1";

/// No honest file is larger.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Plans a file may have: models of so many shapes are not run on one machine.
const MAX_PLANS: usize = 4096;

/// Where programs keep what they can make again: `STERNA_CACHE`, else `sterna` in the user's cache
/// directory (`XDG_CACHE_HOME` or `~/.cache`; `~/Library/Caches`; `%LOCALAPPDATA%`). `None` if there
/// is no home directory.
pub fn directory() -> Option<PathBuf> {
    if let Some(directory) = std::env::var_os("STERNA_CACHE").filter(|value| !value.is_empty()) {
        return Some(PathBuf::from(directory));
    }
    let strategy = etcetera::base_strategy::choose_native_strategy().ok()?;
    Some(strategy.cache_dir().join("sterna"))
}

/// What a measurement is good for: with another of any of these, it says nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// The adapter's name.
    pub adapter: String,
    /// Driver name and version.
    pub driver: String,
    /// vulkan, metal, dx12 …
    pub api: String,
    /// Version of wgpu.
    pub wgpu: String,
    /// Hash of the complete source of every kernel, and of this program's version.
    pub kernels: String,
    /// What the device was asked for.
    pub capabilities: String,
}

impl Key {
    /// Of a device.
    pub fn of(gpu: &Gpu) -> Self {
        let sources: String = KERNELS.iter().map(|kernel| kernel.wgsl()).collect();
        Self {
            adapter: gpu.adapter.name.clone(),
            driver: gpu.adapter.driver.clone(),
            api: gpu.adapter.api.clone(),
            wgpu: WGPU.to_owned(),
            kernels: hash(&[&sources, env!("CARGO_PKG_VERSION")]),
            capabilities: format!("{:?}", gpu.capabilities),
        }
    }

    /// One file an adapter: what a new driver or new kernels make worthless is replaced.
    pub(super) fn file(&self, directory: &Path) -> PathBuf {
        let name = hash(&[&self.adapter, &self.api, &self.capabilities]);
        directory.join("tune").join(name + ".json")
    }
}

/// FNV-1a, in hexadecimal; against accidents, not against enemies.
fn hash(parts: &[&str]) -> String {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// The plans that are known under a key.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Kept {
    key: Key,
    /// By [`super::StepShape::id`].
    plans: BTreeMap<String, GemvPlan>,
}

impl Kept {
    /// Nothing is known.
    pub fn new(key: &Key) -> Self {
        Self { key: key.clone(), plans: BTreeMap::new() }
    }

    /// What is in the file of a key, or nothing. If there is a file and it is not for this key, why.
    pub fn read(directory: &Path, key: &Key) -> (Self, Option<String>) {
        let path = key.file(directory);
        let problem = match read_bounded(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(error.to_string()),
            Ok(bytes) => match serde_json::from_slice::<Self>(&bytes) {
                Ok(kept) if kept.plans.len() > MAX_PLANS => Some("too many plans".to_owned()),
                Ok(kept) if kept.key == *key => return (kept, None),
                Ok(kept) => Some(kept.difference(key)),
                Err(error) => Some(error.to_string()),
            },
        };
        let note = problem.map(|problem| format!("{}: not used: {problem}", path.display()));
        (Self::new(key), note)
    }

    /// The first part of the key that is another.
    fn difference(&self, key: &Key) -> String {
        let of = |key: &Key| {
            let Key { adapter, driver, api, wgpu, kernels, capabilities } = key.clone();
            [adapter, driver, api, wgpu, kernels, capabilities]
        };
        let names = ["adapter", "driver", "API", "wgpu", "kernels", "capabilities"];
        let (found, expected) = (of(&self.key), of(key));
        let at = (0..names.len()).find(|&at| found[at] != expected[at]).unwrap_or_default();
        let [name, expected, found] = [names[at], expected[at].as_str(), found[at].as_str()];
        format!("{name}: expected {expected:?}, found {found:?}")
    }

    /// The plan of a step.
    pub fn plan(&self, id: &str) -> Option<GemvPlan> {
        self.plans.get(id).copied()
    }

    /// Adds plans; old ones of the same steps are forgotten, and all of them if there are too many.
    pub fn add(&mut self, plans: &[(String, GemvPlan)]) {
        if self.plans.len() + plans.len() > MAX_PLANS {
            self.plans.clear();
        }
        self.plans.extend(plans.iter().cloned());
    }

    /// Writes the file, whole or not at all, and says where it is.
    ///
    /// # Errors
    /// [`Error::Io`] if directory or file cannot be written.
    pub fn write(&self, directory: &Path) -> Result<PathBuf> {
        let path = self.key.file(directory);
        let write = || -> io::Result<()> {
            let parent = path.parent().expect("the file is in a directory");
            fs::create_dir_all(parent)?;
            let mut file = tempfile::Builder::new().prefix(".tune-").tempfile_in(parent)?;
            serde_json::to_writer_pretty(&mut file, self)?;
            file.write_all(b"\n")?;
            file.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        match write() {
            Ok(()) => Ok(path),
            Err(source) => Err(Error::Io { path, source }),
        }
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "larger than 1 MiB"));
    }
    Ok(bytes)
}
