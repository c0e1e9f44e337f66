//! AVX-512 VNNI: `vpdpbusd` multiplies 64 unsigned codes by 64 activations and adds them into 16
//! i32 lanes.
//!
//! ```text
//! for each tile row n, chunk c, field j: acc[n] += Σ_b code[n,c,b,j] · x[64c + 16j + b]
//! ```
//!
//! 1. A register holds four rows × 16 bytes (a *quad*); the 16 activations of a field are broadcast
//!    to its four 128-bit lanes, so the horizontal sum at the end is within a lane.
//! 2. GEMV shifts once for two fields instead of three times for three: `v & 0x03` and `v & 0x0c`
//!    are fields 0 and 1 (the latter times 4), and `v >> 4` brings fields 2 and 3 to the same
//!    places. Sums of field 1 and 3 are kept apart and divided by 4 at the end, exactly.
//! 3. All 8 quads of a chunk are summed at once, 16 accumulators, so that the weights are read
//!    front to back; the next page's first lines are asked for at the beginning of each.
//! 4. GEMM keeps 4 quads × up to 4 tokens: a masked field is used for every token, which leaves
//!    `vpdpbusd` as the limit. It passes a tile twice or more often; meanwhile the next one is asked
//!    for, so that memory is read all the time, and not in the first pass alone.
//! 5. Binary weights are bits, 1 for −1: `Σ w·x = Σ x − 2·Σ bit·x`, with eight one-bit fields a byte.
//! 6. By columns, four of them are interleaved byte by byte: a lane is a row with its four weights, and
//!    the columns that come later in the list are asked for.
//! 7. By rows, a line of a row meets 64 activations a field; four rows share them, and those that come
//!    later in the list are asked for.
//! 8. Float activations: a lane is a row, and `vpermps` looks up a nibble ([`super::tables`]).
#![expect(unsafe_code, reason = "loads, and entry into target features")]

use std::arch::x86_64::*;

use cpu_ref::head_int8::Input;
use cpu_ref::layout::columns::STRIPE_ROWS;
use cpu_ref::layout::split_rows::COARSE_PIECES;
use cpu_ref::layout::{CHUNK_K, TILE_ROWS};

use super::avx2::{ask_next_page, next_tile, prefetch};
use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::columns::STEP;
use super::head::LimbSums;
use super::lanes::Lanes;
use super::rows::{LineCodes, Rows};
use super::tables::{NibbleTables, i2_column};
use super::{Activations, CHUNK_WORDS, GroupLayout, GroupScales, Level, impl_kernels};
use crate::layout::Line;

/// The AVX-512 VNNI level; exists only on a machine that has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx512Vnni(());

impl Avx512Vnni {
    /// Whether this machine has AVX-512 F, BW, DQ, VL and VNNI.
    pub(super) fn is_available() -> bool {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
    }

    /// The level's token; `None` if this machine does not run it.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(
    Avx512Vnni,
    Level::Avx512Vnni,
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
);

/// The vectors of attention.
pub(super) type Vector = __m512;

