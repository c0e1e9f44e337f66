//! AVX2: `vpmaddubsw` multiplies 32 unsigned codes by 32 activations and adds pairs into 16 i16
//! lanes.
//!
//! ```text
//! for each tile row n, chunk c, field j: acc[n] += Σ_b code[n,c,b,j] · x[64c + 16j + b]
//! ```
//!
//! 1. A register holds two rows × 16 bytes (a *pair*); the 16 activations of a field are broadcast
//!    to its two 128-bit lanes, so the horizontal sum at the end is within a lane.
//! 2. Sums stay in i16 for [`FLUSH_CHUNKS`] chunks, then widen to i32.
//! 3. Binary weights are bits, 1 for −1: `Σ w·x = Σ x − 2·Σ bit·x`, with eight one-bit fields a byte.
//! 4. Float activations: a lane is a row, and `vpermilps` looks up a field ([`super::tables`]).
//! 5. Tokens pass a tile several times: meanwhile the next one is asked for, so that memory is read
//!    all the time, and not in the first pass alone.
//! 6. One token sums 8 pairs at once, two 4 pairs each: eight i16 accumulators, which is what 16
//!    registers hold beside the activations.
//! 7. For many tokens the codes of a block of a tile are unpacked once, a byte each, with 4
//!    consecutive `k` of 8 rows in a register (`blocks!`): a lane is a row, 4 activations are
//!    broadcast to all of them, and nothing has to be summed across lanes.
#![expect(unsafe_code, reason = "loads, and entry into target features")]

use std::arch::x86_64::*;

use cpu_ref::head_int8::Input;
use cpu_ref::layout::columns::{STRIPE_ROWS, place};
use cpu_ref::layout::split_rows::{COARSE_PIECES, LINE_ROWS};
use cpu_ref::layout::{CHUNK_K, TILE_ROWS};

use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::columns::STEP;
use super::head::LimbSums;
use super::lanes::Lanes;
use super::portable::widen_scales;
use super::rows::{LineCodes, Rows};
use super::tables::{FieldTables, build_tables};
use super::{Activations, CHUNK_WORDS, Level, impl_kernels};
use crate::layout::Line;

/// The AVX2 level; exists only on a machine that has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    /// Whether this machine has AVX2, and F16C, which every processor with AVX2 has.
    pub(super) fn is_available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
    }

    /// The level's token; `None` if this machine does not run it.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(Avx2, Level::Avx2, #[target_feature(enable = "avx2,f16c")]);

/// The vectors of attention.
pub(super) type Vector = __m256;

