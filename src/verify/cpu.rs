//! The SIMD kernels on plain slices.

use cpu_ref::attention::Heads;
use cpu_ref::group_gemv::{bound, group_dot, group_dot_int8, quantize_absmax_groups};
use cpu_ref::layout::{CHUNK_K, TILE_ROWS, k_chunks};
use cpu_ref::mlp::Activation;
use cpu_ref::quantize_absmax::Quantized;

use super::{Check, first_distance, fractions};
use crate::backend::simd::{
    self, Activations, CacheHead, GroupLayout, GroupWeights, TableRows, TokenScale,
};
use crate::error::Result;
use crate::format::float::f16_to_f32;
use crate::layout::{Layout, Packed, Signs, group_scales};
use crate::random::Random;
use crate::shape::MatShape;

pub(super) struct OnCpu<'a>(pub(super) &'a dyn simd::Kernels);

impl super::Kernels for OnCpu<'_> {
    fn multiply(&self, w: &[i8], shape: MatShape, codes: &[i8]) -> Result<Vec<i32>> {
        let chunks = k_chunks(shape.k());
        let tokens = codes.chunks_exact(shape.k());
        let scales: Vec<_> = tokens
            .clone()
            .map(|token| TokenScale {
                act_scale: 1.0,
                code_sum: token.iter().map(|&code| i32::from(code)).sum(),
            })
            .collect();
        let mut padded = vec![0; scales.len() * chunks * CHUNK_K];
        for (token, out) in tokens.zip(padded.chunks_exact_mut(chunks * CHUNK_K)) {
            out[..shape.k()].copy_from_slice(token);
        }
        let packed = Packed::pack(Layout::I2, shape, w);
        let m = scales.len();
        let mut acc = vec![0; shape.n().next_multiple_of(TILE_ROWS) * m];
        self.0.gemm(packed.words(), Activations::new(&padded, &scales, chunks), &mut acc);
        let at = |token, n| acc[(n / TILE_ROWS * m + token) * TILE_ROWS + n % TILE_ROWS];
        let n = shape.n();
        Ok((0..m).flat_map(|token| (0..n).map(move |row| at(token, row))).collect())
    }

    fn quantize_absmax(&self, x: &[f32]) -> Result<Quantized> {
        let mut codes = vec![0; x.len().next_multiple_of(CHUNK_K)];
        let scale = self.0.quantize_absmax(x, &mut codes);
        codes.truncate(x.len());
        Ok(Quantized { codes, act_scale: scale.act_scale })
    }

    fn argmax(&self, logits: &[f32]) -> Result<Option<usize>> {
        Ok(self.0.argmax(logits))
    }

    fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32) -> Result<Vec<f32>> {
        let mut y = vec![0.0; x.len()];
        self.0.rmsnorm(x, weight, eps, &mut y);
        Ok(y)
    }

    fn rope(&self, head: &[f32], position: usize, theta: f32) -> Result<Vec<f32>> {
        let frequencies =
            cpu_ref::rope::frequencies(theta, head.len(), cpu_ref::rope::Scaling::None);
        let (cos, sin) = cpu_ref::rope::angles(position, &frequencies);
        let mut head = head.to_vec();
        self.0.rope(&mut head, &cos, &sin);
        Ok(head)
    }

    fn attention(&self, q: &[f32], k: &[f32], v: &[f32], heads: Heads) -> Result<Vec<f32>> {
        let mut out = vec![0.0; q.len()];
        let stride = heads.kv * heads.dim;
        let each = q.chunks_exact(heads.dim).zip(out.chunks_exact_mut(heads.dim));
        for (head, (q, out)) in each.enumerate() {
            let at = head / (heads.query / heads.kv) * heads.dim;
            let (keys, values) = (&k[at..], &v[at..]);
            let cache = CacheHead { keys, values, stride, len: k.len() / stride };
            self.0.attend_head(q, cache, out);
        }
        Ok(out)
    }

    fn gated_activation(&self, gate: &[f32], up: &[f32], act: Activation) -> Result<Vec<f32>> {
        let mut z = vec![0.0; gate.len()];
        self.0.gated_activation(gate, up, act, &mut z);
        Ok(z)
    }

    fn residual_add(&self, hidden: &[f32], y: &[f32]) -> Result<Vec<f32>> {
        let mut hidden = hidden.to_vec();
        self.0.residual_add(&mut hidden, y);
        Ok(hidden)
    }

    /// The backend copies rows; there is no kernel.
    fn embedding(&self, table: &[f32], k: usize, token: usize) -> Result<Vec<f32>> {
        Ok(table[token * k..][..k].to_vec())
    }

    fn lm_head(&self, table: &[f32], x: &[f32]) -> Result<Vec<f32>> {
        let rows = table.len() / x.len();
        let mut logits = vec![0.0; rows.next_multiple_of(TILE_ROWS)];
        self.0.lm_head(TableRows::F32(table), x, x.len(), &mut logits);
        logits.truncate(rows);
        Ok(logits)
    }
}

