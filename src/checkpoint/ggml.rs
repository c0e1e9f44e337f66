//! The tensors of a GGUF file as a model's weights.

use super::{Checkpoint, OpenOptions, Read, rotation::Rotations};
use crate::config::{Activations, File, ModelConfig, WeightForm, gguf};
use crate::error::{Error, Result};
use crate::format::float::Float;
use crate::format::ggml::{FloatType, GgmlType, TernaryType, i2s_scale};
use crate::format::gguf::Metadata;
use crate::format::{Dtype, ModelFiles, TensorInfo, TensorView, quoted};
use crate::shape::MatShape;
use crate::tensor_names::{K_PROJ, LINEARS, Linear, Naming, Q_PROJ};
use crate::weights::{Table, TableData, TernaryMatrix, WeightScale};

/// Which of its two layouts an I2_S tensor has; the file does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum I2sLayout {
    /// Blocks of 128 weights: every published file.
    #[default]
    Blocks128,
    /// Blocks of 64 weights: files that bitnet.cpp's own quantiser wrote on Arm since November
    /// 2025.
    Arm64,
}

/// What the tensors say of the configuration.
pub(super) fn config(
    files: &ModelFiles,
    metadata: &Metadata,
    options: &OpenOptions,
) -> Result<ModelConfig> {
    let architecture = gguf::architecture(metadata)?;
    let embedding = Naming::Gguf.embedding();
    let Some(info) = files.info(embedding) else {
        return Err(Error::MissingTensor {
            file: files.label().to_owned(),
            tensor: embedding.to_owned(),
            hint: None,
        });
    };
    let &[vocab_size, _] = info.shape.as_slice() else {
        return Err(Error::TensorValue {
            file: files.file_of(info).to_owned(),
            tensor: info.name.clone(),
            expected: "two dimensions",
            found: format!("{:?}", info.shape),
        });
    };
    let reader = Reader { files, options };
    let activations = if architecture.has_sub_norms() || reader.has_uniform_scales()? {
        Activations::Int8Token
    } else {
        Activations::Float
    };
    let tensors = gguf::FromTensors {
        vocab_size: File(metadata.file()).dimension(
            "rows of token_embd.weight",
            Some(vocab_size as u64),
            crate::shape::MAX_DIMENSION,
        )?,
        has_lm_head: files.info(Naming::Gguf.lm_head()).is_some(),
        has_linear_norms: files.info(&Q_PROJ.norm(Naming::Gguf, 0)).is_some(),
        activations,
    };
    gguf::config(metadata, &tensors)
}

/// Reads matrices of GGML types.
struct Reader<'a> {
    files: &'a ModelFiles,
    options: &'a OpenOptions,
}

/// How a matrix of a linear layer is stored.
enum MatrixType {
    Ternary(TernaryType),
    /// Floats, which must be three values.
    Dense(Float),
}