impl Lanes for __m256 {
    const N: usize = 8;
    const WIDE: usize = 2;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm256_loadu_ps(at) }
    }

    #[inline(always)]
    unsafe fn load_halves(at: *const u16) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }

    #[inline(always)]
    unsafe fn load_codes(at: *const i8) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: as the trait demands.
        unsafe { _mm256_storeu_ps(at, self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm256_add_ps(self, other) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm256_mul_ps(self, other) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a hint, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Words of a pair: two rows × 16 bytes, one register.
pub(super) const PAIR_WORDS: usize = 8;
/// Pairs of a chunk.
pub(super) const PAIRS: usize = CHUNK_WORDS / PAIR_WORDS;

/// Chunks of 512 bytes to prefetch ahead within a tile: 8 KiB.
pub(super) const PREFETCH_CHUNKS: usize = 16;

/// Chunks whose sums fit i16: a lane gets two products of a code ≤ 2 and an activation in
/// −128..=127 from each of four fields, so a chunk adds −2048..=2032, and 16 chunks at most
/// −32,768..=32,512.
const FLUSH_CHUNKS: usize = 16;
const _: () = assert!(FLUSH_CHUNKS * 4 * 2 * 2 * 128 <= 1 << 15);
const _: () = assert!(FLUSH_CHUNKS * 4 * 2 * 2 * 127 < 1 << 15);

/// Tokens from which on unpacking a block costs less than it saves.
pub(super) const BLOCK_TOKENS: usize = 8;
/// Chunks of a block: what a sum in i16 holds. A lane gets two products of a code ≤ 2 and an
/// activation from each 4 of its 256 `k`, so as many as from [`FLUSH_CHUNKS`] chunks above.
pub(super) const BLOCK_CHUNKS: usize = 4;
const _: () = assert!(BLOCK_CHUNKS * QUARTERS == FLUSH_CHUNKS * 4);
/// Steps of 4 `k` in a chunk.
pub(super) const QUARTERS: usize = CHUNK_K / 4;

/// The codes of a block of a tile: step, row, 4 `k` a word.
pub(super) type Block = [[u32; TILE_ROWS]; BLOCK_CHUNKS * QUARTERS];

/// Writes a byte for each code of at most [`BLOCK_CHUNKS`] chunks.
#[target_feature(enable = "avx2")]
pub(super) fn unpack(chunks: &[[u32; CHUNK_WORDS]], block: &mut Block) {
    for (chunk, block) in chunks.iter().zip(block.as_chunks_mut::<QUARTERS>().0) {
        // The next block comes while this one is multiplied.
        for line in chunk.as_chunks::<{ 2 * PAIR_WORDS }>().0 {
            prefetch::<_MM_HINT_T0>(line, BLOCK_CHUNKS * CHUNK_WORDS);
        }
        for (e, eight) in chunk.as_chunks::<{ 4 * PAIR_WORDS }>().0.iter().enumerate() {
            let words = transpose(eight.as_chunks::<PAIR_WORDS>().0);
            for (w, &word) in words.iter().enumerate() {
                let codes = codes(_mm256_permutevar8x32_epi32(word, row_order()));
                for (j, &codes) in codes.iter().enumerate() {
                    // Word `w` of field `j` is for k = 16j + 4w and the next three.
                    store_codes(codes, &mut block[4 * j + w].as_chunks_mut().0[e]);
                }
            }
        }
    }
}

/// Defines `block_gemm(tile, x, acc)` with the target features of a level, its `step(sum, codes, x)`,
/// which adds 4 products a row to the lanes of a sum, and `widen(sum)`, which makes a lane a row's
/// i32. It takes as many tokens at once as the first number says; the others are all up to it.
macro_rules! blocks {
    (#[$features:meta] $max:literal: $($tokens:literal)*) => {
        /// One tile for many tokens: `acc[M][32]`.
        #[$features]
        fn block_gemm(
            tile: &[[u32; CHUNK_WORDS]],
            x: Activations<'_>,
            acc: &mut [[i32; TILE_ROWS]],
        ) {
            for (m, acc) in acc.iter_mut().enumerate() {
                acc.fill(-x.code_sum(m));
            }
            let mut block = [[0; TILE_ROWS]; BLOCK_CHUNKS * QUARTERS];
            for (first, chunks) in (0..).step_by(BLOCK_CHUNKS).zip(tile.chunks(BLOCK_CHUNKS)) {
                unpack(chunks, &mut block);
                let block = &block[..chunks.len() * QUARTERS];
                for (group, acc) in acc.chunks_mut($max).enumerate() {
                    let m = $max * group;
                    match acc.len() {
                        $($tokens => block_tokens::<$tokens>(block, x, (m, first), acc),)*
                        _ => unreachable!("a group has a token and no more than the most"),
                    }
                }
            }
        }

        /// Adds a block, whose first chunk is `first`, for tokens `m..m + T`.
        #[inline]
        #[$features]
        fn block_tokens<const T: usize>(
            block: &[[u32; TILE_ROWS]],
            x: Activations<'_>,
            (m, first): (usize, usize),
            acc: &mut [[i32; TILE_ROWS]],
        ) {
            let mut tokens: [&[[i8; 4]]; T] = [&[]; T];
            for (t, token) in tokens.iter_mut().enumerate() {
                let codes = x.token(m + t)[first..].as_flattened().as_chunks().0;
                *token = &codes[..block.len()];
            }
            for pass in 0..2 {
                let mut sums = [[_mm256_setzero_si256(); 2]; T];
                for (k, rows) in block.iter().enumerate() {
                    let rows = rows.as_chunks::<8>().0;
                    let codes = [load(&rows[2 * pass]), load(&rows[2 * pass + 1])];
                    for (sums, token) in sums.iter_mut().zip(&tokens) {
                        let x = _mm256_set1_epi32(i32::from_le_bytes(token[k].map(|x| x as u8)));
                        for (sum, &codes) in sums.iter_mut().zip(&codes) {
                            *sum = step(*sum, codes, x);
                        }
                    }
                }
                for (acc, sums) in acc.iter_mut().zip(&sums) {
                    let acc = &mut acc.as_chunks_mut::<8>().0[2 * pass..];
                    for (acc, &sum) in acc.iter_mut().zip(sums) {
                        add_rows(widen(sum), acc);
                    }
                }
            }
        }
    };
}
pub(super) use blocks;

blocks!(#[target_feature(enable = "avx2")] 4: 1 2 3 4);

/// Adds the products of neighbours to lanes of i16.
#[inline]
#[target_feature(enable = "avx2")]
fn step(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x))
}

/// The sums of a row's two lanes of i16.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(sum: __m256i) -> __m256i {
    _mm256_madd_epi16(sum, _mm256_set1_epi16(1))
}

