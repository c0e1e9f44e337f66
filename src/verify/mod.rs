//! Proof on this machine: every kernel and variant of a backend, on fixed pseudo-random vectors,
//! against the reference.
//!
//! The integer results of all cases go into one hash, which is the same on every machine and
//! backend; a single wrong sum changes it.

mod cpu;
mod gpu;

use cpu_ref::attention::Heads;
use cpu_ref::group_gemv::{group_dot, group_dot_int8, quantize_absmax_groups};
use cpu_ref::mlp::Activation;
use cpu_ref::quantize_absmax::Quantized;

#[cfg(not(target_family = "wasm"))]
use crate::backend::gpu::adapters;
use crate::backend::gpu::{Capabilities, Gpu, Variant};
use crate::backend::simd::Level;
use crate::backend::{self, Device};
use crate::error::Result;
use crate::format::float::f16_to_f32;
use crate::random::Random;
use crate::shape::MatShape;
use crate::wait::block_on;
use crate::weights::{Alphabet, TernaryMatrix};

/// The kernels of one backend and variant, on plain slices.
///
/// Shapes are those of the `cpu_ref` function of the same name.
trait Kernels {
    /// `acc[M, N]` of `w[N, K]` and codes `[M, K]`; M = 1 is the GEMV.
    async fn multiply(&self, w: &[i8], shape: MatShape, codes: &[i8]) -> Result<Vec<i32>>;
    async fn quantize_absmax(&self, x: &[f32]) -> Result<Quantized>;
    async fn argmax(&self, logits: &[f32]) -> Result<Option<usize>>;
    async fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32) -> Result<Vec<f32>>;
    /// One head at a position.
    async fn rope(&self, head: &[f32], position: usize, theta: f32) -> Result<Vec<f32>>;
    async fn attention(&self, q: &[f32], k: &[f32], v: &[f32], heads: Heads) -> Result<Vec<f32>>;
    async fn gated_activation(&self, gate: &[f32], up: &[f32], act: Activation)
    -> Result<Vec<f32>>;
    async fn residual_add(&self, hidden: &[f32], y: &[f32]) -> Result<Vec<f32>>;
    /// Row `token` of the table `[V, K]`.
    async fn embedding(&self, table: &[f32], k: usize, token: usize) -> Result<Vec<f32>>;
    async fn lm_head(&self, table: &[f32], x: &[f32]) -> Result<Vec<f32>>;

    // Kernels that a backend may not have by themselves: it answers `None`, and the list of its
    // checks does not name them.

    /// `y[M, N]` of a matrix with scales of groups and `x[M, K]`.
    async fn group_gemv(&self, _matrix: &TernaryMatrix, _x: &[f32]) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
    /// `y[M, N]` of a matrix with scales of groups and codes `[M, K]`.
    async fn group_gemv_int8(
        &self,
        _matrix: &TernaryMatrix,
        _codes: &[i8],
        _act_scales: &[f32],
    ) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
    async fn quantize_absmax_groups(
        &self,
        _x: &[f32],
        _group: usize,
    ) -> Result<Option<(Vec<i8>, Vec<f32>)>> {
        Ok(None)
    }
    /// Row `token` of a table with scales of groups.
    async fn group_embedding(
        &self,
        _table: &TernaryMatrix,
        _token: usize,
    ) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
    async fn hadamard(
        &self,
        _x: &[f32],
        _signs: &[f32],
        _block: usize,
    ) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
    /// RMSNorm of one head.
    async fn head_norm(
        &self,
        _head: &[f32],
        _weight: &[f32],
        _eps: f32,
    ) -> Result<Option<Vec<f32>>> {
        Ok(None)
    }
}

/// One kernel of one backend against the reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// The kernel.
    pub kernel: &'static str,
    /// How many fixed vectors it ran on.
    pub cases: usize,
    /// What differs first, if anything does: shape, index, both values.
    pub problem: Option<String>,
}

/// The checks of one backend and variant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// As `--device` takes it.
    pub device: String,
    /// Adapter and driver, or processor.
    pub description: String,
    /// SIMD level, or GEMV kernel and the limits that the device was opened with.
    pub variant: String,
    /// One entry a kernel.
    pub checks: Vec<Check>,
    /// The hash of its integer results.
    pub integer_hash: String,
}

