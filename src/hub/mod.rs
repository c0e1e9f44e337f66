//! Models from the Hugging Face hub, in the cache that its other programs use.
//!
//! ```no_run
//! use sterna::hub::Hub;
//!
//! let hub = Hub::from_env()?;
//! let plan = hub.plan(&"microsoft/bitnet-b1.58-2B-4T".parse()?, "main")?;
//! hub.pull(&plan, &mut |at| eprintln!("{} of {} bytes", at.done_bytes, at.total_bytes))?;
//! let mut model = sterna::Model::load(plan.path(), sterna::Device::Auto)?;
//! # Ok::<(), sterna::Error>(())
//! ```
//!
//! The bytes of a large file are checked against the SHA-256, those of a small one against the git
//! SHA-1 that the hub names it by; where a server has neither, against the announced length
//! ([`Check`] tells). A file has its name in the cache only after that, and a branch points to a
//! commit only when all of its files are there.
//!
//! A cut download is continued, by the same run and by the next one. The token goes to the hub
//! itself, never to a host that it redirects to. Requests are ureq's; the crate `hf-hub` does not
//! check what arrives, or needs an asynchronous runtime.

mod cache;
mod choose;
mod http;
mod name;
mod settings;

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use ureq::Body;
use ureq::http::{Method, Response, StatusCode};

use cache::{Partial, RemoteFile, RepoCache};
use choose::{Choice, INDEX, Listing};
use http::{Client, Failure, Follow, answer, encoded, encoded_path, header, retry};
use name::{check_revision, is_commit};

pub use cache::Check;
pub use name::ModelName;
pub use settings::Token;

use crate::error::{Error, Result};
use crate::format::quoted;

/// The longest answer about a repository, and the longest index of shards, that is read.
const MAX_JSON_BYTES: u64 = 64 << 20;
const BUFFER_BYTES: usize = 1 << 18;
/// So many bytes on one connection count as progress.
const PROGRESS_BYTES: u64 = 1 << 20;

/// A hub, a cache, and who asks.
#[derive(Debug, Clone)]
pub struct Hub {
    /// `https://huggingface.co`, or another server that answers as it does; no slash at its end.
    pub endpoint: String,
    /// The directory of `models--ORG--NAME`.
    pub cache: PathBuf,
    /// Who asks.
    pub token: Option<Token>,
    /// Whether [`Hub::plan`] and [`Hub::pull`] are refused.
    pub offline: bool,
}

/// How far a download is.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The file that is arriving.
    pub file: &'a str,
    /// Bytes of all files that are there, those of earlier runs among them.
    pub done_bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
}

/// What there is to download, and where it goes.
#[derive(Debug)]
pub struct Plan {
    name: ModelName,
    revision: String,
    commit: String,
    cache: RepoCache,
    files: Vec<PlannedFile>,
    path: PathBuf,
}

/// A file of a [`Plan`].
#[derive(Debug)]
pub struct PlannedFile {
    name: String,
    remote: RemoteFile,
}

impl PlannedFile {
    /// Its path in the repository.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its length.
    pub fn len_bytes(&self) -> u64 {
        self.remote.len_bytes
    }

    /// What its bytes are checked against.
    pub fn check(&self) -> Check {
        self.remote.check()
    }
}

impl Plan {
    /// The model that was asked for.
    pub fn name(&self) -> &ModelName {
        &self.name
    }

    /// The commit that the revision stands for now.
    pub fn commit(&self) -> &str {
        &self.commit
    }

    /// The files, in the order they are downloaded.
    pub fn files(&self) -> &[PlannedFile] {
        &self.files
    }

    /// Where the model will be: a directory, or the (first) GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(PlannedFile::len_bytes).sum()
    }

    /// The bytes that the cache does not have yet.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn missing_bytes(&self) -> Result<u64> {
        self.files.iter().map(|file| self.cache.missing_bytes(&file.remote)).sum()
    }
}

/// The hub's answer about a repository; the rest of it is of no use here.
#[derive(Deserialize)]
struct RepoInfo {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
}

