//! Attention of one token over a layer's KV cache, in bytes of keys and values per second: heads of
//! BitNet b1.58 2B4T, every format, contexts of 512 to 8192. The CPU rows use one thread, and layers
//! that no cache holds together take turns.

mod shapes;

use std::time::Instant;

use cpu_ref::attention::Heads;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sterna::backend::gpu::PassParams;
use sterna::backend::gpu::kernels::{self, KvLayout, KvShard, partial_words};
use sterna::backend::gpu::self_test::{TestCache, check_attention};
use sterna::backend::simd::{Attended, Level, Queries, Softmax};
use sterna::kv_cache::{BLOCK, HeadChunkMut, KvCache, KvFormat, KvShape, Prepared};
use sterna::random::Random;

use shapes::{gpu, is_test};

const HEADS: Heads = Heads { query: 20, kv: 5, dim: 128 };

fn attention(criterion: &mut Criterion) {
    let Some(gpu) = gpu::open() else { return };
    let uniform = gpu.params_buffer();
    let pipelines = gpu.pipelines();
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        let layout = KvLayout { heads: HEADS, format };
        check_attention(&gpu, layout).expect("attention is right on this adapter");
        let mut group = criterion.benchmark_group(format!("attention_{format:?}").to_lowercase());
        for positions in [512, 2048, 4096, 8192] {
            let mut random = Random::new(positions as u64);
            let len = positions * HEADS.kv * HEADS.dim;
            let rows = [random.floats(len, 2.0), random.floats(len, 5.0)];
            let table: Vec<u32> = (0..(positions / BLOCK) as u32).collect();
            let cache = TestCache::upload(&gpu, layout, [&rows[0], &rows[1]], &table, table.len());
            let cache = cache.expect("device memory");
            let storage = |words| gpu.storage("attention", words).expect("device memory");
            let query = random.floats(HEADS.query * HEADS.dim, 3.0);
            let query = gpu.upload("query", &query).expect("device memory");
            let (partials, out) =
                (storage(partial_words(HEADS) * table.len()), storage(HEADS.query * HEADS.dim));
            let blocks = kernels::attention_blocks(KvShard::whole(layout));
            let buffers = [&cache.inputs(&query)[..], &[&partials]].concat();
            let blocks = gpu.op(&pipelines, &blocks, &uniform, &buffers).expect("a pipeline");
            let merge = kernels::attention_merge(HEADS);
            let merge = gpu.op(&pipelines, &merge, &uniform, &[&partials, &out]);
            let step = [blocks, merge.expect("a pipeline")];
            let params =
                PassParams { n_tokens: 1, start: positions as u32 - 1, ..PassParams::default() };
            let bytes = layout.block_words().iter().sum::<usize>() * 4 * table.len();
            group.throughput(Throughput::Bytes(bytes as u64)).sample_size(10);
            group.bench_function(BenchmarkId::new(positions.to_string(), "gpu"), |b| {
                b.iter_custom(|count| {
                    let start = Instant::now();
                    for _ in 0..count {
                        gpu.run_all(&uniform, params, &step).expect("the device runs");
                    }
                    start.elapsed()
                });
            });
        }
        group.finish();
    }
}

/// More than any cache of the machines in scope.
const COLD_BYTES: usize = 256 << 20;

fn attention_cpu(criterion: &mut Criterion) {
    let Heads { query, kv: groups, dim } = HEADS;
    let heads = query / groups;
    for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        let mut group =
            criterion.benchmark_group(format!("attention_{format:?}_cpu").to_lowercase());
        for blocks in if is_test() { vec![2] } else { vec![8, 32, 64, 128] } {
            let layer_bytes =
                KvShape { layers: 1, heads: groups, dim, format }.block_bytes() * blocks;
            let layers = if is_test() { 1 } else { COLD_BYTES.div_ceil(layer_bytes) };
            let shape = KvShape { layers, heads: groups, dim, format };
            let mut cache = KvCache::new(shape);
            cache.apply(Prepared { copy: None, blocks }).expect("memory");
            let mut random = Random::new(blocks as u64);
            let scalar = Level::Scalar.kernels().expect("runs everywhere");
            for (block, layer) in (0..blocks as u32).flat_map(|b| (0..layers).map(move |l| (b, l)))
            {
                let (key, value) = (random.floats(dim, 2.0), random.floats(dim, 5.0));
                let chunks = cache.layer_mut(block, layer);
                for chunk in chunks.chunks_exact_mut(shape.chunk_lines()) {
                    for slot in 0..BLOCK {
                        scalar.store_head(&key, &value, slot, HeadChunkMut::of(chunk, &shape));
                    }
                }
            }
            let q = random.floats(query * dim, 1.0);
            let chunks: Vec<_> = (0..layers)
                .map(|layer| {
                    let of = |b| (0..groups).map(move |g| (b as u32, layer, g));
                    (0..blocks).flat_map(of).collect::<Vec<_>>()
                })
                .collect();
            let pass = |kernels: &dyn sterna::backend::simd::Kernels, layer: usize| {
                let mut softmax = vec![Softmax::default(); query];
                let mut out = vec![0.0; query * dim];
                for (i, &(block, layer, head)) in chunks[layer].iter().enumerate() {
                    let q = &q[head * heads * dim..][..heads * dim];
                    let seen = BLOCK as isize;
                    let queries = Queries { q, stride: q.len(), heads, tokens: 1, seen };
                    let next = chunks[layer].get(i + 1).map(|&(b, l, h)| cache.head(b, l, h));
                    let softmax = &mut softmax[head * heads..][..heads];
                    let out = &mut out[head * heads * dim..][..heads * dim];
                    let attended = Attended { softmax, out, stride: heads };
                    kernels.attend_block(queries, cache.head(block, layer, head), next, attended);
                }
                out
            };
            let expected = pass(scalar.as_ref(), 0);
            group.throughput(Throughput::Bytes(layer_bytes as u64)).sample_size(20);
            for level in Level::available() {
                let kernels = level.kernels().expect("an available level");
                assert_eq!(pass(kernels.as_ref(), 0), expected, "{} is wrong", level.name());
                let mut layer = 0;
                let id = BenchmarkId::new((blocks * BLOCK).to_string(), level.name());
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        layer = (layer + 1) % layers;
                        pass(kernels.as_ref(), layer)
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, attention, attention_cpu);
criterion_main!(benches);