impl Lanes for __m512 {
    const N: usize = 16;
    const WIDE: usize = 4;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load(at: *const f32) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm512_loadu_ps(at) }
    }

    #[inline(always)]
    unsafe fn load_halves(at: *const u16) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())) }
    }

    #[inline(always)]
    unsafe fn load_codes(at: *const i8) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(at.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(self, at: *mut f32) {
        // SAFETY: as the trait demands.
        unsafe { _mm512_storeu_ps(at, self) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm512_add_ps(self, other) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe { _mm512_mul_ps(self, other) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: a hint, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
}

/// Words of a quad: four rows × 16 bytes, one register.
pub(super) const QUAD_WORDS: usize = 16;
/// Quads of a chunk.
const QUADS: usize = CHUNK_WORDS / QUAD_WORDS;
/// Quads that one pass of GEMM sums.
const PASS_QUADS: usize = 4;

/// One tile: `acc[M][32]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn gemm_tile(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    acc: &mut [[i32; TILE_ROWS]],
) {
    if let [acc] = acc {
        return gemv_tile(tile, x.token(0), x.code_sum(0), acc);
    }
    // Groups of equal size, so that none has less to do than the instruction's latency.
    let (mut m, mut rest) = (0, acc);
    for groups in (1..=rest.len().div_ceil(4)).rev() {
        let (acc, after) = rest.split_at_mut(rest.len().div_ceil(groups));
        match acc.len() {
            4 => tokens_tile::<4>(tile, x, m, acc),
            3 => tokens_tile::<3>(tile, x, m, acc),
            2 => tokens_tile::<2>(tile, x, m, acc),
            _ => tokens_tile::<1>(tile, x, m, acc),
        }
        (m, rest) = (m + acc.len(), after);
    }
}

/// One tile and one token.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gemv_tile(
    tile: &[[u32; CHUNK_WORDS]],
    x: &[[i8; CHUNK_K]],
    code_sum: i32,
    acc: &mut [i32; TILE_ROWS],
) {
    let (low, high) = (_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c));
    let mut units = [_mm512_setzero_si512(); QUADS];
    let mut fours = [_mm512_setzero_si512(); QUADS];
    for (chunk, x) in tile.iter().zip(x) {
        ask_next_page(chunk);
        let (x0, x1, x2, x3) = (field::<0>(x), field::<1>(x), field::<2>(x), field::<3>(x));
        for (q, quad) in chunk.as_chunks::<QUAD_WORDS>().0.iter().enumerate() {
            let v = load(quad);
            let u = _mm512_srli_epi16::<4>(v);
            units[q] = _mm512_dpbusd_epi32(units[q], _mm512_and_si512(v, low), x0);
            fours[q] = _mm512_dpbusd_epi32(fours[q], _mm512_and_si512(v, high), x1);
            units[q] = _mm512_dpbusd_epi32(units[q], _mm512_and_si512(u, low), x2);
            fours[q] = _mm512_dpbusd_epi32(fours[q], _mm512_and_si512(u, high), x3);
        }
    }
    for q in 0..QUADS {
        // Each lane of `fours` is a sum of multiples of 4.
        units[q] = _mm512_add_epi32(units[q], _mm512_srai_epi32::<2>(fours[q]));
    }
    for (quads, acc) in units.as_chunks().0.iter().zip(acc.as_chunks_mut().0) {
        store(_mm512_sub_epi32(sums_of_rows(quads), _mm512_set1_epi32(code_sum)), acc);
    }
}

/// Steps to ask for columns ahead, of the second-level cache: the first has too few misses in flight
/// for lines that do not follow one another.
const AHEAD: usize = 16;

/// One stripe of a matrix by columns: `Σ (w + 1)·x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn stripe_sums(
    lines: &[Line],
    columns: &[[u32; STEP]],
    codes: &[[i8; STEP]],
    sums: &mut [i32; STRIPE_ROWS],
) {
    let (low, high) = (_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c));
    let mut acc = [[_mm512_setzero_si512(); 4]; 4];
    // The last steps ask again for the first columns, which are there.
    let ahead = columns.iter().skip(AHEAD).chain(columns);
    for ((columns, codes), ahead) in columns.iter().zip(codes).zip(ahead) {
        for &column in ahead {
            prefetch::<_MM_HINT_T1>(&lines[column as usize].0, 0);
        }
        let x = _mm512_set1_epi32(i32::from_le_bytes(codes.map(|x| x as u8)));
        let [a, b, c, d] = columns.map(|column| load(&lines[column as usize].0));
        let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
        let (ab_high, cd_high) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
        let rows = [
            _mm512_unpacklo_epi16(ab, cd),
            _mm512_unpackhi_epi16(ab, cd),
            _mm512_unpacklo_epi16(ab_high, cd_high),
            _mm512_unpackhi_epi16(ab_high, cd_high),
        ];
        for (acc, v) in acc.iter_mut().zip(rows) {
            let u = _mm512_srli_epi16::<4>(v);
            acc[0] = _mm512_dpbusd_epi32(acc[0], _mm512_and_si512(v, low), x);
            acc[1] = _mm512_dpbusd_epi32(acc[1], _mm512_and_si512(v, high), x);
            acc[2] = _mm512_dpbusd_epi32(acc[2], _mm512_and_si512(u, low), x);
            acc[3] = _mm512_dpbusd_epi32(acc[3], _mm512_and_si512(u, high), x);
        }
    }
    for (acc, sums) in
        acc.as_flattened().as_chunks::<2>().0.iter().zip(sums.as_chunks_mut::<32>().0)
    {
        let [even, odd] = sums.as_chunks_mut().0 else { unreachable!("two halves") };
        store(acc[0], even);
        // A sum of multiples of 4.
        store(_mm512_srai_epi32::<2>(acc[1]), odd);
    }
}

