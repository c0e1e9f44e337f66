//! Bars for what takes longer than a second.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use sterna::backend::Progress;

const QUIET: Duration = Duration::from_secs(1);

/// Shows how far a load is, on standard error if that is a terminal; disappears when dropped.
pub(super) struct LoadBar {
    start: Instant,
    bar: Option<ProgressBar>,
}

impl LoadBar {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), bar: None }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    pub(super) fn update(&mut self, progress: Progress) {
        if self.elapsed() < QUIET {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("loading {bar:32} {pos}/{len} layers");
            let bar = ProgressBar::new(progress.total as u64);
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        bar.set_position(progress.done as u64);
    }
}

impl Drop for LoadBar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Shows how far a download is, in the same way.
pub(super) struct PullBar {
    start: Instant,
    bar: Option<ProgressBar>,
}

impl PullBar {
    pub(super) fn new() -> Self {
        Self { start: Instant::now(), bar: None }
    }

    pub(super) fn update(&mut self, progress: sterna::hub::Progress<'_>) {
        if self.start.elapsed() < QUIET {
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(
                "{bar:32} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {msg}",
            );
            // What is there already was not this fast.
            let bar = ProgressBar::new(progress.total_bytes).with_position(progress.done_bytes);
            bar.reset_eta();
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        if bar.message() != progress.file {
            bar.set_message(progress.file.to_owned());
        }
        bar.set_position(progress.done_bytes);
    }
}

impl Drop for PullBar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
