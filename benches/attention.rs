//! Attention of one token over a layer's KV cache, in bytes of keys and values per second: heads of
//! BitNet b1.58 2B4T, every format, contexts of 512 to 8192.

mod shapes;

use std::time::Instant;

use cpu_ref::attention::Heads;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sterna::backend::gpu::PassParams;
use sterna::backend::gpu::kernels::{self, KvLayout, KvShard, partial_words};
use sterna::backend::gpu::self_test::{TestCache, check_attention};
use sterna::kv_cache::{BLOCK, KvFormat};
use sterna::random::Random;

use shapes::gpu;

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

criterion_group!(benches, attention);
criterion_main!(benches);
