//! The exactness check that a variant must pass on an adapter before it may run a model there.

use std::ops::Range;

use cpu_ref::group_gemv::{group_dot, group_dot_int8};
use cpu_ref::layout::{CHUNK_K, k_chunks};

use super::kernels::{Fused, GemvPlan, RowOrder, TokensPerLane};
use super::matrix::{GpuLinear, GpuMatrix, HostLinear, HostMatrix, Kind, Method};
use super::{Gpu, PassParams, Pipelines, Slice, Variant, kernels, row_offsets};
use crate::backend::gpu::record::Call;
use crate::error::{Error, Result};
use crate::format::float::f16_to_f32;
use crate::layout::Packed;
use crate::random::Random;
use crate::shape::MatShape;
use crate::weights::{Alphabet, TernaryMatrix};

/// The variants in the order in which they are tried on this adapter.
///
/// A packed dot that the driver emulates is slower than the bit-serial kernel; wgpu does not say
/// which it is. Software rasterisers and Apple GPUs are known to emulate it.
fn preference(gpu: &Gpu) -> [Variant; 2] {
    let emulated = gpu.adapter.kind == super::AdapterKind::Software || gpu.adapter.api == "metal";
    if emulated {
        [Variant::BitSerial, Variant::PackedDot]
    } else {
        [Variant::PackedDot, Variant::BitSerial]
    }
}

/// The methods in use on an adapter: each is checked when the first matrix that needs it is met.
pub(super) struct Methods<'a> {
    gpu: &'a Gpu,
    asked: Option<GemvPlan>,
    /// The plan that passed, and why an earlier one did not.
    plan: Option<(GemvPlan, Option<Error>)>,
    /// Whether the group kernels with f32 and with int8 activations have passed.
    groups: [bool; 2],
}

impl<'a> Methods<'a> {
    /// None yet; `plan` is the only one to be considered, if there is one.
    pub fn new(gpu: &'a Gpu, plan: Option<GemvPlan>) -> Self {
        Self { gpu, asked: plan, plan: None, groups: [false; 2] }
    }

    /// The method of matrices with one scale.
    ///
    /// # Errors
    /// [`Error::SelfTest`] if the variant, or every one of them, is wrong on this adapter.
    pub fn sums(&mut self) -> Result<Method> {
        let chosen = match (self.plan.take(), self.asked) {
            (Some(chosen), _) => chosen,
            // Which computes nothing that could be checked.
            (None, Some(plan)) if self.gpu.is_dry() => (plan, None),
            (None, Some(plan)) => check(self.gpu, plan).map(|()| (plan, None))?,
            (None, None) => choose(self.gpu)?,
        };
        Ok(Method::Sums(self.plan.insert(chosen).0))
    }

    /// The method of matrices with scales of groups.
    ///
    /// # Errors
    /// [`Error::SelfTest`] if its kernels are wrong on this adapter.
    pub fn groups(&mut self, int8: bool) -> Result<Method> {
        let passed = &mut self.groups[usize::from(int8)];
        if !*passed && !self.gpu.is_dry() {
            check_groups(self.gpu, int8)?;
        }
        *passed = true;
        Ok(Method::Groups { int8 })
    }

    /// The kernels of the methods so far, for people.
    pub fn names(&self) -> String {
        let sums = self.plan.iter().map(|(plan, refused)| match refused {
            None => plan.variant.gemv().name.to_owned(),
            Some(problem) => format!("{} ({problem})", plan.variant.gemv().name),
        });
        let groups = [false, true].into_iter().filter(|&int8| self.groups[usize::from(int8)]);
        let groups = groups.map(|int8| Method::Groups { int8 }.gemv().name.to_owned());
        sums.chain(groups).collect::<Vec<_>>().join(", ")
    }
}

/// The first plan in order of preference that is exact on this adapter, and why an earlier one
/// is not used.
///
/// # Errors
/// The last plan's error if none is exact.
pub fn choose(gpu: &Gpu) -> Result<(GemvPlan, Option<Error>)> {
    let [first, second] = preference(gpu).map(GemvPlan::from);
    match check(gpu, first) {
        Ok(()) => Ok((first, None)),
        Err(problem @ Error::SelfTest { .. }) => {
            check(gpu, second).map(|()| (second, Some(problem)))
        }
        Err(error) => Err(error),
    }
}

