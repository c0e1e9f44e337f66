//! A checkpoint: which tensors its configuration asks for, and their values.

mod ggml;
mod rotation;

use std::collections::BTreeSet;
use std::path::Path;

pub use ggml::I2sLayout;
use rotation::Rotations;

use crate::config::{Architecture, ModelConfig, WeightForm, gguf};
use crate::error::{Error, Result};
use crate::format::float::{Float, first_non_finite};
use crate::format::ggml::FloatType;
use crate::format::{Dtype, ModelFiles, TensorInfo, TensorView, quoted};
use crate::session::{Identity, IdentityHash};
use crate::shape::MatShape;
use crate::tensor_names::{
    ATTN_SUB_NORM, DOWN_PROJ, FFN_SUB_NORM, GATE_PROJ, INPUT_LAYERNORM, K_NORM, K_PROJ, LINEARS,
    Linear, Naming, Norm, O_PROJ, POST_ATTENTION_LAYERNORM, Q_NORM, Q_PROJ, UP_PROJ, V_PROJ, norms,
};
use crate::weights::{
    Input, LayerWeights, Stamp, StoredRows, Table, TableData, TernaryMatrix, WeightSource,
};

const CONFIG: &str = "config.json";

/// What divides each rotary frequency, in GGUF files of Llama 3.1 and later.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// How a table is going to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Read {
    /// Again and again.
    Often,
    /// Again and again; it was checked to be finite when the file was read before.
    CheckedBefore,
    /// Row by row, once: it may stay in its file.
    Once,
}

/// Bytes at each end of a tensor that tell a model from others.
const IDENTITY_BYTES: usize = 4096;

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
    options: OpenOptions,
    rotations: Option<Rotations>,
    unused: Vec<String>,
}

/// What a checkpoint's files do not say of themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// The layout of I2_S tensors.
    pub i2s_layout: I2sLayout,
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
}

impl MemorySummary {
    /// Of a model of random weights ([`crate::synthetic::SyntheticModel`]): tables are bf16, or packed
    /// like the rest.
    pub fn synthetic(config: &ModelConfig) -> Self {
        let layers = config.num_hidden_layers as u64;
        let words = |(n, k): (usize, usize)| match config.weight_form {
            WeightForm::Mlx { bits, group } => packed_words(bits, Some(group), n, k),
            _ => packed_words(2, None, n, k),
        };
        let of_layer: u64 = LINEARS.iter().map(|linear| words((linear.shape)(config))).sum();
        let norms: u64 = norms(config).map(|norm| (norm.len)(config) as u64).sum();
        let shape = (config.vocab_size, config.hidden_size);
        let embedding = match config.weight_form {
            WeightForm::Mlx { .. } => 4 * words(shape),
            _ => 2 * (shape.0 * shape.1) as u64,
        };
        Self {
            ternary: 4 * layers * of_layer,
            embedding,
            lm_head: if config.tie_word_embeddings { 0 } else { embedding },
            norms: 4 * (layers * norms + config.hidden_size as u64),
        }
    }
}