impl Reader<'_> {
    /// Whether no matrix of the first layer needs more than one scale: then it is a BitLinear layer
    /// in a format with room for more, and its activations are int8 by definition. Models that are
    /// trained with a scale for each group leave activations alone.
    fn has_uniform_scales(&self) -> Result<bool> {
        for linear in &LINEARS {
            // What is missing is said later, by name.
            let Some(info) = self.files.info(&linear.weight(Naming::Gguf, 0)) else { continue };
            let (MatrixType::Ternary(ty), &[n, k]) = (self.matrix_type(info)?, &info.shape[..])
            else {
                continue;
            };
            let matrix = self.ternary(info, MatShape::new(n, k)?, ty)?;
            if matches!(matrix.collapse()?.scale(), WeightScale::Groups { .. }) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn matrix_type(&self, info: &TensorInfo) -> Result<MatrixType> {
        let ty = self.files.ggml_type(info)?;
        if let Some(ternary) = ty.ternary() {
            return Ok(MatrixType::Ternary(match (ternary, self.options.i2s_layout) {
                (TernaryType::I2S, I2sLayout::Arm64) => TernaryType::I2SArm,
                (ternary, _) => ternary,
            }));
        }
        match ty.float().and_then(FloatType::plain) {
            Some(float) => Ok(MatrixType::Dense(float)),
            None => Err(Error::TensorDtype {
                file: self.files.file_of(info).to_owned(),
                tensor: info.name.clone(),
                expected: "a ternary or binary type (a linear layer that was quantised again is \
                           no longer the model)",
                found: info.dtype.clone(),
            }),
        }
    }

    fn view(&self, info: &TensorInfo) -> Result<TensorView> {
        Ok(TensorView {
            file: self.files.file_of(info).to_owned(),
            name: info.name.clone(),
            // Blocks, whatever they hold.
            dtype: Dtype::U8,
            shape: info.shape.clone(),
            bytes: self.files.slice(info, 0..info.len_bytes as usize)?,
        })
    }

    fn ternary(
        &self,
        info: &TensorInfo,
        shape: MatShape,
        ty: TernaryType,
    ) -> Result<TernaryMatrix> {
        let view = self.view(info)?;
        let value_error = |expected, found| Error::TensorValue {
            file: view.file.clone(),
            tensor: view.name.clone(),
            expected,
            found,
        };
        let Some(row_bytes) = ty.row_bytes(shape.k()) else {
            let expected = "rows of whole blocks";
            return Err(value_error(expected, format!("{} columns of {}", shape.k(), info.dtype)));
        };
        if ty.group().is_some() {
            return TernaryMatrix::from_ggml(shape, view, ty, None);
        }
        // A type without groups has one scale, behind the rows.
        let tail = view.bytes.get(shape.n() * row_bytes..).and_then(|tail| tail.first_chunk());
        match tail.copied().and_then(i2s_scale) {
            Some(scale) => TernaryMatrix::from_ggml(shape, view, ty, Some(scale)),
            None => {
                let found = tail.map_or("nothing".to_owned(), |&bytes| {
                    format!("{:?}", f32::from_le_bytes(bytes))
                });
                let expected = "a positive scale (quantise with one thread: bitnet.cpp's \
                                quantiser loses it with more)";
                Err(value_error(expected, found))
            }
        }
    }
}

impl Checkpoint {
    fn reader(&self) -> Reader<'_> {
        Reader { files: &self.files, options: &self.options }
    }

    /// Checks the tensors of a linear layer; returns their names.
    pub(super) fn check_ggml_linear(&self, linear: &Linear, layer: usize) -> Result<Vec<String>> {
        let name = linear.weight(Naming::Gguf, layer);
        let (n, k) = (linear.shape)(&self.config);
        let info = self.info(&name, None)?;
        self.check_shape(info, &[n, k])?;
        self.reader().matrix_type(info)?;
        let mut used = vec![name];
        let scale = linear.ggml_scale(layer);
        if let Some(info) = self.files.info(&scale) {
            if self.config.activations != Activations::Int8Token {
                return Err(Error::UnexpectedTensor {
                    file: self.files.file_of(info).to_owned(),
                    tensor: quoted(&scale),
                    reason: "its matrix has a scale for each group of inputs",
                });
            }
            self.float_info(&scale, &[1], None)?;
            used.push(scale);
        }
        Ok(used)
    }

    /// A linear layer's matrix.
    pub(super) fn ggml_matrix(&self, layer: usize, linear: &Linear) -> Result<TernaryMatrix> {
        let info = self.info(&linear.weight(Naming::Gguf, layer), None)?;
        let (n, k) = (linear.shape)(&self.config);
        self.check_shape(info, &[n, k])?;
        let shape = MatShape::new(n, k)?;
        let reader = self.reader();
        let mut matrix = match reader.matrix_type(info)? {
            MatrixType::Ternary(ty) => reader.ternary(info, shape, ty)?,
            MatrixType::Dense(float) => {
                TernaryMatrix::from_three_values(shape, reader.view(info)?, float)?
            }
        };
        if self.config.activations == Activations::Int8Token {
            matrix = matrix.collapse()?;
            if matches!(matrix.scale(), WeightScale::Groups { .. }) {
                let expected = "one scale for the whole matrix, as in the first layer and as \
                                int8 activations ask for";
                return Err(self.value_error(info, expected, "several".to_owned()));
            }
        } else if matches!(matrix.scale(), WeightScale::Tensor(_)) {
            let expected = "a scale for each group of inputs, as in the first layer";
            return Err(self.value_error(info, expected, "one scale".to_owned()));
        }
        let scale = linear.ggml_scale(layer);
        if self.files.info(&scale).is_some() {
            let (factor, info) = (self.vector(&scale, 1)?[0], self.info(&scale, None)?);
            let WeightScale::Tensor(own) = matrix.scale() else {
                unreachable!("refused when the file was opened")
            };
            let product = own * factor;
            if !(product.is_finite() && product > 0.0) {
                let expected = "a positive number, also times the matrix's own scale";
                return Err(self.value_error(info, expected, format!("{factor:?}")));
            }
            matrix = matrix.scaled(factor);
        }
        let is_query_or_key = [Q_PROJ.path, K_PROJ.path].contains(&linear.path);
        if is_query_or_key && gguf::has_interleaved_heads(self.config.architecture) {
            matrix = matrix.with_interleaved_heads(self.config.head_dim);
        }
        Ok(matrix)
    }

    /// Checks the embedding table or the LM head; returns its name.
    pub(super) fn check_ggml_table(&self, name: &str) -> Result<Vec<String>> {
        let (v, k) = (self.config.vocab_size, self.config.hidden_size);
        let info = self.info(name, None)?;
        self.check_shape(info, &[v, k])?;
        let ty = self.files.ggml_type(info)?;
        if ty == GgmlType::I2S {
            let expected = "F32, F16, BF16, Q8_0, Q6_K, Q4_0, Q4_K or a type with scales of groups";
            return Err(self.dtype_error(info, expected));
        }
        Ok(vec![name.to_owned()])
    }

    /// The embedding table or the LM head.
    pub(super) fn ggml_table(&self, name: &str, read: Read) -> Result<Table> {
        self.check_ggml_table(name)?;
        let shape = MatShape::new(self.config.vocab_size, self.config.hidden_size)?;
        let info = self.info(name, None)?;
        let ty = self.files.ggml_type(info)?;
        let data = match (ty.ternary(), ty.float()) {
            (Some(ternary), _) => {
                TableData::Groups(Box::new(self.reader().ternary(info, shape, ternary)?))
            }
            (None, Some(float)) => self.float_table(info, float, read)?,
            (None, None) => unreachable!("a type is one or the other"),
        };
        let rotation = match &self.rotations {
            Some(rotations) => rotations.of_table(info, shape.k())?,
            None => None,
        };
        Ok(Table::new(shape, data).with_rotation(rotation))
    }

    /// Bytes that a matrix takes once it is packed, scales included.
    pub(super) fn ggml_packed_bytes(&self, name: &str) -> u64 {
        let Some((info, ty)) =
            self.files.info(name).and_then(|info| Some((info, GgmlType::from_name(&info.dtype)?)))
        else {
            return 0;
        };
        let &[n, k] = info.shape.as_slice() else { return 0 };
        match (ty.ternary(), ty.float()) {
            (Some(ternary), _) => {
                let bits = if ternary.is_binary() { 1 } else { 2 };
                let group = match self.config.activations {
                    Activations::Int8Token => None,
                    _ => ternary.group(),
                };
                4 * super::packed_words(bits, group, n, k)
            }
            (None, Some(float)) => match float.group() {
                Some(group) => {
                    let arrays = if float == FloatType::Q4K { 2 } else { 1 };
                    (n * k + 4 * arrays * (n * k / group)) as u64
                }
                None => info.len_bytes,
            },
            (None, None) => 0,
        }
    }

    /// The rotations of the file's weights, checked against the model's tensors.
    pub(super) fn read_rotations(&self) -> Result<Option<Rotations>> {
        let Some(rotations) = self.files.metadata().map(Rotations::read).transpose()?.flatten()
        else {
            return Ok(None);
        };
        let naming = Naming::Gguf;
        let is_linear = |name: &str| {
            let layers = 0..self.config.num_hidden_layers;
            let layer = naming.layer_of(name).filter(|layer| layers.contains(layer));
            layer.is_some_and(|layer| {
                LINEARS.iter().any(|linear| linear.weight(naming, layer) == name)
            })
        };
        let head = naming.lm_head();
        let lm_head = if self.config.tie_word_embeddings { None } else { Some(head) };
        rotations.check_names(is_linear, naming.embedding(), lm_head)?;
        Ok(Some(rotations))
    }

    /// Whether this is a GGUF file.
    pub(super) fn is_ggml(&self) -> bool {
        self.config.weight_form == WeightForm::Ggml
    }
}
