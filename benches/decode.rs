//! `decode` and `prefill` of a whole model of random weights, in tokens per second.
//!
//! `decode_speculate`: the same with drafts of a text that repeats itself, all of them right.
//!
//! The shape is BitNet b1.58 2B4T's; as a test it is a tiny one. All threads of the machine.
//! `decode_at`: one token after contexts of several lengths, two layers of 2B4T, by format of the KV cache; the time
//! should grow no faster than the bytes of the cache.
//! `sample`: the choice of a token on the GPU, one submit each.

mod shapes;

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use sterna::backend::gpu::kernels::{self, SampleLens};
use sterna::backend::gpu::{AdapterKind, PassParams};
use sterna::backend::{Device, LoadOptions, MAX_DRAFT, Output, Want};
use sterna::config::ModelConfig;
use sterna::kv_cache::KvFormat;
use sterna::model::Transformer;
use sterna::random::Random;
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
        let id = |len| BenchmarkId::new(label, format!("{name}-{variant}/draft-{len}"));
        speculate(criterion, &mut transformer, id);
    }
}

/// A text's tokens by drafts of 0, 3 and 7 that are right: what a pass costs for what it makes.
fn speculate(
    criterion: &mut Criterion,
    transformer: &mut Transformer,
    id: impl Fn(usize) -> BenchmarkId,
) {
    transformer.reset();
    transformer.prompt(&[1]).expect("a sound model");
    let next = |_| transformer.next_token(1).expect("a sound model");
    let text: Vec<u32> = (0..DECODED).map(next).collect();
    for len in [0, 3, MAX_DRAFT] {
        let mut group = criterion.benchmark_group("decode_speculate");
        group.throughput(Throughput::Elements(len as u64 + 1)).sampling_mode(SamplingMode::Flat);
        group.sample_size(10).measurement_time(std::time::Duration::from_secs(5));
        // Position 0 holds the prompt, position p the token p − 1 of the text.
        let mut at = text.len();
        group.bench_function(id(len), |bencher| {
            bencher.iter(|| {
                if at + len + 1 >= text.len() {
                    transformer.reset();
                    transformer.prompt(&[1]).expect("a sound model");
                    transformer.next_token(1).expect("a sound model");
                    at = 0;
                }
                let draft = &text[at + 1..][..len];
                let found = transformer.check_draft(text[at], draft, |_| false);
                let found = found.expect("a sound model");
                assert_eq!(found, text[at + 1..][..len + 1]);
                at += found.len();
            });
        });
        group.finish();
    }
}

/// One token after `context` others.
fn decode_at(criterion: &mut Criterion) {
    let shape = if is_test() { tiny_bitnet() } else { bitnet_2b4t() };
    let contexts: &[usize] = if is_test() { &[100] } else { &[512, 2048, 4096, 8192] };
    let config = ModelConfig {
        num_hidden_layers: 2,
        vocab_size: 301,
        max_position_embeddings: 9000,
        ..shape
    };
    let model = SyntheticModel::new(config, 1);
    let mut group = criterion.benchmark_group("decode_at");
    group.throughput(Throughput::Elements(1)).sampling_mode(SamplingMode::Flat).sample_size(10);
    for (name, kv) in [("f32", KvFormat::F32), ("f16", KvFormat::F16), ("int8", KvFormat::Int8)] {
        let options = LoadOptions { kv: Some(kv), ..LoadOptions::default() };
        let mut transformer = Transformer::load(&model, Device::Cpu, &options, &mut |_| {})
            .unwrap_or_else(|error| panic!("{error}"));
        for &context in contexts {
            let more = vec![1; context - transformer.position()];
            transformer.feed(&more, Want::Nothing).expect("a sound model");
            group.bench_function(BenchmarkId::new(format!("{context}/{name}"), "cpu"), |bencher| {
                bencher.iter(|| {
                    transformer.truncate(context);
                    transformer.feed(&[1], Want::Token).expect("a sound model")
                });
            });
            transformer.truncate(context);
        }
    }
    group.finish();
}

/// The three kernels that choose a token of 2B4T's vocabulary, with bell-shaped logits.
fn sample(criterion: &mut Criterion) {
    let Some(gpu) = gpu::open() else { return };
    let vocab_size = if is_test() { 300 } else { 128_256 };
    let lens = SampleLens::new(vocab_size);
    let mut random = Random::new(1);
    let logits: Vec<f32> = (0..vocab_size).map(|_| random.floats(6, 3.0).iter().sum()).collect();
    let seen = vec![0; lens.seen];
    let storage = |len| gpu.storage("sample", len).expect("device memory");
    let (logits_in, seen_in) = (gpu.upload("logits", &logits), gpu.upload("seen", &seen));
    let (logits_in, seen_in) = (logits_in.expect("device memory"), seen_in.expect("device memory"));
    let [bits, weights] = [lens.vocab; 2].map(storage);
    let [block_max, levels, uniforms, token] = [lens.block_max, lens.levels, 1, 1].map(storage);
    let (uniform, pipelines) = (gpu.params_buffer(), gpu.pipelines());
    let op = |call, buffers: &[_]| gpu.op(&pipelines, &call, &uniform, buffers).expect("a kernel");
    let ops = [
        op(kernels::sample_blocks(vocab_size), &[&logits_in, &seen_in, &bits, &block_max]),
        op(kernels::sample_weights(vocab_size), &[&bits, &block_max, &weights, &levels]),
        op(
            kernels::sample(vocab_size),
            &[&bits, &block_max, &weights, &levels, &uniforms, &seen_in, &token],
        ),
    ];
    let mut group = criterion.benchmark_group("sample");
    group.sample_size(10);
    for (name, top_k, top_p) in
        [("no_cut", 0, 1.0), ("top_k_40", 40, 1.0), ("top_p_0.95", 0, 0.95f32)]
    {
        let params = PassParams {
            n_logit_rows: 1,
            uniform: 0.6,
            temperature: 1.0,
            top_k,
            top_p,
            ..PassParams::default()
        };
        let run = || gpu.run_all(&uniform, params, &ops).expect("the device runs");
        run();
        let how = cpu_ref::sample::Sampling {
            temperature: 1.0,
            penalty: 1.0,
            top_k: top_k as usize,
            top_p: f64::from(top_p),
            min_p: 0.0,
        };
        let expected = cpu_ref::sample::sample(&logits, &seen, &how, f64::from(params.uniform));
        let found = gpu.read(&token, 1).expect("the device runs")[0] as usize;
        assert_eq!(Some(found), expected, "{name}");
        let id = BenchmarkId::new(format!("{vocab_size}/{name}"), "gpu");
        group.bench_function(id, |bencher| bencher.iter(run));
    }
    group.finish();
}

criterion_group!(benches, decode, decode_at, sample);
criterion_main!(benches);
