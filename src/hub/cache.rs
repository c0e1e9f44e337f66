//! The cache that all programs for the hub share
//! (<https://huggingface.co/docs/huggingface_hub/guides/manage-cache>):
//!
//! ```text
//! models--ORG--NAME/blobs/ETAG               a file's bytes
//!                        ETAG.incomplete     what has arrived of them
//!                   snapshots/COMMIT/FILE    a link to the bytes
//!                   refs/main                the commit of a branch
//! .locks/models--ORG--NAME/ETAG.lock         held while a file arrives
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use ring::digest;

use super::choose::Listing;
use super::name::{is_commit, is_hex, is_relative_path};
use crate::error::{Error, Result};

/// How deep a snapshot is searched for files.
const MAX_DEPTH: usize = 8;
const BUFFER_BYTES: usize = 1 << 18;

/// What a file's bytes are checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// SHA-256, which the hub has of large files.
    Sha256,
    /// The SHA-1 that git names a small file by.
    GitSha1,
    /// The length only: the server has no checksum.
    Length,
}

impl Check {
    /// The hub's entity tags are checksums; those of other servers may be anything.
    pub(super) fn of(etag: &str) -> Self {
        match etag {
            _ if is_hex(etag, 64) => Self::Sha256,
            _ if is_hex(etag, 40) => Self::GitSha1,
            _ => Self::Length,
        }
    }

    /// The name of the checksum.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::GitSha1 => "git-sha1",
            Self::Length => "length",
        }
    }

    fn hasher(self, len_bytes: u64) -> Option<digest::Context> {
        match self {
            Self::Sha256 => Some(digest::Context::new(&digest::SHA256)),
            Self::GitSha1 => {
                let mut hasher = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
                hasher.update(format!("blob {len_bytes}\0").as_bytes());
                Some(hasher)
            }
            Self::Length => None,
        }
    }
}

/// What the hub says of a file.
#[derive(Debug, Clone)]
pub(super) struct RemoteFile {
    /// The model and the file, for messages.
    pub(super) label: String,
    pub(super) etag: String,
    pub(super) len_bytes: u64,
}

impl RemoteFile {
    pub(super) fn check(&self) -> Check {
        Check::of(&self.etag)
    }
}

/// The cache's directory of one repository.
#[derive(Debug, Clone)]
pub(super) struct RepoCache {
    root: PathBuf,
    locks: PathBuf,
}

fn at(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::Io { path: path.to_owned(), source }
}

fn create_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(at(path))
}

/// `None` for a file that is not there.
fn found<T>(path: &Path, result: io::Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(at(path)(source)),
    }
}