impl Verification {
    /// Whether every kernel agrees with the reference, and the hash with [`integer_hash`].
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.problem.is_none())
            && self.integer_hash == integer_hash()
    }
}

/// The hash that every backend must have: that of the reference's own integer results.
pub fn integer_hash() -> String {
    let mut hash = Hash::default();
    for case in integer_cases() {
        hash.add(&case.expected());
    }
    hash.hex()
}

/// The device names that [`verify`] covers for a request; `None` is every device there is.
///
/// # Errors
/// If the device is not there.
#[cfg(not(target_family = "wasm"))]
pub fn devices(device: Option<Device>) -> Result<Vec<Device>> {
    let gpu = |index| Gpu::open(index, Capabilities::Adapter).map(|gpu| gpu.adapter.index);
    Ok(match device {
        Some(Device::Auto) => vec![backend::resolve_auto()],
        Some(Device::Gpu(index)) => vec![Device::Gpu(Some(gpu(index)?))],
        Some(device) => vec![device],
        None => {
            let usable = adapters().into_iter().filter(|adapter| adapter.api != "gl");
            let gpus = usable.map(|adapter| Device::Gpu(Some(adapter.index)));
            [Device::Reference, Device::Cpu].into_iter().chain(gpus).collect()
        }
    })
}

/// Runs every kernel and variant of a device: all SIMD levels of the CPU; on a GPU all GEMV
/// variants, under WebGPU's default limits and with what the adapter offers.
///
/// # Errors
/// If the device is not there or fails; a wrong result is no error but a [`Check`] with a problem.
pub fn verify(device: Device) -> Result<Vec<Verification>> {
    block_on(verify_async(device))
}

/// [`verify`] where nothing may block.
///
/// # Errors
/// As for [`verify`].
pub async fn verify_async(device: Device) -> Result<Vec<Verification>> {
    let mut results = Vec::new();
    let device = match device {
        Device::Auto => backend::resolve_auto_async().await,
        device => device,
    };
    match device {
        Device::Reference => results.push(Verification {
            device: "ref".to_owned(),
            description: "scalar reference".to_owned(),
            variant: "defines what is right".to_owned(),
            checks: Vec::new(),
            integer_hash: integer_hash(),
        }),
        Device::Auto | Device::Cpu => {
            for level in Level::available() {
                let Some(kernels) = level.kernels() else { continue };
                let (checks, integer_hash) = judge(&cpu::OnCpu(kernels.as_ref())).await?;
                results.push(Verification {
                    device: "cpu".to_owned(),
                    description: level.title().to_owned(),
                    variant: level.name().to_owned(),
                    checks,
                    integer_hash,
                });
            }
        }
        Device::Gpu(index) => {
            let limits = [
                ("WebGPU default limits", Capabilities::WebGpuDefault),
                ("adapter limits", Capabilities::Adapter),
            ];
            // A browser's adapter is hardly more than the defaults, and the visitor waits.
            let skipped = usize::from(cfg!(target_family = "wasm"));
            for (limits, capabilities) in limits.into_iter().skip(skipped) {
                let gpu = Gpu::open_async(index, capabilities).await?;
                for variant in Variant::ALL {
                    let (checks, integer_hash) = judge(&gpu::OnGpu { gpu: &gpu, variant }).await?;
                    results.push(Verification {
                        device: format!("gpu:{}", gpu.adapter.index),
                        description: gpu.adapter.to_string(),
                        variant: format!("{}, {limits}", variant.gemv().name),
                        checks,
                        integer_hash,
                    });
                }
            }
        }
    }
    Ok(results)
}

