//! The SIMD kernels on plain slices.

use cpu_ref::attention::Heads;
use cpu_ref::layout::{CHUNK_K, TILE_ROWS, k_chunks};
use cpu_ref::mlp::Activation;
use cpu_ref::quantize_absmax::Quantized;

use crate::backend::simd::{self, Activations, GroupLayout, Matrix, TableRows, TokenScale};
use crate::error::Result;
use crate::kv_cache::KvFormat;
use crate::layout::{Layout, Packed, PackedBase3};
use crate::shape::MatShape;
use crate::weights::TernaryMatrix;

pub(super) struct OnCpu<'a>(pub(super) &'a dyn simd::Kernels);

impl super::Kernels for OnCpu<'_> {
    async fn multiply(&self, w: &[i8], shape: MatShape, codes: &[i8]) -> Result<Vec<i32>> {
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
        let x = Activations::new(&padded, &scales, chunks);
        self.0.gemm(packed.words(), x, &mut acc);
        // Five weights a byte have to give the same; no sum is what stands where they do not.
        let mut of_base3 = vec![0; acc.len()];
        self.0.gemm_base3(PackedBase3::of(&packed).words(), x, &mut of_base3);
        for (sum, of_base3) in acc.iter_mut().zip(of_base3) {
            *sum = if *sum == of_base3 { *sum } else { i32::MIN };
        }
        let at = |token, n| acc[(n / TILE_ROWS * m + token) * TILE_ROWS + n % TILE_ROWS];
        let n = shape.n();
        Ok((0..m).flat_map(|token| (0..n).map(move |row| at(token, row))).collect())
    }

    async fn quantize_absmax(&self, x: &[f32]) -> Result<Quantized> {
        let mut codes = vec![0; x.len().next_multiple_of(CHUNK_K)];
        let scale = self.0.quantize_absmax(x, &mut codes);
        codes.truncate(x.len());
        Ok(Quantized { codes, act_scale: scale.act_scale })
    }

    async fn argmax(&self, logits: &[f32]) -> Result<Option<usize>> {
        Ok(self.0.argmax(logits))
    }

    async fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32) -> Result<Vec<f32>> {
        let mut y = vec![0.0; x.len()];
        self.0.rmsnorm(x, weight, eps, &mut y);
        Ok(y)
    }

    async fn rope(&self, head: &[f32], position: usize, theta: f32) -> Result<Vec<f32>> {
        let frequencies =
            cpu_ref::rope::frequencies(theta, head.len(), cpu_ref::rope::Scaling::None);
        let (cos, sin) = cpu_ref::rope::angles(position, &frequencies);
        let mut head = head.to_vec();
        self.0.rope(&mut head, &cos, &sin);
        Ok(head)
    }

    async fn attention(&self, q: &[f32], k: &[f32], v: &[f32], heads: Heads) -> Result<Vec<f32>> {
        simd::attention(self.0, q, (k, v), heads, KvFormat::F32)
    }

    async fn gated_activation(
        &self,
        gate: &[f32],
        up: &[f32],
        act: Activation,
    ) -> Result<Vec<f32>> {
        let mut z = vec![0.0; gate.len()];
        self.0.gated_activation(gate, up, act, &mut z);
        Ok(z)
    }

    async fn residual_add(&self, hidden: &[f32], y: &[f32]) -> Result<Vec<f32>> {
        let mut hidden = hidden.to_vec();
        self.0.residual_add(&mut hidden, y);
        Ok(hidden)
    }

    /// The backend copies rows; there is no kernel.
    async fn embedding(&self, table: &[f32], k: usize, token: usize) -> Result<Vec<f32>> {
        Ok(table[token * k..][..k].to_vec())
    }

    async fn lm_head(&self, table: &[f32], x: &[f32]) -> Result<Vec<f32>> {
        let rows = table.len() / x.len();
        let mut logits = vec![0.0; rows.next_multiple_of(TILE_ROWS)];
        self.0.lm_head(TableRows::F32(table), x, x.len(), &mut logits);
        logits.truncate(rows);
        Ok(logits)
    }

    async fn group_gemv(&self, matrix: &TernaryMatrix, x: &[f32]) -> Result<Option<Vec<f32>>> {
        let packed = Matrix::pack(&[matrix])?;
        let (shape, weights) = (packed.shape, packed.group_weights());
        let m = x.len() / shape.k();
        let mut tiled = vec![0.0; shape.n().next_multiple_of(TILE_ROWS) * m];
        self.0.group_gemm(weights, x, &mut tiled);
        Ok(Some(self.untile(&tiled, shape.n(), m)))
    }

    async fn group_gemv_int8(
        &self,
        matrix: &TernaryMatrix,
        codes: &[i8],
        act_scales: &[f32],
    ) -> Result<Option<Vec<f32>>> {
        let packed = Matrix::pack(&[matrix])?;
        let (shape, weights) = (packed.shape, packed.group_weights());
        let (m, group) = (codes.len() / shape.k(), codes.len() / act_scales.len());
        let scales: Vec<_> = codes
            .chunks_exact(group)
            .zip(act_scales)
            .map(|(codes, &act_scale)| TokenScale {
                act_scale,
                code_sum: codes.iter().map(|&code| i32::from(code)).sum(),
            })
            .collect();
        let mut ordered = vec![0; codes.len()];
        for (k, &code) in codes.iter().enumerate() {
            ordered[packed.layout().place(k)] = code;
        }
        let (chunks, groups) = (shape.k() / CHUNK_K, shape.k() / group);
        let x = Activations::of_groups(&ordered, &scales, chunks, groups);
        let mut tiled = vec![0.0; shape.n().next_multiple_of(TILE_ROWS) * m];
        self.0.group_gemm_int8(weights, x, &mut tiled);
        Ok(Some(self.untile(&tiled, shape.n(), m)))
    }

    async fn quantize_absmax_groups(
        &self,
        x: &[f32],
        group: usize,
    ) -> Result<Option<(Vec<i8>, Vec<f32>)>> {
        let layout = GroupLayout::Signs;
        let mut ordered = vec![0; x.len()];
        let mut scales = vec![TokenScale::default(); x.len() / group];
        self.0.quantize_absmax_groups(x, layout, &mut ordered, &mut scales);
        let codes = (0..x.len()).map(|k| ordered[layout.place(k)]).collect();
        Ok(Some((codes, scales.iter().map(|scale| scale.act_scale).collect())))
    }

    async fn group_embedding(
        &self,
        table: &TernaryMatrix,
        token: usize,
    ) -> Result<Option<Vec<f32>>> {
        let packed = Matrix::pack(&[table])?;
        let mut row = vec![0.0; packed.shape.k()];
        packed.row(token, &mut row);
        Ok(Some(row))
    }

    async fn hadamard(&self, x: &[f32], signs: &[f32], block: usize) -> Result<Option<Vec<f32>>> {
        let mut y = x.to_vec();
        self.0.rotate(&mut y, signs, block);
        Ok(Some(y))
    }

    async fn head_norm(&self, head: &[f32], weight: &[f32], eps: f32) -> Result<Option<Vec<f32>>> {
        let mut head = head.to_vec();
        self.0.rmsnorm_heads(&mut head, weight, eps);
        Ok(Some(head))
    }
}

impl OnCpu<'_> {
    /// `[M, N]` of `tiled[tiles][M][32]`.
    fn untile(&self, tiled: &[f32], n: usize, n_tokens: usize) -> Vec<f32> {
        let mut y = vec![0.0; n * n_tokens];
        for (m, y) in y.chunks_exact_mut(n).enumerate() {
            self.0.untile(tiled, (m, n_tokens), y);
        }
        y
    }
}
