//! `synth`: a synthetic model → a checkpoint directory, a few megabytes at a time.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use rayon::prelude::*;
use serde_json::{Value, json};
use sterna::config::{Activation, ModelConfig, WeightForm};
use sterna::format::float::f32_to_bf16;
use sterna::synthetic::SyntheticModel;
use sterna::tensor_names::{LINEARS, Naming, norms};
use sterna::weights::{LayerWeights, TernaryMatrix, WeightSource};

/// Bytes made at a time.
const PIECE_BYTES: usize = 4 << 20;

/// Writes `config.json`, `generation_config.json` and `model.safetensors`.
///
/// The files are written under another name, which becomes `directory` when they are complete.
pub(crate) fn write(model: &SyntheticModel, directory: &Path) -> anyhow::Result<()> {
    if fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some()) {
        bail!("{}: not empty", directory.display());
    }
    let mut name = directory.file_name().context("--out has no name")?.to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    let partial = Partial(directory.with_file_name(name));
    fs::create_dir_all(&partial.0).with_context(|| partial.0.display().to_string())?;

    let config = model.config();
    write_json(&partial.0.join("config.json"), &config_json(config)?)?;
    let bos = config.vocab_size.saturating_sub(256);
    let generation = json!({"bos_token_id": bos, "eos_token_id": bos + 1});
    write_json(&partial.0.join("generation_config.json"), &generation)?;
    write_tensors(model, &partial.0.join("model.safetensors"))?;

    fs::rename(&partial.0, directory).with_context(|| directory.display().to_string())
}

/// A directory that goes away unless it is renamed.
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // After the rename there is nothing here; on the way out of an error nothing else can be done.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn write_json(path: &Path, value: &Value) -> anyhow::Result<()> {
    fs::write(path, format!("{value:#}\n")).with_context(|| path.display().to_string())
}

/// `config.json`, as the original implementation writes it.
fn config_json(config: &ModelConfig) -> anyhow::Result<Value> {
    let quantization = match config.weight_form {
        WeightForm::PackedMultiply => json!({
            "quant_method": "bitnet",
            "linear_class": "autobitlinear",
            "quantization_mode": "offline",
        }),
        WeightForm::PackedDivide => json!({"quant_method": "bitnet"}),
        _ => bail!("only the packing of Hugging Face is written"),
    };
    Ok(json!({
        "architectures": [config.architecture.name()],
        "model_type": config.architecture.model_type(),
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
        // The shortest decimal of the f32, not the digits of its f64.
        "rms_norm_eps": config.rms_norm_eps.to_string().parse::<f64>()?,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "quantization_config": quantization,
    }))
}

/// A tensor of the file to be.
struct Planned {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
}

impl Planned {
    fn bf16(name: impl Into<String>, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype: "BF16", shape: shape.to_vec() }
    }

    fn len_bytes(&self) -> usize {
        let size = if self.dtype == "U8" { 1 } else { 2 };
        self.shape.iter().product::<usize>() * size
    }
}

/// The tensors in the order in which [`write_tensors`] writes their elements.
fn plan(config: &ModelConfig) -> Vec<Planned> {
    let naming = Naming::of(config);
    let vocabulary = [config.vocab_size, config.hidden_size];
    let mut tensors = vec![Planned::bf16(naming.embedding(), &vocabulary)];
    if !config.tie_word_embeddings {
        tensors.push(Planned::bf16(naming.lm_head(), &vocabulary));
    }
    tensors.push(Planned::bf16(naming.final_norm(), &[config.hidden_size]));
    for layer in 0..config.num_hidden_layers {
        for norm in norms(config) {
            tensors.push(Planned::bf16(norm.weight(naming, layer), &[(norm.len)(config)]));
        }
        for linear in LINEARS {
            let (n, k) = (linear.shape)(config);
            let shape = vec![n.div_ceil(4), k];
            tensors.push(Planned::bf16(linear.weight_scale(naming, layer), &[1]));
            tensors.push(Planned { name: linear.weight(naming, layer), dtype: "U8", shape });
        }
    }
    tensors
}

