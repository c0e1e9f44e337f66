//! `gemm_i2`, `gemm_planes`: packed ternary matrix × M int8 vectors, in tiles of every size and by the
//! kernels of a few tokens, in operations per second (a multiplication and an addition a weight and
//! token); `gemm_i2_coop8`, `gemm_i2_coop16`: the same on cooperative matrices, where the adapter has them. The CPU rows use one thread, and all; GPU rows where there is
//! an adapter. `group_gemm_*`: the same for matrices with scales of groups, as in the bench `gemv`.

mod shapes;

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use sterna::backend::gpu::{GemmPlan, Variant};
use sterna::backend::simd::Level;

use shapes::{
    CHUNK_TOKENS, Product, cpu, gpu, group, group_matrices, is_test, matrices, token_counts,
};

fn gemm(criterion: &mut Criterion) {
    let gpu = gpu::open();
    for (n, k) in matrices() {
        for n_tokens in token_counts() {
            let product = Product::new(n, k, n_tokens);
            let mut group = criterion.benchmark_group("gemm_i2");
            group.throughput(Throughput::Elements(2 * (n * k * n_tokens) as u64));
            group.sampling_mode(SamplingMode::Flat).sample_size(10);
            group.measurement_time(std::time::Duration::from_secs(1));
            group.warm_up_time(std::time::Duration::from_millis(300));
            for pool in cpu::pools() {
                for level in Level::available() {
                    // Seconds an iteration, and nobody's choice where there is anything else.
                    if level == Level::Scalar && n_tokens > 32 {
                        continue;
                    }
                    let kernels = level.kernels().expect("an available level");
                    let mut call = cpu::Call::new(&product);
                    call.check(kernels.as_ref(), &product);
                    let shape = format!("{n_tokens}x{n}x{k}");
                    let row = format!("cpu-{}-{}t", level.name(), pool.current_num_threads());
                    group.bench_function(BenchmarkId::new(shape, row), |bencher| {
                        let words = product.packed.words();
                        bencher.iter(|| call.run_on(&pool, kernels.as_ref(), words));
                    });
                }
            }
            group.finish();
            let Some(gpu) = gpu.as_ref().filter(|_| n_tokens > 1) else { continue };
            for variant in [Variant::BitSerial, Variant::PackedDot] {
                let cooperative = gpu.cooperative().filter(|_| variant == Variant::PackedDot);
                let cooperative = cooperative.into_iter().flat_map(GemmPlan::all_of);
                for tiles in GemmPlan::all().into_iter().chain(cooperative) {
                    let mut group = criterion.benchmark_group(tiles.kernel(variant.layout()).name);
                    group.throughput(Throughput::Elements(2 * (n * k * n_tokens) as u64));
                    group.sampling_mode(SamplingMode::Flat).sample_size(10);
                    let call = gpu::Call::new(gpu, variant, tiles, &product, 1);
                    call.check(&product);
                    let id = BenchmarkId::new(
                        format!("{n_tokens}x{n}x{k}"),
                        format!("gpu-{tiles}").replace(' ', "-"),
                    );
                    group.bench_function(id, |bencher| {
                        bencher.iter_custom(|count| call.time(count));
                    });
                    group.finish();
                }
            }
        }
    }
}

fn group_gemm(criterion: &mut Criterion) {
    let n_tokens = if is_test() { 5 } else { CHUNK_TOKENS };
    for (name, layout, int8) in group::KERNELS {
        for (n, k) in group_matrices() {
            let product = group::Product::new(layout, n, k, n_tokens);
            let mut group = criterion.benchmark_group(format!("group_gemm_{name}"));
            group.throughput(Throughput::Elements(2 * (n * k * n_tokens) as u64));
            group.sampling_mode(SamplingMode::Flat).sample_size(10);
            group.measurement_time(std::time::Duration::from_secs(1));
            group.warm_up_time(std::time::Duration::from_millis(300));
            for level in Level::available() {
                let kernels = level.kernels().expect("an available level");
                let mut call = group::Call::new(kernels.as_ref(), &product, int8);
                call.check(kernels.as_ref(), &product);
                let shape = format!("{n_tokens}x{n}x{k}");
                let id = BenchmarkId::new(shape, format!("cpu-{}", level.name()));
                let weights = product.weights(&product.words, &product.scales);
                group.bench_function(id, |bencher| {
                    bencher.iter(|| call.run(kernels.as_ref(), weights));
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, gemm, group_gemm);
criterion_main!(benches);
