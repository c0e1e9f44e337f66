//! `sterna web`: serves the page with the headers that it needs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tiny_http::{Header, Method, Request, Response, Server, StatusCode};

use super::{interrupt_flag, print};

/// Serve the page that runs models in a browser
///
/// The page and its engine are files of their own: tools/build-web.sh makes them, and releases have
/// them in the directory "web" beside the program. What is in that directory when the program starts
/// is served, and nothing else. The headers isolate the page from others, so that its threads may share
/// memory; a part of a file can be asked for.
///
/// Ends on Ctrl-C.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    /// The directory [default: "web" beside the program, else target/web]
    directory: Option<PathBuf>,

    /// Address to listen on: with another than this machine's own, everyone on the network can load
    /// the page, and browsers offer it no GPU
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,

    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
}

const EXAMPLES: &str = "\
Examples:
  sterna web                        then open http://127.0.0.1:8080/
  tools/build-web.sh && sterna web target/web";

/// The page itself: without it a directory is another one.
const PAGE: &str = "index.html";
/// Requests that are answered at once.
const THREADS: usize = 8;
/// How often a thread looks whether it is to end.
const PATIENCE: Duration = Duration::from_millis(200);
/// Directories that are looked into, one in another.
const MAX_DEPTH: usize = 4;

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let directory = match &arguments.directory {
        Some(directory) => directory.clone(),
        None => default_directory()?,
    };
    let site = Arc::new(Site::open(&directory)?);
    let interrupted = interrupt_flag()?;
    let server = Server::http((arguments.host, arguments.port))
        .map_err(|error| anyhow::anyhow!("{error}"))
        .with_context(|| format!("cannot listen on {}:{}", arguments.host, arguments.port))?;
    print(&format!("http://{}/\n", server.server_addr()))?;
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while !interrupted.load(Ordering::Relaxed) {
                    if let Ok(Some(request)) = server.recv_timeout(PATIENCE) {
                        // The other end may be gone: that is its affair.
                        let _ = site.answer(request);
                    }
                }
            });
        }
    });
    Ok(())
}

/// `web` beside the program, else what was built here.
fn default_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("where the program is")?;
    let beside = program.parent().unwrap_or(Path::new("")).join("web");
    let places = [beside, PathBuf::from("target/web")];
    if let Some(place) = places.iter().find(|place| place.join(PAGE).is_file()) {
        return Ok(place.clone());
    }
    bail!(
        "no page in {} nor in {}: tools/build-web.sh makes it, or name its directory",
        places[0].display(),
        places[1].display()
    )
}

/// The files there were at the start, by the path of their URL.
struct Site {
    files: BTreeMap<String, PathBuf>,
}

impl Site {
    fn open(directory: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        add(directory, "/", MAX_DEPTH, &mut files)
            .with_context(|| directory.display().to_string())?;
        let Some(page) = files.get(&format!("/{PAGE}")).cloned() else {
            bail!("{}: expected {PAGE} in this directory, found none", directory.display());
        };
        files.insert("/".to_owned(), page);
        Ok(Self { files })
    }

    fn answer(&self, request: Request) -> io::Result<()> {
        if !matches!(request.method(), Method::Get | Method::Head) {
            let allow = header("Allow", "GET, HEAD");
            return request.respond(plain(405, "only GET and HEAD").with_header(allow));
        }
        let path = request.url().split(['?', '#']).next().unwrap_or_default();
        // Our files have plain names: nothing needs decoding.
        let Some(file) = self.files.get(path) else {
            return request.respond(plain(404, "not found"));
        };
        match Answer::new(file, &request) {
            Ok(answer) => request.respond(answer.response),
            Err(_) => request.respond(plain(500, "the file cannot be read")),
        }
    }
}

/// Adds the regular files of a directory and of those in it.
fn add(
    directory: &Path,
    url: &str,
    depth: usize,
    files: &mut BTreeMap<String, PathBuf>,
) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let kind = entry.file_type()?;
        if kind.is_file() {
            files.insert(format!("{url}{name}"), entry.path());
        } else if kind.is_dir() && depth > 0 {
            add(&entry.path(), &format!("{url}{name}/"), depth - 1, files)?;
        }
    }
    Ok(())
}

/// A file, or a part of it, on its way.
struct Answer {
    response: Response<io::Take<File>>,
}

