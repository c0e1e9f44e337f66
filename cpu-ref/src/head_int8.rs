//! The int8 LM head: approximate logits at half the bytes, and the exact greedy token from them.
//!
//! A row of the head is int8 codes with one scale, the input is 16-bit codes with one scale, and a
//! logit is an exact integer times both scales. How far it can be from the exact logit is known for
//! each row ([`bounds`]), so only the rows that may be the greedy one need the exact table
//! (`head_input`, `head_int8`, `head_rerank`, `head_pick`).
//!
//! Six bits of a code do as well, with wider bounds: see [`coarse`]. The CPU chooses greedy tokens by
//! those, and draws others by all eight.

use crate::argmax::argmax;
use crate::reduce::{NORM_LANES, lane_sum};

/// Most columns: [`gamma`] counts on it.
pub const MAX_K: usize = 32_768;

/// Smallest largest magnitude of a row or an input whose products stay in the normal range.
pub const LEAST: f32 = 1.0 / (1u64 << 40) as f32;

/// What belongs to a row beside its codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Row {
    /// Multiplies a code back to a weight; NaN if a weight is not finite.
    pub scale: f32,
    /// At least `‖w − scale·q‖₂`.
    pub error: f32,
    /// At least `‖w‖₂`.
    pub norm: f32,
}

/// One row's weights → codes: `scale = absmax/127`, `q = clamp(round_half_even(w/scale), ±127)`.
///
/// Rows whose largest weight is below 2⁻⁴⁰ have scale and codes 0, and all of it is error. A weight
/// that is not finite makes scale NaN and both norms infinite. A device may take weights below
/// `least_normal` for 0: the error covers that, too.
pub fn quantize_row(w: &[f32], least_normal: f32, codes: &mut [i8]) -> Row {
    assert_eq!(w.len(), codes.len());
    let absmax = w.iter().map(|value| value.abs().to_bits()).max().unwrap_or(0);
    let absmax = f32::from_bits(absmax);
    codes.fill(0);
    if !absmax.is_finite() {
        return Row { scale: f32::NAN, error: f32::INFINITY, norm: f32::INFINITY };
    }
    let norm = norm_of(w.iter().map(|&value| f64::from(value)));
    if absmax == 0.0 {
        return Row { scale: 0.0, error: 0.0, norm: 0.0 };
    }
    if absmax < LEAST {
        let norm = up(norm).max(LEAST);
        return Row { scale: 0.0, error: norm, norm };
    }
    let scale = absmax / 127.0;
    for (code, &value) in codes.iter_mut().zip(w) {
        *code = (value / scale).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    let rest = |(&value, &code): (&f32, &i8)| f64::from(value) - f64::from(scale) * f64::from(code);
    let error = norm_of(w.iter().zip(codes.iter()).map(rest));
    let is_subnormal = |value: &f64| value.abs() < f64::from(least_normal);
    let flushed = norm_of(w.iter().map(|&value| f64::from(value)).filter(is_subnormal));
    Row { scale, error: up(error + flushed), norm: up(norm) }
}

/// What [`quantize_row`] found, for logits of [`coarse_sums`]: the error is `‖w − scale·d/2‖₂`.
pub fn coarse_row(w: &[f32], least_normal: f32, row: Row, codes: &[i8]) -> Row {
    if !row.scale.is_normal() {
        return row;
    }
    let rest = |(&value, &code): (&f32, &i8)| {
        f64::from(value) - f64::from(row.scale) * f64::from(middle(code)) / 2.0
    };
    let error = norm_of(w.iter().zip(codes).map(rest));
    let is_subnormal = |value: &f64| value.abs() < f64::from(least_normal);
    let flushed = norm_of(w.iter().map(|&value| f64::from(value)).filter(is_subnormal));
    Row { error: up(error + flushed), ..row }
}

/// The upper six bits of `q + 128`.
pub fn coarse(code: i8) -> u8 {
    (code as u8 ^ 128) >> 2
}

/// The lower two bits of `q + 128`: `q = 4·coarse + rest − 128`.
pub fn rest(code: i8) -> u8 {
    code as u8 & 3
}

/// `d = 8·coarse − 253`: twice the mean of the four codes with these six bits.
pub fn middle(code: i8) -> i32 {
    8 * i32::from(coarse(code)) - 253
}

fn norm_of(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|value| value * value).sum::<f64>().sqrt()
}

