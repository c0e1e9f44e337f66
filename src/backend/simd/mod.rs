//! The SIMD CPU backend: kernels for several instruction sets, chosen at run time, and the backend
//! that runs a model on them.
//!
//! Ternary matrices are in the layout I2 (`cpu_ref::layout::i2`): tiles of 32 rows, chunks of 64
//! columns, 16 bytes a row and chunk. A byte holds four unsigned codes `w + 1`, and the multiply-add
//! instructions of every instruction set take them as they are against signed activations:
//! `Σ w·x = Σ (w + 1)·x − Σ x`. Field `j` of the 16 bytes stands for 16 consecutive `k`, so a load
//! of 16 activations meets a masked, shifted load of weights with nothing to rearrange.
//!
//! Where a level has instructions for it, they may be in the layout `cpu_ref::layout::base3` instead:
//! fewer bytes, for the same activations (`base3.rs`).
//!
//! Matrices with scales of groups of inputs have float activations, and then a product is a table
//! lookup (`tables.rs`); binary ones are in the layout `cpu_ref::layout::signs`.
//!
//! The KV cache is in blocks, whose layout ([`crate::kv_cache`]) is made for `attention.rs`.
//!
//! This module is the only home of `unsafe` in the crate.

mod affinity;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_vbmi;
#[cfg(target_arch = "x86_64")]
mod avx_vnni;
mod base3;
mod columns;
mod cpu;
mod head;
mod helpers;
mod lanes;
mod load;
mod matrix;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon_dotprod;
#[cfg(all(target_arch = "aarch64", target_endian = "little"))]
mod neon_i8mm;
mod packed_file;
mod pool;
mod portable;
#[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
mod relaxed_simd;
mod rows;
mod scalar;
#[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
mod simd128;
mod tables;

use std::ffi::OsStr;

use cpu_ref::head_int8::Input;
use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, TILE_ROWS, signs, split_rows};
use cpu_ref::mlp::Activation;

use crate::error::{Error, Result};
use crate::kv_cache::{HeadChunk, HeadChunkMut};
use crate::layout::Line;

pub use attention::{Attended, Queries, Softmax, attention};
pub use columns::{Columns, NonZeros};
pub use cpu::{SimdBackend, description, threads};
pub use helpers::{lend_thread, lent_thread_crashed, lent_threads};
pub(crate) use matrix::Matrix;
pub use portable::TokenScale;
pub use rows::{Open, Rows};

/// Words of one chunk of a tile: 32 rows × 16 bytes.
const CHUNK_WORDS: usize = TILE_ROWS * PIECE_WORDS;

/// Bytes of activations that a GEMM goes through with one tile after another: a quarter of a small
/// second-level cache that two threads share.
const CACHED_CODES: usize = 256 << 10;

/// A multiple of how many tokens any level takes at once.
const TOKENS_STEP: usize = 12;

/// The environment variable that forces a [`Level`].
const LEVEL_VARIABLE: &str = "STERNA_CPU";

/// The instruction sets there are kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Level {
    /// x86-64 with AVX-512 F, BW, DQ, VL, VNNI and VBMI.
    Avx512Vbmi,
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI.
    Avx512Vnni,
    /// x86-64 with AVX2 and AVX-VNNI.
    AvxVnni,
    /// x86-64 with AVX2.
    Avx2,
    /// AArch64 with the extensions for dot products and for products of int8 matrices.
    NeonI8mm,
    /// AArch64 with the dot-product extension.
    NeonDotprod,
    /// AArch64 without it.
    Neon,
    /// WebAssembly with relaxed SIMD.
    RelaxedSimd,
    /// WebAssembly with 128-bit SIMD.
    Simd128,
    /// Whatever the compiler makes of plain loops.
    Scalar,
}

impl Level {
    /// All levels, best first.
    pub const ALL: [Self; 10] = [
        Self::Avx512Vbmi,
        Self::Avx512Vnni,
        Self::AvxVnni,
        Self::Avx2,
        Self::NeonI8mm,
        Self::NeonDotprod,
        Self::Neon,
        Self::RelaxedSimd,
        Self::Simd128,
        Self::Scalar,
    ];