impl Answer {
    fn new(path: &Path, request: &Request) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        let len = metadata.len();
        let changed = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
        let tag = format!("\"{:x}-{:x}\"", len, changed.as_nanos());
        let asked = value(request, "Range").filter(|_| {
            // A part of what the file was before is no part of what it is.
            value(request, "If-Range").is_none_or(|expected| expected == tag)
        });
        let part = asked.map(|range| part(range, len));
        let (status, first, count) = match part {
            None | Some(Part::Whole) => (200, 0, len),
            Some(Part::Of(first, last)) => (206, first, last - first + 1),
            Some(Part::Outside) => (416, 0, 0),
        };
        file.seek(SeekFrom::Start(first))?;
        let mut headers = vec![
            header("Content-Type", mime(path)),
            header("Accept-Ranges", "bytes"),
            header("Cache-Control", "no-cache"),
            header("Cross-Origin-Opener-Policy", "same-origin"),
            header("Cross-Origin-Embedder-Policy", "require-corp"),
            header("Cross-Origin-Resource-Policy", "same-origin"),
            header("X-Content-Type-Options", "nosniff"),
            header("ETag", &tag),
        ];
        match status {
            206 => {
                let range = format!("bytes {first}-{}/{len}", first + count - 1);
                headers.push(header("Content-Range", &range));
            }
            416 => headers.push(header("Content-Range", &format!("bytes */{len}"))),
            _ => {}
        }
        let length = usize::try_from(count).ok();
        let body = file.take(count);
        let response = Response::new(StatusCode(status), headers, body, length, None)
            .with_chunked_threshold(usize::MAX);
        Ok(Self { response })
    }
}

/// What a header of ranges asks for.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    /// Something else than one range: all of the file is a right answer.
    Whole,
    /// Nothing that there is.
    Outside,
    /// From here to here.
    Of(u64, u64),
}

/// One range `bytes=first-last`, `bytes=first-` or `bytes=-count` (RFC 9110, section 14).
fn part(range: &str, len: u64) -> Part {
    let number = |digits: &str| -> Option<u64> {
        let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        // What is too large for a number is past every end.
        is_number.then(|| digits.parse().unwrap_or(u64::MAX))
    };
    let Some((first, last)) = range.strip_prefix("bytes=").and_then(|range| range.split_once('-'))
    else {
        return Part::Whole;
    };
    let (first, last) = match (number(first), number(last), first, last) {
        (Some(first), Some(last), ..) if first <= last => (first, last),
        (Some(first), None, _, "") => (first, u64::MAX),
        (None, Some(0), "", _) => return Part::Outside,
        (None, Some(count), "", _) => (len.saturating_sub(count), u64::MAX),
        _ => return Part::Whole,
    };
    if first >= len { Part::Outside } else { Part::Of(first, last.min(len - 1)) }
}

fn value<'a>(request: &'a Request, name: &'static str) -> Option<&'a str> {
    let found = request.headers().iter().find(|header| header.field.equiv(name));
    found.map(|header| header.value.as_str())
}

fn header(name: &str, value: &str) -> Header {
    Header::from_bytes(name, value).expect("our own headers are ASCII")
}

fn plain(status: u16, text: &str) -> Response<io::Cursor<Vec<u8>>> {
    Response::from_string(text).with_status_code(status)
}

fn mime(path: &Path) -> &'static str {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript",
        Some("css") => "text/css",
        Some("json") => "application/json",
        Some("wasm") => "application/wasm",
        Some("svg") => "image/svg+xml",
        Some("webmanifest") => "application/manifest+json",
        Some("ts") => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (range, expected) in [
            ("bytes=0-0", Part::Of(0, 0)),
            ("bytes=2-5", Part::Of(2, 5)),
            ("bytes=2-500", Part::Of(2, 9)),
            ("bytes=9-", Part::Of(9, 9)),
            ("bytes=-3", Part::Of(7, 9)),
            ("bytes=-30", Part::Of(0, 9)),
            ("bytes=5-99999999999999999999999", Part::Of(5, 9)),
            ("bytes=10-", Part::Outside),
            ("bytes=99999999999999999999999-", Part::Outside),
            ("bytes=-0", Part::Outside),
            ("bytes=5-2", Part::Whole),
            ("bytes=1-2,4-5", Part::Whole),
            ("bytes=+1-2", Part::Whole),
            ("bytes=-", Part::Whole),
            ("lines=1-2", Part::Whole),
            ("", Part::Whole),
        ] {
            assert_eq!(part(range, 10), expected, "{range}");
        }
        assert_eq!(part("bytes=0-", 0), Part::Outside);
        assert_eq!(part("bytes=-5", 0), Part::Outside);
    }
}
