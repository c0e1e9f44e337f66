//! What was measured, kept in a file for each adapter.
//!
//! ```json
//! {"key": {"adapter": "…", "driver": "…", "api": "vulkan", "wgpu": "30.0.1", "kernels": "…",
//!   "capabilities": "Adapter"},
//!  "plans": {"down 2560x6912 norm": {"variant": "packed_dot", "slices": 8, "rows": 32,
//!   "unroll": 1, "fused": true}},
//!  "gemms": {"gemm_i2 13824x2560": {"rows": 64, "tokens": 64,
//!   "cooperative": {"size": 16, "subgroup": 32}}}}
//! ```

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::super::device::Gpu;
use super::super::kernels::{GemmPlan, GemvPlan};
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
    directory_of(std::env::var_os("STERNA_CACHE"))
}

fn directory_of(variable: Option<OsString>) -> Option<PathBuf> {
    if let Some(directory) = variable.filter(|value| !value.is_empty()) {
        return Some(PathBuf::from(directory));
    }
    native_directory()
}

#[cfg(not(target_family = "wasm"))]
fn native_directory() -> Option<PathBuf> {
    use etcetera::BaseStrategy;

    let strategy = etcetera::base_strategy::choose_native_strategy().ok()?;
    Some(strategy.cache_dir().join("sterna"))
}

/// A browser has no directories.
#[cfg(target_family = "wasm")]
fn native_directory() -> Option<PathBuf> {
    None
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
    /// By [`super::GemmShape::id`].
    gemms: BTreeMap<String, GemmPlan>,
}

impl Kept {
    /// Nothing is known.
    pub fn new(key: &Key) -> Self {
        Self { key: key.clone(), plans: BTreeMap::new(), gemms: BTreeMap::new() }
    }

    /// What is in the file of a key, or nothing. If there is a file and it is not for this key, why.
    pub fn read(directory: &Path, key: &Key) -> (Self, Option<String>) {
        let path = key.file(directory);
        let problem = match read_bounded(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(error.to_string()),
            Ok(bytes) => match serde_json::from_slice::<Self>(&bytes) {
                Ok(kept) if kept.plans.len().max(kept.gemms.len()) > MAX_PLANS => {
                    Some("too many plans".to_owned())
                }
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

    /// The tiles of a product of many tokens.
    pub fn gemm(&self, id: &str) -> Option<GemmPlan> {
        self.gemms.get(id).copied()
    }

    /// [`Self::add`] for products of many tokens.
    pub fn add_gemms(&mut self, plans: &[(String, GemmPlan)]) {
        if self.gemms.len() + plans.len() > MAX_PLANS {
            self.gemms.clear();
        }
        self.gemms.extend(plans.iter().cloned());
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::gpu::Variant;

    fn key() -> Key {
        let [adapter, driver, api, kernels] = ["A", "d 1", "vulkan", "0123"].map(str::to_owned);
        let (wgpu, capabilities) = (WGPU.to_owned(), "Adapter".to_owned());
        Key { adapter, driver, api, wgpu, kernels, capabilities }
    }

    fn kept(key: &Key) -> Kept {
        let mut kept = Kept::new(key);
        let plan = GemvPlan { slices: 4, fused: false, ..GemvPlan::from(Variant::PackedDot) };
        kept.add(&[("qkv 1x2".to_owned(), plan), ("o 3x4".to_owned(), Variant::BitSerial.into())]);
        kept
    }

    #[test]
    fn what_is_written_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("not/there/yet");
        assert_eq!(Kept::read(&below, &key()), (Kept::new(&key()), None));
        let path = kept(&key()).write(&below).unwrap();
        assert_eq!(path, key().file(&below));
        assert_eq!(Kept::read(&below, &key()), (kept(&key()), None));
        // Nothing else is left behind.
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn another_key_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        kept(&key()).write(directory.path()).unwrap();
        let other = || "other".to_owned();
        for (what, key) in [
            ("driver", Key { driver: other(), ..key() }),
            ("wgpu", Key { wgpu: other(), ..key() }),
            ("kernels", Key { kernels: other(), ..key() }),
        ] {
            let (found, note) = Kept::read(directory.path(), &key);
            assert_eq!(found, Kept::new(&key));
            let note = note.unwrap();
            assert!(
                note.contains(what) && note.contains("other") && note.contains(".json"),
                "{note}"
            );
        }
        // These have files of their own.
        for key in [
            Key { adapter: other(), ..key() },
            Key { api: other(), ..key() },
            Key { capabilities: other(), ..key() },
        ] {
            assert_eq!(Kept::read(directory.path(), &key), (Kept::new(&key), None));
        }
        // What is copied to another adapter's file is found out.
        let stranger = Key { adapter: other(), ..key() };
        fs::copy(key().file(directory.path()), stranger.file(directory.path())).unwrap();
        let note = Kept::read(directory.path(), &stranger).1.unwrap();
        assert!(note.contains("adapter"), "{note}");
    }

    #[test]
    fn a_damaged_file_is_not_used_and_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = kept(&key()).write(directory.path()).unwrap();
        let good = fs::read(&path).unwrap();
        let text = String::from_utf8(good.clone()).unwrap();
        let many: Vec<String> = (0..=MAX_PLANS)
            .map(|i| {
                format!("\"{i}\": {{\"variant\": \"packed_dot\", \"slices\": 8, \"rows\": 32, \"unroll\": 1, \"fused\": true}}")
            })
            .collect();
        let key_json = serde_json::to_string(&key()).unwrap();
        for bad in [
            Vec::new(),
            good[..good.len() / 2].to_vec(),
            b"\xff\xfe".to_vec(),
            b"[]".to_vec(),
            text.replace("packed_dot", "packed_cat").into_bytes(),
            text.replace("\"slices\": 4", "\"slices\": -4").into_bytes(),
            text.replace("\"slices\"", "\"splices\"").into_bytes(),
            vec![b' '; MAX_FILE_BYTES as usize + 1],
            format!("{{\"key\": {key_json}, \"plans\": {{{}}}}}", many.join(",")).into_bytes(),
        ] {
            fs::write(&path, &bad).unwrap();
            let (found, note) = Kept::read(directory.path(), &key());
            let note = note.expect("a note");
            assert_eq!(found, Kept::new(&key()), "{note}");
            assert!(note.contains("not used") && note.lines().count() == 1, "{note}");
            kept(&key()).write(directory.path()).unwrap();
            assert_eq!(fs::read(&path).unwrap(), good);
        }
        // A directory in its place is no file.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(Kept::read(directory.path(), &key()).1.is_some());
        assert!(kept(&key()).write(directory.path()).is_err());
    }

    #[test]
    fn a_full_file_begins_anew() {
        let mut kept = kept(&key());
        let plans: Vec<_> =
            (0..MAX_PLANS).map(|i| (i.to_string(), Variant::BitSerial.into())).collect();
        kept.add(&plans);
        assert_eq!(kept.plans.len(), MAX_PLANS);
        assert_eq!(kept.plan("o 3x4"), None);
    }

    #[test]
    fn where_the_cache_is() {
        assert_eq!(directory_of(Some("/a/b".into())), Some(PathBuf::from("/a/b")));
        for none in [None, Some(OsString::new())] {
            // Where there is a home.
            assert!(directory_of(none).is_none_or(|directory| directory.ends_with("sterna")));
        }
    }

    #[test]
    fn the_version_of_wgpu_is_the_one_in_use() {
        let lock = include_str!("../../../../Cargo.lock");
        assert!(lock.contains(&format!("name = \"wgpu\"\nversion = \"{WGPU}\"")), "{WGPU}");
    }
}
