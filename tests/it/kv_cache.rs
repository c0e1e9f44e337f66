//! The KV cache under whole models: formats, blocks, bytes.

use sterna::backend::reference::Reference;
use sterna::backend::simd::{Level, SimdBackend};
use sterna::backend::{Device, LoadOptions, Output, Tap, Want};
use sterna::config::{ModelConfig, RopeScaling};
use sterna::kv_cache::KvFormat;
use sterna::random::Random;
use sterna::synthetic::{SyntheticModel, published, tiny_bitnet, tiny_llama};
use sterna::weights::WeightSource;
use sterna::{Error, Model, Transformer};

const FORMATS: [KvFormat; 3] = [KvFormat::F32, KvFormat::F16, KvFormat::Int8];

/// More than two blocks.
const TOKENS: usize = 150;

fn options(kv: KvFormat, threads: usize) -> LoadOptions {
    LoadOptions {
        context: Some(256),
        kv: Some(kv),
        max_batch: 40,
        threads: Some(threads),
        ..LoadOptions::default()
    }
}

fn models() -> [SyntheticModel; 3] {
    let many_heads = ModelConfig { num_key_value_heads: 6, ..tiny_bitnet() };
    [(tiny_bitnet(), 11), (tiny_llama(), 12), (many_heads, 13)]
        .map(|(config, seed)| SyntheticModel::new(config, seed))
}

fn reference(model: &SyntheticModel, options: &LoadOptions) -> Transformer {
    let backend = Reference::load(model, options, &mut |_| {}).unwrap();
    Transformer::new(model.config().clone(), Box::new(backend))
}

fn simd(model: &SyntheticModel, level: Level, options: &LoadOptions) -> Transformer {
    let backend = SimdBackend::load_on(level, model, options, &mut |_| {}).unwrap();
    Transformer::new(model.config().clone(), Box::new(backend))
}

fn tokens(model: &SyntheticModel, len: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.below(model.config().vocab_size) as u32).collect()
}

/// What attention gives in every layer, in one pass a piece of `tokens`.
fn attended(transformer: &mut Transformer, tokens: &[u32], piece: usize) -> Vec<Vec<f32>> {
    let mut layers = vec![Vec::new(); transformer.config().num_hidden_layers];
    for piece in tokens.chunks(piece) {
        transformer
            .feed_tapped(piece, Want::Nothing, &mut |tap, layer, values| {
                if tap == Tap::Attended {
                    layers[layer].extend_from_slice(values);
                }
            })
            .unwrap();
    }
    layers
}

#[test]
fn every_format_has_the_bits_of_the_reference_however_it_is_fed() {
    for model in models() {
        let tokens = tokens(&model, TOKENS, 1);
        for format in FORMATS {
            let expected = attended(&mut reference(&model, &options(format, 1)), &tokens, 150);
            let by_token = attended(&mut reference(&model, &options(format, 1)), &tokens, 1);
            assert!(by_token == expected, "{format:?}: prefill and decode differ");
            for level in Level::available() {
                for (threads, piece) in [(1, 150), (3, 150), (2, 8), (2, 3), (3, 1)] {
                    let options = options(format, threads);
                    let found = attended(&mut simd(&model, level, &options), &tokens, piece);
                    let what = format!("{format:?} {level:?}, {threads} threads, {piece} a pass");
                    assert!(found == expected, "{what}");
                }
            }
        }
    }
}