/// Rows that are summed at once.
const OPEN_ROWS: usize = 4;

/// Rows to ask for ahead, as [`AHEAD`].
const ROWS_AHEAD: usize = 4 * OPEN_ROWS;

/// `Σ (w + 1)·x` of each row in `open`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn open_sums(rows: &Rows, x: &[LineCodes], open: &[u32], sums: &mut [i32]) {
    let (low, high) = (_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c));
    for (first, sums) in (0..).step_by(OPEN_ROWS).zip(sums.chunks_mut(OPEN_ROWS)) {
        // The last ones again, where there are no more.
        let at = |i: usize| rows.row(open[i.min(open.len() - 1)]);
        let now: [_; OPEN_ROWS] = std::array::from_fn(|r| &at(first + r)[..x.len()]);
        let ahead: [_; OPEN_ROWS] = std::array::from_fn(|r| &at(first + ROWS_AHEAD + r)[..x.len()]);
        let mut units = [_mm512_setzero_si512(); OPEN_ROWS];
        let mut fours = [_mm512_setzero_si512(); OPEN_ROWS];
        for (l, x) in x.iter().enumerate() {
            let x = [codes(&x[0]), codes(&x[1]), codes(&x[2]), codes(&x[3])];
            for r in 0..OPEN_ROWS {
                prefetch::<_MM_HINT_T1>(&ahead[r][l].0, 0);
                let v = load(&now[r][l].0);
                let u = _mm512_srli_epi16::<4>(v);
                units[r] = _mm512_dpbusd_epi32(units[r], _mm512_and_si512(v, low), x[0]);
                fours[r] = _mm512_dpbusd_epi32(fours[r], _mm512_and_si512(v, high), x[1]);
                units[r] = _mm512_dpbusd_epi32(units[r], _mm512_and_si512(u, low), x[2]);
                fours[r] = _mm512_dpbusd_epi32(fours[r], _mm512_and_si512(u, high), x[3]);
            }
        }
        for (units, fours) in units.iter_mut().zip(fours) {
            // Each lane of `fours` is a sum of multiples of 4.
            *units = _mm512_add_epi32(*units, _mm512_srai_epi32::<2>(fours));
        }
        // After the transposition, element `r` of each lane is of row `r`.
        let [a, b, c, d] = transpose(units);
        let lanes = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
        let mut wide = [0; 16];
        store(lanes, &mut wide);
        for (r, sum) in sums.iter_mut().enumerate() {
            *sum = wide.iter().skip(r).step_by(OPEN_ROWS).sum();
        }
    }
}