/// The kernels for weights with scales of groups, each layout with its shortest and a longer group.
pub(super) fn group_checks(kernels: &dyn simd::Kernels) -> Vec<Check> {
    let layouts = [(GroupLayout::I2, [64, 128]), (GroupLayout::Signs, [128, 256])];
    let cases: Vec<_> = layouts
        .into_iter()
        .flat_map(|(layout, groups)| groups.map(|group| (layout, group)))
        .flat_map(|(layout, group)| [1, 5].map(|n_tokens| (layout, group, n_tokens)))
        .collect();
    let check = |kernel, run: &dyn Fn(&GroupCase) -> Option<String>| {
        let of_case = |&(layout, group, n_tokens)| run(&GroupCase::new(layout, group, n_tokens));
        Check { kernel, cases: cases.len(), problem: cases.iter().find_map(of_case) }
    };
    vec![
        check("group_gemv", &|case| case.float(kernels)),
        check("group_gemv_int8", &|case| case.int8(kernels)),
        rotation_check(kernels),
    ]
}

fn rotation_check(kernels: &dyn simd::Kernels) -> Check {
    let mut random = Random::new(0x57E2_7A03);
    let blocks = [1, 4, 128, 1024];
    let problem = blocks.into_iter().find_map(|block| {
        let x = fractions(&mut random, 2 * block, 3);
        let signs: Vec<f32> = x.iter().map(|x| if *x < 0.0 { -1.0 } else { 1.0 }).collect();
        let mut found = x.clone();
        kernels.rotate(&mut found, &signs, block);
        let expected = cpu_ref::hadamard::rotate(&x, &signs, block);
        first_distance(&format!("block {block}"), &expected, &found, 0.0)
    });
    Check { kernel: "hadamard", cases: blocks.len(), problem }
}

/// A matrix with scales of groups, and M tokens.
struct GroupCase {
    layout: GroupLayout,
    shape: MatShape,
    group: usize,
    w: Vec<i8>,
    /// `[N, K/group]`.
    halves: Vec<u16>,
    /// `[M, K]`.
    x: Vec<f32>,
}

impl GroupCase {
    fn new(layout: GroupLayout, group: usize, n_tokens: usize) -> Self {
        let (n, k) = (70, 9 * group);
        let mut random = Random::new(0x57E2_7A02);
        let mut w = random.trits(n * k);
        if layout == GroupLayout::Signs {
            w.iter_mut().for_each(|w| *w = if *w < 0 { -1 } else { 1 });
        }
        // Halves of either sign between 1/64 and 1/32.
        let half = |_| 0x2400 | random.bits() as u16 & 0x83ff;
        let halves = (0..n * k / group).map(half).collect();
        let x = fractions(&mut random, n_tokens * k, 3);
        let shape = MatShape::new(n, k).expect("small sizes");
        Self { layout, shape, group, w, halves, x }
    }