/// FNV-1a over the little-endian bytes of the integer results, in the order of the cases.
struct Hash(u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    fn add(&mut self, values: &[i32]) {
        for byte in values.iter().flat_map(|value| value.to_le_bytes()) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn hex(&self) -> String {
        format!("{:016x}", self.0)
    }
}

/// Multiples of 1/4096 between −magnitude and magnitude.
fn fractions(random: &mut Random, len: usize, magnitude: i32) -> Vec<f32> {
    let steps = 8192 * magnitude as usize;
    let step = |random: &mut Random| random.below(steps + 1) as i32 - 4096 * magnitude;
    (0..len).map(|_| step(random) as f32 / 4096.0).collect()
}

/// A case whose result is made of integers.
enum IntegerCase {
    /// `w[N, K]` and codes `[M, K]`.
    Multiply { shape: MatShape, w: Vec<i8>, codes: Vec<i8> },
    /// No value is near a tie, so that an inexact division cannot move a code.
    Quantize { x: Vec<f32> },
    /// Logits.
    Argmax { logits: Vec<f32> },
}

/// Rows, columns and tokens: parts of tiles and chunks, the shapes of 2B4T (fewer rows), the
/// longest K in scope.
const MULTIPLY_SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (33, 65, 1),
    (96, 512, 1),
    (70, 1000, 5),
    (64, 2560, 1),
    (32, 6912, 1),
    (3, 23_040, 1),
    (64, 2560, 9),
    (40, 1920, 4),
];

fn integer_cases() -> Vec<IntegerCase> {
    let mut random = Random::new(0x57E2_7A00);
    let mut cases = Vec::new();
    for (n, k, m) in MULTIPLY_SHAPES {
        let shape = MatShape::new(n, k).expect("the table holds small sizes");
        let (w, codes) = (random.trits(n * k), random.codes(m * k));
        cases.push(IntegerCase::Multiply { shape, w, codes });
    }
    for (weight, code) in [(-1, -128), (1, -128), (-1, 127), (1, 127), (0, 127)] {
        let shape = MatShape::new(33, 2600).expect("small sizes");
        let (w, codes) = (vec![weight; shape.len()], vec![code; shape.k()]);
        cases.push(IntegerCase::Multiply { shape, w, codes });
    }
    for (k, magnitude) in [(1, 1.0), (65, 0.25), (2560, 3.0), (6912, 40.0)] {
        // Codes plus a fraction up to 0.3, the first one the largest.
        let value = |code: i32, fraction: i32| (code as f32 + fraction as f32 / 100.0) / 127.0;
        let mut x: Vec<f32> = (0..k)
            .map(|_| {
                magnitude * value(random.below(253) as i32 - 126, random.below(61) as i32 - 30)
            })
            .collect();
        x[0] = -magnitude;
        cases.push(IntegerCase::Quantize { x });
    }
    for v in [1, 257, 32_002] {
        cases.push(IntegerCase::Argmax { logits: fractions(&mut random, v, 10) });
    }
    cases.push(IntegerCase::Argmax { logits: vec![-2.0, -1.0, -1.0, -5.0] });
    cases.push(IntegerCase::Argmax { logits: vec![1.0, f32::NAN, 2.0] });
    cases
}

impl IntegerCase {
    fn kernel(&self) -> &'static str {
        match self {
            Self::Multiply { shape, codes, .. } if codes.len() == shape.k() => "gemv",
            Self::Multiply { .. } => "gemm",
            Self::Quantize { .. } => "quantize_absmax",
            Self::Argmax { .. } => "argmax",
        }
    }

    fn shape(&self) -> String {
        match self {
            Self::Multiply { shape, codes, .. } => {
                format!("{shape} × {} tokens", codes.len() / shape.k())
            }
            Self::Quantize { x } => format!("K {}", x.len()),
            Self::Argmax { logits } => format!("V {}", logits.len()),
        }
    }

    fn expected(&self) -> Vec<i32> {
        match self {
            Self::Multiply { shape, w, codes } => cpu_ref::gemm::gemm(w, codes, shape.k()),
            Self::Quantize { x } => widen(&cpu_ref::quantize_absmax::quantize_absmax(x).codes),
            Self::Argmax { logits } => vec![index(cpu_ref::argmax::argmax(logits))],
        }
    }

    async fn found(&self, kernels: &impl Kernels) -> Result<Vec<i32>> {
        Ok(match self {
            Self::Multiply { shape, w, codes } => kernels.multiply(w, *shape, codes).await?,
            Self::Quantize { x } => widen(&kernels.quantize_absmax(x).await?.codes),
            Self::Argmax { logits } => vec![index(kernels.argmax(logits).await?)],
        })
    }
}

fn widen(codes: &[i8]) -> Vec<i32> {
    codes.iter().map(|&code| i32::from(code)).collect()
}

