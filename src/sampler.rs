//! Logits → token id: seeded and pure.
//!
//! The same seed and the same logits give the same tokens on every platform: the generator is
//! pinned to one published algorithm, the exponential is software, ties go to the smaller id.

use std::collections::BTreeSet;

use crate::error::{Error, Result};

/// How the next token is chosen among the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Sampling {
    /// The most probable token; of equals, the smallest id.
    #[default]
    Greedy,
    /// A draw from `softmax(logits / temperature)`, cut to its likely tokens: first by `top_k`, of
    /// what that leaves by `top_p`, of what that leaves by `min_p`.
    Random {
        /// Above 0; below 1 sharpens the distribution, above 1 flattens it.
        temperature: f32,
        /// Keep this many of the most probable tokens; `None` keeps all.
        top_k: Option<usize>,
        /// Keep the fewest most probable tokens that together reach this probability; in (0, 1],
        /// 1 keeps all.
        top_p: f32,
        /// Keep tokens at least this fraction as probable as the most probable one; in [0, 1], 0
        /// keeps all.
        min_p: f32,
        /// Where the random numbers start.
        seed: u64,
    },
}

impl Sampling {
    /// Checks every option's range.
    ///
    /// # Errors
    /// [`Error::Sampling`] with the first option that is out of range.
    pub fn validate(&self) -> Result<()> {
        let Self::Random { temperature, top_k, top_p, min_p, .. } = *self else { return Ok(()) };
        let require = |option, expected, found: String, valid: bool| {
            if valid { Ok(()) } else { Err(Error::Sampling { option, expected, found }) }
        };
        require(
            "temperature",
            "a finite number above 0",
            temperature.to_string(),
            temperature.is_finite() && temperature > 0.0,
        )?;
        let found = top_k.map(|k| k.to_string()).unwrap_or_default();
        require("top_k", "at least 1", found, top_k != Some(0))?;
        let valid = top_p > 0.0 && top_p <= 1.0;
        require("top_p", "above 0 and at most 1", top_p.to_string(), valid)?;
        require("min_p", "0 to 1", min_p.to_string(), (0.0..=1.0).contains(&min_p))
    }
}

/// Chooses one token after another, and remembers which occurred.
#[derive(Debug, Clone)]
pub struct Sampler {
    sampling: Sampling,
    repetition_penalty: f32,
    seen: BTreeSet<u32>,
    /// The tokens of `seen` in the order in which they first occurred.
    noted: Vec<u32>,
    rng: Xoshiro256PlusPlus,
    /// Kept between calls for its memory.
    candidates: Vec<Candidate>,
}

/// A point in a sampler's text, to go back to.
#[derive(Debug, Clone)]
pub struct Mark {
    rng: Xoshiro256PlusPlus,
    /// How many tokens had been noted.
    noted: usize,
}