    /// As the environment variable `STERNA_CPU` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Vbmi => "avx512vbmi",
            Self::Avx512Vnni => "avx512vnni",
            Self::AvxVnni => "avxvnni",
            Self::Avx2 => "avx2",
            Self::NeonI8mm => "neon-i8mm",
            Self::NeonDotprod => "neon-dotprod",
            Self::Neon => "neon",
            Self::RelaxedSimd => "relaxed-simd",
            Self::Simd128 => "simd128",
            Self::Scalar => "scalar",
        }
    }

    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Avx512Vbmi => "AVX-512 VNNI and VBMI",
            Self::Avx512Vnni => "AVX-512 VNNI",
            Self::AvxVnni => "AVX-VNNI",
            Self::Avx2 => "AVX2",
            Self::NeonI8mm => "NEON int8 matrix product",
            Self::NeonDotprod => "NEON dot product",
            Self::Neon => "NEON",
            Self::RelaxedSimd => "WebAssembly relaxed SIMD",
            Self::Simd128 => "WebAssembly SIMD",
            Self::Scalar => "scalar",
        }
    }

    /// The levels that this machine runs, best first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|level| level.kernels().is_some())
    }

    /// The level that `STERNA_CPU` names, or else the best of this machine.
    ///
    /// # Errors
    /// [`Error::CpuLevel`] if the variable names no level, or one that this machine does not run.
    pub fn detect() -> Result<Self> {
        Self::choose(std::env::var_os(LEVEL_VARIABLE).as_deref())
    }

    /// [`Level::detect`], given the variable's value.
    fn choose(forced: Option<&OsStr>) -> Result<Self> {
        match forced {
            None => Ok(Self::available().next().unwrap_or(Self::Scalar)),
            Some(name) => Self::available()
                .find(|level| level.name() == name)
                .ok_or_else(|| Self::unavailable(&name.to_string_lossy())),
        }
    }

    fn unavailable(found: &str) -> Error {
        let names: Vec<_> = Self::available().map(Self::name).collect();
        Error::CpuLevel { expected: names.join(", "), found: found.to_owned() }
    }

    /// Whether five trits a byte are multiplied as they are, at the speed of memory.
    pub fn has_base3(self) -> bool {
        self == Self::Avx512Vbmi
    }

    /// The level's kernels, or an error that names the levels of this machine.
    fn require(self) -> Result<Box<dyn Kernels>> {
        self.kernels().ok_or_else(|| Self::unavailable(self.name()))
    }

    /// The level's kernels; `None` if this machine does not run them.
    pub fn kernels(self) -> Option<Box<dyn Kernels>> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vbmi => Some(Box::new(avx512_vbmi::Avx512Vbmi::new()?)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Some(Box::new(avx512::Avx512Vnni::new()?)),
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Some(Box::new(avx_vnni::AvxVnni::new()?)),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Some(Box::new(avx2::Avx2::new()?)),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonI8mm => Some(Box::new(neon_i8mm::NeonI8mm::new()?)),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::NeonDotprod => Some(Box::new(neon_dotprod::NeonDotprod::new()?)),
            #[cfg(all(target_arch = "aarch64", target_endian = "little"))]
            Self::Neon => Some(Box::new(neon::Neon::new()?)),
            #[cfg(all(target_arch = "wasm32", target_feature = "relaxed-simd"))]
            Self::RelaxedSimd => Some(Box::new(relaxed_simd::RelaxedSimd::new()?)),
            #[cfg(all(target_arch = "wasm32", target_feature = "simd128"))]
            Self::Simd128 => Some(Box::new(simd128::Simd128::new()?)),
            Self::Scalar => Some(Box::new(scalar::Scalar::new()?)),
            _ => None,
        }
    }
}

/// M tokens' int8 activations, K padded to whole chunks with zeros.
#[derive(Debug, Clone, Copy)]
pub struct Activations<'a> {
    codes: &'a [i8],
    scales: &'a [TokenScale],
    n_tokens: usize,
    /// Chunks of 64 of a whole token.
    stride: usize,
    /// Chunks of this part of K, and the first of them.
    chunks: usize,
    first_chunk: usize,
    /// Scales of a token, and the one of this part.
    groups: usize,
    group: usize,
    /// Whether they meet weights that were unpacked into a cache, so that none are to be asked for.
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "only x86-64 asks ahead"))]
    in_cache: bool,
}

impl<'a> Activations<'a> {
    /// `codes[M, 64·chunks]` with one scale a token.
    ///
    /// # Panics
    /// If the lengths do not match, or there is no token.
    pub fn new(codes: &'a [i8], scales: &'a [TokenScale], chunks: usize) -> Self {
        Self::of_groups(codes, scales, chunks, 1)
    }

    /// `codes[M, 64·chunks]` with a scale for each of `groups` equal parts: `scales[M, groups]`.
    ///
    /// # Panics
    /// If the lengths do not match, or there is no token.
    pub fn of_groups(
        codes: &'a [i8],
        scales: &'a [TokenScale],
        chunks: usize,
        groups: usize,
    ) -> Self {
        assert!(!scales.is_empty() && chunks > 0 && groups > 0, "no activations");
        assert!(chunks.is_multiple_of(groups), "groups are whole chunks");
        assert!(scales.len().is_multiple_of(groups), "scales are [M, groups]");
        let n_tokens = scales.len() / groups;
        assert_eq!(codes.len(), n_tokens * chunks * CHUNK_K, "codes are [M, 64·chunks]");
        Self {
            codes,
            scales,
            n_tokens,
            stride: chunks,
            chunks,
            first_chunk: 0,
            groups,
            group: 0,
            in_cache: false,
        }
    }