/// Rows, columns and tokens of the check: partial tiles, partial chunks, a partial token tile.
const SHAPE: (usize, usize) = (70, 1000);
const TOKENS: usize = 5;

/// Runs the plan's kernels on a fixed pseudo-random matrix and compares with the reference.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub fn check(gpu: &Gpu, plan: GemvPlan) -> Result<()> {
    let variant = plan.variant;
    let shape = MatShape::new(SHAPE.0, SHAPE.1)?;
    let mut random = Random::new(0x5EED);
    let (trits, codes) = (random.trits(shape.len()), random.codes(TOKENS * shape.k()));
    let packed = Packed::pack(variant.layout(), shape, &trits);
    let first = &codes[..shape.k()];
    let found = multiply(gpu, plan, &packed, first, 1)?;
    compare(gpu, variant.gemv().name, &found, &cpu_ref::gemv::gemv(&trits, first))?;
    let found = multiply(gpu, plan, &packed, &codes, TOKENS)?;
    compare(gpu, variant.gemm().name, &found, &cpu_ref::gemm::gemm(&trits, &codes, shape.k()))?;
    // Scale 1, and no value near a tie: a division that is off in the last bit is allowed.
    let x: Vec<f32> = (0..shape.k())
        .map(|k| if k == 7 { -127.0 } else { random.below(253) as f32 - 125.75 })
        .collect();
    let expected = cpu_ref::quantize_absmax::quantize_absmax(&x).codes;
    let found = quantize(gpu, variant, &x, 1)?;
    let encoded = encode_codes(variant, &expected, shape.k());
    let as_i32 = |words: &[u32]| words.iter().map(|&word| word as i32).collect::<Vec<_>>();
    compare(gpu, "quantize_absmax", &as_i32(&found.codes), &as_i32(&encoded))?;
    check_fused(gpu, plan)
}

/// Runs a fused step on a fixed pseudo-random matrix. A root or division that is off in the last bit
/// may move a code by a step; what is wrong is off by many.
fn check_fused(gpu: &Gpu, plan: GemvPlan) -> Result<()> {
    let shape = MatShape::new(SHAPE.0, SHAPE.1)?;
    let mut random = Random::new(0x5EEF);
    let (trits, scale, eps) = (random.trits(shape.len()), 0.5, 1e-5);
    let (x, norm) = (random.floats(shape.k(), 3.0), random.floats(shape.k(), 1.0));
    let hidden = random.floats(shape.n(), 3.0);
    let matrix = TernaryMatrix::from_trits(shape, trits.clone(), scale);
    let fused = |tiles| Fused { plan, k: shape.k(), norm: Some(eps), tiles };
    let out = gpu.storage("out", shape.n())?;
    let inputs = [&gpu.upload("x", &x)?, &gpu.upload("norm", &norm)?];
    let hidden_in = gpu.upload("hidden", &hidden)?;
    let params = PassParams { n_tokens: 1, ..PassParams::default() };
    for (tiles, words, rows) in fused_matrix(gpu, plan, &[&matrix], RowOrder::Natural)? {
        let buffers = [&words, inputs[0], inputs[1], &rows, &hidden_in, &out];
        run(gpu, &fused(tiles).residual(shape.n()), params, &buffers)?;
    }
    let found: Vec<f32> = bytemuck::cast_vec(gpu.read(&out, shape.n())?);
    let x = cpu_ref::quantize_absmax::quantize_absmax(&cpu_ref::rmsnorm::rmsnorm(&x, &norm, eps));
    let acc = cpu_ref::gemv::gemv(&trits, &x.codes);
    let y = cpu_ref::gemv::dequantize(&acc, &vec![scale; shape.n()], x.act_scale);
    let step = scale * x.act_scale;
    for (at, ((&found, y), hidden)) in found.iter().zip(y).zip(hidden).enumerate() {
        let (expected, bound) = (hidden + y, 4.0 * step + 1e-5 * y.abs());
        let is_close = (found - expected).abs() <= bound;
        if !is_close {
            let kernel = fused((0, 1)).residual(1).kernel.name;
            return Err(differs(
                gpu,
                kernel,
                format!("[{at}]: expected {expected}, found {found}"),
            ));
        }
    }
    Ok(())
}

/// A shard of a fused step's matrices: first tile and how many, packed words, offset and scale of
/// each row.
pub type FusedShard = ((usize, usize), Slice, Slice);

