//! Bars for what takes longer than a second.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use sterna::backend::Progress;

const QUIET: Duration = Duration::from_secs(1);

/// Shows how far something is, on standard error if that is a terminal; disappears when dropped.
pub(super) struct Bar {
    template: &'static str,
    start: Instant,
    bar: Option<ProgressBar>,
}

impl Bar {
    fn new(template: &'static str) -> Self {
        Self { template, start: Instant::now(), bar: None }
    }

    /// Of a load, in layers.
    pub(super) fn load() -> Self {
        Self::new("loading {bar:32} {pos}/{len} layers")
    }

    /// Of a prompt, in tokens.
    pub(super) fn prompt() -> Self {
        Self::new("reading the prompt {bar:32} {pos}/{len} tokens {eta}")
    }

    /// Of a comparison, in layers.
    pub(super) fn compare() -> Self {
        Self::new("comparing {bar:32} {pos}/{len} layers")
    }

    /// Of a file that is written, in bytes.
    pub(super) fn write() -> Self {
        Self::new(
            "writing {bar:32} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
        )
    }

    /// Of files that are downloaded, in bytes; the message is the file.
    pub(super) fn pull() -> Self {
        Self::new("{bar:32} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}")
    }

    /// Since it was made.
    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn update(&mut self, done: u64, total: u64) {
        if self.elapsed() < QUIET {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(self.template);
            // What is there already was not this fast.
            let bar = ProgressBar::new(total).with_position(done);
            bar.reset_eta();
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_position(done);
    }

    pub(super) fn layers(&mut self, progress: Progress) {
        self.update(progress.done as u64, progress.total as u64);
    }

    pub(super) fn set_message(&mut self, message: &str) {
        if let Some(bar) = self.bar.as_ref().filter(|bar| bar.message() != message) {
            bar.set_message(message.to_owned());
        }
    }
}

/// Says what is going on, on standard error if that is a terminal; disappears when dropped.
pub(super) struct Stage(ProgressBar);

impl Stage {
    pub(super) fn new() -> Self {
        Self(ProgressBar::new_spinner())
    }

    pub(super) fn show(&self, what: &str) {
        self.0.set_message(what.to_owned());
        self.0.tick();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
