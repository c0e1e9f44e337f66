//! The SIMD kernels against their twins in `cpu_ref`: equal, except the logits, which stay within the
//! bound that stands beside the kernel and have the same bits on every level. One test a kernel and
//! level.

use cpu_ref::head_int8::{Input, MAX_K};
use cpu_ref::layout::columns::STRIPE_ROWS;
use cpu_ref::layout::{CHUNK_K, TILE_ROWS, k_chunks, split_rows};
use cpu_ref::mlp::Activation;
use sterna::backend::simd::{
    self, Activations, Attended, Columns, GroupLayout, GroupWeights, Kernels, Level, NonZeros,
    Open, Queries, Rows, Softmax, TableRows, TokenScale,
};
use sterna::format::float::{bf16_to_f32, f16_to_f32, f32_to_bf16};
use sterna::kv_cache::{BLOCK, HeadChunkMut, KvCache, KvFormat, KvShape, Prepared};
use sterna::layout::{Layout, Line, Packed, PackedBase3, Signs, group_scales};
use sterna::random::Random;
use sterna::shape::MatShape;
use sterna::weights::{Int8Rows, Table, TableData};

use crate::util::{assert_close, assert_same, first_difference, guarded};

/// One test a level of this architecture, by name; a level that this machine lacks says so.
macro_rules! on_every_level {
    ($($test:ident)*) => {$(
        mod $test {
            use super::*;

            on_every_level!(@level $test
                #[cfg(target_arch = "x86_64")] avx512vbmi = Avx512Vbmi,
                #[cfg(target_arch = "x86_64")] avx512vnni = Avx512Vnni,
                #[cfg(target_arch = "x86_64")] avxvnni = AvxVnni,
                #[cfg(target_arch = "x86_64")] avx2 = Avx2,
                #[cfg(target_arch = "aarch64")] neon_i8mm = NeonI8mm,
                #[cfg(target_arch = "aarch64")] neon_dotprod = NeonDotprod,
                #[cfg(target_arch = "aarch64")] neon = Neon,
                #[cfg(all())] scalar = Scalar,
            );
        }
    )*};
    (@level $test:ident $(#[$cfg:meta] $name:ident = $level:ident,)*) => {$(
        #[test]
        #[$cfg]
        fn $name() {
            match Level::$level.kernels() {
                Some(kernels) => super::$test(kernels.as_ref()),
                None => skipped(Level::$level),
            }
        }
    )*};
}

on_every_level! {
    gemm_edges
    gemm_extremes
    gemm_random
    gemm_notices_a_wrong_weight
    gemv_columns
    gemv_columns_notices_a_wrong_weight
    gemv_rows
    gemv_rows_notices_a_wrong_weight
    group_gemm_edges
    group_gemm_extremes
    group_gemm_random
    group_gemm_notices_a_wrong_weight
    quantize_absmax
    quantize_absmax_groups
    rotations
    norm_and_quantize
    elementwise
    attention
    attention_of_tokens
    lm_head
    lm_head_of_codes
    head_input
    head_int8
    argmax
}

#[expect(clippy::print_stderr, reason = "a skipped test says so")]
fn skipped(level: Level) {
    eprintln!("skipped: this machine does not run {}", level.name());
}

/// Token codes padded to whole chunks, with their sums.
fn pad(x: &[i8], k: usize) -> (Vec<i8>, Vec<TokenScale>) {
    let padded = k_chunks(k) * CHUNK_K;
    let mut codes = vec![0; x.len() / k * padded];
    for (padded, token) in codes.chunks_exact_mut(padded).zip(x.chunks_exact(k)) {
        padded[..k].copy_from_slice(token);
    }
    let scale = |token: &[i8]| TokenScale {
        act_scale: 1.0,
        code_sum: token.iter().map(|&code| i32::from(code)).sum(),
    };
    (codes, x.chunks_exact(k).map(scale).collect())
}

/// The kernel's `[M, N]` with two bits a weight, which five weights a byte must give, too; with
/// everything around its output guarded.
fn run_gemm(kernels: &dyn Kernels, packed: &Packed, x: &[i8]) -> Vec<i32> {
    let run = |x: Activations<'_>, acc: &mut [i32]| kernels.gemm(packed.words(), x, acc);
    let of_i2 = run_tiled("gemm", packed.shape(), x, run);
    let base3 = PackedBase3::of(packed);
    let run = |x: Activations<'_>, acc: &mut [i32]| kernels.gemm_base3(base3.words(), x, acc);
    let of_base3 = run_tiled("gemm_base3", packed.shape(), x, run);
    let variant = kernels.level().name();
    assert_same("gemm_base3 and gemm", packed.shape(), 0, variant, &of_i2, &of_base3);
    of_i2
}