/// One tile: `acc[M][32]`.
#[target_feature(enable = "avx2")]
fn gemm_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    if acc.len() >= BLOCK_TOKENS {
        return block_gemm(tile, x, acc);
    }
    for (group, acc) in acc.chunks_mut(2).enumerate() {
        let m = 2 * group;
        match acc.len() {
            2 => tokens_tile::<2, 4>(tile, x, m, acc),
            _ => tokens_tile::<1, 8>(tile, x, m, acc),
        }
    }
}

/// Steps of four columns whose sums fit i16: a lane gets a code ≤ 2 and an activation of each.
const FLUSH_STEPS: usize = 31;
const _: () = assert!(FLUSH_STEPS * STEP * 2 * 128 <= 1 << 15);

/// Steps to ask for columns ahead, of the second-level cache: the first has too few misses in flight
/// for lines that do not follow one another.
const AHEAD: usize = 16;

/// One stripe of a matrix by columns, `Σ (w + 1)·x`: two columns are interleaved byte by byte, so that
/// a lane of i16 is a row, half a line at a time.
#[target_feature(enable = "avx2")]
pub(super) fn stripe_sums(
    lines: &[Line],
    columns: &[[u32; STEP]],
    codes: &[[i8; STEP]],
    sums: &mut [i32; STRIPE_ROWS],
) {
    let mask = _mm256_set1_epi8(0x03);
    // Of each half line, the lower or the higher 8 bytes of every 16, field by field.
    let mut wide = [[[[0i32; 16]; 4]; 2]; 2];
    for (half, wide) in wide.iter_mut().enumerate() {
        let flushes = columns.chunks(FLUSH_STEPS).zip(codes.chunks(FLUSH_STEPS));
        for (flush, (now, codes)) in flushes.enumerate() {
            let mut short = [[_mm256_setzero_si256(); 4]; 2];
            // The last steps ask again for the first columns, which are there.
            let ahead = columns.iter().skip(flush * FLUSH_STEPS + AHEAD).chain(columns);
            for ((columns, codes), ahead) in now.iter().zip(codes).zip(ahead) {
                // Both halves are in one line.
                for &column in ahead.iter().filter(|_| half == 0) {
                    prefetch::<_MM_HINT_T1>(&lines[column as usize].0, 0);
                }
                let pairs = columns.as_chunks::<2>().0.iter().zip(codes.as_chunks::<2>().0);
                for (columns, codes) in pairs {
                    let x = _mm256_set1_epi16(i16::from_le_bytes(codes.map(|x| x as u8)));
                    let [a, b] =
                        columns.map(|column| load(&lines[column as usize].0.as_chunks().0[half]));
                    let parts = [_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)];
                    for (short, mut v) in short.iter_mut().zip(parts) {
                        for short in short {
                            let products = _mm256_maddubs_epi16(_mm256_and_si256(v, mask), x);
                            *short = _mm256_add_epi16(*short, products);
                            v = _mm256_srli_epi16::<2>(v);
                        }
                    }
                }
            }
            for (wide, short) in wide.as_flattened_mut().iter_mut().zip(short.as_flattened()) {
                let lanes = [_mm256_castsi256_si128(*short), _mm256_extracti128_si256::<1>(*short)];
                for (wide, lanes) in wide.as_chunks_mut().0.iter_mut().zip(lanes) {
                    add_rows(_mm256_cvtepi16_epi32(lanes), wide);
                }
            }
        }
    }
    for (row, sum) in sums.iter_mut().enumerate() {
        let (byte, field) = place(row);
        let (half, lane, part, e) = (byte / 32, byte / 16 % 2, byte / 8 % 2, byte % 8);
        *sum = wide[half][part][field][8 * lane + e];
    }
}

