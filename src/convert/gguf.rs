//! GGUF files.

use std::io::Write;
use std::path::Path;

use super::{OnBytes, Out, Summary, hf};
use crate::checkpoint::Checkpoint;
use crate::config::{Activation, Architecture, ModelConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::format::Bytes;
use crate::format::float::{f16_to_f32, f32_to_f16};
use crate::format::ggml::{GgmlType, TernaryType, i2s_tail};
use crate::format::gguf::{TensorPlan, Value, Writer};
use crate::tensor_names::{K_PROJ, LINEARS, Linear, Naming, Q_PROJ, norms};
use crate::tokenizer::{GgufVocabulary, HuggingFaceFiles, Source};
use crate::weights::{Alphabet, Table, TableData, TernaryMatrix, WeightScale, WeightSource};

/// The types that `sterna convert` writes.
pub const TARGETS: [GgmlType; 5] =
    [GgmlType::I2S, GgmlType::Tq2_0, GgmlType::Tq1_0, GgmlType::Q2_0, GgmlType::Q1_0];

/// Converts a checkpoint into a file, which appears when it is complete.
pub(super) fn convert(
    checkpoint: &Checkpoint,
    ty: GgmlType,
    out: &Path,
    progress: OnBytes<'_>,
) -> Result<Summary> {
    let io_error = |source| Error::Io { path: out.to_owned(), source };
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let vocabulary = vocabulary(checkpoint)?;
    let name = Path::new(checkpoint.files().label()).file_stem().unwrap_or_default();
    let name = name.to_string_lossy();
    let mut file = tempfile::Builder::new()
        .prefix(".sterna-convert-")
        .tempfile_in(parent)
        .map_err(|source| Error::Io { path: parent.to_owned(), source })?;
    let inner = std::io::BufWriter::with_capacity(1 << 20, file.as_file_mut());
    let summary = write_gguf(checkpoint, &name, vocabulary.as_ref(), ty, (out, inner), progress)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // A temporary file is private.
        let permissions = std::fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(permissions).map_err(io_error)?;
    }
    file.persist(out).map_err(|error| io_error(error.error))?;
    Ok(summary)
}

/// The tokenizer of a checkpoint in GGUF's terms; `None` if it has none.
fn vocabulary(checkpoint: &Checkpoint) -> Result<Option<GgufVocabulary>> {
    let files = checkpoint.files();
    if let Some(metadata) = files.metadata() {
        let is_there = GgufVocabulary::is_in(metadata);
        return is_there.then(|| GgufVocabulary::from_metadata(metadata)).transpose();
    }
    let file = |name: &str| -> Result<Option<(String, Bytes)>> {
        Ok(files.file(name)?.map(|bytes| (files.join(name), bytes)))
    };
    fn source(file: &(String, Bytes)) -> Source<'_> {
        Source { file: &file.0, bytes: &file.1 }
    }
    let Some(tokenizer) = file("tokenizer.json")? else { return Ok(None) };
    let tokenizer_config = file("tokenizer_config.json")?;
    let chat_template = file("chat_template.jinja")?;
    let configs = [file("config.json")?, file("generation_config.json")?];
    let configs: Vec<_> = configs.iter().flatten().map(source).collect();
    let files = HuggingFaceFiles {
        tokenizer: source(&tokenizer),
        tokenizer_config: tokenizer_config.as_ref().map(source),
        chat_template: chat_template.as_ref().map(source),
        configs: &configs,
    };
    let config = checkpoint.config();
    GgufVocabulary::from_hugging_face(files, architecture(config), config.vocab_size).map(Some)
}