/// `[M, N]` that `run(x, acc)` writes as `acc[tiles][M][32]`.
fn run_tiled(
    what: &str,
    shape: MatShape,
    x: &[i8],
    run: impl FnOnce(Activations<'_>, &mut [i32]),
) -> Vec<i32> {
    let (n, k) = (shape.n(), shape.k());
    let (codes, scales) = pad(x, k);
    let m = scales.len();
    let x = Activations::new(&codes, &scales, k_chunks(k));
    let tiles = n.div_ceil(TILE_ROWS);
    let acc = guarded(what, tiles * m * TILE_ROWS, i32::MIN, |acc| run(x, acc));
    let at = |token, row| acc[(row / TILE_ROWS * m + token) * TILE_ROWS + row % TILE_ROWS];
    // Padding rows are rows of zeros.
    for token in 0..m {
        assert!((n..tiles * TILE_ROWS).all(|row| at(token, row) == 0), "padding rows");
    }
    (0..m).flat_map(|token| (0..n).map(move |row| (token, row))).map(|(t, r)| at(t, r)).collect()
}

fn check_gemm(kernels: &dyn Kernels, (n, k, m): (usize, usize, usize), seed: u64) {
    let mut random = Random::new(seed);
    let (w, x) = (random.trits(n * k), random.codes(m * k));
    let packed = Packed::pack(Layout::I2, MatShape::new(n, k).unwrap(), &w);
    let expected = cpu_ref::gemm::gemm(&w, &x, k);
    let found = run_gemm(kernels, &packed, &x);
    assert_same("gemm", (n, k, m), seed, kernels.level().name(), &expected, &found);
}

fn gemm_edges(kernels: &dyn Kernels) {
    for k in [1, 63, 64, 65, 127, 128, 256, 257, 320, 321, 1000, 1024, 1088] {
        for n in [1, 31, 32, 33, 65] {
            for m in 1..=14 {
                check_gemm(kernels, (n, k, m), (k * 100 + n) as u64);
            }
        }
    }
    for k in [2560, 6912, 23_040] {
        for m in [1, 2, 3, 5] {
            check_gemm(kernels, (33, k, m), k as u64);
        }
    }
    // More tokens than the kernels go through at a time, and a rest.
    check_gemm(kernels, (33, 23_040, 27), 27);
}

/// The largest sums there can be, in rows long enough to overflow i16 many times.
fn gemm_extremes(kernels: &dyn Kernels) {
    for k in [64 * 15, 64 * 16, 64 * 17, 2560, 6912, 23_040] {
        for weight in [-1, 0, 1] {
            let shape = MatShape::new(33, k).unwrap();
            let w = vec![weight; shape.len()];
            let packed = Packed::pack(Layout::I2, shape, &w);
            for code in [-128, 127] {
                for m in [1, 4, 9] {
                    let x = vec![code; m * k];
                    let expected = vec![i32::from(weight) * i32::from(code) * k as i32; m * 33];
                    let found = run_gemm(kernels, &packed, &x);
                    let variant = kernels.level().name();
                    assert_same("gemm", (weight, code, k, m), 0, variant, &expected, &found);
                }
            }
        }
    }
}

fn gemm_random(kernels: &dyn Kernels) {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let shape = (1 + random.below(130), 1 + random.below(700), 1 + random.below(12));
        check_gemm(kernels, shape, seed);
    }
}

/// The judge must object to one wrong weight out of many.
fn gemm_notices_a_wrong_weight(kernels: &dyn Kernels) {
    let (n, k, seed) = (40, 200, 7);
    let mut random = Random::new(seed);
    let mut w = random.trits(n * k);
    let x = vec![1; k];
    let expected = cpu_ref::gemm::gemm(&w, &x, k);
    let (row, column) = (random.below(n), random.below(k));
    let weight = &mut w[row * k + column];
    *weight = if *weight == 1 { -1 } else { *weight + 1 };
    let packed = Packed::pack(Layout::I2, MatShape::new(n, k).unwrap(), &w);
    let found = run_gemm(kernels, &packed, &x);
    assert_eq!(first_difference(&expected, &found).map(|(at, ..)| at), Some(row));
    let result = std::panic::catch_unwind(|| {
        assert_same("gemm", (n, k), seed, "mutated", &expected, &found);
    });
    let message = *result.unwrap_err().downcast::<String>().unwrap();
    assert!(message.contains(&format!("[{row}]")) && message.contains("seed 7"), "{message}");
}

/// The kernel's `[N]` of a matrix by columns, with everything around its output guarded.
fn run_columns(kernels: &dyn Kernels, n: usize, w: &[i8], x: &[i8]) -> Vec<i32> {
    let shape = MatShape::new(n, x.len()).unwrap();
    let columns = Columns::pack(&Packed::pack(Layout::I2, shape, w));
    let mut inputs = NonZeros::new(x.len());
    inputs.collect(x);
    let rows = n.next_multiple_of(STRIPE_ROWS);
    let mut acc = guarded("gemv_columns", rows, i32::MIN, |acc| {
        kernels.gemv_columns(columns.whole(), &inputs, acc);
    });
    assert!(acc.split_off(n).iter().all(|&sum| sum == 0), "padding rows");
    acc
}

fn gemv_columns(kernels: &dyn Kernels) {
    let variant = kernels.level().name();
    // Shares of zeros from none to all, in percent.
    for (seed, zeros) in (0..).zip([0, 30, 50, 70, 80, 90, 99, 100]) {
        let mut random = Random::new(seed);
        for (n, k) in [(1, 1), (255, 3), (256, 64), (300, 517), (513, 1000)] {
            let (w, mut x) = (random.trits(n * k), random.codes(k));
            x.iter_mut().filter(|_| random.below(100) < zeros).for_each(|x| *x = 0);
            let found = run_columns(kernels, n, &w, &x);
            let expected = cpu_ref::gemv::gemv(&w, &x);
            assert_same("gemv_columns", (n, k, zeros), seed, variant, &expected, &found);
        }
    }
    // The largest sums there can be, in rows long enough to overflow i16 many times.
    for weight in [-1, 1] {
        for code in [-128, 127] {
            let found = run_columns(kernels, 40, &[weight; 40 * 6912], &[code; 6912]);
            let expected = [i32::from(weight) * i32::from(code) * 6912; 40];
            assert_same("gemv_columns", (weight, code), 0, variant, &expected, &found);
        }
    }
}

fn gemv_columns_notices_a_wrong_weight(kernels: &dyn Kernels) {
    let (n, k, seed) = (300, 70, 7);
    let mut random = Random::new(seed);
    let mut w = random.trits(n * k);
    let x = vec![1; k];
    let expected = cpu_ref::gemv::gemv(&w, &x);
    let (row, column) = (random.below(n), random.below(k));
    let weight = &mut w[row * k + column];
    *weight = if *weight == 1 { -1 } else { *weight + 1 };
    let found = run_columns(kernels, n, &w, &x);
    assert_eq!(first_difference(&expected, &found).map(|(at, ..)| at), Some(row));
}

/// The kernel's sums of the open rows of the second half of a matrix, with everything around its output
/// guarded.
fn run_rows(kernels: &dyn Kernels, n: usize, w: &[i8], x: &[i8], open: &[u32]) -> Vec<i32> {
    let k = x.len();
    let packed = Packed::pack(Layout::I2, MatShape::new(n, k).unwrap(), w);
    let rows = Rows::pack(&packed, n / 2..n);
    let mut codes = x.to_vec();
    codes.resize(rows.chunks() * CHUNK_K, 0);
    let code_sum = x.iter().map(|&code| i32::from(code)).sum();
    let scales = [TokenScale { act_scale: 1.0, code_sum }];
    let x = Activations::new(&codes, &scales, rows.chunks());
    guarded("gemv_rows", open.len(), i32::MIN, |acc| kernels.gemv_rows(&rows, x, open, acc))
}

