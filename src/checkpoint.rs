//! A checkpoint: which tensors its configuration asks for, and their values.

use std::collections::BTreeSet;
use std::path::Path;

use rayon::prelude::*;

use crate::config::{ModelConfig, WeightForm};
use crate::error::{Error, Result};
use crate::format::float::{Float, first_non_finite};
use crate::format::{Dtype, ModelFiles, TensorInfo, TensorView, quoted};
use crate::shape::MatShape;
use crate::tensor_names::{
    ATTN_SUB_NORM, DOWN_PROJ, EMBEDDING, FFN_SUB_NORM, FINAL_NORM, GATE_PROJ, INPUT_LAYERNORM,
    K_PROJ, LINEARS, LM_HEAD, Linear, Norm, O_PROJ, POST_ATTENTION_LAYERNORM, Q_PROJ, UP_PROJ,
    V_PROJ, norms,
};
use crate::weights::{DenseData, DenseMatrix, LayerWeights, TernaryMatrix, WeightSource};

const CONFIG: &str = "config.json";

/// Bytes of a large tensor that are mapped at a time while it is copied.
const COPY_BYTES: usize = 4 << 20;

/// A checkpoint directory in the layout of Hugging Face, or the same files inside the program.
///
/// Opening it reads `config.json` and the safetensors headers and checks that every tensor the
/// model needs is there, with its type and shape, and that there is none that contradicts the
/// configuration. Values are checked as they are read. A `lm_head.weight` beside tied embeddings is
/// not used, as in the original implementation, but must have their shape.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    files: ModelFiles,
    unused: Vec<String>,
}

/// Bytes of a loaded model, by what holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySummary {
    /// Ternary matrices in a packed layout, padding included.
    pub ternary: u64,
    /// The embedding table, in the precision of the file.
    pub embedding: u64,
    /// The LM head, in the precision of the file; 0 if it is the embedding table.
    pub lm_head: u64,
    /// RMSNorm weights, as f32.
    pub norms: u64,
    /// Keys and values of one position in all layers, as f32.
    pub kv_per_position: u64,
}

