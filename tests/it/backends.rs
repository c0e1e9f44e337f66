//! Whole models: the SIMD backend against the reference, step by step and token by token.

use sterna::backend::reference::Reference;
use sterna::backend::simd::{Level, SimdBackend};
use sterna::backend::{Backend, LoadOptions, Output, Packing, Tap, Want};
use sterna::config::ModelConfig;
use sterna::error::Error;
use sterna::model::Transformer;
use sterna::shape::MatShape;
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_bonsai, tiny_llama, tiny_normed};
use sterna::weights::{
    Codes, Input, LayerWeights, Rotation, Table, TableData, TernaryMatrix, WeightSource,
};

use sterna::random::Random;

fn options(threads: usize) -> LoadOptions {
    LoadOptions {
        context: Some(64),
        max_batch: 7,
        threads: Some(threads),
        ..LoadOptions::default()
    }
}

/// A model and what it is loaded with.
struct Case {
    name: &'static str,
    model: Altered,
    int8: bool,
    /// Whether products are sums of integers, so that the residual stream has the bits of the
    /// reference.
    exact: bool,
}

/// A random model with other tables, or whose input passes rotations.
struct Altered {
    model: SyntheticModel,
    /// Values a block of the rotations of the table and of every second matrix.
    rotated: Option<usize>,
    /// Elements a scale of tables of int8 codes.
    codes: Option<usize>,
}

impl Altered {
    fn rotation(&self, k: usize, seed: u64) -> Option<std::sync::Arc<Rotation>> {
        let mut random = Random::new(seed);
        let sign = |random: &mut Random| if random.below(2) == 0 { 1.0 } else { -1.0 };
        let signs = (0..k).map(|_| sign(&mut random)).collect();
        self.rotated.map(|block| Rotation { block, signs }.into())
    }

    fn rotate(&self, matrix: TernaryMatrix, seed: u64) -> TernaryMatrix {
        let rotation = self.rotation(matrix.shape().k(), seed);
        let norm = matrix.input().norm.clone();
        matrix.with_input(Input { norm, rotation })
    }

    fn table(&self, table: Table, seed: u64) -> Table {
        let shape = table.shape();
        let Some(group) = self.codes else {
            return table.with_rotation(self.rotation(shape.k(), seed));
        };
        let mut random = Random::new(seed);
        let scale = random.floats(shape.len() / group, 0.001);
        let min = if seed == 1 { random.floats(scale.len(), 0.01) } else { Vec::new() };
        let codes = Codes { group, codes: random.codes(shape.len()), scale, min };
        Table::new(shape, TableData::Codes(codes))
    }
}

impl WeightSource for Altered {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }
    fn embedding(&self) -> sterna::Result<Table> {
        self.model.embedding().map(|table| self.table(table, 1))
    }
    fn lm_head(&self) -> sterna::Result<Option<Table>> {
        Ok(self.model.lm_head()?.map(|table| self.table(table, 2)))
    }
    fn final_norm(&self) -> sterna::Result<Vec<f32>> {
        self.model.final_norm()
    }
    fn layer(&self, index: usize) -> sterna::Result<LayerWeights> {
        let mut layer = self.model.layer(index)?;
        // K and V, and gate, pass the same rotation; Q and up pass none.
        layer.k_proj = self.rotate(layer.k_proj, 3);
        layer.v_proj = self.rotate(layer.v_proj, 3);
        layer.gate_proj = self.rotate(layer.gate_proj, 4);
        layer.down_proj = self.rotate(layer.down_proj, 5);
        Ok(layer)
    }
}

fn case(name: &'static str, config: ModelConfig, int8: bool) -> Case {
    let exact = int8 || config.activations != sterna::config::Activations::Float;
    let model = SyntheticModel::new(config, 11);
    Case { name, model: Altered { model, rotated: None, codes: None }, int8, exact }
}

fn rotated(name: &'static str, config: ModelConfig, int8: bool, block: usize) -> Case {
    let plain = case(name, config, int8);
    Case { model: Altered { rotated: Some(block), ..plain.model }, ..plain }
}

/// Sizes as 1bitLLM's models have them: no powers of two, odd widths.
fn odd_sizes() -> ModelConfig {
    ModelConfig {
        architecture: sterna::config::Architecture::Bitnet1bitLlm,
        hidden_size: 192,
        intermediate_size: 341,
        num_attention_heads: 2,
        num_key_value_heads: 2,
        head_dim: 96,
        hidden_act: sterna::config::Activation::Silu,
        ..tiny_bitnet()
    }
}