/// What the reference has for these rows of the second half.
fn expected_rows(n: usize, w: &[i8], x: &[i8], open: &[u32]) -> Vec<i32> {
    let all = cpu_ref::gemv::gemv(w, x);
    open.iter().map(|&row| all[n / 2 + row as usize]).collect()
}

fn gemv_rows(kernels: &dyn Kernels) {
    let variant = kernels.level().name();
    // Shares of closed gates from none to all, in percent.
    for (seed, closed) in (0..).zip([0, 30, 50, 70, 80, 90, 99, 100]) {
        let mut random = Random::new(seed);
        for (n, k) in [(2, 1), (7, 63), (40, 256), (150, 257), (67, 1000), (300, 2560)] {
            let (w, x) = (random.trits(n * k), random.codes(k));
            let gate = |_| if random.below(100) < closed { -1.0 } else { 1.0 };
            let gates: Vec<f32> = (n / 2..n).map(gate).collect();
            let mut open = Open::new(gates.len());
            open.collect(&gates);
            let found = run_rows(kernels, n, &w, &x, open.rows());
            let expected = expected_rows(n, &w, &x, open.rows());
            assert_same("gemv_rows", (n, k, closed), seed, variant, &expected, &found);
        }
    }
    // The largest sums there can be, in rows long enough to overflow i16 many times.
    for weight in [-1, 1] {
        for code in [-128, 127] {
            let open = [0, 1, 4, 5, 7, 9];
            let found = run_rows(kernels, 20, &[weight; 20 * 6912], &[code; 6912], &open);
            let expected = [i32::from(weight) * i32::from(code) * 6912; 6];
            assert_same("gemv_rows", (weight, code), 0, variant, &expected, &found);
        }
    }
}

fn gemv_rows_notices_a_wrong_weight(kernels: &dyn Kernels) {
    let (n, k, seed) = (40, 600, 7);
    let mut random = Random::new(seed);
    let mut w = random.trits(n * k);
    let x = vec![1; k];
    let open: Vec<u32> = (0..20).step_by(3).collect();
    let expected = expected_rows(n, &w, &x, &open);
    let (at, column) = (random.below(open.len()), random.below(k));
    let weight = &mut w[(n / 2 + open[at] as usize) * k + column];
    *weight = if *weight == 1 { -1 } else { *weight + 1 };
    let found = run_rows(kernels, n, &w, &x, &open);
    assert_eq!(first_difference(&expected, &found).map(|(at, ..)| at), Some(at));
}

/// A matrix with scales of groups, and M tokens.
struct GroupCase {
    layout: GroupLayout,
    shape: MatShape,
    group: usize,
    w: Vec<i8>,
    /// Bits of halves, `[N, K/group]`.
    scales: Vec<u16>,
    /// `[M, K]`.
    x: Vec<f32>,
}

/// Bits of a random finite half: either sign, any exponent, subnormals too.
fn half(random: &mut Random) -> u16 {
    loop {
        let bits = random.bits() as u16;
        if bits & 0x7c00 != 0x7c00 {
            return bits;
        }
    }
}

impl GroupCase {
    fn random(
        layout: GroupLayout,
        (n, k, m): (usize, usize, usize),
        group: usize,
        seed: u64,
    ) -> Self {
        let mut random = Random::new(seed);
        let w = (0..n * k)
            .map(|_| match layout {
                GroupLayout::I2 => random.below(3) as i8 - 1,
                GroupLayout::Signs => 2 * random.below(2) as i8 - 1,
            })
            .collect();
        // Of one magnitude in most cases, so that every group counts; of any in the others.
        let near = |random: &mut Random| 0x2c00 | random.bits() as u16 & 0x83ff;
        let scale = if seed.is_multiple_of(3) { half } else { near };
        let scales = (0..n * k / group).map(|_| scale(&mut random)).collect();
        let x = random.floats(m * k, 3.0);
        Self { layout, shape: MatShape::new(n, k).unwrap(), group, w, scales, x }
    }

    fn groups(&self) -> usize {
        self.shape.k() / self.group
    }

    fn n_tokens(&self) -> usize {
        self.x.len() / self.shape.k()
    }

    fn words(&self) -> Vec<u32> {
        match self.layout {
            GroupLayout::I2 => Packed::pack(Layout::I2, self.shape, &self.w).words().to_vec(),
            GroupLayout::Signs => Packed::pack(Signs, self.shape, &self.w).words().to_vec(),
        }
    }

