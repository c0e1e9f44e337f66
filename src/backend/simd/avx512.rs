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
//!    front to back; they are prefetched 4 KiB ahead.
//! 4. GEMM keeps 4 quads × up to 4 tokens: a masked field is used for every token.
#![expect(unsafe_code, reason = "loads, and entry into target features")]

use std::arch::x86_64::*;

use cpu_ref::layout::{CHUNK_K, TILE_ROWS};

use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

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

/// Words of a quad: four rows × 16 bytes, one register.
const QUAD_WORDS: usize = 16;
/// Quads of a chunk.
const QUADS: usize = CHUNK_WORDS / QUAD_WORDS;
/// Quads that one pass of GEMM sums.
const PASS_QUADS: usize = 4;
/// Chunks of 512 bytes to prefetch ahead: 4 KiB.
const PREFETCH_CHUNKS: usize = 8;

/// One tile: `acc[M][32]`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn gemm_tile(tile: &[[u32; CHUNK_WORDS]], x: Activations<'_>, acc: &mut [[i32; TILE_ROWS]]) {
    if let [acc] = acc {
        return gemv_tile(tile, x.token(0), x.scales[0].code_sum, acc);
    }
    for (group, acc) in acc.chunks_mut(4).enumerate() {
        let m = 4 * group;
        match acc.len() {
            4 => tokens_tile::<4>(tile, x, m, acc),
            3 => tokens_tile::<3>(tile, x, m, acc),
            2 => tokens_tile::<2>(tile, x, m, acc),
            _ => tokens_tile::<1>(tile, x, m, acc),
        }
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
        let (x0, x1, x2, x3) = (field::<0>(x), field::<1>(x), field::<2>(x), field::<3>(x));
        for (q, quad) in chunk.as_chunks::<QUAD_WORDS>().0.iter().enumerate() {
            prefetch(quad);
            let v = load(quad);
            let u = _mm512_srli_epi16::<4>(v);
            units[q] = _mm512_dpbusd_epi32(units[q], _mm512_and_si512(v, low), x0);
            fours[q] = _mm512_dpbusd_epi32(fours[q], _mm512_and_si512(v, high), x1);
            units[q] = _mm512_dpbusd_epi32(units[q], _mm512_and_si512(u, low), x2);
            fours[q] = _mm512_dpbusd_epi32(fours[q], _mm512_and_si512(u, high), x3);
        }
    }
    for (q, rows) in acc.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // Each lane of `fours` is a sum of multiples of 4.
        let sum = _mm512_add_epi32(units[q], _mm512_srai_epi32::<2>(fours[q]));
        *rows = row_sums(sum).map(|sum| sum - code_sum);
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
                v[q] = load(&quads[q]);
            }
            accumulate::<0, 0, T>(&mut sums, &v, &tokens, c);
            accumulate::<1, 2, T>(&mut sums, &v, &tokens, c);
            accumulate::<2, 4, T>(&mut sums, &v, &tokens, c);
            accumulate::<3, 6, T>(&mut sums, &v, &tokens, c);
        }
        for (t, acc) in acc.iter_mut().enumerate() {
            let code_sum = x.scales[m + t].code_sum;
            let rows = &mut acc.as_chunks_mut::<4>().0[pass * PASS_QUADS..][..PASS_QUADS];
            for (rows, &sum) in rows.iter_mut().zip(&sums[t]) {
                *rows = row_sums(sum).map(|sum| sum - code_sum);
            }
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

/// The sums of the four 128-bit lanes: one a row.
#[inline]
#[target_feature(enable = "avx512f")]
fn row_sums(lanes: __m512i) -> [i32; 4] {
    let mut out = [[0i32; 4]; 4];
    // SAFETY: `out` has 64 bytes to write, and the store needs no alignment.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), lanes) };
    out.map(|lane| lane.iter().sum())
}

/// The 16 activations of a field, in each of the four 128-bit lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn field<const FIELD: usize>(x: &[i8; CHUNK_K]) -> __m512i {
    let codes = &x.as_chunks::<16>().0[FIELD];
    // SAFETY: `codes` has 16 bytes to read, and the load needs no alignment.
    _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) })
}

/// Four rows' pieces.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(quad: &[u32; QUAD_WORDS]) -> __m512i {
    // SAFETY: `quad` has 64 bytes to read, and the load needs no alignment.
    unsafe { _mm512_loadu_si512(quad.as_ptr().cast()) }
}

/// Asks for the cache line [`PREFETCH_CHUNKS`] ahead.
#[inline]
#[target_feature(enable = "avx512f")]
fn prefetch(quad: &[u32; QUAD_WORDS]) {
    let ahead = quad.as_ptr().wrapping_add(PREFETCH_CHUNKS * CHUNK_WORDS);
    #[allow(unused_unsafe, reason = "the intrinsic is safe in newer compilers")]
    // SAFETY: a prefetch is a hint; it does not access memory, whatever the address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
    }
}