/// Matrices as a fused step reads them, in shards that fit a binding.
///
/// # Errors
/// [`Error::GpuLimit`] if a tile does not fit.
pub fn fused_matrix(
    gpu: &Gpu,
    plan: GemvPlan,
    parts: &[&TernaryMatrix],
    order: RowOrder,
) -> Result<Vec<FusedShard>> {
    let host = HostLinear::pack(parts, 64, order, |_| Ok(Method::Sums(plan)))?;
    let slices = gpu.upload_together("fused", &host.parts(gpu))?;
    let linear = GpuLinear::from_slices(gpu, &host, &mut slices.into_iter());
    let shards = linear.runs[0].matrix.shards.iter().zip(&linear.fused_rows);
    let shard = |((tiles, words, _), rows): (&(Range<usize>, Slice, Slice), &Slice)| {
        ((tiles.start, tiles.len()), words.clone(), rows.clone())
    };
    Ok(shards.map(shard).collect())
}

/// Runs the kernels of matrices with scales of groups on fixed pseudo-random ones, whose scales are
/// powers of two and whose activations are small integers: every sum is exact in any order.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub fn check_groups(gpu: &Gpu, int8: bool) -> Result<()> {
    let mut random = Random::new(0x5EEE);
    let kernel = Method::Groups { int8 }.gemv().name;
    for (alphabet, k, group) in [
        (Alphabet::Ternary, 640, 128),
        (Alphabet::Ternary, 192, 64),
        (Alphabet::Binary, 1152, 128),
        (Alphabet::Binary, 192, 64),
    ] {
        let shape = MatShape::new(SHAPE.0, k)?;
        let mut trits = random.trits(shape.len());
        if alphabet == Alphabet::Binary {
            trits.iter_mut().for_each(|trit| *trit = if *trit < 0 { -1 } else { 1 });
        }
        // Halves of −4 to 4.
        let scale = |random: &mut Random| 0x3800 + 0x400 * random.below(4) as u16;
        let sign = |random: &mut Random| (random.below(2) as u16) << 15;
        let scales: Vec<u16> =
            (0..shape.len() / group).map(|_| scale(&mut random) | sign(&mut random)).collect();
        let act_scales: Vec<f32> =
            (0..TOKENS * k / group).map(|_| [0.5, 1.0, 2.0][random.below(3)]).collect();
        let codes = random.codes(TOKENS * k);
        let x: Vec<f32> = codes.iter().map(|&code| f32::from(code)).collect();
        let expected: Vec<f32> = (0..TOKENS)
            .flat_map(|m| {
                let x = &x[m * k..][..k];
                let codes = &codes[m * k..][..k];
                let act_scales = &act_scales[m * k / group..][..k / group];
                let rows = trits.chunks_exact(k).zip(scales.chunks_exact(k / group));
                rows.map(move |(row, scales)| {
                    let scales: Vec<f32> = scales.iter().map(|&bits| f16_to_f32(bits)).collect();
                    match int8 {
                        false => group_dot(row, &scales, x),
                        true => group_dot_int8(row, &scales, codes, act_scales),
                    }
                })
                .collect::<Vec<_>>()
            })
            .collect();
        let matrix = TernaryMatrix::from_groups(shape, trits, scales, group, alphabet);
        for n_tokens in [1, TOKENS] {
            let input = match int8 {
                false => GroupInput::Float(&x[..n_tokens * k]),
                true => GroupInput::Int8 {
                    codes: &codes[..n_tokens * k],
                    act_scales: &act_scales[..n_tokens * k / group],
                },
            };
            let found = multiply_groups(gpu, &matrix, input, n_tokens)?;
            compare(gpu, kernel, &found, &expected[..found.len()])?;
        }
    }
    Ok(())
}

fn compare<T: PartialEq + std::fmt::Display>(
    gpu: &Gpu,
    kernel: &str,
    found: &[T],
    expected: &[T],
) -> Result<()> {
    match found.iter().zip(expected).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(at) => {
            let problem = format!("[{at}]: expected {}, found {}", expected[at], found[at]);
            Err(differs(gpu, kernel, problem))
        }
    }
}

