//! The GPU kernels on plain slices: one token each, the shipped WGSL.

use cpu_ref::attention::Heads;
use cpu_ref::mlp::Activation;
use cpu_ref::quantize_absmax::Quantized;

use crate::backend::gpu::kernels::{
    self, DenseFormat, DenseShard, KvLayout, LinearRows, Rotate, padded_rows,
};
use crate::backend::gpu::self_test::{
    Attend, GroupInput, TestCache, attend_async, decode_codes, embed_groups_async, multiply_async,
    multiply_groups_async, quantize_async, run,
};
use crate::backend::gpu::{Call, Encoding, Gpu, PassParams, Slice, Variant};
use crate::error::Result;
use crate::kv_cache::{BLOCK, KvFormat};
use crate::layout::Packed;
use crate::shape::MatShape;
use crate::weights::TernaryMatrix;

pub(super) struct OnGpu<'a> {
    pub(super) gpu: &'a Gpu,
    pub(super) variant: Variant,
}

/// One token at position 0, its logits wanted.
fn one() -> PassParams {
    PassParams { n_tokens: 1, n_logit_rows: 1, ..PassParams::default() }
}

impl OnGpu<'_> {
    fn upload<T: bytemuck::NoUninit>(&self, values: &[T]) -> Result<Slice> {
        self.gpu.upload("input", values)
    }

    /// Runs a kernel with inputs and one output of `len` words.
    async fn run(
        &self,
        call: &Call,
        params: PassParams,
        inputs: &[&Slice],
        len: usize,
    ) -> Result<Vec<u32>> {
        let out = self.gpu.storage("output", len)?;
        run(self.gpu, call, params, &[inputs, &[&out]].concat())?;
        self.gpu.read_async(&out, len).await
    }

    async fn run_f32(
        &self,
        call: &Call,
        params: PassParams,
        inputs: &[&Slice],
        len: usize,
    ) -> Result<Vec<f32>> {
        Ok(bytemuck::cast_vec(self.run(call, params, inputs, len).await?))
    }

    /// Values as the accumulator and scales of a matrix result: multiples of 1/4096.
    fn as_sums(&self, values: &[f32]) -> Result<[Slice; 3]> {
        const STEP: f32 = 4096.0;
        let mut acc: Vec<i32> = values.iter().map(|value| (value * STEP) as i32).collect();
        acc.resize(padded_rows(values.len()), 0);
        let weight_scale = vec![1.0 / STEP; values.len()];
        Ok([self.upload(&acc)?, self.upload(&weight_scale)?, self.upload(&[1.0f32])?])
    }

    /// A table `[V, K]` in f32 units, and its one shard.
    fn table(&self, table: &[f32], k: usize) -> Result<(Slice, DenseShard)> {
        let format = DenseFormat::F32;
        let units = format.units(k);
        let mut words = Vec::new();
        for row in table.chunks_exact(k) {
            words.extend(row.iter().map(|value| value.to_bits()));
            words.resize(words.len() + 4 * units - k, 0);
        }
        Ok((self.upload(&words)?, DenseShard { format, k, base: 0, rows: table.len() / k }))
    }
}