/// Writes a model as a GGUF file whose linear layers (and tables with scales of groups) are of the
/// ternary type `ty`; other tables keep their precision, norms are F32.
///
/// # Errors
/// [`Error::Conversion`] if the type cannot hold the model, before anything is written;
/// [`Error::Io`]; or as reading the model.
///
/// # Panics
/// If `ty` is no ternary or binary type.
pub fn write_gguf<W: Write>(
    source: &dyn WeightSource,
    name: &str,
    vocabulary: Option<&GgufVocabulary>,
    ty: GgmlType,
    (path, out): (&Path, W),
    progress: OnBytes<'_>,
) -> Result<Summary> {
    let encoder = Encoder { ty, ternary: ty.ternary().expect("a ternary or binary type") };
    let config = source.config();
    let rope_factors = rope_factors(source)?;
    let mut keys = keys(config, name, ty)?;
    for (key, value) in vocabulary.iter().flat_map(|vocabulary| vocabulary.to_metadata()) {
        keys.push((key.to_owned(), value));
    }
    let mut summary = Summary::default();
    let plans = encoder.plan(source, rope_factors.is_some(), &mut summary)?;
    let total = plans.iter().filter_map(|plan| plan.ty.len_bytes(&plan.shape)).sum();

    let keys: Vec<(&str, Value)> =
        keys.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
    let io_error = |source| Error::Io { path: path.to_owned(), source };
    let writer = Tensors(Writer::new(out, &keys, &plans).map_err(io_error)?);
    let mut out = Out { path, inner: writer, written: 0, total, progress };
    encoder.table(&mut out, &source.embedding()?)?;
    if let Some(head) = source.lm_head()? {
        encoder.table(&mut out, &head)?;
    }
    floats(&mut out, &source.final_norm()?)?;
    if let Some(factors) = &rope_factors {
        floats(&mut out, factors)?;
    }
    for layer in 0..config.num_hidden_layers {
        let weights = source.layer(layer)?;
        for (_, norm) in weights.norms() {
            floats(&mut out, norm)?;
        }
        for (linear, matrix) in weights.linears() {
            if let Some(norm) = &matrix.input().norm {
                floats(&mut out, norm)?;
            }
            encoder.matrix(&mut out, matrix, row_order(config, &linear))?;
        }
    }
    summary.bytes = out.written;
    out.inner.0.finish().map_err(io_error)?;
    Ok(summary)
}

/// The writer as [`Out`] uses one; each write is a part of the tensor whose turn it is.
struct Tensors<W>(Writer<W>);

impl<W: Write> Write for Tensors<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// `general.architecture`.
fn architecture(config: &ModelConfig) -> &'static str {
    match (config.architecture, config.hidden_act) {
        (Architecture::BitNet | Architecture::Bitnet1bitLlm, Activation::Relu2) => "bitnet-b1.58",
        // Its readers take SiLU, as the 1bitLLM models have.
        (Architecture::BitNet | Architecture::Bitnet1bitLlm, Activation::Silu) => "bitnet",
        (Architecture::Llama, _) => "llama",
        (Architecture::Qwen3, _) => "qwen3",
    }
}

/// The keys of the model; those of the tokenizer come after them.
fn keys(config: &ModelConfig, name: &str, ty: GgmlType) -> Result<Vec<(String, Value)>> {
    let arch = architecture(config);
    let is_default = config.hidden_act == config.architecture.default_hidden_act();
    if matches!(config.architecture, Architecture::Llama | Architecture::Qwen3) && !is_default {
        return Err(refused(format!("{arch} has SiLU in GGUF, this model another activation")));
    }
    if config.linear_norm_eps.is_some_and(|eps| eps != config.rms_norm_eps) {
        return Err(refused("its norms have two different eps".to_owned()));
    }
    let number = |value: usize| Value::U32(value as u32);
    let text = |value: &str| Value::String(value.to_owned());
    let mut keys = vec![
        ("general.architecture".to_owned(), text(arch)),
        ("general.name".to_owned(), text(name)),
        ("general.quantization_version".to_owned(), Value::U32(2)),
    ];
    // A hint, and with two meanings where it is not given here.
    let file_type = match ty {
        GgmlType::I2S => Some(40),
        GgmlType::Tq1_0 => Some(36),
        GgmlType::Tq2_0 => Some(37),
        _ => None,
    };
    keys.extend(file_type.map(|hint| ("general.file_type".to_owned(), Value::U32(hint))));
    let mut add = |key: &str, value: Value| keys.push((format!("{arch}.{key}"), value));
    add("vocab_size", number(config.vocab_size));
    add("context_length", number(config.max_position_embeddings));
    add("embedding_length", number(config.hidden_size));
    add("block_count", number(config.num_hidden_layers));
    add("feed_forward_length", number(config.intermediate_size));
    add("attention.head_count", number(config.num_attention_heads));
    add("attention.head_count_kv", number(config.num_key_value_heads));
    add("attention.key_length", number(config.head_dim));
    add("attention.value_length", number(config.head_dim));
    add("attention.layer_norm_rms_epsilon", Value::F32(config.rms_norm_eps));
    add("rope.dimension_count", number(config.head_dim));
    add("rope.freq_base", Value::F32(config.rope_theta));
    if config.has_sub_norms() {
        let name = match config.hidden_act {
            Activation::Relu2 => "relu2",
            Activation::Silu => "silu",
        };
        add("hidden_activation", text(name));
    }
    match config.rope_scaling {
        // The frequencies of Llama 3 stand in a tensor.
        RopeScaling::None | RopeScaling::Llama3 { .. } => {}
        RopeScaling::Linear { factor } => {
            add("rope.scaling.type", text("linear"));
            add("rope.scaling.factor", Value::F32(factor));
        }
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
            add("rope.scaling.type", text("yarn"));
            add("rope.scaling.factor", Value::F32(factor));
            let original = number(original_context as usize);
            add("rope.scaling.original_context_length", original);
            add("rope.scaling.yarn_beta_fast", Value::F32(beta_fast));
            add("rope.scaling.yarn_beta_slow", Value::F32(beta_slow));
            let usual = RopeScaling::yarn_attention_factor(factor);
            if attention_factor != usual {
                add("rope.scaling.attn_factor", Value::F32(attention_factor / usual));
            }
        }
    }
    Ok(keys)
}

