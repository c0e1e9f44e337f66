//! AVX-VNNI: `vpdpbusd` multiplies 32 unsigned codes by 32 activations and adds them into 8 i32
//! lanes. Otherwise as the AVX2 level, without sums in i16.
//!
//! Processors with AVX-512 have the same instruction in another encoding, and the tests run the
//! kernels there in that one.
#![expect(unsafe_code, reason = "entry into target features")]

use std::arch::x86_64::*;

use cpu_ref::layout::TILE_ROWS;

use super::avx2::{
    BLOCK_CHUNKS, BLOCK_TOKENS, PAIR_WORDS, PAIRS, QUARTERS, Vector, add_rows, blocks, coarse_sums,
    codes, field, fields, load, lookup_chunk, open_sums, prefetch_next, rest_sums, row_sums,
    stripe_sums, unpack,
};
use super::base3::{FEW_BASE3, few_base3, unpack_base3};
use super::portable::widen_scales;
use super::tables::build_tables;
use super::{Activations, CHUNK_WORDS, Level, impl_kernels};

/// The AVX-VNNI level; exists only on a machine that has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct AvxVnni(());

impl AvxVnni {
    /// Whether this machine has AVX2 and AVX-VNNI.
    pub(super) fn is_available() -> bool {
        super::avx2::Avx2::is_available() && is_x86_feature_detected!("avxvnni")
    }

    /// The level's token; `None` if this machine does not run it.
    pub(super) fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }
}

impl_kernels!(
    AvxVnni,
    Level::AvxVnni,
    #[target_feature(enable = "avx2,f16c,avxvnni")]
);