impl RepoCache {
    pub(super) fn new(cache: &Path, repo: &str) -> Self {
        let directory = format!("models--{}", repo.replace('/', "--"));
        Self { locks: cache.join(".locks").join(&directory), root: cache.join(directory) }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    fn partial(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.root.join("refs").join(revision)
    }

    /// The commit that a branch, a tag or itself stands for.
    pub(super) fn commit(&self, revision: &str) -> Result<Option<String>> {
        if is_commit(revision) {
            return Ok(Some(revision.to_owned()));
        }
        let path = self.reference(revision);
        let mut text = String::new();
        let read = File::open(&path).and_then(|file| file.take(100).read_to_string(&mut text));
        let commit = found(&path, read)?.map(|_| text.trim().to_owned());
        // Another program's mistake must not lead out of the cache.
        Ok(commit.filter(|commit| is_commit(commit)))
    }

    /// Sets what a branch or tag stands for, at once or not at all.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.reference(revision);
        create_directory(path.parent().unwrap_or(&self.root))?;
        let temporary = self.root.join(format!(".ref-{}", std::process::id()));
        let written = fs::write(&temporary, commit).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|source| {
            // The first error is the one to report.
            let _ = fs::remove_file(&temporary);
            at(&path)(source)
        })
    }

    /// The files of a snapshot whose bytes are there.
    pub(super) fn listing(&self, commit: &str) -> Result<Listing> {
        let mut listing = Listing::new();
        list(&self.snapshot(commit), "", MAX_DEPTH, &mut listing)?;
        Ok(listing)
    }

    /// How many bytes of a file are still to be downloaded.
    pub(super) fn missing_bytes(&self, file: &RemoteFile) -> Result<u64> {
        if self.has(file)? {
            return Ok(0);
        }
        let path = self.partial(&file.etag);
        let partial = found(&path, fs::metadata(&path))?.map_or(0, |metadata| metadata.len());
        Ok(file.len_bytes - if partial <= file.len_bytes { partial } else { 0 })
    }

    pub(super) fn has(&self, file: &RemoteFile) -> Result<bool> {
        let path = self.blob(&file.etag);
        let metadata = found(&path, fs::metadata(&path))?;
        Ok(metadata.is_some_and(|metadata| metadata.is_file() && metadata.len() == file.len_bytes))
    }

    /// Waits until no other process downloads this file; it is ours until the result is dropped.
    pub(super) fn lock(&self, file: &RemoteFile) -> Result<File> {
        create_directory(&self.locks)?;
        let path = self.locks.join(format!("{}.lock", file.etag));
        let lock = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
        let lock = lock.map_err(at(&path))?;
        lock.lock().map_err(at(&path))?;
        Ok(lock)
    }

    /// Gives a file of a snapshot the bytes of a blob: a link where the system has them, else a
    /// copy.
    pub(super) fn link(&self, commit: &str, name: &str, file: &RemoteFile) -> Result<()> {
        let (blob, path) = (self.blob(&file.etag), self.snapshot(commit).join(name));
        create_directory(path.parent().unwrap_or(&self.root))?;
        if let (Some(there), Some(wanted)) =
            (found(&path, fs::canonicalize(&path))?, found(&blob, fs::canonicalize(&blob))?)
            && (there == wanted || same_bytes(&there, &wanted)?)
        {
            return Ok(());
        }
        found(&path, fs::remove_file(&path))?;
        let up = "../".repeat(2 + name.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{}", file.etag));
        if symlink(&target, &path).is_ok() || fs::hard_link(&blob, &path).is_ok() {
            return Ok(());
        }
        let temporary = self.partial(&format!("{}.copy", file.etag));
        fs::copy(&blob, &temporary).map_err(at(&temporary))?;
        fs::rename(&temporary, &path).map_err(at(&path))
    }
}

#[cfg(unix)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn symlink(target: &Path, path: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, path)
}

#[cfg(not(any(unix, windows)))]
fn symlink(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Whether a file that is no link to a blob is a copy of it.
fn same_bytes(a: &Path, b: &Path) -> Result<bool> {
    let open = |path: &Path| File::open(path).map_err(at(path));
    let (mut left, mut right) = (open(a)?, open(b)?);
    let len = |file: &File, path: &Path| file.metadata().map(|m| m.len()).map_err(at(path));
    if len(&left, a)? != len(&right, b)? {
        return Ok(false);
    }
    let (mut x, mut y) = (vec![0; BUFFER_BYTES], vec![0; BUFFER_BYTES]);
    loop {
        let n = left.read(&mut x).map_err(at(a))?;
        if n == 0 {
            return Ok(true);
        }
        right.read_exact(&mut y[..n]).map_err(at(b))?;
        if x[..n] != y[..n] {
            return Ok(false);
        }
    }
}

fn list(directory: &Path, prefix: &str, depth: usize, listing: &mut Listing) -> Result<()> {
    let Some(entries) = found(directory, fs::read_dir(directory))? else { return Ok(()) };
    for entry in entries {
        let entry = entry.map_err(at(directory))?;
        let path = entry.path();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        // A link whose blob was removed counts as no file.
        let Some(metadata) = found(&path, fs::metadata(&path))? else { continue };
        if metadata.is_file() && is_relative_path(&name) {
            listing.insert(name, Some(metadata.len()));
        } else if metadata.is_dir() && depth > 0 {
            list(&path, &format!("{name}/"), depth - 1, listing)?;
        }
    }
    Ok(())
}

/// A file on its way: nothing has its final name before its bytes are all there and checked.
pub(super) struct Partial<'a> {
    remote: &'a RemoteFile,
    path: PathBuf,
    file: File,
    hasher: Option<digest::Context>,
    len_bytes: u64,
}

