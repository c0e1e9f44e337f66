//! The LM head of a decode step: `lm_head` (bf16 rows) against `head_int8` (int8 rows, with its
//! input), in bytes of the table per second, and both with their greedy token.
//!
//! A quarter of BitNet b1.58 2B4T's vocabulary, so that every machine has the memory; the rows are
//! Gaussian, as a head's are. The GPU rows, where there is an adapter, wait for the device inside the
//! timed region, many steps a submit. Of 4 and 8 rows of logits, as the check of a draft has them, the
//! table's bytes count once.

mod shapes;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sterna::backend::gpu::self_test::Heads;
use sterna::backend::gpu::{Gpu, LOGIT_ROWS, Op};
use sterna::random::Random;
use sterna::shape::MatShape;
use sterna::weights::{Table, TableData};

use shapes::{gpu, heads};

/// About the standard normal distribution: the sum of eight bytes.
fn gaussian(random: &mut Random) -> f32 {
    let sum: u32 = random.bits().to_le_bytes().into_iter().map(u32::from).sum();
    (sum as f32 - 1020.0) / 209.0
}

/// The time of `count` steps, many in a submit.
fn time(gpu: &Gpu, heads: &Heads<'_>, (step, m): (&[&Op], u32), count: u64) -> Duration {
    const IN_A_SUBMIT: u64 = 16;
    let start = Instant::now();
    let mut left = count;
    while left > 0 {
        let now = left.min(IN_A_SUBMIT);
        let ops = (0..now).flat_map(|_| step.iter().copied());
        gpu.run_all(heads.uniform(), Heads::params(m, 1.0), ops).expect("the device runs");
        left -= now;
    }
    start.elapsed()
}

fn head(criterion: &mut Criterion) {
    let Some(gpu) = gpu::open() else { return };
    for (v, k) in heads() {
        let mut random = Random::new((v * 31 + k) as u64);
        let bits = (0..v * k).map(|_| ((0.02 * gaussian(&mut random)).to_bits() >> 16) as u16);
        let shape = MatShape::new(v, k).expect("a real shape");
        let table = Table::new(shape, TableData::Bf16(bits.collect::<Vec<_>>().into()));
        let norm: Vec<f32> = (0..k).map(|_| 1.0).collect();
        let heads = Heads::new(&gpu, &table, Some((&norm, 1e-5))).expect("device memory");
        let hidden: Vec<f32> = (0..LOGIT_ROWS * k).map(|_| gaussian(&mut random)).collect();
        let exact = heads.find_exact_rows(&hidden).expect("the device runs");
        let seen = vec![0; LOGIT_ROWS * v.div_ceil(32)];
        let found = heads.find_int8_rows(&hidden, &seen, 1.0).expect("the device runs");
        for ((found, _), exact) in found.iter().zip(&exact) {
            assert_eq!(found.token, exact.token);
        }
        for m in [1, 4, LOGIT_ROWS as u32] {
            let (exact, int8) = (|| heads.exact(m), || heads.int8.logits(m));
            let rows: [(&str, usize, Vec<&Op>); 4] = [
                ("lm_head", 2, exact().collect()),
                ("head_int8", 1, int8().collect()),
                ("lm_head_greedy", 2, exact().chain([&heads.argmax]).collect()),
                ("head_int8_greedy", 1, int8().chain(&heads.int8.greedy).collect()),
            ];
            for (name, bytes, step) in rows {
                let mut group = criterion.benchmark_group(name);
                group.throughput(Throughput::Bytes((v * k * bytes) as u64)).sample_size(10);
                let id = BenchmarkId::new(format!("{v}x{k}/M{m}"), "gpu");
                group.bench_function(id, |b| {
                    b.iter_custom(|count| time(&gpu, &heads, (&step, m), count));
                });
                group.finish();
            }
        }
    }
}

criterion_group!(benches, head);
criterion_main!(benches);
