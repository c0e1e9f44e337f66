//! `gemv_i2`: packed ternary matrix × one int8 vector, in bytes of packed weights per second.
//!
//! The weights come from memory, as in a decode step, which reads every matrix once: the bench goes
//! through copies that no cache holds together. `gemv_i2_cached` repeats one copy. The CPU rows use
//! one thread, and all; beside them a row `read` sums the same words as plain numbers. The GPU rows,
//! where there is an adapter, wait for the device inside the timed region, many dispatches a submit.
//!
//! `gemv_columns`: `down_proj` by columns, with 50 to 90 % of the inputs 0, beside the whole product; one
//! thread, in bytes of the whole matrix.
//!
//! `gemv_rows`: `up_proj` by rows, with 50 to 90 % of the gates closed, in bytes of the whole matrix, too.
//!
//! `group_gemv_*`: the same for ternary (`i2`) and binary (`signs`) matrices with a scale for every
//! 128 inputs, with float and with int8 activations.

mod shapes;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sterna::backend::gpu::{GemmPlan, Gpu, Variant};
use sterna::backend::simd::{Activations, Columns, Level, NonZeros, Open, Rows, TokenScale};
use sterna::random::Random;

use shapes::{Product, cpu, gpu, group, group_matrices, is_test, matrices};

/// More than any cache of the machines in scope.
const COLD_BYTES: usize = 256 << 20;

/// A cache line, so that copies start on one.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

fn gemv(criterion: &mut Criterion) {
    let gpu = gpu::open();
    for (n, k) in matrices() {
        let product = Product::new(n, k, 1);
        let words = product.packed.words();
        let copies = if is_test() { 2 } else { COLD_BYTES.div_ceil(product.len_bytes()) };
        let mut lines = vec![Line([0; 16]); copies * words.len() / 16];
        for copy in bytemuck::cast_slice_mut(&mut lines).chunks_exact_mut(words.len()) {
            copy.copy_from_slice(words);
        }
        let all: &[u32] = bytemuck::cast_slice(&lines);
        for (name, copies) in [("gemv_i2", copies), ("gemv_i2_cached", 1)] {
            let mut group = criterion.benchmark_group(name);
            group.throughput(Throughput::Bytes(product.len_bytes() as u64)).sample_size(20);
            group.measurement_time(std::time::Duration::from_secs(1));
            group.warm_up_time(std::time::Duration::from_millis(500));
            let copy = |i: usize| &all[i % copies * words.len()..][..words.len()];
            for pool in cpu::pools() {
                let threads = pool.current_num_threads();
                let id =
                    |name: &str| BenchmarkId::new(format!("{n}x{k}"), format!("{name}-{threads}t"));
                let mut i = 0;
                group.bench_function(id("read"), |bencher| {
                    bencher.iter(|| {
                        i += 1;
                        cpu::read(&pool, copy(i));
                    });
                });
                for level in Level::available() {
                    let kernels = level.kernels().expect("an available level");
                    let mut call = cpu::Call::new(&product);
                    call.check(kernels.as_ref(), &product);
                    let mut i = 0;
                    group.bench_function(id(&format!("cpu-{}", level.name())), |bencher| {
                        bencher.iter(|| {
                            i += 1;
                            call.run_on(&pool, kernels.as_ref(), copy(i));
                        });
                    });
                }
            }
            group.finish();
        }
        gemv_base3(criterion, &product, copies);
        let Some(gpu) = &gpu else { continue };
        for variant in Variant::ALL {
            let mut group = criterion.benchmark_group(variant.gemv().name);
            group.throughput(Throughput::Bytes(product.len_bytes() as u64)).sample_size(10);
            let call = gpu::Call::new(gpu, variant, GemmPlan::default(), &product, copies);
            call.check(&product);
            let id = BenchmarkId::new(format!("{n}x{k}"), "gpu");
            group.bench_function(id, |bencher| bencher.iter_custom(|count| call.time(count)));
            group.finish();
        }
        group_gemv_gpu(criterion, gpu, n, k.next_multiple_of(64), copies);
    }
}

