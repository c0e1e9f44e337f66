//! Requests to the hub: redirects, the token's way, retries, and what a status means.

use std::io::ErrorKind;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use ureq::http::{Method, Request, Response, StatusCode, Uri};
use ureq::{Agent, Body};

use super::{Hub, Token};
use crate::error::{Error, Result};
use crate::format::{quoted, shortened};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// A connection on which nothing arrives for so long is dead.
const READ_TIMEOUT: Duration = Duration::from_secs(60);
const MAX_REDIRECTS: usize = 6;
/// Before each further try.
const PAUSES: [Duration; 3] =
    [Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(3)];
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A failed request.
pub(super) enum Failure {
    /// Asking again would not help.
    Final(Error),
    /// It may. After `progress`, the tries are counted anew.
    Transient { error: Error, progress: bool },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Tries until it succeeds or fails for good, with longer and longer pauses.
pub(super) fn retry<T>(mut attempt: impl FnMut() -> std::result::Result<T, Failure>) -> Result<T> {
    let mut pauses = PAUSES.iter();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Transient { error, progress }) => {
                if progress {
                    pauses = PAUSES.iter();
                }
                let Some(pause) = pauses.next() else { return Err(error) };
                std::thread::sleep(*pause);
            }
        }
    }
}

/// How far a request follows redirects.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Follow {
    /// To other hosts, too: where the bytes are.
    Everywhere,
    /// Only within the hub, until an answer describes the file.
    ToDescription,
}

/// The HTTP client.
pub(super) struct Client<'a> {
    agent: Agent,
    endpoint: &'a str,
    token: Option<&'a Token>,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub) -> Self {
        let config = Agent::config_builder()
            .user_agent(concat!("sterna/", env!("CARGO_PKG_VERSION")))
            // Redirects and statuses are handled here.
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_per_read(Some(READ_TIMEOUT))
            .build();
        Self { agent: config.into(), endpoint: &hub.endpoint, token: hub.token.as_ref() }
    }

    /// One request for `path`, below the endpoint and already encoded, from byte `start` on. The
    /// answer is a success, or for [`Follow::ToDescription`] perhaps a redirect.
    pub(super) fn send(
        &self,
        what: &str,
        method: &Method,
        path: &str,
        start: u64,
        follow: Follow,
    ) -> std::result::Result<Response<Body>, Failure> {
        let mut url = format!("{}/{path}", self.endpoint);
        for _ in 0..MAX_REDIRECTS {
            let response = self.send_once(what, method, &url, start)?;
            if !response.status().is_redirection() {
                return self.check_status(what, response);
            }
            let next = redirect(what, &url, &response)?;
            let leaves = !self.is_ours(&next);
            let described = header(&response, "x-linked-etag").is_some();
            if follow == Follow::ToDescription && (leaves || described) {
                return Ok(response);
            }
            url = next;
        }
        Err(answer(what, "at most 6 redirects", "more".to_owned()).into())
    }

    fn send_once(
        &self,
        what: &str,
        method: &Method,
        url: &str,
        start: u64,
    ) -> std::result::Result<Response<Body>, Failure> {
        let mut request = Request::builder().method(method).uri(url);
        // Lengths and ranges count the file's own bytes.
        request = request.header("accept-encoding", "identity");
        if start > 0 {
            request = request.header("range", format!("bytes={start}-"));
        }
        if let Some(token) = self.token.filter(|_| self.is_ours(url)) {
            request = request.header("authorization", format!("Bearer {}", token.secret()));
        }
        let request = request
            .body(())
            .map_err(|error| answer(what, "a URL", format!("{} ({error})", quoted(url))))?;
        self.agent.run(request).map_err(|error| transport(what, url, &error))
    }

    /// Whether a URL is at the hub itself: only there goes the token.
    fn is_ours(&self, url: &str) -> bool {
        let ours = origin(self.endpoint);
        ours.is_some() && origin(url) == ours
    }

    fn check_status(
        &self,
        what: &str,
        response: Response<Body>,
    ) -> std::result::Result<Response<Body>, Failure> {
        let what = what.to_owned();
        let status = response.status().as_u16();
        let error = match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => return Ok(response),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Error::HubNotAuthorised { what, status, hint: self.hint(&response) }
            }
            StatusCode::NOT_FOUND => {
                Error::HubNotFound { what, endpoint: self.endpoint.to_owned() }
            }
            StatusCode::TOO_MANY_REQUESTS => {
                let retry_after = header(&response, "retry-after");
                let retry_after = retry_after.and_then(|seconds| seconds.parse().ok());
                Error::HubRateLimited { what, retry_after }
            }
            status if status.is_server_error() => {
                let error = Error::HubServer { what, status: status.as_u16() };
                return Err(Failure::Transient { error, progress: false });
            }
            _ => answer(&what, "status 200 or 206", status.to_string()),
        };
        Err(error.into())
    }

    /// What may help someone who may not read a model.
    fn hint(&self, response: &Response<Body>) -> String {
        let endpoint = self.endpoint;
        match (header(response, "x-error-code"), self.token) {
            (Some("GatedRepo"), Some(_)) => {
                format!("accept the model's licence on its page at {endpoint}")
            }
            (_, Some(_)) => format!(
                "there is no such model, or the token may not read it; see its page at {endpoint}"
            ),
            (_, None) => format!(
                "there is no such model, or it needs a token in HF_TOKEN, and perhaps its licence \
                 accepted on its page at {endpoint}"
            ),
        }
    }
}