/// Rows to ask for ahead, as [`AHEAD`].
const ROWS_AHEAD: usize = 12;

/// `Σ (w + 1)·x` of each row in `open`. A line adds eight times two products of a code ≤ 2 and an
/// activation to a lane of i16, at most 4096.
#[target_feature(enable = "avx2")]
pub(super) fn open_sums(rows: &Rows, x: &[LineCodes], open: &[u32], sums: &mut [i32]) {
    // The last rows ask again for the last one.
    let ahead = open.iter().skip(ROWS_AHEAD).chain(std::iter::repeat(&open[open.len() - 1]));
    for ((sum, &row), &ahead) in sums.iter_mut().zip(open).zip(ahead) {
        let mut lanes = _mm256_setzero_si256();
        let lines = rows.row(row).iter().zip(rows.row(ahead));
        for ((line, ahead), x) in lines.zip(x) {
            prefetch::<_MM_HINT_T1>(&ahead.0, 0);
            let mut short = _mm256_setzero_si256();
            for (half, words) in line.0.as_chunks::<PAIR_WORDS>().0.iter().enumerate() {
                for (codes, x) in codes(load(words)).into_iter().zip(x) {
                    let products = _mm256_maddubs_epi16(codes, load_codes(&x.as_chunks().0[half]));
                    short = _mm256_add_epi16(short, products);
                }
            }
            let wide = _mm256_madd_epi16(short, _mm256_set1_epi16(1));
            lanes = _mm256_add_epi32(lanes, wide);
        }
        *sum = row_sums(lanes).into_iter().sum();
    }
}

/// One tile and tokens `m..m + T`, P pairs a pass; `acc` holds T tokens.
#[target_feature(enable = "avx2")]
fn tokens_tile<const T: usize, const P: usize>(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    m: usize,
    acc: &mut [[i32; TILE_ROWS]],
) {
    for pass in 0..PAIRS / P {
        let mut sums = [[_mm256_setzero_si256(); P]; T];
        for (block, chunks) in tile.chunks(FLUSH_CHUNKS).enumerate() {
            let mut tokens = [x.token(m); T];
            for (t, token) in tokens.iter_mut().enumerate() {
                *token = &x.token(m + t)[block * FLUSH_CHUNKS..][..chunks.len()];
            }
            let mut short = [[_mm256_setzero_si256(); P]; T];
            for (c, chunk) in chunks.iter().enumerate() {
                let pairs: &[[u32; PAIR_WORDS]; P] = chunk.as_chunks().0[pass * P..]
                    .first_chunk()
                    .expect("P divides the pairs of a chunk");
                if x.asks_ahead(m) {
                    prefetch_next(pairs, tile);
                }
                let mut x = [[_mm256_setzero_si256(); 4]; T];
                for (x, token) in x.iter_mut().zip(&tokens) {
                    *x = fields(&token[c]);
                }
                for (p, pair) in pairs.iter().enumerate() {
                    // Pair by pair, so that no more than one is in a register.
                    let codes = codes(load(pair));
                    for t in 0..T {
                        for j in 0..4 {
                            let products = _mm256_maddubs_epi16(codes[j], x[t][j]);
                            short[t][p] = _mm256_add_epi16(short[t][p], products);
                        }
                    }
                }
            }
            for t in 0..T {
                for p in 0..P {
                    let wide = _mm256_madd_epi16(short[t][p], _mm256_set1_epi16(1));
                    sums[t][p] = _mm256_add_epi32(sums[t][p], wide);
                }
            }
        }
        for (t, acc) in acc.iter_mut().enumerate() {
            let code_sum = x.code_sum(m + t);
            let rows = &mut acc.as_chunks_mut::<2>().0[pass * P..][..P];
            for (rows, &sum) in rows.iter_mut().zip(&sums[t]) {
                *rows = row_sums(sum).map(|sum| sum - code_sum);
            }
        }
    }
}