/// What divides the frequencies that the keys give: the stretching of Llama 3, which has no key, or
/// the factors that a GGUF file had.
fn rope_factors(source: &dyn WeightSource) -> Result<Option<Vec<f32>>> {
    let config = source.config();
    let of_keys = match config.rope_scaling {
        RopeScaling::Llama3 { .. } => RopeScaling::None,
        other => other,
    };
    let plain = cpu_ref::rope::frequencies(config.rope_theta, config.head_dim, of_keys).inv_freq;
    let scaled = source.frequencies()?.inv_freq;
    if plain == scaled {
        return Ok(None);
    }
    Ok(Some(plain.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect()))
}

/// The row of the model that stands in row `n` of the file: queries and keys of `llama` are
/// reordered for interleaved RoPE.
fn row_order(config: &ModelConfig, linear: &Linear) -> impl Fn(usize) -> usize + Sync + use<> {
    let is_query_or_key = [Q_PROJ.path, K_PROJ.path].contains(&linear.path);
    let is_reordered = is_query_or_key && config.architecture == Architecture::Llama;
    let dim = config.head_dim;
    move |n| match is_reordered {
        true => n / dim * dim + n % dim / 2 + if n % 2 == 0 { 0 } else { dim / 2 },
        false => n,
    }
}

fn refused(problem: String) -> Error {
    Error::Conversion { problem }
}

/// Writes matrices in one ternary type.
struct Encoder {
    ty: GgmlType,
    ternary: TernaryType,
}

impl Encoder {
    /// The tensors in the order in which [`write_gguf`] writes them; refuses what the type cannot
    /// hold, and counts what it rounds.
    fn plan(
        &self,
        source: &dyn WeightSource,
        has_rope_factors: bool,
        summary: &mut Summary,
    ) -> Result<Vec<TensorPlan>> {
        let config = source.config();
        let naming = Naming::Gguf;
        let plan = |name: &str, ty, shape: &[usize]| TensorPlan {
            name: name.to_owned(),
            ty,
            shape: shape.to_vec(),
        };
        let float = |name: &str, len| plan(name, GgmlType::F32, &[len]);
        let mut table = |name: &str, table: &Table| {
            if table.rotation().is_some() {
                return Err(refused(format!("{name} is stored rotated")));
            }
            let ty = match table.data() {
                TableData::Bf16(_) => GgmlType::Bf16,
                TableData::F16(_) => GgmlType::F16,
                TableData::F32(_) => GgmlType::F32,
                TableData::Codes(_) => {
                    return Err(refused(format!("{name} is quantised; take the original file")));
                }
                TableData::Groups(matrix) => {
                    self.check(name, matrix, summary)?;
                    self.ty
                }
                TableData::Stored(_) => unreachable!("not of `embedding` and `lm_head`"),
            };
            Ok(plan(name, ty, &[table.shape().n(), table.shape().k()]))
        };
        let mut plans = vec![table(naming.embedding(), &source.embedding()?)?];
        if let Some(head) = source.lm_head()? {
            plans.push(table(naming.lm_head(), &head)?);
        }
        plans.push(float(naming.final_norm(), config.hidden_size));
        if has_rope_factors {
            plans.push(float("rope_freqs.weight", config.head_dim / 2));
        }
        for layer in 0..config.num_hidden_layers {
            for norm in norms(config) {
                plans.push(float(&norm.weight(naming, layer), (norm.len)(config)));
            }
            let weights = source.layer(layer)?;
            for ((_, matrix), linear) in weights.linears().into_iter().zip(LINEARS) {
                let (n, k) = (matrix.shape().n(), matrix.shape().k());
                let name = linear.weight(naming, layer);
                if matrix.input().norm.is_some() {
                    plans.push(float(&linear.norm(naming, layer), k));
                }
                self.check(&name, matrix, summary)?;
                plans.push(plan(&name, self.ty, &[n, k]));
            }
        }
        Ok(plans)
    }