/// The next URL of a redirect; never from https to http.
fn redirect(what: &str, url: &str, response: &Response<Body>) -> Result<String> {
    let location = header(response, "location").unwrap_or_default();
    let scheme_end = url.find("://").unwrap_or(0);
    let host_end = url[scheme_end + 3..].find('/').map_or(url.len(), |at| scheme_end + 3 + at);
    let next = if location.starts_with("//") {
        format!("{}:{location}", &url[..scheme_end])
    } else if location.starts_with('/') {
        format!("{}{location}", &url[..host_end])
    } else {
        location.to_owned()
    };
    let is_safe = next.starts_with("https://")
        || (next.starts_with("http://") && !url.starts_with("https://"));
    if is_safe && origin(&next).is_some() {
        return Ok(next);
    }
    Err(answer(what, "a redirect to a URL, https if it was https", quoted(location)))
}

/// Scheme, host and port.
fn origin(url: &str) -> Option<(String, String, u16)> {
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str()?.to_ascii_lowercase();
    let default_port = if scheme == "https" { 443 } else { 80 };
    let host = uri.host()?.to_ascii_lowercase();
    Some((scheme, host, uri.port_u16().unwrap_or(default_port)))
}

/// A failure below HTTP: worth another try, unless it is a matter of settings.
fn transport(what: &str, url: &str, reason: &ureq::Error) -> Failure {
    use ureq::Error::{ConnectionFailed, HostNotFound, Io, Protocol, Timeout};
    // Without path and query, which may be long and hold a signature.
    let (_, host, port) = origin(url).unwrap_or_default();
    let problem = format!("{host}:{port}: {reason}");
    let error = Error::HubConnection { what: what.to_owned(), problem };
    match reason {
        // A certificate that is not trusted now will not be in a second.
        Io(reason) if reason.kind() == ErrorKind::InvalidData => Failure::Final(error),
        Io(_) | Timeout(_) | HostNotFound | ConnectionFailed | Protocol(_) => {
            Failure::Transient { error, progress: false }
        }
        _ => Failure::Final(error),
    }
}

/// The connection was cut while a body arrived.
pub(super) fn cut(what: &str, problem: &str, progress: bool) -> Failure {
    let error = Error::HubConnection { what: what.to_owned(), problem: problem.to_owned() };
    Failure::Transient { error, progress }
}

/// An answer against the protocol.
pub(super) fn answer(what: &str, expected: &'static str, found: String) -> Error {
    Error::HubAnswer { what: what.to_owned(), expected, found: shortened(&found) }
}

pub(super) fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name)?.to_str().ok()
}

/// One component of a URL's path.
pub(super) fn encoded(component: &str) -> String {
    utf8_percent_encode(component, UNRESERVED).to_string()
}

/// A file's path within a URL: the slashes stay.
pub(super) fn encoded_path(path: &str) -> String {
    path.split('/').map(encoded).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redirected(url: &str, location: &str) -> Result<String> {
        let response = Response::builder().header("location", location);
        redirect("a/b", url, &response.body(Body::builder().data("")).unwrap())
    }

    #[test]
    fn redirects() {
        let url = "https://hub:8/a/b";
        assert_eq!(redirected(url, "/c?d").unwrap(), "https://hub:8/c?d");
        assert_eq!(redirected(url, "//cdn/c").unwrap(), "https://cdn/c");
        assert_eq!(redirected(url, "https://cdn/c").unwrap(), "https://cdn/c");
        assert_eq!(redirected("http://hub", "/c").unwrap(), "http://hub/c");
        for wrong in ["", "c", "http://hub:8/c", "file:///etc/passwd", "https://", "https:///c"] {
            assert!(redirected(url, wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_token_goes_to_the_hub_only() {
        let hub = |endpoint: &str| Hub {
            endpoint: endpoint.to_owned(),
            cache: "cache".into(),
            token: None,
            offline: false,
        };
        let hub = hub("https://hub.co/hf");
        let client = Client::new(&hub);
        for ours in ["https://hub.co/x", "https://HUB.co:443", "https://hub.co"] {
            assert!(client.is_ours(ours), "{ours}");
        }
        for other in [
            "http://hub.co/x",
            "https://hub.co:444/x",
            "https://hub.co.evil/x",
            "https://evil/hub.co",
            "https://hub.co@evil/x",
            "https://hub.co:443@evil/x",
            "hub.co",
            "",
        ] {
            assert!(!client.is_ours(other), "{other}");
        }
    }

    #[test]
    fn paths_are_encoded() {
        assert_eq!(encoded("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(encoded_path("a b/c?#%.gguf"), "a%20b/c%3F%23%25.gguf");
    }
}