/// One tile and tokens `m..m + T`; `acc` holds T tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn tokens_tile<const T: usize>(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    m: usize,
    acc: &mut [[i32; TILE_ROWS]],
) {
    for pass in 0..QUADS / PASS_QUADS {
        let mut sums = [[_mm512_setzero_si512(); PASS_QUADS]; T];
        let mut tokens = [x.token(m); T];
        for (t, token) in tokens.iter_mut().enumerate() {
            *token = &x.token(m + t)[..tile.len()];
        }
        for (c, chunk) in tile.iter().enumerate() {
            let quads = &chunk.as_chunks::<QUAD_WORDS>().0[pass * PASS_QUADS..][..PASS_QUADS];
            let mut v = [_mm512_setzero_si512(); PASS_QUADS];
            for q in 0..PASS_QUADS {
                if x.asks_ahead(m) {
                    prefetch::<_MM_HINT_T1>(&quads[q], next_tile(tile));
                }
                v[q] = load(&quads[q]);
            }
            accumulate::<0, 0, T>(&mut sums, &v, &tokens, c);
            accumulate::<1, 2, T>(&mut sums, &v, &tokens, c);
            accumulate::<2, 4, T>(&mut sums, &v, &tokens, c);
            accumulate::<3, 6, T>(&mut sums, &v, &tokens, c);
        }
        for (t, acc) in acc.iter_mut().enumerate() {
            let code_sum = _mm512_set1_epi32(x.code_sum(m + t));
            let rows = _mm512_sub_epi32(sums_of_rows(&sums[t]), code_sum);
            store(rows, &mut acc.as_chunks_mut().0[pass]);
        }
    }
}

/// Adds field FIELD (at bit SHIFT) of four quads for T tokens of chunk `c`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn accumulate<const FIELD: usize, const SHIFT: u32, const T: usize>(
    sums: &mut [[__m512i; PASS_QUADS]; T],
    v: &[__m512i; PASS_QUADS],
    tokens: &[&[[i8; CHUNK_K]]; T],
    c: usize,
) {
    let mut x = [_mm512_setzero_si512(); T];
    for t in 0..T {
        x[t] = field::<FIELD>(&tokens[t][c]);
    }
    for q in 0..PASS_QUADS {
        let codes = _mm512_and_si512(_mm512_srli_epi16::<SHIFT>(v[q]), _mm512_set1_epi8(0x03));
        for t in 0..T {
            sums[t][q] = _mm512_dpbusd_epi32(sums[t][q], codes, x[t]);
        }
    }
}

/// One tile of [`GroupLayout::Signs`]: `acc[M][32]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn signs_tile(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    acc: &mut [[i32; TILE_ROWS]],
) {
    for (group, acc) in acc.chunks_mut(4).enumerate() {
        let m = 4 * group;
        match acc.len() {
            4 => signs_tokens::<4>(tile, x, m, acc),
            3 => signs_tokens::<3>(tile, x, m, acc),
            2 => signs_tokens::<2>(tile, x, m, acc),
            _ => signs_tokens::<1>(tile, x, m, acc),
        }
    }
}

/// [`tokens_tile`] for binary weights.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn signs_tokens<const T: usize>(
    tile: &[[u32; CHUNK_WORDS]],
    x: Activations<'_>,
    m: usize,
    acc: &mut [[i32; TILE_ROWS]],
) {
    for pass in 0..QUADS / PASS_QUADS {
        let mut sums = [[_mm512_setzero_si512(); PASS_QUADS]; T];
        let mut tokens = [x.signs_token(m); T];
        for (t, token) in tokens.iter_mut().enumerate() {
            *token = &x.signs_token(m + t)[..tile.len()];
        }
        for (c, chunk) in tile.iter().enumerate() {
            let quads = &chunk.as_chunks::<QUAD_WORDS>().0[pass * PASS_QUADS..][..PASS_QUADS];
            let mut v = [_mm512_setzero_si512(); PASS_QUADS];
            for q in 0..PASS_QUADS {
                v[q] = load(&quads[q]);
            }
            for bit in 0..8 {
                let mut x_bit = [_mm512_setzero_si512(); T];
                for (x_bit, token) in x_bit.iter_mut().zip(&tokens) {
                    *x_bit = broadcast(&token[c].as_chunks().0[bit]);
                }
                for q in 0..PASS_QUADS {
                    let bits = _mm512_and_si512(v[q], _mm512_set1_epi8(1));
                    v[q] = _mm512_srli_epi16::<1>(v[q]);
                    for t in 0..T {
                        sums[t][q] = _mm512_dpbusd_epi32(sums[t][q], bits, x_bit[t]);
                    }
                }
            }
        }
        for (t, acc) in acc.iter_mut().enumerate() {
            let code_sum = _mm512_set1_epi32(x.code_sum(m + t));
            let negatives = sums_of_rows(&sums[t]);
            let rows = _mm512_sub_epi32(code_sum, _mm512_slli_epi32::<1>(negatives));
            store(rows, &mut acc.as_chunks_mut().0[pass]);
        }
    }
}