impl Checkpoint {
    /// Opens a directory with `config.json` and `model.safetensors`, or
    /// `model.safetensors.index.json` and its shards.
    ///
    /// # Errors
    /// If a file is missing or malformed, this version does not run the model, or files
    /// contradict each other.
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(ModelFiles::open(path)?)
    }

    /// The same for files `(name, bytes)` that are part of the program; `label` stands for the
    /// directory in messages.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn embedded(label: &str, files: &'static [(&'static str, &'static [u8])]) -> Result<Self> {
        Self::new(ModelFiles::embedded(label, files)?)
    }

    /// A checkpoint of these files.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn new(files: ModelFiles) -> Result<Self> {
        let Some(json) = files.file(CONFIG)? else {
            return Err(Error::NotACheckpoint { path: files.label().into(), expected: CONFIG });
        };
        let config = ModelConfig::parse(&files.join(CONFIG), &json)?;
        let mut checkpoint = Self { config, files, unused: Vec::new() };
        let used = checkpoint.check_tensors()?;
        checkpoint.unused = checkpoint.check_unused(&used)?;
        Ok(checkpoint)
    }

    /// The files it is made of.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// Tensors of the files that the model does not use, in alphabetical order.
    pub fn unused_tensors(&self) -> &[String] {
        &self.unused
    }

    /// What the model takes in memory once it is loaded.
    pub fn memory(&self) -> MemorySummary {
        let config = &self.config;
        let layers = config.num_hidden_layers as u64;
        let words = |(n, k): (usize, usize)| cpu_ref::layout::len_words(n, k) as u64;
        let ternary: u64 = LINEARS.iter().map(|linear| words((linear.shape)(config))).sum();
        let norms: u64 = norms(config).map(|norm| (norm.len)(config) as u64).sum();
        let len_bytes = |name| self.files.info(name).map_or(0, |info| info.len_bytes);
        MemorySummary {
            ternary: 4 * layers * ternary,
            embedding: len_bytes(EMBEDDING),
            lm_head: if config.tie_word_embeddings { 0 } else { len_bytes(LM_HEAD) },
            norms: 4 * (layers * norms + config.hidden_size as u64),
            kv_per_position: 4 * layers * 2 * config.kv_size() as u64,
        }
    }

    /// Checks presence, type and shape of every tensor that the model needs; returns their names.
    fn check_tensors(&self) -> Result<BTreeSet<String>> {
        let config = &self.config;
        let mut used = BTreeSet::new();
        let vocabulary = [config.vocab_size, config.hidden_size];
        self.float_info(EMBEDDING, &vocabulary, None)?;
        used.insert(EMBEDDING.to_owned());
        if !config.tie_word_embeddings {
            self.float_info(LM_HEAD, &vocabulary, Some("tie_word_embeddings is false"))?;
            used.insert(LM_HEAD.to_owned());
        } else if let Some(info) = self.files.info(LM_HEAD) {
            // Not used, but a head of another shape is no copy of the embeddings.
            self.check_shape(info, &vocabulary)?;
        }
        self.float_info(FINAL_NORM, &[config.hidden_size], None)?;
        used.insert(FINAL_NORM.to_owned());
        for layer in 0..config.num_hidden_layers {
            for norm in norms(config) {
                let name = norm.weight(layer);
                self.float_info(&name, &[(norm.len)(config)], None)?;
                used.insert(name);
            }
            for linear in &LINEARS {
                let name = linear.weight(layer);
                let (n, k) = (linear.shape)(config);
                if config.weight_form == WeightForm::Online {
                    self.master_info(&name, [n, k])?;
                } else {
                    self.packed_info(&name, [n, k])?;
                    let scale = linear.weight_scale(layer);
                    self.scale_info(&scale)?;
                    used.insert(scale);
                }
                used.insert(name);
            }
        }
        Ok(used)
    }

    /// The tensors that are not in `used`; an error if one of them would change the computation.
    fn check_unused(&self, used: &BTreeSet<String>) -> Result<Vec<String>> {
        let mut unused = Vec::new();
        for info in self.files.infos().filter(|info| !used.contains(&info.name)) {
            if let Some(reason) = self.objection(&info.name) {
                return Err(Error::UnexpectedTensor {
                    file: self.files.file_of(info).to_owned(),
                    tensor: quoted(&info.name),
                    reason,
                });
            }
            unused.push(info.name.clone());
        }
        Ok(unused)
    }

    /// Why a tensor of this name, which the model does not use, cannot be left out.
    fn objection(&self, name: &str) -> Option<&'static str> {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
        if let Some(layer) = layer.and_then(|layer| layer.parse::<usize>().ok())
            && layer >= self.config.num_hidden_layers
        {
            return Some("num_hidden_layers in config.json is smaller");
        }
        let mut reason = None;
        for part in name.split('.') {
            reason = match part {
                "bias" => Some("this version has no biases"),
                "attn_sub_norm" | "ffn_sub_norm" => Some("this architecture has no sub-norms"),
                "inner_attn_ln" | "ffn_layernorm" => {
                    Some("these sub-norms belong to another architecture, BitnetForCausalLM")
                }
                "q_norm" | "k_norm" => Some("this architecture does not normalise heads"),
                "rms_norm" | "norm" if name != FINAL_NORM && layer.is_some() => {
                    Some("this architecture has no norms inside its linear layers")
                }
                "weight_scale" => Some("config.json does not say that this matrix is packed"),
                _ => reason,
            };
        }
        reason
    }

    fn info(&self, name: &str, hint: Option<&'static str>) -> Result<&TensorInfo> {
        self.files.info(name).ok_or_else(|| Error::MissingTensor {
            file: self.files.label().to_owned(),
            tensor: name.to_owned(),
            hint,
        })
    }

    fn check_shape(&self, info: &TensorInfo, expected: &[usize]) -> Result<()> {
        if info.shape == expected {
            return Ok(());
        }
        Err(Error::TensorShape {
            file: self.files.file_of(info).to_owned(),
            tensor: info.name.clone(),
            expected: expected.to_owned(),
            found: info.shape.clone(),
        })
    }

    fn dtype_error(&self, info: &TensorInfo, expected: &'static str) -> Error {
        Error::TensorDtype {
            file: self.files.file_of(info).to_owned(),
            tensor: info.name.clone(),
            expected,
            found: info.dtype.chars().take(16).collect(),
        }
    }

    fn value_error(&self, info: &TensorInfo, expected: &'static str, found: String) -> Error {
        let file = self.files.file_of(info).to_owned();
        Error::TensorValue { file, tensor: info.name.clone(), expected, found }
    }

    /// A tensor of floats of that shape.
    fn float_info(
        &self,
        name: &str,
        shape: &[usize],
        hint: Option<&'static str>,
    ) -> Result<(&TensorInfo, Float)> {
        let info = self.info(name, hint)?;
        let float = Dtype::from_name(&info.dtype)
            .and_then(Float::of)
            .ok_or_else(|| self.dtype_error(info, "BF16, F16 or F32"))?;
        self.check_shape(info, shape)?;
        Ok((info, float))
    }

    /// A matrix `[N, K]` of master weights.
    fn master_info(&self, name: &str, shape: [usize; 2]) -> Result<Float> {
        let info = self.info(name, None)?;
        let float = Dtype::from_name(&info.dtype).and_then(Float::of).ok_or_else(|| {
            self.dtype_error(info, "BF16, F16 or F32 (quantization_mode is online)")
        })?;
        self.check_shape(info, &shape)?;
        Ok(float)
    }

    /// A packed matrix: U8 `[ceil(N/4), K]`.
    fn packed_info(&self, name: &str, [n, k]: [usize; 2]) -> Result<()> {
        let info = self.info(name, None)?;
        if info.dtype != Dtype::U8.name() {
            return Err(self.dtype_error(info, "U8 (quantization_config says packed weights)"));
        }
        self.check_shape(info, &[n.div_ceil(4), k])
    }

    /// A packed matrix's scale: one float, shape `[1]` or `[]`.
    fn scale_info(&self, name: &str) -> Result<(&TensorInfo, Float)> {
        let info = self.info(name, Some("quantization_config says packed weights"))?;
        let shape: &[usize] = if info.shape.is_empty() { &[] } else { &[1] };
        self.float_info(name, shape, None)
    }

    /// A matrix's scale, as a multiplier.
    fn scale(&self, name: &str) -> Result<f32> {
        let (info, float) = self.scale_info(name)?;
        let mut stored = [0.0];
        float.decode(&self.files.slice(info, 0..float.len_bytes())?, &mut stored);
        let [stored] = stored;
        let scale = match self.config.weight_form {
            WeightForm::PackedDivide => 1.0 / stored,
            WeightForm::PackedMultiply | WeightForm::Online => stored,
        };
        // The reciprocal of a subnormal is infinite: both ends must be usable.
        let usable = |scale: f32| scale.is_finite() && scale > 0.0;
        if usable(stored) && usable(scale) {
            Ok(scale)
        } else {
            Err(self.value_error(info, "a positive number", format!("{stored:?}")))
        }
    }

    /// An RMSNorm's weight.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let (info, float) = self.float_info(name, &[len], None)?;
        let bytes = self.files.slice(info, 0..len * float.len_bytes())?;
        let mut values = vec![0.0; len];
        float.decode(&bytes, &mut values);
        match first_non_finite(&values) {
            None => Ok(values),
            Some(i) => {
                let found = format!("{} at {i}", values[i]);
                Err(self.value_error(info, "finite weights", found))
            }
        }
    }

    /// A matrix in the file's precision, copied piece by piece: the pages of the file never stand
    /// in memory beside the whole copy.
    fn dense(&self, name: &str) -> Result<DenseMatrix> {
        let shape = MatShape::new(self.config.vocab_size, self.config.hidden_size)?;
        let (info, float) = self.float_info(name, &[shape.n(), shape.k()], None)?;
        let data = match float {
            Float::Bf16 => DenseData::Bf16(
                self.elements(info, u16::from_le_bytes, |bits| bits & 0x7f80 != 0x7f80)?,
            ),
            Float::F16 => DenseData::F16(
                self.elements(info, u16::from_le_bytes, |bits| bits & 0x7c00 != 0x7c00)?,
            ),
            Float::F32 => {
                DenseData::F32(self.elements(info, f32::from_le_bytes, f32::is_finite)?)
            }
        };
        Ok(DenseMatrix::new(shape, data))
    }

    fn elements<T: Copy + Default + Send, const SIZE: usize>(
        &self,
        info: &TensorInfo,
        from_le_bytes: impl Fn([u8; SIZE]) -> T + Sync,
        is_finite: impl Fn(T) -> bool + Sync,
    ) -> Result<Vec<T>> {
        // The header has been checked against the file, so that this is no more than the file.
        let len_bytes = info.len_bytes as usize;
        let mut elements = vec![T::default(); len_bytes / SIZE];
        elements.par_chunks_mut(COPY_BYTES / SIZE).enumerate().try_for_each(|(i, piece)| {
            let start = i * COPY_BYTES;
            let bytes = self.files.slice(info, start..start + piece.len() * SIZE)?;
            for (element, &bytes) in piece.iter_mut().zip(bytes.as_chunks().0) {
                *element = from_le_bytes(bytes);
            }
            // No early exit: the loop vectorises, and the answer is nearly always "all".
            if piece.iter().fold(true, |finite, &element| finite & is_finite(element)) {
                return Ok(());
            }
            let before = piece.iter().take_while(|&&element| is_finite(element)).count();
            let (at, k) = (start / SIZE + before, self.config.hidden_size);
            let found = format!("NaN or infinity at row {}, column {}", at / k, at % k);
            Err(self.value_error(info, "finite elements", found))
        })?;
        Ok(elements)
    }

    fn matrix(&self, layer: usize, linear: &Linear) -> Result<TernaryMatrix> {
        let name = linear.weight(layer);
        let (n, k) = (linear.shape)(&self.config);
        let shape = MatShape::new(n, k)?;
        if self.config.weight_form == WeightForm::Online {
            let float = self.master_info(&name, [n, k])?;
            TernaryMatrix::from_master(shape, self.tensor(&name)?, float)
        } else {
            self.packed_info(&name, [n, k])?;
            let scale = self.scale(&linear.weight_scale(layer))?;
            Ok(TernaryMatrix::from_hf_packed(shape, self.tensor(&name)?, scale))
        }
    }

    fn tensor(&self, name: &str) -> Result<TensorView> {
        let tensor = self.files.tensor(name)?;
        tensor.ok_or_else(|| Error::MissingTensor {
            file: self.files.label().to_owned(),
            tensor: name.to_owned(),
            hint: None,
        })
    }

    fn norm(&self, layer: usize, norm: &Norm) -> Result<Vec<f32>> {
        self.vector(&norm.weight(layer), (norm.len)(&self.config))
    }
}

