//! Pulls from a hub on this machine, through the program: what is asked, what is on the disk after.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;
use sterna::hub::{Hub, Token};
use tempfile::TempDir;

use super::hub_server::{COMMIT, REPO, Reply, Repo, Request, Server, git_sha1, sha256};

const CONFIG: &[u8] = b"{}";

/// A directory with a Hugging Face home of its own.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("hf")
    }

    fn repo(&self) -> PathBuf {
        self.path().join("hub/models--org--name")
    }

    fn snapshot(&self) -> PathBuf {
        self.repo().join("snapshots").join(COMMIT)
    }

    fn blob(&self, etag: &str) -> PathBuf {
        self.repo().join("blobs").join(etag)
    }

    /// `sterna` with arguments separated by spaces, and this home and server.
    fn sterna(&self, server: &Server, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sterna"));
        command.args(arguments.split_whitespace()).stdin(Stdio::null());
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            let is_proxy = name.to_ascii_lowercase().ends_with("_proxy");
            if name.starts_with("HF_") || name == "RUST_BACKTRACE" || is_proxy {
                command.env_remove(&*name);
            }
        }
        command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
        command.env("HF_HOME", self.path()).env("HF_ENDPOINT", &server.url);
        command
    }

    fn pull(&self, server: &Server, arguments: &str) -> Command {
        self.sterna(server, &format!("pull {arguments}"))
    }

    /// Every file and link below this directory, with paths from it.
    fn files(&self) -> Vec<String> {
        fn walk(directory: &Path, root: &Path, files: &mut Vec<String>) {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.symlink_metadata().unwrap().is_dir() {
                    walk(&path, root, files);
                } else {
                    files.push(path.strip_prefix(root).unwrap().display().to_string());
                }
            }
        }
        let mut files = Vec::new();
        walk(self.0.path(), self.0.path(), &mut files);
        files.sort();
        files
    }

    /// Fails if anything looks like a model that is all there.
    #[track_caller]
    fn holds_no(&self, file: &str) {
        for path in self.files() {
            let is_model = path.ends_with(file) || path.contains("/refs/");
            assert!(!is_model && !path.ends_with(".incomplete"), "{path}");
        }
    }
}

fn utf8(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).expect("UTF-8")
}

/// The standard output of a success, without the newline.
#[track_caller]
fn success(mut command: Command) -> String {
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", utf8(&output.stderr));
    utf8(&output.stdout).trim_end().to_owned()
}

/// The one line of a failure with this exit code; before it, only what says that a pull begins.
#[track_caller]
fn failure(mut command: Command, code: i32) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let stderr = utf8(&stderr);
    assert_eq!((status.code(), utf8(&stdout)), (Some(code), ""), "{stderr}");
    let mut lines = stderr.lines().filter(|line| !line.starts_with("pulling "));
    let message = lines.next().unwrap_or_default();
    assert!(message.starts_with("error: ") && lines.next().is_none(), "{stderr}");
    assert!(!message.contains("bug"), "{message}");
    message.to_owned()
}

/// Bytes that no compression or repetition makes equal.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let step = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    std::iter::repeat_with(step).take(len).collect()
}

fn checkpoint(weights: &[u8]) -> Repo {
    let repo = Repo::new().small("README.md", b"# Read me").small("config.json", CONFIG);
    repo.small("tokenizer.json", b"[]").large("model.safetensors", weights)
}

fn is_file(request: &Request, part: &str) -> bool {
    request.is_download() && request.path.contains(part)
}