/// The two models whose results the tests of the trait's contract look at.
fn models() -> [SyntheticModel; 2] {
    [SyntheticModel::new(tiny_bitnet(), 11), SyntheticModel::new(tiny_llama(), 12)]
}

/// One of every kind of weights, activations and tables.
fn cases() -> Vec<Case> {
    let dim_100 = ModelConfig { hidden_size: 200, head_dim: 100, ..odd_sizes() };
    let mut codes_16 = case("codes of 16", ModelConfig { hidden_size: 128, ..tiny_llama() }, false);
    codes_16.model.codes = Some(16);
    let mut codes_32 = case("codes of 32", tiny_bonsai(2, 64), false);
    codes_32.model.codes = Some(32);
    vec![
        case("bitnet", tiny_bitnet(), false),
        case("llama", tiny_llama(), false),
        case("normed", tiny_normed(), false),
        case("heads of 96", odd_sizes(), false),
        case("heads of 100", dim_100, false),
        case("binary", tiny_bonsai(1, 128), false),
        case("binary, groups of 64", tiny_bonsai(1, 64), false),
        case("ternary, groups of 64", tiny_bonsai(2, 64), false),
        case("ternary", tiny_bonsai(2, 128), false),
        case("binary int8", tiny_bonsai(1, 128), true),
        case("ternary int8, groups of 64", tiny_bonsai(2, 64), true),
        case("ternary int8", tiny_bonsai(2, 128), true),
        rotated("rotated llama", tiny_llama(), false, 4),
        rotated("rotated normed", tiny_normed(), false, 4),
        rotated("rotated binary", tiny_bonsai(1, 128), false, 128),
        rotated("rotated ternary int8", tiny_bonsai(2, 128), true, 64),
        codes_16,
        codes_32,
    ]
}

impl Case {
    fn options(&self, threads: usize) -> LoadOptions {
        LoadOptions { int8_activations: self.int8, ..options(threads) }
    }

    fn reference(&self) -> Transformer {
        let backend = Reference::load(&self.model, &self.options(1), &mut |_| {}).unwrap();
        Transformer::new(self.model.config().clone(), Box::new(backend))
    }

    fn simd(&self, level: Level, threads: usize) -> Transformer {
        let options = self.options(threads);
        let backend = SimdBackend::load_on(level, &self.model, &options, &mut |_| {}).unwrap();
        Transformer::new(self.model.config().clone(), Box::new(backend))
    }
}

fn simd(model: &SyntheticModel, level: Level, threads: usize) -> Transformer {
    let backend = SimdBackend::load_on(level, model, &options(threads), &mut |_| {}).unwrap();
    Transformer::new(model.config().clone(), Box::new(backend))
}

