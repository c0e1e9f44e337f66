//! Models of random weights: real shapes for tests and benches, without a download.
//!
//! Every weight is a function of (seed, tensor, row), so that nothing large is held and two
//! programs agree on the same model.

use rayon::prelude::*;

use crate::config::{Activation, Activations, Architecture, ModelConfig, RopeScaling, WeightForm};
use crate::error::Result;
use crate::format::float::{bf16_to_f32, f32_to_bf16};
use crate::shape::MatShape;
use crate::tensor_names::{
    ATTN_SUB_NORM, DOWN_PROJ, FFN_SUB_NORM, GATE_PROJ, INPUT_LAYERNORM, K_NORM, K_PROJ, Linear,
    Norm, O_PROJ, POST_ATTENTION_LAYERNORM, Q_NORM, Q_PROJ, UP_PROJ, V_PROJ,
};
use crate::weights::{
    Alphabet, Input, LayerWeights, Table, TableData, TernaryMatrix, WeightScale, WeightSource,
};

/// Standard deviation of the embedding's elements.
const EMBEDDING_STD: f32 = 0.02;

/// The dimensions of BitNet b1.58 2B4T.
pub fn bitnet_2b4t() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::BitNet,
        weight_form: WeightForm::PackedMultiply,
        activations: Activations::Int8Token,
        vocab_size: 128_256,
        hidden_size: 2560,
        intermediate_size: 6912,
        num_hidden_layers: 30,
        num_attention_heads: 20,
        num_key_value_heads: 5,
        head_dim: 128,
        hidden_act: Activation::Relu2,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        linear_norm_eps: None,
        rope_theta: 500_000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: true,
    }
}

/// The dimensions of a published model; `None` for a name that is not in [`NAMES`].
///
/// Vocabularies are the rows that the published tables have. Where a base of the rotary frequencies
/// is not known, that of a relative stands in: of no meaning for random weights.
pub fn published(name: &str) -> Option<ModelConfig> {
    Some(match name {
        "bitnet-2b4t" => bitnet_2b4t(),
        "bitnet-large" => bitnet_1bitllm(1536, 4096, 24, 16),
        "bitnet-xl" => bitnet_1bitllm(2048, 5460, 24, 32),
        "bitnet-3b" => bitnet_1bitllm(3200, 8640, 26, 32),
        "llama3-8b" => llama(4096, 14_336, 32, (32, 8, 128), 128_256, 500_000.0),
        "falcon3-1b" => llama(2048, 8192, 18, (8, 4, 256), 131_072, 1_000_042.0),
        "falcon3-3b" => llama(3072, 9216, 22, (12, 4, 256), 131_072, 1_000_042.0),
        "falcon3-7b" => llama(3072, 23_040, 28, (12, 4, 256), 131_072, 1_000_042.0),
        "falcon3-10b" => llama(3072, 23_040, 40, (12, 4, 256), 131_072, 1_000_042.0),
        "falcon-e-1b" => llama(2048, 9216, 24, (16, 2, 128), 32_768, 1_000_042.0),
        "falcon-e-3b" => llama(2048, 13_312, 32, (16, 2, 128), 32_768, 1_000_042.0),
        "bonsai-1.7b" => bonsai(1, 2048, 6144, 28, 16),
        "bonsai-4b" => bonsai(1, 2560, 9728, 36, 32),
        "bonsai-8b" => bonsai(1, 4096, 12_288, 36, 32),
        "ternary-bonsai-1.7b" => bonsai(2, 2048, 6144, 28, 16),
        "ternary-bonsai-4b" => bonsai(2, 2560, 9728, 36, 32),
        "ternary-bonsai-8b" => bonsai(2, 4096, 12_288, 36, 32),
        _ => return None,
    })
}

/// The names that [`published`] knows.
pub const NAMES: [&str; 17] = [
    "bitnet-2b4t",
    "bitnet-large",
    "bitnet-xl",
    "bitnet-3b",
    "llama3-8b",
    "falcon3-1b",
    "falcon3-3b",
    "falcon3-7b",
    "falcon3-10b",
    "falcon-e-1b",
    "falcon-e-3b",
    "bonsai-1.7b",
    "bonsai-4b",
    "bonsai-8b",
    "ternary-bonsai-1.7b",
    "ternary-bonsai-4b",
    "ternary-bonsai-8b",
];