/// −1 stands for no maximum.
fn index(token: Option<usize>) -> i32 {
    token.map_or(-1, |token| token as i32)
}

/// A case whose result is made of floats: found, expected, and how far they may be apart.
struct FloatCase {
    kernel: &'static str,
    shape: String,
    found: Vec<f32>,
    expected: Vec<f32>,
    /// Relative to the largest expected value.
    bound: f32,
}

/// A few roundings of f32: what an inexact division or a fused product may change.
const FEW_ULP: f32 = 16.0 * f32::EPSILON;

async fn float_cases(kernels: &impl Kernels) -> Result<Vec<FloatCase>> {
    let mut random = Random::new(0x57E2_7A01);
    let mut cases = Vec::new();
    for k in [64, 2560] {
        let (x, w) = (fractions(&mut random, k, 4), fractions(&mut random, k, 2));
        cases.push(FloatCase {
            kernel: "rmsnorm",
            shape: format!("K {k}"),
            found: kernels.rmsnorm(&x, &w, 1e-5).await?,
            expected: cpu_ref::rmsnorm::rmsnorm(&x, &w, 1e-5),
            bound: FEW_ULP,
        });
        let y = fractions(&mut random, k, 9);
        cases.push(FloatCase {
            kernel: "residual_add",
            shape: format!("N {k}"),
            found: kernels.residual_add(&x, &y).await?,
            expected: cpu_ref::residual::residual_add(&x, &y),
            bound: FEW_ULP,
        });
        for activation in [Activation::Relu2, Activation::Silu] {
            cases.push(FloatCase {
                kernel: "gated_activation",
                shape: format!("{activation:?}, F {k}"),
                found: kernels.gated_activation(&y, &x, activation).await?,
                expected: cpu_ref::mlp::gated_activation(&y, &x, activation),
                bound: FEW_ULP,
            });
        }
    }
    for (dim, position) in [(32, 3), (128, 200)] {
        let head = fractions(&mut random, dim, 3);
        let (cos, sin) = cpu_ref::rope::angles(
            position,
            &cpu_ref::rope::frequencies(500_000.0, dim, cpu_ref::rope::Scaling::None),
        );
        let mut expected = head.clone();
        cpu_ref::rope::rotate(&mut expected, &cos, &sin);
        cases.push(FloatCase {
            kernel: "rope",
            shape: format!("D {dim}, position {position}"),
            found: kernels.rope(&head, position, 500_000.0).await?,
            expected,
            bound: FEW_ULP,
        });
    }
    for (heads, positions) in
        [(Heads { query: 4, kv: 2, dim: 64 }, 7), (Heads { query: 4, kv: 1, dim: 128 }, 300)]
    {
        let q = fractions(&mut random, heads.query * heads.dim, 1);
        let keys = fractions(&mut random, positions * heads.kv * heads.dim, 2);
        let values = fractions(&mut random, positions * heads.kv * heads.dim, 5);
        cases.push(FloatCase {
            kernel: "attention",
            shape: format!("{heads:?}, {positions} positions"),
            found: kernels.attention(&q, &keys, &values, heads).await?,
            expected: ref_attention(&q, &keys, &values, heads),
            // A score's error is the relative error of its weight.
            bound: 16.0 * FEW_ULP,
        });
    }
    let x = fractions(&mut random, 300, 7);
    cases.push(FloatCase {
        kernel: "quantize_absmax",
        shape: "act_scale".to_owned(),
        found: vec![kernels.quantize_absmax(&x).await?.act_scale],
        expected: vec![cpu_ref::quantize_absmax::quantize_absmax(&x).act_scale],
        bound: FEW_ULP,
    });
    let (v, k) = (50, 120);
    let (table, x) = (fractions(&mut random, v * k, 1), fractions(&mut random, k, 2));
    cases.push(FloatCase {
        kernel: "embedding",
        shape: format!("V {v}, K {k}"),
        found: kernels.embedding(&table, k, 33).await?,
        expected: cpu_ref::embedding::embedding(&table, k, 33),
        bound: 0.0,
    });
    cases.push(FloatCase {
        kernel: "lm_head",
        shape: format!("V {v}, K {k}"),
        found: kernels.lm_head(&table, &x).await?,
        expected: cpu_ref::lm_head::lm_head(&table, &x),
        // Sums of 120 products in another order, against the largest logit.
        bound: 4.0 * FEW_ULP,
    });
    Ok(cases)
}