impl<'a> Partial<'a> {
    /// Goes on from what an earlier run left. Without a checksum nothing would tell whether that
    /// is part of the same file: then from the start.
    pub(super) fn open(cache: &RepoCache, remote: &'a RemoteFile) -> Result<Self> {
        let path = cache.partial(&remote.etag);
        create_directory(path.parent().unwrap_or(&cache.root))?;
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(at(&path))?;
        let len = file.metadata().map_err(at(&path))?.len();
        let hasher = remote.check().hasher(remote.len_bytes);
        let mut partial = Self { remote, path, file, hasher, len_bytes: 0 };
        if remote.check() == Check::Length || len > remote.len_bytes {
            partial.restart()?;
        } else {
            partial.read_back()?;
        }
        Ok(partial)
    }

    fn read_back(&mut self) -> Result<()> {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let n = self.file.read(&mut buffer).map_err(at(&self.path))?;
            if n == 0 {
                return Ok(());
            }
            self.count(&buffer[..n]);
        }
    }

    fn count(&mut self, bytes: &[u8]) {
        self.len_bytes += bytes.len() as u64;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(bytes);
        }
    }

    /// Forgets what has arrived.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(at(&self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(at(&self.path))?;
        self.hasher = self.remote.check().hasher(self.remote.len_bytes);
        self.len_bytes = 0;
        Ok(())
    }

    pub(super) fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(at(&self.path))?;
        self.count(bytes);
        Ok(())
    }

    /// Deletes what has arrived, and says why.
    pub(super) fn reject(self, expected: String, found: String) -> Error {
        drop(self.file);
        match fs::remove_file(&self.path) {
            Ok(()) => Error::HubChecksum { file: self.remote.label.clone(), expected, found },
            Err(source) => Error::Io { path: self.path, source },
        }
    }

    /// Checks all bytes, then gives the file its name.
    pub(super) fn publish(mut self, cache: &RepoCache) -> Result<()> {
        let (check, wanted) = (self.remote.check(), &self.remote.etag);
        if self.len_bytes != self.remote.len_bytes {
            let expected = format!("{} bytes", self.remote.len_bytes);
            let found = format!("{} bytes", self.len_bytes);
            return Err(self.reject(expected, found));
        }
        if let Some(hasher) = self.hasher.take() {
            let found = hex(hasher.finish().as_ref());
            if found != *wanted {
                let name = check.name();
                let (expected, found) = (format!("{name} {wanted}"), format!("{name} {found}"));
                return Err(self.reject(expected, found));
            }
        }
        self.file.sync_all().map_err(at(&self.path))?;
        // Some systems rename no open file.
        drop(self.file);
        let blob = cache.blob(&self.remote.etag);
        fs::rename(&self.path, &blob).map_err(at(&blob))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums() {
        let hash = |etag: &str, bytes: &[u8]| {
            let mut hasher = Check::of(etag).hasher(bytes.len() as u64).unwrap();
            hasher.update(bytes);
            assert_eq!(hex(hasher.finish().as_ref()), etag);
        };
        // As `sha256sum` and `git hash-object` answer.
        hash("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824", b"hello");
        hash("b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0", b"hello");
        assert_eq!(Check::of("B6FC4C620B67D95F953A5C1C1230AAAB5DB5A1B0"), Check::Length);
        assert_eq!(Check::of("1234-5"), Check::Length);
    }
}