/// `Σ coarse·x` of one tile of int8 rows, for the two limbs of x.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn coarse_sums(pieces: &[[u32; CHUNK_WORDS]], x: &Input, sums: &mut LimbSums) {
    let mut limb_sums = [[_mm512_setzero_si512(); QUADS]; 2];
    let [high, low] = &mut limb_sums;
    let limbs = x.hi.as_chunks().0.iter().zip(x.lo.as_chunks().0);
    for (group, (hi, lo)) in pieces.as_chunks::<COARSE_PIECES>().0.iter().zip(limbs) {
        ask_next_page(group.as_flattened());
        let (hi, lo) = (fields(hi), fields(lo));
        let lines = group.as_flattened().as_chunks().0.as_chunks::<COARSE_PIECES>().0;
        for q in 0..QUADS {
            let [a, b, c] = lines[q].each_ref().map(|line| load(line));
            let codes = coarse_codes(a, b, c);
            high[q] = dot(high[q], codes, &hi);
            low[q] = dot(low[q], codes, &lo);
        }
    }
    store_limbs(&limb_sums, sums);
}

/// The coarse parts of four rows' groups.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn coarse_codes(a: __m512i, b: __m512i, c: __m512i) -> [__m512i; 4] {
    /// Takes a bit from the second where the first has one, else from the third.
    const CHOOSE: i32 = 0xca;
    let low = |bits| _mm512_set1_epi8(bits);
    // Above its two bits each has others.
    let (first, second) = (_mm512_srli_epi16::<6>(a), _mm512_srli_epi16::<4>(b));
    let two = _mm512_ternarylogic_epi64::<CHOOSE>(low(0x03), first, second);
    let third = _mm512_srli_epi16::<2>(c);
    let last = _mm512_ternarylogic_epi64::<CHOOSE>(low(0x0f), two, third);
    let six = |codes| _mm512_and_si512(codes, low(0x3f));
    [six(a), six(b), six(c), six(last)]
}

/// `Σ rest·x` of one tile of int8 rows, for the two limbs of x.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn rest_sums(pieces: &[[u32; CHUNK_WORDS]], x: &Input, sums: &mut LimbSums) {
    let mut limb_sums = [[_mm512_setzero_si512(); QUADS]; 2];
    let [high, low] = &mut limb_sums;
    let limbs = x.hi.as_chunks().0.iter().zip(x.lo.as_chunks().0);
    for (piece, (hi, lo)) in pieces.iter().zip(limbs) {
        ask_next_page(piece);
        let (hi, lo) = (fields(hi), fields(lo));
        let quads = piece.as_chunks().0;
        for q in 0..QUADS {
            let v = load(&quads[q]);
            let two = |codes| _mm512_and_si512(codes, _mm512_set1_epi8(0x03));
            let codes = [
                two(v),
                two(_mm512_srli_epi16::<2>(v)),
                two(_mm512_srli_epi16::<4>(v)),
                two(_mm512_srli_epi16::<6>(v)),
            ];
            high[q] = dot(high[q], codes, &hi);
            low[q] = dot(low[q], codes, &lo);
        }
    }
    store_limbs(&limb_sums, sums);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn dot(sums: __m512i, codes: [__m512i; 4], x: &[__m512i; 4]) -> __m512i {
    let sums = _mm512_dpbusd_epi32(sums, codes[0], x[0]);
    let sums = _mm512_dpbusd_epi32(sums, codes[1], x[1]);
    let sums = _mm512_dpbusd_epi32(sums, codes[2], x[2]);
    _mm512_dpbusd_epi32(sums, codes[3], x[3])
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn store_limbs(limb_sums: &[[__m512i; QUADS]; 2], sums: &mut LimbSums) {
    for (limb, sums) in limb_sums.iter().zip(sums) {
        for (quads, sums) in limb.as_chunks().0.iter().zip(sums.as_chunks_mut().0) {
            store(sums_of_rows(quads), sums);
        }
    }
}

/// The four fields of 64 limbs, each in all 128-bit lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn fields(x: &[i8; CHUNK_K]) -> [__m512i; 4] {
    [field::<0>(x), field::<1>(x), field::<2>(x), field::<3>(x)]
}

