//! The kernels that choose a token against their twin, and against the distribution they claim.

use cpu_ref::sample::{Candidate, Sampling, candidates, draw, is_seen, total_weight};
use libtest_mimic::Failed;
use sterna::backend::gpu::self_test::{self, Drawn, draw_tokens};
use sterna::backend::gpu::{Capabilities, Gpu, PassParams, WeightsRead, kernels};
use sterna::random::Random;

use crate::Case;
use crate::util::{run_guarded, same};

/// How far, as a share of the mass, a random number may be from the boundary of another token, or a
/// cut from where it would give another: the weights are within 1e-6 of the twin's for what weighs
/// enough to matter, and so are their sums.
const NEAR: f64 = 1e-5;

pub fn cases(capabilities: Capabilities) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    // The kernels are the same for both, with the same constants, and a software rasteriser takes its time.
    if capabilities == Capabilities::Adapter {
        for distribution in DISTRIBUTIONS {
            cases.push((
                format!("sample::distribution::{}", distribution.name),
                Box::new(move |gpu| follows_the_distribution(gpu, distribution)),
            ));
        }
        return cases;
    }
    for (at, &len) in LENS.iter().enumerate() {
        cases.push((
            format!("sample::tokens_of_{len}"),
            Box::new(move |gpu| equals_the_twin(gpu, at as u64, len)),
        ));
    }
    cases.push(("sample::broken_logits".into(), Box::new(broken_logits)));
    cases.push(("sample::repeats_and_marks_seen".into(), Box::new(repeats_and_marks_seen)));
    cases.push(("sample::rows_and_guards".into(), Box::new(rows_and_guards)));
    for vocab_size in [1, 300, SEVERAL_CHUNKS, 128_256] {
        cases.push((
            format!("self_test::sample::{vocab_size}"),
            Box::new(move |gpu| self_test::check_sample(gpu, vocab_size).map_err(Failed::from)),
        ));
    }
    cases
}

/// One token, parts of a block and of a chunk, whole ones, and real vocabularies.
const LENS: [usize; 13] = [1, 2, 3, 255, 256, 257, 300, 1023, 1024, 1025, 20_001, 128_256, 262_144];

/// Logits of every shape that the search treats in its own way.
fn logits(random: &mut Random, len: usize, kind: usize) -> Vec<f32> {
    let mut logits: Vec<f32> = match kind {
        // Most tokens weigh nothing.
        0 => random.floats(len, 20.0),
        // A bell, like a model's.
        1 => (0..len).map(|_| random.floats(6, 3.0).iter().sum()).collect(),
        // Peaked.
        2 => random.floats(len, 2.0),
        // More tokens in a level than the list takes.
        3 => random.floats(len, 0.01),
        // Ties, of all tokens and of some.
        4 => vec![-1.25; len],
        5 => random.floats(len, 6.0).iter().map(|logit| logit.round() / 2.0).collect(),
        // Far from zero.
        _ => random.floats(len, 6.0).iter().map(|logit| logit - 300.0).collect(),
    };
    if kind == 2 {
        logits[random.below(len)] = 14.0;
    }
    if kind.is_multiple_of(2) && len > 1 {
        for _ in 0..len / 3 {
            logits[random.below(len)] = f32::NEG_INFINITY;
        }
        logits[random.below(len)] = 1.5;
    }
    logits
}

const KINDS: usize = 7;

fn pick<T: Copy>(random: &mut Random, of: &[T]) -> T {
    of[random.below(of.len())]
}

fn sampling(random: &mut Random) -> Sampling {
    Sampling {
        temperature: pick(random, &[0.0, 0.01, 0.3, 0.7, 1.0, 1.0, 1.7, 30.0]),
        penalty: pick(random, &[1.0, 1.0, 1.1, 1.3, 0.8]),
        top_k: pick(random, &[0, 0, 1, 2, 40, 500, 513, 3000, 1 << 20]),
        top_p: f64::from(pick(random, &[1.0f32, 1.0, 0.1, 0.5, 0.95, 0.999, 1e-6])),
        min_p: f64::from(pick(random, &[0.0f32, 0.0, 1e-4, 0.05, 0.5, 1.0])),
    }
}