    fn float(&self, kernels: &dyn simd::Kernels) -> Option<String> {
        let found = self.run(|weights, y| kernels.group_gemm(weights, &self.x, y));
        let within = |row: &[i8], scales: &[f32], x: &[f32], found: f32| {
            (group_dot(row, scales, x), bound(row, scales, x), found)
        };
        let near = |(expected, bound, found): (f32, f32, f32)| (expected - found).abs() <= bound;
        let mut rows = self.each(&found, within).enumerate();
        let (at, (expected, bound, found)) = rows.find(|&(_, row)| !near(row))?;
        Some(format!("{}: [{at}]: expected {expected} ± {bound}, found {found}", self.name()))
    }

    fn int8(&self, kernels: &dyn simd::Kernels) -> Option<String> {
        let (k, groups) = (self.shape.k(), self.shape.k() / self.group);
        let mut codes = vec![0; self.x.len()];
        let mut scales = vec![TokenScale::default(); self.x.len() / self.group];
        let tokens = self.x.chunks_exact(k).zip(codes.chunks_exact_mut(k));
        for ((x, codes), scales) in tokens.zip(scales.chunks_exact_mut(groups)) {
            kernels.quantize_absmax_groups(x, self.layout, codes, scales);
        }
        let x = Activations::of_groups(&codes, &scales, k / CHUNK_K, groups);
        let found = self.run(|weights, y| kernels.group_gemm_int8(weights, x, y));
        let exact = |row: &[i8], scales: &[f32], x: &[f32], _| {
            let (codes, act_scales) = quantize_absmax_groups(x, self.group);
            group_dot_int8(row, scales, &codes, &act_scales)
        };
        let expected: Vec<f32> = self.each(&found, exact).collect();
        first_distance(&self.name(), &expected, &found, 0.0)
    }

    fn name(&self) -> String {
        let n_tokens = self.x.len() / self.shape.k();
        format!("{:?} {}, groups of {} × {n_tokens} tokens", self.layout, self.shape, self.group)
    }

    /// `[M, N]` that `run(weights, y)` writes as `y[tiles][M][32]`.
    fn run(&self, run: impl FnOnce(GroupWeights<'_>, &mut [f32])) -> Vec<f32> {
        let (n, k) = (self.shape.n(), self.shape.k());
        let words = match self.layout {
            GroupLayout::I2 => Packed::pack(Layout::I2, self.shape, &self.w).words().to_vec(),
            GroupLayout::Signs => Packed::pack(Signs, self.shape, &self.w).words().to_vec(),
        };
        let scales = group_scales::pack(n, k / self.group, &self.halves);
        let m = self.x.len() / k;
        let mut tiled = vec![0.0; n.next_multiple_of(TILE_ROWS) * m];
        run(GroupWeights::new(self.layout, (&words, &scales), k, self.group), &mut tiled);
        let at = |t, row| tiled[(row / TILE_ROWS * m + t) * TILE_ROWS + row % TILE_ROWS];
        (0..m).flat_map(|t| (0..n).map(move |row| (t, row))).map(|(t, row)| at(t, row)).collect()
    }

    /// `judge(row, scales, x, found)` of every token and row.
    fn each<'a, T>(
        &'a self,
        found: &'a [f32],
        judge: impl Fn(&[i8], &[f32], &[f32], f32) -> T + 'a,
    ) -> impl Iterator<Item = T> + 'a {
        let (n, k) = (self.shape.n(), self.shape.k());
        let groups = k / self.group;
        found.iter().enumerate().map(move |(at, &found)| {
            let (m, row) = (at / n, at % n);
            let halves = &self.halves[row * groups..][..groups];
            let scales: Vec<f32> = halves.iter().map(|&bits| f16_to_f32(bits)).collect();
            judge(&self.w[row * k..][..k], &scales, &self.x[m * k..][..k], found)
        })
    }
}
