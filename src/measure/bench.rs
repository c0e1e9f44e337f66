//! The speed of one device.

use serde::Serialize;

use super::runs::{Runner, tell};
use super::{Event, Latencies, OnEvent, Spread};
use crate::backend::{Profiling, Traffic};
use crate::error::{Error, Result};
use crate::model::Transformer;

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BenchOptions {
    /// Lengths of prompts; 0 is none.
    pub prompts: Vec<usize>,
    /// Lengths of replies, after the first token; 0 is none.
    pub replies: Vec<usize>,
    /// Tokens in the KV cache before either.
    pub depths: Vec<usize>,
    /// Timed runs of each.
    pub repetitions: usize,
}

impl BenchOptions {
    /// Every test, prompts first, the shallowest first.
    fn tests(&self) -> Vec<(Kind, usize, usize)> {
        let mut depths = self.depths.clone();
        depths.sort_unstable();
        depths.dedup();
        let kinds = [(Kind::Prompt, &self.prompts), (Kind::Reply, &self.replies)];
        let at = |depth| {
            let lengths = kinds.iter().flat_map(|&(kind, n)| n.iter().map(move |&n| (kind, n)));
            lengths.filter(|&(_, n)| n > 0).map(move |(kind, n)| (kind, n, depth))
        };
        depths.into_iter().flat_map(at).collect()
    }

    /// The positions that the longest test needs.
    pub fn positions(&self) -> usize {
        let need = |&(kind, n, depth): &(Kind, usize, usize)| match kind {
            Kind::Prompt => depth + n,
            Kind::Reply => depth + 1 + n,
        };
        self.tests().iter().map(need).max().unwrap_or_default()
    }

    /// Fails where a context does not hold the tests.
    ///
    /// # Errors
    /// [`Error::ContextOverflow`].
    pub fn check(&self, capacity: usize) -> Result<()> {
        let needed = self.positions();
        if needed > capacity {
            return Err(Error::ContextOverflow { needed, capacity });
        }
        Ok(())
    }
}

/// What a test times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A prompt, up to the first token after it.
    Prompt,
    /// A reply, from its first token to its last.
    Reply,
}

/// A test's result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TestResult {
    /// As `pp512` or `tg128 @ 1000`.
    pub test: String,
    /// Which.
    pub kind: Kind,
    /// Its tokens.
    pub tokens: usize,
    /// Tokens in the KV cache before them.
    pub depth: usize,
    /// Of each run.
    pub seconds: Spread,
    /// Of each run.
    pub tokens_per_second: Spread,
    /// Of prompts: until the first token is there.
    pub first_token_ms: Option<Spread>,
    /// Of replies: from token to token.
    pub token_ms: Option<Latencies>,
    /// Bytes of weights that a token read, by count.
    pub weight_bytes_per_token: Option<f64>,
    /// Bytes of the KV cache that a token read, by count.
    pub cache_bytes_per_token: Option<f64>,
    /// Both, at the median speed, in 10⁹ bytes a second.
    pub read_gb_per_second: Option<f64>,
}

/// A part of a pass.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProfilePart {
    /// The kernel, or the step.
    pub name: &'static str,
    /// How often it ran for a token.
    pub calls_per_token: f64,
    /// Of a token.
    pub us_per_token: f64,
    /// Of all parts.
    pub share: f64,
}

/// Where a token's time goes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Profile {
    /// Whose clock: the device's, or the host's.
    pub clock: &'static str,
    /// The parts, the longest first.
    pub parts: Vec<ProfilePart>,
}

/// Times every test, after one run of it that does not count.
///
/// # Errors
/// If the tests do not fit the context, the device fails, or `observe` ends it.
pub fn bench(
    transformer: &mut Transformer,
    text: &[u32],
    options: &BenchOptions,
    observe: OnEvent<'_>,
) -> Result<Vec<TestResult>> {
    options.check(transformer.capacity())?;
    let mut runner = Runner::new(transformer, text)?;
    let mut results = Vec::new();
    for (kind, tokens, depth) in options.tests() {
        let test = name(kind, tokens, depth);
        tell(observe, Event::Stage(&test))?;
        results.push(match kind {
            Kind::Prompt => prompt(&mut runner, test, (tokens, depth), options, observe)?,
            Kind::Reply => reply(&mut runner, test, (tokens, depth), options, observe)?,
        });
    }
    Ok(results)
}

fn name(kind: Kind, tokens: usize, depth: usize) -> String {
    let name = match kind {
        Kind::Prompt => "pp",
        Kind::Reply => "tg",
    };
    let at = if depth == 0 { String::new() } else { format!(" @ {depth}") };
    format!("{name}{tokens}{at}")
}

