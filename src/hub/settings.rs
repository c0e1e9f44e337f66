//! Where the hub is and who asks, from the environment variables that all its programs share
//! (<https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>).

use std::env;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::Hub;
use crate::error::{Error, Result};
use crate::format::quoted;

const ENDPOINT: &str = "https://huggingface.co";
const MAX_TOKEN_BYTES: u64 = 4096;

/// The secret that names the user; never shown.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// `source` is the variable or file it is from, for the message.
    ///
    /// # Errors
    /// If it holds anything but visible ASCII characters, or is too long.
    pub fn new(source: &str, text: &str) -> Result<Self> {
        if !text.bytes().all(|c| c.is_ascii_graphic()) || text.len() as u64 > MAX_TOKEN_BYTES {
            return Err(Error::HubSetting {
                name: source.to_owned(),
                expected: "a token: visible ASCII characters, at most 4096",
                found: format!("{} bytes that are something else", text.len()),
            });
        }
        Ok(Self(text.to_owned()))
    }

    pub(super) fn secret(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

impl Hub {
    /// As the environment says.
    ///
    /// | what | from, in this order |
    /// | --- | --- |
    /// | endpoint | `HF_ENDPOINT`, `https://huggingface.co` |
    /// | cache | `HF_HUB_CACHE`, `HF_HOME/hub`, `XDG_CACHE_HOME/huggingface/hub`, `~/.cache/huggingface/hub` |
    /// | token | `HF_TOKEN`, the file `HF_TOKEN_PATH`, the file `token` beside the default cache |
    /// | offline | `HF_HUB_OFFLINE` of 1, on, yes or true |
    ///
    /// An empty variable counts as none.
    ///
    /// # Errors
    /// If the endpoint is no URL, the token no token or its file unreadable, or there is no home
    /// directory to hold a cache.
    pub fn from_env() -> Result<Self> {
        let home = hugging_face_home()?;
        let cache = path_variable("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub"));
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        Ok(Self {
            endpoint: check_endpoint(&endpoint)?,
            cache,
            token: token(&home)?,
            offline: variable("HF_HUB_OFFLINE").is_some_and(|value| is_true(&value)),
        })
    }
}

fn variable(name: &str) -> Option<String> {
    let value = env::var_os(name)?.to_string_lossy().trim().to_owned();
    (!value.is_empty()).then_some(value)
}

/// A path; `~` at its start is the home directory, as elsewhere.
fn path_variable(name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env::var_os(name).filter(|value| !value.is_empty())?);
    Some(match (path.strip_prefix("~"), env::home_dir()) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    })
}

fn hugging_face_home() -> Result<PathBuf> {
    if let Some(home) = path_variable("HF_HOME") {
        return Ok(home);
    }
    let cache = path_variable("XDG_CACHE_HOME").or_else(|| {
        Some(env::home_dir().filter(|home| !home.as_os_str().is_empty())?.join(".cache"))
    });
    let cache = cache.ok_or_else(|| Error::HubSetting {
        name: "HF_HOME".to_owned(),
        expected: "a directory for models, as there is no home directory",
        found: "nothing".to_owned(),
    })?;
    Ok(cache.join("huggingface"))
}

fn check_endpoint(endpoint: &str) -> Result<String> {
    let trimmed = endpoint.trim_end_matches('/');
    let uri: Option<ureq::http::Uri> = trimmed.parse().ok();
    let is_url = uri.is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.host().is_some_and(|host| !host.is_empty())
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && uri.query().is_none()
    });
    if is_url {
        return Ok(trimmed.to_owned());
    }
    Err(Error::HubSetting {
        name: "HF_ENDPOINT".to_owned(),
        expected: "a URL such as https://huggingface.co",
        found: quoted(endpoint),
    })
}

fn token(home: &Path) -> Result<Option<Token>> {
    if let Some(text) = variable("HF_TOKEN") {
        return Token::new("HF_TOKEN", &text).map(Some);
    }
    let path = path_variable("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
    let mut text = String::new();
    let read =
        File::open(&path).and_then(|file| file.take(MAX_TOKEN_BYTES + 2).read_to_string(&mut text));
    match read {
        Ok(_) if text.trim().is_empty() => Ok(None),
        Ok(_) => Token::new(&path.display().to_string(), text.trim()).map(Some),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io { path, source }),
    }
}

fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        assert_eq!(check_endpoint("https://huggingface.co/").unwrap(), ENDPOINT);
        assert_eq!(check_endpoint("http://[::1]:80/hf").unwrap(), "http://[::1]:80/hf");
        for wrong in ["huggingface.co", "ftp://a", "https://", "https://a@b", "https://a?b", "a b"]
        {
            assert!(check_endpoint(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_token_stays_secret() {
        let token = Token::new("HF_TOKEN", "hf_secret").unwrap();
        assert!(!format!("{token:?}").contains("secret"));
        let error = Token::new("HF_TOKEN", "hf_secret\r\nHost: b").unwrap_err().to_string();
        assert!(error.contains("HF_TOKEN") && !error.contains("secret"), "{error}");
    }
}