    /// Refuses a matrix that the type cannot hold, and counts what it rounds.
    fn check(&self, name: &str, matrix: &TernaryMatrix, summary: &mut Summary) -> Result<()> {
        let k = matrix.shape().k();
        let type_name = self.ty.name();
        let problem = |problem: String| Err(refused(format!("{name}: {problem}")));
        if self.ternary.row_bytes(k).is_none() {
            return problem(format!("{k} columns are no whole number of {type_name} blocks"));
        }
        if self.ternary.is_binary() && matrix.alphabet() != Alphabet::Binary {
            return problem(format!("{type_name} is binary, the matrix ternary"));
        }
        if matrix.input().rotation.is_some() {
            return problem("stored rotated".to_owned());
        }
        match (matrix.scale(), self.ternary.group()) {
            (WeightScale::Tensor(_), None) => Ok(()),
            (WeightScale::Tensor(scale), Some(_)) => {
                let rounded = f16_to_f32(f32_to_f16(scale));
                let change = (rounded - scale).abs() / scale.abs();
                // Beyond the range of an IEEE half, or where it has fewer digits.
                if change.is_nan() || change > super::HALF_ROUNDING {
                    return problem(format!("the scale {scale:?} is no IEEE half"));
                }
                summary.rounded_scales += usize::from(change > 0.0);
                summary.largest_rounding = summary.largest_rounding.max(change);
                Ok(())
            }
            (WeightScale::Groups { group }, Some(wanted)) if group % wanted == 0 => Ok(()),
            (WeightScale::Groups { group }, wanted) => {
                let wanted = wanted.map_or("for the whole matrix".to_owned(), |wanted| {
                    format!("for every {wanted} inputs")
                });
                problem(format!(
                    "it has a scale for every {group} inputs, {type_name} one {wanted}"
                ))
            }
        }
    }

    fn table<W: Write>(&self, out: &mut Out<'_, W>, table: &Table) -> Result<()> {
        match table.data() {
            TableData::Groups(matrix) => self.matrix(out, matrix, |n| n),
            _ => hf::write_table(out, table),
        }
    }

    /// A matrix, row `n` of the file from row `order(n)`.
    fn matrix<W: Write>(
        &self,
        out: &mut Out<'_, W>,
        matrix: &TernaryMatrix,
        order: impl Fn(usize) -> usize + Sync,
    ) -> Result<()> {
        let (n, k) = (matrix.shape().n(), matrix.shape().k());
        let row_bytes = self.ternary.row_bytes(k).expect("checked by the plan");
        let row_scales = self.ternary.row_scales(k);
        let scratch = || (vec![0; k], vec![0; matrix.groups()], vec![0; row_scales]);
        out.rows(n, row_bytes, scratch, |n, bytes, (trits, stored, scales)| {
            matrix.row_with_scales(order(n), trits, stored)?;
            match matrix.scale() {
                WeightScale::Tensor(scale) => scales.fill(f32_to_f16(scale)),
                WeightScale::Groups { .. } => {
                    let repeat = scales.len() / stored.len();
                    for (scales, &stored) in scales.chunks_exact_mut(repeat).zip(&*stored) {
                        scales.fill(stored);
                    }
                }
            }
            self.ternary.encode_row(trits, scales, bytes);
            Ok(())
        })?;
        match (self.ternary.group(), matrix.scale()) {
            (None, WeightScale::Tensor(scale)) => out.write(&i2s_tail(scale)),
            _ => Ok(()),
        }
    }
}

fn floats<W: Write>(out: &mut Out<'_, W>, values: &[f32]) -> Result<()> {
    out.write(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
}