impl Default for Sampler {
    /// Greedy, without a penalty.
    fn default() -> Self {
        Self {
            sampling: Sampling::Greedy,
            repetition_penalty: 1.0,
            seen: BTreeSet::new(),
            noted: Vec::new(),
            rng: Xoshiro256PlusPlus::from_seed(0),
            candidates: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    /// Unnormalised: the most probable token has 1.
    weight: f64,
}

impl Sampler {
    /// A sampler at the start of its random numbers.
    ///
    /// `repetition_penalty` divides the positive logits of tokens that have occurred, and
    /// multiplies their negative ones (Keskar et al. 2019, CTRL); 1 changes nothing.
    ///
    /// # Errors
    /// [`Error::Sampling`] if an option is out of range.
    pub fn new(sampling: Sampling, repetition_penalty: f32) -> Result<Self> {
        sampling.validate()?;
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return Err(Error::Sampling {
                option: "repetition_penalty",
                expected: "a finite number above 0",
                found: repetition_penalty.to_string(),
            });
        }
        let seed = match sampling {
            Sampling::Greedy => 0,
            Sampling::Random { seed, .. } => seed,
        };
        let rng = Xoshiro256PlusPlus::from_seed(seed);
        Ok(Self { sampling, repetition_penalty, rng, ..Self::default() })
    }

    /// How tokens are chosen.
    pub fn sampling(&self) -> Sampling {
        self.sampling
    }

    /// See [`Sampler::new`].
    pub fn repetition_penalty(&self) -> f32 {
        self.repetition_penalty
    }

    /// The tokens noted for the penalty, ascending.
    pub fn seen(&self) -> impl Iterator<Item = u32> {
        self.seen.iter().copied()
    }

    /// Whether a token was noted for the penalty.
    pub fn has_seen(&self, token: u32) -> bool {
        self.seen.contains(&token)
    }

    /// The random number in [0, 1) that makes the next choice, for a device that chooses by itself.
    pub fn next_uniform(&mut self) -> f64 {
        self.rng.next_f64()
    }

    /// Whether the choice is plain argmax, which a device can make without handing out logits.
    pub fn is_argmax(&self) -> bool {
        self.sampling == Sampling::Greedy && self.repetition_penalty == 1.0
    }

    /// Notes tokens of the prompt, or chosen elsewhere, for the repetition penalty.
    pub fn observe(&mut self, tokens: &[u32]) {
        if self.repetition_penalty != 1.0 {
            self.noted.extend(tokens.iter().filter(|&&token| self.seen.insert(token)));
        }
    }

    /// Where the text is now.
    pub fn mark(&self) -> Mark {
        Mark { rng: self.rng.clone(), noted: self.noted.len() }
    }

    /// Goes back to a mark of this sampler, as if nothing had been chosen or noted since.
    pub fn rewind(&mut self, mark: &Mark) {
        self.rng = mark.rng.clone();
        for token in self.noted.drain(mark.noted.min(self.noted.len())..) {
            self.seen.remove(&token);
        }
    }

    /// Goes on as if the next choice had been `token`: uses up its random number and notes it.
    pub fn follow(&mut self, token: u32) {
        if self.sampling != Sampling::Greedy {
            self.next_uniform();
        }
        self.observe(&[token]);
    }

    /// Chooses a token from logits `[V]` and notes it; the penalty changes `logits` in place.
    ///
    /// # Errors
    /// [`Error::NanLogits`] if a logit is NaN or +∞, or none is above −∞; `position` is reported.
    pub fn sample(&mut self, logits: &mut [f32], position: usize) -> Result<u32> {
        if logits.iter().any(|logit| logit.is_nan()) {
            return Err(Error::NanLogits { position });
        }
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                let penalty = self.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        let best = argmax(logits).ok_or(Error::NanLogits { position })?;
        let token = match self.sampling {
            Sampling::Greedy => best.token,
            Sampling::Random { temperature, top_k, top_p, min_p, .. } => {
                self.softmax(logits, best.weight, f64::from(temperature));
                if let Some(k) = top_k {
                    keep_top_k(&mut self.candidates, k);
                }
                if top_p < 1.0 {
                    keep_top_p(&mut self.candidates, f64::from(top_p));
                }
                // The best candidate survives both cuts above, and its weight is exactly 1.
                self.candidates.retain(|candidate| candidate.weight >= f64::from(min_p));
                draw(&self.candidates, self.rng.next_f64()).unwrap_or(best.token)
            }
        };
        self.observe(&[token]);
        Ok(token)
    }

    /// Fills `candidates` with every token of non-zero weight `exp((logit − max) / temperature)`.
    fn softmax(&mut self, logits: &[f32], max: f64, temperature: f64) {
        self.candidates.clear();
        let weigh = |(token, &logit): (u32, &f32)| Candidate {
            token,
            weight: libm::exp((f64::from(logit) - max) / temperature),
        };
        self.candidates
            .extend((0..).zip(logits).map(weigh).filter(|candidate| candidate.weight > 0.0));
    }
}

/// The largest logit, of equals the first, if it is finite; as a candidate that weighs its logit.
fn argmax(logits: &[f32]) -> Option<Candidate> {
    let (mut token, mut max) = (0, f32::NEG_INFINITY);
    for (id, &logit) in (0..).zip(logits) {
        if logit > max {
            (token, max) = (id, logit);
        }
    }
    max.is_finite().then_some(Candidate { token, weight: f64::from(max) })
}

/// Most probable first, of equals the smaller id.
fn by_rank(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token))
}

fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, by_rank);
        candidates.truncate(k);
        candidates.sort_unstable_by(by_rank);
    }
}

/// Keeps the shortest prefix, by rank, whose probability reaches `p`.
///
/// Sorting a whole vocabulary would cost more than the rest of sampling. Tokens below
/// `(1 − p) / n` together hold less than `1 − p`, so the others reach `p` without them: only those
/// are sorted.
fn keep_top_p(candidates: &mut Vec<Candidate>, p: f64) {
    let total = total_weight(candidates);
    let cutoff = total * (1.0 - p) / candidates.len().max(1) as f64;
    // The best weighs 1, and cutoff ≤ total / n ≤ 1: it stays.
    candidates.retain(|candidate| candidate.weight >= cutoff);
    candidates.sort_unstable_by(by_rank);
    let mut sum = 0.0;
    let reaches = |candidate: &Candidate| {
        sum += candidate.weight;
        sum >= p * total
    };
    if let Some(last) = candidates.iter().position(reaches) {
        candidates.truncate(last + 1);
    }
}

fn total_weight(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// The candidate at the fraction `u` in [0, 1) of the total weight.
fn draw(candidates: &[Candidate], u: f64) -> Option<u32> {
    let mut rest = u * total_weight(candidates);
    for candidate in candidates {
        rest -= candidate.weight;
        if rest < 0.0 {
            return Some(candidate.token);
        }
    }
    // Rounding may leave a crumb after the last one.
    candidates.last().map(|candidate| candidate.token)
}

/// xoshiro256++ 1.0 (Blackman and Vigna, <https://prng.di.unimi.it/xoshiro256plusplus.c>).
#[derive(Debug, Clone)]
struct Xoshiro256PlusPlus([u64; 4]);

impl Xoshiro256PlusPlus {
    /// Spreads the seed over the state with SplitMix64, as its authors recommend.
    fn from_seed(mut seed: u64) -> Self {
        let mut split_mix = || {
            seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        Self(std::array::from_fn(|_| split_mix()))
    }

    fn next_u64(&mut self) -> u64 {
        let s = &mut self.0;
        let result = s[0].wrapping_add(s[3]).rotate_left(23).wrapping_add(s[0]);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Uniform in [0, 1), with 53 bits.
    fn next_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(
        temperature: f32,
        top_k: Option<usize>,
        top_p: f32,
        min_p: f32,
        seed: u64,
    ) -> Sampling {
        Sampling::Random { temperature, top_k, top_p, min_p, seed }
    }

    /// How often each of the tokens is drawn.
    fn counts(sampling: Sampling, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(sampling, 1.0).unwrap();
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(&mut logits.to_vec(), 0).unwrap() as usize] += 1;
        }
        counts
    }

    /// χ² of the counts against weights.
    fn chi_square(counts: &[usize], weights: &[f64]) -> f64 {
        let (draws, total): (usize, f64) = (counts.iter().sum(), weights.iter().sum());
        let term = |(&count, &weight): (&usize, &f64)| {
            let expected = draws as f64 * weight / total;
            if weight == 0.0 {
                return if count == 0 { 0.0 } else { f64::INFINITY };
            }
            (count as f64 - expected).powi(2) / expected
        };
        counts.iter().zip(weights).map(term).sum()
    }

    #[test]
    fn a_text_goes_on_from_a_mark_as_if_nothing_had_been_since() {
        let logits = [0.3f32, 1.0, -0.5, 0.8, 0.9, 0.0, 0.1, 0.6];
        for sampling in [Sampling::Greedy, random(1.3, Some(6), 0.9, 0.01, 5)] {
            for penalty in [1.0, 1.7] {
                let fresh = || {
                    let mut sampler = Sampler::new(sampling, penalty).unwrap();
                    sampler.observe(&[1, 1, 3]);
                    sampler
                };
                let draw = |sampler: &mut Sampler| sampler.sample(&mut logits.to_vec(), 0).unwrap();
                let mut sampler = fresh();
                let expected: Vec<u32> = (0..12).map(|_| draw(&mut sampler)).collect();
                for kept in 0..expected.len() {
                    let mut sampler = fresh();
                    let mark = sampler.mark();
                    for _ in 0..5 {
                        draw(&mut sampler);
                    }
                    sampler.observe(&[0, 1, 6]);
                    sampler.rewind(&mark);
                    assert_eq!(sampler.seen, fresh().seen);
                    expected[..kept].iter().for_each(|&token| sampler.follow(token));
                    let rest: Vec<u32> =
                        expected[kept..].iter().map(|_| draw(&mut sampler)).collect();
                    assert_eq!(rest, expected[kept..], "{sampling:?} {penalty}, {kept} kept");
                }
            }
        }
    }

    #[test]
    fn generator_gives_the_published_numbers() {
        let mut rng = Xoshiro256PlusPlus([1, 2, 3, 4]);
        let published = [41943041, 58720359, 3588806011781223, 3591011842654386];
        assert_eq!(std::array::from_fn(|_| rng.next_u64()), published);
        let seeded = Xoshiro256PlusPlus::from_seed(0);
        let split_mix = [0xe220a8397b1dcdaf, 0x6e789e6aa1b965f4, 0x06c45d188009454f];
        assert_eq!(seeded.0[..3], split_mix);
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let mut sampler = Sampler::new(Sampling::Greedy, 1.0).unwrap();
        assert!(sampler.is_argmax());
        assert_eq!(sampler.sample(&mut [-1.0, 3.0, f32::NEG_INFINITY, 3.0], 0).unwrap(), 1);
        assert_eq!(sampler.sample(&mut [-0.0, 0.0], 0).unwrap(), 0);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 2.0];
        for temperature in [0.5, 1.0, 2.0] {
            let weights: Vec<f64> =
                logits.iter().map(|&l| (f64::from(l) / f64::from(temperature)).exp()).collect();
            let counts = counts(random(temperature, None, 1.0, 0.0, 7), &logits, 20_000);
            // 6 degrees of freedom: 22.5 is exceeded once in a thousand seeds.
            let chi_square = chi_square(&counts, &weights);
            assert!(chi_square < 22.5, "χ² {chi_square} at temperature {temperature}: {counts:?}");
        }
    }

    #[test]
    fn the_judge_of_distributions_objects() {
        let counts = counts(random(1.0, None, 1.0, 0.0, 7), &[0.0, 0.1, 0.0], 20_000);
        assert!(chi_square(&counts, &[1.0, 1.0, 1.0]) > 13.8);
    }

    #[test]
    fn cuts_keep_the_likely_tokens() {
        // Probabilities 0.1, 0.4, 0.1, 0.4; token 1 outranks 3, and 0 outranks 2.
        let logits = [1.0f32, 4.0, 1.0, 4.0].map(f32::ln);
        let kept = |top_k, top_p, min_p| -> Vec<bool> {
            let counts = counts(random(1.0, top_k, top_p, min_p, 1), &logits, 500);
            counts.into_iter().map(|count| count > 0).collect()
        };
        assert_eq!(kept(None, 1.0, 0.0), [true, true, true, true]);
        assert_eq!(kept(Some(9), 1.0, 0.0), [true, true, true, true]);
        assert_eq!(kept(Some(1), 1.0, 0.0), [false, true, false, false]);
        assert_eq!(kept(Some(3), 1.0, 0.0), [true, true, false, true]);
        assert_eq!(kept(None, 0.3, 0.0), [false, true, false, false]);
        assert_eq!(kept(None, 0.7, 0.0), [false, true, false, true]);
        assert_eq!(kept(None, 0.85, 0.0), [true, true, false, true]);
        assert_eq!(kept(None, 1e-6, 0.0), [false, true, false, false]);
        assert_eq!(kept(None, 1.0, 0.3), [false, true, false, true]);
        assert_eq!(kept(None, 1.0, 1.0), [false, true, false, true]);
        // top_p counts what top_k left: of 0.4, 0.4, 0.1 two reach 0.85.
        assert_eq!(kept(Some(3), 0.85, 0.0), [false, true, false, true]);
    }

    /// The sort that `keep_top_p` saves must not change what it keeps.
    #[test]
    fn top_p_equals_its_definition() {
        let mut rng = Xoshiro256PlusPlus::from_seed(3);
        for case in 0..200 {
            let n = 1 + case % 50;
            let mut candidates: Vec<Candidate> = (0..n)
                .map(|token| Candidate { token, weight: (rng.next_f64() * 8.0).floor() / 8.0 })
                .collect();
            candidates[(n / 2) as usize].weight = 1.0;
            let p = rng.next_f64().max(1e-3);
            let mut expected = candidates.clone();
            expected.sort_by(by_rank);
            let total = total_weight(&candidates);
            let mut sum = 0.0;
            let length = expected.iter().take_while(|c| (sum < p * total, sum += c.weight).0);
            let length = length.count();
            keep_top_p(&mut candidates, p);
            let tokens = |list: &[Candidate]| list.iter().map(|c| c.token).collect::<Vec<_>>();
            assert_eq!(tokens(&candidates), tokens(&expected[..length]), "case {case}, p {p}");
        }
    }

    #[test]
    fn penalty_lowers_what_occurred() {
        let mut sampler = Sampler::new(Sampling::Greedy, 2.0).unwrap();
        assert!(!sampler.is_argmax());
        sampler.observe(&[0, 2, 99]);
        let mut logits = [4.0, 3.0, -1.0, -1.5];
        assert_eq!(sampler.sample(&mut logits, 0).unwrap(), 1);
        assert_eq!(logits, [2.0, 3.0, -2.0, -1.5]);
        // Token 1 was chosen, so it has occurred, too.
        assert_eq!(sampler.sample(&mut [4.1, 4.0, 0.0, 0.0], 0).unwrap(), 0);
        assert_eq!(sampler.sample(&mut [0.0, 4.0, 0.0, 3.0], 0).unwrap(), 3);
    }

    /// The twin of the GPU's kernels chooses what this sampler does, of the same random numbers.
    #[test]
    fn the_twin_of_the_kernels_agrees() {
        let mut rng = Xoshiro256PlusPlus::from_seed(13);
        for case in 0..600u64 {
            let top_k = [None, None, Some(1), Some(3), Some(40), Some(999)][case as usize % 6];
            let mut pick = |of: &[f32]| of[(rng.next_u64() % of.len() as u64) as usize];
            let temperature = pick(&[0.01, 0.5, 1.0, 1.0, 3.0]);
            let (top_p, min_p) = (pick(&[1.0, 1.0, 0.3, 0.9, 1e-6]), pick(&[0.0, 0.0, 0.05, 1.0]));
            let penalty = pick(&[1.1, 1.3, 0.8]);
            let (step, magnitude) = (pick(&[0.0, 0.0, 0.5]), pick(&[0.0, 0.01, 4.0, 30.0]));
            let n = 1 + (rng.next_u64() % 700) as usize;
            let sampling = random(temperature, top_k, top_p, min_p, case);
            let mut sampler = Sampler::new(sampling, penalty).unwrap();
            let how = cpu_ref::sample::Sampling {
                temperature,
                penalty,
                top_k: top_k.unwrap_or(0),
                top_p: f64::from(top_p),
                min_p: f64::from(min_p),
            };
            for _ in 0..4 {
                let mut logit = || {
                    let value = (rng.next_f64() as f32 - 0.5) * magnitude;
                    if step > 0.0 { (value / step).round() * step } else { value }
                };
                let mut logits: Vec<f32> = (0..n).map(|_| logit()).collect();
                logits[n / 2] = if n > 2 { f32::NEG_INFINITY } else { 0.0 };
                let mut seen = vec![0u32; n.div_ceil(32)];
                for &token in &sampler.seen {
                    seen[token as usize / 32] |= 1 << (token % 32);
                }
                let uniform = sampler.rng.clone().next_f64();
                let expected = cpu_ref::sample::sample(&logits, &seen, &how, uniform);
                let found = sampler.sample(&mut logits, 0).unwrap();
                assert_eq!(Some(found as usize), expected, "case {case}, V {n}, {how:?}");
            }
        }
    }

    #[test]
    fn a_seed_fixes_the_tokens() {
        let draw = |seed| {
            let mut sampler = Sampler::new(random(0.9, Some(40), 0.95, 0.0, seed), 1.1).unwrap();
            let mut rng = Xoshiro256PlusPlus::from_seed(11);
            let mut token = || {
                let mut logits: Vec<f32> = (0..1000).map(|_| rng.next_f64() as f32 * 8.0).collect();
                sampler.sample(&mut logits, 0).unwrap()
            };
            std::array::from_fn::<u32, 8, _>(|_| token())
        };
        assert_eq!(draw(42), draw(42));
        assert_ne!(draw(42), draw(43));
        // What every platform must give.
        assert_eq!(draw(42), [389, 935, 740, 328, 856, 11, 635, 186]);
    }

    #[test]
    fn broken_logits_are_errors() {
        for sampling in [Sampling::Greedy, random(1.0, None, 0.9, 0.1, 0)] {
            let mut sampler = Sampler::new(sampling, 1.0).unwrap();
            for bad in [f32::NAN, f32::INFINITY] {
                let result = sampler.sample(&mut [0.0, bad, 1.0], 17);
                assert!(matches!(result, Err(Error::NanLogits { position: 17 })), "{result:?}");
            }
            assert!(sampler.sample(&mut [f32::NEG_INFINITY; 3], 0).is_err());
            assert!(sampler.sample(&mut [], 0).is_err());
        }
    }

    #[test]
    fn options_out_of_range_are_errors() {
        let option = |sampling, penalty| match Sampler::new(sampling, penalty) {
            Err(Error::Sampling { option, .. }) => option,
            other => panic!("{other:?}"),
        };
        for bad in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            assert_eq!(option(random(bad, None, 1.0, 0.0, 0), 1.0), "temperature");
            assert_eq!(option(Sampling::Greedy, bad), "repetition_penalty");
        }
        assert_eq!(option(random(1.0, Some(0), 1.0, 0.0, 0), 1.0), "top_k");
        for bad in [0.0, -0.1, 1.1, f32::NAN] {
            assert_eq!(option(random(1.0, None, bad, 0.0, 0), 1.0), "top_p");
        }
        for bad in [-0.1, 1.1, f32::NAN] {
            assert_eq!(option(random(1.0, None, 1.0, bad, 0), 1.0), "min_p");
        }
        let edge = random(f32::MIN_POSITIVE, Some(1), f32::MIN_POSITIVE, 1.0, u64::MAX);
        assert_eq!(Sampler::new(edge, 1.0).unwrap().sample(&mut [0.0, 1.0], 0).unwrap(), 1);
    }
}
