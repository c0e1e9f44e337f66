//! The packed form of Hugging Face: `config.json`, tokenizer files and one `model.safetensors`.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{OnBytes, Out, Summary};
use crate::checkpoint::Checkpoint;
use crate::config::{Activation, Activations, Architecture, ModelConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::format::float::bf16_to_f32;
use crate::format::float::f32_to_bf16;
use crate::tensor_names::{LINEARS, Naming, norms};
use crate::weights::{Table, TableData, TernaryMatrix, WeightScale, WeightSource};

/// The files that make text of a model, copied as they are.
const SIDE_FILES: [&str; 7] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
];

/// Converts a checkpoint of Hugging Face into a directory.
pub(super) fn convert(
    checkpoint: &Checkpoint,
    out: &Path,
    progress: OnBytes<'_>,
) -> Result<Summary> {
    let files = checkpoint.files();
    if files.metadata().is_some() {
        return Err(refused(
            "a GGUF file has no tokenizer.json; convert the Hugging Face checkpoint instead",
        ));
    }
    let io_error = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Io { path, source }
    };
    // Replacing a directory takes all of it away: only that of a model may go.
    if out.is_dir()
        && !out.join("config.json").exists()
        && fs::read_dir(out).map_err(io_error(out))?.next().is_some()
    {
        return Err(refused("the directory to be replaced holds other things than a model"));
    }
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Under another name in the same file system, which goes away unless it is renamed.
    let partial = tempfile::Builder::new()
        .prefix(".sterna-convert-")
        .tempdir_in(parent)
        .map_err(io_error(parent))?;
    let summary = write_hf(checkpoint, partial.path(), progress)?;
    for name in SIDE_FILES {
        if let Some(bytes) = files.file(name)? {
            let path = partial.path().join(name);
            fs::write(&path, &*bytes).map_err(io_error(&path))?;
        }
    }
    replace_directory(partial, out)?;
    Ok(summary)
}

/// Moves a finished directory to its name, over an older one if there is one.
fn replace_directory(partial: tempfile::TempDir, out: &Path) -> Result<()> {
    let io_error = |source| Error::Io { path: out.to_owned(), source };
    // The older one steps aside first: a rename does not replace a directory that is not empty.
    let older = match out.symlink_metadata() {
        Err(_) => None,
        Ok(metadata) if metadata.is_dir() => {
            let aside = partial.path().with_extension("old");
            fs::rename(out, &aside).map_err(io_error)?;
            Some(aside)
        }
        Ok(_) => {
            fs::remove_file(out).map_err(io_error)?;
            None
        }
    };
    let path = partial.keep();
    if let Err(source) = fs::rename(&path, out) {
        if let Some(aside) = &older {
            fs::rename(aside, out).map_err(io_error)?;
        }
        fs::remove_dir_all(&path).map_err(io_error)?;
        return Err(io_error(source));
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // A temporary directory is private.
        fs::set_permissions(out, fs::Permissions::from_mode(0o755)).map_err(io_error)?;
    }
    match older {
        Some(aside) => fs::remove_dir_all(&aside).map_err(io_error),
        None => Ok(()),
    }
}

