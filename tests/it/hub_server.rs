//! A hub on this machine: HTTP/1.1 on threads, with the routes of huggingface.co that a pull uses.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use ring::digest;
use serde_json::{Value, json};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(crate) const REPO: &str = "org/name";

/// What a client asked.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: BTreeMap<String, String>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(crate) fn is_download(&self) -> bool {
        self.method == "GET" && !self.path.starts_with("/api/models/")
    }
}

/// What it gets. With `cut`, the connection ends after so many bytes of the body.
#[derive(Clone, Default)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) cut: Option<usize>,
}

impl Reply {
    pub(crate) fn new(status: u16, headers: &[(&'static str, &str)], body: &[u8]) -> Self {
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Self { status, headers, body: body.to_vec(), cut: None }
    }

    pub(crate) fn set(mut self, name: &'static str, value: &str) -> Self {
        self.headers.retain(|(header, _)| *header != name);
        self.headers.push((name, value.to_owned()));
        self
    }
}

/// A server that runs until the tests end.
pub(crate) struct Server {
    pub(crate) url: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub(crate) fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (answer, shared_log) = (Arc::new(answer), Arc::clone(&log));
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, log) = (Arc::clone(&answer), Arc::clone(&shared_log));
                thread::spawn(move || serve(stream.unwrap(), &*answer, &log));
            }
        });
        Self { url, log }
    }

    /// Every request since the last call.
    pub(crate) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// The `Range` of every request for a file's bytes since the last call.
    pub(crate) fn downloads(&self) -> Vec<(String, Option<String>)> {
        let downloads = self.requests().into_iter().filter(Request::is_download);
        downloads.map(|get| (get.path.clone(), get.header("range").map(str::to_owned))).collect()
    }
}

fn serve(stream: TcpStream, answer: &dyn Fn(&Request) -> Reply, log: &Mutex<Vec<Request>>) {
    let mut lines = BufReader::new(&stream).lines();
    // A client that hangs up is no failure of the server.
    let Some(Ok(first)) = lines.next() else { return };
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap(), words.next().unwrap());
    let mut headers = BTreeMap::new();
    for line in lines {
        let Ok(line) = line else { return };
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let request = Request { method, path, headers };
    let reply = answer(&request);
    log.lock().unwrap().push(request.clone());
    let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    if !reply.headers.iter().any(|(name, _)| *name == "content-length") {
        head += &format!("content-length: {}\r\n", reply.body.len());
    }
    let body = if request.method == "HEAD" { &[] } else { reply.body.as_slice() };
    let body = &body[..reply.cut.unwrap_or(body.len()).min(body.len())];
    let _ =
        (&stream).write_all((head + "\r\n").as_bytes()).and_then(|()| (&stream).write_all(body));
}

/// The model `org/name`.
#[derive(Clone, Default)]
pub(crate) struct Repo {
    files: Vec<(String, Vec<u8>, bool)>,
    /// Where large files are; empty for the hub itself.
    cdn: String,
}

impl Repo {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a small file, which git holds.
    pub(crate) fn small(mut self, name: &str, bytes: &[u8]) -> Self {
        self.files.push((name.to_owned(), bytes.to_vec(), false));
        self
    }

    /// Adds a large file.
    pub(crate) fn large(mut self, name: &str, bytes: &[u8]) -> Self {
        self.files.push((name.to_owned(), bytes.to_vec(), true));
        self
    }

    /// Moves the large files to another host.
    pub(crate) fn with_cdn(mut self, url: &str) -> Self {
        self.cdn = url.to_owned();
        self
    }

    pub(crate) fn serve(self) -> Server {
        Server::start(move |request| self.answer(request))
    }