#[test]
fn bytes_are_as_computed_and_grow_by_blocks() {
    let model = SyntheticModel::new(tiny_bitnet(), 5);
    for format in FORMATS {
        let loads: [fn(&SyntheticModel, &LoadOptions) -> Transformer; 2] =
            [reference, |model, options| simd(model, Level::Scalar, options)];
        for load in loads {
            let mut transformer = load(&model, &options(format, 1));
            assert_eq!((transformer.kv_bytes(), transformer.kv_format()), (0, format));
            // Two heads of 20 values in three layers, keys and values.
            let position = match format {
                KvFormat::F32 => 2 * 3 * 2 * 20 * 4,
                KvFormat::F16 => 2 * 3 * 2 * 20 * 2,
                KvFormat::Int8 => 2 * 3 * 2 * (20 + 4),
            };
            for (positions, blocks) in [(1, 1), (64, 1), (65, 2), (128, 2), (256, 4)] {
                let more = positions - transformer.position();
                transformer.feed(&tokens(&model, more, 1), Want::Nothing).unwrap();
                assert_eq!(transformer.kv_bytes(), blocks * 64 * position, "{positions}");
            }
            // A new text takes the same blocks.
            transformer.reset();
            transformer.feed(&tokens(&model, 200, 2), Want::Nothing).unwrap();
            assert_eq!(transformer.kv_bytes(), 4 * 64 * position);
            let error = transformer.feed(&[1; 57], Want::Nothing).unwrap_err();
            assert!(matches!(error, Error::ContextOverflow { needed: 257, capacity: 256 }));
        }
    }
}

#[test]
fn the_default_format_goes_by_the_bytes_of_a_whole_context() {
    let format = |config: &ModelConfig, context| {
        LoadOptions { context, ..LoadOptions::default() }.kv_format(config).unwrap()
    };
    let capacity = |config: &ModelConfig| LoadOptions::default().capacity(config).unwrap();
    let built_in = sterna::built_in::checkpoint().unwrap();
    assert_eq!(format(built_in.config(), None), KvFormat::F32);
    let bitnet = published("bitnet-2b4t").unwrap();
    assert_eq!((capacity(&bitnet), format(&bitnet, None)), (4096, KvFormat::F16));
    assert_eq!(format(&bitnet, Some(256)), KvFormat::F32);
    let bonsai = published("bonsai-8b").unwrap();
    assert_eq!((capacity(&bonsai), format(&bonsai, None)), (32_768, KvFormat::Int8));
    assert_eq!(format(&bonsai, Some(8192)), KvFormat::F16);
    let long = ModelConfig { max_position_embeddings: 131_072, ..bonsai };
    assert_eq!(capacity(&long), 32_768);
    let options = LoadOptions { context: Some(131_072), ..LoadOptions::default() };
    assert_eq!(options.capacity(&long).unwrap(), 131_072);
    let forced = LoadOptions { kv: Some(KvFormat::F32), ..LoadOptions::default() };
    assert_eq!(forced.kv_format(&long).unwrap(), KvFormat::F32);
}

/// The mean of `KL(P ‖ Q)` over the rows of logits, in nats.
fn divergence(p: &[f32], q: &[f32], vocab_size: usize) -> f64 {
    let log_softmax = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        let total: f64 = row.iter().map(|&x| f64::from(x - max).exp()).sum();
        row.iter().map(|&x| f64::from(x - max) - total.ln()).collect::<Vec<_>>()
    };
    let rows = p.chunks_exact(vocab_size).zip(q.chunks_exact(vocab_size));
    let each = rows.map(|(p, q)| {
        let pairs = log_softmax(p).into_iter().zip(log_softmax(q));
        pairs.map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
    });
    each.sum::<f64>() / (p.len() / vocab_size) as f64
}

/// Stories that the built-in model's training has left out, each from position 0 as the model is used.
#[test]
fn int8_and_f16_caches_hardly_change_the_built_in_model() {
    const TEXT: &str = include_str!("../golden/held-out-stories.txt");
    let checkpoint = sterna::built_in::checkpoint().unwrap();
    let stories: Vec<_> = TEXT
        .split("\n---\n")
        .map(|story| Model::encode(&checkpoint, story.trim()).unwrap())
        .collect();
    let n_tokens: usize = stories.iter().map(Vec::len).sum();
    assert!(n_tokens > 1500, "{n_tokens}");
    let vocab_size = checkpoint.config().vocab_size;
    let [f32_logits, f16_logits, int8_logits] = FORMATS.map(|format| {
        let options = LoadOptions { kv: Some(format), ..LoadOptions::default() };
        let mut transformer =
            Transformer::load(&checkpoint, Device::Cpu, &options, &mut |_| {}).unwrap();
        let mut logits = Vec::new();
        for story in &stories {
            transformer.reset();
            match transformer.feed(story, Want::AllLogits).unwrap() {
                Output::Logits(rows) => logits.extend(rows),
                other => panic!("{other:?}"),
            }
        }
        logits
    });
    let f16 = divergence(&f32_logits, &f16_logits, vocab_size);
    let int8 = divergence(&f32_logits, &int8_logits, vocab_size);
    assert!(int8 > 0.0 && int8 < 1e-3, "int8: {int8:e}");
    assert!(f16 > 0.0 && f16 < int8, "f16: {f16:e}");
}