    /// `[M, N]` that `run(weights, y)` writes as `y[tiles][M][32]`.
    fn run(&self, what: &str, run: impl FnOnce(GroupWeights<'_>, &mut [f32])) -> Vec<f32> {
        let (n, m) = (self.shape.n(), self.n_tokens());
        let words = self.words();
        let scales = group_scales::pack(n, self.groups(), &self.scales);
        let weights = GroupWeights::new(self.layout, (&words, &scales), self.shape.k(), self.group);
        let len = n.next_multiple_of(TILE_ROWS) * m;
        let tiled = guarded(what, len, 1e30, |y| run(weights, y));
        let at = |t, row| tiled[(row / TILE_ROWS * m + t) * TILE_ROWS + row % TILE_ROWS];
        (0..m).flat_map(|t| (0..n).map(move |row| (t, row))).map(|(t, row)| at(t, row)).collect()
    }

    fn run_float(&self, kernels: &dyn Kernels) -> Vec<f32> {
        self.run("group_gemm", |weights, y| kernels.group_gemm(weights, &self.x, y))
    }

    fn run_int8(&self, kernels: &dyn Kernels) -> Vec<f32> {
        let (k, groups) = (self.shape.k(), self.groups());
        let mut codes = vec![0; self.x.len()];
        let mut scales = vec![TokenScale::default(); self.n_tokens() * groups];
        let tokens = self.x.chunks_exact(k).zip(codes.chunks_exact_mut(k));
        for ((x, codes), scales) in tokens.zip(scales.chunks_exact_mut(groups)) {
            kernels.quantize_absmax_groups(x, self.layout, codes, scales);
        }
        let x = Activations::of_groups(&codes, &scales, k / CHUNK_K, groups);
        self.run("group_gemm_int8", |weights, y| kernels.group_gemm_int8(weights, x, y))
    }

    /// `row(w, scales, x)` of every token and row.
    fn each<T>(&self, row: impl Fn(&[i8], &[f32], &[f32]) -> T) -> Vec<T> {
        let (k, groups) = (self.shape.k(), self.groups());
        let scales: Vec<f32> = self.scales.iter().map(|&bits| f16_to_f32(bits)).collect();
        let mut all = Vec::new();
        for x in self.x.chunks_exact(k) {
            for (w, scales) in self.w.chunks_exact(k).zip(scales.chunks_exact(groups)) {
                all.push(row(w, scales, x));
            }
        }
        all
    }

    fn check(&self, kernels: &dyn Kernels, seed: u64) {
        use cpu_ref::group_gemv::{bound, group_dot, group_dot_int8, quantize_absmax_groups};

        let variant = kernels.level().name();
        let what = (self.layout, self.shape, self.group, self.n_tokens());
        let found = same_bits(kernels, "group_gemm", |kernels| self.run_float(kernels));
        let (expected, bounds) = (self.each(group_dot), self.each(bound));
        // Underflow is not part of the bound.
        let bound = |at: usize| f64::from(bounds[at]) + 1e-41;
        assert_close("group_gemm", what, seed, variant, (&expected, &found), bound);

        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        let expected = self.each(|w, scales, x| {
            let (codes, act_scales) = quantize_absmax_groups(x, self.group);
            group_dot_int8(w, scales, &codes, &act_scales)
        });
        let found = self.run_int8(kernels);
        let pair = (bits(&expected), bits(&found));
        assert_same("group_gemm_int8", what, seed, variant, &pair.0, &pair.1);
    }
}

/// The layouts with the groups that they are used for.
const GROUPS: [(GroupLayout, usize); 5] = [
    (GroupLayout::I2, 64),
    (GroupLayout::I2, 128),
    (GroupLayout::I2, 256),
    (GroupLayout::Signs, 128),
    (GroupLayout::Signs, 256),
];

fn group_gemm_edges(kernels: &dyn Kernels) {
    // An emulator, which tools/cross-aarch64.sh tells of, takes minutes for all of them.
    let is_emulated = std::env::var_os("STERNA_EMULATED").is_some();
    let rows = if is_emulated { &[1, 33][..] } else { &[1, 31, 33, 70] };
    for (layout, group) in GROUPS {
        for groups in [1, 2, 3, 7, 8, 9, 17] {
            for &n in rows {
                for m in [1, 2, 3, 4, 5, 9] {
                    let seed = (groups * 100 + n + m) as u64;
                    GroupCase::random(layout, (n, groups * group, m), group, seed)
                        .check(kernels, seed);
                }
            }
        }
    }
}

/// The largest sums and the extremes of what is multiplied.
fn group_gemm_extremes(kernels: &dyn Kernels) {
    for (layout, group) in GROUPS {
        let k = 3 * group;
        let case = GroupCase::random(layout, (33, k, 2), group, 1);
        let weights = if layout == GroupLayout::I2 { &[-1, 0, 1][..] } else { &[-1, 1] };
        for &weight in weights {
            // Largest, smallest normal, largest and smallest subnormal, zeros, a negative one.
            for scale in [0x7bff, 0x0400, 0x03ff, 0x0001, 0x8001, 0x0000, 0x8000, 0xbc00] {
                for x in [0.0, -0.0, 1.0, -1.0, 1e-30, 1e30] {
                    let case = GroupCase {
                        w: vec![weight; case.w.len()],
                        scales: vec![scale; case.scales.len()],
                        x: vec![x; 2 * k],
                        ..case
                    };
                    case.check(kernels, 0);
                }
            }
        }
    }
}

fn group_gemm_random(kernels: &dyn Kernels) {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let (layout, group) = GROUPS[random.below(GROUPS.len())];
        let shape = (1 + random.below(130), group * (1 + random.below(6)), 1 + random.below(9));
        GroupCase::random(layout, shape, group, seed).check(kernels, seed);
    }
    // Rows as long as a real model's.
    for (layout, group) in GROUPS {
        GroupCase::random(layout, (33, 12_288, 2), group, 7).check(kernels, 7);
    }
}

/// The judge must object to one wrong weight out of many.
fn group_gemm_notices_a_wrong_weight(kernels: &dyn Kernels) {
    for (layout, group) in GROUPS {
        let case = GroupCase::random(layout, (40, 2 * group, 1), group, 1);
        let x = vec![1.0; 2 * group];
        let mut case = GroupCase { x, ..case };
        let (float, int8) = (case.run_float(kernels), case.run_int8(kernels));
        let weight = &mut case.w[17 * 2 * group + 77];
        *weight = if *weight == 1 { -1 } else { 1 };
        let row = |before: &[f32], after: &[f32]| first_difference(before, after).map(|d| d.0);
        assert_eq!(row(&float, &case.run_float(kernels)), Some(17));
        assert_eq!(row(&int8, &case.run_int8(kernels)), Some(17));
    }
}

fn quantize_absmax_groups(kernels: &dyn Kernels) {
    let variant = kernels.level().name();
    for (layout, group) in GROUPS {
        for magnitude in [1e-30, 1e-6, 1.0, 1e38] {
            let mut x = Random::new(group as u64).floats(3 * group, magnitude);
            x[group..2 * group].fill(0.0);
            let (expected, act_scales) = cpu_ref::group_gemv::quantize_absmax_groups(&x, group);
            let mut scales = [TokenScale::default(); 3];
            let codes = guarded("quantize_absmax_groups", x.len(), 99, |codes| {
                kernels.quantize_absmax_groups(&x, layout, codes, &mut scales);
            });
            let place = |i: usize| match layout {
                GroupLayout::I2 => i,
                // Bit by bit of the 16 bytes.
                GroupLayout::Signs => i / 128 * 128 + 16 * (i % 8) + i % 128 / 8,
            };
            let plain: Vec<i8> = (0..x.len()).map(|i| codes[place(i)]).collect();
            let what = (layout, group, magnitude);
            assert_same("quantize_absmax_groups", what, 0, variant, &expected, &plain);
            for (g, codes) in expected.chunks_exact(group).enumerate() {
                assert_eq!(scales[g].act_scale, act_scales[g]);
                let sum: i32 = codes.iter().map(|&code| i32::from(code)).sum();
                assert_eq!(scales[g].code_sum, sum);
            }
        }
    }
    let mut x = vec![1.0; 256];
    x[200] = f32::NAN;
    let mut scales = [TokenScale::default(); 2];
    kernels.quantize_absmax_groups(&x, GroupLayout::I2, &mut [0; 256], &mut scales);
    assert!(scales[0].act_scale.is_finite() && scales[1].act_scale.is_nan());
}

