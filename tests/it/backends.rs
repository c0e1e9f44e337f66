//! Whole models: the SIMD backend against the reference, step by step and token by token.

use sterna::backend::reference::Reference;
use sterna::backend::simd::{Level, SimdBackend};
use sterna::backend::{Backend, LoadOptions, Output, Tap, Want};
use sterna::error::Error;
use sterna::model::Transformer;
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_llama};
use sterna::weights::WeightSource;

use sterna::random::Random;

fn options(threads: usize) -> LoadOptions {
    LoadOptions {
        context: Some(64),
        max_batch: 7,
        threads: Some(threads),
        ..LoadOptions::default()
    }
}

fn models() -> [SyntheticModel; 2] {
    [SyntheticModel::new(tiny_bitnet(), 11), SyntheticModel::new(tiny_llama(), 12)]
}

fn reference(model: &SyntheticModel) -> Transformer {
    let backend = Reference::load(model, &options(1), &mut |_| {}).unwrap();
    Transformer::new(model.config().clone(), Box::new(backend))
}

fn simd(model: &SyntheticModel, level: Level, threads: usize) -> Transformer {
    let backend = SimdBackend::load_on(level, model, &options(threads), &mut |_| {}).unwrap();
    Transformer::new(model.config().clone(), Box::new(backend))
}

fn tokens(model: &SyntheticModel, len: usize, seed: u64) -> Vec<u32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| random.below(model.config().vocab_size) as u32).collect()
}

/// A step's result: which step, which layer, its values.
type Seen = (Tap, usize, Vec<f32>);

/// Every step's result, in order.
fn taps(transformer: &mut Transformer, tokens: &[u32]) -> (Vec<Seen>, Vec<f32>) {
    let mut seen = Vec::new();
    let output = transformer
        .feed_tapped(tokens, Want::AllLogits, &mut |tap, layer, values| {
            seen.push((tap, layer, values.to_vec()));
        })
        .unwrap();
    let Output::Logits(logits) = output else { panic!("{output:?}") };
    (seen, logits)
}

/// The largest difference, relative to the largest value.
fn distance(expected: &[f32], found: &[f32]) -> f32 {
    assert_eq!(expected.len(), found.len());
    let scale = expected.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    let differences = expected.iter().zip(found).map(|(a, b)| (a - b).abs());
    differences.fold(0.0f32, |max, difference| {
        assert!(difference.is_finite());
        max.max(difference)
    }) / scale
}

/// Logits are summed in another order than the reference's: K·2⁻²⁴ of the largest, with room.
const LOGITS: f32 = 1e-5;

#[test]
fn every_step_agrees_with_the_reference() {
    for model in models() {
        let tokens = tokens(&model, 17, 1);
        let (expected, expected_logits) = taps(&mut reference(&model), &tokens);
        for level in Level::available() {
            let (found, logits) = taps(&mut simd(&model, level, 2), &tokens);
            assert_eq!(found.len(), expected.len());
            for ((tap, layer, expected), found) in expected.iter().zip(&found) {
                let same = (*tap, *layer, expected) == (found.0, found.1, &found.2);
                assert!(same, "{level:?}: {tap:?} of layer {layer} has other bits");
            }
            assert!(distance(&expected_logits, &logits) <= LOGITS);
        }
    }
}