/// The tables of one chunk of a token.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn build_tables(layout: GroupLayout, x: &[f32], tables: &mut NibbleTables) {
    // Bit i of an entry's index, as a sign.
    let sign = |lanes: __mmask16| _mm512_castsi512_ps(_mm512_maskz_set1_epi32(lanes, i32::MIN));
    match layout {
        GroupLayout::I2 => {
            // Entries whose lower (higher) field is 0 or 2, and those where it is 0.
            const LOW: (__mmask16, __mmask16) = (0x5555, 0x1111);
            const HIGH: (__mmask16, __mmask16) = (0x0f0f, 0x000f);
            let (low, high) = (sign(LOW.1), sign(HIGH.1));
            for (i, table) in tables.0.iter_mut().enumerate() {
                let a = _mm512_set1_ps(x[i2_column(2 * i)]);
                let b = _mm512_set1_ps(x[i2_column(2 * i + 1)]);
                let a = _mm512_maskz_xor_ps(LOW.0, a, low);
                let b = _mm512_maskz_xor_ps(HIGH.0, b, high);
                store_table(_mm512_add_ps(a, b), table);
            }
        }
        GroupLayout::Signs => {
            let signs = [sign(0xaaaa), sign(0xcccc), sign(0xf0f0), sign(0xff00)];
            for (table, x) in tables.0.iter_mut().zip(x.as_chunks::<4>().0) {
                let a = _mm512_xor_ps(_mm512_set1_ps(x[0]), signs[0]);
                let b = _mm512_xor_ps(_mm512_set1_ps(x[1]), signs[1]);
                let c = _mm512_xor_ps(_mm512_set1_ps(x[2]), signs[2]);
                let d = _mm512_xor_ps(_mm512_set1_ps(x[3]), signs[3]);
                store_table(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)), table);
            }
        }
    }
}

/// The scales of a tile's rows as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn widen_scales(scales: &GroupScales) -> [f32; TILE_ROWS] {
    let mut wide = [0.0; TILE_ROWS];
    for (words, out) in scales.as_chunks::<8>().0.iter().zip(wide.as_chunks_mut().0) {
        // SAFETY: `words` has 32 bytes to read, and the load needs no alignment.
        let halves = unsafe { _mm256_loadu_si256(words.as_ptr().cast()) };
        store_table(_mm512_cvtph_ps(halves), out);
    }
    wide
}

/// One chunk of [`super::tables`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) fn lookup_chunk(
    chunk: &[u32; CHUNK_WORDS],
    tables: &[NibbleTables],
    sums: &mut [[f32; TILE_ROWS]],
) {
    match tables {
        [a] => lookup_tokens(chunk, [a], sums),
        [a, b] => lookup_tokens(chunk, [a, b], sums),
        [a, b, c] => lookup_tokens(chunk, [a, b, c], sums),
        [a, b, c, d] => lookup_tokens(chunk, [a, b, c, d], sums),
        _ => unreachable!("one to four tokens"),
    }
}