/// Defines `gemm_tile` and `signs_tile` with target features and their `vpdpbusd`.
macro_rules! tiles {
    (#[$features:meta] $dpbusd:ident) => {
        blocks!(#[$features] 6: 1 2 3 4 5 6);

        /// Adds 4 products a row.
        #[inline]
        #[$features]
        fn step(sum: __m256i, codes: __m256i, x: __m256i) -> __m256i {
            $dpbusd(sum, codes, x)
        }

        /// A lane is a row's sum already.
        #[inline]
        #[$features]
        fn widen(sum: __m256i) -> __m256i {
            sum
        }

        /// One tile: `acc[M][32]`.
        #[$features]
        fn gemm_tile(
            tile: &[[u32; CHUNK_WORDS]],
            x: Activations<'_>,
            acc: &mut [[i32; TILE_ROWS]],
        ) {
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

        /// One tile and tokens `m..m + T`, P pairs a pass; `acc` holds T tokens.
        #[$features]
        fn tokens_tile<const T: usize, const P: usize>(
            tile: &[[u32; CHUNK_WORDS]],
            x: Activations<'_>,
            m: usize,
            acc: &mut [[i32; TILE_ROWS]],
        ) {
            for pass in 0..PAIRS / P {
                let mut sums = [[_mm256_setzero_si256(); P]; T];
                for (c, chunk) in tile.iter().enumerate() {
                    let pairs = &chunk.as_chunks::<PAIR_WORDS>().0[pass * P..][..P];
                    if x.asks_ahead(m) {
                        prefetch_next(pairs, tile);
                    }
                    let mut x_fields = [[_mm256_setzero_si256(); 4]; T];
                    for (t, x_fields) in x_fields.iter_mut().enumerate() {
                        *x_fields = fields(&x.token(m + t)[c]);
                    }
                    for (p, pair) in pairs.iter().enumerate() {
                        let codes = codes(load(pair));
                        for t in 0..T {
                            for j in 0..4 {
                                sums[t][p] = step(sums[t][p], codes[j], x_fields[t][j]);
                            }
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

        /// One tile of [`super::GroupLayout::Signs`]: `acc[M][32]`.
        #[$features]
        fn signs_tile(
            tile: &[[u32; CHUNK_WORDS]],
            x: Activations<'_>,
            acc: &mut [[i32; TILE_ROWS]],
        ) {
            for (group, acc) in acc.chunks_mut(2).enumerate() {
                let m = 2 * group;
                match acc.len() {
                    2 => signs_tokens::<2, 4>(tile, x, m, acc),
                    _ => signs_tokens::<1, 8>(tile, x, m, acc),
                }
            }
        }

        /// [`tokens_tile`] for binary weights.
        #[$features]
        fn signs_tokens<const T: usize, const P: usize>(
            tile: &[[u32; CHUNK_WORDS]],
            x: Activations<'_>,
            m: usize,
            acc: &mut [[i32; TILE_ROWS]],
        ) {
            for pass in 0..PAIRS / P {
                let mut sums = [[_mm256_setzero_si256(); P]; T];
                for (c, chunk) in tile.iter().enumerate() {
                    let mut v = [_mm256_setzero_si256(); P];
                    let pairs = &chunk.as_chunks::<PAIR_WORDS>().0[pass * P..];
                    for (v, pair) in v.iter_mut().zip(pairs) {
                        *v = load(pair);
                    }
                    for bit in 0..8 {
                        let mut x_bit = [_mm256_setzero_si256(); T];
                        for (t, x_bit) in x_bit.iter_mut().enumerate() {
                            *x_bit = field(&x.signs_token(m + t)[c].as_chunks().0[bit]);
                        }
                        for p in 0..P {
                            let bits = _mm256_and_si256(v[p], _mm256_set1_epi8(1));
                            v[p] = _mm256_srli_epi16::<1>(v[p]);
                            for t in 0..T {
                                sums[t][p] = step(sums[t][p], bits, x_bit[t]);
                            }
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
    };
}

tiles!(
    #[target_feature(enable = "avx2,avxvnni")]
    _mm256_dpbusd_avx_epi32
);

/// The same kernels with the instruction as AVX-512 encodes it.
#[cfg(test)]
mod tests {
    use cpu_ref::layout::{CHUNK_K, signs};

    use super::*;
    use crate::backend::simd::TokenScale;
    use crate::layout::{Layout, Packed, Signs};
    use crate::random::Random;
    use crate::shape::MatShape;

    tiles!(
        #[target_feature(enable = "avx2,avx512vl,avx512vnni")]
        _mm256_dpbusd_epi32
    );

    fn runs() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
    }

    /// Compares a tile of 32 rows with the reference, for M of every remainder.
    fn check(
        w: &[i8],
        words: &[u32],
        k: usize,
        tile: impl Fn(&[u32], &[i8], &[TokenScale]) -> Vec<i32>,
    ) {
        for m in (1..=14).chain([31]) {
            let x = match m {
                3 => vec![-128; m * k],
                4 => vec![127; m * k],
                _ => Random::new(m as u64).codes(m * k),
            };
            let sum = |x: &[i8]| x.iter().map(|&x| i32::from(x)).sum();
            let scale = |x: &[i8]| TokenScale { act_scale: 1.0, code_sum: sum(x) };
            let scales: Vec<_> = x.chunks_exact(k).map(scale).collect();
            assert_eq!(tile(words, &x, &scales), cpu_ref::gemm::gemm(w, &x, k), "K {k}, M {m}");
        }
    }

    #[test]
    fn products_are_those_of_the_reference() {
        if !runs() {
            return;
        }
        for k in [64, 192, 256, 320, 1088, 6912] {
            let shape = MatShape::new(TILE_ROWS, k).unwrap();
            let random = Random::new(k as u64).trits(shape.len());
            for w in [random, vec![1; shape.len()], vec![-1; shape.len()]] {
                let packed = Packed::pack(Layout::I2, shape, &w);
                check(&w, packed.words(), k, |words, x, scales| {
                    let mut acc = vec![[i32::MIN; TILE_ROWS]; scales.len()];
                    let x = Activations::new(x, scales, k / CHUNK_K);
                    // SAFETY: the features are there.
                    unsafe { gemm_tile(words.as_chunks().0, x, &mut acc) };
                    acc.into_flattened()
                });
            }
        }
    }

    #[test]
    fn binary_products_are_those_of_the_reference() {
        if !runs() {
            return;
        }
        for k in [128, 384, 2560] {
            let shape = MatShape::new(TILE_ROWS, k).unwrap();
            let mut w = Random::new(k as u64).trits(shape.len());
            w.iter_mut().for_each(|w| *w = if *w < 0 { -1 } else { 1 });
            let packed = Packed::pack(Signs, shape, &w);
            check(&w, packed.words(), k, |words, x, scales| {
                let place = |(i, _): (usize, &i8)| {
                    let (chunk, at) = (i / signs::CHUNK_K, i % signs::CHUNK_K);
                    x[chunk * signs::CHUNK_K + 8 * (at % 16) + at / 16]
                };
                let x: Vec<i8> = x.iter().enumerate().map(place).collect();
                let mut acc = vec![[i32::MIN; TILE_ROWS]; scales.len()];
                let x = Activations::new(&x, scales, k / CHUNK_K);
                // SAFETY: the features are there.
                unsafe { signs_tile(words.as_chunks().0, x, &mut acc) };
                acc.into_flattened()
            });
        }
    }
}