/// Writes `config.json` and `model.safetensors` of a model into an empty directory.
///
/// Scales are stored as bf16 where that is exact, else as F32; either multiplies.
///
/// # Errors
/// [`Error::Conversion`] for a model with more than one scale a matrix, or rotated weights;
/// [`Error::Io`]; or as reading the model.
pub fn write_hf(
    source: &dyn WeightSource,
    directory: &Path,
    progress: OnBytes<'_>,
) -> Result<Summary> {
    let config = source.config();
    if config.activations != Activations::Int8Token {
        return Err(refused(
            "the packing of Hugging Face has one scale a matrix, this model one for each group of \
             inputs; convert it to GGUF (Q1_0 or Q2_0)",
        ));
    }
    let path = directory.join("config.json");
    fs::write(&path, format!("{:#}\n", config_json(config)))
        .map_err(|source| Error::Io { path, source })?;

    let path = directory.join("model.safetensors");
    let tensors = plan(source)?;
    let header = header(&tensors);
    let total = header.len() as u64 + tensors.iter().map(Planned::len_bytes).sum::<u64>();
    let file =
        File::create_new(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
    let inner = BufWriter::new(file);
    let mut out = Out { path: &path, inner, written: 0, total, progress };
    out.write(&header)?;
    write_table(&mut out, &source.embedding()?)?;
    if let Some(head) = source.lm_head()? {
        write_table(&mut out, &head)?;
    }
    write_floats(&mut out, &source.final_norm()?)?;
    for layer in 0..config.num_hidden_layers {
        let weights = source.layer(layer)?;
        for (_, norm) in weights.norms() {
            write_floats(&mut out, norm)?;
        }
        for (_, matrix) in weights.linears() {
            if let Some(norm) = &matrix.input().norm {
                write_floats(&mut out, norm)?;
            }
            write_floats(&mut out, &[tensor_scale(matrix)?])?;
            write_packed(&mut out, matrix)?;
        }
    }
    let bytes = out.written;
    out.finish()?;
    Ok(Summary { bytes, ..Summary::default() })
}

fn refused(problem: &str) -> Error {
    Error::Conversion { problem: problem.to_owned() }
}

fn tensor_scale(matrix: &TernaryMatrix) -> Result<f32> {
    if matrix.input().rotation.is_some() {
        return Err(refused("its weights are rotated, which Hugging Face's classes do not know"));
    }
    match matrix.scale() {
        WeightScale::Tensor(scale) => Ok(scale),
        WeightScale::Groups { .. } => Err(refused("a matrix has more than one scale")),
    }
}

/// `config.json` as the original classes read it. The class of 2B4T computes what the 1bitLLM class
/// does, with SiLU and under its own names of the sub-norms.
fn config_json(config: &ModelConfig) -> Value {
    let architecture = match config.architecture {
        Architecture::Bitnet1bitLlm => Architecture::BitNet,
        other => other,
    };
    let mut quantization = json!({
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": null,
    });
    if let Some(eps) = config.linear_norm_eps {
        quantization["use_rms_norm"] = true.into();
        quantization["rms_norm_eps"] = decimal(eps);
    }
    json!({
        "architectures": [architecture.name()],
        "model_type": architecture.model_type(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": match config.hidden_act {
            Activation::Relu2 => "relu2",
            Activation::Silu => "silu",
        },
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": decimal(config.rms_norm_eps),
        "rope_theta": decimal(config.rope_theta),
        "rope_scaling": rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": false,
        "torch_dtype": "bfloat16",
        "quantization_config": quantization,
    })
}

/// The shortest decimal of the f32, not the digits of its f64.
fn decimal(value: f32) -> Value {
    let shortest = value.to_string().parse::<f64>().unwrap_or_else(|_| value.into());
    json!(shortest)
}

fn rope_scaling(scaling: RopeScaling) -> Value {
    let object = |kind: &str, numbers: &[(&str, f32)]| {
        let mut object = Map::from_iter([("rope_type".to_owned(), kind.into())]);
        object.extend(numbers.iter().map(|&(key, value)| (key.to_owned(), decimal(value))));
        Value::from(object)
    };
    match scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => object("linear", &[("factor", factor)]),
        RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
            object(
                "yarn",
                &[
                    ("factor", factor),
                    ("original_max_position_embeddings", original_context),
                    ("beta_fast", beta_fast),
                    ("beta_slow", beta_slow),
                    ("attention_factor", attention_factor),
                ],
            )
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            object(
                "llama3",
                &[
                    ("factor", factor),
                    ("low_freq_factor", low_freq_factor),
                    ("high_freq_factor", high_freq_factor),
                    ("original_max_position_embeddings", original_context),
                ],
            )
        }
    }
}

/// A tensor of the file to be.
struct Planned {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
}

impl Planned {
    /// Floats that are written as bf16 if that is exact.
    fn floats(name: String, values: &[f32]) -> Self {
        let dtype = if is_bf16(values) { "BF16" } else { "F32" };
        Self { name, dtype, shape: vec![values.len()] }
    }

    fn len_bytes(&self) -> u64 {
        let size = match self.dtype {
            "U8" => 1,
            "F32" => 4,
            _ => 2,
        };
        self.shape.iter().map(|&n| n as u64).product::<u64>() * size
    }
}

fn is_bf16(values: &[f32]) -> bool {
    values.iter().all(|&value| bf16_to_f32(f32_to_bf16(value)) == value)
}