/// `gemv_base3`: the same with five weights a byte, on the levels that are made for it.
fn gemv_base3(criterion: &mut Criterion, product: &Product, copies: usize) {
    let packed = product.base3();
    let one: &[Line] = bytemuck::cast_slice(packed.words());
    let all = one.repeat(copies);
    let shape = product.packed.shape();
    for (name, copies) in [("gemv_base3", copies), ("gemv_base3_cached", 1)] {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes(size_of_val(one) as u64)).sample_size(20);
        group.measurement_time(std::time::Duration::from_secs(1));
        group.warm_up_time(std::time::Duration::from_millis(500));
        for pool in cpu::pools() {
            let threads = pool.current_num_threads();
            for level in Level::available().filter(|level| level.has_base3()) {
                let kernels = level.kernels().expect("an available level");
                let mut call = cpu::Call::base3(product);
                call.check(kernels.as_ref(), product);
                let id = format!("cpu-{}-{threads}t", level.name());
                let mut i = 0;
                group.bench_function(
                    BenchmarkId::new(format!("{}x{}", shape.n(), shape.k()), id),
                    |bencher| {
                        bencher.iter(|| {
                            i += 1;
                            let words = &all[i % copies * one.len()..][..one.len()];
                            call.run_on(&pool, kernels.as_ref(), bytemuck::cast_slice(words));
                        });
                    },
                );
            }
        }
        group.finish();
    }
}

/// `group_gemv` and `group_gemv_int8` on the GPU, of binary and ternary weights.
fn group_gemv_gpu(criterion: &mut Criterion, gpu: &Gpu, n: usize, k: usize, copies: usize) {
    for (binary, label) in [(false, "gpu-ternary"), (true, "gpu-binary")] {
        let product = if binary { Product::binary(n, k, 1) } else { Product::new(n, k, 1) };
        // Two bits a weight, or one.
        let len_bytes = product.len_bytes() >> u32::from(binary);
        let copies = copies << u32::from(binary);
        for (int8, name) in [(false, "group_gemv"), (true, "group_gemv_int8")] {
            let mut group = criterion.benchmark_group(name);
            group.throughput(Throughput::Bytes(len_bytes as u64)).sample_size(10);
            let call = gpu::Call::groups(gpu, &product, binary, int8, copies);
            call.check(&product);
            let id = BenchmarkId::new(format!("{n}x{k}"), label);
            group.bench_function(id, |bencher| bencher.iter_custom(|count| call.time(count)));
            group.finish();
        }
    }
}

fn gemv_columns(criterion: &mut Criterion) {
    let Some(&(n, k)) = matrices().last() else { return };
    let mut product = Product::new(n, k, 1);
    let copies = if is_test() { 2 } else { COLD_BYTES.div_ceil(product.len_bytes()) };
    let columns = vec![Columns::pack(&product.packed); copies];
    let words: Vec<_> = vec![product.packed.clone(); copies];
    let mut group = criterion.benchmark_group("gemv_columns");
    group.throughput(Throughput::Bytes(product.len_bytes() as u64)).sample_size(20);
    group.measurement_time(std::time::Duration::from_secs(1));
    let dense = product.x.clone();
    for level in Level::available() {
        let kernels = level.kernels().expect("an available level");
        let mut i = 0;
        product.x.clone_from(&dense);
        let mut call = cpu::Call::new(&product);
        group.bench_function(BenchmarkId::new("whole", level.name()), |bencher| {
            bencher.iter(|| {
                i += 1;
                call.run(kernels.as_ref(), words[i % copies].words());
            });
        });
        for zeros in [50, 60, 70, 80, 90] {
            let mut random = Random::new(zeros as u64);
            product.x.clone_from(&dense);
            product.x.iter_mut().filter(|_| random.below(100) < zeros).for_each(|x| *x = 0);
            let mut inputs = NonZeros::new(k);
            let mut acc = vec![0; columns[0].rows()];
            inputs.collect(&product.x);
            kernels.gemv_columns(columns[0].whole(), &inputs, &mut acc);
            let mut whole = cpu::Call::new(&product);
            whole.run(kernels.as_ref(), product.packed.words());
            assert_eq!(acc[..n], whole.acc[..n], "a wrong product");
            group.bench_function(BenchmarkId::new(format!("{zeros}%"), level.name()), |bencher| {
                bencher.iter(|| {
                    i += 1;
                    inputs.collect(&product.x);
                    kernels.gemv_columns(columns[i % copies].whole(), &inputs, &mut acc);
                });
            });
        }
    }
    group.finish();
}

