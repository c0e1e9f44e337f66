//! Rows of ternary and binary weights.
//!
//! A trit t is stored as the code t + 1 (0 → −1, 1 → 0, 2 → +1), two bits or one base-3 digit
//! each; what differs is which element stands where. Every decoder is a loop over whole blocks that
//! the compiler vectorises, and allocates nothing.

use std::array;

/// How a row of ternary or binary weights is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TernaryType {
    /// Blocks of 128 elements in 32 bytes, no scale: byte p holds elements p, p + 32, p + 64 and
    /// p + 96, the first in the high bits. What every I2_S file known to be published has.
    I2S,
    /// Blocks of 64 elements in 16 bytes, no scale: byte p holds elements p, p + 16, p + 32 and
    /// p + 48. Written by bitnet.cpp's own quantiser on Arm since November 2025; the file does not
    /// say so.
    I2SArm,
    /// 256 elements: 32 bytes of five base-3 digits, 16 of five, 4 of four, f16 scale.
    Tq1_0,
    /// 256 elements: two halves of 32 bytes, in each of which byte m holds elements m, m + 32,
    /// m + 64 and m + 96, the first in the low bits; f16 scale.
    Tq2_0,
    /// 128 elements: f16 scale, then one bit an element, low first; 1 is +1 and 0 is −1.
    Q1_0,
    /// 64 elements: f16 scale, then four consecutive elements a byte, low bits first.
    Q2_0,
    /// 128 elements, otherwise as [`TernaryType::Q2_0`].
    Pq2_0,
    /// 128 elements: 16 bytes of five base-3 digits, 8 of five, 2 of four, f16 scale.
    Ptq1_0,
}

/// A 2-bit code of 3, which stands for no trit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadCode {
    /// Its element in the row: the first one.
    pub column: usize,
}

/// Bytes after the last row of an I2_S tensor: the f32 scale and padding.
pub const I2S_TAIL_BYTES: usize = 32;

/// The scale of an I2_S tensor from its tail's first four bytes; `None` unless it is a finite
/// positive number, which it is not where bitnet.cpp's quantiser ran with several threads.
pub fn i2s_scale(bytes: [u8; 4]) -> Option<f32> {
    Some(f32::from_le_bytes(bytes)).filter(|scale| scale.is_finite() && *scale > 0.0)
}

/// The tail of an I2_S tensor.
pub fn i2s_tail(scale: f32) -> [u8; I2S_TAIL_BYTES] {
    let scale = scale.to_le_bytes();
    array::from_fn(|i| scale.get(i).copied().unwrap_or(0))
}

const SCALE_BYTES: usize = 2;

impl TernaryType {
    /// Every type.
    pub const ALL: [Self; 8] = [
        Self::I2S,
        Self::I2SArm,
        Self::Tq1_0,
        Self::Tq2_0,
        Self::Q1_0,
        Self::Q2_0,
        Self::Pq2_0,
        Self::Ptq1_0,
    ];