impl Hub {
    /// Where the cache has a model: the directory of a checkpoint, or the (first) GGUF file.
    ///
    /// # Errors
    /// [`Error::HubOffline`] if the cache lacks a part of it; or if it holds several models, or
    /// cannot be read.
    pub fn cached(&self, name: &ModelName, revision: &str) -> Result<PathBuf> {
        check_revision(revision)?;
        let lacks = |missing| self.offline_error(name, missing);
        let cache = RepoCache::new(&self.cache, name.repo());
        let commit = cache.commit(revision)?;
        let never = || lacks(format!("revision {revision} was never pulled"));
        let commit = commit.ok_or_else(never)?;
        let listing = cache.listing(&commit)?;
        if listing.is_empty() {
            return Err(never());
        }
        let complete = || -> Result<PathBuf> {
            let snapshot = cache.snapshot(&commit);
            match choose::choose(name, &listing)? {
                Choice::Gguf(files) => Ok(snapshot.join(&files[0])),
                Choice::Checkpoint { sharded, .. } => {
                    if sharded {
                        choose::shards(name, &read_json(&snapshot.join(INDEX))?, &listing)?;
                    }
                    Ok(snapshot)
                }
            }
        };
        complete().map_err(|error| match error {
            Error::HubNoModel { problem, .. } => lacks(problem),
            other => other,
        })
    }

    /// Asks the hub what a model consists of. The index of a sharded model is downloaded for it.
    ///
    /// # Errors
    /// If the hub cannot be reached, refuses, does not have the model, or holds several of them;
    /// if a file's name would lead out of the cache, or this is offline.
    pub fn plan(&self, name: &ModelName, revision: &str) -> Result<Plan> {
        check_revision(revision)?;
        if self.offline {
            return Err(self.offline_error(name, "the hub may not be asked".to_owned()));
        }
        let client = Client::new(self);
        let (commit, listing) = list(&client, name, revision)?;
        let cache = RepoCache::new(&self.cache, name.repo());
        let describe = |file: String| -> Result<PlannedFile> {
            let remote = describe(&client, name, &commit, &file, listing[&file])?;
            Ok(PlannedFile { name: file, remote })
        };
        let snapshot = cache.snapshot(&commit);
        let (files, path) = match choose::choose(name, &listing)? {
            Choice::Gguf(files) => (files.clone(), snapshot.join(&files[0])),
            Choice::Checkpoint { mut files, sharded } => {
                if sharded {
                    let index = describe(INDEX.to_owned())?;
                    if index.len_bytes() > MAX_JSON_BYTES {
                        let found = format!("{} bytes", index.len_bytes());
                        return Err(answer(&index.remote.label, "at most 64 MiB", found));
                    }
                    fetch(&client, &cache, name, &commit, &index, &mut |_| {})?;
                    let json = read_json(&cache.blob(&index.remote.etag))?;
                    files.extend(choose::shards(name, &json, &listing)?);
                }
                (files, snapshot)
            }
        };
        let files = files.into_iter().map(describe).collect::<Result<Vec<_>>>()?;
        let total = files.iter().try_fold(0_u64, |sum, file| sum.checked_add(file.len_bytes()));
        if total.is_none() {
            return Err(answer(&name.to_string(), "fewer than 2^64 bytes", "more".to_owned()));
        }
        let (name, revision) = (name.clone(), revision.to_owned());
        Ok(Plan { name, revision, commit, cache, files, path })
    }