/// Past the original context: layer 0's queries of one token are those of position 0, turned by the
/// published formulas, written here once more and in f64.
#[test]
fn stretched_rope_turns_every_position_on_both_backends() {
    const ORIGINAL: f64 = 32.0;
    let (theta, dim) = (10_000.0f64, 20);
    let plain = |i: usize| theta.powf(-2.0 * i as f64 / dim as f64);
    // transformers: the dimension at which a wave turns `rotations` times over the context.
    let dimension = |rotations: f64| {
        dim as f64 * (ORIGINAL / (rotations * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
    };
    let yarn = |i: usize| {
        let (low, high) = (dimension(8.0).floor().max(0.0), dimension(0.5).ceil());
        let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
        plain(i) * (1.0 - divided) + plain(i) / 4.0 * divided
    };
    // Llama 3.1's, by wavelength.
    let llama3 = |i: usize| {
        let waves = ORIGINAL * plain(i) / std::f64::consts::TAU;
        let kept = ((waves - 1.0) / (4.0 - 1.0)).clamp(0.0, 1.0);
        plain(i) * kept + plain(i) / 8.0 * (1.0 - kept)
    };
    let yarn_scaling = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 32.0,
        beta_fast: 8.0,
        beta_slow: 0.5,
        attention_factor: RopeScaling::yarn_attention_factor(4.0),
    };
    let llama3_scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 32.0,
    };
    let cases: [(RopeScaling, &dyn Fn(usize) -> f64); 2] =
        [(yarn_scaling, &yarn), (llama3_scaling, &llama3)];
    for (rope_scaling, frequency) in cases {
        // The factors do something to some of the waves, and not to all.
        let kept = (0..dim / 2).filter(|&i| frequency(i) == plain(i)).count();
        assert!(kept > 0 && kept < dim / 2, "{kept}");
        let config = ModelConfig { rope_scaling, rope_theta: theta as f32, ..tiny_bitnet() };
        let model = SyntheticModel::new(config, 6);
        let options = options(KvFormat::F32, 2);
        for mut transformer in [reference(&model, &options), simd(&model, Level::Scalar, &options)]
        {
            let mut queries = Vec::new();
            let mut tap = |tap, layer, values: &[f32]| {
                if (tap, layer) == (Tap::Query, 0) {
                    queries.extend_from_slice(values);
                }
            };
            transformer.feed_tapped(&[7; 128], Want::Nothing, &mut tap).unwrap();
            let rows: Vec<_> = queries.chunks_exact(6 * dim).collect();
            for position in [1, 31, 32, 33, 90, 127] {
                for (head, turned) in
                    rows[0].chunks_exact(dim).zip(rows[position].chunks_exact(dim))
                {
                    for i in 0..dim / 2 {
                        let (sin, cos) = (position as f64 * frequency(i)).sin_cos();
                        let (a, b) = (f64::from(head[i]), f64::from(head[i + dim / 2]));
                        let expected = [a * cos - b * sin, b * cos + a * sin];
                        let found = [turned[i], turned[i + dim / 2]].map(f64::from);
                        let size = a.abs() + b.abs();
                        for (expected, found) in expected.iter().zip(found) {
                            // 127 positions of an f32 frequency.
                            let close = (expected - found).abs() <= 3e-5 * size + 1e-9;
                            assert!(close, "{position}, {i}: {expected} {found}");
                        }
                    }
                }
            }
        }
    }
}