impl Checkpoint {
    /// Opens a directory with `config.json` and `model.safetensors`, or
    /// `model.safetensors.index.json` and its shards; or a GGUF file, or any part of a split one, or
    /// a directory that holds one.
    ///
    /// # Errors
    /// If a file is missing or malformed, this version does not run the model, or files
    /// contradict each other.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_with(path, OpenOptions::default())
    }

    /// The same, told what the files do not say.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(path: &Path, options: OpenOptions) -> Result<Self> {
        Self::with_options(ModelFiles::open(path)?, options)
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
        Self::with_options(files, OpenOptions::default())
    }

    fn with_options(files: ModelFiles, options: OpenOptions) -> Result<Self> {
        let config = match files.metadata() {
            Some(metadata) => ggml::config(&files, metadata, &options)?,
            None => {
                let Some(json) = files.file(CONFIG)? else {
                    return Err(Error::NotACheckpoint {
                        path: files.label().into(),
                        expected: CONFIG,
                    });
                };
                ModelConfig::parse(&files.join(CONFIG), &json)?
            }
        };
        let mut checkpoint = Self { config, files, options, rotations: None, unused: Vec::new() };
        let used = checkpoint.check_tensors()?;
        checkpoint.unused = checkpoint.check_unused(&used)?;
        checkpoint.rotations = checkpoint.read_rotations()?;
        Ok(checkpoint)
    }

    /// Whether it has the dimensions of BitNet b1.58 2B4T, which files of several names hold.
    pub(crate) fn is_2b4t(&self) -> bool {
        let config = &self.config;
        let shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size);
        config.architecture == Architecture::BitNet && shape == gguf::SHAPE_OF_2B4T
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
        let naming = self.naming();
        let shapes = MemorySummary::synthetic(config);
        let ternary: u64 = match self.is_ggml() {
            true => (0..config.num_hidden_layers)
                .flat_map(|layer| LINEARS.map(|linear| linear.weight(naming, layer)))
                .map(|name| self.ggml_packed_bytes(&name))
                .sum(),
            false => shapes.ternary,
        };
        let table = |name| match config.weight_form {
            WeightForm::Mlx { .. } => shapes.embedding,
            WeightForm::Ggml => self.ggml_packed_bytes(name),
            _ => self.files.info(name).map_or(0, |info| info.len_bytes),
        };
        MemorySummary {
            ternary,
            embedding: table(naming.embedding()),
            lm_head: if config.tie_word_embeddings { 0 } else { table(naming.lm_head()) },
            norms: shapes.norms,
        }
    }

    fn naming(&self) -> Naming {
        Naming::of(&self.config)
    }

    /// Checks presence, type and shape of every tensor that the model needs; returns their names.
    fn check_tensors(&self) -> Result<BTreeSet<String>> {
        let (config, naming) = (&self.config, self.naming());
        let mut used = BTreeSet::new();
        let vocabulary = (config.vocab_size, config.hidden_size);
        used.extend(self.check_table(naming.embedding(), None)?);
        let lm_head = naming.lm_head();
        if !config.tie_word_embeddings {
            used.extend(self.check_table(lm_head, Some("tie_word_embeddings is false"))?);
        } else if let Some(info) = self.files.info(lm_head) {
            // Not used, but a head of another shape is no copy of the embeddings.
            self.check_shape(info, &[vocabulary.0, vocabulary.1])?;
        }
        self.float_info(naming.final_norm(), &[config.hidden_size], None)?;
        used.insert(naming.final_norm().to_owned());
        if self.has_rope_factors() {
            self.float_info(ROPE_FACTORS, &[config.head_dim / 2], None)?;
            used.insert(ROPE_FACTORS.to_owned());
        }
        for layer in 0..config.num_hidden_layers {
            for norm in norms(config) {
                let name = norm.weight(naming, layer);
                self.float_info(&name, &[(norm.len)(config)], None)?;
                used.insert(name);
            }
            for linear in &LINEARS {
                used.extend(self.check_linear(linear, layer)?);
            }
        }
        Ok(used)
    }

    /// Whether the file has its own stretching of the rotary frequencies.
    fn has_rope_factors(&self) -> bool {
        self.is_ggml() && self.files.info(ROPE_FACTORS).is_some()
    }

    /// Checks the tensors of a linear layer; returns their names.
    fn check_linear(&self, linear: &Linear, layer: usize) -> Result<Vec<String>> {
        let naming = self.naming();
        let name = linear.weight(naming, layer);
        let (n, k) = (linear.shape)(&self.config);
        let mut used = match self.config.weight_form {
            WeightForm::Online => {
                self.master_info(&name, [n, k])?;
                vec![name]
            }
            WeightForm::PackedMultiply | WeightForm::PackedDivide => {
                self.packed_info(&name, [n, k])?;
                let scale = linear.weight_scale(naming, layer);
                self.scale_info(&scale)?;
                vec![name, scale]
            }
            WeightForm::Mlx { bits, group } => self.check_mlx(&name, (n, k), bits, group)?,
            WeightForm::Ggml => self.check_ggml_linear(linear, layer)?,
        };
        if self.config.linear_norm_eps.is_some() {
            let norm = linear.norm(naming, layer);
            let reason = match self.is_ggml() {
                true => "blk.0.attn_q has a norm inside",
                false => "use_rms_norm is true",
            };
            self.float_info(&norm, &[k], Some(reason))?;
            used.push(norm);
        }
        Ok(used)
    }

    /// Checks the three tensors of a matrix in an MLX pack; returns their names.
    fn check_mlx(
        &self,
        name: &str,
        (n, k): (usize, usize),
        bits: usize,
        group: usize,
    ) -> Result<Vec<String>> {
        let info = self.info(name, None)?;
        if !k.is_multiple_of(group) {
            let expected = "a multiple of the group size in config.json";
            return Err(self.value_error(
                info,
                expected,
                format!("{k} columns, groups of {group}"),
            ));
        }
        if info.dtype != Dtype::U32.name() {
            return Err(self.dtype_error(info, "U32 (quantization says packed weights)"));
        }
        self.check_shape(info, &[n, k * bits / 32])?;
        let [scales, biases] = mlx_names(name);
        for name in [&scales, &biases] {
            let info = self.info(name, Some("quantization says packed weights"))?;
            if info.dtype != Dtype::F16.name() {
                return Err(self.dtype_error(info, "F16"));
            }
            self.check_shape(info, &[n, k / group])?;
        }
        Ok(vec![name.to_owned(), scales, biases])
    }

    /// Checks the tensors of the embedding table or the LM head; returns their names.
    fn check_table(&self, name: &str, hint: Option<&'static str>) -> Result<Vec<String>> {
        let (v, k) = (self.config.vocab_size, self.config.hidden_size);
        match self.config.weight_form {
            WeightForm::Mlx { bits, group } => {
                self.info(name, hint)?;
                self.check_mlx(name, (v, k), bits, group)
            }
            WeightForm::Ggml => self.check_ggml_table(name),
            _ => {
                self.float_info(name, &[v, k], hint)?;
                Ok(vec![name.to_owned()])
            }
        }
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
        let layer = self.naming().layer_of(name);
        if layer.is_some_and(|layer| layer >= self.config.num_hidden_layers) {
            return Some(match self.is_ggml() {
                true => "block_count is smaller",
                false => "num_hidden_layers in config.json is smaller",
            });
        }
        if self.is_ggml() {
            // Every tensor of these files takes part; a head beside a tied table is the exception.
            return (name != self.naming().lm_head())
                .then_some("this version has no such tensor in this architecture");
        }
        let mut reason = None;
        for part in name.split('.') {
            reason = match part {
                "bias" => Some("this version has no biases"),
                "attn_sub_norm" | "ffn_sub_norm" if !self.config.has_sub_norms() => {
                    Some("this architecture has no sub-norms")
                }
                "attn_sub_norm" | "ffn_sub_norm" => {
                    Some("these sub-norms belong to another architecture, BitNetForCausalLM")
                }
                "inner_attn_ln" | "ffn_layernorm" => {
                    Some("these sub-norms belong to another architecture, BitnetForCausalLM")
                }
                "q_norm" | "k_norm" => Some("this architecture does not normalise heads"),
                "rms_norm" | "norm" if layer.is_some() => {
                    Some("config.json does not say use_rms_norm, a norm inside every linear layer")
                }
                "weight_scale" | "scales" | "biases" => {
                    Some("config.json does not say that this matrix is packed")
                }
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
            found: info.dtype.escape_debug().take(16).collect(),
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
            _ => stored,
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

    /// A table in the file's precision: see [`Checkpoint::float_table`].
    fn table(&self, name: &str, read: Read) -> Result<Table> {
        let shape = MatShape::new(self.config.vocab_size, self.config.hidden_size)?;
        if let WeightForm::Mlx { bits, group } = self.config.weight_form {
            let matrix = self.mlx_matrix(shape, name, bits, group)?;
            return Ok(Table::new(shape, TableData::Groups(Box::new(matrix))));
        }
        if self.is_ggml() {
            return self.ggml_table(name, read);
        }
        let (info, float) = self.float_info(name, &[shape.n(), shape.k()], None)?;
        Ok(Table::new(shape, self.float_table(info, float.into(), read)?))
    }

    /// A float table: in its mapped file if it can be read there, else copied. All elements are read once,
    /// to be checked, unless that was done before and nothing else reads them.
    fn float_table(&self, info: &TensorInfo, ty: FloatType, read: Read) -> Result<TableData> {
        let shape = MatShape::new(self.config.vocab_size, self.config.hidden_size)?;
        let tensor = self.files.stored(info);
        let is_in_place = tensor.is_in_place();
        let rows = StoredRows::new(tensor, shape, ty)?;
        if read == Read::Once && !is_in_place {
            return Ok(TableData::Stored(rows));
        }
        match rows.in_place()? {
            Some(data) => {
                if read != Read::CheckedBefore {
                    rows.check()?;
                }
                Ok(data)
            }
            None => rows.read(0..shape.n()),
        }
    }

    fn matrix(&self, layer: usize, linear: &Linear) -> Result<TernaryMatrix> {
        let naming = self.naming();
        let name = linear.weight(naming, layer);
        let (n, k) = (linear.shape)(&self.config);
        let shape = MatShape::new(n, k)?;
        let matrix = match self.config.weight_form {
            WeightForm::Online => {
                let float = self.master_info(&name, [n, k])?;
                TernaryMatrix::from_master(shape, self.tensor(&name)?, float)?
            }
            WeightForm::PackedMultiply | WeightForm::PackedDivide => {
                self.packed_info(&name, [n, k])?;
                let scale = self.scale(&linear.weight_scale(naming, layer))?;
                TernaryMatrix::from_hf_packed(shape, self.tensor(&name)?, scale)
            }
            WeightForm::Mlx { bits, group } => self.mlx_matrix(shape, &name, bits, group)?,
            WeightForm::Ggml => self.ggml_matrix(layer, linear)?,
        };
        let norm = match self.config.linear_norm_eps {
            None => None,
            Some(_) => Some(self.vector(&linear.norm(naming, layer), k)?.into()),
        };
        let rotation = match &self.rotations {
            Some(rotations) => rotations.of_matrix(self.info(&name, None)?, k)?,
            None => None,
        };
        Ok(matrix.with_input(Input { norm, rotation }))
    }

    fn mlx_matrix(
        &self,
        shape: MatShape,
        name: &str,
        bits: usize,
        group: usize,
    ) -> Result<TernaryMatrix> {
        self.check_mlx(name, (shape.n(), shape.k()), bits, group)?;
        let [scales, biases] = mlx_names(name);
        let tensors = [self.tensor(name)?, self.tensor(&scales)?, self.tensor(&biases)?];
        TernaryMatrix::from_mlx(shape, tensors, bits, group)
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
        self.vector(&norm.weight(self.naming(), layer), (norm.len)(&self.config))
    }
}

impl WeightSource for Checkpoint {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Of the configuration, and of each tensor the name, type, shape, and first and last bytes.
    fn identity(&self) -> Result<Identity> {
        let mut hash = IdentityHash::new(&self.config);
        hash.add(&[matches!(self.options.i2s_layout, I2sLayout::Arm64).into()]);
        for info in self.files.infos() {
            hash.add(info.name.as_bytes());
            hash.add(info.dtype.as_bytes());
            hash.add(format!("{:?}", info.shape).as_bytes());
            let len = usize::try_from(info.len_bytes).expect("inside the file");
            let sample = len.min(IDENTITY_BYTES);
            hash.add(&self.files.slice(info, 0..sample)?);
            hash.add(&self.files.slice(info, len - sample..len)?);
        }
        Ok(hash.finish())
    }

    fn embedding(&self) -> Result<Table> {
        self.table(self.naming().embedding(), Read::Often)
    }

    fn lm_head(&self) -> Result<Option<Table>> {
        if self.config.tie_word_embeddings {
            return Ok(None);
        }
        self.table(self.naming().lm_head(), Read::Often).map(Some)
    }

    fn checked_embedding(&self) -> Result<Table> {
        self.table(self.naming().embedding(), Read::CheckedBefore)
    }

    fn checked_lm_head(&self) -> Result<Option<Table>> {
        if self.config.tie_word_embeddings {
            return Ok(None);
        }
        self.table(self.naming().lm_head(), Read::CheckedBefore).map(Some)
    }

    fn stored_embedding(&self) -> Result<Table> {
        self.table(self.naming().embedding(), Read::Once)
    }

    fn stored_lm_head(&self) -> Result<Option<Table>> {
        if self.config.tie_word_embeddings {
            return Ok(None);
        }
        self.table(self.naming().lm_head(), Read::Once).map(Some)
    }

    fn stamp(&self) -> Result<Option<Stamp>> {
        let label = self.files.label().to_owned();
        Ok(self.files.stamp()?.map(|bytes| Stamp { label, bytes }))
    }

    fn final_norm(&self) -> Result<Vec<f32>> {
        self.vector(self.naming().final_norm(), self.config.hidden_size)
    }

    fn frequencies(&self) -> Result<cpu_ref::rope::Frequencies> {
        let mut frequencies = self.config.frequencies();
        if self.has_rope_factors() {
            let factors = self.vector(ROPE_FACTORS, self.config.head_dim / 2)?;
            if let Some(factor) = factors.iter().find(|&&factor| factor <= 0.0) {
                let info = self.info(ROPE_FACTORS, None)?;
                return Err(self.value_error(info, "positive numbers", factor.to_string()));
            }
            for (inv_freq, factor) in frequencies.inv_freq.iter_mut().zip(factors) {
                *inv_freq /= factor;
            }
        }
        Ok(frequencies)
    }

    fn layer(&self, index: usize) -> Result<LayerWeights> {
        let norm_if = |norm: &Norm| match (norm.is_in)(&self.config) {
            true => self.norm(index, norm).map(Some),
            false => Ok(None),
        };
        Ok(LayerWeights {
            input_layernorm: self.norm(index, &INPUT_LAYERNORM)?,
            q_proj: self.matrix(index, &Q_PROJ)?,
            k_proj: self.matrix(index, &K_PROJ)?,
            v_proj: self.matrix(index, &V_PROJ)?,
            q_norm: norm_if(&Q_NORM)?,
            k_norm: norm_if(&K_NORM)?,
            attn_sub_norm: norm_if(&ATTN_SUB_NORM)?,
            o_proj: self.matrix(index, &O_PROJ)?,
            post_attention_layernorm: self.norm(index, &POST_ATTENTION_LAYERNORM)?,
            gate_proj: self.matrix(index, &GATE_PROJ)?,
            up_proj: self.matrix(index, &UP_PROJ)?,
            ffn_sub_norm: norm_if(&FFN_SUB_NORM)?,
            down_proj: self.matrix(index, &DOWN_PROJ)?,
        })
    }
}

/// The scales and biases beside an MLX pack `<prefix>.weight`.
fn mlx_names(weight: &str) -> [String; 2] {
    let prefix = weight.strip_suffix(".weight").unwrap_or(weight);
    [".scales", ".biases"].map(|suffix| format!("{prefix}{suffix}"))
}

/// Words of a matrix `[N, K]` of that many bits a weight, with an f16 scale for each group if there
/// are groups.
fn packed_words(bits: usize, group: Option<usize>, n: usize, k: usize) -> u64 {
    use cpu_ref::layout;
    let weights = match bits {
        1 => layout::signs::len_words(n, k),
        _ => layout::len_words(n, k),
    };
    let scales = group.map_or(0, |group| layout::group_scales::len_words(n, k / group));
    (weights + scales) as u64
}