#[test]
fn a_pull_makes_the_layout_of_the_shared_cache() {
    let (home, weights) = (Home::new(), noise(3 << 20));
    let server = checkpoint(&weights).serve();
    assert_eq!(success(home.pull(&server, REPO)), home.snapshot().display().to_string());
    let blobs = [
        ("config.json", git_sha1(CONFIG)),
        ("model.safetensors", sha256(&weights)),
        ("tokenizer.json", git_sha1(b"[]")),
    ];
    let mut expected = vec!["hf/hub/models--org--name/refs/main".to_owned()];
    for (name, etag) in &blobs {
        let link = home.snapshot().join(name);
        #[cfg(unix)]
        assert_eq!(fs::read_link(&link).unwrap(), Path::new("../../blobs").join(etag));
        assert_eq!(fs::read(&link).unwrap(), fs::read(home.blob(etag)).unwrap());
        expected.push(format!("hf/hub/.locks/models--org--name/{etag}.lock"));
        expected.push(format!("hf/hub/models--org--name/blobs/{etag}"));
        expected.push(format!("hf/hub/models--org--name/snapshots/{COMMIT}/{name}"));
    }
    expected.sort();
    assert_eq!(home.files(), expected);
    assert_eq!(fs::read(home.snapshot().join("model.safetensors")).unwrap(), weights);
    assert_eq!(fs::read_to_string(home.repo().join("refs/main")).unwrap(), COMMIT);

    server.requests();
    let json: Value =
        serde_json::from_str(&success(home.pull(&server, "org/name --json"))).unwrap();
    assert_eq!(server.downloads(), [], "a second pull downloads nothing");
    assert_eq!(json["commit"], COMMIT);
    let checked = |i: usize| (&json["files"][i]["name"], &json["files"][i]["checked"]);
    assert_eq!(checked(0), (&"config.json".into(), &"git-sha1".into()));
    assert_eq!(checked(2), (&"model.safetensors".into(), &"sha256".into()));

    // A blob of another length, as a crash of another program may leave it, is replaced.
    fs::write(home.blob(&sha256(&weights)), b"short").unwrap();
    success(home.pull(&server, REPO));
    assert_eq!(fs::read(home.snapshot().join("model.safetensors")).unwrap(), weights);
    assert_eq!(home.files(), expected);
}

#[test]
fn a_model_runs_by_its_name() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bitnet-a-packed");
    let mut repo = Repo::new();
    for entry in fs::read_dir(golden).unwrap() {
        let entry = entry.unwrap();
        let (name, bytes) = (entry.file_name(), fs::read(entry.path()).unwrap());
        let name = name.to_str().unwrap();
        repo = if name.ends_with(".safetensors") {
            repo.large(name, &bytes)
        } else {
            repo.small(name, &bytes)
        };
    }
    let (home, server) = (Home::new(), repo.serve());
    let run = "run -m org/name --device ref --temp 0 -n 4 --json Hello";
    assert!(failure(home.sterna(&server, &format!("{run} --offline")), 1).contains("offline"));
    assert_eq!((server.requests().len(), home.files().len()), (0, 0));

    let first = home.sterna(&server, run).output().unwrap();
    let stderr = utf8(&first.stderr);
    assert_eq!(first.status.code(), Some(0), "{stderr}");
    assert!(stderr.starts_with("pulling org/name: ") && stderr.contains("KiB in "), "{stderr}");
    assert!(stderr.contains(home.path().to_str().unwrap()), "{stderr}");
    server.requests();
    for run in
        [run, "inspect org/name", "inspect --offline org/name", "verify -m org/name --device ref"]
    {
        success(home.sterna(&server, run));
    }
    let logits =
        format!("logits -m org/name --device ref --tokens 1 --out {}/l", home.0.path().display());
    success(home.sterna(&server, &logits));
    assert!(server.requests().is_empty(), "the cache is enough");

    // A path of that name goes before the hub.
    let mut command = home.sterna(&server, "inspect org/name");
    fs::create_dir_all(home.0.path().join("org/name")).unwrap();
    assert!(failure_in(&mut command, home.0.path()).contains("org/name: no "));
    let message = failure(home.sterna(&server, "run -m org/nam x"), 1);
    assert!(message.contains("org/nam is no file or directory"), "{message}");
    assert!(message.contains("not found on http://127.0.0.1"), "{message}");
}

