//! The weights of a model on the CPU: packed from a source, or mapped from what an earlier load kept.

use std::path::PathBuf;

use super::Level;
use super::head::Int8Head;
use super::matrix::{Head, Linears, Matrix};
use super::packed_file::{self, Key};
use crate::backend::gpu::tune;
use crate::backend::{
    HeadChoice, KeepPacked, LoadOptions, MAX_DRAFT, OnProgress, Packing, Progress,
};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::format::Bytes;
use crate::shape::MatShape;
use crate::tensor_names::{
    DOWN_PROJ, GATE_PROJ, K_PROJ, LINEARS, Linear, NORMS, O_PROJ, Q_PROJ, UP_PROJ, V_PROJ,
};
use crate::weights::WeightSource;

/// All large weights.
pub(super) struct Weights {
    pub(super) embedding: Head,
    pub(super) lm_head: Option<Head>,
    /// The int8 rows that tokens are chosen by, where there are any.
    pub(super) int8_head: Option<Int8Head>,
    pub(super) layers: Vec<Layer>,
    /// What is to be said about the load, one line each.
    pub(super) notes: Vec<String>,
}

pub(super) struct Layer {
    pub(super) input_layernorm: Vec<f32>,
    pub(super) qkv: Linears,
    pub(super) q_norm: Option<Vec<f32>>,
    pub(super) k_norm: Option<Vec<f32>>,
    pub(super) attn_sub_norm: Option<Vec<f32>>,
    pub(super) o: Linears,
    pub(super) post_attention_layernorm: Vec<f32>,
    pub(super) gate_up: Linears,
    pub(super) ffn_sub_norm: Option<Vec<f32>>,
    pub(super) down: Linears,
}

impl Layer {
    pub(super) fn linears(&self) -> [&Linears; 4] {
        [&self.qkv, &self.o, &self.gate_up, &self.down]
    }

    /// The norms, in the order of [`NORMS`].
    fn norms(&self) -> [Option<&Vec<f32>>; 6] {
        [
            Some(&self.input_layernorm),
            self.q_norm.as_ref(),
            self.k_norm.as_ref(),
            self.attn_sub_norm.as_ref(),
            Some(&self.post_attention_layernorm),
            self.ffn_sub_norm.as_ref(),
        ]
    }
}

/// The matrices that [`Layer::linears`] are made of.
const PARTS: [&[Linear]; 4] =
    [&[Q_PROJ, K_PROJ, V_PROJ], &[O_PROJ], &[GATE_PROJ, UP_PROJ], &[DOWN_PROJ]];

/// Loads the weights as the options say.
pub(super) fn load(
    level: Level,
    threads: usize,
    source: &dyn WeightSource,
    options: &LoadOptions,
    progress: OnProgress<'_>,
) -> Result<Weights> {
    let base3 = takes_base3(options.packing, level, threads, source.config());
    let mut notes = Vec::new();
    let place = match options.keep_packed {
        KeepPacked::Off => None,
        KeepPacked::On | KeepPacked::Check => Place::of(source, options, base3, &mut notes)?,
    };
    if let Some(place) = &place
        && let Some(mut weights) = place.read(source, options, base3, &mut notes)?
    {
        let total = weights.layers.len();
        progress(Progress { done: total, total });
        weights.notes = notes;
        return Ok(weights);
    }
    let mut weights = pack(source, options, base3, progress)?;
    let is_base3 =
        |layer: &Layer| layer.linears().into_iter().flat_map(Linears::runs).any(Matrix::is_base3);
    if options.packing == Packing::Base3 && !weights.layers.iter().any(is_base3) {
        notes.push("packing: every matrix has scales of groups, and stays as it is".to_owned());
    }
    if let Some(place) = &place {
        notes.push(place.write(&weights));
    }
    weights.notes = notes;
    Ok(weights)
}