fn tokens(model: &dyn WeightSource, len: usize, seed: u64) -> Vec<u32> {
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

/// So is every product of a model with float activations, in seven matrices a layer, and three
/// layers pass the differences on.
const FLOAT: f32 = 1e-4;

#[test]
fn every_step_agrees_with_the_reference() {
    for case in cases() {
        let tokens = tokens(&case.model, 17, 1);
        let (expected, expected_logits) = taps(&mut case.reference(), &tokens);
        let bound = if case.exact { LOGITS } else { FLOAT };
        for level in Level::available() {
            let (found, logits) = taps(&mut case.simd(level, 2), &tokens);
            assert_eq!(found.len(), expected.len());
            for ((tap, layer, expected), found) in expected.iter().zip(&found) {
                let what = format!("{}, {level:?}: {tap:?} of layer {layer}", case.name);
                assert_eq!((*tap, *layer), (found.0, found.1));
                if case.exact {
                    assert!(*expected == found.2, "{what} has other bits");
                } else {
                    let distance = distance(expected, &found.2);
                    assert!(distance <= bound, "{what} is off by {distance:e}");
                }
            }
            let distance = distance(&expected_logits, &logits);
            assert!(distance <= bound, "{}, {level:?}: logits off by {distance:e}", case.name);
        }
    }
}

#[test]
fn levels_threads_and_chunks_give_the_same_bits() {
    for case in cases() {
        let tokens = tokens(&case.model, 30, 2);
        let (_, expected) = taps(&mut case.simd(Level::Scalar, 1), &tokens);
        for level in Level::available() {
            for threads in [1, 3] {
                let mut transformer = case.simd(level, threads);
                let found = taps(&mut transformer, &tokens).1;
                assert!(found == expected, "{}, {level:?}, {threads} threads", case.name);
                // One token at a time.
                transformer.reset();
                for (token, expected) in tokens.iter().zip(expected.chunks_exact(301)) {
                    let output = transformer.feed(&[*token], Want::LastLogits).unwrap();
                    assert!(output == Output::Logits(expected.to_vec()), "{}", case.name);
                }
            }
        }
    }
}

#[test]
fn greedy_tokens_are_those_of_the_reference() {
    for case in cases() {
        let prompt = tokens(&case.model, 9, 3);
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
        let expected = greedy(case.reference());
        for level in Level::available() {
            assert_eq!(greedy(case.simd(level, 2)), expected, "{}, {level:?}", case.name);
        }
    }
}

/// Binary and ternary matrices of one layer, with groups of other lengths: what a file may hold
/// whose tensors each name their type.
#[test]
fn matrices_of_a_layer_may_be_packed_differently() {
    struct Mixed(SyntheticModel);
    impl WeightSource for Mixed {
        fn config(&self) -> &ModelConfig {
            self.0.config()
        }
        fn embedding(&self) -> sterna::Result<Table> {
            self.0.embedding()
        }
        fn lm_head(&self) -> sterna::Result<Option<Table>> {
            self.0.lm_head()
        }
        fn final_norm(&self) -> sterna::Result<Vec<f32>> {
            self.0.final_norm()
        }
        fn layer(&self, index: usize) -> sterna::Result<LayerWeights> {
            let other = SyntheticModel::new(tiny_bonsai(1, 128), 5).layer(index)?;
            let mut layer = self.0.layer(index)?;
            (layer.k_proj, layer.up_proj) = (other.k_proj, other.up_proj);
            let shape = MatShape::new(layer.q_proj.shape().n(), layer.q_proj.shape().k())?;
            let trits = Random::new(index as u64).trits(shape.len());
            layer.q_proj = TernaryMatrix::from_trits(shape, trits, 0.05);
            Ok(layer)
        }
    }
    let model = Mixed(SyntheticModel::new(tiny_bonsai(2, 64), 3));
    let tokens = tokens(&model, 9, 1);
    let transformer = |backend| Transformer::new(model.config().clone(), backend);
    let reference = Reference::load(&model, &options(1), &mut |_| {}).unwrap();
    let (_, expected) = taps(&mut transformer(Box::new(reference)), &tokens);
    for level in Level::available() {
        let backend = SimdBackend::load_on(level, &model, &options(2), &mut |_| {}).unwrap();
        assert_eq!(
            backend.device().gemv,
            format!("gemv_i2+group_gemv_i2+group_gemv_signs {}", level.name())
        );
        let (_, found) = taps(&mut transformer(Box::new(backend)), &tokens);
        // The one quantised matrix may round a code to its neighbour: see the golden tolerances.
        let distance = distance(&expected, &found);
        assert!(distance <= 0.02, "{level:?}: {distance:e}");
    }
}

/// Sums of integers do not depend on how the weights lie in memory.
#[test]
fn five_weights_a_byte_change_no_bit() {
    for config in [tiny_bitnet(), tiny_llama(), tiny_normed()] {
        let model = SyntheticModel::new(config, 11);
        let tokens = tokens(&model, 9, 1);
        for level in Level::available() {
            let run = |packing| {
                let options = LoadOptions { packing, ..options(2) };
                let backend = SimdBackend::load_on(level, &model, &options, &mut |_| {}).unwrap();
                let gemv = backend.device().gemv.clone();
                assert!(backend.device().notes.is_empty());
                let mut transformer = Transformer::new(model.config().clone(), Box::new(backend));
                let steps = taps(&mut transformer, &tokens);
                let next: Vec<_> = (0..5)
                    .map(|token| transformer.feed(&[token], Want::LastLogits).unwrap())
                    .collect();
                (gemv, steps, next)
            };
            let (two_bits, base3) = (run(Packing::TwoBits), run(Packing::Base3));
            assert_eq!(two_bits.0, format!("gemv_i2 {}", level.name()));
            assert_eq!(base3.0, format!("gemv_base3 {}", level.name()));
            assert_eq!((two_bits.1, two_bits.2), (base3.1, base3.2), "{level:?}");
            // A small model stays in the cache.
            assert_eq!(run(Packing::Auto).0, two_bits.0);
        }
    }
}

#[test]
fn scales_of_groups_are_no_matter_of_packing() {
    let model = SyntheticModel::new(tiny_bonsai(2, 64), 3);
    let options = LoadOptions { packing: Packing::Base3, ..options(1) };
    let backend = SimdBackend::load_on(Level::Scalar, &model, &options, &mut |_| {}).unwrap();
    let device = backend.device();
    assert_eq!(device.gemv, "group_gemv_i2 scalar");
    assert_eq!(device.notes.len(), 1);
    assert!(device.notes[0].contains("scales of groups"), "{:?}", device.notes);
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