/// The next f32 that is no less, after a little for the rounding of the f64 sums.
fn up(value: f64) -> f32 {
    let value = value * (1.0 + 1e-9);
    let nearest = value as f32;
    if f64::from(nearest) < value { nearest.next_up() } else { nearest }
}

/// The head's input in 16 bits: `v = 256·hi + lo`.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// High limbs, −127..=127.
    pub hi: Vec<i8>,
    /// Low limbs.
    pub lo: Vec<i8>,
    /// A power of two, or 0 for an input below 2⁻¹⁰⁰; NaN if a value is not finite.
    pub scale: f32,
    /// At least `‖x‖₂` and `‖scale·v‖₂`; infinite where f32 might not hold what is made with it.
    pub bound: f32,
    /// What a row's norm is multiplied with in its margin: `½√K·scale + gamma(K)·bound`.
    pub rest: f32,
    /// Sums of the high and of the low limbs.
    pub sums: [i32; 2],
}

/// The normalised hidden state → [`Input`]: `scale` is the smallest power of two with
/// `max |x| ≤ 32512·scale` (127·256), `v = round_half_even(x/scale)`.
///
/// Division by a power of two is exact, so the codes are the same on every device.
pub fn quantize_input(x: &[f32]) -> Input {
    let absmax = x.iter().map(|value| value.abs().to_bits()).max().unwrap_or(0);
    let absmax = f32::from_bits(absmax);
    let mut input = Input {
        hi: vec![0; x.len()],
        lo: vec![0; x.len()],
        scale: if absmax.is_finite() { 0.0 } else { f32::NAN },
        bound: f32::INFINITY,
        rest: f32::INFINITY,
        sums: [0; 2],
    };
    if !absmax.is_finite() || absmax < 2f32.powi(-100) {
        return input;
    }
    input.scale = 2f32.powi(-126);
    while absmax > 32512.0 * input.scale {
        input.scale *= 2.0;
    }
    let limbs = input.hi.iter_mut().zip(&mut input.lo);
    for ((hi, lo), &value) in limbs.zip(x) {
        let v = (value / input.scale).round_ties_even() as i32;
        *hi = (v + 128).div_euclid(256) as i8;
        *lo = (v - 256 * i32::from(*hi)) as i8;
    }
    input.sums =
        [&input.hi, &input.lo].map(|limbs| limbs.iter().map(|&limb| i32::from(limb)).sum());
    if (LEAST..=1.0 / LEAST).contains(&absmax) {
        let half_step = input.scale * half_sqrt(x.len());
        let squares = lane_sum::<NORM_LANES>(x.iter().map(|&value| value * value));
        input.bound = squares.sqrt() * (1.0 + gamma(x.len())) + half_step;
        input.rest = half_step + gamma(x.len()) * input.bound;
    }
    input
}

/// `½√K`, rounded up.
pub fn half_sqrt(k: usize) -> f32 {
    up((k as f64).sqrt() / 2.0)
}

/// Error of the exact head's f32 sum and of the approximate logit's few operations, as a share of
/// `‖w‖₂·‖x‖₂`: `(K + K/256 + 64)·2⁻²³`.
///
/// A sum of K products in f32 is off by at most `K·u/(1 − K·u)` of `Σ|w·x| ≤ ‖w‖·‖x‖`, in any order;
/// u is 2⁻²³ for any rounding mode, and K/256 covers the denominator for K up to [`MAX_K`].
pub fn gamma(k: usize) -> f32 {
    assert!(k <= MAX_K);
    up((k as f64 * (1.0 + 1.0 / 256.0) + 64.0) / (1 << 23) as f64)
}

/// `[Σ_k q[k]·hi[k], Σ_k q[k]·lo[k]]`.
pub fn sums(codes: &[i8], x: &Input) -> [i32; 2] {
    assert_eq!(codes.len(), x.hi.len());
    let dot =
        |limbs: &[i8]| codes.iter().zip(limbs).map(|(&a, &b)| i32::from(a) * i32::from(b)).sum();
    [dot(&x.hi), dot(&x.lo)]
}