fn rotations(kernels: &dyn Kernels) {
    let variant = kernels.level().name();
    for block in [1, 2, 4, 8, 16, 64, 128, 512, 1024] {
        for blocks in [1, 3] {
            let mut random = Random::new(block as u64);
            let x = random.floats(block * blocks, 3.0);
            let signs: Vec<f32> =
                x.iter().map(|_| if random.below(2) == 0 { 1.0 } else { -1.0 }).collect();
            let expected = cpu_ref::hadamard::rotate(&x, &signs, block);
            let mut found = x.clone();
            kernels.rotate(&mut found, &signs, block);
            assert_same("rotate", (block, blocks), 0, variant, &expected, &found);
            let expected = cpu_ref::hadamard::rotate_back(&x, &signs, block);
            let mut found = x.clone();
            kernels.rotate_back(&mut found, &signs, block);
            assert_same("rotate_back", (block, blocks), 0, variant, &expected, &found);
        }
    }
}

fn check_quantize(kernels: &dyn Kernels, x: &[f32], what: &str) {
    let padded = x.len().next_multiple_of(CHUNK_K);
    let mut scale = TokenScale::default();
    let codes = guarded("quantize_absmax", padded, 99, |codes| {
        scale = kernels.quantize_absmax(x, codes);
    });
    let expected = cpu_ref::quantize_absmax::quantize_absmax(x);
    let variant = kernels.level().name();
    let shape = (what, x.len());
    assert_same("quantize_absmax", shape, 0, variant, &expected.codes, &codes[..x.len()]);
    assert!(codes[x.len()..].iter().all(|&code| code == 0), "{what}: padding");
    let bits = (expected.act_scale.to_bits(), scale.act_scale.to_bits());
    let nan = expected.act_scale.is_nan() && scale.act_scale.is_nan();
    assert!(bits.0 == bits.1 || nan, "{what}: act_scale {:?}, expected {expected:?}", scale);
    let sum: i32 = expected.codes.iter().map(|&code| i32::from(code)).sum();
    assert_eq!(scale.code_sum, sum, "{what}");
}

fn quantize_absmax(kernels: &dyn Kernels) {
    let mut random = Random::new(3);
    for len in (1..200).chain([2560, 6912]) {
        for magnitude in [1e-30, 1e-6, 1.0, 300.0, 1e38] {
            check_quantize(kernels, &random.floats(len, magnitude), "random");
        }
    }
    // Ties: with absmax 127 the scale is 1.
    let ties: Vec<f32> = (-127..127).map(|i| i as f32 + 0.5).chain([127.0]).collect();
    check_quantize(kernels, &ties, "ties");
    check_quantize(kernels, &[0.0; 70], "zeros");
    check_quantize(kernels, &[-0.0; 70], "negative zeros");
    check_quantize(kernels, &[f32::MAX, f32::MIN, 1.0], "largest");
    check_quantize(kernels, &[f32::from_bits(1); 3], "subnormal");
    for special in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = random.floats(100, 1.0);
        x[77] = special;
        check_quantize(kernels, &x, "not finite");
    }
}

fn norm_and_quantize(kernels: &dyn Kernels) {
    let variant = kernels.level().name();
    for (seed, len) in [1, 2, 15, 16, 17, 31, 32, 33, 120, 2560, 6912].into_iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (x, weight) = (random.floats(len, 3.0), random.floats(len, 1.0));
        let expected = cpu_ref::rmsnorm::rmsnorm(&x, &weight, 1e-5);
        let y = guarded("rmsnorm", len, 7.0, |y| kernels.rmsnorm(&x, &weight, 1e-5, y));
        assert_same("rmsnorm", len, seed as u64, variant, &expected, &y);

        let mut heads = [x.as_slice(), &y].concat();
        kernels.rmsnorm_heads(&mut heads, &weight, 1e-5);
        let second = cpu_ref::rmsnorm::rmsnorm(&y, &weight, 1e-5);
        let expected = [expected, second].concat();
        assert_same("rmsnorm_heads", len, seed as u64, variant, &expected, &heads);

        // The fused kernel quantises exactly what the norm alone gives.
        let quantized = cpu_ref::quantize_absmax::quantize_absmax(&y);
        let padded = len.next_multiple_of(CHUNK_K);
        let mut scale = TokenScale::default();
        let codes = guarded("norm_quantize", padded, 99, |codes| {
            scale = kernels.norm_quantize(&x, Some(&weight), 1e-5, codes);
        });
        assert_same("norm_quantize", len, 0, variant, &quantized.codes, &codes[..len]);
        assert_eq!(scale.act_scale, quantized.act_scale);
    }
}

fn elementwise(kernels: &dyn Kernels) {
    let variant = kernels.level().name();
    for (seed, n) in [1, 5, 31, 32, 33, 64, 100, 3840].into_iter().enumerate() {
        let mut random = Random::new(seed as u64);
        let (a, b) = (random.floats(n, 20.0), random.floats(n, 2.0));

        let mut sum = a.clone();
        kernels.residual_add(&mut sum, &b);
        let expected = cpu_ref::residual::residual_add(&a, &b);
        assert_same("residual_add", n, 0, variant, &expected, &sum);

        for activation in [Activation::Relu2, Activation::Silu] {
            let expected = cpu_ref::mlp::gated_activation(&a, &b, activation);
            let z = guarded("gated_activation", n, 7.0, |z| {
                kernels.gated_activation(&a, &b, activation, z);
            });
            assert_same("gated_activation", n, 0, variant, &expected, &z);
        }

        let m = 1 + seed % 3;
        let acc: Vec<i32> =
            (0..n.next_multiple_of(TILE_ROWS) * m).map(|_| random.bits() as i32 >> 8).collect();
        for token in 0..m {
            let plain: Vec<i32> = (0..n)
                .map(|row| acc[(row / TILE_ROWS * m + token) * TILE_ROWS + row % TILE_ROWS])
                .collect();
            let expected = cpu_ref::gemv::dequantize(&plain, &b, 0.37);
            let y = guarded("dequantize", n, 7.0, |y| {
                kernels.dequantize(&acc, (token, m), &b, 0.37, y);
            });
            assert_same("dequantize", (n, m), 0, variant, &expected, &y);
        }
    }
    for dim in [2, 20, 32, 64, 128] {
        let inv_freq = cpu_ref::rope::frequencies(10_000.0, dim, cpu_ref::rope::Scaling::None);
        let (cos, sin) = cpu_ref::rope::angles(1234, &inv_freq);
        let mut heads = Random::new(dim as u64).floats(3 * dim, 4.0);
        let mut expected = heads.clone();
        for head in expected.chunks_exact_mut(dim) {
            cpu_ref::rope::rotate(head, &cos, &sin);
        }
        kernels.rope(&mut heads, &cos, &sin);
        assert_same("rope", dim, 0, variant, &expected, &heads);
    }
    // Far outside exp's range, and what is no number.
    let gate = [-1e30, -100.0, -88.0, -87.0, 87.0, 100.0, 1e30, f32::NAN, f32::INFINITY];
    let expected = cpu_ref::mlp::gated_activation(&gate, &[1.0; 9], Activation::Silu);
    let mut z = [0.0; 9];
    kernels.gated_activation(&gate, &[1.0; 9], Activation::Silu, &mut z);
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    assert_same("gated_activation", "extremes", 0, variant, &bits(&expected), &bits(&z));
}