/// `Σ coarse·x` of one tile of int8 rows, for the two limbs of x. All rows at once: a tile that is gone through
/// twice is no stream to the processor.
#[target_feature(enable = "avx2")]
pub(super) fn coarse_sums(pieces: &[[u32; CHUNK_WORDS]], x: &Input, sums: &mut LimbSums) {
    /// Pairs of a line.
    const LINE_PAIRS: usize = LINE_ROWS / 2;
    let mut limb_sums = [[_mm256_setzero_si256(); PAIRS]; 2];
    let [high, low] = &mut limb_sums;
    let limbs = x.hi.as_chunks().0.iter().zip(x.lo.as_chunks().0);
    for (group, (hi, lo)) in pieces.as_chunks::<COARSE_PIECES>().0.iter().zip(limbs) {
        ask_next_page(group.as_flattened());
        let (hi, lo) = (fields(hi), fields(lo));
        let pairs = group.as_flattened().as_chunks().0;
        let lines = pairs.as_chunks::<{ LINE_PAIRS * COARSE_PIECES }>().0;
        for (line, pairs) in lines.iter().enumerate() {
            for at in 0..LINE_PAIRS {
                let piece = |p: usize| load(&pairs[LINE_PAIRS * p + at]);
                let codes = coarse_codes(piece(0), piece(1), piece(2));
                let pair = LINE_PAIRS * line + at;
                high[pair] = dot(high[pair], codes, &hi);
                low[pair] = dot(low[pair], codes, &lo);
            }
        }
    }
    store_limbs(&limb_sums, sums);
}

/// The coarse parts of two rows' groups.
#[inline]
#[target_feature(enable = "avx2")]
fn coarse_codes(a: __m256i, b: __m256i, c: __m256i) -> [__m256i; 4] {
    let only = |codes, bits| _mm256_and_si256(codes, _mm256_set1_epi8(bits));
    let last = _mm256_or_si256(
        only(_mm256_srli_epi16::<6>(a), 0x03),
        only(_mm256_srli_epi16::<4>(b), 0x0c),
    );
    let last = _mm256_or_si256(last, only(_mm256_srli_epi16::<2>(c), 0x30));
    [only(a, 0x3f), only(b, 0x3f), only(c, 0x3f), last]
}

/// `Σ rest·x` of one tile of int8 rows, for the two limbs of x.
#[target_feature(enable = "avx2")]
pub(super) fn rest_sums(pieces: &[[u32; CHUNK_WORDS]], x: &Input, sums: &mut LimbSums) {
    let mut limb_sums = [[_mm256_setzero_si256(); PAIRS]; 2];
    let [high, low] = &mut limb_sums;
    let limbs = x.hi.as_chunks().0.iter().zip(x.lo.as_chunks().0);
    for (piece, (hi, lo)) in pieces.iter().zip(limbs) {
        ask_next_page(piece);
        let (hi, lo) = (fields(hi), fields(lo));
        for (pair, words) in piece.as_chunks().0.iter().enumerate() {
            let v = load(words);
            let two = |codes| _mm256_and_si256(codes, _mm256_set1_epi8(0x03));
            let codes = [
                two(v),
                two(_mm256_srli_epi16::<2>(v)),
                two(_mm256_srli_epi16::<4>(v)),
                two(_mm256_srli_epi16::<6>(v)),
            ];
            high[pair] = dot(high[pair], codes, &hi);
            low[pair] = dot(low[pair], codes, &lo);
        }
    }
    store_limbs(&limb_sums, sums);
}