/// One chunk and T tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn lookup_tokens<const T: usize>(
    chunk: &[u32; CHUNK_WORDS],
    tables: [&NibbleTables; T],
    sums: &mut [[f32; TILE_ROWS]],
) {
    let (low, high) = chunk.as_chunks::<QUAD_WORDS>().0.split_at(PASS_QUADS);
    let words = [
        transpose([load(&low[0]), load(&low[1]), load(&low[2]), load(&low[3])]),
        transpose([load(&high[0]), load(&high[1]), load(&high[2]), load(&high[3])]),
    ];
    let mut acc = [[_mm512_setzero_ps(); 2]; T];
    for (w, (&low, &high)) in words[0].iter().zip(&words[1]).enumerate() {
        let mut v = [low, high];
        for nibble in 0..8 {
            for (acc, tables) in acc.iter_mut().zip(tables) {
                let table = load_table(&tables.0[8 * w + nibble]);
                // The permutation looks at the low four bits of each lane.
                for (acc, &v) in acc.iter_mut().zip(&v) {
                    *acc = _mm512_add_ps(*acc, _mm512_permutexvar_ps(v, table));
                }
            }
            v = [_mm512_srli_epi32::<4>(v[0]), _mm512_srli_epi32::<4>(v[1])];
        }
    }
    // The compiler would move the permutation before the additions, and so to every entry.
    let acc = std::hint::black_box(acc);
    for (acc, sums) in acc.iter().zip(sums) {
        for (&acc, rows) in acc.iter().zip(sums.as_chunks_mut().0) {
            store_table(_mm512_permutexvar_ps(row_order(), acc), rows);
        }
    }
}

/// Of four registers (of quads `q`), element `e` of lane `l`: register `e` holds, in element `q` of
/// lane `l`, what register `q` held in its element `e`. Lane `l` of a quad is its row `l`.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose([a, b, c, d]: [__m512i; PASS_QUADS]) -> [__m512i; 4] {
    let (ab_low, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    let (cd_low, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    [
        _mm512_unpacklo_epi64(ab_low, cd_low),
        _mm512_unpackhi_epi64(ab_low, cd_low),
        _mm512_unpacklo_epi64(ab_high, cd_high),
        _mm512_unpackhi_epi64(ab_high, cd_high),
    ]
}

/// After [`transpose`], row `4q + l` is in element `4l + q`; this order undoes it.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn row_order() -> __m512i {
    _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
}

/// The sums of the 128-bit lanes of four quads: 16 rows.
#[inline]
#[target_feature(enable = "avx512f")]
fn sums_of_rows(quads: &[__m512i; PASS_QUADS]) -> __m512i {
    let [a, b, c, d] = transpose(*quads);
    let sums = _mm512_add_epi32(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d));
    _mm512_permutexvar_epi32(row_order(), sums)
}

/// 16 rows' sums.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(rows: __m512i, out: &mut [i32; 16]) {
    // SAFETY: `out` has 64 bytes to write, and the store needs no alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), rows) };
}

/// 16 floats.
#[inline]
#[target_feature(enable = "avx512f")]
fn store_table(values: __m512, out: &mut [f32; 16]) {
    // SAFETY: `out` has 64 bytes to write, and the store needs no alignment.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
}

/// A nibble's table.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_table(table: &[f32; 16]) -> __m512 {
    // SAFETY: `table` has 64 bytes to read, and the load needs no alignment.
    unsafe { _mm512_loadu_ps(table.as_ptr()) }
}

/// The 16 activations of a field, in each of the four 128-bit lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn field<const FIELD: usize>(x: &[i8; CHUNK_K]) -> __m512i {
    broadcast(&x.as_chunks().0[FIELD])
}

/// 16 activations in each of the four 128-bit lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn broadcast(codes: &[i8; 16]) -> __m512i {
    // SAFETY: `codes` has 16 bytes to read, and the load needs no alignment.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) })
}

/// 64 activations.
#[inline]
#[target_feature(enable = "avx512f")]
fn codes(x: &[i8; CHUNK_K]) -> __m512i {
    // SAFETY: `x` has 64 bytes to read, and the load needs no alignment.
    unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
}

/// Four rows' pieces.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(quad: &[u32; QUAD_WORDS]) -> __m512i {
    // SAFETY: `quad` has 64 bytes to read, and the load needs no alignment.
    unsafe { _mm512_loadu_si512(quad.as_ptr().cast()) }
}