    /// M.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Tokens `first..first + n`, and of those group `group` alone.
    fn part(self, first: usize, n: usize, group: usize) -> Self {
        let chunks = self.stride / self.groups;
        Self { chunks, first_chunk: group * chunks, group, ..self.tokens(first, n) }
    }

    /// Tokens `first..first + n`.
    fn tokens(self, first: usize, n: usize) -> Self {
        Self {
            codes: &self.codes[first * self.stride * CHUNK_K..],
            scales: &self.scales[first * self.groups..],
            n_tokens: n,
            ..self
        }
    }

    /// Chunks `first..first + n` of these, for weights that were unpacked into a cache; the sums and scales
    /// stay those of all.
    fn columns(self, first: usize, n: usize) -> Self {
        Self { first_chunk: self.first_chunk + first, chunks: n, in_cache: true, ..self }
    }

    /// Whether the pass of token `m` over a tile, the first of several, is to ask for the next tile.
    #[cfg(target_arch = "x86_64")]
    fn asks_ahead(&self, m: usize) -> bool {
        m == 0 && !self.in_cache
    }

    /// The tokens, as many at a time as stay in the second-level cache while tiles pass; with the
    /// number of the first.
    fn blocks(self) -> impl Iterator<Item = (usize, Self)> {
        let tokens = CACHED_CODES / (self.stride * CHUNK_K);
        let tokens = (tokens / TOKENS_STEP).max(1) * TOKENS_STEP;
        (0..self.n_tokens).step_by(tokens).map(move |first| {
            (first, self.part(first, tokens.min(self.n_tokens - first), self.group))
        })
    }

    /// Token `m` in chunks.
    fn token(&self, m: usize) -> &'a [[i8; CHUNK_K]] {
        &self.codes.as_chunks().0[m * self.stride + self.first_chunk..][..self.chunks]
    }

    /// Token `m` in chunks of [`signs`].
    fn signs_token(&self, m: usize) -> &'a [[i8; signs::CHUNK_K]] {
        self.token(m).as_flattened().as_chunks().0
    }

    /// The sum of token `m`'s codes.
    fn code_sum(&self, m: usize) -> i32 {
        self.scales[m * self.groups + self.group].code_sum
    }

    /// What multiplies token `m`'s codes back.
    fn act_scale(&self, m: usize) -> f32 {
        self.scales[m * self.groups + self.group].act_scale
    }
}

/// The layout that a matrix with scales of groups is packed in here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupLayout {
    /// `cpu_ref::layout::i2`.
    I2,
    /// `cpu_ref::layout::signs`: binary, in groups of a multiple of 128.
    Signs,
}

impl GroupLayout {
    /// Columns of a chunk.
    pub fn chunk_k(self) -> usize {
        match self {
            Self::I2 => CHUNK_K,
            Self::Signs => signs::CHUNK_K,
        }
    }

    /// Where the kernels want the int8 activation of column `k`: binary ones of a chunk go bit by
    /// bit of the 16 bytes.
    pub(crate) fn place(self, k: usize) -> usize {
        match self {
            Self::I2 => k,
            Self::Signs => k / signs::CHUNK_K * signs::CHUNK_K + 16 * (k % 8) + k % 128 / 8,
        }
    }
}

/// Some whole tiles of a packed matrix with scales of groups.
#[derive(Debug, Clone, Copy)]
pub struct GroupWeights<'a> {
    layout: GroupLayout,
    words: &'a [u32],
    scales: &'a [u32],
    k: usize,
    group: usize,
}

impl<'a> GroupWeights<'a> {
    /// `words[tiles][chunks][32][4]` and `scales[tiles][K/group][16]`
    /// (`cpu_ref::layout::group_scales`).
    ///
    /// # Panics
    /// If the group is not a whole number of chunks, K of groups, or a length does not match.
    pub fn new(
        layout: GroupLayout,
        (words, scales): (&'a [u32], &'a [u32]),
        k: usize,
        group: usize,
    ) -> Self {
        assert!(group > 0 && group.is_multiple_of(layout.chunk_k()), "groups of whole chunks");
        assert!(k > 0 && k.is_multiple_of(group), "whole groups");
        let weights = Self { layout, words, scales, k, group };
        let tiles = weights.tiles();
        assert_eq!(words.len(), tiles * weights.tile_words(), "words are [tiles, chunks, 32, 4]");
        assert_eq!(scales.len(), tiles * weights.tile_scales(), "scales are [tiles, K/group, 16]");
        weights
    }

    /// K/group.
    pub fn groups(&self) -> usize {
        self.k / self.group
    }

    /// Tiles of 32 rows.
    pub fn tiles(&self) -> usize {
        self.words.len() / self.tile_words()
    }

