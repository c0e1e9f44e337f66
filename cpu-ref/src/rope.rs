//! `rope`: rotary position embedding, half-split ("NeoX") form.

/// How a model stretches its rotary frequencies beyond the context it was first trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// Divides every frequency.
        factor: f32,
    },
    /// YaRN: low frequencies divided by `factor`, high ones kept, a ramp between. Source: Peng et
    /// al. 2023, arXiv:2309.00071; transformers `modeling_rope_utils.py`.
    Yarn {
        /// Context after stretching / before.
        factor: f32,
        /// Context before stretching.
        original_context: f32,
        /// Dimensions that turn more often than this over the original context are kept.
        beta_fast: f32,
        /// Dimensions that turn less often than this are divided.
        beta_slow: f32,
        /// Multiplies cosine and sine: `0.1·ln(factor) + 1` unless the model says otherwise.
        attention_factor: f32,
    },
    /// Llama 3.1: wavelengths above `original_context/low_freq_factor` divided by `factor`, those
    /// below `original_context/high_freq_factor` kept, a ramp between. Source: transformers
    /// `modeling_rope_utils.py`.
    Llama3 {
        /// Divides low frequencies.
        factor: f32,
        /// Where division begins.
        low_freq_factor: f32,
        /// Where it ends.
        high_freq_factor: f32,
        /// Context before stretching.
        original_context: f32,
    },
}

impl Scaling {
    /// YaRN's `attention_factor` where the model gives none.
    pub fn yarn_attention_factor(factor: f32) -> f32 {
        if factor <= 1.0 { 1.0 } else { 0.1 * f64::from(factor).ln() as f32 + 1.0 }
    }
}

/// What [`angles`] needs of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Radians a position, `[D/2]`.
    pub inv_freq: Vec<f32>,
    /// Multiplies cosine and sine.
    pub attention_factor: f32,
}

/// `inv_freq[i] = theta^(−2i/D)` for `i < D/2`, in f32 as the published code computes it, and then
/// scaled.
///
/// The power alone is taken in f64 and rounded: the f32 power functions of platforms differ in the last
/// bit, and so would the texts that a browser and a program make of one model.
///
/// Source: Su et al. 2021, arXiv:2104.09864; transformers `modeling_rope_utils.py`.
pub fn frequencies(theta: f32, head_dim: usize, scaling: Scaling) -> Frequencies {
    let dim = head_dim as f32;
    let power = |exponent: f32| f64::from(theta).powf(f64::from(exponent)) as f32;
    let plain = (0..head_dim / 2).map(|i| 1.0 / power((2 * i) as f32 / dim));
    let (inv_freq, attention_factor) = match scaling {
        Scaling::None => (plain.collect(), 1.0),
        Scaling::Linear { factor } => (plain.map(|inv| inv / factor).collect(), 1.0),
        Scaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
            // The dimension that turns `rotations` times over the original context.
            let dimension = |rotations: f32| {
                let turns = original_context / (rotations * 2.0 * std::f32::consts::PI);
                dim * turns.ln() / (2.0 * theta.ln())
            };
            let low = dimension(beta_fast).floor().max(0.0);
            let high = dimension(beta_slow).ceil().min(dim - 1.0);
            let width = if low == high { 0.001 } else { high - low };
            let scaled = plain.enumerate().map(|(i, inv)| {
                let ramp = ((i as f32 - low) / width).clamp(0.0, 1.0);
                inv / factor * ramp + inv * (1.0 - ramp)
            });
            (scaled.collect(), attention_factor)
        }
        Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let scaled = plain.map(|inv| {
                let wavelength = 2.0 * std::f32::consts::PI / inv;
                if wavelength > original_context / low_freq_factor {
                    return inv / factor;
                }
                if wavelength < original_context / high_freq_factor {
                    return inv;
                }
                let smooth = (original_context / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * inv / factor + smooth * inv
            });
            (scaled.collect(), 1.0)
        }
    };
    Frequencies { inv_freq, attention_factor }
}

/// `(cos, sin)` of `position · inv_freq[i]`, times the attention factor, each `[D/2]`.
///
/// The angle is rounded to f32 first, then its cosine and sine are taken in f64.
pub fn angles(position: usize, frequencies: &Frequencies) -> (Vec<f32>, Vec<f32>) {
    let inv_freq = frequencies.inv_freq.iter();
    inv_freq.map(|&frequency| angle(position, frequency, frequencies.attention_factor)).unzip()
}

/// One pair of [`angles`].
pub fn angle(position: usize, frequency: f32, attention_factor: f32) -> (f32, f32) {
    let angle = f64::from(position as f32 * frequency);
    (angle.cos() as f32 * attention_factor, angle.sin() as f32 * attention_factor)
}

/// Rotates one head in place: for `i < D/2`,
/// `(x[i], x[i+D/2]) → (x[i]·cos − x[i+D/2]·sin, x[i+D/2]·cos + x[i]·sin)`.
pub fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    assert!(head.len() == 2 * half && cos.len() == half && sin.len() == half);
    for i in 0..half {
        let (a, b) = (head[i], head[i + half]);
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_example() {
        let (cos, sin) = angles(1, &frequencies(10_000.0, 4, Scaling::None));
        let mut head = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut head, &cos, &sin);
        for (found, expected) in head.iter().zip([-1.98411, 1.95990, 2.46238, 4.01980]) {
            assert!((found - expected).abs() < 1e-5, "{head:?}");
        }
    }

    #[test]
    fn position_zero_is_the_identity() {
        let (cos, sin) = angles(0, &frequencies(500_000.0, 8, Scaling::None));
        let mut head = [1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0];
        rotate(&mut head, &cos, &sin);
        assert_eq!(head, [1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0]);
    }

    /// Frequencies and tolerance: the expected values have seven digits.
    fn check(found: &Frequencies, expected: &[(usize, f32)]) {
        for &(i, expected) in expected {
            let found = found.inv_freq[i];
            assert!((found / expected - 1.0).abs() < 2e-6, "{i}: {found} {expected}");
        }
    }

    #[test]
    fn yarn_of_bonsai() {
        let yarn = |original_context| Scaling::Yarn {
            factor: 4.0,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: Scaling::yarn_attention_factor(4.0),
        };
        let small = frequencies(1e6, 128, yarn(8192.0));
        assert!((small.attention_factor - 1.138_629_4).abs() < 1e-6);
        check(
            &small,
            &[
                (17, 0.025_482_97),
                (20, 0.011_570_26),
                (30, 6.567_334e-4),
                (34, 1.623_454e-4),
                (63, 3.102_344e-7),
            ],
        );
        let large = frequencies(1e6, 128, yarn(16_384.0));
        let expected =
            [(20, 0.013_335_21), (30, 8.605_472e-4), (40, 4.445_699e-5), (63, 3.102_344e-7)];
        check(&large, &expected);
        let (cos, sin) = angles(0, &large);
        assert!(cos.iter().all(|&cos| cos == large.attention_factor) && sin == [0.0; 64]);
    }

    #[test]
    fn llama3_keeps_short_waves_and_divides_long_ones() {
        let scaling = Scaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192.0,
        };
        let plain = frequencies(500_000.0, 128, Scaling::None).inv_freq;
        let scaled = frequencies(500_000.0, 128, scaling).inv_freq;
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!((0..64).all(|i| scaled[i] <= plain[i] && scaled[i] >= plain[i] / 8.0));
        let linear = frequencies(500_000.0, 128, Scaling::Linear { factor: 2.0 }).inv_freq;
        assert_eq!(linear[5], plain[5] / 2.0);
    }
}