fn pass(how: &Sampling, draws: usize) -> PassParams {
    PassParams {
        n_tokens: draws as u32,
        n_logit_rows: 1,
        temperature: how.temperature,
        penalty: how.penalty,
        top_k: how.top_k as u32,
        top_p: how.top_p as f32,
        min_p: how.min_p as f32,
        ..PassParams::default()
    }
}

/// Random numbers in [0, 1), as f32 has them.
fn uniforms(random: &mut Random, draws: usize) -> Vec<f32> {
    (0..draws).map(|_| (random.unit() + 1.0) / 2.0).collect()
}

fn random_seen(random: &mut Random, len: usize) -> Vec<u32> {
    (0..len.div_ceil(32)).map(|_| (random.bits() & random.bits()) as u32).collect()
}

/// Whether `uniform` is within [`NEAR`] of the mass that belongs to `token`.
fn is_near(candidates: &[Candidate], token: usize, uniform: f64) -> bool {
    let total = total_weight(candidates);
    let mut before = 0.0;
    for candidate in candidates {
        let through = before + candidate.weight / total;
        if candidate.token == token {
            return (before - NEAR..=through + NEAR).contains(&uniform);
        }
        before = through;
    }
    false
}

/// Whether the twin gives `token` with a random number and cuts that are [`NEAR`] those asked for.
fn is_explained(logits: &[f32], seen: &[u32], how: &Sampling, uniform: f64, token: usize) -> bool {
    [1.0, 1.0 - NEAR, 1.0 + NEAR].into_iter().any(|factor| {
        let top_p = if how.top_p < 1.0 { (how.top_p * factor).min(1.0 - 1e-12) } else { 1.0 };
        let how_many = Sampling { top_p, min_p: 0.0, ..*how };
        let ranked = candidates(logits, seen, &how_many).expect("the logits are finite");
        // Every cut by min_p that is near makes a difference of its own.
        let is_at_cut = |weight: &f64| (weight - how.min_p).abs() <= NEAR * how.min_p;
        let at_cut = ranked.iter().map(|candidate| candidate.weight).filter(is_at_cut);
        at_cut.chain([how.min_p]).any(|min_p| {
            let mut kept = ranked.clone();
            kept.retain(|candidate| candidate.weight >= min_p);
            is_near(&kept, token, uniform)
        })
    })
}

/// Draws of random logits by random settings: a token other than the twin's must be explained, and
/// rare.
fn equals_the_twin(gpu: &Gpu, seed: u64, len: usize) -> Result<(), Failed> {
    let mut random = Random::new(seed);
    let pipelines = gpu.pipelines();
    let (rounds, draws) = match len {
        100_000.. => (1, 4),
        2000.. => (1, 8),
        _ => (3, 12),
    };
    let (mut all, mut others) = (0, 0);
    for round in 0..rounds {
        for kind in 0..KINDS {
            let logits = logits(&mut random, len, kind);
            let mut how = sampling(&mut random);
            if kind == 3 {
                // Of tokens that all weigh the same but for 1e-3, a cut beside the best would keep
                // those that f32 cannot tell from it.
                how.min_p = how.min_p.min(0.5);
            }
            let seen = random_seen(&mut random, len);
            let uniforms = uniforms(&mut random, draws);
            let found = draw_tokens(gpu, &pipelines, &logits, &seen, pass(&how, draws), &uniforms)?;
            let expected = candidates(&logits, &seen, &how).expect("the logits are finite");
            for (&uniform, &token) in uniforms.iter().zip(&found.tokens) {
                let uniform = f64::from(uniform);
                let twins = draw(&expected, uniform).expect("a candidate") as u32;
                all += 1;
                if token == twins {
                    continue;
                }
                others += 1;
                if !is_explained(&logits, &seen, &how, uniform, token as usize) {
                    let what = format!("V {len}, seed {seed}, round {round}, logits {kind}");
                    let twins = format!("token {token}, expected {twins}");
                    return Err(format!("{what}, {how:?}, uniform {uniform}: {twins}").into());
                }
            }
        }
    }
    // Of few draws, one says nothing.
    if others > 1 && others * 100 > all {
        return Err(format!("V {len}: {others} of {all} tokens are not the twin's").into());
    }
    Ok(())
}

