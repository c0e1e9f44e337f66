//! The system's files, real or not, and what can be wrong with one.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::error::{Error, Result};
use crate::format::{quoted, shortened};

/// Of a file that holds one value.
const MAX_BYTES: u64 = 4096;
/// Of a directory.
const MAX_ENTRIES: usize = 4096;

/// Read access to `/sys` and `/proc`. Paths are relative to the root: `sys/class/powercap`.
pub trait Files {
    /// The first bytes of a file, 4096 at most.
    ///
    /// # Errors
    /// The system's.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// The names in a directory, in any order.
    ///
    /// # Errors
    /// The system's.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// The last part of the path that a symbolic link leads to.
    ///
    /// # Errors
    /// The system's.
    fn target_name(&self, path: &Path) -> io::Result<String>;
}

/// The files under a directory, `/` for those of this machine.
#[derive(Debug, Clone)]
pub struct Tree(pub PathBuf);

impl Files for Tree {
    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.0.join(path))?.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let entries = fs::read_dir(self.0.join(path))?.take(MAX_ENTRIES);
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
    }

    fn target_name(&self, path: &Path) -> io::Result<String> {
        let target = fs::canonicalize(self.0.join(path))?;
        let name = target.file_name().ok_or(io::ErrorKind::InvalidData)?;
        Ok(name.to_string_lossy().into_owned())
    }
}

/// [`Files`], with values and errors that say which file.
#[derive(Clone)]
pub(super) struct Values {
    files: Rc<dyn Files>,
    /// What would help if a file may not be read.
    fix: &'static str,
}

impl Values {
    pub(super) fn new(files: Rc<dyn Files>, fix: &'static str) -> Self {
        Self { files, fix }
    }

    /// The names in a directory, sorted; none if it is not there. Names that would break a message
    /// are none of the kernel's.
    pub(super) fn list(&self, path: &str) -> Result<Vec<String>> {
        let mut names = match self.files.list(Path::new(path)) {
            Ok(names) => names,
            Err(source) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(self.error(path, source)),
        };
        names.retain(|name| !name.contains(char::is_control));
        names.sort();
        Ok(names)
    }

    /// A file's text, without the newline at its end.
    pub(super) fn text(&self, path: &str) -> Result<String> {
        let bytes = self.files.read(Path::new(path)).map_err(|source| self.error(path, source))?;
        let text = String::from_utf8(bytes);
        Ok(text.map_err(|_| value(path, "text", "bytes that are no UTF-8"))?.trim().to_owned())
    }

    /// A file's text; `None` if it is not there.
    pub(super) fn optional_text(&self, path: &str) -> Result<Option<String>> {
        match self.text(path) {
            Ok(text) => Ok(Some(text)),
            Err(Error::MeterVanished { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A file's whole number.
    pub(super) fn number(&self, path: &str) -> Result<u64> {
        let text = self.text(path)?;
        text.parse().map_err(|_| value(path, "a whole number", quoted(&text)))
    }

    /// A file's whole number; `None` if it is not there.
    pub(super) fn optional_number(&self, path: &str) -> Result<Option<u64>> {
        match self.number(path) {
            Ok(number) => Ok(Some(number)),
            Err(Error::MeterVanished { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The last part of where a link leads; `None` if it leads nowhere or to no such name.
    pub(super) fn target_name(&self, path: &str) -> Option<String> {
        let name = self.files.target_name(Path::new(path)).ok()?;
        (!name.contains(char::is_control)).then(|| shortened(&name))
    }

    fn error(&self, path: &str, source: io::Error) -> Error {
        let path = shown(path);
        match source.kind() {
            io::ErrorKind::NotFound => Error::MeterVanished { path },
            io::ErrorKind::PermissionDenied => Error::MeterPermission { path, fix: self.fix },
            _ => Error::Io { path, source },
        }
    }
}

/// A value that no meter shows.
pub(super) fn value(path: &str, expected: impl Into<String>, found: impl Into<String>) -> Error {
    Error::MeterValue { path: shown(path), expected: expected.into(), found: found.into() }
}

fn shown(path: &str) -> PathBuf {
    Path::new("/").join(path)
}