    /// Elements and bytes of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Self::I2S => (128, 32),
            Self::I2SArm => (64, 16),
            Self::Tq1_0 => (256, 54),
            Self::Tq2_0 => (256, 66),
            Self::Q1_0 => (128, 18),
            Self::Q2_0 => (64, 18),
            Self::Pq2_0 => (128, 34),
            Self::Ptq1_0 => (128, 28),
        }
    }

    /// Elements that share a scale; `None` for I2_S, where the whole tensor does.
    pub fn group(self) -> Option<usize> {
        match self {
            Self::I2S | Self::I2SArm => None,
            _ => Some(self.block().0),
        }
    }

    /// Whether elements are −1 or +1 only.
    pub fn is_binary(self) -> bool {
        self == Self::Q1_0
    }

    /// Scales of a row of `k` elements.
    pub fn row_scales(self, k: usize) -> usize {
        self.group().map_or(0, |group| k / group)
    }

    /// Bytes of a row of `k` elements; `None` if that is no whole number of blocks, or too many.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        let (elements, bytes) = self.block();
        if k.is_multiple_of(elements) { (k / elements).checked_mul(bytes) } else { None }
    }

    /// The bits of a row's scales alone, group after group; none where the tensor has one.
    ///
    /// # Panics
    /// If the row is no whole number of blocks.
    pub fn scales(self, bytes: &[u8]) -> impl Iterator<Item = u16> {
        let (_, len_bytes) = self.block();
        assert!(bytes.len().is_multiple_of(len_bytes), "{self:?}: whole blocks");
        let at = match self {
            Self::I2S | Self::I2SArm => None,
            Self::Q1_0 | Self::Q2_0 | Self::Pq2_0 => Some(0),
            Self::Tq1_0 | Self::Tq2_0 | Self::Ptq1_0 => Some(len_bytes - SCALE_BYTES),
        };
        let scale = move |block: &[u8]| at.map(|at| u16::from_le_bytes([block[at], block[at + 1]]));
        bytes.chunks_exact(len_bytes).filter_map(scale)
    }

    /// A row's K trits and the bits of its f16 scales, which may be anything: the caller checks
    /// them. Base-3 bytes that no encoder writes decode as in the original implementation.
    ///
    /// # Errors
    /// If a 2-bit code is 3.
    ///
    /// # Panics
    /// If the lengths are not those of [`TernaryType::row_bytes`] and [`TernaryType::row_scales`].
    pub fn decode_row(
        self,
        bytes: &[u8],
        trits: &mut [i8],
        scales: &mut [u16],
    ) -> Result<(), BadCode> {
        self.assert_lengths(bytes, trits, scales);
        let has_code_3 = match self {
            Self::I2S => decode_i2s::<32, 128>(bytes, trits),
            Self::I2SArm => decode_i2s::<16, 64>(bytes, trits),
            Self::Tq1_0 => each_block::<54, 256>(bytes, trits, scales, |block, out, scale| {
                let out = decode_digits::<32, 5>(&block[..32], out);
                let out = decode_digits::<16, 5>(&block[32..48], out);
                decode_digits::<4, 4>(&block[48..52], out);
                *scale = u16::from_le_bytes([block[52], block[53]]);
                false
            }),
            Self::Tq2_0 => each_block::<66, 256>(bytes, trits, scales, |block, out, scale| {
                *scale = u16::from_le_bytes([block[64], block[65]]);
                let mut bad = false;
                for (codes, out) in
                    block[..64].as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<128>().0)
                {
                    bad |= decode_strided(codes, out, [0, 2, 4, 6]);
                }
                bad
            }),
            Self::Q1_0 => each_block::<18, 128>(bytes, trits, scales, |block, out, scale| {
                *scale = u16::from_le_bytes([block[0], block[1]]);
                for (&bits, out) in block[SCALE_BYTES..].iter().zip(out.as_chunks_mut().0) {
                    *out = SIGNS[usize::from(bits)];
                }
                false
            }),
            Self::Q2_0 => each_block::<18, 64>(bytes, trits, scales, decode_consecutive),
            Self::Pq2_0 => each_block::<34, 128>(bytes, trits, scales, decode_consecutive),
            Self::Ptq1_0 => each_block::<28, 128>(bytes, trits, scales, |block, out, scale| {
                let out = decode_digits::<16, 5>(&block[..16], out);
                let out = decode_digits::<8, 5>(&block[16..24], out);
                decode_digits::<2, 4>(&block[24..26], out);
                *scale = u16::from_le_bytes([block[26], block[27]]);
                false
            }),
        };
        if !has_code_3 {
            return Ok(());
        }
        let column = trits.iter().position(|&trit| trit > 1).expect("a code of 3 decodes to 2");
        Err(BadCode { column })
    }

    /// The inverse of [`TernaryType::decode_row`], with the bytes that the original encoders write.
    ///
    /// # Panics
    /// If the lengths are not those of [`TernaryType::row_bytes`] and [`TernaryType::row_scales`],
    /// or an element is none that the type can hold.
    pub fn encode_row(self, trits: &[i8], scales: &[u16], bytes: &mut [u8]) {
        self.assert_lengths(bytes, trits, scales);
        let holds = |trit: &i8| matches!(trit, -1 | 1) || (*trit == 0 && !self.is_binary());
        assert!(trits.iter().all(holds), "an element that {self:?} cannot hold");
        let (elements, len_bytes) = self.block();
        let mut scales = scales.iter();
        for (trits, block) in trits.chunks_exact(elements).zip(bytes.chunks_exact_mut(len_bytes)) {
            let scale = scales.next().copied().unwrap_or(0).to_le_bytes();
            match self {
                Self::I2S | Self::I2SArm => encode_strided(trits, block, [6, 4, 2, 0]),
                Self::Tq1_0 => {
                    encode_digits(&trits[..160], &mut block[..32]);
                    encode_digits(&trits[160..240], &mut block[32..48]);
                    encode_digits(&trits[240..], &mut block[48..52]);
                    block[52..].copy_from_slice(&scale);
                }
                Self::Tq2_0 => {
                    encode_strided(&trits[..128], &mut block[..32], [0, 2, 4, 6]);
                    encode_strided(&trits[128..], &mut block[32..64], [0, 2, 4, 6]);
                    block[64..].copy_from_slice(&scale);
                }
                Self::Q1_0 => {
                    block[..SCALE_BYTES].copy_from_slice(&scale);
                    for (out, trits) in block[SCALE_BYTES..].iter_mut().zip(trits.chunks_exact(8)) {
                        *out = trits.iter().rev().fold(0, |byte, &t| byte << 1 | u8::from(t > 0));
                    }
                }
                Self::Q2_0 | Self::Pq2_0 => {
                    block[..SCALE_BYTES].copy_from_slice(&scale);
                    for (out, trits) in block[SCALE_BYTES..].iter_mut().zip(trits.chunks_exact(4)) {
                        *out = trits.iter().rev().fold(0, |byte, &t| byte << 2 | code(t));
                    }
                }
                Self::Ptq1_0 => {
                    encode_digits(&trits[..80], &mut block[..16]);
                    encode_digits(&trits[80..120], &mut block[16..24]);
                    encode_digits(&trits[120..], &mut block[24..26]);
                    block[26..].copy_from_slice(&scale);
                }
            }
        }
    }

    fn assert_lengths(self, bytes: &[u8], trits: &[i8], scales: &[u16]) {
        assert_eq!(Some(bytes.len()), self.row_bytes(trits.len()), "{self:?}: bytes of a row");
        assert_eq!(scales.len(), self.row_scales(trits.len()), "{self:?}: scales of a row");
    }
}

