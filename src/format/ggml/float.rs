//! Rows of floats, quantised or not: embeddings, heads and norms.

use crate::format::float::{Float, f16_to_f32};

/// How a row of floats is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 elements: f16 scale d, 16 bytes; element j is the low nibble of byte j, element j + 16
    /// the high one; value d · (nibble − 8).
    Q4_0,
    /// 32 elements: f16 scale d, 32 int8; value d · q.
    Q8_0,
    /// 256 elements: f16 d and dmin, twelve bytes with 6-bit scales and minima for eight groups of
    /// 32, 128 bytes of nibbles; value d · sc · q − dmin · m.
    Q4K,
    /// 256 elements: 128 bytes of low nibbles, 64 of upper bit pairs, sixteen int8 scales for
    /// groups of 16, f16 d; value d · sc · (q − 32).
    Q6K,
}

impl From<Float> for FloatType {
    fn from(float: Float) -> Self {
        match float {
            Float::F32 => Self::F32,
            Float::F16 => Self::F16,
            Float::Bf16 => Self::Bf16,
        }
    }
}

impl FloatType {
    /// Every type.
    pub const ALL: [Self; 7] =
        [Self::F32, Self::F16, Self::Bf16, Self::Q4_0, Self::Q8_0, Self::Q4K, Self::Q6K];

    /// Elements and bytes of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q8_0 => (32, 34),
            Self::Q4K => (256, 144),
            Self::Q6K => (256, 210),
        }
    }

    /// The float format of elements that are not quantised.
    pub fn plain(self) -> Option<Float> {
        match self {
            Self::F32 => Some(Float::F32),
            Self::F16 => Some(Float::F16),
            Self::Bf16 => Some(Float::Bf16),
            Self::Q4_0 | Self::Q8_0 | Self::Q4K | Self::Q6K => None,
        }
    }

    /// Elements that share a scale and a minimum; `None` for floats that are not quantised.
    pub fn group(self) -> Option<usize> {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => None,
            Self::Q4_0 | Self::Q8_0 | Self::Q4K => Some(32),
            Self::Q6K => Some(16),
        }
    }

    /// Bytes of a row of `k` elements; `None` if that is no whole number of blocks, or too many.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        let (elements, bytes) = self.block();
        if k.is_multiple_of(elements) { (k / elements).checked_mul(bytes) } else { None }
    }

    /// A row's K values, bit for bit those of the `gguf` package's `dequantize` (but for the bits
    /// of a NaN). They may be anything: the caller checks them.
    ///
    /// # Panics
    /// If the length is not that of [`FloatType::row_bytes`].
    pub fn decode_row(self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(Some(bytes.len()), self.row_bytes(out.len()), "{self:?}: bytes of a row");
        if let Some(float) = self.plain() {
            return float.decode(bytes, out);
        }
        let (elements, len_bytes) = self.block();
        let mut codes = [0; 256];
        let (mut scales, mut mins) = ([0.0; 16], [0.0; 16]);
        for (block, out) in bytes.chunks_exact(len_bytes).zip(out.chunks_exact_mut(elements)) {
            let codes = &mut codes[..elements];
            self.decode_block(block, codes, &mut scales, &mut mins);
            match self {
                Self::Q4K => combine::<32>(codes, &scales, out, |product, i| product + mins[i]),
                // Adding a minimum of 0 would turn −0 into 0.
                Self::Q6K => combine::<16>(codes, &scales, out, |product, _| product),
                _ => combine::<32>(codes, &scales, out, |product, _| product),
            }
        }
    }

    /// A quantised row as it is: K `codes`, and a `scale` and a `min` for each group of
    /// [`FloatType::group`] elements, such that value = scale · code + min. The minimum is 0 for
    /// all types but Q4_K.
    ///
    /// The product is exact in f32 for every type (at most 11 + 7 + 5 significant bits), so that
    /// the sum is the only rounding, fused or not, and the result is the value of
    /// [`FloatType::decode_row`] except that −0 may become 0.
    ///
    /// # Panics
    /// If the type is not quantised, or the lengths do not match.
    pub fn decode_codes(self, bytes: &[u8], codes: &mut [i8], scale: &mut [f32], min: &mut [f32]) {
        assert_eq!(Some(bytes.len()), self.row_bytes(codes.len()), "{self:?}: bytes of a row");
        let group = self.group().expect("the type is quantised");
        assert_eq!(scale.len(), codes.len() / group, "{self:?}: scales of a row");
        assert_eq!(min.len(), scale.len(), "{self:?}: minima of a row");
        let (elements, len_bytes) = self.block();
        let groups = elements / group;
        for (i, block) in bytes.chunks_exact(len_bytes).enumerate() {
            let of_block = i * groups..(i + 1) * groups;
            self.decode_block(
                block,
                &mut codes[i * elements..][..elements],
                &mut scale[of_block.clone()],
                &mut min[of_block],
            );
        }
    }

    /// One block; the lengths are those of the type, or more for scales and minima.
    #[inline(always)]
    fn decode_block(self, block: &[u8], codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
        match self {
            Self::Q8_0 => {
                scales[0] = half(block, 0);
                mins[0] = 0.0;
                for (code, &byte) in codes.iter_mut().zip(&block[2..]) {
                    *code = byte as i8;
                }
            }
            Self::Q4_0 => {
                scales[0] = half(block, 0);
                mins[0] = 0.0;
                let (low, high) = codes.split_at_mut(16);
                for ((low, high), &byte) in low.iter_mut().zip(high).zip(&block[2..]) {
                    *low = (byte & 15) as i8 - 8;
                    *high = (byte >> 4) as i8 - 8;
                }
            }
            Self::Q4K => decode_q4k(block, codes, scales, mins),
            Self::Q6K => decode_q6k(block, codes, scales, mins),
            Self::F32 | Self::F16 | Self::Bf16 => unreachable!("has no codes"),
        }
    }
}

