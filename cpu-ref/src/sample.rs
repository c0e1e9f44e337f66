//! `sample`: the next token drawn from `softmax(logits / temperature)`, cut to its likely tokens.

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Above 0; 0 keeps the most probable token alone.
    pub temperature: f32,
    /// Divides the positive logits of seen tokens, multiplies the others; 1 changes nothing.
    pub penalty: f32,
    /// Keeps so many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Of those, keeps the fewest most probable that together hold this share; 1 keeps all.
    pub top_p: f64,
    /// Of those, keeps what is at least this share as probable as the best; 0 keeps all.
    pub min_p: f64,
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Its id.
    pub token: usize,
    /// Its weight; the most probable token has 1.
    pub weight: f64,
}

/// Whether bit `n mod 32` of word `n / 32` is set.
pub fn is_seen(seen: &[u32], token: usize) -> bool {
    seen[token / 32] >> (token % 32) & 1 == 1
}

/// The tokens that may be drawn, in the order in which their weights are added up: by rank (larger
/// logit first, of equals the smaller id) if `top_k` or `top_p` cut, else by id. `None` if a logit
/// is NaN or +∞, or none is above −∞.
pub fn candidates(logits: &[f32], seen: &[u32], how: &Sampling) -> Option<Vec<Candidate>> {
    let mut logits = logits.to_vec();
    for (token, logit) in logits.iter_mut().enumerate() {
        if is_seen(seen, token) {
            *logit = if *logit > 0.0 { *logit / how.penalty } else { *logit * how.penalty };
        }
    }
    if logits.iter().any(|logit| logit.is_nan()) {
        return None;
    }
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !best.is_finite() {
        return None;
    }
    let mut kept: Vec<Candidate> = Vec::new();
    for (token, &logit) in logits.iter().enumerate() {
        let below = f64::from(logit) - f64::from(best);
        let weight = match below == 0.0 {
            true => 1.0,
            false if how.temperature == 0.0 => 0.0,
            false => (below / f64::from(how.temperature)).exp(),
        };
        if weight > 0.0 {
            kept.push(Candidate { token, weight });
        }
    }
    let top_k = if how.temperature == 0.0 { 1 } else { how.top_k };
    let is_cut = top_k != 0 && top_k < kept.len();
    if is_cut || how.top_p < 1.0 {
        // A stable sort: of equals the smaller id stays first.
        kept.sort_by(|a, b| logits[b.token].partial_cmp(&logits[a.token]).expect("no NaN"));
    }
    if is_cut {
        kept.truncate(top_k);
    }
    if how.top_p < 1.0 {
        let total = total_weight(&kept);
        let mut sum = 0.0;
        let reaches = |candidate: &Candidate| {
            sum += candidate.weight;
            sum >= how.top_p * total
        };
        if let Some(last) = kept.iter().position(reaches) {
            kept.truncate(last + 1);
        }
    }
    kept.retain(|candidate| candidate.weight >= how.min_p);
    Some(kept)
}

/// The sum of the weights.
pub fn total_weight(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|candidate| candidate.weight).sum()
}

/// The first candidate at which the sum of weights exceeds the fraction `uniform`, in [0, 1), of all.
pub fn draw(candidates: &[Candidate], uniform: f64) -> Option<usize> {
    let goal = uniform * total_weight(candidates);
    let mut sum = 0.0;
    for candidate in candidates {
        sum += candidate.weight;
        if sum > goal {
            return Some(candidate.token);
        }
    }
    // The sum of all, rounded, may be the goal.
    candidates.last().map(|candidate| candidate.token)
}

/// The token that a random number chooses; `None` as of [`candidates`].
pub fn sample(logits: &[f32], seen: &[u32], how: &Sampling, uniform: f64) -> Option<usize> {
    draw(&candidates(logits, seen, how)?, uniform)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Sampling =
        Sampling { temperature: 1.0, penalty: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

    fn tokens(logits: &[f32], seen: u32, how: Sampling) -> Vec<usize> {
        let kept = candidates(logits, &[seen], &how).expect("finite logits");
        kept.iter().map(|candidate| candidate.token).collect()
    }

    #[test]
    fn cuts_keep_the_likely_tokens_by_rank() {
        // Probabilities 0.1, 0.4, 0.1, 0.4.
        let logits = [1.0f32, 4.0, 1.0, 4.0].map(f32::ln);
        assert_eq!(tokens(&logits, 0, ALL), [0, 1, 2, 3]);
        assert_eq!(tokens(&logits, 0, Sampling { top_k: 3, ..ALL }), [1, 3, 0]);
        assert_eq!(tokens(&logits, 0, Sampling { top_k: 4, ..ALL }), [0, 1, 2, 3]);
        assert_eq!(tokens(&logits, 0, Sampling { top_p: 0.7, ..ALL }), [1, 3]);
        assert_eq!(tokens(&logits, 0, Sampling { min_p: 0.3, ..ALL }), [1, 3]);
        assert_eq!(tokens(&logits, 0, Sampling { top_k: 3, top_p: 0.85, ..ALL }), [1, 3]);
        assert_eq!(tokens(&logits, 0, Sampling { temperature: 0.0, ..ALL }), [1]);
        assert_eq!(tokens(&[-0.0, 0.0], 0, Sampling { top_k: 1, ..ALL }), [0]);
        assert_eq!(tokens(&logits, 0b10, Sampling { penalty: 2.0, top_k: 1, ..ALL }), [3]);
    }

    #[test]
    fn the_draw_goes_through_the_weights() {
        let logits = [0.0, f32::NEG_INFINITY, 0.0];
        assert_eq!(sample(&logits, &[0], &ALL, 0.0), Some(0));
        assert_eq!(sample(&logits, &[0], &ALL, 0.499), Some(0));
        assert_eq!(sample(&logits, &[0], &ALL, 0.5), Some(2));
        assert_eq!(sample(&logits, &[0], &ALL, 0.999), Some(2));
    }

    #[test]
    fn broken_logits_choose_nothing() {
        assert_eq!(sample(&[0.0, f32::NAN], &[0], &ALL, 0.5), None);
        assert_eq!(sample(&[0.0, f32::INFINITY], &[0], &ALL, 0.5), None);
        assert_eq!(sample(&[f32::NEG_INFINITY; 2], &[0], &ALL, 0.5), None);
    }
}