fn bitnet_1bitllm(hidden: usize, intermediate: usize, layers: usize, heads: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Bitnet1bitLlm,
        vocab_size: 32_002,
        hidden_size: hidden,
        intermediate_size: intermediate,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: hidden / heads,
        hidden_act: Activation::Silu,
        max_position_embeddings: 2048,
        rope_theta: 10_000.0,
        ..bitnet_2b4t()
    }
}

fn llama(
    hidden: usize,
    intermediate: usize,
    layers: usize,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    vocab_size: usize,
    rope_theta: f32,
) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        weight_form: WeightForm::PackedDivide,
        vocab_size,
        hidden_size: hidden,
        intermediate_size: intermediate,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        hidden_act: Activation::Silu,
        max_position_embeddings: 8192,
        rope_theta,
        tie_word_embeddings: false,
        ..bitnet_2b4t()
    }
}

fn bonsai(
    bits: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
) -> ModelConfig {
    ModelConfig {
        vocab_size: 151_669,
        hidden_size: hidden,
        intermediate_size: intermediate,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: 8,
        max_position_embeddings: 32_768,
        rope_scaling: RopeScaling::Yarn {
            factor: 4.0,
            original_context: 8192.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: RopeScaling::yarn_attention_factor(4.0),
        },
        // The largest has a head of its own.
        tie_word_embeddings: hidden < 4096,
        ..tiny_bonsai(bits, 128)
    }
}

/// A BitNet-shaped model that runs in a moment: awkward sizes, no multiples of a tile.
pub fn tiny_bitnet() -> ModelConfig {
    ModelConfig {
        vocab_size: 301,
        hidden_size: 120,
        intermediate_size: 204,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 20,
        max_position_embeddings: 512,
        ..bitnet_2b4t()
    }
}

/// A Llama-shaped model that runs in a moment: untied head, scales that divide.
pub fn tiny_llama() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        weight_form: WeightForm::PackedDivide,
        hidden_act: Activation::Silu,
        head_dim: 32,
        tie_word_embeddings: false,
        ..tiny_bitnet()
    }
}

/// A Bonsai-shaped model that runs in a moment: Qwen3 with YaRN; `bits` a weight (1 binary, 2
/// ternary), a scale for every `group` inputs, the table packed like the rest.
pub fn tiny_bonsai(bits: usize, group: usize) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen3,
        weight_form: WeightForm::Mlx { bits, group },
        activations: Activations::Float,
        hidden_act: Activation::Silu,
        hidden_size: 256,
        intermediate_size: 512,
        head_dim: 128,
        rms_norm_eps: 1e-6,
        rope_theta: 1e6,
        rope_scaling: RopeScaling::Yarn {
            factor: 4.0,
            original_context: 128.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: RopeScaling::yarn_attention_factor(4.0),
        },
        ..tiny_bitnet()
    }
}

/// A model with an RMSNorm inside every linear layer that runs in a moment, shaped like
/// bitnet-embedding-0.6b.
pub fn tiny_normed() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Qwen3,
        hidden_act: Activation::Silu,
        linear_norm_eps: Some(1e-6),
        head_dim: 32,
        ..tiny_bitnet()
    }
}

/// A model of random weights: trits uniform over {−1, 0, +1}, matrix scales that keep the variance
/// (`√(3/2K)`), norms around 1, embeddings of standard deviation 0.02; all as bf16 stores them.
#[derive(Debug, Clone)]
pub struct SyntheticModel {
    config: ModelConfig,
    seed: u64,
}

