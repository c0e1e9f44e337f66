//! How much work goes into a submit: enough that the device never waits for the host, little enough
//! that text streams smoothly and no operating system takes the device for hung.

use std::time::Duration;

/// Most time of one submit, with a margin to the 250 ms that browsers and drivers always grant.
const LONGEST_SUBMIT: Duration = Duration::from_millis(150);
/// Tokens of one submit reach the reader together: so often that it looks smooth.
const SMOOTH: Duration = Duration::from_millis(40);
/// Most tokens of one submit.
pub(super) const MAX_STEPS: usize = 16;
/// What a pass of many tokens costs, in passes of one, per token: before the first is measured.
const TOKENS_PER_PASS: f64 = 4.0;

/// Tokens of the widest tile of a GEMM.
const TILE: usize = 64;
/// Fewest tokens of a pass, if the prompt has as many: where they take too long, so does a token.
const LEAST_CHUNK: usize = 8;

/// The speed of a device with a model, first guessed low, then measured.
pub(super) struct Pace {
    layers: usize,
    /// A pass of one token.
    step: Duration,
    /// A pass of many tokens, per token.
    prompt_token: Duration,
}

impl Pace {
    /// Of a model that reads `weight_bytes` a token, before anything is known of the device.
    pub(super) fn new(layers: usize, weight_bytes: u64, is_software: bool) -> Self {
        // The slowest hardware reads 10 GB/s; software rasterisers decode a tenth of that.
        let bytes_per_second = if is_software { 0.2e9 } else { 10e9 };
        let step = Duration::from_secs_f64(weight_bytes as f64 / bytes_per_second);
        Self { layers, step, prompt_token: step.div_f64(TOKENS_PER_PASS) }
    }

    /// Tokens to be chosen in one submit.
    pub(super) fn steps(&self) -> usize {
        let fit = SMOOTH.as_secs_f64() / self.step.as_secs_f64().max(1e-9);
        (fit as usize).clamp(1, MAX_STEPS)
    }

    /// Layers of one submit, in a pass of so many tokens.
    pub(super) fn layers(&self, n_tokens: usize) -> usize {
        let pass = match n_tokens {
            1 => self.step,
            // A few tokens read the weights as one does.
            _ => (self.prompt_token * u32::try_from(n_tokens).unwrap_or(u32::MAX)).max(self.step),
        };
        let parts = (pass.as_secs_f64() / LONGEST_SUBMIT.as_secs_f64()).ceil().max(1.0);
        ((self.layers as f64 / parts) as usize).clamp(1, self.layers.max(1))
    }

    /// Tokens of a prompt for one pass, at most `max`: as many as one layer is done with in time, in
    /// whole tiles.
    pub(super) fn chunk(&self, max: usize) -> usize {
        let layer = self.prompt_token.as_secs_f64() / self.layers.max(1) as f64;
        let fit = (LONGEST_SUBMIT.as_secs_f64() / layer.max(1e-12)) as usize;
        let whole = if fit >= TILE { fit - fit % TILE } else { fit };
        whole.clamp(LEAST_CHUNK, LEAST_CHUNK.max(max)).min(max)
    }

    /// A submit of `steps` tokens was complete after `time`.
    pub(super) fn measured_steps(&mut self, steps: usize, time: Duration) {
        let step = time / u32::try_from(steps.max(1)).unwrap_or(u32::MAX);
        self.step = follow(self.step, step);
    }

    /// A pass of `n_tokens` was complete after `time`.
    pub(super) fn measured_prompt(&mut self, n_tokens: usize, time: Duration) {
        let token = time / u32::try_from(n_tokens.max(1)).unwrap_or(u32::MAX);
        self.prompt_token = follow(self.prompt_token, token);
    }
}

/// The shorter of two times, but nearer to a longer one with each: what else the machine does makes
/// single submits long.
fn follow(known: Duration, measured: Duration) -> Duration {
    measured.min((3 * known + measured) / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_devices_get_little_and_fast_ones_much() {
        let mut pace = Pace::new(30, 850_000_000, true);
        // 4.25 s a token: 29 parts.
        assert_eq!((pace.steps(), pace.layers(1)), (1, 1));
        pace.measured_steps(1, Duration::from_millis(450));
        assert_eq!((pace.steps(), pace.layers(1)), (1, 10));
        // One long step among short ones changes little.
        pace.measured_steps(1, Duration::from_millis(50));
        pace.measured_steps(1, Duration::from_millis(400));
        assert_eq!((pace.steps(), pace.layers(1)), (1, 30));
        for _ in 0..20 {
            pace.measured_steps(1, Duration::from_millis(450));
        }
        assert_eq!((pace.steps(), pace.layers(1)), (1, 10));
        pace.measured_steps(1, Duration::from_millis(100));
        assert_eq!((pace.steps(), pace.layers(1)), (1, 30));
        pace.measured_steps(4, Duration::from_millis(40));
        assert_eq!((pace.steps(), pace.layers(1)), (4, 30));
        pace.measured_steps(16, Duration::from_micros(1));
        assert_eq!((pace.steps(), pace.layers(1)), (MAX_STEPS, 30));
        for _ in 0..20 {
            pace.measured_prompt(64, Duration::from_secs(9));
        }
        assert_eq!(pace.layers(64), 1);
        pace.measured_prompt(64, Duration::from_millis(10));
        assert_eq!((pace.layers(64), pace.layers(6400)), (30, 4));
    }

    #[test]
    fn a_chunk_of_a_prompt_is_no_longer_than_the_watchdog_lets_a_layer_be() {
        for token_us in [1u64, 100, 5000, 40_000, 200_000, 600_000] {
            let mut pace = Pace::new(30, 850_000_000, false);
            for _ in 0..40 {
                pace.measured_prompt(64, Duration::from_micros(64 * token_us));
            }
            let chunk = pace.chunk(512);
            let longest = token_us * chunk as u64 * pace.layers(chunk) as u64 / 30;
            assert!(longest <= 150_000 || chunk == LEAST_CHUNK, "{token_us} µs: {longest}");
            assert!(chunk < TILE || chunk.is_multiple_of(TILE), "{token_us} µs: {chunk}");
            assert_eq!((pace.chunk(5), pace.chunk(1)), (5, 1));
        }
        // Before anything is measured, 21 ms a token.
        assert_eq!(Pace::new(30, 850_000_000, false).chunk(512), 192);
        let mut pace = Pace::new(30, 850_000_000, false);
        pace.measured_prompt(192, Duration::from_millis(192));
        assert_eq!(pace.chunk(512), 512);
    }

    #[test]
    fn a_submit_is_shorter_than_the_watchdog() {
        for step_us in [1u64, 100, 10_000, 100_000, 1_000_000, 4_000_000] {
            let mut pace = Pace::new(30, 1, false);
            for _ in 0..40 {
                pace.measured_steps(1, Duration::from_micros(step_us));
            }
            let layers = pace.layers(1);
            let steps = if layers == 30 { pace.steps() } else { 1 };
            let longest = step_us * steps as u64 * layers as u64 / 30;
            assert!(longest <= 150_000, "{step_us} µs: {longest}");
        }
    }
}