fn differs(gpu: &Gpu, kernel: &str, problem: String) -> Error {
    let device = format!("gpu:{} {}", gpu.adapter.index, gpu.adapter.name);
    Error::SelfTest { device, kernel: kernel.to_owned(), problem }
}

/// Activation codes `[M, K]` as `quantize_absmax.wgsl` writes them for a variant.
pub fn encode_codes(variant: Variant, codes: &[i8], k: usize) -> Vec<u32> {
    let chunks = k_chunks(k);
    let mut words = Vec::with_capacity(codes.len() / k * chunks * 16);
    for token in codes.chunks_exact(k) {
        let mut padded = vec![0i8; chunks * CHUNK_K];
        padded[..k].copy_from_slice(token);
        match variant {
            Variant::PackedDot => words.extend(padded.chunks_exact(4).map(|bytes| {
                u32::from_le_bytes(std::array::from_fn(|b| (i32::from(bytes[b]) + 128) as u8))
            })),
            Variant::BitSerial => {
                for group in padded.chunks_exact(32) {
                    for plane in 0..8 {
                        let bit = |&code: &i8| u32::from(code as u8 >> plane & 1);
                        words.push(group.iter().enumerate().map(|(i, code)| bit(code) << i).sum());
                    }
                }
            }
        }
    }
    words
}

/// The inverse of [`encode_codes`] for the words of one token.
pub fn decode_codes(variant: Variant, words: &[u32], k: usize) -> Vec<i8> {
    let code = |k: usize| match variant {
        Variant::PackedDot => ((words[k / 4] >> (8 * (k % 4)) & 0xff) as i32 - 128) as i8,
        Variant::BitSerial => {
            let planes = &words[k / 32 * 8..][..8];
            let bit = |j: usize| (planes[j] >> (k % 32) & 1) << j;
            (0..8).map(bit).sum::<u32>() as u8 as i8
        }
    };
    (0..k).map(code).collect()
}

/// Runs one kernel and waits for it.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub fn run(gpu: &Gpu, call: &Call, params: PassParams, buffers: &[&Slice]) -> Result<()> {
    let uniform = gpu.params_buffer();
    let op = gpu.op(&Pipelines::default(), call, &uniform, buffers)?;
    gpu.run_all(&uniform, params, [&op])
}

/// `acc[M, N]` of a packed matrix and int8 codes `[M, K]`: the GEMV kernel for one token, the GEMM
/// kernel for more.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub fn multiply(
    gpu: &Gpu,
    plan: GemvPlan,
    packed: &Packed,
    codes: &[i8],
    n_tokens: usize,
) -> Result<Vec<i32>> {
    let shape = packed.shape();
    let n_pad = kernels::padded_rows(shape.n());
    let tiles = n_pad / cpu_ref::layout::TILE_ROWS;
    let w = gpu.upload("w", packed.words())?;
    let x = gpu.upload("x", &encode_codes(plan.variant, codes, shape.k()))?;
    let offset = gpu.upload("offset", &row_offsets(packed))?;
    let sums: Vec<i32> = codes
        .chunks_exact(shape.k())
        .map(|token| token.iter().map(|&code| i32::from(code)).sum())
        .collect();
    let code_sum = gpu.upload("code_sum", &sums)?;
    let acc = gpu.storage("acc", n_tokens * n_pad)?;
    let mut buffers = vec![&w, &x, &offset];
    if plan.variant.needs_code_sum() {
        buffers.push(&code_sum);
    }
    buffers.push(&acc);
    let call = if n_tokens == 1 {
        kernels::gemv(plan, shape, 0, tiles)
    } else {
        kernels::gemm(plan.variant, shape, 0, tiles)
    };
    let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
    run(gpu, &call, params, &buffers)?;
    let words = gpu.read(&acc, n_tokens * n_pad)?;
    let rows = words.chunks_exact(n_pad).flat_map(|row| &row[..shape.n()]);
    Ok(rows.map(|&word| word as i32).collect())
}

/// Activations `[M, K]` of a matrix with scales of groups.
#[derive(Debug, Clone, Copy)]
pub enum GroupInput<'a> {
    /// f32.
    Float(&'a [f32]),
    /// int8.
    Int8 {
        /// `[M, K]`.
        codes: &'a [i8],
        /// `[M, K/group]`.
        act_scales: &'a [f32],
    },
}

