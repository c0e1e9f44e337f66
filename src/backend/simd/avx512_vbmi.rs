//! AVX-512 VBMI: `vpermb` looks 64 bytes up at once, which is what five trits a byte need
//! (`cpu_ref::layout::base3`). Otherwise as the AVX-512 VNNI level.
//!
//! ```text
//! for each tile row n, byte v, digit j: acc[n] += digit(v, j) · x[column of j]
//! ```
//!
//! 1. `vpermb` looks at the low six bits alone, and those name the first four digits, in fields of
//!    two bits, unless the byte is an escape (192 or more). `v − 191`, saturating, is 0 where it is
//!    none; looked up in a second table, it is what the fields and the top bits of an escape are to be
//!    changed by (exclusive or), and 0 for the others. No mask, no branch.
//! 2. The top two bits are the last digit, times 64, but for an escape's. Both changes come in one byte:
//!    the fourth digit, whose place the top two bits have, never changes.
//! 3. A register is 16 rows × 4 bytes, so that a lane is a row and nothing is summed across lanes; four
//!    activations of a digit are broadcast to all of them. Digits stay in place and count 1, 4, 16 or 64
//!    times; their sums are apart and are divided at the end, exactly.
//! 4. From three tokens on, the tile is unpacked into I2 first: see `base3.rs`.
#![expect(unsafe_code, reason = "entry into target features")]

use std::arch::x86_64::*;

use cpu_ref::layout::base3::{self, GROUP_CHUNKS, GROUP_PIECES};
use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, TILE_ROWS};

use super::avx2::{PREFETCH_CHUNKS, ask_next_page, prefetch};
use super::avx512::{
    Avx512Vnni, QUAD_WORDS, Vector, build_tables, coarse_sums, gemm_tile, load, lookup_chunk,
    open_sums, rest_sums, row_order, signs_tile, store, stripe_sums, transpose, widen_scales,
};
use super::base3::Chunk;
use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

/// The AVX-512 VBMI level; exists only on a machine that has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512Vbmi(());

impl Avx512Vbmi {
    /// Whether this machine has VBMI beside what the VNNI level needs.
    pub(super) fn is_available() -> bool {
        Avx512Vnni::is_available() && is_x86_feature_detected!("avx512vbmi")
    }

    /// The level's token; `None` if this machine does not run it.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(
    Avx512Vbmi,
    Level::Avx512Vbmi,
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
);

/// Bytes below this one are no escapes.
const ESCAPE: u8 = 192;

/// The first four digits by the low six bits, as I2 has them.
static FOUR: [u32; QUAD_WORDS] = words(four());

/// What is to be changed, by `byte − 191`: the four digits in the low six bits, the last digit in the top
/// two.
static CHANGES: [u32; QUAD_WORDS] = words(changes());

const fn four() -> [u8; 64] {
    let mut table = [0; 64];
    let mut i = 0;
    while i < 64 {
        if let Some([a, b, c, d, _]) = base3::digits(i as u8) {
            table[i] = a | b << 2 | c << 4 | d << 6;
        }
        i += 1;
    }
    table
}

const fn changes() -> [u8; 64] {
    let (mut table, four) = ([0; 64], four());
    let mut i = 1;
    while i < 64 {
        let byte = ESCAPE - 1 + i as u8;
        if let Some([a, b, c, d, last]) = base3::digits(byte) {
            let fields = a | b << 2 | c << 4 | d << 6;
            let changed = fields ^ four[(byte % 64) as usize];
            assert!(changed < 64, "the fourth digit is the same");
            table[i] = changed | (last << 6 ^ byte & 0xc0);
        }
        i += 1;
    }
    table
}

/// A register's bytes as words.
const fn words(bytes: [u8; 64]) -> [u32; QUAD_WORDS] {
    let mut words = [0; QUAD_WORDS];
    let mut i = 0;
    while i < 64 {
        words[i / 4] |= (bytes[i] as u32) << (8 * (i % 4));
        i += 1;
    }
    words
}

/// The tables and masks.
#[derive(Clone, Copy)]
struct Decoder {
    four: __m512i,
    changes: __m512i,
    below_escape: __m512i,
    fields: [__m512i; 4],
}

