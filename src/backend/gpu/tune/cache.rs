//! What was measured, kept in a file for each adapter; where there are no files, by whoever hosts the
//! program.
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
use std::sync::{Mutex, PoisonError};

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

/// Where measurements are kept.
pub(super) enum Place {
    /// One file for each adapter.
    Directory(PathBuf),
    /// See [`remember`].
    Memory,
}

impl Place {
    /// Of a program that says nothing else; `None` if there is no home directory.
    pub fn of_this_program() -> Option<Self> {
        match cfg!(target_family = "wasm") {
            true => Some(Self::Memory),
            false => directory().map(Self::Directory),
        }
    }
}

/// What a program without directories knows of its adapter.
static MEMORY: Mutex<Option<String>> = Mutex::new(None);

/// Hands over what [`remembered`] returned at another time, before a model is loaded where there are no
/// directories: in a browser. It may be any text: what is not for the adapter, the driver and these kernels
/// is not used, and said so.
pub fn remember(measured: String) {
    *MEMORY.lock().unwrap_or_else(PoisonError::into_inner) = Some(measured);
}

/// What was handed over, or measured since; worth keeping where a load may find it.
pub fn remembered() -> Option<String> {
    MEMORY.lock().unwrap_or_else(PoisonError::into_inner).clone()
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

    /// What is kept for a key, or nothing. If there is something and it is not for this key, why.
    pub fn read(place: &Place, key: &Key) -> (Self, Option<String>) {
        let (name, bytes) = match place {
            Place::Directory(directory) => {
                let path = key.file(directory);
                (path.display().to_string(), read_bounded(&path))
            }
            Place::Memory => {
                let bytes = remembered().map(String::into_bytes);
                let bytes = bytes.ok_or_else(|| io::ErrorKind::NotFound.into());
                ("what is remembered of the GPU".to_owned(), bytes.and_then(bounded))
            }
        };
        let parsed = match bytes {
            Ok(bytes) => Self::parse(&bytes, key),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return (Self::new(key), None),
            Err(error) => Err(error.to_string()),
        };
        match parsed {
            Ok(kept) => (kept, None),
            Err(problem) => (Self::new(key), Some(format!("{name}: not used: {problem}"))),
        }
    }

    fn parse(bytes: &[u8], key: &Key) -> std::result::Result<Self, String> {
        let kept: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if kept.plans.len().max(kept.gemms.len()) > MAX_PLANS {
            return Err("too many plans".to_owned());
        }
        if kept.key == *key { Ok(kept) } else { Err(kept.difference(key)) }
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

    /// Keeps it; in a directory as a whole file or not at all.
    ///
    /// # Errors
    /// [`Error::Io`] if directory or file cannot be written.
    pub fn write(&self, place: &Place) -> Result<()> {
        match place {
            Place::Directory(directory) => self.write_file(directory).map(|_| ()),
            Place::Memory => {
                remember(serde_json::to_string(self).expect("strings and numbers"));
                Ok(())
            }
        }
    }

    /// Writes the file, whole or not at all, and says where it is.
    ///
    /// # Errors
    /// [`Error::Io`] if directory or file cannot be written.
    pub fn write_file(&self, directory: &Path) -> Result<PathBuf> {
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
    bounded(bytes)
}

fn bounded(bytes: Vec<u8>) -> io::Result<Vec<u8>> {
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

    fn read(directory: &Path, key: &Key) -> (Kept, Option<String>) {
        Kept::read(&Place::Directory(directory.to_owned()), key)
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
        assert_eq!(read(&below, &key()), (Kept::new(&key()), None));
        let path = kept(&key()).write_file(&below).unwrap();
        assert_eq!(path, key().file(&below));
        assert_eq!(read(&below, &key()), (kept(&key()), None));
        // Nothing else is left behind.
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn another_key_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        kept(&key()).write_file(directory.path()).unwrap();
        let other = || "other".to_owned();
        for (what, key) in [
            ("driver", Key { driver: other(), ..key() }),
            ("wgpu", Key { wgpu: other(), ..key() }),
            ("kernels", Key { kernels: other(), ..key() }),
        ] {
            let (found, note) = read(directory.path(), &key);
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
            assert_eq!(read(directory.path(), &key), (Kept::new(&key), None));
        }
        // What is copied to another adapter's file is found out.
        let stranger = Key { adapter: other(), ..key() };
        fs::copy(key().file(directory.path()), stranger.file(directory.path())).unwrap();
        let note = read(directory.path(), &stranger).1.unwrap();
        assert!(note.contains("adapter"), "{note}");
    }

    #[test]
    fn a_damaged_file_is_not_used_and_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = kept(&key()).write_file(directory.path()).unwrap();
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
            let (found, note) = read(directory.path(), &key());
            let note = note.expect("a note");
            assert_eq!(found, Kept::new(&key()), "{note}");
            assert!(note.contains("not used") && note.lines().count() == 1, "{note}");
            kept(&key()).write_file(directory.path()).unwrap();
            assert_eq!(fs::read(&path).unwrap(), good);
        }
        // A directory in its place is no file.
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert!(read(directory.path(), &key()).1.is_some());
        assert!(kept(&key()).write_file(directory.path()).is_err());
    }

    #[test]
    fn what_is_remembered_is_used_for_its_key_alone() {
        assert_eq!(Kept::read(&Place::Memory, &key()), (Kept::new(&key()), None));
        kept(&key()).write(&Place::Memory).unwrap();
        assert_eq!(Kept::read(&Place::Memory, &key()), (kept(&key()), None));
        let text = remembered().unwrap();
        let other = Key { kernels: "other".to_owned(), ..key() };
        let note = Kept::read(&Place::Memory, &other).1.unwrap();
        assert!(note.contains("not used: kernels"), "{note}");
        for bad in ["", "{}", "null", &text[..40], &" ".repeat(MAX_FILE_BYTES as usize + 1)] {
            remember(bad.to_owned());
            let (found, note) = Kept::read(&Place::Memory, &key());
            assert_eq!(found, Kept::new(&key()));
            assert!(note.is_some_and(|note| note.lines().count() == 1), "{bad:.40}");
        }
        remember(text);
        assert_eq!(Kept::read(&Place::Memory, &key()).0, kept(&key()));
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