fn gemv_rows(criterion: &mut Criterion) {
    let Some(&(n, k)) = matrices().get(2).or(matrices().first()) else { return };
    // `up_proj` alone, and tokens of whole lines.
    let (n, k) = (n / 2, k.next_multiple_of(256));
    let product = Product::new(n, k, 1);
    let copies = if is_test() { 2 } else { COLD_BYTES.div_ceil(product.len_bytes()) };
    let rows = vec![Rows::pack(&product.packed, 0..n); copies];
    let words: Vec<_> = vec![product.packed.clone(); copies];
    let code_sum = product.x.iter().map(|&code| i32::from(code)).sum();
    let scales = [TokenScale { act_scale: 1.0, code_sum }];
    let x = Activations::new(&product.x, &scales, k / 64);
    let mut group = criterion.benchmark_group("gemv_rows");
    group.throughput(Throughput::Bytes(product.len_bytes() as u64)).sample_size(20);
    group.measurement_time(std::time::Duration::from_secs(1));
    for level in Level::available() {
        let kernels = level.kernels().expect("an available level");
        let mut i = 0;
        let mut call = cpu::Call::new(&product).checked(kernels.as_ref(), &product);
        group.bench_function(BenchmarkId::new("whole", level.name()), |bencher| {
            bencher.iter(|| {
                i += 1;
                call.run(kernels.as_ref(), words[i % copies].words());
            });
        });
        for closed in [50, 60, 70, 80, 90] {
            let mut random = Random::new(closed as u64);
            let gate = |_| if random.below(100) < closed { -1.0 } else { 1.0 };
            let gates: Vec<f32> = (0..n).map(gate).collect();
            let mut open = Open::new(n);
            let mut acc = vec![0; n];
            open.collect(&gates);
            kernels.gemv_rows(&rows[0], x, open.rows(), &mut acc[..open.rows().len()]);
            let is_right = |(&row, &sum): (&u32, &i32)| sum == product.y[row as usize];
            assert!(open.rows().iter().zip(&acc).all(is_right), "a wrong product");
            group.bench_function(BenchmarkId::new(format!("{closed}%"), level.name()), |bencher| {
                bencher.iter(|| {
                    i += 1;
                    open.collect(&gates);
                    let open = open.rows();
                    kernels.gemv_rows(&rows[i % copies], x, open, &mut acc[..open.len()]);
                });
            });
        }
    }
    group.finish();
}

fn group_gemv(criterion: &mut Criterion) {
    for (name, layout, int8) in group::KERNELS {
        for (n, k) in group_matrices() {
            let product = group::Product::new(layout, n, k, 1);
            let copies = if is_test() { 2 } else { COLD_BYTES.div_ceil(product.len_bytes()) };
            let (words, scales) = (&product.words, &product.scales);
            let mut lines = vec![Line([0; 16]); copies * words.len() / 16];
            for copy in bytemuck::cast_slice_mut(&mut lines).chunks_exact_mut(words.len()) {
                copy.copy_from_slice(words);
            }
            let all: &[u32] = bytemuck::cast_slice(&lines);
            let all_scales = scales.repeat(copies);
            let mut group = criterion.benchmark_group(format!("group_gemv_{name}"));
            group.throughput(Throughput::Bytes(product.len_bytes() as u64)).sample_size(20);
            group.measurement_time(std::time::Duration::from_secs(2));
            for level in Level::available() {
                let kernels = level.kernels().expect("an available level");
                let mut call = group::Call::new(kernels.as_ref(), &product, int8);
                call.check(kernels.as_ref(), &product);
                let id = BenchmarkId::new(format!("{n}x{k}"), format!("cpu-{}", level.name()));
                let mut copy = 0;
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        copy = (copy + 1) % copies;
                        let words = &all[copy * words.len()..][..words.len()];
                        let scales = &all_scales[copy * scales.len()..][..scales.len()];
                        call.run(kernels.as_ref(), product.weights(words, scales));
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, gemv, gemv_columns, gemv_rows, group_gemv);
criterion_main!(benches);