/// Adds the products of codes of at most 63: two pairs of them, at most 4·63·128, fit i16.
#[inline]
#[target_feature(enable = "avx2")]
fn dot(sums: __m256i, codes: [__m256i; 4], x: &[__m256i; 4]) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let two = |i: usize| {
        let (a, b) = (codes[i], codes[i + 1]);
        _mm256_add_epi16(_mm256_maddubs_epi16(a, x[i]), _mm256_maddubs_epi16(b, x[i + 1]))
    };
    let [a, b] = [two(0), two(2)].map(|short| _mm256_madd_epi16(short, ones));
    _mm256_add_epi32(sums, _mm256_add_epi32(a, b))
}

#[inline]
#[target_feature(enable = "avx2")]
fn store_limbs(limb_sums: &[[__m256i; PAIRS]; 2], sums: &mut LimbSums) {
    for (limb, sums) in limb_sums.iter().zip(sums) {
        for (&pair, sums) in limb.iter().zip(sums.as_chunks_mut().0) {
            *sums = row_sums(pair);
        }
    }
}

/// One tile of [`super::GroupLayout::Signs`]: `acc[M][32]`.
#[target_feature(enable = "avx2")]
fn signs_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    for (group, acc) in acc.chunks_mut(2).enumerate() {
        let m = 2 * group;
        match acc.len() {
            2 => signs_tokens::<2, 4>(tile, x, m, acc),
            _ => signs_tokens::<1, 8>(tile, x, m, acc),
        }
    }
}

/// [`tokens_tile`] for binary weights: a chunk adds at most 8·2·128 to a lane of i16, as there.
#[target_feature(enable = "avx2")]
fn signs_tokens<const T: usize, const P: usize>(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    m: usize,
    acc: &mut [[i32; TILE_ROWS]],
) {
    for pass in 0..PAIRS / P {
        let mut sums = [[_mm256_setzero_si256(); P]; T];
        for (block, chunks) in tile.chunks(FLUSH_CHUNKS).enumerate() {
            let mut tokens = [x.signs_token(m); T];
            for (t, token) in tokens.iter_mut().enumerate() {
                *token = &x.signs_token(m + t)[block * FLUSH_CHUNKS..][..chunks.len()];
            }
            let mut short = [[_mm256_setzero_si256(); P]; T];
            for (c, chunk) in chunks.iter().enumerate() {
                let pairs: &[[u32; PAIR_WORDS]; P] = chunk.as_chunks().0[pass * P..]
                    .first_chunk()
                    .expect("P divides the pairs of a chunk");
                let mut v = [_mm256_setzero_si256(); P];
                for (v, pair) in v.iter_mut().zip(pairs) {
                    *v = load(pair);
                }
                for bit in 0..8 {
                    let mut x_bit = [_mm256_setzero_si256(); T];
                    for (x_bit, token) in x_bit.iter_mut().zip(&tokens) {
                        *x_bit = field(&token[c].as_chunks().0[bit]);
                    }
                    for p in 0..P {
                        let bits = _mm256_and_si256(v[p], _mm256_set1_epi8(1));
                        v[p] = _mm256_srli_epi16::<1>(v[p]);
                        for t in 0..T {
                            let products = _mm256_maddubs_epi16(bits, x_bit[t]);
                            short[t][p] = _mm256_add_epi16(short[t][p], products);
                        }
                    }
                }
            }
            for t in 0..T {
                for p in 0..P {
                    let wide = _mm256_madd_epi16(short[t][p], _mm256_set1_epi16(1));
                    sums[t][p] = _mm256_add_epi32(sums[t][p], wide);
                }
            }
        }
        for (t, acc) in acc.iter_mut().enumerate() {
            let code_sum = x.code_sum(m + t);
            let rows = &mut acc.as_chunks_mut::<2>().0[pass * P..][..P];
            for (rows, &sum) in rows.iter_mut().zip(&sums[t]) {
                *rows = row_sums(sum).map(|sum| code_sum - 2 * sum);
            }
        }
    }
}

/// One chunk of [`super::tables`].
#[target_feature(enable = "avx2")]
pub(super) fn lookup_chunk(
    chunk: &[u32; CHUNK_WORDS],
    tables: &[FieldTables],
    sums: &mut [[f32; TILE_ROWS]],
) {
    for (tables, sums) in tables.chunks(2).zip(sums.chunks_mut(2)) {
        match tables {
            [a, b] => lookup_tokens::<2>(chunk, [a, b], sums),
            [a, ..] => lookup_tokens::<1>(chunk, [a], sums),
            [] => {}
        }
    }
}

