//! `kv`: keys and values as the KV cache holds them.

use crate::quantize_absmax::quantize_absmax;

/// How a KV cache holds the values of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// As they are.
    F32,
    /// IEEE half, see [`f16_bits`].
    F16,
    /// int8 with one scale a head and position, by [`quantize_absmax`].
    Int8,
}

/// One head's key or value at one position, as the cache gives it back.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredHead {
    /// `[D]`: what is multiplied; codes where the format has them.
    pub values: Vec<f32>,
    /// Multiplies `values` back to real ones; 1 where the format has no scale.
    pub scale: f32,
}

/// What the cache gives back of a head's `x[D]`.
pub fn store_head(x: &[f32], format: KvFormat) -> StoredHead {
    match format {
        KvFormat::F32 => StoredHead { values: x.to_vec(), scale: 1.0 },
        KvFormat::F16 => {
            let values = x.iter().map(|&value| f16_value(f16_bits(value))).collect();
            StoredHead { values, scale: 1.0 }
        }
        KvFormat::Int8 => {
            let quantized = quantize_absmax(x);
            let values = quantized.codes.iter().map(|&code| f32::from(code)).collect();
            StoredHead { values, scale: quantized.act_scale }
        }
    }
}

/// The bits of the nearest IEEE half, ties to even; magnitudes that round below the smallest normal
/// half, 2⁻¹⁴, become a zero of their sign, because GPUs may flush them; 65,520 and above become
/// infinite, and NaN stays NaN.
pub fn f16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00;
    }
    // Ties to even in the 13 bits that are dropped; a carry runs into the exponent as it should.
    let rounded = magnitude + 0x0fff + (magnitude >> 13 & 1);
    if rounded >= 0x4780_0000 {
        return sign | 0x7c00;
    }
    if rounded < 0x3880_0000 {
        return sign;
    }
    sign | ((rounded - 0x3800_0000) >> 13) as u16
}

/// The value of half bits that [`f16_bits`] makes: zeros, normal numbers, infinities, NaN.
pub fn f16_value(bits: u16) -> f32 {
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff) << 13;
    f32::from_bits(match bits & 0x7c00 {
        0 => sign,
        0x7c00 => sign | 0x7f80_0000 | magnitude & 0x007f_ffff,
        _ => sign | (magnitude + 0x3800_0000),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_to_even_and_flush() {
        for (value, bits) in [
            (0.0f32, 0u16),
            (-0.0, 0x8000),
            (1.0, 0x3c00),
            (-2.0, 0xc000),
            (65504.0, 0x7bff),
            (65519.0, 0x7bff),
            (65520.0, 0x7c00),
            (f32::NEG_INFINITY, 0xfc00),
            // Between 1 and 1 + 2⁻¹⁰: the tie goes to 1, the next tie to 1 + 2·2⁻¹⁰.
            (1.0 + 0.5 / 1024.0, 0x3c00),
            (1.0 + 1.5 / 1024.0, 0x3c02),
            // 2⁻¹⁴ and the largest f32 below it that does not round up to it.
            (6.103_515_6e-5, 0x0400),
            (6.0e-5, 0),
            (-1e-30, 0x8000),
        ] {
            assert_eq!(f16_bits(value), bits, "{value}");
        }
        assert_eq!(f16_bits(f32::NAN) & 0x7fff, 0x7e00);
    }

    #[test]
    fn every_half_comes_back() {
        for bits in 0..=u16::MAX {
            let is_subnormal = bits & 0x7c00 == 0 && bits & 0x03ff != 0;
            let value = f16_value(bits);
            if is_subnormal {
                assert_eq!(value.to_bits() << 1, 0);
            } else if value.is_nan() {
                assert_eq!(f16_bits(value) & 0x7fff, 0x7e00);
            } else {
                assert_eq!(f16_bits(value), bits);
            }
        }
        assert_eq!(f16_value(0x3555), 0.333_251_95);
    }

    #[test]
    fn int8_has_a_scale() {
        let stored = store_head(&[0.5, -1.0, 0.25, 2.0], KvFormat::Int8);
        assert_eq!(stored.values, [32.0, -64.0, 16.0, 127.0]);
        assert_eq!(stored.scale, 2.0 / 127.0);
    }
}