/// Packs everything.
fn pack(
    source: &dyn WeightSource,
    options: &LoadOptions,
    base3: bool,
    progress: OnProgress<'_>,
) -> Result<Weights> {
    // The largest tensors first, while there is little beside their pages.
    let mut embedding = Head::pack(source.embedding()?)?;
    let mut lm_head = source.lm_head()?.map(Head::pack).transpose()?;
    let head = lm_head.as_mut().unwrap_or(&mut embedding);
    let int8_head = match (options.head, &*head) {
        (HeadChoice::Int8, Head::Plain(table)) => Int8Head::pack(table, head_tokens(options))?,
        _ => None,
    };
    // Beside int8 rows, few of a table's are read, and those from the file.
    if int8_head.is_none() {
        head.take_into_memory();
    }
    let total = source.config().num_hidden_layers;
    let mut layers = Vec::with_capacity(total);
    for index in 0..total {
        progress(Progress { done: index, total });
        let layer = source.layer(index)?;
        layers.push(Layer {
            input_layernorm: layer.input_layernorm,
            qkv: Linears::pack(&[&layer.q_proj, &layer.k_proj, &layer.v_proj], base3)?,
            q_norm: layer.q_norm,
            k_norm: layer.k_norm,
            attn_sub_norm: layer.attn_sub_norm,
            o: Linears::pack(&[&layer.o_proj], base3)?,
            post_attention_layernorm: layer.post_attention_layernorm,
            gate_up: Linears::pack(&[&layer.gate_proj, &layer.up_proj], base3)?,
            ffn_sub_norm: layer.ffn_sub_norm,
            down: Linears::pack(&[&layer.down_proj], base3)?,
        });
    }
    progress(Progress { done: total, total });
    Ok(Weights { embedding, lm_head, int8_head, layers, notes: Vec::new() })
}

/// Rows of logits that an int8 head computes at once.
fn head_tokens(options: &LoadOptions) -> usize {
    options.host_batch().min(MAX_DRAFT + 1)
}

/// Bytes of ternary matrices, at 2 bits a weight, beyond which no cache holds them.
const CACHED_WEIGHTS: u64 = 64 << 20;

/// Threads from which on memory, and not a core, is what a token waits for.
const SHARED_MEMORY: usize = 2;

/// Whether matrices take five weights a byte. That is a fifth less to read and more to decode: worth it
/// where memory is the limit and the level decodes it as fast as it comes. In a cache, and for one core
/// with the memory to itself, two bits are faster.
fn takes_base3(packing: Packing, level: Level, threads: usize, config: &ModelConfig) -> bool {
    match packing {
        Packing::TwoBits => false,
        Packing::Base3 => true,
        Packing::Auto => {
            let from_memory = ternary_bytes(config) > CACHED_WEIGHTS;
            level.has_base3() && threads >= SHARED_MEMORY && from_memory
        }
    }
}

/// Bytes of the ternary matrices at 2 bits a weight.
fn ternary_bytes(config: &ModelConfig) -> u64 {
    let len = |linear: &Linear| {
        let (n, k) = (linear.shape)(config);
        n as u64 * k as u64
    };
    config.num_hidden_layers as u64 * LINEARS.iter().map(len).sum::<u64>() / 4
}

/// The file that a model's packed weights are kept in.
struct Place {
    path: PathBuf,
    key: Key,
}

impl Place {
    /// `None` if there is none, and then a note why.
    fn of(
        source: &dyn WeightSource,
        options: &LoadOptions,
        base3: bool,
        notes: &mut Vec<String>,
    ) -> Result<Option<Self>> {
        let mut nowhere = |why: &str| {
            notes.push(format!("packed weights are not kept: {why}"));
            Ok(None)
        };
        let Some(stamp) = source.stamp()? else { return nowhere("the model is not made of files") };
        let Some(directory) = tune::directory() else {
            return nowhere("there is no cache directory");
        };
        let how = format!("base3 {base3}, head {:?}", options.head);
        let identity = source.identity()?;
        let key = Key::of(&[&identity.0, &stamp.bytes, how.as_bytes()]);
        Ok(Some(Self { path: packed_file::path(&directory, &stamp.label, &how), key }))
    }

    /// The weights in the file. `None` if there are none, and then a note if there was a file.
    fn read(
        &self,
        source: &dyn WeightSource,
        options: &LoadOptions,
        base3: bool,
        notes: &mut Vec<String>,
    ) -> Result<Option<Weights>> {
        if !self.path.exists() {
            return Ok(None);
        }
        // As good as checked if the key is that of the file, and else not used.
        let embedding = Head::pack(source.checked_embedding()?)?;
        let lm_head = source.checked_lm_head()?.map(Head::pack).transpose()?;
        let table = match (options.head, lm_head.as_ref().unwrap_or(&embedding)) {
            (HeadChoice::Int8, Head::Plain(table)) => Some(table),
            _ => None,
        };
        let config = source.config();
        let lens = section_lens(config, base3, table.map_or(0, Int8Head::len_bytes))?;
        let check = options.keep_packed == KeepPacked::Check;
        let sections = match packed_file::read(&self.path, &self.key, &lens, check) {
            Ok(Some(sections)) => sections,
            Ok(None) => return Ok(None),
            Err(why) => {
                notes.push(format!("{}: not used: {why}", self.path.display()));
                return Ok(None);
            }
        };
        let mut sections = sections.iter();
        let int8_head = sections
            .next()
            .zip(table)
            .and_then(|(words, table)| Int8Head::of_words(table, words, head_tokens(options)));
        let layers: Option<Vec<_>> = (0..config.num_hidden_layers)
            .map(|_| layer_of_sections(config, base3, &mut sections))
            .collect();
        let layers = layers.expect("sections have the lengths that were asked for");
        let mut weights = Weights { embedding, lm_head, int8_head, layers, notes: Vec::new() };
        if weights.int8_head.is_none() {
            weights.lm_head.as_mut().unwrap_or(&mut weights.embedding).take_into_memory();
        }
        Ok(Some(weights))
    }

