//! A stretch of time, and what each meter counted in it.

use std::time::{Duration, Instant};

use super::{Meter, MeterInfo, Reading};

/// Reading more often costs energy that is then measured.
const MIN_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// A failure at every poll fills no memory.
const MAX_PROBLEMS: usize = 16;

/// The joules of a window.
#[derive(Debug, Clone, PartialEq)]
pub struct Energy {
    /// Joules from the first reading to the last.
    pub joules: f64,
    /// Seconds between them.
    pub seconds: f64,
}

impl Energy {
    /// Mean power; `None` if no time has passed.
    pub fn mean_watts(&self) -> Option<f64> {
        (self.seconds > 0.0).then(|| self.joules / self.seconds)
    }
}

/// A reading within a window, for plots.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// Since the window's start.
    pub seconds: f64,
    /// Since the window's start.
    pub joules: f64,
}

/// What a meter counted in a window.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The meter.
    pub info: MeterInfo,
    /// What it counted; `None` if it failed at the start or at the end.
    pub energy: Option<Energy>,
    /// Every reading, the first (0 J) and the last among them.
    pub samples: Vec<Sample>,
    /// What failed or is less certain.
    pub problems: Vec<String>,
}

/// A measurement that is running.
pub struct Window<'a> {
    lanes: Vec<Lane<'a>>,
    clock: Box<dyn FnMut() -> Instant + 'a>,
    last_poll: Option<Instant>,
}

struct Lane<'a> {
    meter: &'a mut Box<dyn Meter>,
    /// When the meter started; `None` if it did not.
    started: Option<Instant>,
    samples: Vec<Sample>,
    problems: Vec<String>,
}

impl<'a> Window<'a> {
    /// Starts all meters.
    pub fn start(meters: &'a mut [Box<dyn Meter>]) -> Self {
        Self::start_with_clock(meters, Instant::now)
    }

    /// Starts all meters by a given clock.
    pub fn start_with_clock(
        meters: &'a mut [Box<dyn Meter>],
        mut clock: impl FnMut() -> Instant + 'a,
    ) -> Self {
        let lanes = meters.iter_mut().map(|meter| Lane::start(meter, clock())).collect();
        Self { lanes, clock: Box::new(clock), last_poll: None }
    }

    /// Reads all meters, unless that was less than 0.1 s ago; returns whether it did.
    ///
    /// A window needs it where counters wrap or power is integrated; to call it at every token is
    /// fine. Failures are in [`Measured::problems`].
    pub fn poll(&mut self) -> bool {
        let now = (self.clock)();
        let is_due = self
            .last_poll
            .is_none_or(|last| now.saturating_duration_since(last) >= MIN_POLL_INTERVAL);
        if is_due {
            self.last_poll = Some(now);
            for lane in &mut self.lanes {
                lane.read((self.clock)());
            }
        }
        is_due
    }

    /// Reads all meters a last time.
    pub fn end(mut self) -> Vec<Measured> {
        let Self { lanes, clock, .. } = &mut self;
        lanes.drain(..).map(|lane| lane.end(clock())).collect()
    }
}

impl<'a> Lane<'a> {
    fn start(meter: &'a mut Box<dyn Meter>, at: Instant) -> Self {
        let result = meter.start(at);
        let mut lane = Self { meter, started: None, samples: Vec::new(), problems: Vec::new() };
        match result {
            Ok(()) => {
                lane.started = Some(at);
                lane.samples.push(Sample { seconds: 0.0, joules: 0.0 });
            }
            Err(error) => lane.problem(error.to_string()),
        }
        lane
    }

    /// Reads the meter if it has started. A failure is a problem, and the next reading may be whole
    /// again.
    fn read(&mut self, at: Instant) -> Option<Sample> {
        let started = self.started?;
        match self.meter.read(at) {
            Ok(Reading { joules, caution }) => {
                if let Some(caution) = caution {
                    self.problem(caution);
                }
                let seconds = at.saturating_duration_since(started).as_secs_f64();
                let sample = Sample { seconds, joules };
                self.samples.push(sample);
                Some(sample)
            }
            Err(error) => {
                self.problem(error.to_string());
                None
            }
        }
    }

    fn end(mut self, at: Instant) -> Measured {
        let energy = self.read(at).map(|Sample { seconds, joules }| Energy { joules, seconds });
        let info = self.meter.describe().clone();
        let min_seconds = info.min_window.as_secs_f64();
        if let Some(energy) = energy.as_ref().filter(|energy| energy.seconds < min_seconds) {
            let seconds = energy.seconds;
            self.problem(format!("{seconds:.1} s are short: this meter needs {min_seconds} s"));
        }
        let Self { samples, problems, .. } = self;
        Measured { info, energy, samples, problems }
    }

    fn problem(&mut self, problem: String) {
        if self.problems.len() < MAX_PROBLEMS && !self.problems.contains(&problem) {
            self.problems.push(problem);
        }
    }
}
