//! `sterna logits`: token ids in, logits out, for comparing with other implementations.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use sterna::Transformer;
use sterna::backend::{Output, Want};
use tempfile::NamedTempFile;

use super::progress::Bar;
use super::{ModelArguments, interrupt_flag, say_notes};

/// Write the logits of a sequence of tokens to a file
///
/// Runs the tokens from position 0 and writes the f32 tensor "logits" [tokens, vocabulary] to a
/// safetensors file. Row i holds the logits of the token after token i. The file appears whole or
/// not at all.
#[derive(clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub(super) struct Arguments {
    #[command(flatten)]
    model: ModelArguments,

    /// Token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    tokens: Vec<u32>,

    /// The safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

const EXAMPLES: &str = "\
Example:
  sterna logits -m DIR --tokens 1,2,3 --device ref --out logits.safetensors";

pub(super) fn run(arguments: &Arguments) -> Result<()> {
    let checkpoint = arguments.model.checkpoint()?;
    let file = OutputFile::create(&arguments.out)?;
    let options = arguments.model.load_options(Some(arguments.tokens.len()));
    let mut bar = Bar::load();
    let device = arguments.model.device;
    let mut transformer =
        Transformer::load(&checkpoint, device, &options, &mut |at| bar.layers(at))?;
    drop(bar);
    say_notes(transformer.device());
    write_logits(&mut transformer, &arguments.tokens, file)
}

/// Rows of logits that are held at once.
const BATCH_ROWS: usize = 64;

/// Runs the tokens in batches and writes each batch's rows, so that memory holds one batch.
fn write_logits(transformer: &mut Transformer, tokens: &[u32], mut file: OutputFile) -> Result<()> {
    let interrupted = interrupt_flag()?;
    file.write(&header(tokens.len(), transformer.config().vocab_size))?;
    for batch in tokens.chunks(BATCH_ROWS) {
        if interrupted.load(Ordering::Relaxed) {
            bail!("interrupted; nothing was written");
        }
        let Output::Logits(logits) = transformer.feed(batch, Want::AllLogits)? else {
            bail!("the backend returned no logits");
        };
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        file.write(&bytes)?;
    }
    file.publish()
}

/// Everything before the elements: length and JSON header, padded to a multiple of 8
/// (<https://github.com/huggingface/safetensors>).
fn header(rows: usize, vocab_size: usize) -> Vec<u8> {
    let len_bytes = rows as u64 * vocab_size as u64 * 4;
    let tensor = serde_json::json!({
        "logits": { "dtype": "F32", "shape": [rows, vocab_size], "data_offsets": [0, len_bytes] }
    });
    let mut json = tensor.to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
}

/// A file that gets its name only when it is complete; until then, and after a failure, there is
/// at most a nameless one beside it, which is removed.
struct OutputFile<'a> {
    path: &'a Path,
    file: NamedTempFile,
}

impl<'a> OutputFile<'a> {
    fn create(path: &'a Path) -> Result<Self> {
        // A rename would replace a device such as /dev/null.
        if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
            bail!("{}: not a regular file", path.display());
        }
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As for any new file; the umask takes its share.
            builder.permissions(fs::Permissions::from_mode(0o666));
        }
        let file = builder.prefix(".sterna-").tempfile_in(directory);
        Ok(Self { path, file: file.with_context(|| path.display().to_string())? })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| self.path.display().to_string())
    }

    fn publish(self) -> Result<()> {
        let file = self.file.persist(self.path).map_err(|error| error.error);
        file.map(|_| ()).with_context(|| self.path.display().to_string())
    }
}