    /// Writes the file, and says so, or why not.
    fn write(&self, weights: &Weights) -> String {
        let path = self.path.display();
        let Some(sections) = sections(weights) else {
            return "packed weights are not kept: matrices with scales of groups, norms or rotations of \
                    their own have no place in the file"
                .to_owned();
        };
        match packed_file::write(&self.path, &self.key, &sections) {
            Ok(()) => format!("{path}: packed weights are kept for the next load"),
            Err(error) => format!("{path}: packed weights are not kept: {error}"),
        }
    }
}

/// What a file holds of these weights; `None` if it cannot hold them.
fn sections(weights: &Weights) -> Option<Vec<&[u8]>> {
    let head = weights.int8_head.as_ref().map_or(&[][..], Int8Head::words);
    let mut sections = vec![bytemuck::cast_slice(head)];
    for layer in &weights.layers {
        sections
            .extend(layer.norms().map(|norm| norm.map_or(&[][..], |w| bytemuck::cast_slice(w))));
        for linears in layer.linears() {
            sections.extend(linears.sections()?);
        }
    }
    Some(sections)
}

/// The lengths of [`sections`] of a model, in bytes.
fn section_lens(config: &ModelConfig, base3: bool, head: usize) -> Result<Vec<usize>> {
    let mut lens = vec![head];
    for _ in 0..config.num_hidden_layers {
        lens.extend(NORMS.map(|norm| match (norm.is_in)(config) {
            true => size_of::<f32>() * (norm.len)(config),
            false => 0,
        }));
        for parts in PARTS {
            lens.extend(Linears::section_lens(shape_of(config, parts)?, base3));
        }
    }
    Ok(lens)
}

/// `[N, K]` of matrices one after another.
fn shape_of(config: &ModelConfig, parts: &[Linear]) -> Result<MatShape> {
    let shapes = parts.iter().map(|linear| (linear.shape)(config));
    MatShape::new(shapes.clone().map(|(n, _)| n).sum(), shapes.map(|(_, k)| k).max().unwrap_or(0))
}

/// The next layer; `None` if sections are missing or too short.
fn layer_of_sections<'a>(
    config: &ModelConfig,
    base3: bool,
    sections: &mut impl Iterator<Item = &'a Bytes>,
) -> Option<Layer> {
    let mut norms = [const { None }; NORMS.len()];
    for norm in &mut norms {
        let bytes = sections.next()?;
        if !bytes.is_empty() {
            let values: &[f32] = bytemuck::try_cast_slice(bytes).ok()?;
            *norm = Some(values.to_vec());
        }
    }
    let mut linears = PARTS.map(|parts| {
        let shape = shape_of(config, parts).ok()?;
        Linears::of_words(shape, base3, sections.next()?, sections.next()?)
    });
    let [input_layernorm, q_norm, k_norm, attn_sub_norm, post_attention_layernorm, ffn_sub_norm] =
        norms;
    Some(Layer {
        input_layernorm: input_layernorm?,
        qkv: linears[0].take()?,
        q_norm,
        k_norm,
        attn_sub_norm,
        o: linears[1].take()?,
        post_attention_layernorm: post_attention_layernorm?,
        gate_up: linears[2].take()?,
        ffn_sub_norm,
        down: linears[3].take()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synthetic::tiny_bitnet;

    #[test]
    fn five_weights_a_byte_where_memory_is_the_limit() {
        let small = tiny_bitnet();
        let large = ModelConfig { num_hidden_layers: 1 << 20, ..tiny_bitnet() };
        assert!(ternary_bytes(&small) < CACHED_WEIGHTS && ternary_bytes(&large) > CACHED_WEIGHTS);
        let auto = |level, threads, config| takes_base3(Packing::Auto, level, threads, config);
        assert!(auto(Level::Avx512Vbmi, 2, &large));
        assert!(!auto(Level::Avx512Vbmi, 1, &large));
        assert!(!auto(Level::Avx512Vbmi, 2, &small));
        assert!(!auto(Level::Avx512Vnni, 2, &large));
        assert!(takes_base3(Packing::Base3, Level::Scalar, 1, &small));
        assert!(!takes_base3(Packing::TwoBits, Level::Avx512Vbmi, 2, &large));
    }
}