#[track_caller]
fn failure_in(command: &mut Command, directory: &Path) -> String {
    let output = command.current_dir(directory).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    utf8(&output.stderr).to_owned()
}

#[test]
fn a_cut_connection_is_continued() {
    let (home, weights) = (Home::new(), noise(3 << 20));
    let (repo, cuts) = (checkpoint(&weights), AtomicUsize::new(0));
    let server = Server::start(move |request| {
        let reply = repo.answer(request);
        let is_first = || cuts.fetch_add(1, Ordering::Relaxed) == 0;
        let cut = (is_file(request, "/lfs/") && is_first()).then_some(1_500_000);
        Reply { cut, ..reply }
    });
    success(home.pull(&server, REPO));
    assert_eq!(fs::read(home.snapshot().join("model.safetensors")).unwrap(), weights);
    let lfs: Vec<_> =
        server.downloads().into_iter().filter(|(path, _)| path.starts_with("/lfs/")).collect();
    let ranges: Vec<Option<&str>> = lfs.iter().map(|(_, range)| range.as_deref()).collect();
    assert_eq!(ranges, [None, Some("bytes=1500000-")]);
}

#[test]
fn the_next_pull_goes_on_where_a_connection_was_cut_for_good() {
    let (home, weights) = (Home::new(), noise(3 << 20));
    let repo = checkpoint(&weights);
    let bad = Server::start(move |request| {
        let cut = is_file(request, "/lfs/").then_some(100_000);
        Reply { cut, ..repo.answer(request) }
    });
    let message = failure(home.pull(&bad, REPO), 1);
    assert!(message.contains("org/name: model.safetensors: the connection was cut"), "{message}");
    assert!(message.contains("after 400000 bytes"), "{message}");
    let partial = home.blob(&format!("{}.incomplete", sha256(&weights)));
    assert_eq!(fs::read(&partial).unwrap(), weights[..400_000]);
    assert!(!home.blob(&sha256(&weights)).exists());
    assert!(!home.snapshot().join("model.safetensors").exists());
    assert!(!home.repo().join("refs").exists());

    let good = checkpoint(&weights).serve();
    let message = failure(home.sterna(&good, "run --offline -m org/name x"), 1);
    assert!(message.contains("not in the cache"), "{message}");
    let output = home.pull(&good, REPO).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(utf8(&output.stderr).contains("2.62 MiB of 3.00 MiB"), "{}", utf8(&output.stderr));
    let lfs = good.downloads().into_iter().find(|(path, _)| path.starts_with("/lfs/"));
    assert_eq!(lfs.unwrap().1.as_deref(), Some("bytes=400000-"));
    assert_eq!(fs::read(home.snapshot().join("model.safetensors")).unwrap(), weights);
    assert!(!partial.exists());
}

#[test]
fn a_server_without_ranges_sends_everything_again() {
    let (home, weights) = (Home::new(), noise(100_000));
    let repo = checkpoint(&weights);
    let bytes = weights.clone();
    let server = Server::start(move |request| {
        let is_weights = request.path.starts_with("/lfs/");
        if is_weights { Reply::new(200, &[], &bytes) } else { repo.answer(request) }
    });
    fs::create_dir_all(home.repo().join("blobs")).unwrap();
    let partial = home.blob(&format!("{}.incomplete", sha256(&weights)));
    fs::write(&partial, &weights[..50_000]).unwrap();
    success(home.pull(&server, REPO));
    assert_eq!(fs::read(home.snapshot().join("model.safetensors")).unwrap(), weights);
    // What is longer than the file is no part of it.
    let home = Home::new();
    let partial = home.blob(&format!("{}.incomplete", sha256(&weights)));
    fs::create_dir_all(home.repo().join("blobs")).unwrap();
    fs::write(&partial, noise(200_000)).unwrap();
    success(home.pull(&server, REPO));
    assert_eq!(fs::read(home.snapshot().join("model.safetensors")).unwrap(), weights);
}