impl WeightSource for Checkpoint {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn embedding(&self) -> Result<DenseMatrix> {
        self.dense(EMBEDDING)
    }

    fn lm_head(&self) -> Result<Option<DenseMatrix>> {
        if self.config.tie_word_embeddings { Ok(None) } else { self.dense(LM_HEAD).map(Some) }
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.vector(FINAL_NORM, self.config.hidden_size)
    }

    fn layer(&self, index: usize) -> Result<LayerWeights> {
        let has_sub_norms = self.config.has_sub_norms();
        let sub_norm =
            |norm| if has_sub_norms { self.norm(index, norm).map(Some) } else { Ok(None) };
        Ok(LayerWeights {
            input_layernorm: self.norm(index, &INPUT_LAYERNORM)?,
            q_proj: self.matrix(index, &Q_PROJ)?,
            k_proj: self.matrix(index, &K_PROJ)?,
            v_proj: self.matrix(index, &V_PROJ)?,
            attn_sub_norm: sub_norm(&ATTN_SUB_NORM)?,
            o_proj: self.matrix(index, &O_PROJ)?,
            post_attention_layernorm: self.norm(index, &POST_ATTENTION_LAYERNORM)?,
            gate_proj: self.matrix(index, &GATE_PROJ)?,
            up_proj: self.matrix(index, &UP_PROJ)?,
            ffn_sub_norm: sub_norm(&FFN_SUB_NORM)?,
            down_proj: self.matrix(index, &DOWN_PROJ)?,
        })
    }
}