impl super::Kernels for OnGpu<'_> {
    async fn multiply(&self, w: &[i8], shape: MatShape, codes: &[i8]) -> Result<Vec<i32>> {
        let packed = Packed::pack(self.variant.layout(), shape, w);
        multiply_async(self.gpu, self.variant.into(), &packed, codes, codes.len() / shape.k()).await
    }

    async fn quantize_absmax(&self, x: &[f32]) -> Result<Quantized> {
        let encoding = self.variant.gemv_encoding();
        let found = quantize_async(self.gpu, encoding, x, 1).await?;
        let codes = decode_codes(encoding, &found.codes, x.len());
        Ok(Quantized { codes, act_scale: found.act_scale[0] })
    }

    async fn argmax(&self, logits: &[f32]) -> Result<Option<usize>> {
        let call = kernels::argmax(logits.len());
        let token = self.run(&call, one(), &[&self.upload(logits)?], 1).await?[0];
        Ok((token != u32::MAX).then_some(token as usize))
    }

    async fn rmsnorm(&self, x: &[f32], weight: &[f32], eps: f32) -> Result<Vec<f32>> {
        let call = kernels::rmsnorm(x.len(), eps, false);
        self.run_f32(&call, one(), &[&self.upload(x)?, &self.upload(weight)?], x.len()).await
    }

    async fn rope(&self, head: &[f32], position: usize, theta: f32) -> Result<Vec<f32>> {
        let dim = head.len();
        let heads = Heads { query: 1, kv: 1, dim };
        // The head as query, key and value.
        let [acc, weight_scale, act_scale] = self.as_sums(&[head, head, head].concat())?;
        let frequencies = cpu_ref::rope::frequencies(theta, dim, cpu_ref::rope::Scaling::None);
        let angles: Vec<[f32; 2]> = (0..=position)
            .flat_map(|position| {
                let (cos, sin) = cpu_ref::rope::angles(position, &frequencies);
                cos.into_iter().zip(sin).map(|(cos, sin)| [cos, sin])
            })
            .collect();
        let angles = self.upload(&angles)?;
        let query = self.gpu.storage("query", dim)?;
        let [keys, values] = [(); 2].map(|()| self.gpu.storage("cache", dim));
        let buffers = [&acc, &weight_scale, &act_scale, &angles, &query, &keys?, &values?];
        let params = PassParams { start: position as u32, ..one() };
        let rows = LinearRows::sums(3 * dim);
        run(self.gpu, &kernels::rope(heads, &rows), params, &buffers)?;
        Ok(bytemuck::cast_vec(self.gpu.read_async(&query, dim).await?))
    }

    async fn attention(&self, q: &[f32], k: &[f32], v: &[f32], heads: Heads) -> Result<Vec<f32>> {
        let start = k.len() / (heads.kv * heads.dim) - 1;
        let layout = KvLayout { heads, format: KvFormat::F32 };
        let table: Vec<u32> = (0..=(start / BLOCK) as u32).collect();
        let cache = TestCache::upload(self.gpu, layout, [k, v], &table, table.len())?;
        attend_async(self.gpu, &cache, Attend::Whole, q, start).await
    }

    async fn gated_activation(
        &self,
        gate: &[f32],
        up: &[f32],
        act: Activation,
    ) -> Result<Vec<f32>> {
        let sums = self.as_sums(&[gate, up].concat())?;
        let call = kernels::gated_activation(gate.len(), act, &LinearRows::sums(2 * gate.len()));
        self.run_f32(&call, one(), &sums.each_ref(), gate.len()).await
    }

    async fn residual_add(&self, hidden: &[f32], y: &[f32]) -> Result<Vec<f32>> {
        let [acc, weight_scale, act_scale] = self.as_sums(y)?;
        let inputs = [&self.upload(hidden)?, &acc, &weight_scale, &act_scale];
        let call = kernels::residual_add(y.len(), &LinearRows::sums(y.len()));
        self.run_f32(&call, one(), &inputs, y.len()).await
    }

    async fn group_gemv(&self, matrix: &TernaryMatrix, x: &[f32]) -> Result<Option<Vec<f32>>> {
        let n_tokens = x.len() / matrix.shape().k();
        multiply_groups_async(self.gpu, matrix, GroupInput::Float(x), n_tokens).await.map(Some)
    }

    async fn group_gemv_int8(
        &self,
        matrix: &TernaryMatrix,
        codes: &[i8],
        act_scales: &[f32],
    ) -> Result<Option<Vec<f32>>> {
        let n_tokens = codes.len() / matrix.shape().k();
        let input = GroupInput::Int8 { codes, act_scales };
        multiply_groups_async(self.gpu, matrix, input, n_tokens).await.map(Some)
    }

    async fn quantize_absmax_groups(
        &self,
        x: &[f32],
        group: usize,
    ) -> Result<Option<(Vec<i8>, Vec<f32>)>> {
        let (codes, act_scales) =
            (self.gpu.storage("codes", x.len() / 4)?, self.gpu.storage("scales", x.len() / group)?);
        let call = kernels::quantize_absmax_groups(x.len(), group);
        run(self.gpu, &call, one(), &[&self.upload(x)?, &codes, &act_scales])?;
        let codes = self.gpu.read_async(&codes, x.len() / 4).await?;
        let codes = decode_codes(Encoding::Planes, &codes, x.len());
        let act_scales = self.gpu.read_async(&act_scales, x.len() / group).await?;
        Ok(Some((codes, bytemuck::cast_vec(act_scales))))
    }

    async fn group_embedding(
        &self,
        table: &TernaryMatrix,
        token: usize,
    ) -> Result<Option<Vec<f32>>> {
        embed_groups_async(self.gpu, table, token as u32).await.map(Some)
    }

    async fn hadamard(&self, x: &[f32], signs: &[f32], block: usize) -> Result<Option<Vec<f32>>> {
        let call = kernels::hadamard(x.len(), block, Rotate::Input);
        self.run_f32(&call, one(), &[&self.upload(x)?, &self.upload(signs)?], x.len())
            .await
            .map(Some)
    }

    async fn head_norm(&self, head: &[f32], weight: &[f32], eps: f32) -> Result<Option<Vec<f32>>> {
        let dim = head.len();
        // The head as query, key and value.
        let [acc, weight_scale, act_scale] = self.as_sums(&[head, head, head].concat())?;
        let weight = self.upload(weight)?;
        let heads = Heads { query: 1, kv: 1, dim };
        let call = kernels::head_norm(heads, eps, &LinearRows::sums(3 * dim));
        let inputs = [&acc, &weight_scale, &act_scale, &weight, &weight];
        let mut rows = self.run_f32(&call, one(), &inputs, padded_rows(3 * dim)).await?;
        rows.truncate(dim);
        Ok(Some(rows))
    }

    async fn embedding(&self, table: &[f32], k: usize, token: usize) -> Result<Vec<f32>> {
        let (rows, shard) = self.table(table, k)?;
        let (tokens, none) = (self.upload(&[token as u32])?, self.upload(&[0u32])?);
        self.run_f32(&kernels::embedding(shard), one(), &[&tokens, &rows, &none, &none], k).await
    }

    async fn lm_head(&self, table: &[f32], x: &[f32]) -> Result<Vec<f32>> {
        let (rows, shard) = self.table(table, x.len())?;
        let call = kernels::lm_head(shard, shard.rows, kernels::LogitTile::One);
        let (x, none) = (self.upload(x)?, self.upload(&[0u32])?);
        self.run_f32(&call, one(), &[&x, &rows, &none, &none], shard.rows).await
    }
}