/// `y[M, N]` of a matrix with scales of groups: one token a lane for one token, four for more.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub fn multiply_groups(
    gpu: &Gpu,
    matrix: &TernaryMatrix,
    input: GroupInput<'_>,
    n_tokens: usize,
) -> Result<Vec<f32>> {
    let method = Method::Groups { int8: matches!(input, GroupInput::Int8 { .. }) };
    let host = HostMatrix::pack(method, &[matrix], RowOrder::Natural)?;
    let on_gpu = GpuMatrix::upload(gpu, "w", &host)?;
    let Kind::Groups(shape, _) = on_gpu.kind else { panic!("a matrix with scales of groups") };
    let (n, k) = (shape.shape.n(), shape.shape.k());
    let y = gpu.storage("y", n_tokens * n)?;
    let tokens = if n_tokens == 1 { TokensPerLane::One } else { TokensPerLane::Four };
    let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
    for (tiles, words, scales) in &on_gpu.shards {
        let out = on_gpu.rows_out(tiles, 0, n);
        match input {
            GroupInput::Float(x) => {
                let call = kernels::group_gemv(shape, out, tokens, false);
                run(gpu, &call, params, &[words, scales, &gpu.upload("x", x)?, &y])?;
            }
            GroupInput::Int8 { codes, act_scales } => {
                let call = kernels::group_gemv_int8(shape, out, tokens);
                let codes = gpu.upload("x", &encode_codes(Variant::BitSerial, codes, k))?;
                let act_scales = gpu.upload("act_scale", act_scales)?;
                run(gpu, &call, params, &[words, scales, &codes, &act_scales, &y])?;
            }
        }
    }
    Ok(bytemuck::cast_vec(gpu.read(&y, n_tokens * n)?))
}

/// Row `token` of a table with scales of groups.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub fn embed_groups(gpu: &Gpu, table: &TernaryMatrix, token: u32) -> Result<Vec<f32>> {
    let host = HostMatrix::pack(Method::Groups { int8: false }, &[table], RowOrder::Natural)?;
    let on_gpu = GpuMatrix::upload(gpu, "table", &host)?;
    let Kind::Groups(shape, _) = on_gpu.kind else { panic!("a matrix with scales of groups") };
    let tokens = gpu.upload("tokens", &[token])?;
    let out = gpu.storage("out", shape.shape.k())?;
    let params = PassParams { n_tokens: 1, ..PassParams::default() };
    for (tiles, words, scales) in &on_gpu.shards {
        let rows = on_gpu.rows_out(tiles, 0, 0);
        let call = kernels::group_embedding(shape, rows.base, rows.rows);
        run(gpu, &call, params, &[&tokens, words, scales, &out])?;
    }
    Ok(bytemuck::cast_vec(gpu.read(&out, shape.shape.k())?))
}

/// What `quantize_absmax.wgsl` writes.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedWords {
    /// `[M, 16·KC]`, encoded for the variant.
    pub codes: Vec<u32>,
    /// `[M]`.
    pub act_scale: Vec<f32>,
    /// `[M]`.
    pub code_sum: Vec<i32>,
}

impl QuantizedWords {
    /// The code words of token `m`.
    pub fn token(&self, m: usize) -> &[u32] {
        let len = self.codes.len() / self.act_scale.len();
        &self.codes[m * len..][..len]
    }
}

/// Quantises `x[M, K]`.
///
/// # Errors
/// [`Error::Gpu`] if the driver refuses or fails.
pub fn quantize(gpu: &Gpu, variant: Variant, x: &[f32], n_tokens: usize) -> Result<QuantizedWords> {
    let k = x.len() / n_tokens;
    let len_words = n_tokens * k_chunks(k) * 16;
    let x = gpu.upload("x", x)?;
    let codes = gpu.storage("codes", len_words)?;
    let act_scale = gpu.storage("act_scale", n_tokens)?;
    let code_sum = gpu.storage("code_sum", n_tokens)?;
    let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
    let call = kernels::quantize_absmax(k, variant);
    run(gpu, &call, params, &[&x, &codes, &act_scale, &code_sum])?;
    Ok(QuantizedWords {
        codes: gpu.read(&codes, len_words)?,
        act_scale: bytemuck::cast_vec(gpu.read(&act_scale, n_tokens)?),
        code_sum: bytemuck::cast_vec(gpu.read(&code_sum, n_tokens)?),
    })
}