    /// Tiles `first..first + n`.
    #[must_use]
    pub fn part(self, first: usize, n: usize) -> Self {
        let (words, scales) = (self.tile_words(), self.tile_scales());
        Self {
            words: &self.words[first * words..][..n * words],
            scales: &self.scales[first * scales..][..n * scales],
            ..self
        }
    }

    fn tile_words(&self) -> usize {
        self.k / self.layout.chunk_k() * CHUNK_WORDS
    }

    fn tile_scales(&self) -> usize {
        self.groups() * TILE_ROWS / 2
    }

    /// Chunks of a group.
    fn group_chunks(&self) -> usize {
        self.group / self.layout.chunk_k()
    }

    /// The chunks of tile `tile` and its scales, a group each.
    fn tile(&self, tile: usize) -> (&'a [[u32; CHUNK_WORDS]], &'a [GroupScales]) {
        let part = self.part(tile, 1);
        (part.words.as_chunks().0, part.scales.as_chunks().0)
    }
}

/// The scales of a tile's rows for one group: two IEEE halves a word.
type GroupScales = [u32; TILE_ROWS / 2];

/// Some rows of a table `[.., K]`, in the precision of the file.
#[derive(Debug, Clone, Copy)]
pub enum TableRows<'a> {
    /// bfloat16 bit patterns.
    Bf16(&'a [u16]),
    /// IEEE half bit patterns.
    F16(&'a [u16]),
    /// IEEE single.
    F32(&'a [f32]),
    /// int8 with scales: see [`crate::weights::Codes`].
    Codes {
        /// Elements a scale, a multiple of 16 that divides K.
        group: usize,
        /// The codes.
        codes: &'a [i8],
        /// One a group.
        scale: &'a [f32],
        /// One a group, or empty.
        min: &'a [f32],
    },
}

impl TableRows<'_> {
    /// Rows `start..end` of `[.., k]`, as far as there are.
    fn rows(self, k: usize, start: usize, end: usize) -> Self {
        let range = start * k..(end * k).min(self.len());
        match self {
            Self::Bf16(rows) => Self::Bf16(&rows[range]),
            Self::F16(rows) => Self::F16(&rows[range]),
            Self::F32(rows) => Self::F32(&rows[range]),
            Self::Codes { group, codes, scale, min } => {
                let groups = range.start / group..range.end / group;
                let min = if min.is_empty() { min } else { &min[groups.clone()] };
                Self::Codes { group, codes: &codes[range], scale: &scale[groups], min }
            }
        }
    }

    /// Whether these are whole rows of `[.., k]` with their scales.
    fn fit(&self, k: usize) -> bool {
        let scaled = match *self {
            Self::Codes { group, codes, scale, min } => {
                group > 0
                    && group.is_multiple_of(portable::CODE_LANES)
                    && k.is_multiple_of(group)
                    && scale.len() == codes.len() / group
                    && (min.is_empty() || min.len() == scale.len())
            }
            _ => true,
        };
        scaled && self.len().is_multiple_of(k)
    }

    /// Elements.
    fn len(&self) -> usize {
        match self {
            Self::Bf16(rows) | Self::F16(rows) => rows.len(),
            Self::F32(rows) => rows.len(),
            Self::Codes { codes, .. } => codes.len(),
        }
    }
}

/// The kernels of one [`Level`]: each a twin of the `cpu_ref` function of its name.
///
/// Lengths that do not match the stated shapes panic, as in `cpu_ref`. Integer results are equal to
/// the twin's; the bounds of the others stand beside the portable kernels, and all levels return
/// the same bits.
pub trait Kernels: Send + Sync {
    /// Which level.
    fn level(&self) -> Level;

    /// `acc[n,m] = Σ_k w[n,k]·x[m,k]` for whole tiles of packed weights
    /// `words[tiles][chunks][32][4]`, into `acc[tiles][M][32]`. GEMV for M = 1.
    fn gemm(&self, words: &[u32], x: Activations<'_>, acc: &mut [i32]);

    /// [`Kernels::gemm`] for five weights a byte, `words[tiles][pieces][4][32]`
    /// (`cpu_ref::layout::base3`).
    fn gemm_base3(&self, words: &[u32], x: Activations<'_>, acc: &mut [i32]);

    /// `acc[n] = Σ_k w[n,k]·x[k]` of the inputs that are not 0, for whole stripes of a matrix by
    /// columns: `lines[stripes][K]` and `acc[256·stripes]`.
    fn gemv_columns(&self, lines: &[Line], x: &NonZeros, acc: &mut [i32]);

    /// `acc[i] = Σ_k w[n,k]·x[k]` of some rows n = `open[i]` of a matrix by rows, for one token padded
    /// to [`Rows::chunks`].
    fn gemv_rows(&self, rows: &Rows, x: Activations<'_>, open: &[u32], acc: &mut [i32]);

    /// `y[n,m] = Σ_g d[n,g]·Σ_{k∈g} w[n,k]·x[m,k]` for M tokens `x[M,K]`, into `y[tiles][M][32]`:
    /// `cpu_ref::group_gemv::group_dot` within its bound.
    fn group_gemm(&self, weights: GroupWeights<'_>, x: &[f32], y: &mut [f32]);

    /// `cpu_ref::group_gemv::group_dot_int8` of every row and token, into `y[tiles][M][32]`; the
    /// codes as [`Kernels::quantize_absmax_groups`] leaves them.
    fn group_gemm_int8(&self, weights: GroupWeights<'_>, x: Activations<'_>, y: &mut [f32]);

    /// One token `x[K]` → `codes[K]` in the order that the layout's kernels take them in, and
    /// `scales[K/group]`.
    fn quantize_absmax_groups(
        &self,
        x: &[f32],
        layout: GroupLayout,
        codes: &mut [i8],
        scales: &mut [TokenScale],
    );

    /// One token `x[K]` → `codes[≥ K]`, zero past K.
    fn quantize_absmax(&self, x: &[f32], codes: &mut [i8]) -> TokenScale;

    /// `rmsnorm` where there is a weight `[K]`, then `quantize_absmax`.
    fn norm_quantize(
        &self,
        x: &[f32],
        weight: Option<&[f32]>,
        eps: f32,
        codes: &mut [i8],
    ) -> TokenScale;

    /// `y[K]` from `x[K]` and `weight[K]`.
    fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]);

    /// `rmsnorm` of every head of `heads[.., D]` in place, for `weight[D]`.
    fn rmsnorm_heads(&self, heads: &mut [f32], weight: &[f32], eps: f32);

    /// `cpu_ref::hadamard::rotate` in place.
    fn rotate(&self, x: &mut [f32], signs: &[f32], block: usize);

    /// `cpu_ref::hadamard::rotate_back` in place.
    fn rotate_back(&self, z: &mut [f32], signs: &[f32], block: usize);

    /// `y[N]` of token `m` of M from `tiled[tiles][M][32]`.
    fn untile(&self, tiled: &[f32], token: (usize, usize), y: &mut [f32]);

    /// `y[N]` of token `m` of M from `acc[tiles][M][32]` and `weight_scale[N]`.
    fn dequantize(
        &self,
        acc: &[i32],
        token: (usize, usize),
        weight_scale: &[f32],
        act_scale: f32,
        y: &mut [f32],
    );

    /// `hidden[i] += y[i]`.
    fn residual_add(&self, hidden: &mut [f32], y: &[f32]);

    /// Rotates every head of `heads[.., D]` in place by `cos[D/2]` and `sin[D/2]`.
    fn rope(&self, heads: &mut [f32], cos: &[f32], sin: &[f32]);

    /// `z[i] = act(gate[i])·up[i]`.
    fn gated_activation(&self, gate: &[f32], up: &[f32], activation: Activation, z: &mut [f32]);

    /// Stores a head's key and value `[D]` at position `slot` of a block: `cpu_ref::kv::store_head`.
    fn store_head(&self, key: &[f32], value: &[f32], slot: usize, chunk: HeadChunkMut<'_>);

    /// Merges a block of the cache into what some queries have seen, as `cpu_ref::attention` does;
    /// `next` is what the thread wants afterwards, so that it is on its way.
    fn attend_block(
        &self,
        queries: Queries<'_>,
        chunk: HeadChunk<'_>,
        next: Option<HeadChunk<'_>>,
        attended: Attended<'_>,
    );

    /// Merges a block that was attended to by itself, its softmax and its `[D]` sums, into what a
    /// query has seen.
    fn merge_block(&self, block: (Softmax, &[f32]), running: &mut Softmax, out: &mut [f32]);

    /// Logits of at most `32·tiles` table rows for M tokens `x[M,K]`, into `logits[tiles][M][32]`.
    fn lm_head(&self, rows: TableRows<'_>, x: &[f32], k: usize, logits: &mut [f32]);

    /// The input of an int8 head: `cpu_ref::head_int8::quantize_input` of `x[K]`, into codes that are
    /// there.
    fn head_input(&self, x: &[f32], input: &mut Input);

    /// `cpu_ref::head_int8`'s logits of whole tiles of the coarse parts of int8 rows
    /// (`cpu_ref::layout::split_rows`) for M inputs, and how far the exact ones can be from them, ∞ where that is
    /// not known: `screened[tiles][M][2][32]`.
    fn head_coarse(&self, words: &[u32], inputs: &[Input], screened: &mut [f32]);

    /// `cpu_ref::head_int8`'s logits of whole tiles of int8 rows, coarse parts and rests, for M inputs,
    /// into `logits[tiles][M][32]`.
    fn head_int8(&self, words: [&[u32]; 2], inputs: &[Input], logits: &mut [f32]);

    /// `Σ rest·x` of row `n` of a tile of int8 rows' rests (`cpu_ref::layout::split_rows`), for the two
    /// limbs of x.
    fn head_rest(&self, tile: &[u32], n: usize, x: &Input) -> [i32; 2];

    /// The first of the largest logits; `None` if there is none or one is NaN.
    fn argmax(&self, logits: &[f32]) -> Option<usize>;
}

/// Panics unless the three shapes of [`Kernels::gemm`] agree; returns the tiles.
fn check_gemm(words: &[u32], x: &Activations<'_>, acc: &[i32]) -> usize {
    let tile_words = x.chunks * CHUNK_WORDS;
    let tiles = words.len() / tile_words;
    assert_eq!(words.len(), tiles * tile_words, "words are [tiles, chunks, 32, 4]");
    assert_eq!(acc.len(), tiles * x.n_tokens() * TILE_ROWS, "acc is [tiles, M, 32]");
    tiles
}

/// Whether the shapes of [`Kernels::gemm_base3`] agree.
fn base3_fits(words: &[u32], x: &Activations<'_>, acc: &[i32]) -> bool {
    let tile_words = cpu_ref::layout::base3::tile_words(x.chunks);
    words.len().is_multiple_of(tile_words)
        && acc.len() == words.len() / tile_words * x.n_tokens() * TILE_ROWS
}

/// Whether the shapes of a head's kernel agree: `outs` are `[tiles][M]` times `each`, and `words(K)` what a tile
/// of so many columns has, and what there is.
fn head_fits<const P: usize>(
    inputs: &[Input],
    (outs, each): (usize, usize),
    words: impl Fn(usize) -> [(usize, usize); P],
) -> bool {
    let Some(first) = inputs.first() else { return false };
    let k = first.hi.len();
    let tiles = outs / (inputs.len() * each);
    outs == tiles * inputs.len() * each
        && k.is_multiple_of(split_rows::GROUP_K)
        && words(k).into_iter().all(|(of_tile, len)| len == tiles * of_tile)
        && inputs.iter().all(|input| input.hi.len() == k && input.lo.len() == k)
}

/// Implements [`Kernels`] for a level: its own `gemm`, and the portable kernels compiled with its
/// target features. The type's existence must prove that the machine has the features.
macro_rules! impl_kernels {
    ($isa:ty, $level:expr $(, #[$features:meta])?) => {
        impl super::Kernels for $isa {
            fn level(&self) -> super::Level {
                $level
            }

            fn gemm(
                &self,
                words: &[u32],
                x: super::Activations<'_>,
                acc: &mut [i32],
            ) {
                let tiles = super::check_gemm(words, &x, acc);
                let tile_words = words.len() / tiles.max(1);
                let tile_acc = x.n_tokens() * cpu_ref::layout::TILE_ROWS;
                for (first, x) in x.blocks() {
                    let tiles = words.chunks_exact(tile_words.max(1));
                    for (tile, acc) in tiles.zip(acc.chunks_exact_mut(tile_acc)) {
                        let acc = &mut acc.as_chunks_mut().0[first..][..x.n_tokens()];
                        #[allow(unused_unsafe, reason = "as for the portable kernels")]
                        // SAFETY: `self` exists only where the features are available.
                        unsafe {
                            gemm_tile(tile.as_chunks().0, x, acc);
                        }
                    }
                }
            }

            impl_kernels!(@portable $(#[$features])?
                fn gemm_base3(words: &[u32], x: super::Activations<'_>, acc: &mut [i32]) -> ()
                    where super::base3_fits(words, &x, acc)
                    => super::base3::gemm(
                        words,
                        x,
                        acc,
                        (FEW_BASE3, |tile, x, acc| few_base3(tile, x, acc)),
                        |pieces, chunks| unpack_base3(pieces, chunks),
                        |chunks, x, acc| gemm_tile(chunks, x, acc),
                    );
                fn gemv_columns(lines: &[super::Line], x: &super::NonZeros,
                    acc: &mut [i32]) -> ()
                    where x.k() > 0 && lines.len().is_multiple_of(x.k())
                        && acc.len() == lines.len() / x.k()
                            * cpu_ref::layout::columns::STRIPE_ROWS
                    => {
                        let (columns, codes) = x.steps();
                        let sum = x.code_sum();
                        let stripes = lines.chunks_exact(x.k());
                        for (lines, acc) in stripes.zip(acc.as_chunks_mut().0) {
                            stripe_sums(lines, columns, codes, acc);
                            acc.iter_mut().for_each(|acc| *acc -= sum);
                        }
                    };
                fn gemv_rows(rows: &super::Rows, x: super::Activations<'_>, open: &[u32],
                    acc: &mut [i32]) -> ()
                    where x.n_tokens() == 1 && x.chunks == rows.chunks() && acc.len() == open.len()
                    => {
                        if open.is_empty() {
                            return;
                        }
                        open_sums(rows, x.token(0).as_chunks().0, open, acc);
                        let sum = x.code_sum(0);
                        acc.iter_mut().for_each(|acc| *acc -= sum);
                    };
                fn group_gemm(weights: super::GroupWeights<'_>, x: &[f32], y: &mut [f32]) -> ()
                    where x.len().is_multiple_of(weights.k)
                        && y.len() == weights.tiles() * cpu_ref::layout::TILE_ROWS
                            * (x.len() / weights.k)
                    => super::tables::group_gemm(
                        weights,
                        x,
                        y,
                        |layout, x, tables| build_tables(layout, x, tables),
                        |scales| widen_scales(scales),
                        |chunk, tables, sums| lookup_chunk(chunk, tables, sums),
                    );
                fn group_gemm_int8(weights: super::GroupWeights<'_>, x: super::Activations<'_>,
                    y: &mut [f32]) -> ()
                    where x.groups == weights.groups()
                        && x.chunks * cpu_ref::layout::CHUNK_K == weights.k
                        && y.len() == weights.tiles() * cpu_ref::layout::TILE_ROWS * x.n_tokens()
                    => super::portable::group_gemm_int8(
                        weights,
                        x,
                        y,
                        |chunks, x, acc| match weights.layout {
                            super::GroupLayout::I2 => gemm_tile(chunks, x, acc),
                            super::GroupLayout::Signs => signs_tile(chunks, x, acc),
                        },
                        |scales| widen_scales(scales),
                    );
                fn quantize_absmax_groups(x: &[f32], layout: super::GroupLayout,
                    codes: &mut [i8], scales: &mut [super::TokenScale]) -> ()
                    where codes.len() == x.len() && !scales.is_empty()
                        && x.len().is_multiple_of(scales.len() * layout.chunk_k())
                    => super::portable::quantize_absmax_groups(x, layout, codes, scales);
                fn rmsnorm_heads(heads: &mut [f32], weight: &[f32], eps: f32) -> ()
                    where !weight.is_empty() && heads.len().is_multiple_of(weight.len())
                    => super::portable::rmsnorm_heads(heads, weight, eps);
                fn rotate(x: &mut [f32], signs: &[f32], block: usize) -> ()
                    where x.len() == signs.len() && block.is_power_of_two()
                        && x.len().is_multiple_of(block)
                    => super::portable::rotate(x, signs, block);
                fn rotate_back(z: &mut [f32], signs: &[f32], block: usize) -> ()
                    where z.len() == signs.len() && block.is_power_of_two()
                        && z.len().is_multiple_of(block)
                    => super::portable::rotate_back(z, signs, block);
                fn untile(tiled: &[f32], token: (usize, usize), y: &mut [f32]) -> ()
                    where token.0 < token.1
                        && tiled.len() == y.len().div_ceil(cpu_ref::layout::TILE_ROWS)
                            * cpu_ref::layout::TILE_ROWS * token.1
                    => super::portable::untile(tiled, token, y);
                fn quantize_absmax(x: &[f32], codes: &mut [i8])
                    -> super::TokenScale
                    where x.len() <= codes.len()
                    => super::portable::norm_quantize(x, None, 0.0, codes);
                fn norm_quantize(x: &[f32], weight: Option<&[f32]>, eps: f32, codes: &mut [i8])
                    -> super::TokenScale
                    where x.len() <= codes.len() && weight.is_none_or(|w| w.len() == x.len())
                    => super::portable::norm_quantize(x, weight, eps, codes);
                fn rmsnorm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) -> ()
                    where x.len() == weight.len() && x.len() == y.len()
                    => super::portable::rmsnorm(x, weight, eps, y);
                fn dequantize(acc: &[i32], token: (usize, usize), weight_scale: &[f32],
                    act_scale: f32, y: &mut [f32]) -> ()
                    where token.0 < token.1
                        && acc.len() == y.len().div_ceil(cpu_ref::layout::TILE_ROWS)
                            * cpu_ref::layout::TILE_ROWS * token.1
                        && weight_scale.len() == y.len()
                    => super::portable::dequantize(
                        acc, token, weight_scale, act_scale, y);
                fn residual_add(hidden: &mut [f32], y: &[f32]) -> ()
                    where hidden.len() == y.len()
                    => super::portable::residual_add(hidden, y);
                fn rope(heads: &mut [f32], cos: &[f32], sin: &[f32]) -> ()
                    where cos.len() == sin.len() && !cos.is_empty()
                        && heads.len().is_multiple_of(2 * cos.len())
                    => super::portable::rope(heads, cos, sin);
                fn gated_activation(gate: &[f32], up: &[f32],
                    activation: cpu_ref::mlp::Activation, z: &mut [f32]) -> ()
                    where gate.len() == up.len() && gate.len() == z.len()
                    => super::portable::gated_activation(gate, up, activation, z);
                fn store_head(key: &[f32], value: &[f32], slot: usize,
                    chunk: super::HeadChunkMut<'_>) -> ()
                    where key.len() == chunk.dim() && value.len() == key.len()
                        && slot < crate::kv_cache::BLOCK
                    => super::attention::store_head(key, value, slot, chunk);
                fn attend_block(queries: super::Queries<'_>, chunk: super::HeadChunk<'_>,
                    next: Option<super::HeadChunk<'_>>, attended: super::Attended<'_>) -> ()
                    where queries.heads > 0
                    // SAFETY: as for all of them, the features are available.
                    => unsafe {
                        super::attention::attend_block::<Vector>(queries, chunk, next, attended)
                    };
                fn merge_block(block: (super::Softmax, &[f32]), running: &mut super::Softmax,
                    out: &mut [f32]) -> ()
                    where block.1.len() == out.len()
                    => super::attention::merge_block(block, running, out);
                fn lm_head(rows: super::TableRows<'_>, x: &[f32], k: usize,
                    logits: &mut [f32]) -> ()
                    where k > 0 && x.len().is_multiple_of(k) && rows.fit(k)
                        && logits.len() == (rows.len() / k)
                            .next_multiple_of(cpu_ref::layout::TILE_ROWS) * (x.len() / k)
                    => super::portable::lm_head(rows, x, k, logits);
                fn head_input(x: &[f32], input: &mut cpu_ref::head_int8::Input) -> ()
                    where x.len() <= input.hi.len() && input.hi.len() == input.lo.len()
                    => super::head::head_input(x, input);
                fn head_coarse(words: &[u32], inputs: &[cpu_ref::head_int8::Input],
                    screened: &mut [f32]) -> ()
                    where super::head_fits(
                        inputs,
                        (screened.len(), 2 * cpu_ref::layout::TILE_ROWS),
                        |k| [(super::split_rows::coarse_tile_words(k), words.len())],
                    )
                    => super::head::head_coarse(words, inputs, screened,
                        |pieces, x, sums| coarse_sums(pieces, x, sums));
                fn head_int8(words: [&[u32]; 2], inputs: &[cpu_ref::head_int8::Input],
                    logits: &mut [f32]) -> ()
                    where super::head_fits(
                        inputs,
                        (logits.len(), cpu_ref::layout::TILE_ROWS),
                        |k| [
                            (super::split_rows::coarse_tile_words(k), words[0].len()),
                            (super::split_rows::rest_tile_words(k), words[1].len()),
                        ],
                    )
                    => super::head::head_int8(words, inputs, logits,
                        |pieces, x, sums| coarse_sums(pieces, x, sums),
                        |pieces, x, sums| rest_sums(pieces, x, sums));
                fn head_rest(tile: &[u32], n: usize, x: &cpu_ref::head_int8::Input)
                    -> [i32; 2]
                    where n < cpu_ref::layout::TILE_ROWS && super::head_fits(
                        std::slice::from_ref(x),
                        (1, 1),
                        |k| [(super::split_rows::rest_tile_words(k), tile.len())],
                    )
                    => super::head::head_rest(tile, n, x);
                fn argmax(logits: &[f32]) -> Option<usize>
                    where true
                    => super::portable::argmax(logits);
            );
        }
    };
    (@portable $(#[$features:meta])? $(
        fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty
            where $shapes:expr
            => $body:expr;
    )*) => {
        impl_kernels!(@each [$(#[$features])?] $(
            fn $name($($argument: $type),*) -> $result where $shapes => $body;
        )*);
    };
    (@each $features:tt $(
        fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty
            where $shapes:expr
            => $body:expr;
    )*) => {
        $(impl_kernels!(@one $features
            fn $name($($argument: $type),*) -> $result where $shapes => $body;
        );)*
    };
    (@one [$(#[$features:meta])?]
        fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty
            where $shapes:expr
            => $body:expr;
    ) => {
        fn $name(&self, $($argument: $type),*) -> $result {
            $(#[$features])?
            fn with_features($($argument: $type),*) -> $result {
                $body
            }
            assert!($shapes, concat!(stringify!($name), ": the shapes do not match"));
            #[allow(unused_unsafe, reason = "a level without features has nothing to promise")]
            // SAFETY: `self` exists only where the features are available.
            unsafe {
                with_features($($argument),*)
            }
        }
    };
}
use impl_kernels;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_level_is_taken_or_refused() {
        assert_eq!(Level::choose(None).unwrap(), Level::available().next().unwrap());
        for level in Level::ALL {
            let chosen = Level::choose(Some(OsStr::new(level.name())));
            if level.kernels().is_some() {
                assert_eq!(chosen.unwrap(), level);
            } else {
                let message = chosen.unwrap_err().to_string();
                assert!(message.contains("scalar") && message.contains(level.name()), "{message}");
            }
        }
        assert!(matches!(Level::choose(Some(OsStr::new(""))), Err(Error::CpuLevel { .. })));
    }
}