/// The approximate logit: `row.scale·(x.scale·(256·S_hi + S_lo))`, each operation in f32.
pub fn logit(row: Row, x: &Input, [hi, lo]: [i32; 2]) -> f32 {
    row.scale * (x.scale * (256.0 * hi as f32 + lo as f32))
}

/// `[Σ_k d[k]·hi[k], Σ_k d[k]·lo[k]]` of the codes' [`middle`]s.
pub fn coarse_sums(codes: &[i8], x: &Input) -> [i32; 2] {
    assert_eq!(codes.len(), x.hi.len());
    let dot = |limbs: &[i8]| codes.iter().zip(limbs).map(|(&q, &b)| middle(q) * i32::from(b)).sum();
    [dot(&x.hi), dot(&x.lo)]
}

/// `[Σ_k (2·rest − 3)·hi[k], Σ_k (2·rest − 3)·lo[k]]`: what the codes are twice above their [`middle`]s' half.
pub fn rest_sums(codes: &[i8], x: &Input) -> [i32; 2] {
    let above = |code: i8| 2 * i32::from(rest(code)) - 3;
    let dot = |limbs: &[i8]| codes.iter().zip(limbs).map(|(&q, &b)| above(q) * i32::from(b)).sum();
    [dot(&x.hi), dot(&x.lo)]
}

/// The approximate logit of [`coarse_sums`], for [`bounds`] with a [`coarse_row`]:
/// `row.scale·(x.scale·(128·S_hi + ½·S_lo))`, each operation in f32. With that of [`rest_sums`] it makes,
/// in one more, the approximate logit of all eight bits.
pub fn coarse_logit(row: Row, x: &Input, [hi, lo]: [i32; 2]) -> f32 {
    row.scale * (x.scale * (128.0 * hi as f32 + 0.5 * lo as f32))
}

/// Lower and upper bound of the exact logit in f32, computed in any order; `None` if there is none.
///
/// With `w·x = s·q·x_scale·v + (w − s·q)·x_scale·v + w·(x − x_scale·v)` and Cauchy–Schwarz they are
/// `error·bound + norm·rest` away from the approximate one.
pub fn bounds(row: Row, x: &Input, logit: f32) -> Option<[f32; 2]> {
    margin(row, x).map(|margin| [logit - margin, logit + margin])
}

/// How far the exact logit can be from the approximate one; `None` if there is no bound.
pub fn margin(row: Row, x: &Input) -> Option<f32> {
    // Where this is finite and less than 2¹⁰⁰, no sum overflows.
    let reach = row.norm * x.bound;
    if reach.is_nan() || reach > 2f32.powi(100) {
        return None;
    }
    Some((row.error * x.bound + row.norm * x.rest) * 1.000_001)
}

/// The repetition penalty of a token that was seen: monotone in the logit.
pub fn penalised(logit: f32, penalty: f32) -> f32 {
    if logit > 0.0 { logit / penalty } else { logit * penalty }
}

/// A greedy choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The token; `None` if a logit is NaN.
    pub token: Option<usize>,
    /// How many exact logits it took.
    pub candidates: usize,
}

