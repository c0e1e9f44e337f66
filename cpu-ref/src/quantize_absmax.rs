//! `quantize_absmax`: one token's activations → int8 and one scale.

/// Smallest absmax: an all-zero token quantises to zeros instead of NaN.
pub const ABSMAX_FLOOR: f32 = 1e-5;

/// One token's quantised activations.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    /// `q[K]`, each in −128..=127.
    pub codes: Vec<i8>,
    /// `act_scale = max(absmax, 1e-5) / 127`: multiplies a code back to a real value.
    pub act_scale: f32,
}

/// `q = clamp(round_half_even(x · 127/max(absmax, 1e-5)), −128, 127)`.
///
/// A NaN or infinite input makes `act_scale` NaN or infinite, so that it surfaces in the logits
/// instead of turning into plausible codes. Source: "Training Tips, Code and FAQ", figure 3;
/// transformers `integrations/bitnet.py`, `ActQuant`.
pub fn quantize_absmax(x: &[f32]) -> Quantized {
    // |x| as bits orders like the number, with NaN above infinity: NaN survives the maximum.
    let absmax_bits = x.iter().map(|value| value.abs().to_bits()).max().unwrap_or(0);
    let absmax = f32::from_bits(absmax_bits);
    let absmax = if absmax < ABSMAX_FLOOR { ABSMAX_FLOOR } else { absmax };
    let inv_act_scale = 127.0 / absmax;
    Quantized {
        codes: x.iter().map(|&value| quantize(value, inv_act_scale)).collect(),
        act_scale: absmax / 127.0,
    }
}

/// One activation, given `inv_act_scale = 127/absmax`.
pub fn quantize(value: f32, inv_act_scale: f32) -> i8 {
    (value * inv_act_scale).round_ties_even().clamp(-128.0, 127.0) as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worked_example() {
        let quantized = quantize_absmax(&[0.5, -1.0, 0.25, 2.0]);
        assert_eq!(quantized.codes, [32, -64, 16, 127]);
        assert_eq!(quantized.act_scale, 2.0 / 127.0);
    }

    #[test]
    fn ties_go_to_even() {
        for (value, code) in [(0.5, 0), (-0.5, 0), (1.5, 2), (-1.5, -2), (2.5, 2), (-2.5, -2)] {
            assert_eq!(quantize(value, 1.0), code, "{value}");
        }
    }

    #[test]
    fn zeros_and_tiny_tokens() {
        assert_eq!(quantize_absmax(&[0.0; 3]).codes, [0; 3]);
        // absmax 1e-6 stays below the floor: 127/1e-5 · 1e-6 = 12.7 → 13.
        assert_eq!(quantize_absmax(&[1e-6, -1e-6]).codes, [13, -13]);
    }

    #[test]
    fn non_finite_input_is_not_hidden() {
        assert!(quantize_absmax(&[1.0, f32::NAN]).act_scale.is_nan());
        assert!(quantize_absmax(&[1.0, f32::NEG_INFINITY]).act_scale.is_infinite());
    }
}