/// The values for which every level must give the same bits: those of the scalar level.
fn same_bits(
    kernels: &dyn Kernels,
    what: &str,
    run: impl Fn(&dyn Kernels) -> Vec<f32>,
) -> Vec<f32> {
    let scalar = Level::Scalar.kernels().expect("runs everywhere");
    let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
    let (expected, found) = (run(scalar.as_ref()), run(kernels));
    let variant = kernels.level().name();
    assert_same(what, "bits of the scalar level", 0, variant, &bits(&expected), &bits(&found));
    found
}

fn attention(kernels: &dyn Kernels) {
    // Heads (query, key/value): as many queries a key as a kernel takes at once, fewer, more.
    for (seed, (positions, dim, (query, kv))) in [
        (1, 20, (4, 2)),
        (2, 32, (4, 1)),
        (31, 64, (3, 3)),
        (32, 128, (8, 2)),
        (33, 128, (4, 1)),
        (67, 96, (5, 1)),
        (130, 100, (7, 1)),
        (300, 128, (8, 2)),
        (1000, 2, (6, 1)),
    ]
    .into_iter()
    .enumerate()
    {
        let mut random = Random::new(seed as u64);
        let heads = cpu_ref::attention::Heads { query, kv, dim };
        let q = random.floats(query * dim, 3.0);
        let keys = random.floats(positions * kv * dim, 2.0);
        let values = random.floats(positions * kv * dim, 5.0);
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
            let (stored_keys, key_scales) = stored(&keys, dim, format);
            let (stored_values, value_scales) = stored(&values, dim, format);
            let expected = {
                let scales = (format == KvFormat::Int8).then_some((&*key_scales, &*value_scales));
                let cached = cpu_ref::attention::Cached {
                    keys: &stored_keys,
                    values: &stored_values,
                    scales,
                };
                cpu_ref::attention::attention(&q, cached, heads)
            };
            let found = same_bits(kernels, "attention", |kernels| {
                simd::attention(kernels, &q, (&keys, &values), heads, format).expect("memory")
            });
            let (shape, variant) = ((positions, dim, format), kernels.level().name());
            assert_same("attention", shape, seed as u64, variant, &expected, &found);
        }
    }
    // A NaN score must not vanish in the maximum.
    let heads = cpu_ref::attention::Heads { query: 1, kv: 1, dim: 4 };
    for position in 0..2 {
        let mut keys = [1.0; 8];
        keys[4 * position] = f32::NAN;
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
            let out = simd::attention(kernels, &[1.0; 4], (&keys, &[1.0; 8]), heads, format);
            assert!(out.expect("memory").iter().all(|value| value.is_nan()));
        }
    }
}

/// What the cache gives back of heads `[.., D]`: values and a scale each.
fn stored(heads: &[f32], dim: usize, format: KvFormat) -> (Vec<f32>, Vec<f32>) {
    let stored = heads.chunks_exact(dim).map(|head| cpu_ref::kv::store_head(head, format));
    let (values, scales): (Vec<_>, Vec<_>) = stored.map(|head| (head.values, head.scale)).unzip();
    (values.concat(), scales)
}

/// Queries of several tokens at once, of which some do not see the block, and results that are
/// merged later: the bits of one block after another.
fn attention_of_tokens(kernels: &dyn Kernels) {
    let (dim, heads, tokens) = (20, 3, 5);
    let shape = KvShape { layers: 1, heads: 1, dim, format: KvFormat::F16 };
    let mut cache = KvCache::new(shape);
    cache.apply(Prepared { copy: None, blocks: 2 }).expect("memory");
    let mut random = Random::new(9);
    for position in 0..2 * BLOCK {
        let (key, value) = (random.floats(dim, 2.0), random.floats(dim, 2.0));
        let chunk = HeadChunkMut::of(cache.layer_mut((position / BLOCK) as u32, 0), &shape);
        kernels.store_head(&key, &value, position % BLOCK, chunk);
    }
    let q = random.floats(tokens * heads * dim, 2.0);
    // The first token sees 62 positions, the last 66.
    let seen = 62;
    let attend = |q: &[f32], tokens, seen: isize, block: u32| {
        let mut softmax = vec![Softmax::default(); tokens * heads];
        let sums = guarded("attend_block", tokens * heads * dim, 0.0, |out| {
            let queries = Queries { q, stride: heads * dim, heads, tokens, seen };
            let attended = Attended { softmax: &mut softmax, out, stride: heads };
            kernels.attend_block(queries, cache.head(block, 0, 0), None, attended);
        });
        (softmax, sums)
    };
    let together = [(0, seen), (1, seen - 64)].map(|(block, seen)| attend(&q, tokens, seen, block));
    for (m, q) in q.chunks_exact(heads * dim).enumerate() {
        let seen = seen + m as isize;
        for (block, together) in (0..).zip(&together) {
            let (softmax, sums) = attend(q, 1, seen - 64 * block as isize, block);
            assert_eq!(softmax, together.0[m * heads..][..heads]);
            assert_eq!(sums, together.1[m * heads * dim..][..heads * dim]);
            assert_eq!(softmax[0] == Softmax::default(), seen <= 64 * block as isize);
        }
    }
    // Block after block is the same as merging two that were computed apart.
    let last = (tokens - 1) * heads;
    let q = &q[last * dim..];
    let (mut softmax, mut out) = attend(q, 1, 66, 0);
    let attended = Attended { softmax: &mut softmax, out: &mut out, stride: heads };
    let queries = Queries { q, stride: heads * dim, heads, tokens: 1, seen: 2 };
    kernels.attend_block(queries, cache.head(1, 0, 0), None, attended);
    for head in 0..heads {
        let [first, second] = &together;
        let (mut running, mut merged) = (Softmax::default(), vec![0.0; dim]);
        for (softmax, sums) in [first, second] {
            let sums = &sums[(last + head) * dim..][..dim];
            kernels.merge_block((softmax[last + head], sums), &mut running, &mut merged);
        }
        assert_eq!((running, &merged[..]), (softmax[head], &out[head * dim..][..dim]));
    }
}

