//! The float formats of tensors; 16-bit ones as bit patterns.

use super::Dtype;

/// A [`Dtype`] that is a float.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// bfloat16.
    Bf16,
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl Float {
    /// `None` for an integer type.
    pub fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::Bf16 => Some(Self::Bf16),
            Dtype::F16 => Some(Self::F16),
            Dtype::F32 => Some(Self::F32),
            Dtype::U8 | Dtype::U32 => None,
        }
    }

    /// Bytes an element.
    pub fn len_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Little-endian elements → f32: exact.
    ///
    /// # Panics
    /// If the lengths do not match.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), out.len() * self.len_bytes());
        match self {
            Self::Bf16 => {
                for (&element, out) in bytes.as_chunks().0.iter().zip(out) {
                    *out = bf16_to_f32(u16::from_le_bytes(element));
                }
            }
            Self::F16 => {
                for (&element, out) in bytes.as_chunks().0.iter().zip(out) {
                    *out = f16_to_f32(u16::from_le_bytes(element));
                }
            }
            Self::F32 => {
                for (&element, out) in bytes.as_chunks().0.iter().zip(out) {
                    *out = f32::from_le_bytes(element);
                }
            }
        }
    }
}

/// Index of the first NaN or infinity.
pub fn first_non_finite(values: &[f32]) -> Option<usize> {
    // No early exit: the loop vectorises, and the answer is nearly always "none".
    let finite = values.iter().fold(true, |finite, value| finite & value.is_finite());
    if finite { None } else { values.iter().position(|value| !value.is_finite()) }
}

/// bfloat16 → f32: exact.
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// f32 → bfloat16, to nearest, ties to even; NaN stays NaN.
pub fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    let round = 0x7fff + ((bits >> 16) & 1);
    // Cannot carry past the sign: the largest finite pattern rounds to infinity's.
    ((bits + round) >> 16) as u16
}

/// IEEE half → f32: exact.
pub fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);
    // Exponent and fraction land in f32's fields, 112 too low in the exponent; multiplying by
    // 2^112 corrects it, subnormals included. An all-ones exponent must stay all ones.
    let value = if magnitude >= 0x7c00 {
        f32::from_bits((magnitude << 13) | 0x7f80_0000)
    } else {
        f32::from_bits(magnitude << 13) * f32::from_bits((127 + 112) << 23)
    };
    f32::from_bits(value.to_bits() | sign)
}

/// f32 → IEEE half, to nearest, ties to even; past the range infinity, NaN stays NaN.
pub fn f32_to_f16(value: f32) -> u16 {
    let sign = (value.to_bits() >> 16) as u16 & 0x8000;
    let magnitude = value.abs();
    if value.is_nan() {
        return sign | 0x7e00;
    }
    let bits = if magnitude < f32::from_bits((127 - 14) << 23) {
        // Subnormal: adding 0.5 aligns a unit of the half (2^−24) with f32's last place.
        ((magnitude + 0.5).to_bits() - 0.5f32.to_bits()) as u16
    } else {
        // Thirteen fraction bits go; the exponent's bias is 112 less. A carry moves on into it.
        let bits = magnitude.to_bits();
        let rounded = bits + 0x0fff + (bits >> 13 & 1);
        ((rounded - (112 << 23)) >> 13).min(0x7c00) as u16
    };
    sign | bits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_the_upper_half_of_f32() {
        assert_eq!(bf16_to_f32(0x3f80), 1.0);
        assert_eq!(bf16_to_f32(0xc040), -3.0);
        for bits in 0..=u16::MAX {
            let value = bf16_to_f32(bits);
            if value.is_nan() {
                assert!(bf16_to_f32(f32_to_bf16(value)).is_nan());
            } else {
                assert_eq!(f32_to_bf16(value), bits);
            }
        }
    }

    #[test]
    fn bf16_rounds_ties_to_even() {
        assert_eq!(f32_to_bf16(0.543_333_3), f32_to_bf16(0.542_968_75));
        // 1 + 2^-8 lies between 1 (even) and 1 + 2^-7; 1 + 3·2^-8 between odd and even.
        assert_eq!(f32_to_bf16(1.0 + 0.003_906_25), 0x3f80);
        assert_eq!(f32_to_bf16(1.0 + 0.011_718_75), 0x3f82);
        assert_eq!(f32_to_bf16(f32::MAX), 0x7f80);
        assert_eq!(f32_to_bf16(-0.0), 0x8000);
    }

    #[test]
    fn every_half_has_its_value() {
        for bits in 0..=u16::MAX {
            let (exponent, fraction) = ((bits >> 10) & 31, f64::from(bits & 1023));
            let magnitude = match exponent {
                0 => fraction * 2f64.powi(-24),
                31 if fraction == 0.0 => f64::INFINITY,
                31 => f64::NAN,
                _ => (1024.0 + fraction) * 2f64.powi(i32::from(exponent) - 25),
            };
            let expected = if bits & 0x8000 == 0 { magnitude } else { -magnitude };
            let found = f64::from(f16_to_f32(bits));
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{bits:#06x}");
            assert_eq!(found.is_sign_negative(), bits & 0x8000 != 0, "{bits:#06x}");
        }
    }

    #[test]
    fn rounding_to_half() {
        // Every half is itself, and stays it up to the middle to its neighbours.
        for bits in 0..0x7c00u16 {
            let value = f16_to_f32(bits);
            assert_eq!(f32_to_f16(value), bits);
            assert_eq!(f32_to_f16(-value), bits | 0x8000);
            if bits < 0x7bff {
                let middle = (value + f16_to_f32(bits + 1)) / 2.0;
                assert_eq!(f32_to_f16(middle), bits + (bits & 1), "{bits:#x}");
                assert_eq!(f32_to_f16(middle.next_down()), bits);
                assert_eq!(f32_to_f16(middle.next_up()), bits + 1);
            }
        }
        assert_eq!(f32_to_f16(65_519.0), 0x7bff);
        assert_eq!(f32_to_f16(65_520.0), 0x7c00);
        assert_eq!(f32_to_f16(1e30), 0x7c00);
        assert_eq!(f32_to_f16(f32::NEG_INFINITY), 0xfc00);
        assert!(f16_to_f32(f32_to_f16(f32::NAN)).is_nan());
        assert_eq!(f32_to_f16(1e-30), 0);
    }
}