impl SyntheticModel {
    /// The model of these dimensions and this seed.
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        Self { config, seed }
    }

    /// Row `token` of the embedding table, bf16, into `out[hidden]`.
    fn embedding_row(&self, token: usize, out: &mut [u16]) {
        normal_row(self.table_seed(0), token, out);
    }

    /// Row `token` of the LM head, bf16, into `out[hidden]`; for untied configurations.
    fn lm_head_row(&self, token: usize, out: &mut [u16]) {
        normal_row(self.table_seed(1), token, out);
    }

    /// The scale as a checkpoint of this [`WeightForm`] stores it, bf16, for a matrix of `k`
    /// columns.
    pub fn stored_scale(&self, k: usize) -> u16 {
        let scale = (1.5 / k as f32).sqrt();
        f32_to_bf16(match self.config.weight_form {
            WeightForm::PackedDivide => 1.0 / scale,
            _ => scale,
        })
    }

    fn table_seed(&self, table: u64) -> u64 {
        hash(self.seed, u64::MAX - table)
    }

    /// How matrices that are packed by groups are scaled, and their alphabet.
    fn groups(&self) -> Option<(WeightScale, Alphabet)> {
        match self.config.weight_form {
            WeightForm::Mlx { bits: 1, group } => {
                Some((WeightScale::Groups { group }, Alphabet::Binary))
            }
            WeightForm::Mlx { group, .. } => {
                Some((WeightScale::Groups { group }, Alphabet::Ternary))
            }
            _ => None,
        }
    }

    fn table(&self, table: u64, row: impl Fn(usize, &mut [u16]) + Sync) -> Result<Table> {
        let shape = MatShape::new(self.config.vocab_size, self.config.hidden_size)?;
        if let Some((scale, alphabet)) = self.groups() {
            let matrix = TernaryMatrix::synthetic(shape, self.table_seed(table), scale, alphabet);
            return Ok(Table::new(shape, TableData::Groups(Box::new(matrix))));
        }
        let mut bits = vec![0; shape.len()];
        bits.par_chunks_exact_mut(shape.k()).enumerate().for_each(|(n, out)| row(n, out));
        Ok(Table::new(shape, TableData::Bf16(bits.into())))
    }

    fn matrix(&self, layer: usize, linear: &Linear) -> Result<TernaryMatrix> {
        let (n, k) = (linear.shape)(&self.config);
        let stored = bf16_to_f32(self.stored_scale(k));
        let tensor = WeightScale::Tensor(match self.config.weight_form {
            WeightForm::PackedDivide => 1.0 / stored,
            _ => stored,
        });
        let (scale, alphabet) = self.groups().unwrap_or((tensor, Alphabet::Ternary));
        let seed = hash_name(hash(self.seed, layer as u64), linear.path);
        let norm = self.config.linear_norm_eps.map(|_| norm_weights(hash(seed, 0), k).into());
        let matrix = TernaryMatrix::synthetic(MatShape::new(n, k)?, seed, scale, alphabet);
        Ok(matrix.with_input(Input { norm, rotation: None }))
    }

    fn norm(&self, layer: usize, norm: &Norm) -> Vec<f32> {
        let seed = hash_name(hash(self.seed, layer as u64), norm.path);
        norm_weights(seed, (norm.len)(&self.config))
    }
}

impl WeightSource for SyntheticModel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<Table> {
        self.table(0, |n, out| self.embedding_row(n, out))
    }

    fn lm_head(&self) -> Result<Option<Table>> {
        if self.config.tie_word_embeddings {
            return Ok(None);
        }
        self.table(1, |n, out| self.lm_head_row(n, out)).map(Some)
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        Ok(norm_weights(self.table_seed(2), self.config.hidden_size))
    }

    fn layer(&self, index: usize) -> Result<LayerWeights> {
        let norm_if = |norm: &Norm| (norm.is_in)(&self.config).then(|| self.norm(index, norm));
        Ok(LayerWeights {
            input_layernorm: self.norm(index, &INPUT_LAYERNORM),
            q_proj: self.matrix(index, &Q_PROJ)?,
            k_proj: self.matrix(index, &K_PROJ)?,
            v_proj: self.matrix(index, &V_PROJ)?,
            q_norm: norm_if(&Q_NORM),
            k_norm: norm_if(&K_NORM),
            attn_sub_norm: norm_if(&ATTN_SUB_NORM),
            o_proj: self.matrix(index, &O_PROJ)?,
            post_attention_layernorm: self.norm(index, &POST_ATTENTION_LAYERNORM),
            gate_proj: self.matrix(index, &GATE_PROJ)?,
            up_proj: self.matrix(index, &UP_PROJ)?,
            ffn_sub_norm: norm_if(&FFN_SUB_NORM),
            down_proj: self.matrix(index, &DOWN_PROJ)?,
        })
    }
}

/// The shapes of a model, for where weights are neither kept nor read: tables of zeros, and one
/// random layer for all.
#[derive(Debug, Clone)]
pub struct Shapes(SyntheticModel);

