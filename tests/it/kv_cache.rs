//! The KV cache under whole models: formats, blocks, bytes.

use sterna::backend::reference::Reference;
use sterna::backend::simd::{Level, SimdBackend};
use sterna::backend::{Backend, LoadOptions, Output, Tap, Want};
use sterna::config::ModelConfig;
use sterna::kv_cache::KvFormat;
use sterna::model::Transformer;
use sterna::random::Random;
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_bonsai, tiny_llama};
use sterna::weights::WeightSource;

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