/// One chunk and T tokens, 16 rows at a time.
#[inline]
#[target_feature(enable = "avx2")]
fn lookup_tokens<const T: usize>(
    chunk: &[u32; CHUNK_WORDS],
    tables: [&FieldTables; T],
    sums: &mut [[f32; TILE_ROWS]],
) {
    for (half, chunk) in chunk.as_chunks::<{ 8 * PAIR_WORDS }>().0.iter().enumerate() {
        let (low, high) = chunk.as_chunks::<PAIR_WORDS>().0.split_at(4);
        let words = [transpose(low), transpose(high)];
        let mut acc = [[_mm256_setzero_ps(); 2]; T];
        for (w, (&low, &high)) in words[0].iter().zip(&words[1]).enumerate() {
            let mut v = [low, high];
            for nibble in 0..8 {
                let u = [_mm256_srli_epi32::<2>(v[0]), _mm256_srli_epi32::<2>(v[1])];
                let at = 16 * w + 2 * nibble;
                for (acc, tables) in acc.iter_mut().zip(tables) {
                    let (a, b) = (table(&tables.0[at]), table(&tables.0[at + 1]));
                    for (acc, (&v, &u)) in acc.iter_mut().zip(v.iter().zip(&u)) {
                        let (a, b) = (_mm256_permutevar_ps(a, v), _mm256_permutevar_ps(b, u));
                        *acc = _mm256_add_ps(*acc, _mm256_add_ps(a, b));
                    }
                }
                v = [_mm256_srli_epi32::<4>(v[0]), _mm256_srli_epi32::<4>(v[1])];
            }
        }
        // The compiler would move the permutation before the additions, and so to every entry.
        let acc = std::hint::black_box(acc);
        for (acc, sums) in acc.iter().zip(&mut *sums) {
            let rows = &mut sums.as_chunks_mut().0[2 * half..];
            for (&acc, rows) in acc.iter().zip(rows) {
                store(_mm256_permutevar8x32_ps(acc, row_order()), rows);
            }
        }
    }
}