const PLAIN: Sampling =
    Sampling { temperature: 0.8, penalty: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// What is drawn so often that χ² rejects draws that are meant for a neighbour.
#[derive(Debug, Clone, Copy)]
struct Distribution {
    name: &'static str,
    how: Sampling,
    draws: usize,
    /// A little off.
    neighbours: &'static [Sampling],
}

/// The plain one is the basis of the judge. Cuts leave fewer tokens, which need fewer draws; the forty best are
/// so much alike that only a temperature further off shows.
const DISTRIBUTIONS: [Distribution; 5] = [
    Distribution {
        name: "temperature",
        how: PLAIN,
        draws: 100_000,
        neighbours: &[
            Sampling { temperature: 0.9, ..PLAIN },
            Sampling { top_k: 290, ..PLAIN },
            Sampling { penalty: 1.15, ..PLAIN },
        ],
    },
    Distribution {
        name: "top_k",
        how: Sampling { top_k: 40, ..PLAIN },
        draws: 25_000,
        neighbours: &[
            Sampling { top_k: 39, ..PLAIN },
            Sampling { top_k: 41, ..PLAIN },
            Sampling { top_k: 40, temperature: 0.6, ..PLAIN },
        ],
    },
    Distribution {
        name: "top_p",
        how: Sampling { top_p: 0.9, ..PLAIN },
        draws: 25_000,
        neighbours: &[
            Sampling { top_p: 0.88, ..PLAIN },
            Sampling { top_p: 0.92, ..PLAIN },
            Sampling { top_p: 0.9, temperature: 0.9, ..PLAIN },
        ],
    },
    Distribution {
        name: "min_p",
        how: Sampling { min_p: 0.1, ..PLAIN },
        draws: 25_000,
        neighbours: &[
            Sampling { min_p: 0.11, ..PLAIN },
            Sampling { min_p: 0.09, ..PLAIN },
            Sampling { min_p: 0.1, temperature: 0.9, ..PLAIN },
        ],
    },
    Distribution {
        name: "all_and_penalty",
        how: ALL,
        draws: 25_000,
        neighbours: &[
            Sampling { temperature: 1.1, ..ALL },
            Sampling { penalty: 1.15, ..ALL },
            Sampling { penalty: 1.45, ..ALL },
            Sampling { top_p: 0.93, ..ALL },
        ],
    },
];

const ALL: Sampling =
    Sampling { temperature: 1.2, penalty: 1.3, top_k: 100, top_p: 0.95, min_p: 0.02 };

/// Draws of one dispatch: no driver may take it for hung.
const DRAWS_AT_ONCE: usize = 5_000;

/// How often each token of the tests' logits is drawn.
fn count_draws(gpu: &Gpu, how: &Sampling, draws: usize) -> Result<Vec<usize>, Failed> {
    let (logits, seen) = tested_logits();
    let mut random = Random::new(5);
    let mut counts = vec![0; logits.len()];
    let pipelines = gpu.pipelines();
    for _ in 0..draws / DRAWS_AT_ONCE {
        let uniforms = uniforms(&mut random, DRAWS_AT_ONCE);
        let params = pass(how, DRAWS_AT_ONCE);
        for token in draw_tokens(gpu, &pipelines, &logits, &seen, params, &uniforms)?.tokens {
            counts[token as usize] += 1;
        }
    }
    Ok(counts)
}

/// 300 logits with ties, and a quarter of tokens seen.
fn tested_logits() -> (Vec<f32>, Vec<u32>) {
    let mut random = Random::new(4);
    let logits = random.floats(300, 3.0).into_iter().map(|logit| (logit * 16.0).round() / 16.0);
    (logits.collect(), random_seen(&mut random, 300))
}

/// χ² of counts against the twin's distribution, and its degrees of freedom. Tokens expected fewer
/// than five times count together; one that cannot be drawn makes it infinite.
fn chi_square(counts: &[usize], candidates: &[Candidate]) -> (f64, f64) {
    let draws: usize = counts.iter().sum();
    let total = total_weight(candidates);
    let (mut drawn, mut sum, mut classes) = (0, 0.0, 0.0);
    let (mut rare, mut rare_expected) = (0, 0.0);
    let mut add = |count: usize, expected: f64| {
        sum += (count as f64 - expected).powi(2) / expected;
        classes += 1.0;
    };
    for candidate in candidates {
        let (count, expected) = (counts[candidate.token], draws as f64 * candidate.weight / total);
        drawn += count;
        if expected < 5.0 {
            (rare, rare_expected) = (rare + count, rare_expected + expected);
        } else {
            add(count, expected);
        }
    }
    if rare_expected > 0.0 {
        add(rare, rare_expected);
    }
    (if drawn == draws { sum } else { f64::INFINITY }, classes - 1.0)
}

/// What χ² exceeds once in a thousand seeds (Wilson and Hilferty's approximation).
fn critical(degrees: f64) -> f64 {
    let variance = 2.0 / (9.0 * degrees);
    degrees * (1.0 - variance + 3.090 * variance.sqrt()).powi(3)
}

fn follows_the_distribution(gpu: &Gpu, distribution: Distribution) -> Result<(), Failed> {
    let Distribution { how, draws, .. } = distribution;
    let (logits, seen) = tested_logits();
    let counts = count_draws(gpu, &how, draws)?;
    let expected = candidates(&logits, &seen, &how).expect("the logits are finite");
    let (chi_square, degrees) = chi_square(&counts, &expected);
    let limit = critical(degrees);
    if chi_square > limit {
        let what = format!("χ² {chi_square} of {} tokens is above {limit}", expected.len());
        return Err(format!("{how:?}: {what}").into());
    }
    the_judge_objects(&distribution, &counts, &logits, &seen)
}

/// The test of distributions must reject these draws as those of a temperature, a cut or a penalty that is a
/// little off.
fn the_judge_objects(
    distribution: &Distribution,
    counts: &[usize],
    logits: &[f32],
    seen: &[u32],
) -> Result<(), Failed> {
    for wrong in distribution.neighbours {
        let expected = candidates(logits, seen, wrong).expect("the logits are finite");
        let (chi_square, degrees) = chi_square(counts, &expected);
        if chi_square <= critical(degrees) {
            let how = distribution.how;
            return Err(format!("{wrong:?} passes for {how:?}: χ² {chi_square}").into());
        }
    }
    Ok(())
}

fn broken_logits(gpu: &Gpu) -> Result<(), Failed> {
    let pipelines = gpu.pipelines();
    let mut random = Random::new(6);
    let token = |logits: &[f32], params: PassParams| -> Result<Drawn, Failed> {
        let seen = vec![u32::MAX; logits.len().div_ceil(32)];
        Ok(draw_tokens(gpu, &pipelines, logits, &seen, params, &[0.5])?)
    };
    let cut = Sampling { temperature: 0.7, penalty: 1.1, top_k: 5, top_p: 0.9, min_p: 0.1 };
    for how in [PLAIN, cut, Sampling { temperature: 0.0, penalty: 1.1, ..PLAIN }] {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            for at in [0, 700, 1024] {
                let mut logits = random.floats(1025, 5.0);
                logits[at] = bad;
                let found = token(&logits, pass(&how, 1))?.tokens;
                same(&format!("{how:?}, {bad} at {at}"), &found, &[u32::MAX])?;
            }
        }
        let found = token(&[f32::NEG_INFINITY; 300], pass(&how, 1))?.tokens;
        same(&format!("{how:?}, nothing above −∞"), &found, &[u32::MAX])?;
        // All but one.
        let mut logits = [f32::NEG_INFINITY; 300];
        logits[277] = -1e30;
        same(&format!("{how:?}, one above −∞"), &token(&logits, pass(&how, 1))?.tokens, &[277])?;
    }
    Ok(())
}