impl Shapes {
    /// The shapes of a model of these dimensions.
    pub fn new(config: ModelConfig) -> Self {
        Self(SyntheticModel::new(config, 0))
    }

    fn table(&self, table: u64) -> Result<Table> {
        let config = &self.0.config;
        let shape = MatShape::new(config.vocab_size, config.hidden_size)?;
        if self.0.groups().is_some() {
            return self.0.table(table, |_, _| {});
        }
        // Memory that nobody writes to is not taken.
        Ok(Table::new(shape, TableData::Bf16(vec![0; shape.len()].into())))
    }
}

impl WeightSource for Shapes {
    fn config(&self) -> &ModelConfig {
        self.0.config()
    }

    fn embedding(&self) -> Result<Table> {
        self.table(0)
    }

    fn lm_head(&self) -> Result<Option<Table>> {
        if self.0.config.tie_word_embeddings {
            return Ok(None);
        }
        self.table(1).map(Some)
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.0.final_norm()
    }

    fn layer(&self, _: usize) -> Result<LayerWeights> {
        self.0.layer(0)
    }
}

/// Row `n` of a random matrix: trits, and the f16 scales of its groups if there are any.
pub(crate) fn row(seed: u64, alphabet: Alphabet, n: usize, out: &mut [i8], scales: &mut [u16]) {
    match alphabet {
        Alphabet::Binary => signs(seed, n, out),
        Alphabet::Ternary => trits(seed, n, out),
    }
    if !scales.is_empty() {
        // The power of two below the scale that keeps the variance, times 1 to 2.
        let exponent = ((1.5 / out.len() as f32).sqrt().to_bits() >> 23) as u16 - (127 - 15);
        let row = hash(hash(seed, n as u64), u64::MAX);
        for (g, scale) in scales.iter_mut().enumerate() {
            *scale = exponent << 10 | (hash(row, g as u64) >> 54) as u16;
        }
    }
}

fn signs(seed: u64, n: usize, out: &mut [i8]) {
    let row = hash(seed, n as u64);
    for (i, group) in out.chunks_mut(64).enumerate() {
        let bits = hash(row, i as u64);
        for (bit, sign) in group.iter_mut().enumerate() {
            *sign = 2 * (bits >> bit & 1) as i8 - 1;
        }
    }
}

fn trits(seed: u64, n: usize, out: &mut [i8]) {
    let row = hash(seed, n as u64);
    for (i, group) in out.chunks_mut(8).enumerate() {
        for (trit, byte) in group.iter_mut().zip(hash(row, i as u64).to_le_bytes()) {
            // 86, 85 and 85 of 256 values.
            *trit = ((u16::from(byte) * 3) >> 8) as i8 - 1;
        }
    }
}

/// Row `n` of a table of nearly normal numbers: the sum of four uniform ones.
fn normal_row(seed: u64, n: usize, out: &mut [u16]) {
    // Each uniform one spans 2^16 and has variance 2^32/12.
    const SUM_STD: f32 = 37_837.2;
    let row = hash(seed, n as u64);
    for (k, bits) in out.iter_mut().enumerate() {
        let random = hash(row, k as u64);
        let sum: u64 = (0..4).map(|i| (random >> (16 * i)) & 0xffff).sum();
        let centred = sum as f32 - 2.0 * 65_535.0;
        *bits = f32_to_bf16(centred * (EMBEDDING_STD / SUM_STD));
    }
}

/// RMSNorm weights, 0.75 to 1.25.
fn norm_weights(seed: u64, len: usize) -> Vec<f32> {
    let weight = |i| {
        let uniform = (hash(seed, i as u64) >> 40) as f32 / (1u64 << 24) as f32;
        bf16_to_f32(f32_to_bf16(0.75 + 0.5 * uniform))
    };
    (0..len).map(weight).collect()
}