impl Decoder {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    fn new() -> Self {
        let bytes = |byte: u8| _mm512_set1_epi8(byte as i8);
        Self {
            four: load(&FOUR),
            changes: load(&CHANGES),
            below_escape: bytes(ESCAPE - 1),
            fields: [bytes(0x03), bytes(0x0c), bytes(0x30), bytes(0xc0)],
        }
    }

    /// Digits 0 to 2 and digit 3 of each byte in the fields of I2 (of two registers), and what changes
    /// the last digit in the top two bits.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    fn look_up(&self, v: __m512i) -> (__m512i, __m512i, __m512i) {
        let escape = _mm512_subs_epu8(v, self.below_escape);
        let four = _mm512_permutexvar_epi8(v, self.four);
        let changes = _mm512_permutexvar_epi8(escape, self.changes);
        (_mm512_xor_si512(four, changes), four, changes)
    }

    /// The five digits of each byte, times 1, 4, 16, 64 and 64.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    fn digits(&self, v: __m512i) -> [__m512i; 5] {
        let (three, four, changes) = self.look_up(v);
        let [a, b, c, top] = self.fields;
        [
            _mm512_and_si512(three, a),
            _mm512_and_si512(three, b),
            _mm512_and_si512(three, c),
            _mm512_and_si512(four, top),
            self.last(v, changes),
        ]
    }

    /// The last digit, times 64: `(v ^ changes) & 0xc0`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    fn last(&self, v: __m512i, changes: __m512i) -> __m512i {
        _mm512_ternarylogic_epi32::<0x28>(v, changes, self.fields[3])
    }
}

/// Tokens that share the decoding in registers.
const FEW_BASE3: usize = 2;

/// Multiplies a tile with one token or two.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn few_base3(tile: &[Chunk], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    match acc.len() {
        1 => tokens_tile::<1>(tile, x, acc),
        _ => tokens_tile::<FEW_BASE3>(tile, x, acc),
    }
}

/// Halves of a tile: 16 rows, one register a word of a piece.
const HALVES: usize = TILE_ROWS / QUAD_WORDS;

/// `Σ digit·x` of a half's rows, by what the digits count: 1, 4, 16, 64 times.
type Sums = [[__m512i; 4]; HALVES];

/// One tile and T tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn tokens_tile<const T: usize>(tile: &[Chunk], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    let decoder = Decoder::new();
    let mut sums: [Sums; T] = [[[_mm512_setzero_si512(); 4]; HALVES]; T];
    // Four pieces at the end may be a group, or a chunk each.
    let (groups, rest) = tile.split_at(x.token(0).len() / GROUP_CHUNKS * GROUP_PIECES);
    let groups = groups.as_chunks::<GROUP_PIECES>().0;
    let mut tokens = [(x.token(0).as_chunks::<GROUP_CHUNKS>()); T];
    for (t, token) in tokens.iter_mut().enumerate() {
        let (of_groups, of_rest) = x.token(t).as_chunks();
        *token = (&of_groups[..groups.len()], &of_rest[..rest.len()]);
    }
    for (g, group) in groups.iter().enumerate() {
        for (p, piece) in group.iter().enumerate() {
            ask_next_page(piece);
            for (word, halves) in piece.as_chunks::<TILE_ROWS>().0.iter().enumerate() {
                let mut x_digits = [[_mm512_setzero_si512(); 5]; T];
                for (t, x_digits) in x_digits.iter_mut().enumerate() {
                    let chunks = &tokens[t].0[g];
                    let [a, b, c, d] = four_activations(&chunks[p], word);
                    *x_digits = [a, b, c, d, activations(&chunks[GROUP_PIECES], 4 * p + word)];
                }
                for (half, rows) in halves.as_chunks::<QUAD_WORDS>().0.iter().enumerate() {
                    let digits = decoder.digits(load(rows));
                    for t in 0..T {
                        let sums = &mut sums[t][half];
                        for j in 0..5 {
                            let sum = &mut sums[j.min(3)];
                            *sum = _mm512_dpbusd_epi32(*sum, digits[j], x_digits[t][j]);
                        }
                    }
                }
            }
        }
    }
    for (p, piece) in rest.iter().enumerate() {
        for (word, halves) in piece.as_chunks::<TILE_ROWS>().0.iter().enumerate() {
            for (half, rows) in halves.as_chunks::<QUAD_WORDS>().0.iter().enumerate() {
                let digits = decoder.digits(load(rows));
                for t in 0..T {
                    let x_digits = four_activations(&tokens[t].1[p], word);
                    for (j, sum) in sums[t][half].iter_mut().enumerate() {
                        *sum = _mm512_dpbusd_epi32(*sum, digits[j], x_digits[j]);
                    }
                }
            }
        }
    }
    for (t, acc) in acc.iter_mut().enumerate() {
        let code_sum = _mm512_set1_epi32(x.code_sum(t));
        for (sums, acc) in sums[t].iter().zip(acc.as_chunks_mut().0) {
            // Each lane is a sum of multiples of 1, 4, 16 or 64.
            let [a, b, c, d] = *sums;
            let low = _mm512_add_epi32(a, _mm512_srai_epi32::<2>(b));
            let high = _mm512_add_epi32(_mm512_srai_epi32::<4>(c), _mm512_srai_epi32::<6>(d));
            store(_mm512_sub_epi32(_mm512_add_epi32(low, high), code_sum), acc);
        }
    }
}