#[test]
fn wrong_bytes_are_deleted() {
    let weights = noise(100_000);
    let mut flipped = weights.clone();
    flipped[77_777] ^= 1;
    let longer = noise(100_001);
    for (part, body, expected, found) in [
        ("/lfs/", &flipped, format!("sha256 {}", sha256(&weights)), sha256(&flipped)),
        ("/lfs/", &longer, "100000 bytes".to_owned(), "100001 bytes".to_owned()),
        (
            "/tokenizer.json",
            &b"()".to_vec(),
            format!("git-sha1 {}", git_sha1(b"[]")),
            git_sha1(b"()"),
        ),
    ] {
        let (home, repo, body) = (Home::new(), checkpoint(&weights), body.clone());
        let server = Server::start(move |request| {
            let is_it = is_file(request, part) && !request.path.contains("/resolve/");
            if is_it { Reply::new(200, &[], &body) } else { repo.answer(request) }
        });
        let message = failure(home.pull(&server, REPO), 1);
        let file = if part == "/lfs/" { "model.safetensors" } else { "tokenizer.json" };
        for word in [file, &expected, &found, "deleted"] {
            assert!(message.contains(word), "{word}: {message}");
        }
        home.holds_no(file);
        home.holds_no(&sha256(&weights));
    }

    // An earlier run's part that is broken: found out, deleted, and the next pull is right.
    let (home, server) = (Home::new(), checkpoint(&weights).serve());
    fs::create_dir_all(home.repo().join("blobs")).unwrap();
    let partial = home.blob(&format!("{}.incomplete", sha256(&weights)));
    fs::write(&partial, &flipped[..90_000]).unwrap();
    assert!(failure(home.pull(&server, REPO), 1).contains("sha256"));
    home.holds_no("model.safetensors");
    success(home.pull(&server, REPO));
    assert_eq!(fs::read(home.snapshot().join("model.safetensors")).unwrap(), weights);
}

#[test]
fn refusals_say_what_would_help() {
    let gated = Reply::new(403, &[("x-error-code", "GatedRepo")], b"");
    let cases = [
        (Reply::new(401, &[], b"{}"), "HF_TOKEN", "licence"),
        (Reply::new(403, &[], b""), "not authorised (status 403)", "HF_TOKEN"),
        (gated.clone(), "status 403", "licence"),
        (Reply::new(404, &[], b""), "not found on http://127.0.0.1", "revision main"),
        (Reply::new(429, &[("retry-after", "17")], b""), "limits requests", "in 17 s"),
        (Reply::new(429, &[], b""), "limits requests", "later"),
        (Reply::new(500, &[], b""), "the server failed (status 500)", "org/name"),
        (Reply::new(418, &[], b""), "expected status 200", "418"),
        (Reply::new(302, &[], b""), "a redirect to a URL", "found"),
        (Reply::new(302, &[("location", "/again")], b""), "at most 6 redirects", "more"),
        (Reply::new(200, &[], b"<html>"), "revision/main", "expected value at line 1"),
        (Reply::new(200, &[], b"{\"siblings\": []}"), "revision/main", "sha"),
    ];
    for (reply, first, second) in cases {
        let home = Home::new();
        let is_500 = reply.status == 500;
        let server = Server::start(move |_| reply.clone());
        let message = failure(home.pull(&server, REPO), 1);
        assert!(message.contains(first) && message.contains(second), "{message}");
        assert!(home.files().is_empty());
        assert_eq!(server.requests().len() == 4, is_500, "only a server's failure is tried again");
    }
    // With a token, the advice is another; and a file may be refused where the list is not.
    let (home, repo) = (Home::new(), checkpoint(&noise(10)));
    let server = Server::start(move |request| {
        let is_weights = request.path.ends_with("/model.safetensors");
        if is_weights { gated.clone() } else { repo.answer(request) }
    });
    let mut command = home.pull(&server, REPO);
    command.env("HF_TOKEN", "hf_secret");
    let message = failure(command, 1);
    assert!(message.contains("model.safetensors") && message.contains("accept the"), "{message}");
    assert!(!message.contains("hf_secret"));
    home.holds_no("model.safetensors");
    // Nobody listens there.
    let mut command = home.pull(&server, REPO);
    command.env("HF_ENDPOINT", "http://127.0.0.1:1");
    let message = failure(command, 1);
    assert!(message.contains("127.0.0.1:1: "), "{message}");
    for (variable, value) in [("HF_ENDPOINT", "huggingface"), ("HF_TOKEN", "a b")] {
        let mut command = home.pull(&server, REPO);
        command.env(variable, value);
        assert!(failure(command, 1).contains(variable));
    }
}