/// SplitMix64's output function of a counter, started at a seed.
fn hash(seed: u64, counter: u64) -> u64 {
    let mut x = seed.wrapping_add((counter.wrapping_add(1)).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn hash_name(seed: u64, name: &str) -> u64 {
    name.bytes().fold(seed, |seed, byte| hash(seed, u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trits_are_uniform_and_depend_on_everything() {
        let row = |seed, n| {
            let mut out = vec![0; 3001];
            trits(seed, n, &mut out);
            out
        };
        let first = row(1, 0);
        for trit in [-1, 0, 1] {
            let count = first.iter().filter(|&&found| found == trit).count();
            assert!((900..1100).contains(&count), "{trit}: {count} of 3001");
        }
        assert_eq!(first, row(1, 0));
        assert_ne!(first, row(1, 1));
        assert_ne!(first, row(2, 0));
    }

    #[test]
    fn tables_have_the_stated_deviation() {
        let model = SyntheticModel::new(tiny_llama(), 5);
        let embedding = model.embedding().unwrap();
        let mut row = vec![0.0; embedding.shape().k()];
        let mut sum = 0.0;
        for n in 0..embedding.shape().n() {
            embedding.row(n, &mut row).unwrap();
            sum += row.iter().map(|x| x * x).sum::<f32>();
        }
        let std = (sum / embedding.shape().len() as f32).sqrt();
        assert!((std - EMBEDDING_STD).abs() < 0.001, "{std}");
        let mut other = row.clone();
        model.lm_head().unwrap().unwrap().row(embedding.shape().n() - 1, &mut other).unwrap();
        assert_ne!(row, other);
    }

    #[test]
    fn layers_have_the_shapes_of_the_configuration() {
        for config in [tiny_bitnet(), tiny_llama(), tiny_normed(), bitnet_2b4t()] {
            let model = SyntheticModel::new(config.clone(), 7);
            let layer = model.layer(1).unwrap();
            for (linear, matrix) in layer.linears() {
                let (n, k) = (linear.shape)(&config);
                assert_eq!(matrix.shape(), MatShape::new(n, k).unwrap());
                let WeightScale::Tensor(scale) = matrix.scale() else { panic!("one scale") };
                assert!((scale - (1.5 / k as f32).sqrt()).abs() < 0.01 * scale);
                assert_eq!(matrix.input().norm.is_some(), config.linear_norm_eps.is_some());
            }
            assert_eq!(layer.norms().count(), crate::tensor_names::norms(&config).count());
            for (norm, weights) in layer.norms() {
                assert_eq!(weights.len(), (norm.len)(&config));
                assert!(weights.iter().all(|weight| (0.75..=1.25).contains(weight)));
            }
        }
    }

    #[test]
    fn groups_have_scales_near_the_one_that_keeps_the_variance() {
        for (bits, group) in [(1, 128), (2, 64)] {
            let config = tiny_bonsai(bits, group);
            let layer = SyntheticModel::new(config, 3).layer(0).unwrap();
            let matrix = &layer.down_proj;
            let k = matrix.shape().k();
            let (mut row, mut scales) = (vec![0; k], vec![0; k / group]);
            matrix.row_with_scales(5, &mut row, &mut scales).unwrap();
            let keeping = (1.5 / k as f32).sqrt();
            for &scale in &scales {
                let ratio = crate::format::float::f16_to_f32(scale) / keeping;
                assert!((0.5..2.0).contains(&ratio), "{ratio}");
            }
            assert_eq!(row.contains(&0), bits == 2);
            assert!(row.contains(&1) && row.contains(&-1));
        }
    }

    /// Parameters as the model cards and the files themselves count them.
    #[test]
    fn published_models_have_their_sizes() {
        for (name, expected) in [
            ("bitnet-2b4t", 2_412_820_480),
            ("bitnet-large", 728_842_752),
            ("bitnet-xl", 1_273_583_584),
            ("bitnet-3b", 3_324_387_840),
            ("bonsai-1.7b", 1_720_028_160),
            ("bonsai-4b", 4_021_784_576),
            ("ternary-bonsai-8b", 8_188_548_096u64),
        ] {
            let config = published(name).unwrap();
            let linears = crate::tensor_names::LINEARS.iter().map(|linear| {
                let (n, k) = (linear.shape)(&config);
                n * k
            });
            let norms = crate::tensor_names::norms(&config).map(|norm| (norm.len)(&config));
            let layer: usize = linears.chain(norms).sum();
            let tables = if config.tie_word_embeddings { 1 } else { 2 };
            let tables = tables * config.vocab_size * config.hidden_size;
            let total = tables + config.num_hidden_layers * layer + config.hidden_size;
            assert_eq!(total as u64, expected, "{name}");
        }
        assert!(NAMES.iter().all(|name| published(name).is_some()));
        assert_eq!(published("gpt-2"), None);
    }
}