/// A random matrix with scales of groups.
fn group_matrix(
    random: &mut Random,
    shape: MatShape,
    group: usize,
    alphabet: Alphabet,
) -> TernaryMatrix {
    let trits = match alphabet {
        Alphabet::Binary => (0..shape.len()).map(|_| 2 * random.below(2) as i8 - 1).collect(),
        Alphabet::Ternary => random.trits(shape.len()),
    };
    // Halves of both signs between 1/16 and 4.
    let scales = (0..shape.len() / group)
        .map(|_| (0x2c00 + random.below(0x1800) as u16) | ((random.below(2) as u16) << 15));
    let scales = scales.collect();
    TernaryMatrix::from_groups(shape, trits, scales, group, alphabet)
}

/// The rows of a matrix with scales of groups.
fn group_rows(matrix: &TernaryMatrix) -> Result<Vec<(Vec<i8>, Vec<f32>)>> {
    let rows = (0..matrix.shape().n()).map(|n| {
        let (mut trits, mut scales) = (vec![0; matrix.shape().k()], vec![0; matrix.groups()]);
        matrix.row_with_scales(n, &mut trits, &mut scales)?;
        Ok((trits, scales.into_iter().map(f16_to_f32).collect()))
    });
    rows.collect()
}

/// The kernels of models whose scales are those of groups, which a backend may not have by
/// themselves.
async fn group_cases(kernels: &impl Kernels) -> Result<Vec<FloatCase>> {
    let mut random = Random::new(0x57E2_7A02);
    let mut cases = Vec::new();
    let mut add = |kernel, shape: String, found, expected, bound| {
        if let Some(found) = found {
            cases.push(FloatCase { kernel, shape, found, expected, bound });
        }
    };
    for (alphabet, k, group, n_tokens) in [
        (Alphabet::Binary, 192, 64, 1),
        (Alphabet::Binary, 2560, 128, 1),
        (Alphabet::Binary, 512, 128, 5),
        (Alphabet::Ternary, 192, 64, 5),
        (Alphabet::Ternary, 2560, 256, 1),
    ] {
        let shape = MatShape::new(70, k)?;
        let matrix = group_matrix(&mut random, shape, group, alphabet);
        let rows = group_rows(&matrix)?;
        let what = format!("{alphabet:?} {shape}, groups of {group}, {n_tokens} tokens");
        let x = fractions(&mut random, n_tokens * k, 3);
        let float = |x: &[f32]| {
            let dot = |(row, scales): &(Vec<i8>, Vec<f32>)| group_dot(row, scales, x);
            rows.iter().map(dot).collect::<Vec<_>>()
        };
        let expected = x.chunks_exact(k).flat_map(float).collect();
        // Sums of K terms in another order.
        let bound = 8.0 * FEW_ULP;
        add("group_gemv", what.clone(), kernels.group_gemv(&matrix, &x).await?, expected, bound);
        let codes = random.codes(n_tokens * k);
        let act_scales = fractions(&mut random, n_tokens * k / group, 1);
        let int8 = |(codes, act): (&[i8], &[f32])| {
            let dot = |(row, d): &(Vec<i8>, Vec<f32>)| group_dot_int8(row, d, codes, act);
            rows.iter().map(dot).collect::<Vec<_>>()
        };
        let tokens = codes.chunks_exact(k).zip(act_scales.chunks_exact(k / group));
        let expected = tokens.flat_map(int8).collect();
        let found = kernels.group_gemv_int8(&matrix, &codes, &act_scales).await?;
        add("group_gemv_int8", what.clone(), found, expected, FEW_ULP);
        let (row, scales) = &rows[65];
        let weights = row.iter().enumerate();
        let expected = weights.map(|(k, &trit)| scales[k / group] * f32::from(trit)).collect();
        add("group_embedding", what, kernels.group_embedding(&matrix, 65).await?, expected, 0.0);
    }
    let x = fractions(&mut random, 2560, 5);
    let (_, scales) = quantize_absmax_groups(&x, 128);
    let found = kernels.quantize_absmax_groups(&x, 128).await?;
    let values = |codes: &[i8], scales: &[f32]| -> Vec<f32> {
        codes.iter().enumerate().map(|(k, &code)| f32::from(code) * scales[k / 128]).collect()
    };
    // Half a step, of a group whose scale is at most that of the largest value.
    let found_values = found.as_ref().map(|(codes, scales)| values(codes, scales));
    add("quantize_absmax_groups", "values".to_owned(), found_values, x.clone(), 0.51 / 127.0);
    let found = found.map(|(_, scales)| scales);
    add("quantize_absmax_groups", "act_scale".to_owned(), found, scales, FEW_ULP);
    for block in [64, 512] {
        let signs: Vec<f32> = (0..x.len()).map(|_| [-1.0, 1.0][random.below(2)]).collect();
        let found = kernels.hadamard(&x, &signs, block).await?;
        let expected = cpu_ref::hadamard::rotate(&x, &signs, block);
        add("hadamard", format!("blocks of {block}"), found, expected, FEW_ULP);
    }
    for dim in [96, 128] {
        let (head, weight) = (fractions(&mut random, dim, 3), fractions(&mut random, dim, 2));
        let found = kernels.head_norm(&head, &weight, 1e-6).await?;
        let expected = cpu_ref::rmsnorm::rmsnorm(&head, &weight, 1e-6);
        add("head_norm", format!("D {dim}"), found, expected, FEW_ULP);
    }
    Ok(cases)
}