fn lm_head(kernels: &dyn Kernels) {
    for (seed, (vocab, k, m)) in
        [(1, 1, 1), (33, 20, 1), (100, 31, 2), (64, 32, 3), (65, 120, 9), (40, 2560, 2)]
            .into_iter()
            .enumerate()
    {
        let mut random = Random::new(seed as u64);
        let x = random.floats(m * k, 2.0);
        let f32_table = random.floats(vocab * k, 0.5);
        let bf16_table: Vec<u16> = f32_table.iter().map(|&value| f32_to_bf16(value)).collect();
        // Every half is a value: subnormals too, but no infinity or NaN.
        let f16_table: Vec<u16> = (0..vocab * k).map(|_| random.bits() as u16 & 0xbbff).collect();
        for (rows, table) in [
            (TableRows::F32(&f32_table), f32_table.clone()),
            (TableRows::Bf16(&bf16_table), bf16_table.iter().map(|&v| bf16_to_f32(v)).collect()),
            (TableRows::F16(&f16_table), f16_table.iter().map(|&v| f16_to_f32(v)).collect()),
        ] {
            let tiled = same_bits(kernels, "lm_head", |kernels| {
                let len = vocab.next_multiple_of(TILE_ROWS) * m;
                guarded("lm_head", len, 7.0, |out| kernels.lm_head(rows, &x, k, out))
            });
            for (token, x) in x.chunks_exact(k).enumerate() {
                let expected = cpu_ref::lm_head::lm_head(&table, x);
                let at = |v: usize| tiled[(v / TILE_ROWS * m + token) * TILE_ROWS + v % TILE_ROWS];
                let found: Vec<f32> = (0..vocab).map(at).collect();
                let magnitude = |v: usize| -> f64 {
                    let row = &table[v * k..][..k];
                    row.iter().zip(x).map(|(&a, &b)| f64::from(a * b).abs()).sum()
                };
                let bound =
                    |v: usize| (k as f64 / 32.0 + 8.0) * 2f64.powi(-24) * magnitude(v) + 1e-38;
                let variant = kernels.level().name();
                let pair = (&expected[..], &found[..]);
                assert_close("lm_head", (vocab, k, m), seed as u64, variant, pair, bound);
            }
        }
    }
    // Infinities and NaNs of either half type arrive.
    for (rows, expected) in [
        (TableRows::F16(&[0x7c00, 0xfc00, 0x7e01][..]), [f32::INFINITY, f32::NEG_INFINITY]),
        (TableRows::Bf16(&[0x7f80, 0xff80, 0x7fc1][..]), [f32::INFINITY, f32::NEG_INFINITY]),
    ] {
        let mut logits = [0.0; TILE_ROWS];
        kernels.lm_head(rows, &[1.0], 1, &mut logits);
        assert_eq!(logits[..2], expected);
        assert!(logits[2].is_nan());
    }
}

fn lm_head_of_codes(kernels: &dyn Kernels) {
    for (seed, (vocab, k, group, m)) in
        [(1, 16, 16, 1), (33, 64, 32, 1), (65, 96, 16, 3), (40, 2560, 32, 2)]
            .into_iter()
            .enumerate()
    {
        let mut random = Random::new(seed as u64);
        let x = random.floats(m * k, 2.0);
        let mut codes = random.codes(vocab * k);
        // Q6_K's smallest code times its smallest group scale.
        codes[0] = -128;
        let scale: Vec<f32> =
            (0..vocab * k / group).map(|_| f16_to_f32(half(&mut random)) / 64.0).collect();
        for min in [random.floats(scale.len(), 1.0), Vec::new()] {
            let rows = TableRows::Codes { group, codes: &codes, scale: &scale, min: &min };
            let codes = sterna::weights::Codes {
                group,
                codes: codes.clone(),
                scale: scale.clone(),
                min: min.clone(),
            };
            let shape = MatShape::new(vocab, k).unwrap();
            let table =
                sterna::weights::Table::new(shape, sterna::weights::TableData::Codes(codes));
            let tiled = same_bits(kernels, "lm_head", |kernels| {
                let len = vocab.next_multiple_of(TILE_ROWS) * m;
                guarded("lm_head", len, 7.0, |out| kernels.lm_head(rows, &x, k, out))
            });
            let mut row = vec![0.0; k];
            for v in 0..vocab {
                table.row(v, &mut row).unwrap();
                for (token, x) in x.chunks_exact(k).enumerate() {
                    let found = tiled[(v / TILE_ROWS * m + token) * TILE_ROWS + v % TILE_ROWS];
                    let expected = cpu_ref::lm_head::logit(&row, x);
                    let magnitude: f64 =
                        row.iter().zip(x).map(|(&a, &b)| f64::from(a * b).abs()).sum();
                    let bound = (k as f64 / 16.0 + 6.0) * 2f64.powi(-24) * magnitude + 1e-38;
                    let pair = (&[expected][..], &[found][..]);
                    let variant = kernels.level().name();
                    assert_close("lm_head", (vocab, k, v), seed as u64, variant, pair, |_| bound);
                }
            }
        }
    }
}

fn empty_input(k: usize) -> Input {
    let codes = split_rows::groups(k) * split_rows::GROUP_K;
    let (hi, lo) = (vec![7; codes], vec![7; codes]);
    Input { hi, lo, scale: 7.0, bound: 7.0, rest: 7.0, sums: [7; 2] }
}

