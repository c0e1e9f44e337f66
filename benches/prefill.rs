//! `prompt`: a prompt of 512 tokens of the built-in model and the choice of the token after it, fed in
//! chunks and fed token by token, in tokens per second. As a test the prompt is short.

mod shapes;

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use sterna::backend::{Device, LoadOptions, Want};
use sterna::built_in;
use sterna::model::Transformer;

use shapes::{gpu, is_test};

fn prompt(criterion: &mut Criterion) {
    let n_tokens = if is_test() { 9 } else { 512 };
    let checkpoint = built_in::checkpoint().expect("a sound built-in model");
    let tokens: Vec<u32> = (0..n_tokens as u32).map(|i| 7 * i % 301).collect();
    let options = LoadOptions::default();
    let mut devices = vec![("cpu", Device::Cpu)];
    if gpu::open().is_some() {
        devices.push(("gpu", Device::Gpu(None)));
    }
    for (name, device) in devices {
        let mut transformer = Transformer::load(&checkpoint, device, &options, &mut |_| {})
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut group = criterion.benchmark_group("prompt");
        group.throughput(Throughput::Elements(n_tokens));
        group.sampling_mode(SamplingMode::Flat).sample_size(10);
        let mut answers = Vec::new();
        group.bench_function(BenchmarkId::new("chunks", name), |bencher| {
            bencher.iter(|| {
                transformer.reset();
                answers.push(transformer.feed(&tokens, Want::Token).expect("a sound model"));
            });
        });
        group.bench_function(BenchmarkId::new("one_by_one", name), |bencher| {
            bencher.iter(|| {
                transformer.reset();
                let (last, before) = tokens.split_last().expect("a prompt");
                for token in before {
                    transformer.feed(&[*token], Want::Nothing).expect("a sound model");
                }
                answers.push(transformer.feed(&[*last], Want::Token).expect("a sound model"));
            });
        });
        group.finish();
        assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{name}: {answers:?}");
    }
}

criterion_group!(benches, prompt);
criterion_main!(benches);