/// Runs all cases on a backend: the checks, and the hash of its integer results.
async fn judge(kernels: &impl Kernels) -> Result<(Vec<Check>, String)> {
    let mut checks: Vec<Check> = Vec::new();
    let mut add = |kernel, problem: Option<String>| {
        let known = checks.iter_mut().find(|check| check.kernel == kernel);
        match known {
            Some(check) => {
                check.cases += 1;
                if check.problem.is_none() {
                    check.problem = problem;
                }
            }
            None => checks.push(Check { kernel, cases: 1, problem }),
        }
    };
    let mut hash = Hash::default();
    for case in integer_cases() {
        let found = case.found(kernels).await?;
        hash.add(&found);
        add(case.kernel(), first_difference(&case.shape(), &case.expected(), &found));
    }
    let floats = float_cases(kernels).await?.into_iter().chain(group_cases(kernels).await?);
    for FloatCase { kernel, shape, found, expected, bound } in floats {
        add(kernel, first_distance(&shape, &expected, &found, bound));
    }
    Ok((checks, hash.hex()))
}

fn first_difference(shape: &str, expected: &[i32], found: &[i32]) -> Option<String> {
    if expected.len() != found.len() {
        return Some(format!("{shape}: {} values, expected {}", found.len(), expected.len()));
    }
    let at = expected.iter().zip(found).position(|(expected, found)| expected != found)?;
    Some(format!("{shape}: [{at}]: expected {}, found {}", expected[at], found[at]))
}

fn first_distance(shape: &str, expected: &[f32], found: &[f32], bound: f32) -> Option<String> {
    if expected.len() != found.len() {
        return Some(format!("{shape}: {} values, expected {}", found.len(), expected.len()));
    }
    let largest = expected.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    let bound = bound * largest;
    let near = |(expected, found): (&f32, &f32)| (expected - found).abs() <= bound;
    let at = expected.iter().zip(found).position(|pair| !near(pair))?;
    Some(format!("{shape}: [{at}]: expected {} ± {bound}, found {}", expected[at], found[at]))
}