/// Calls `decode` on every block; whether any call returned true.
fn each_block<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    trits: &mut [i8],
    scales: &mut [u16],
    decode: impl Fn(&[u8; BYTES], &mut [i8; ELEMENTS], &mut u16) -> bool,
) -> bool {
    let (blocks, trits) = (bytes.as_chunks().0, trits.as_chunks_mut().0);
    let mut bad = false;
    for ((block, out), scale) in blocks.iter().zip(trits).zip(scales) {
        bad |= decode(block, out, scale);
    }
    bad
}

fn decode_i2s<const BYTES: usize, const ELEMENTS: usize>(bytes: &[u8], trits: &mut [i8]) -> bool {
    let mut bad = false;
    for (codes, out) in bytes.as_chunks::<BYTES>().0.iter().zip(trits.as_chunks_mut::<ELEMENTS>().0)
    {
        bad |= decode_strided(codes, out, [6, 4, 2, 0]);
    }
    bad
}

/// Byte p's four codes, at `shifts`, are elements p, p + W, p + 2W and p + 3W; whether one is 3,
/// which becomes 2.
fn decode_strided<const W: usize>(codes: &[u8; W], out: &mut [i8], shifts: [u32; 4]) -> bool {
    for (out, shift) in out.as_chunks_mut::<W>().0.iter_mut().zip(shifts) {
        *out = array::from_fn(|p| (codes[p] >> shift & 3) as i8 - 1);
    }
    // No early exit: the loop vectorises, and the answer is nearly always "none".
    codes.iter().fold(0, |bad, &byte| bad | code_3(byte)) != 0
}

