//! A bar for loads that take longer than a second.

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
