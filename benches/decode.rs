//! `decode` and `prefill` of a whole model of random weights, in tokens per second.
//!
//! The shape is BitNet b1.58 2B4T's; as a test it is a tiny one. All threads of the machine.

mod shapes;

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use sterna::backend::gpu::AdapterKind;
use sterna::backend::{Device, LoadOptions, Output, Want};
use sterna::model::Transformer;
use sterna::synthetic::{SyntheticModel, bitnet_2b4t, tiny_bitnet};

use shapes::{gpu, is_test};

/// Tokens of the prompt.
const PROMPT: usize = 64;
/// Positions that decoding goes through, from the first, before it starts again.
const DECODED: usize = 128;

fn decode(criterion: &mut Criterion) {
    let (config, label) =
        if is_test() { (tiny_bitnet(), "tiny") } else { (bitnet_2b4t(), "bitnet-2b4t") };
    let model = SyntheticModel::new(config, 1);
    let options = LoadOptions { context: Some(512), ..LoadOptions::default() };
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| 7 * i % 301).collect();
    let mut devices = vec![("cpu", Device::Cpu)];
    // A software rasteriser takes seconds a token of a real model.
    if gpu::open().is_some_and(|gpu| is_test() || gpu.adapter.kind != AdapterKind::Software) {
        devices.push(("gpu", Device::Gpu(None)));
    }
    for (name, device) in devices {
        let mut transformer = match Transformer::load(&model, device, &options, &mut |_| {}) {
            Ok(transformer) => transformer,
            Err(error) => panic!("{name}: {error}"),
        };
        let variant = transformer.device().gemv.replace(' ', "-");
        let id = || BenchmarkId::new(label, format!("{name}-{variant}"));

        let mut group = criterion.benchmark_group("prefill");
        group.throughput(Throughput::Elements(PROMPT as u64));
        group.sampling_mode(SamplingMode::Flat).sample_size(10);
        group.bench_function(id(), |bencher| {
            bencher.iter(|| {
                transformer.reset();
                transformer.feed(&prompt, Want::Token).expect("a sound model")
            });
        });
        group.finish();

        let mut group = criterion.benchmark_group("decode");
        group.throughput(Throughput::Elements(1)).sampling_mode(SamplingMode::Flat);
        group.sample_size(10).measurement_time(std::time::Duration::from_secs(5));
        transformer.reset();
        let mut token = 1;
        group.bench_function(id(), |bencher| {
            bencher.iter(|| {
                if transformer.position() >= DECODED {
                    transformer.reset();
                }
                match transformer.feed(&[token], Want::Token) {
                    Ok(Output::Token(next)) => token = next,
                    other => panic!("{other:?}"),
                }
            });
        });
        group.finish();
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);