fn encode_strided(trits: &[i8], out: &mut [u8], shifts: [u32; 4]) {
    let width = out.len();
    for (p, out) in out.iter_mut().enumerate() {
        *out = shifts
            .iter()
            .enumerate()
            .fold(0, |byte, (i, shift)| byte | code(trits[p + i * width]) << shift);
    }
}

/// A scale, then four consecutive elements a byte, low bits first; whether a code is 3.
fn decode_consecutive<const BYTES: usize, const ELEMENTS: usize>(
    block: &[u8; BYTES],
    out: &mut [i8; ELEMENTS],
    scale: &mut u16,
) -> bool {
    *scale = u16::from_le_bytes([block[0], block[1]]);
    let mut bad = 0;
    for (&byte, out) in block[SCALE_BYTES..].iter().zip(out.as_chunks_mut().0) {
        *out = FOUR_TRITS[usize::from(byte)];
        bad |= code_3(byte);
    }
    bad != 0
}

/// Base-3 digits, the first in the highest place: byte m's digit k is element m + W·k. A byte is
/// ⌈q · 256 / 243⌉ for five digits q, so that the product with 3 carries the next one out of the
/// byte. Returns what is left of `out`.
fn decode_digits<'a, const W: usize, const DIGITS: usize>(
    bytes: &[u8],
    out: &'a mut [i8],
) -> &'a mut [i8] {
    let (digits, rest) = out.split_at_mut(W * DIGITS);
    let bytes: &[u8; W] = bytes.first_chunk().expect("the caller cuts W bytes");
    for (out, power) in digits.as_chunks_mut::<W>().0.iter_mut().zip([1u8, 3, 9, 27, 81]) {
        *out = array::from_fn(|m| {
            let rest = u16::from(bytes[m].wrapping_mul(power));
            ((rest * 3) >> 8) as i8 - 1
        });
    }
    rest
}

fn encode_digits(trits: &[i8], out: &mut [u8]) {
    let width = out.len();
    for (m, out) in out.iter_mut().enumerate() {
        let digits = trits[m..].iter().step_by(width).zip([81, 27, 9, 3, 1]);
        let q: u16 = digits.map(|(&trit, place)| u16::from(code(trit)) * place).sum();
        *out = (q * 256).div_ceil(243) as u8;
    }
}

/// t + 1.
fn code(trit: i8) -> u8 {
    (trit + 1) as u8
}

/// Not 0 if one of the four codes is 3.
fn code_3(byte: u8) -> u8 {
    byte & byte >> 1 & 0x55
}

/// The four elements of a byte, low bits first; a code of 3 becomes 2.
static FOUR_TRITS: [[i8; 4]; 256] = {
    let mut table = [[0; 4]; 256];
    let mut i = 0;
    while i < 4 * 256 {
        table[i / 4][i % 4] = ((i / 4) >> (2 * (i % 4)) & 3) as i8 - 1;
        i += 1;
    }
    table
};

/// The eight elements of a byte, low bit first.
static SIGNS: [[i8; 8]; 256] = {
    let mut table = [[0; 8]; 256];
    let mut i = 0;
    while i < 8 * 256 {
        table[i / 8][i % 8] = 2 * ((i / 8) >> (i % 8) & 1) as i8 - 1;
        i += 1;
    }
    table
};