/// Draws that are repeated, each alone.
const REPEATED: usize = 20;

/// A vocabulary of several whole chunks: that of the largest self-test but one, so that it is compiled once.
const SEVERAL_CHUNKS: usize = 3072;

/// The same random numbers give the same tokens; of each dispatch, the first token's bit is set.
fn repeats_and_marks_seen(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(7);
    let pipelines = gpu.pipelines();
    for (len, how) in [(300, PLAIN), (SEVERAL_CHUNKS, Sampling { top_p: 0.95, ..PLAIN })] {
        let logits = random.floats(len, 4.0);
        let seen = random_seen(&mut random, len);
        let uniforms = uniforms(&mut random, REPEATED);
        let all = || draw_tokens(gpu, &pipelines, &logits, &seen, pass(&how, REPEATED), &uniforms);
        let first = all()?;
        same(&format!("V {len}: repeated"), &all()?.tokens, &first.tokens)?;
        for (uniform, token) in uniforms.iter().zip(&first.tokens) {
            // One draw, by the pass's own number.
            let params = pass(&how, 1);
            let one = draw_tokens(gpu, &pipelines, &logits, &seen, params, &[*uniform])?;
            same(&format!("V {len}: alone"), &one.tokens, &[*token])?;
            let mut expected = seen.clone();
            expected[*token as usize / 32] |= 1 << (token % 32);
            same(&format!("V {len}: seen"), &one.seen, &expected)?;
            assert!(is_seen(&one.seen, *token as usize));
        }
    }
    Ok(())
}