#[test]
fn gguf_files_are_chosen() {
    let server = Repo::new().large("a.gguf", &noise(2048)).large("b.gguf", b"bb").serve();
    let home = Home::new();
    let message = failure(home.pull(&server, REPO), 1);
    assert!(
        message.contains("several models") && message.contains(":a.gguf (2.00 KiB)"),
        "{message}"
    );
    assert!(message.contains(":b.gguf (2 bytes)"), "{message}");
    home.holds_no("gguf");
    let path = success(home.pull(&server, "org/name:b.gguf"));
    assert_eq!(path, home.snapshot().join("b.gguf").display().to_string());
    assert_eq!(fs::read(path).unwrap(), b"bb");
    assert!(!home.snapshot().join("a.gguf").exists());
    let message = failure(home.pull(&server, "org/name:c.gguf"), 1);
    assert!(message.contains("org/name:c.gguf") && message.contains(":a.gguf"), "{message}");

    // Parts in a directory, found by any of them.
    let parts = ["q/m-00001-of-00002.gguf", "q/m-00002-of-00002.gguf"];
    let server =
        Repo::new().large(parts[0], b"1").large(parts[1], b"2").small("README.md", b"").serve();
    for name in [REPO, "org/name:q/m-00002-of-00002.gguf"] {
        let home = Home::new();
        let path = success(home.pull(&server, name));
        assert_eq!(path, home.snapshot().join(parts[0]).display().to_string());
        assert_eq!(fs::read(home.snapshot().join(parts[1])).unwrap(), b"2");
        success(home.pull(&server, &format!("{name} --offline")));
    }

    let server = Repo::new().small("weights.bin", b"").small("README.md", b"").serve();
    let message = failure(Home::new().pull(&server, REPO), 1);
    assert!(message.contains("it holds README.md, weights.bin"), "{message}");
}

#[test]
fn shards_come_with_their_index() {
    let index = br#"{"weight_map": {"x": "s-1.safetensors", "y": "s-2.safetensors"}}"#;
    let repo =
        Repo::new().small("config.json", CONFIG).small("model.safetensors.index.json", index);
    let whole = repo.clone().large("s-1.safetensors", b"1").large("s-2.safetensors", b"2");
    let (home, server) = (Home::new(), whole.large("s-3.safetensors", b"3").serve());
    success(home.pull(&server, REPO));
    assert_eq!(fs::read(home.snapshot().join("s-2.safetensors")).unwrap(), b"2");
    assert!(!home.snapshot().join("s-3.safetensors").exists());
    success(home.pull(&server, "org/name --offline"));
    fs::remove_file(home.blob(&sha256(b"2"))).unwrap();
    let message = failure(home.pull(&server, "org/name --offline"), 1);
    assert!(message.contains("\"s-2.safetensors\" is missing"), "{message}");

    let (home, server) = (Home::new(), repo.large("s-1.safetensors", b"1").serve());
    let message = failure(home.pull(&server, REPO), 1);
    assert!(message.contains("\"s-2.safetensors\" is missing"), "{message}");
    home.holds_no(".safetensors");
}