/// The activations of digits 0 to 3 of the bytes of a word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn four_activations(chunk: &[i8; CHUNK_K], word: usize) -> [__m512i; 4] {
    [
        activations(chunk, word),
        activations(chunk, PIECE_WORDS + word),
        activations(chunk, 2 * PIECE_WORDS + word),
        activations(chunk, 3 * PIECE_WORDS + word),
    ]
}

/// Four activations for every row.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn activations(chunk: &[i8; CHUNK_K], at: usize) -> __m512i {
    let four = chunk.as_chunks::<4>().0[at];
    _mm512_set1_epi32(i32::from_le_bytes(four.map(|code| code as u8)))
}

/// Unpacks pieces into chunks of I2: see `base3.rs`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn unpack_base3(pieces: &[Chunk], chunks: &mut [Chunk]) {
    /// Digits that I2 has in the low six bits of a byte.
    const THREE: i8 = 0x3f;
    let decoder = Decoder::new();
    for (pieces, chunks) in pieces.chunks(GROUP_PIECES).zip(chunks.chunks_mut(GROUP_CHUNKS)) {
        let (chunks, fifth) = chunks.split_at_mut(pieces.len());
        for half in 0..HALVES {
            let mut last = [_mm512_setzero_si512(); PIECE_WORDS];
            for (piece, chunk) in pieces.iter().zip(&mut *chunks) {
                let mut four = [_mm512_setzero_si512(); PIECE_WORDS];
                for word in 0..PIECE_WORDS {
                    let rows = &piece.as_chunks::<QUAD_WORDS>().0[HALVES * word + half];
                    prefetch::<_MM_HINT_T0>(rows, PREFETCH_CHUNKS * CHUNK_WORDS);
                    let v = load(rows);
                    let (_, plain, changes) = decoder.look_up(v);
                    // plain ^ (changes & THREE)
                    let three = _mm512_set1_epi8(THREE);
                    four[word] = _mm512_ternarylogic_epi32::<0x78>(plain, changes, three);
                    // Two bits a byte, at the top: those of the pieces before move down.
                    let digit = decoder.last(v, changes);
                    last[word] = _mm512_or_si512(_mm512_srli_epi16::<2>(last[word]), digit);
                }
                store_quads(four, chunk, half);
            }
            for fifth in &mut *fifth {
                store_quads(last, fifth, half);
            }
        }
    }
}

/// Four words of 16 rows, a register each, as the pieces of these rows in a chunk of I2.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn store_quads(words: [__m512i; PIECE_WORDS], chunk: &mut Chunk, half: usize) {
    let order = row_order();
    let words = words.map(|word| _mm512_permutexvar_epi32(order, word));
    let quads = &mut chunk.as_chunks_mut::<QUAD_WORDS>().0[half * PIECE_WORDS..][..PIECE_WORDS];
    for (quad, out) in transpose(words).into_iter().zip(quads) {
        store(quad, bytemuck::cast_mut(out));
    }
}