/// The safetensors header: length, JSON, spaces up to a multiple of 8.
fn header(tensors: &[Planned]) -> Vec<u8> {
    let mut offset = 0;
    let mut entries = serde_json::Map::new();
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

fn write_tensors(model: &SyntheticModel, path: &Path) -> anyhow::Result<()> {
    let config = model.config();
    let tensors = plan(config);
    let total: usize = tensors.iter().map(Planned::len_bytes).sum();
    let style = "{bar:30} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
    let bar = ProgressBar::new(total as u64).with_style(ProgressStyle::with_template(style)?);
    let file = File::create_new(path).with_context(|| path.display().to_string())?;
    let mut file = BufWriter::new(file);
    file.write_all(&header(&tensors))?;
    let mut out = bar.wrap_write(file);

    let (vocab_size, k) = (config.vocab_size, config.hidden_size);
    write_table(&mut out, vocab_size, k, |n, row| model.embedding_row(n, row))?;
    if !config.tie_word_embeddings {
        write_table(&mut out, vocab_size, k, |n, row| model.lm_head_row(n, row))?;
    }
    write_bf16(&mut out, &model.final_norm()?)?;
    for layer in 0..config.num_hidden_layers {
        let weights: LayerWeights = model.layer(layer)?;
        for (_, norm) in weights.norms() {
            write_bf16(&mut out, norm)?;
        }
        for (_, matrix) in weights.linears() {
            out.write_all(&model.stored_scale(matrix.shape().k()).to_le_bytes())?;
            write_packed(&mut out, matrix)?;
        }
    }
    out.flush().with_context(|| path.display().to_string())?;
    bar.finish();
    Ok(())
}

fn write_bf16(out: &mut impl Write, values: &[f32]) -> std::io::Result<()> {
    let bytes: Vec<u8> =
        values.iter().flat_map(|&value| f32_to_bf16(value).to_le_bytes()).collect();
    out.write_all(&bytes)
}

/// A bf16 table `[n, k]`, made in parallel, some rows at a time.
fn write_table(
    out: &mut impl Write,
    n: usize,
    k: usize,
    row: impl Fn(usize, &mut [u16]) + Sync,
) -> std::io::Result<()> {
    let rows = PIECE_BYTES.div_ceil(2 * k);
    let mut bytes = vec![0; rows * 2 * k];
    for start in (0..n).step_by(rows) {
        let bytes = &mut bytes[..rows.min(n - start) * 2 * k];
        bytes.par_chunks_exact_mut(2 * k).enumerate().for_each_init(
            || vec![0; k],
            |bits, (i, bytes)| {
                row(start + i, bits);
                for (bytes, bits) in bytes.as_chunks_mut().0.iter_mut().zip(bits) {
                    *bytes = bits.to_le_bytes();
                }
            },
        );
        out.write_all(bytes)?;
    }
    Ok(())
}

/// A ternary matrix in the "bitnet" packing of Hugging Face, U8 `[ceil(N/4), K]`: bits `2q+1..2q`
/// of byte `[r, k]` are `w + 1` of row `q·ceil(N/4) + r`; 0 where there is no such row.
fn write_packed(out: &mut impl Write, matrix: &TernaryMatrix) -> anyhow::Result<()> {
    let (n, k) = (matrix.shape().n(), matrix.shape().k());
    let packed_rows = n.div_ceil(4);
    let rows = PIECE_BYTES.div_ceil(k);
    let mut bytes = vec![0; rows * k];
    for start in (0..packed_rows).step_by(rows) {
        let bytes = &mut bytes[..rows.min(packed_rows - start) * k];
        bytes.par_chunks_exact_mut(k).enumerate().try_for_each_init(
            || vec![0; k],
            |trits, (i, bytes)| {
                bytes.fill(0);
                for quarter in 0..4 {
                    let row = quarter * packed_rows + start + i;
                    if row < n {
                        matrix.row(row, trits)?;
                        for (byte, trit) in bytes.iter_mut().zip(&*trits) {
                            *byte |= ((trit + 1) as u8) << (2 * quarter);
                        }
                    }
                }
                Ok::<_, sterna::Error>(())
            },
        )?;
        out.write_all(bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use sterna::synthetic::{tiny_bitnet, tiny_llama};
    use sterna::weights::{Checkpoint, Table, TableData};

    use super::*;

    fn bits(table: Table) -> Vec<u16> {
        let TableData::Bf16(bits) = table.into_data() else { panic!("a bf16 table") };
        bits
    }

    /// What is read back is the model that was written.
    #[test]
    fn a_checkpoint_of_the_model() {
        let mut short_quarter = tiny_bitnet();
        short_quarter.intermediate_size = 203;
        for config in [tiny_bitnet(), tiny_llama(), short_quarter] {
            let model = SyntheticModel::new(config.clone(), 11);
            let parent = tempfile::tempdir().unwrap();
            let directory = parent.path().join("model");
            write(&model, &directory).unwrap();
            let checkpoint = Checkpoint::open(&directory).unwrap();
            assert_eq!(*checkpoint.config(), config);
            assert_eq!(checkpoint.unused_tensors(), [] as [&str; 0]);
            assert_eq!(bits(checkpoint.embedding().unwrap()), bits(model.embedding().unwrap()));
            let head = |table: Option<Table>| table.map(bits);
            assert_eq!(head(checkpoint.lm_head().unwrap()), head(model.lm_head().unwrap()));
            assert_eq!(checkpoint.final_norm().unwrap(), model.final_norm().unwrap());
            for layer in 0..config.num_hidden_layers {
                let (read, made) = (checkpoint.layer(layer).unwrap(), model.layer(layer).unwrap());
                for ((norm, read), (_, made)) in read.norms().zip(made.norms()) {
                    assert_eq!(read, made, "{norm:?}");
                }
                for ((linear, read), (_, made)) in read.linears().iter().zip(made.linears()) {
                    assert_eq!(read.scale(), made.scale(), "{linear:?}");
                    let mut rows = [vec![0; made.shape().k()], vec![0; made.shape().k()]];
                    for n in 0..made.shape().n() {
                        read.row(n, &mut rows[0]).unwrap();
                        made.row(n, &mut rows[1]).unwrap();
                        assert_eq!(rows[0], rows[1], "{linear:?} row {n}");
                    }
                }
            }
            // Neither a partial directory nor an overwritten one.
            assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
            assert!(write(&model, &directory).is_err());
        }
    }
}