/// Eight rows' words: register `w` holds word `w` of row `2e + l` in element `e` of its 128-bit
/// lane `l`.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(pairs: &[[u32; PAIR_WORDS]]) -> [__m256i; 4] {
    let (a, b, c, d) = (load(&pairs[0]), load(&pairs[1]), load(&pairs[2]), load(&pairs[3]));
    let (ab_low, ab_high) = (_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    let (cd_low, cd_high) = (_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    [
        _mm256_unpacklo_epi64(ab_low, cd_low),
        _mm256_unpackhi_epi64(ab_low, cd_low),
        _mm256_unpacklo_epi64(ab_high, cd_high),
        _mm256_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// The permutation of a register's lanes that undoes the order of the rows in [`transpose`].
#[inline]
#[target_feature(enable = "avx2")]
fn row_order() -> __m256i {
    _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)
}

/// A field's table, in both 128-bit lanes.
#[inline]
#[target_feature(enable = "avx2")]
fn table(table: &[f32; 4]) -> __m256 {
    // SAFETY: `table` has 16 bytes to read, and the load needs no alignment.
    let table = unsafe { _mm_loadu_ps(table.as_ptr()) };
    _mm256_set_m128(table, table)
}

/// Eight rows' sums.
#[inline]
#[target_feature(enable = "avx2")]
fn store(rows: __m256, out: &mut [f32; 8]) {
    // SAFETY: `out` has 32 bytes to write, and the store needs no alignment.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr(), rows) };
}

/// Eight rows' codes.
#[inline]
#[target_feature(enable = "avx2")]
fn store_codes(codes: __m256i, out: &mut [u32; 8]) {
    // SAFETY: `out` has 32 bytes to write, and the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), codes) };
}

/// Adds to eight rows' sums.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_rows(rows: __m256i, out: &mut [i32; 8]) {
    let out: *mut __m256i = out.as_mut_ptr().cast();
    // SAFETY: `out` has 32 bytes to read and write, and neither needs alignment.
    unsafe { _mm256_storeu_si256(out, _mm256_add_epi32(_mm256_loadu_si256(out), rows)) };
}

/// Words from a tile to the next one; a few chunks where "tiles" are parts of one.
pub(super) fn next_tile(tile: &[[u32; CHUNK_WORDS]]) -> usize {
    tile.len().max(PREFETCH_CHUNKS) * CHUNK_WORDS
}

/// Asks for the lines of these pairs in the next tile to come into the second-level cache.
#[inline(always)]
pub(super) fn prefetch_next(pairs: &[[u32; PAIR_WORDS]], tile: &[[u32; CHUNK_WORDS]]) {
    for line in pairs.iter().step_by(2) {
        prefetch::<_MM_HINT_T1>(line, next_tile(tile));
    }
}

/// Bytes of a page, whatever its real size: caches follow a stream of lines no further.
const PAGE_BYTES: usize = 4096;
/// Words of a cache line.
const LINE_WORDS: usize = 16;
/// Lines of a page that are asked for before it is reached.
const FIRST_LINES: usize = 4;

/// Asks for the beginning of the next page to come into the second-level cache, if these are the first
/// bytes of a page. Within a page the hardware sees a stream and runs ahead of it by itself, better than it
/// can be told to; at each page it has to find out anew.
#[inline(always)]
pub(super) fn ask_next_page(chunk: &[u32]) {
    let in_page = chunk.as_ptr().addr() % PAGE_BYTES;
    if in_page < size_of_val(chunk) {
        let next = (PAGE_BYTES - in_page) / size_of::<u32>();
        for line in 0..FIRST_LINES {
            prefetch::<_MM_HINT_T1>(chunk, next + line * LINE_WORDS);
        }
    }
}

/// Asks for the cache line so many words ahead.
#[inline(always)]
pub(super) fn prefetch<const HINT: i32>(at: &[u32], words: usize) {
    let ahead = at.as_ptr().wrapping_add(words);
    #[allow(unused_unsafe, reason = "the intrinsic is safe in newer compilers")]
    // SAFETY: a prefetch is a hint; it does not access memory, whatever the address.
    unsafe {
        _mm_prefetch::<HINT>(ahead.cast());
    }
}

/// The codes of two rows, field by field.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn codes(v: __m256i) -> [__m256i; 4] {
    let low = _mm256_set1_epi8(0x03);
    [
        _mm256_and_si256(v, low),
        _mm256_and_si256(_mm256_srli_epi16::<2>(v), low),
        _mm256_and_si256(_mm256_srli_epi16::<4>(v), low),
        _mm256_and_si256(_mm256_srli_epi16::<6>(v), low),
    ]
}

/// The sums of the two 128-bit lanes: one a row.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn row_sums(lanes: __m256i) -> [i32; 2] {
    let mut out = [[0i32; 4]; 2];
    // SAFETY: `out` has 32 bytes to write, and the store needs no alignment.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), lanes) };
    out.map(|lane| lane.iter().sum())
}

/// A token's activations of one chunk, field by field, each in both 128-bit lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn fields(x: &[i8; CHUNK_K]) -> [__m256i; 4] {
    let x = x.as_chunks::<16>().0;
    [field(&x[0]), field(&x[1]), field(&x[2]), field(&x[3])]
}

/// 32 activations.
#[inline]
#[target_feature(enable = "avx2")]
fn load_codes(x: &[i8; 32]) -> __m256i {
    // SAFETY: `x` has 32 bytes to read, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(x.as_ptr().cast()) }
}

/// The 16 activations of a field, in both 128-bit lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn field(x: &[i8; 16]) -> __m256i {
    // SAFETY: `x` has 16 bytes to read, and the load needs no alignment.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(x.as_ptr().cast()) })
}

/// Two rows' pieces.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn load(pair: &[u32; PAIR_WORDS]) -> __m256i {
    // SAFETY: `pair` has 32 bytes to read, and the load needs no alignment.
    unsafe { _mm256_loadu_si256(pair.as_ptr().cast()) }
}
