//! `exp`: one exponential for every backend.
//!
//! WGSL's own is only accurate to 3 + 2|x| ULP, and differs from driver to driver. This one uses
//! additions, products and bit operations in a fixed order, so that every backend gets the same
//! bits where the hardware rounds products and sums apart.

/// Below this the result is 0 (e^x would be subnormal).
pub const EXP_MIN: f32 = -87.0;
/// Above this the result is that of `EXP_MAX` (e^x would overflow).
pub const EXP_MAX: f32 = 88.0;

/// e^x with a relative error below 2e-7 + 1.2e-7·|x|; NaN stays NaN.
///
/// `e^x = 2^n · 2^f` with `n` the integer nearest to `x/ln 2` and `f` the rest, 2^f by its Taylor
/// polynomial of degree 7. A reduction by two parts of ln 2 would be more accurate for large |x|,
/// but shader compilers merge the parts.
pub fn exp(x: f32) -> f32 {
    if x < EXP_MIN {
        return 0.0;
    }
    let x = if x > EXP_MAX { EXP_MAX } else { x };
    let t = x * std::f32::consts::LOG2_E;
    let n = (t + 0.5).floor();
    let f = t - n;
    let mut p = 1.525_273_4e-5;
    p = p * f + 1.540_353e-4;
    p = p * f + 1.333_355_8e-3;
    p = p * f + 9.618_129e-3;
    p = p * f + 5.550_411e-2;
    p = p * f + 2.402_265e-1;
    p = p * f + 6.931_472e-1;
    p = p * f + 1.0;
    // n is −126 to 127 here, or NaN, which casts to 0 and leaves p NaN.
    p * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accurate_over_the_whole_range() {
        let mut x = -86.9f32;
        while x < 88.0 {
            let expected = f64::from(x).exp();
            let relative = (f64::from(exp(x)) / expected - 1.0).abs();
            let bound = 2e-7 + 1.2e-7 * f64::from(x.abs());
            assert!(relative < bound, "e^{x}: {relative:e}");
            x += 0.00731;
        }
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-88.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }
}
