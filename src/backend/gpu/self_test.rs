//! The exactness check that a variant must pass on an adapter before it may run a model there.

use cpu_ref::layout::{CHUNK_K, k_chunks};

use super::{Gpu, PassParams, Pipelines, Slice, Variant, kernels, row_offsets};
use crate::backend::gpu::record::Call;
use crate::error::{Error, Result};
use crate::layout::Packed;
use crate::random::Random;
use crate::shape::MatShape;

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

/// The first variant in order of preference that is exact on this adapter, and why an earlier one
/// is not used.
///
/// # Errors
/// The last variant's error if none is exact.
pub fn choose(gpu: &Gpu) -> Result<(Variant, Option<Error>)> {
    let [first, second] = preference(gpu);
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

/// Runs the variant's kernels on a fixed pseudo-random matrix and compares with the reference.
///
/// # Errors
/// [`Error::SelfTest`] on the first difference.
pub fn check(gpu: &Gpu, variant: Variant) -> Result<()> {
    let shape = MatShape::new(SHAPE.0, SHAPE.1)?;
    let mut random = Random::new(0x5EED);
    let (trits, codes) = (random.trits(shape.len()), random.codes(TOKENS * shape.k()));
    let packed = Packed::pack(variant.layout(), shape, &trits);
    let compare = |kernel: &str, found: &[i32], expected: &[i32]| match found
        .iter()
        .zip(expected)
        .position(|(found, expected)| found != expected)
    {
        None => Ok(()),
        Some(at) => Err(Error::SelfTest {
            device: format!("gpu:{} {}", gpu.adapter.index, gpu.adapter.name),
            kernel: kernel.to_owned(),
            problem: format!("[{at}]: expected {}, found {}", expected[at], found[at]),
        }),
    };
    let first = &codes[..shape.k()];
    let found = multiply(gpu, variant, &packed, first, 1)?;
    compare(variant.gemv().name, &found, &cpu_ref::gemv::gemv(&trits, first))?;
    let found = multiply(gpu, variant, &packed, &codes, TOKENS)?;
    compare(variant.gemm().name, &found, &cpu_ref::gemm::gemm(&trits, &codes, shape.k()))?;
    // Scale 1, and no value near a tie: a division that is off in the last bit is allowed.
    let x: Vec<f32> = (0..shape.k())
        .map(|k| if k == 7 { -127.0 } else { random.below(253) as f32 - 125.75 })
        .collect();
    let expected = cpu_ref::quantize_absmax::quantize_absmax(&x).codes;
    let found = quantize(gpu, variant, &x, 1)?;
    let encoded = encode_codes(variant, &expected, shape.k());
    let as_i32 = |words: &[u32]| words.iter().map(|&word| word as i32).collect::<Vec<_>>();
    compare("quantize_absmax", &as_i32(&found.codes), &as_i32(&encoded))
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
    variant: Variant,
    packed: &Packed,
    codes: &[i8],
    n_tokens: usize,
) -> Result<Vec<i32>> {
    let shape = packed.shape();
    let n_pad = kernels::padded_rows(shape.n());
    let tiles = n_pad / cpu_ref::layout::TILE_ROWS;
    let w = gpu.upload("w", packed.words())?;
    let x = gpu.upload("x", &encode_codes(variant, codes, shape.k()))?;
    let offset = gpu.upload("offset", &row_offsets(packed))?;
    let sums: Vec<i32> = codes
        .chunks_exact(shape.k())
        .map(|token| token.iter().map(|&code| i32::from(code)).sum())
        .collect();
    let code_sum = gpu.upload("code_sum", &sums)?;
    let acc = gpu.storage("acc", n_tokens * n_pad)?;
    let mut buffers = vec![&w, &x, &offset];
    if variant.needs_code_sum() {
        buffers.push(&code_sum);
    }
    buffers.push(&acc);
    let call = if n_tokens == 1 {
        kernels::gemv(variant, shape, 0, tiles)
    } else {
        kernels::gemm(variant, shape, 0, tiles)
    };
    let params = PassParams { n_tokens: n_tokens as u32, ..PassParams::default() };
    run(gpu, &call, params, &buffers)?;
    let words = gpu.read(&acc, n_tokens * n_pad)?;
    let rows = words.chunks_exact(n_pad).flat_map(|row| &row[..shape.n()]);
    Ok(rows.map(|&word| word as i32).collect())
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