fn head_input(kernels: &dyn Kernels) {
    let mut random = Random::new(8);
    for k in [1, 15, 16, 17, 128, 300, 2560] {
        for range in [0.0, 1e-42, 1e-35, 1e-3, 1.0, 3e4, 1e20] {
            let mut x = random.floats(k, range);
            for special in [None, Some(f32::NAN), Some(f32::INFINITY)] {
                if let Some(special) = special {
                    x[k / 2] = special;
                }
                let expected = cpu_ref::head_int8::quantize_input(&x);
                let mut found = empty_input(k);
                kernels.head_input(&x, &mut found);
                assert_eq!((&found.hi[..k], &found.lo[..k]), (&expected.hi[..], &expected.lo[..]));
                assert!(found.hi[k..].iter().chain(&found.lo[k..]).all(|&code| code == 0));
                let values =
                    |input: &Input| [input.scale, input.bound, input.rest].map(f32::to_bits);
                assert_eq!(values(&found), values(&expected), "K = {k}, {range}, {special:?}");
                assert_eq!(found.sums, expected.sums, "K = {k}, {range}, {special:?}");
            }
        }
    }
}

fn head_int8(kernels: &dyn Kernels) {
    for (seed, (n, k, m)) in [
        (1, 1, 1),
        (31, 16, 2),
        (33, 17, 1),
        (64, 128, 8),
        (70, 300, 3),
        (40, 2560, 1),
        (2, MAX_K, 2),
    ]
    .into_iter()
    .enumerate()
    {
        let mut random = Random::new(seed as u64);
        let mut weights = random.floats(n * k, 2.0);
        // Codes of −127 and 127 against limbs of −128, and the largest sum that there is.
        let is_longest = k == MAX_K;
        weights[..k].iter_mut().for_each(|w| *w = if is_longest { 1.0 } else { w.signum() });
        let shape = MatShape::new(n, k).unwrap();
        let table = Table::new(shape, TableData::F32(weights.clone().into()));
        let int8 = Int8Rows::of(&table).unwrap();
        let lines = int8.pack_split().unwrap();
        let (coarse, rest) = Line::words(&lines).split_at(int8.split_len()[0]);
        let inputs: Vec<Input> = (0..m)
            .map(|token| {
                // 32512·2⁻ⁿ − 128·2⁻ⁿ has low limbs of −128.
                let edge = |x: f32| match token {
                    1 => 1.0 - 128.0 / 32512.0 * x.signum(),
                    _ if is_longest => 1.0,
                    _ => x,
                };
                let x: Vec<f32> = random.floats(k, 1.0).into_iter().map(edge).collect();
                let mut input = empty_input(k);
                kernels.head_input(&x, &mut input);
                input
            })
            .collect();
        let len = n.next_multiple_of(TILE_ROWS) * m;
        let logits = guarded("head_int8", len, 7.0, |logits| {
            kernels.head_int8([coarse, rest], &inputs, logits);
        });
        let screened = guarded("head_coarse", 2 * len, 7.0, |screened| {
            kernels.head_coarse(coarse, &inputs, screened);
        });
        let mut codes = vec![0; k];
        for (row, w) in weights.chunks_exact(k).enumerate() {
            let values = cpu_ref::head_int8::quantize_row(w, 0.0, &mut codes);
            for (token, input) in inputs.iter().enumerate() {
                let (hi, lo) = (input.hi[..k].to_vec(), input.lo[..k].to_vec());
                let input = Input { hi, lo, ..*input };
                let tile = (row / TILE_ROWS * m + token) * TILE_ROWS;
                let lane = row % TILE_ROWS;
                let what = format!("{} {n}x{k}, row {row}, token {token}", kernels.level().name());

                let sums = cpu_ref::head_int8::sums(&codes, &input);
                let logit = cpu_ref::head_int8::logit(values, &input, sums);
                assert_eq!(logits[tile + lane].to_bits(), logit.to_bits(), "{what}");

                let sums = cpu_ref::head_int8::coarse_sums(&codes, &input);
                let values = cpu_ref::head_int8::coarse_row(w, 0.0, values, &codes);
                let logit = cpu_ref::head_int8::coarse_logit(values, &input, sums);
                let margin = cpu_ref::head_int8::margin(values, &input).unwrap_or(f32::INFINITY);
                let found = [screened[2 * tile + lane], screened[2 * tile + TILE_ROWS + lane]];
                assert_eq!(found, [logit, margin], "{what}");

                let tile_words = split_rows::rest_tile_words(k);
                let words = &rest[row / TILE_ROWS * tile_words..][..tile_words];
                let found = kernels.head_rest(words, lane, &inputs[token]);
                let above = std::array::from_fn(|limb| 2 * found[limb] - 3 * input.sums[limb]);
                assert_eq!(cpu_ref::head_int8::rest_sums(&codes, &input), above, "{what}");
            }
        }
    }
}

fn argmax(kernels: &dyn Kernels) {
    let mut random = Random::new(5);
    for len in [1, 2, 31, 32, 33, 1000, 4097] {
        for _ in 0..20 {
            let mut logits = random.floats(len, 5.0);
            assert_eq!(kernels.argmax(&logits), cpu_ref::argmax::argmax(&logits));
            // Equal maxima: the first wins.
            for _ in 0..3 {
                logits[random.below(len)] = 9.0;
            }
            assert_eq!(kernels.argmax(&logits), cpu_ref::argmax::argmax(&logits));
            logits[random.below(len)] = f32::NAN;
            assert_eq!(kernels.argmax(&logits), None);
        }
    }
    assert_eq!(kernels.argmax(&[]), None);
    assert_eq!(kernels.argmax(&[f32::NEG_INFINITY; 40]), Some(0));
    assert_eq!(kernels.argmax(&[-0.0, 0.0]), Some(0));
}

#[test]
fn a_scalar_level_is_always_there() {
    assert_eq!(Level::available().last(), Some(Level::Scalar));
    for level in Level::available() {
        assert_eq!(level.kernels().map(|kernels| kernels.level()), Some(level));
    }
}

#[test]
#[should_panic(expected = "acc is [tiles, M, 32]")]
fn a_short_output_is_refused() {
    let packed = Packed::pack(Layout::I2, MatShape::new(1, 1).unwrap(), &[1]);
    let scales = [TokenScale { act_scale: 1.0, code_sum: 0 }];
    let x = Activations::new(&[0; 64], &scales, 1);
    Level::Scalar.kernels().unwrap().gemm(packed.words(), x, &mut [0; 31]);
}
