//! `sterna pull`, and the way of every other command from a model's name to its files.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use sterna::hub::{Check, Hub, ModelName, Plan, size_text};

use super::progress::Bar;
use super::{print, print_json};

/// The branch that is meant unless one is named.
const MAIN: &str = "main";

/// Download a model from the Hugging Face hub
///
/// Gets what running a model takes into the cache that other Hugging Face programs use, and prints
/// where it is: a directory, or a GGUF file. Files that are there are not downloaded again, and a
/// download that was cut goes on where it stopped.
///
/// Large files are checked against the hub's SHA-256, small ones against the SHA-1 that git names
/// them by. A server that has neither is reported; then only the length is checked.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    /// ORG/NAME, or ORG/NAME:FILE.gguf for one of several GGUF files
    ///
    /// A repository with model.safetensors (or shards with an index) gives that, with configuration
    /// and tokenizer; else one GGUF file or all of its parts.
    #[arg(value_name = "ORG/NAME[:FILE]")]
    name: ModelName,

    /// Branch, tag or commit
    #[arg(long, value_name = "REVISION", default_value = MAIN)]
    revision: String,

    #[command(flatten)]
    hub: Offline,

    /// Write one JSON object with path, commit and files, and what each is checked against
    ///
    /// Offline, commit is null and files are none: only the hub knows them.
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Environment:
  HF_TOKEN       who asks, for models that need it; else the file HF_TOKEN_PATH or HF_HOME/token
  HF_HOME        where cache and token are [default: ~/.cache/huggingface]
  HF_HUB_CACHE   where the cache is [default: HF_HOME/hub]
  HF_ENDPOINT    the hub [default: https://huggingface.co]
  HF_HUB_OFFLINE 1 is --offline

Examples:
  sterna pull microsoft/bitnet-b1.58-2B-4T
  sterna pull ORG/NAME:FILE.gguf
  sterna run -m \"$(sterna pull ORG/NAME --revision COMMIT)\" \"Once upon a time\"";

/// Whether the hub may be asked.
#[derive(clap::Args, Clone, Copy)]
pub(super) struct Offline {
    /// Download nothing: a model from the hub must be in the cache
    #[arg(long)]
    offline: bool,
}

impl Offline {
    fn hub(self) -> Result<Hub> {
        let mut hub = Hub::from_env()?;
        hub.offline |= self.offline;
        Ok(hub)
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    path: &'a Path,
    commit: Option<&'a str>,
    files: Vec<File<'a>>,
}

#[derive(Serialize)]
struct File<'a> {
    name: &'a str,
    bytes: u64,
    checked: &'a str,
}

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let hub = arguments.hub.hub()?;
    let plan =
        if hub.offline { None } else { Some(pull(&hub, &arguments.name, &arguments.revision)?) };
    let path = match &plan {
        Some(plan) => plan.path().to_owned(),
        None => hub.cached(&arguments.name, &arguments.revision)?,
    };
    if !arguments.json {
        return print(&format!("{}\n", path.display()));
    }
    let files = plan.iter().flat_map(Plan::files).map(|file| File {
        name: file.name(),
        bytes: file.len_bytes(),
        checked: file.check().name(),
    });
    let commit = plan.as_ref().map(Plan::commit);
    print_json(&Report { path: &path, commit, files: files.collect() })
}

/// The path of a model: as it is if there is such a file or directory, else from the cache, else
/// pulled from the hub. What is no name of a model is left to whoever opens it.
pub(super) fn resolve_model(model: &Path, offline: Offline) -> Result<PathBuf> {
    let name: Option<ModelName> = model.to_str().and_then(|name| name.parse().ok());
    let Some(name) = name.filter(|_| model.symlink_metadata().is_err()) else {
        return Ok(model.to_owned());
    };
    let hub = offline.hub()?;
    let path = match hub.cached(&name, MAIN) {
        Err(sterna::Error::HubOffline { .. }) if !hub.offline => {
            pull(&hub, &name, MAIN).map(|plan| plan.path().to_owned())
        }
        cached => cached.map_err(Into::into),
    };
    // The path may have been mistyped.
    path.with_context(|| format!("{name} is no file or directory here, and as a model on the hub"))
}

/// Says what it downloads and where to, downloads it, and says what could not be checked.
fn pull(hub: &Hub, name: &ModelName, revision: &str) -> Result<Plan> {
    let plan = hub.plan(name, revision)?;
    let missing = plan.missing_bytes()?;
    if missing > 0 {
        let (size, total) = (size_text(missing), size_text(plan.total_bytes()));
        let size = if size == total { size } else { format!("{size} of {total}") };
        let cache = hub.cache.display();
        say(&format!("pulling {name}: {size} in {} files, into {cache}", plan.files().len()));
    }
    let mut bar = Bar::pull();
    hub.pull(&plan, &mut |at| {
        bar.update(at.done_bytes, at.total_bytes);
        bar.set_message(at.file);
    })?;
    drop(bar);
    for file in plan.files().iter().filter(|file| file.check() == Check::Length) {
        let name = file.name();
        say(&format!("{name}: the server has no checksum; only the length was checked"));
    }
    Ok(plan)
}

fn say(line: &str) {
    // A closed standard error is no failure.
    let _ = writeln!(io::stderr(), "{line}");
}