/// The tensors in the order in which [`write_hf`] writes their elements.
fn plan(source: &dyn WeightSource) -> Result<Vec<Planned>> {
    let config = source.config();
    let naming = Naming::HuggingFace;
    let table = |name: &str, table: &Table| {
        let dtype = match table.data() {
            TableData::Bf16(_) => "BF16",
            TableData::F16(_) => "F16",
            TableData::F32(_) => "F32",
            TableData::Codes(_) | TableData::Groups(_) => {
                return Err(refused("its embedding table is quantised"));
            }
            TableData::Stored(_) => unreachable!("not of `embedding` and `lm_head`"),
        };
        let shape = vec![table.shape().n(), table.shape().k()];
        Ok(Planned { name: name.to_owned(), dtype, shape })
    };
    let mut tensors = vec![table(naming.embedding(), &source.embedding()?)?];
    if let Some(head) = source.lm_head()? {
        tensors.push(table(naming.lm_head(), &head)?);
    }
    tensors.push(Planned::floats(naming.final_norm().to_owned(), &source.final_norm()?));
    for layer in 0..config.num_hidden_layers {
        let weights = source.layer(layer)?;
        for ((_, values), norm) in weights.norms().zip(norms(config)) {
            tensors.push(Planned::floats(norm.weight(naming, layer), values));
        }
        for ((_, matrix), linear) in weights.linears().into_iter().zip(LINEARS) {
            if let Some(values) = &matrix.input().norm {
                tensors.push(Planned::floats(linear.norm(naming, layer), values));
            }
            let scale = linear.weight_scale(naming, layer);
            tensors.push(Planned::floats(scale, &[tensor_scale(matrix)?]));
            let shape = vec![matrix.shape().n().div_ceil(4), matrix.shape().k()];
            tensors.push(Planned { name: linear.weight(naming, layer), dtype: "U8", shape });
        }
    }
    Ok(tensors)
}

/// The safetensors header: length, JSON, spaces up to a multiple of 8.
fn header(tensors: &[Planned]) -> Vec<u8> {
    let mut offset = 0;
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    for tensor in tensors {
        let end = offset + tensor.len_bytes();
        entries.insert(
            tensor.name.clone(),
            json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}),
        );
        offset = end;
    }
    let mut json = Value::from(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
}

fn write_floats<W: Write>(out: &mut Out<'_, W>, values: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = if is_bf16(values) {
        values.iter().flat_map(|&value| f32_to_bf16(value).to_le_bytes()).collect()
    } else {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    };
    out.write(&bytes)
}

/// A table in the precision it has.
pub(super) fn write_table<W: Write>(out: &mut Out<'_, W>, table: &Table) -> Result<()> {
    match table.data() {
        TableData::Bf16(bits) | TableData::F16(bits) => {
            bits.chunks(super::PIECE_BYTES / 2).try_for_each(|piece| {
                out.write(&piece.iter().flat_map(|bits| bits.to_le_bytes()).collect::<Vec<_>>())
            })
        }
        TableData::F32(values) => values.chunks(super::PIECE_BYTES / 4).try_for_each(|piece| {
            out.write(&piece.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
        }),
        TableData::Codes(_) | TableData::Groups(_) => {
            Err(refused("its embedding table is quantised"))
        }
        TableData::Stored(_) => unreachable!("not of `embedding` and `lm_head`"),
    }
}

/// A ternary matrix in the "bitnet" packing, U8 `[ceil(N/4), K]`: bits `2q+1..2q` of byte `[r, k]`
/// are `w + 1` of row `q·ceil(N/4) + r`; 0 where there is no such row.
fn write_packed<W: Write>(out: &mut Out<'_, W>, matrix: &TernaryMatrix) -> Result<()> {
    let (n, k) = (matrix.shape().n(), matrix.shape().k());
    let packed_rows = n.div_ceil(4);
    out.rows(
        packed_rows,
        k,
        || vec![0; k],
        |r, bytes, trits| {
            bytes.fill(0);
            for quarter in 0..4 {
                let row = quarter * packed_rows + r;
                if row < n {
                    matrix.row(row, trits)?;
                    for (byte, trit) in bytes.iter_mut().zip(&*trits) {
                        *byte |= ((trit + 1) as u8) << (2 * quarter);
                    }
                }
            }
            Ok(())
        },
    )
}