/// The last of several rows, outputs between guard words, and an output that is not the first token.
fn rows_and_guards(gpu: &Gpu) -> Result<(), Failed> {
    let mut random = Random::new(8);
    for (len, rows) in [(2, 3), (300, 2), (1025, 1), (SEVERAL_CHUNKS, 2)] {
        let lens = kernels::SampleLens::new(len);
        let logits = random.floats(rows * len, 4.0);
        let last = &logits[(rows - 1) * len..];
        // One row of bits a row of logits, of which the last counts.
        let all_seen: Vec<u32> = (0..rows).flat_map(|_| random_seen(&mut random, len)).collect();
        let seen = &all_seen[(rows - 1) * lens.seen..];
        let how = Sampling { penalty: 1.2, top_k: 7, ..PLAIN };
        let params = PassParams {
            n_logit_rows: rows as u32,
            token_out: 3,
            uniform: 0.37,
            ..pass(&how, rows)
        };
        let (logits, seen_in) = (gpu.upload("logits", &logits)?, gpu.upload("seen", &all_seen)?);
        let call = kernels::sample_blocks(len);
        let sizes = [lens.vocab, lens.block_max];
        let blocks = run_guarded(gpu, &call, params, &[&logits, &seen_in], &sizes)?;
        let bits = gpu.upload("bits", &blocks[0])?;
        let block_max = gpu.upload("block_max", &blocks[1])?;
        let call = kernels::sample_weights(len);
        let sizes = [lens.vocab, lens.levels];
        let sums = run_guarded(gpu, &call, params, &[&bits, &block_max], &sizes)?;
        let (weights, levels) = (gpu.upload("weights", &sums[0])?, gpu.upload("levels", &sums[1])?);
        let inputs = [&bits, &block_max, &weights, &levels, &gpu.upload("uniforms", &[0.0f32])?];
        let mut call = kernels::sample(len);
        // The bit may have been set: then nothing changes.
        call.weights = WeightsRead::RowOf(1);
        let out = run_guarded(gpu, &call, params, &inputs, &[rows * lens.seen, 5])?;
        let expected = cpu_ref::sample::sample(last, seen, &how, f64::from(params.uniform));
        let token = expected.expect("the logits are finite");
        // What was in the outputs before, but for a bit and a word.
        let mut expected_seen = vec![0xDEAD_BEEF; rows * lens.seen];
        expected_seen[(rows - 1) * lens.seen + token / 32] |= 1 << (token % 32);
        same(&format!("V {len}: seen"), &out[0], &expected_seen)?;
        let mut expected_tokens = [0xDEAD_BEEF; 5];
        expected_tokens[3] = token as u32;
        same(&format!("V {len}: token"), &out[1], &expected_tokens)?;
    }
    Ok(())
}