/// `finish(scale · code, group)` for groups of `GROUP` elements.
#[inline(always)]
fn combine<const GROUP: usize>(
    codes: &[i8],
    scales: &[f32],
    out: &mut [f32],
    finish: impl Fn(f32, usize) -> f32,
) {
    let (codes, out) = (codes.as_chunks::<GROUP>().0, out.as_chunks_mut::<GROUP>().0);
    for (i, ((codes, out), &scale)) in codes.iter().zip(out).zip(scales).enumerate() {
        for (&code, out) in codes.iter().zip(out) {
            *out = finish(scale * f32::from(code), i);
        }
    }
}

fn decode_q4k(block: &[u8], codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
    let (d, dmin) = (half(block, 0), half(block, 2));
    let packed = &block[4..16];
    for j in 0..4 {
        // Groups 0 to 3 have six bits in one byte; groups 4 to 7 have four in the last bytes, and
        // their upper two above those of the group four before.
        let (scale, min, rest) = (packed[j], packed[4 + j], packed[8 + j]);
        scales[j] = d * f32::from(scale & 63);
        mins[j] = -(dmin * f32::from(min & 63));
        scales[4 + j] = d * f32::from(rest & 15 | scale >> 2 & 48);
        mins[4 + j] = -(dmin * f32::from(rest >> 4 | min >> 2 & 48));
    }
    let pairs = codes.as_chunks_mut::<64>().0;
    for (pair, nibbles) in pairs.iter_mut().zip(block[16..].as_chunks::<32>().0) {
        let (low, high) = pair.split_at_mut(32);
        for ((low, high), &byte) in low.iter_mut().zip(high).zip(nibbles) {
            *low = (byte & 15) as i8;
            *high = (byte >> 4) as i8;
        }
    }
}

fn decode_q6k(block: &[u8], codes: &mut [i8], scales: &mut [f32], mins: &mut [f32]) {
    let d = half(block, 208);
    for ((scale, min), &byte) in scales.iter_mut().zip(mins).zip(&block[192..208]) {
        *scale = d * f32::from(byte as i8);
        *min = 0.0;
    }
    let halves = codes.as_chunks_mut::<128>().0;
    let (low, upper) = (block[..128].as_chunks::<64>().0, block[128..192].as_chunks::<32>().0);
    for ((out, low), upper) in halves.iter_mut().zip(low).zip(upper) {
        for l in 0..32 {
            let (a, b, c) = (low[l], low[32 + l], upper[l]);
            let code = |nibble: u8, pair: u8| (nibble | pair << 4) as i8 - 32;
            out[l] = code(a & 15, c & 3);
            out[32 + l] = code(b & 15, c >> 2 & 3);
            out[64 + l] = code(a >> 4, c >> 4 & 3);
            out[96 + l] = code(b >> 4, c >> 6);
        }
    }
}

/// The f16 at byte `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}
