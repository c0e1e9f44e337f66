//! `gemm_i2`: packed ternary matrix × M int8 vectors, in operations per second (a multiplication
//! and an addition a weight and token). One thread.

mod shapes;

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use sterna::backend::simd::Level;

use shapes::{Product, cpu, matrices, token_counts};

fn gemm(criterion: &mut Criterion) {
    for (n, k) in matrices() {
        for n_tokens in token_counts() {
            let product = Product::new(n, k, n_tokens);
            let mut group = criterion.benchmark_group("gemm_i2");
            group.throughput(Throughput::Elements(2 * (n * k * n_tokens) as u64));
            group.sampling_mode(SamplingMode::Flat).sample_size(10);
            group.measurement_time(std::time::Duration::from_secs(1));
            group.warm_up_time(std::time::Duration::from_millis(300));
            for level in Level::available() {
                // Seconds an iteration, and nobody's choice where there is anything else.
                if level == Level::Scalar && n_tokens > 32 {
                    continue;
                }
                let kernels = level.kernels().expect("an available level");
                let mut call = cpu::Call::new(&product);
                call.check(kernels.as_ref(), &product);
                let shape = format!("{n_tokens}x{n}x{k}");
                let id = BenchmarkId::new(shape, format!("cpu-{}", level.name()));
                group.bench_function(id, |bencher| {
                    bencher.iter(|| call.run(kernels.as_ref(), product.packed.words()));
                });
            }
            // GPU rows: `gemm_i2/{n_tokens}x{n}x{k}/gpu`.
            group.finish();
        }
    }
}

criterion_group!(benches, gemm);
criterion_main!(benches);