#[test]
fn levels_threads_and_chunks_give_the_same_bits() {
    for model in models() {
        let tokens = tokens(&model, 30, 2);
        let (_, expected) = taps(&mut simd(&model, Level::Scalar, 1), &tokens);
        for level in Level::available() {
            for threads in [1, 3] {
                let mut transformer = simd(&model, level, threads);
                assert_eq!(taps(&mut transformer, &tokens).1, expected, "{level:?} {threads}");
                // One token at a time.
                transformer.reset();
                for (token, expected) in tokens.iter().zip(expected.chunks_exact(301)) {
                    let output = transformer.feed(&[*token], Want::LastLogits).unwrap();
                    assert_eq!(output, Output::Logits(expected.to_vec()));
                }
            }
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_reference() {
    for model in models() {
        let prompt = tokens(&model, 9, 3);
        let greedy = |mut transformer: Transformer| {
            let mut feed = prompt.clone();
            let mut out = Vec::new();
            while out.len() < 40 {
                let Output::Token(token) = transformer.feed(&feed, Want::Token).unwrap() else {
                    panic!("no token");
                };
                out.push(token);
                feed = vec![token];
            }
            out
        };
        let expected = greedy(reference(&model));
        for level in Level::available() {
            assert_eq!(greedy(simd(&model, level, 2)), expected, "{level:?}");
        }
    }
}

#[test]
fn want_decides_what_comes_back() {
    let model = &models()[0];
    let mut transformer = simd(model, Level::Scalar, 1);
    assert_eq!(transformer.feed(&[1, 2], Want::Nothing).unwrap(), Output::Nothing);
    let Output::Logits(all) = transformer.feed(&[3, 4, 5], Want::AllLogits).unwrap() else {
        panic!("no logits");
    };
    assert_eq!(all.len(), 3 * 301);
    transformer.reset();
    transformer.feed(&[1, 2, 3, 4], Want::Nothing).unwrap();
    let last = transformer.feed(&[5], Want::LastLogits).unwrap();
    assert_eq!(last, Output::Logits(all[2 * 301..].to_vec()));
    transformer.reset();
    let token = transformer.feed(&[1, 2, 3, 4, 5], Want::Token).unwrap();
    let expected = cpu_ref::argmax::argmax(&all[2 * 301..]).unwrap();
    assert_eq!(token, Output::Token(expected as u32));
}

#[test]
fn nan_weights_are_an_error_and_not_a_token() {
    struct Broken(SyntheticModel);
    impl WeightSource for Broken {
        fn config(&self) -> &sterna::config::ModelConfig {
            self.0.config()
        }
        fn embedding(&self) -> sterna::Result<sterna::weights::Table> {
            self.0.embedding()
        }
        fn lm_head(&self) -> sterna::Result<Option<sterna::weights::Table>> {
            self.0.lm_head()
        }
        fn final_norm(&self) -> sterna::Result<Vec<f32>> {
            self.0.final_norm()
        }
        fn layer(&self, index: usize) -> sterna::Result<sterna::weights::LayerWeights> {
            let mut layer = self.0.layer(index)?;
            if index == 1 {
                layer.input_layernorm[5] = f32::NAN;
            }
            Ok(layer)
        }
    }
    let model = Broken(SyntheticModel::new(tiny_bitnet(), 1));
    for level in Level::available() {
        let backend = SimdBackend::load_on(level, &model, &options(2), &mut |_| {}).unwrap();
        let mut transformer = Transformer::new(model.config().clone(), Box::new(backend));
        let error = transformer.feed(&[1, 2, 3], Want::Token).unwrap_err();
        assert!(matches!(error, Error::NanLogits { position: 2 }), "{error}");
    }
}

#[test]
fn bad_options_are_errors() {
    let model = &models()[0];
    let load = |options| SimdBackend::load(model, &options, &mut |_| {}).err();
    let no_batch = LoadOptions { max_batch: 0, ..options(1) };
    assert!(matches!(load(no_batch), Some(Error::Dimension { name: "max_batch", .. })));
    let no_threads = LoadOptions { threads: Some(0), ..options(1) };
    assert!(matches!(load(no_threads), Some(Error::Threads { threads: 0, .. })));
}

#[test]
fn the_device_says_what_it_runs() {
    for level in Level::available() {
        let backend = SimdBackend::load_on(level, &models()[0], &options(3), &mut |_| {}).unwrap();
        let device = backend.device();
        assert_eq!(device.name, "cpu");
        assert!(device.description.contains("3 threads"), "{}", device.description);
        assert_eq!(device.gemv, format!("gemv_i2 {}", level.name()));
    }
}