/// The argmax of the exact logits, with the penalty of those that were seen, from the approximate
/// ones with their bounds: `exact(n)` is asked only for the rows that may be the largest.
pub fn greedy(
    bounds: &[Option<[f32; 2]>],
    seen: impl Fn(usize) -> bool,
    penalty: f32,
    exact: impl Fn(usize) -> f32,
) -> Choice {
    let with_penalty = |n, logit| if seen(n) { penalised(logit, penalty) } else { logit };
    // A millionth more than what the rounding of difference and penalty can take away.
    let widened = |n: usize, [lower, upper]: [f32; 2]| {
        let (lower, upper) = (with_penalty(n, lower), with_penalty(n, upper));
        [lower - lower.abs() * 1e-6, upper + upper.abs() * 1e-6]
    };
    let bounds: Vec<_> =
        bounds.iter().enumerate().map(|(n, bounds)| bounds.map(|b| widened(n, b))).collect();
    let least = bounds.iter().flatten().map(|b| b[0]).fold(f32::NEG_INFINITY, f32::max);
    let is_candidate = |n: &usize| bounds[*n].is_none_or(|[_, upper]| upper >= least);
    let rows: Vec<usize> = (0..bounds.len()).filter(is_candidate).collect();
    let logits: Vec<f32> = rows.iter().map(|&n| with_penalty(n, exact(n))).collect();
    Choice { token: argmax(&logits).map(|at| rows[at]), candidates: rows.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in −1..1 that differ from one another.
    fn numbers(len: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn worked_example() {
        let mut codes = [0; 3];
        let row = quantize_row(&[1.27, -0.5, 0.004], 0.0, &mut codes);
        assert_eq!(codes, [127, -50, 0]);
        assert!((row.error - 0.004).abs() < 1e-6 && row.norm > 1.364 && row.norm < 1.365);
        let x = quantize_input(&[127.0, -1.0, 0.0]);
        assert_eq!((x.scale, &x.hi[..], &x.lo[..]), (1.0 / 256.0, &[127, -1, 0][..], &[0; 3][..]));
        assert_eq!(sums(&codes, &x), [127 * 127 + 50, 0]);
        assert_eq!(logit(row, &x, sums(&codes, &x)), row.scale * (127.0 * 127.0 + 50.0));
    }

    #[test]
    fn limbs_at_the_edges() {
        // 32512 steps are the most that a scale takes.
        for (absmax, scale) in [(32512.0, 1.0), (32513.0, 2.0), (16256.0, 0.5), (16257.0, 1.0)] {
            let x = quantize_input(&[-absmax, absmax, 128.0 * scale, -129.0 * scale]);
            assert_eq!(x.scale, scale, "{absmax}");
            let v = |k: usize| 256 * i32::from(x.hi[k]) + i32::from(x.lo[k]);
            assert_eq!([v(2), v(3)], [128, -129]);
            assert_eq!(v(0), -v(1));
        }
    }

    #[test]
    fn the_bounds_hold() {
        for (seed, k) in [1, 3, 16, 129, 2560].into_iter().enumerate() {
            let mut x = numbers(k, seed as u32);
            x[k / 2] *= 50.0;
            let x_codes = quantize_input(&x);
            let x_norm = norm_of(x.iter().map(|&value| f64::from(value)));
            assert!(f64::from(x_codes.bound) >= x_norm && f64::from(x_codes.bound) < 1.01 * x_norm);
            for magnitude in [1e-30, 1e-9, 1.0, 1e20] {
                let mut w: Vec<f32> = numbers(k, 77).iter().map(|w| w * magnitude).collect();
                w[0] *= 10.0;
                let mut codes = vec![0; k];
                let row = quantize_row(&w, 0.0, &mut codes);
                let [lower, upper] =
                    bounds(row, &x_codes, logit(row, &x_codes, sums(&codes, &x_codes))).unwrap();
                let exact: f64 = w.iter().zip(&x).map(|(&w, &x)| f64::from(w) * f64::from(x)).sum();
                assert!((f64::from(lower)..=f64::from(upper)).contains(&exact), "{k} {magnitude}");
                // Below the trivial bound, but for rows that have no codes.
                let trivial = f64::from(row.norm) * x_norm;
                assert!(magnitude < 1e-12 || f64::from(upper - lower) < 0.05 * trivial);

                let row = coarse_row(&w, 0.0, row, &codes);
                let logit = coarse_logit(row, &x_codes, coarse_sums(&codes, &x_codes));
                let [lower, upper] = bounds(row, &x_codes, logit).unwrap();
                assert!((f64::from(lower)..=f64::from(upper)).contains(&exact), "{k} {magnitude}");
                assert!(magnitude < 1e-12 || f64::from(upper - lower) < 0.2 * trivial);
                let whole = logit + coarse_logit(row, &x_codes, rest_sums(&codes, &x_codes));
                let row = quantize_row(&w, 0.0, &mut codes);
                let [lower, upper] = bounds(row, &x_codes, whole).unwrap();
                assert!((f64::from(lower)..=f64::from(upper)).contains(&exact), "{k} {magnitude}");
            }
        }
    }

    #[test]
    fn six_bits_of_a_code() {
        for code in -127..=127i8 {
            let (coarse, rest) = (i32::from(coarse(code)), i32::from(rest(code)));
            assert_eq!(4 * coarse + rest - 128, i32::from(code));
            assert!((0..64).contains(&coarse) && (0..4).contains(&rest));
            assert!((2 * i32::from(code) - middle(code)).abs() <= 3);
        }
        // 127 is one of 124..=127, −50 of −52..=−49, 0 of 0..=3.
        let (w, mut codes) = ([1.27, -0.5, 0.0], [0; 3]);
        let row = quantize_row(&w, 0.0, &mut codes);
        assert_eq!(codes.map(middle), [251, -101, 3]);
        let coarse = coarse_row(&w, 0.0, row, &codes);
        assert_eq!((coarse.scale, coarse.norm), (row.scale, row.norm));
        let expected = f32::sqrt(1.5 * 1.5 + 0.5 * 0.5 + 1.5 * 1.5) * 0.01;
        assert!((coarse.error - expected).abs() < 1e-6, "{} {expected}", coarse.error);
        let x = quantize_input(&[127.0, -1.0, 0.0]);
        assert_eq!(coarse_sums(&codes, &x), [251 * 127 + 101, 0]);
        let logit = coarse_logit(coarse, &x, coarse_sums(&codes, &x));
        assert_eq!(logit, row.scale * (125.5 * 127.0 + 50.5));
        assert_eq!(rest_sums(&codes, &x), [3 * 127 - 1, 0]);
        // Rows without codes keep their error.
        for w in [[0.0; 3], [1e-30; 3], [f32::NAN; 3]] {
            let row = quantize_row(&w, 0.0, &mut codes);
            let same = |a: Row, b: Row| {
                [a.scale, a.error, a.norm].map(f32::to_bits)
                    == [b.scale, b.error, b.norm].map(f32::to_bits)
            };
            assert!(same(coarse_row(&w, 0.0, row, &codes), row), "{w:?}");
        }
    }

    #[test]
    fn what_has_no_bound() {
        let mut codes = [1; 2];
        for w in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let row = quantize_row(&[1.0, w], 0.0, &mut codes);
            assert!(row.scale.is_nan() && codes == [0; 2]);
            assert_eq!(bounds(row, &quantize_input(&[1.0, 1.0]), 0.0), None);
        }
        let row = quantize_row(&[1.0, 2.0], 0.0, &mut codes);
        for x in [f32::NAN, f32::INFINITY, 1e20] {
            assert_eq!(bounds(row, &quantize_input(&[1.0, x]), 0.0), None, "{x}");
        }
        assert_eq!(bounds(row, &quantize_input(&[0.0, 0.0]), 0.0), None);
    }

    #[test]
    fn weights_that_a_device_may_flush_are_error() {
        let mut codes = [0; 2];
        let least_normal = 2f32.powi(-14);
        let row = quantize_row(&[1.0, 3e-5], least_normal, &mut codes);
        assert!(row.error >= 6e-5);
        assert!(quantize_row(&[1.0, 3e-5], 0.0, &mut codes).error < 3.1e-5);
    }

    #[test]
    fn greedy_asks_only_for_candidates() {
        let bounds = [Some([0.0, 1.0]), Some([2.0, 3.0]), Some([2.5, 3.5]), None, Some([2.5, 2.6])];
        let exact = [f32::NAN, 2.9, 2.8, -7.0, 2.5];
        let choose =
            |seen: fn(usize) -> bool, penalty| greedy(&bounds, seen, penalty, |n| exact[n]);
        assert_eq!(choose(|_| false, 2.0), Choice { token: Some(1), candidates: 4 });
        // Row 1 is between 1 and 1.5 then, out of the race.
        assert_eq!(choose(|n| n == 1, 2.0), Choice { token: Some(2), candidates: 3 });
        // So are all but row 4, and row 0 is in it.
        assert_eq!(choose(|n| n != 4, 0.5), Choice { token: Some(1), candidates: 3 });
        let nan = greedy(&bounds, |_| false, 1.0, |_| f32::NAN);
        assert_eq!(nan.token, None);
    }
}