#[test]
fn nothing_leaves_the_cache() {
    let home = Home::new();
    for name in [
        "../../../../evil.gguf",
        "/evil.gguf",
        "..\\\\evil.gguf",
        "C:\\\\evil.gguf",
        "a/../../evil.gguf",
    ] {
        let info =
            format!(r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "{name}", "size": 1}}]}}"#);
        let server =
            Server::start(move |_| Reply::new(200, &[("etag", "\"abc\"")], info.as_bytes()));
        let message = failure(home.pull(&server, REPO), 1);
        assert!(message.contains("evil.gguf") && message.contains("a file inside"), "{message}");
        assert_eq!(server.requests().len(), 1);
    }
    let index = br#"{"weight_map": {"x": "../evil.safetensors"}}"#;
    let repo =
        Repo::new().small("config.json", CONFIG).small("model.safetensors.index.json", index);
    let server = repo.large("../evil.safetensors", b"1").serve();
    let message = failure(home.pull(&server, REPO), 1);
    assert!(message.contains("../evil.safetensors"), "{message}");
    // A commit and an entity tag become names, too.
    let info = br#"{"sha": "../../../evil", "siblings": [{"rfilename": "a.gguf"}]}"#;
    let server = Server::start(|_| Reply::new(200, &[], info));
    assert!(failure(home.pull(&server, REPO), 1).contains("40 hexadecimal digits"));
    for etag in ["../../evil", "\"..\"", "", "\"a/b\"", "a.incomplete"] {
        let repo = Repo::new().small("a.gguf", b"1");
        let server = Server::start(move |request| {
            let reply = repo.answer(request);
            if reply.status == 200 { reply.set("etag", etag) } else { reply }
        });
        let message = failure(home.pull(&server, REPO), 1);
        assert!(message.contains("expected an ETag"), "{message}");
    }
    // So does what the cache itself says.
    fs::create_dir_all(home.repo().join("refs")).unwrap();
    fs::write(home.repo().join("refs/main"), "../../../../").unwrap();
    assert!(failure(home.pull(&server, "org/name --offline"), 1).contains("never pulled"));
    let evil = home.files().into_iter().find(|file| file.contains("evil"));
    assert_eq!(evil, None);
    for (arguments, part) in [
        ("evil", "ORG/NAME"),
        ("../evil", "ORG/NAME"),
        ("org/name:../evil.gguf", "ORG/NAME"),
        ("org/name:README.md", "ORG/NAME"),
        ("org/name --revision ../evil", "branch, tag or commit"),
        ("org/name --revision /evil", "branch, tag or commit"),
    ] {
        let message = failure(home.pull(&server, arguments), 2);
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn lengths_are_checked_before_a_byte_is_written() {
    let (home, repo) = (Home::new(), Repo::new().large("a.gguf", b"1"));
    let huge = 1_u64 << 60;
    let info = format!(r#"{{"sha": "{COMMIT}", "siblings": [{{"rfilename": "a.gguf"}}]}}"#);
    let server = Server::start(move |request| match repo.answer(request) {
        reply if reply.status == 302 => reply.set("x-linked-size", &huge.to_string()),
        _ => Reply::new(200, &[], info.as_bytes()),
    });
    let message = failure(home.pull(&server, REPO), 1);
    assert!(message.contains("1073741824.00 GiB are needed"), "{message}");
    assert_eq!(server.downloads(), []);
    home.holds_no("gguf");
    let repo = Repo::new().large("a.gguf", b"1");
    let server = Server::start(move |request| match repo.answer(request) {
        reply if reply.status == 302 => reply.set("x-linked-size", "2"),
        reply => reply,
    });
    assert!(failure(home.pull(&server, REPO), 1).contains("one length"));
}

#[test]
fn what_has_no_checksum_is_reported() {
    let answer = |body: &'static [u8]| {
        let repo = Repo::new().small("a.gguf", b"12345");
        Server::start(move |request| match repo.answer(request) {
            reply if reply.status == 200 && request.path.contains("resolve-cache") => {
                let reply = Reply { body: body.to_vec(), ..reply.set("etag", "W/\"5-abc\"") };
                if request.method == "HEAD" { reply.set("content-length", "5") } else { reply }
            }
            reply => reply,
        })
    };
    let (home, server) = (Home::new(), answer(b"12345"));
    let output = home.pull(&server, REPO).output().unwrap();
    let stderr = utf8(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(stderr.contains("a.gguf: the server has no checksum"), "{stderr}");
    assert!(home.blob("5-abc").exists());
    // A part of unknown origin is not continued.
    fs::rename(home.blob("5-abc"), home.blob("5-abc.incomplete")).unwrap();
    fs::write(home.blob("5-abc.incomplete"), b"xx").unwrap();
    success(home.pull(&server, REPO));
    assert_eq!(fs::read(home.snapshot().join("a.gguf")).unwrap(), b"12345");
    let (home, server) = (Home::new(), answer(b"123456"));
    let message = failure(home.pull(&server, REPO), 1);
    assert!(message.contains("expected 5 bytes, found 6 bytes"), "{message}");
    home.holds_no("gguf");
}

#[test]
fn offline_means_that_nobody_is_asked() {
    let (home, server) = (Home::new(), checkpoint(b"w").serve());
    let offline = |value: &str| {
        let mut command = home.pull(&server, REPO);
        command.env("HF_HUB_OFFLINE", value);
        command
    };
    let message = failure(home.pull(&server, "org/name --offline"), 1);
    assert!(message.contains("org/name: not in the cache"), "{message}");
    assert!(message.contains(home.path().to_str().unwrap()) && message.contains("offline"));
    for value in ["1", "TRUE", "yes", "ON"] {
        failure(offline(value), 1);
    }
    assert!(server.requests().is_empty() && home.files().is_empty());
    success(offline("0"));
    server.requests();
    assert_eq!(success(offline("1")), home.snapshot().display().to_string());
    failure(home.pull(&server, "org/name --offline --revision other"), 1);
    success(home.pull(&server, &format!("org/name --offline --revision {COMMIT}")));
    fs::remove_file(home.snapshot().join("model.safetensors")).unwrap();
    let message = failure(offline("1"), 1);
    assert!(message.contains("not in the cache") && message.contains("config.json"), "{message}");
    assert!(server.requests().is_empty());
}

#[test]
fn revisions_have_references_of_their_own() {
    let (home, server) = (Home::new(), checkpoint(b"w").serve());
    success(home.pull(&server, "org/name --revision dev/new"));
    assert_eq!(fs::read_to_string(home.repo().join("refs/dev/new")).unwrap(), COMMIT);
    assert!(!home.repo().join("refs/main").exists());
    success(home.pull(&server, &format!("org/name --revision {COMMIT}")));
    assert!(!home.repo().join("refs").join(COMMIT).exists());
    let message = failure(home.pull(&server, "org/name --revision gone"), 1);
    assert!(message.contains("revision gone"), "{message}");
}

#[test]
fn a_cache_of_other_programs_is_found() {
    let (home, server) = (Home::new(), checkpoint(b"w").serve());
    fs::create_dir_all(home.snapshot()).unwrap();
    fs::create_dir_all(home.repo().join("refs")).unwrap();
    fs::write(home.repo().join("refs/main"), COMMIT).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::write(home.snapshot().join(name), b"w").unwrap();
    }
    // In the directory of HF_HUB_CACHE, which goes before HF_HOME.
    let mut command = home.pull(&server, "org/name --offline");
    command.env("HF_HOME", "/nonexistent").env("HF_HUB_CACHE", home.path().join("hub"));
    assert_eq!(success(command), home.snapshot().display().to_string());
    let mut command = home.pull(&server, "org/name --offline");
    command.env_remove("HF_HOME").env("XDG_CACHE_HOME", home.0.path());
    assert!(failure(command, 1).contains("huggingface"));
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let weights = noise(1000);
    let repo = checkpoint(&weights);
    let cdn = Server::start({
        let repo = repo.clone();
        move |request| repo.lfs(request)
    });
    let moved = repo.with_cdn(&cdn.url);
    // The model has a new name: the old one leads to it, within the hub.
    let server = Server::start(move |request| {
        if let Some(rest) = request.path.strip_prefix("/api/models/org/old/") {
            let location = format!("/api/models/{REPO}/{rest}");
            return Reply::new(307, &[("location", &location)], b"");
        }
        let path = request.path.replace("/org/old/", "/org/name/");
        moved.answer(&Request { path, ..request.clone() })
    });
    let check = |token: Option<&str>, arguments: &str, prepare: &dyn Fn(&Home, &mut Command)| {
        let home = Home::new();
        fs::create_dir_all(home.path()).unwrap();
        let mut command = home.pull(&server, arguments);
        prepare(&home, &mut command);
        success(command);
        let expected = token.map(|token| format!("Bearer {token}"));
        let asked = server.requests();
        assert!(asked.len() > 6, "{asked:?}");
        for request in asked {
            assert_eq!(request.header("authorization"), expected.as_deref(), "{request:?}");
        }
        let downloads = cdn.requests();
        assert_eq!(downloads.len(), 1);
        assert_eq!(downloads[0].header("authorization"), None, "{downloads:?}");
    };
    check(None, REPO, &|_, _| {});
    for name in [REPO, "org/old"] {
        check(Some("hf_a"), name, &|home, command| {
            fs::write(home.path().join("token"), "hf_b").unwrap();
            command.env("HF_TOKEN", "hf_a");
        });
    }
    check(Some("hf_b"), REPO, &|home, _| {
        fs::write(home.path().join("token"), "hf_b\n").unwrap();
    });
    check(Some("hf_c"), REPO, &|home, command| {
        fs::write(home.path().join("token"), "hf_b\n").unwrap();
        fs::write(home.path().join("c"), "hf_c").unwrap();
        command.env("HF_TOKEN_PATH", home.path().join("c"));
    });
}

#[test]
fn two_pulls_at_once_share_the_work() {
    let (home, weights) = (Home::new(), noise(1 << 20));
    let repo = checkpoint(&weights);
    let server = Server::start(move |request| {
        if is_file(request, "/lfs/") {
            // Long enough for the others to come this far, too.
            std::thread::sleep(std::time::Duration::from_millis(700));
        }
        repo.answer(request)
    });
    let children: Vec<_> = (0..3)
        .map(|_| {
            home.pull(&server, REPO).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
    assert_eq!(fs::read(home.snapshot().join("model.safetensors")).unwrap(), weights);
    let lfs = server.downloads().into_iter().filter(|(path, _)| path.starts_with("/lfs/"));
    assert_eq!(lfs.count(), 1);
}

#[test]
fn the_library_pulls_and_tells_how_far_it_is() {
    let (home, weights) = (Home::new(), noise(3 << 20));
    let server = checkpoint(&weights).serve();
    let hub = Hub {
        endpoint: server.url.clone(),
        cache: home.path(),
        token: Some(Token::new("the test", "hf_x").unwrap()),
        offline: false,
    };
    let name = REPO.parse().unwrap();
    let plan = hub.plan(&name, "main").unwrap();
    let total = plan.total_bytes();
    assert_eq!((total, plan.missing_bytes().unwrap()), (weights.len() as u64 + 4, total));
    let mut last = 0;
    hub.pull(&plan, &mut |at| {
        assert!(last <= at.done_bytes && at.done_bytes <= at.total_bytes);
        assert!(["config.json", "tokenizer.json", "model.safetensors"].contains(&at.file));
        last = at.done_bytes;
    })
    .unwrap();
    assert_eq!((last, plan.missing_bytes().unwrap()), (total, 0));
    assert_eq!(hub.cached(&name, "main").unwrap(), plan.path());
    let offline = Hub { offline: true, ..hub };
    assert!(matches!(offline.plan(&name, "main"), Err(sterna::Error::HubOffline { .. })));
    assert!(!format!("{offline:?}").contains("hf_x"));
}