    /// As the hub answers: large files are elsewhere, small ones at another path.
    pub(crate) fn answer(&self, request: &Request) -> Reply {
        let path = request.path.as_str();
        if let Some(rest) = path.strip_prefix("/api/models/org/name/revision/") {
            let known = ["main?blobs=true".to_owned(), format!("{COMMIT}?blobs=true")];
            let known = known.contains(&rest.to_owned()) || rest == "dev%2Fnew?blobs=true";
            return if known { self.info() } else { Reply::new(404, &[], b"") };
        }
        if let Some(name) = path.strip_prefix(&format!("/{REPO}/resolve/{COMMIT}/")) {
            let Some((_, bytes, is_large)) = self.file(name) else {
                return Reply::new(404, &[], b"");
            };
            let reply = Reply::new(302, &[("x-repo-commit", COMMIT)], b"Found");
            if !is_large {
                let location = format!("/api/resolve-cache/models/{REPO}/{COMMIT}/{name}");
                return Reply { status: 307, ..reply.set("location", &location) };
            }
            let (etag, size) = (sha256(bytes), bytes.len().to_string());
            let location = format!("{}/lfs/{etag}?signature=1", self.cdn);
            return reply
                .set("location", &location)
                .set("x-linked-etag", &format!("\"{etag}\""))
                .set("x-linked-size", &size);
        }
        let cached = format!("/api/resolve-cache/models/{REPO}/{COMMIT}/");
        if let Some((_, bytes, _)) = path.strip_prefix(&cached).and_then(|name| self.file(name)) {
            let reply = ranged(request, bytes).set("x-repo-commit", COMMIT);
            return reply.set("etag", &format!("\"{}\"", git_sha1(bytes)));
        }
        self.lfs(request)
    }

    /// As the host of large files answers.
    pub(crate) fn lfs(&self, request: &Request) -> Reply {
        let etag = request.path.strip_prefix("/lfs/").and_then(|rest| rest.split_once('?'));
        let file = self.files.iter().find(|(_, bytes, _)| {
            etag.is_some_and(|(etag, signature)| {
                etag == sha256(bytes) && signature == "signature=1"
            })
        });
        file.map_or(Reply::new(404, &[], b""), |(_, bytes, _)| ranged(request, bytes))
    }

    fn file(&self, name: &str) -> Option<&(String, Vec<u8>, bool)> {
        self.files.iter().find(|(file, ..)| file == name)
    }

    fn info(&self) -> Reply {
        let sibling = |(name, bytes, is_large): &(String, Vec<u8>, bool)| {
            let mut sibling = json!({
                "rfilename": name, "size": bytes.len(), "blobId": git_sha1(bytes)
            });
            if *is_large {
                sibling["lfs"] = json!({
                    "sha256": sha256(bytes), "size": bytes.len(), "pointerSize": 135
                });
            }
            sibling
        };
        let siblings: Vec<Value> = self.files.iter().map(sibling).collect();
        let info = json!({ "id": REPO, "sha": COMMIT, "private": false, "siblings": siblings });
        Reply::new(200, &[("content-type", "application/json")], info.to_string().as_bytes())
    }
}

/// All bytes, or those from `Range: bytes=START-` on.
fn ranged(request: &Request, bytes: &[u8]) -> Reply {
    let Some(range) = request.header("range") else {
        return Reply::new(200, &[], bytes);
    };
    let start = range.strip_prefix("bytes=").and_then(|range| range.strip_suffix('-'));
    let start: usize = start.unwrap().parse().unwrap();
    let range = format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len());
    Reply::new(206, &[("content-range", &range)], &bytes[start..])
}

fn hex(algorithm: &'static digest::Algorithm, bytes: &[u8]) -> String {
    let digest = digest::digest(algorithm, bytes);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex(&digest::SHA256, bytes)
}

pub(crate) fn git_sha1(bytes: &[u8]) -> String {
    let mut object = format!("blob {}\0", bytes.len()).into_bytes();
    object.extend_from_slice(bytes);
    hex(&digest::SHA1_FOR_LEGACY_USE_ONLY, &object)
}