fn ref_attention(q: &[f32], keys: &[f32], values: &[f32], heads: Heads) -> Vec<f32> {
    let cached = cpu_ref::attention::Cached { keys, values, scales: None };
    cpu_ref::attention::attention(q, cached, heads)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference behind the trait, with one integer or one float wrong.
    struct Wrong {
        sum: i32,
        rms: f32,
    }

    impl Kernels for Wrong {
        async fn multiply(&self, w: &[i8], shape: MatShape, codes: &[i8]) -> Result<Vec<i32>> {
            let mut acc = cpu_ref::gemm::gemm(w, codes, shape.k());
            acc[0] += self.sum;
            Ok(acc)
        }
        async fn quantize_absmax(&self, x: &[f32]) -> Result<Quantized> {
            Ok(cpu_ref::quantize_absmax::quantize_absmax(x))
        }
        async fn argmax(&self, logits: &[f32]) -> Result<Option<usize>> {
            Ok(cpu_ref::argmax::argmax(logits))
        }
        async fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32) -> Result<Vec<f32>> {
            let mut y = cpu_ref::rmsnorm::rmsnorm(x, weight, eps);
            y[5] += self.rms;
            Ok(y)
        }
        async fn rope(&self, head: &[f32], position: usize, theta: f32) -> Result<Vec<f32>> {
            let frequencies =
                cpu_ref::rope::frequencies(theta, head.len(), cpu_ref::rope::Scaling::None);
            let (cos, sin) = cpu_ref::rope::angles(position, &frequencies);
            let mut head = head.to_vec();
            cpu_ref::rope::rotate(&mut head, &cos, &sin);
            Ok(head)
        }
        async fn attention(
            &self,
            q: &[f32],
            k: &[f32],
            v: &[f32],
            heads: Heads,
        ) -> Result<Vec<f32>> {
            Ok(ref_attention(q, k, v, heads))
        }
        async fn gated_activation(
            &self,
            gate: &[f32],
            up: &[f32],
            act: Activation,
        ) -> Result<Vec<f32>> {
            Ok(cpu_ref::mlp::gated_activation(gate, up, act))
        }
        async fn residual_add(&self, hidden: &[f32], y: &[f32]) -> Result<Vec<f32>> {
            Ok(cpu_ref::residual::residual_add(hidden, y))
        }
        async fn embedding(&self, table: &[f32], k: usize, token: usize) -> Result<Vec<f32>> {
            Ok(cpu_ref::embedding::embedding(table, k, token))
        }
        async fn lm_head(&self, table: &[f32], x: &[f32]) -> Result<Vec<f32>> {
            Ok(cpu_ref::lm_head::lm_head(table, x))
        }
    }

    fn verdict(wrong: &Wrong) -> (bool, Vec<&'static str>) {
        let (checks, integer_hash) = block_on(judge(wrong)).unwrap();
        let failed = checks.iter().filter(|check| check.problem.is_some());
        let failed = failed.map(|check| check.kernel).collect();
        let (device, description, variant) = (String::new(), String::new(), String::new());
        let result = Verification { device, description, variant, checks, integer_hash };
        (result.passed(), failed)
    }

    #[test]
    fn the_judge_objects_to_one_wrong_value() {
        assert_eq!(verdict(&Wrong { sum: 0, rms: 0.0 }), (true, vec![]));
        assert_eq!(verdict(&Wrong { sum: 1, rms: 0.0 }), (false, vec!["gemv", "gemm"]));
        assert_eq!(verdict(&Wrong { sum: 0, rms: 1e-3 }), (false, vec!["rmsnorm"]));
    }

    #[test]
    fn every_level_passes_with_the_kernels_of_groups() {
        for level in verify(Device::Cpu).unwrap() {
            let problems: Vec<_> = level.checks.iter().filter(|c| c.problem.is_some()).collect();
            assert!(level.passed(), "{}: {problems:?}", level.variant);
            for kernel in
                ["group_gemv", "group_gemv_int8", "group_embedding", "hadamard", "head_norm"]
            {
                assert!(level.checks.iter().any(|check| check.kernel == kernel), "{kernel}");
            }
        }
    }

    #[test]
    fn the_hash_does_not_depend_on_the_machine() {
        // The cases and their order are part of the hash: a change here changes the published value.
        assert_eq!(integer_hash(), "be0045167c427d1b");
    }

    #[test]
    fn no_quantize_case_is_near_a_tie() {
        for case in integer_cases() {
            let IntegerCase::Quantize { x } = case else { continue };
            let absmax = x.iter().fold(0.0f32, |max, value| max.max(value.abs()));
            for value in x {
                let scaled = value * 127.0 / absmax;
                let fraction = (scaled - scaled.floor() - 0.5).abs();
                assert!(fraction > 0.15, "{value}");
            }
        }
    }
}
