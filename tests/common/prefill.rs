//! A prompt in one go against the same tokens fed one by one.

use sterna::Transformer;
use sterna::backend::{Output, Tap, Want};
use sterna::random::Random;

/// Prompts around the edges of lanes and tiles of the GEMMs, and some between.
const LENGTHS: [usize; 10] = [2, 4, 5, 8, 9, 32, 33, 64, 65, 67];

/// How far a tap's values, and logits, may be from those of decoding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The same bits.
    Equal,
    /// A difference in the last bits can move an int8 code by one step, 1/127 of the largest
    /// activation, in a few of the values: the mean stays below half a step.
    MeanOfHalfAStep,
}

impl Bound {
    fn holds(self, found: &[f32], expected: &[f32]) -> bool {
        if self == Self::Equal || found.len() != expected.len() {
            return found == expected;
        }
        let scale = expected.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        let sum: f32 = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).sum();
        sum / found.len() as f32 <= 4e-3 * scale
    }
}

/// A step's results, one token after another.
type Step = (Tap, usize, Vec<f32>);

fn trace(model: &mut Transformer, tokens: &[u32]) -> Result<(Vec<Step>, Vec<f32>), String> {
    let mut steps = Vec::new();
    let output = model.feed_tapped(tokens, Want::LastLogits, &mut |tap, layer, values| {
        steps.push((tap, layer, values.to_vec()));
    });
    match output.map_err(|error| error.to_string())? {
        Output::Logits(logits) => Ok((steps, logits)),
        other => Err(format!("{other:?} in the place of logits")),
    }
}

/// Every step's results for every token, and the logits of the last, of prompts of all lengths.
///
/// # Errors
/// The first difference; that a wrong token makes none; what goes wrong otherwise.
pub fn check(model: &mut Transformer, bound: Bound) -> Result<(), String> {
    let mut random = Random::new(0xF111);
    let vocab_size = model.config().vocab_size;
    let most = LENGTHS[LENGTHS.len() - 1];
    let tokens: Vec<u32> = (0..most).map(|_| random.below(vocab_size) as u32).collect();
    // One step of one token after another.
    let mut decoded: Vec<Step> = Vec::new();
    let mut logits = Vec::new();
    model.reset();
    for token in &tokens {
        let (steps, last) = trace(model, &[*token])?;
        logits.push(last);
        if decoded.is_empty() {
            decoded = steps;
            continue;
        }
        for ((_, _, all), (_, _, values)) in decoded.iter_mut().zip(steps) {
            all.extend(values);
        }
    }
    for len in LENGTHS {
        model.reset();
        compare(model, &tokens[..len], &decoded, &logits[len - 1], bound)?;
    }
    // In two parts, the second of which sees the cache of the first.
    model.reset();
    model.feed(&tokens[..30], Want::Nothing).map_err(|error| error.to_string())?;
    let (_, found) = trace(model, &tokens[30..])?;
    if !bound.holds(&found, &logits[most - 1]) {
        return Err(format!("{most} tokens in two parts: other logits"));
    }
    // A judge that takes anything would take this.
    model.reset();
    let mut wrong = tokens[..33].to_vec();
    wrong[32] = (wrong[32] + 1) % vocab_size as u32;
    match compare(model, &wrong, &decoded, &logits[32], bound) {
        Ok(()) => Err("a wrong token went unnoticed".to_owned()),
        Err(_) => Ok(()),
    }
}

/// The steps of several passes as those of one.
fn join(steps: Vec<Step>, steps_a_pass: usize) -> Vec<Step> {
    let mut joined: Vec<Step> = Vec::new();
    for (at, step) in steps.into_iter().enumerate() {
        match joined.get_mut(at % steps_a_pass) {
            Some(first) if at >= steps_a_pass => first.2.extend(step.2),
            _ => joined.push(step),
        }
    }
    joined
}

fn compare(
    model: &mut Transformer,
    tokens: &[u32],
    decoded: &[Step],
    expected: &[f32],
    bound: Bound,
) -> Result<(), String> {
    let m = tokens.len();
    let (steps, logits) = trace(model, tokens)?;
    let steps = join(steps, decoded.len());
    for ((tap, layer, found), (_, _, all)) in steps.iter().zip(decoded) {
        let width = found.len() / m;
        for (token, found) in found.chunks_exact(width).enumerate() {
            if !bound.holds(found, &all[token * width..][..width]) {
                return Err(format!("{m} tokens: {tap:?} of layer {layer}, token {token}"));
            }
        }
    }
    if steps.len() != decoded.len() || !bound.holds(&logits, expected) {
        return Err(format!("{m} tokens: other logits"));
    }
    Ok(())
}