    /// Downloads what the cache lacks, checks it, and puts it in its place: [`Plan::path`].
    ///
    /// # Errors
    /// If the hub refuses, the connection is cut for good (what has arrived is kept for the next
    /// try), a checksum is wrong (then it is not), the disk is full, or this is offline.
    pub fn pull(&self, plan: &Plan, progress: &mut dyn FnMut(Progress<'_>)) -> Result<()> {
        let (total_bytes, missing_bytes) = (plan.total_bytes(), plan.missing_bytes()?);
        if self.offline && missing_bytes > 0 {
            return Err(self.offline_error(&plan.name, size_text(missing_bytes)));
        }
        std::fs::create_dir_all(&self.cache)
            .map_err(|source| Error::Io { path: self.cache.clone(), source })?;
        self.check_disk(missing_bytes)?;
        let client = Client::new(self);
        let mut before = 0;
        for file in &plan.files {
            let mut on_bytes = |len: u64| {
                let done_bytes = before + len;
                progress(Progress { file: &file.name, done_bytes, total_bytes });
            };
            fetch(&client, &plan.cache, &plan.name, &plan.commit, file, &mut on_bytes)?;
            plan.cache.link(&plan.commit, &file.name, &file.remote)?;
            before += file.len_bytes();
        }
        plan.cache.set_commit(&plan.revision, &plan.commit)
    }

    fn offline_error(&self, name: &ModelName, missing: String) -> Error {
        Error::HubOffline { name: name.to_string(), cache: self.cache.clone(), missing }
    }

    fn check_disk(&self, missing_bytes: u64) -> Result<()> {
        let free = fs4::available_space(&self.cache)
            .map_err(|source| Error::Io { path: self.cache.clone(), source })?;
        if missing_bytes <= free {
            return Ok(());
        }
        let (needed, free) = (size_text(missing_bytes), size_text(free));
        Err(Error::HubDisk { cache: self.cache.clone(), needed, free })
    }
}

/// A length as people write it.
pub fn size_text(bytes: u64) -> String {
    const UNITS: [&str; 3] = ["KiB", "MiB", "GiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let mut size = bytes as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1024.0 && unit < UNITS.len() - 1 {
        size /= 1024.0;
        unit += 1;
    }
    format!("{size:.2} {}", UNITS[unit])
}

fn read_json(path: &Path) -> Result<Vec<u8>> {
    let io_error = |source| Error::Io { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(io_error)?;
    let len = file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(io_error)?;
    if len as u64 > MAX_JSON_BYTES {
        return Err(io_error(std::io::ErrorKind::FileTooLarge.into()));
    }
    Ok(bytes)
}

/// The commit of a revision, and its files.
fn list(client: &Client<'_>, name: &ModelName, revision: &str) -> Result<(String, Listing)> {
    let what = format!("{} (revision {revision})", name.repo());
    let path = format!("api/models/{}/revision/{}?blobs=true", name.repo(), encoded(revision));
    let json = retry(|| {
        let response = client.send(&what, &Method::GET, &path, 0, Follow::Everywhere)?;
        let mut body = response.into_body();
        let bytes = body.with_config().limit(MAX_JSON_BYTES).read_to_vec();
        bytes.map_err(|error| match error {
            ureq::Error::BodyExceedsLimit(_) => {
                Failure::Final(answer(&what, "at most 64 MiB", "more".to_owned()))
            }
            error => http::cut(&what, &error.to_string(), false),
        })
    })?;
    let info: RepoInfo = serde_json::from_slice(&json)
        .map_err(|source| Error::Json { file: format!("{what}, from {path}"), source })?;
    if !is_commit(&info.sha) {
        return Err(answer(&what, "a commit: 40 hexadecimal digits", quoted(&info.sha)));
    }
    let files = info.siblings.into_iter().map(|file| (file.rfilename, file.size));
    Ok((info.sha, files.collect()))
}

fn file_url(name: &ModelName, commit: &str, file: &str) -> String {
    format!("{}/resolve/{commit}/{}", name.repo(), encoded_path(file))
}

/// What the hub says of a file: its length and its entity tag, which names its bytes.
fn describe(
    client: &Client<'_>,
    name: &ModelName,
    commit: &str,
    file: &str,
    listed_bytes: Option<u64>,
) -> Result<RemoteFile> {
    let label = format!("{}: {file}", name.repo());
    let path = file_url(name, commit, file);
    let response = retry(|| client.send(&label, &Method::HEAD, &path, 0, Follow::ToDescription))?;
    if let Some(found) = header(&response, "x-repo-commit")
        && found != commit
    {
        return Err(answer(&label, "the commit that was asked for", quoted(found)));
    }
    let etag = header(&response, "x-linked-etag").or_else(|| header(&response, "etag"));
    let etag = etag.unwrap_or_default();
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    let is_name = (1..=128).contains(&etag.len())
        && etag.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_');
    if !is_name {
        return Err(answer(&label, "an ETag of letters and digits", quoted(etag)));
    }
    let own_length = if response.status().is_redirection() { "" } else { "content-length" };
    let len_bytes = header(&response, "x-linked-size").or_else(|| header(&response, own_length));
    let len_bytes = match (len_bytes.map(str::parse), listed_bytes) {
        (Some(Ok(len)), Some(listed)) if len != listed => {
            let found = format!("{len} bytes, and {listed} in the list of files");
            return Err(answer(&label, "one length", found));
        }
        (Some(Ok(len)), _) => len,
        (None, Some(listed)) => listed,
        (length, _) => {
            return Err(answer(&label, "a length", format!("{length:?}")));
        }
    };
    Ok(RemoteFile { etag: etag.to_owned(), label, len_bytes })
}

/// Gets a file into the blobs of the cache; `on_bytes` learns how much of it is there.
fn fetch(
    client: &Client<'_>,
    cache: &RepoCache,
    name: &ModelName,
    commit: &str,
    file: &PlannedFile,
    on_bytes: &mut dyn FnMut(u64),
) -> Result<()> {
    let remote = &file.remote;
    // Before the lock, which a cache that is complete does not need.
    if cache.has(remote)? {
        on_bytes(remote.len_bytes);
        return Ok(());
    }
    let _lock = cache.lock(remote)?;
    if cache.has(remote)? {
        on_bytes(remote.len_bytes);
        return Ok(());
    }
    let mut partial = Partial::open(cache, remote)?;
    on_bytes(partial.len_bytes());
    let path = file_url(name, commit, &file.name);
    retry(|| {
        let start = partial.len_bytes();
        if start >= remote.len_bytes {
            return Ok(());
        }
        let response =
            client.send(&remote.label, &Method::GET, &path, start, Follow::Everywhere)?;
        receive(response, remote, &mut partial, on_bytes)
    })?;
    partial.publish(cache)
}

/// Reads a body to its end; one byte too many is read as well, so that it is noticed.
fn receive(
    response: Response<Body>,
    remote: &RemoteFile,
    partial: &mut Partial<'_>,
    on_bytes: &mut dyn FnMut(u64),
) -> std::result::Result<(), Failure> {
    let label = &remote.label;
    let start = partial.len_bytes();
    if start > 0 && response.status() == StatusCode::PARTIAL_CONTENT {
        let range = header(&response, "content-range").unwrap_or_default();
        let expected = format!("bytes {start}-{}/{}", remote.len_bytes - 1, remote.len_bytes);
        if range != expected {
            return Err(answer(label, "the range that was asked for", quoted(range)).into());
        }
    } else if response.status() == StatusCode::PARTIAL_CONTENT {
        return Err(answer(label, "status 200", "206".to_owned()).into());
    } else if start > 0 {
        // The server does not know ranges and sends everything.
        partial.restart()?;
    }
    let (begin, mut received) = (partial.len_bytes(), 0);
    let left = remote.len_bytes - begin;
    let mut body = response.into_body().into_reader().take(left.saturating_add(1));
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let n = match body.read(&mut buffer) {
            Ok(0) if received >= left => return Ok(()),
            Ok(0) => {
                let problem = format!("the connection was cut after {} bytes", begin + received);
                return Err(http::cut(label, &problem, received >= PROGRESS_BYTES));
            }
            Ok(n) => n,
            Err(error) => {
                let arrived = begin + received;
                let problem = format!("the connection was cut after {arrived} bytes ({error})");
                return Err(http::cut(label, &problem, received >= PROGRESS_BYTES));
            }
        };
        received += n as u64;
        partial.write(&buffer[..n])?;
        on_bytes(partial.len_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::size_text;

    #[test]
    fn sizes() {
        assert_eq!(size_text(0), "0 bytes");
        assert_eq!(size_text(1023), "1023 bytes");
        assert_eq!(size_text(1536), "1.50 KiB");
        assert_eq!(size_text(1_180_000_000), "1.10 GiB");
        assert_eq!(size_text(u64::MAX), "17179869184.00 GiB");
    }
}