fn prompt(
    runner: &mut Runner<'_>,
    test: String,
    (tokens, depth): (usize, usize),
    options: &BenchOptions,
    observe: OnEvent<'_>,
) -> Result<TestResult> {
    let mut traffic = None;
    let mut seconds = Vec::new();
    for run in 0..=options.repetitions {
        let timed = runner.prompt(depth, tokens, observe)?;
        if run > 0 {
            seconds.push(timed.seconds);
        }
        traffic = timed.traffic;
    }
    let first_token_ms = Spread::of(seconds.iter().map(|seconds| 1e3 * seconds).collect());
    let result = result((test, Kind::Prompt), (tokens, depth), seconds, traffic);
    Ok(TestResult { first_token_ms, ..result })
}

fn reply(
    runner: &mut Runner<'_>,
    test: String,
    (tokens, depth): (usize, usize),
    options: &BenchOptions,
    observe: OnEvent<'_>,
) -> Result<TestResult> {
    let mut traffic = None;
    let (mut seconds, mut token_seconds) = (Vec::new(), Vec::new());
    for run in 0..=options.repetitions {
        let timed = runner.reply(depth, tokens, observe)?;
        if run > 0 {
            seconds.push(timed.seconds);
            token_seconds.extend(timed.token_seconds);
        }
        traffic = timed.traffic;
    }
    let token_ms = Latencies::of_seconds(&token_seconds);
    let result = result((test, Kind::Reply), (tokens, depth), seconds, traffic);
    Ok(TestResult { token_ms, ..result })
}

/// What both kinds have.
fn result(
    (test, kind): (String, Kind),
    (tokens, depth): (usize, usize),
    seconds: Vec<f64>,
    traffic: Option<Traffic>,
) -> TestResult {
    let n = tokens as f64;
    let speeds = seconds.iter().map(|seconds| n / seconds).collect();
    let tokens_per_second = Spread::of(speeds).expect("one repetition or more");
    let weights = traffic.map(|traffic| traffic.weights as f64 / n);
    let cache = traffic.map(|traffic| traffic.cache as f64 / n);
    let bytes = weights.zip(cache).map(|(weights, cache)| weights + cache);
    TestResult {
        test,
        kind,
        tokens,
        depth,
        read_gb_per_second: bytes.map(|bytes| bytes * tokens_per_second.median / 1e9),
        seconds: Spread::of(seconds).expect("one repetition or more"),
        tokens_per_second,
        first_token_ms: None,
        token_ms: None,
        weight_bytes_per_token: weights,
        cache_bytes_per_token: cache,
    }
}

/// Times the parts of `tokens` tokens of a reply; `None` where the device has no clock that can be
/// read. It is no part of any timed run.
///
/// # Errors
/// If the tokens do not fit the context, the device fails, or `observe` ends it.
pub fn profile(
    transformer: &mut Transformer,
    text: &[u32],
    (depth, tokens): (usize, usize),
    observe: OnEvent<'_>,
) -> Result<Option<Profile>> {
    let mut runner = Runner::new(transformer, text)?;
    // What is done once is done here.
    runner.reply(depth, 1, observe)?;
    runner.fill(depth, observe)?;
    let clock = match runner.transformer.start_profile() {
        Profiling::Nothing => return Ok(None),
        Profiling::Kernels => "the device's",
        Profiling::Steps => "the host's",
    };
    let run = runner.reply(depth, tokens, observe);
    let parts = runner.transformer.end_profile()?;
    // The first token counts here: its pass is timed like the others.
    let n = run?.tokens.len() as f64;
    let all: f64 = parts.iter().map(|part| part.time.as_secs_f64()).sum();
    let mut parts: Vec<ProfilePart> = parts
        .iter()
        .map(|part| ProfilePart {
            name: part.name,
            calls_per_token: part.calls as f64 / n,
            us_per_token: part.time.as_secs_f64() * 1e6 / n,
            share: if all > 0.0 { part.time.as_secs_f64() / all } else { 0.0 },
        })
        .collect();
    parts.sort_by(|a, b| b.us_per_token.total_cmp(&a.us_per_token));
    Ok(Some(Profile { clock, parts }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_and_their_positions() {
        let options = BenchOptions {
            prompts: vec![128, 0],
            replies: vec![16],
            depths: vec![100, 0, 100],
            repetitions: 1,
        };
        let names: Vec<_> = options.tests().into_iter().map(|(k, n, d)| name(k, n, d)).collect();
        assert_eq!(names, ["pp128", "tg16", "pp128 @ 100", "tg16 @ 100"]);
        assert_eq!(options.positions(), 228);
        options.check(228).unwrap();
        assert!(matches!(
            options.check(227),
            Err(Error::ContextOverflow { needed: 228, capacity: 227 })
        ));
    }
}
