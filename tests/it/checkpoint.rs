//! Checkpoints: the golden ones decode as the original implementation decodes them, and every kind
//! of broken one is refused with a message that says where.

use std::path::{Path, PathBuf};

use sterna::config::WeightForm;
use sterna::format::float::{bf16_to_f32, f32_to_bf16};
use sterna::format::{Dtype, ModelFiles};
use sterna::layout::{Layout, Packed};
use sterna::tensor_names::Naming;
use sterna::weights::{Checkpoint, Table, TableData, TernaryMatrix, WeightScale, WeightSource};

/// The one scale of a matrix that has one.
fn scale_of(matrix: &TernaryMatrix) -> f32 {
    let WeightScale::Tensor(scale) = matrix.scale() else { panic!("one scale for the matrix") };
    scale
}

/// The elements of a bf16 table.
fn bf16(table: &Table) -> &[u16] {
    let TableData::Bf16(bits) = table.data() else { panic!("a bf16 table") };
    bits
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

pub(super) fn trits(matrix: &TernaryMatrix) -> Vec<i8> {
    let k = matrix.shape().k();
    let mut out = vec![0; matrix.shape().len()];
    for (n, row) in out.chunks_exact_mut(k).enumerate() {
        matrix.row(n, row).unwrap();
    }
    out
}

/// A BitNet of one layer whose every byte can be spelled out: hidden 4, two query heads and one
/// key/value head of 2, MLP of 6 (no multiple of 4), vocabulary of 5.
#[derive(Clone)]
pub(super) struct Tiny {
    config: serde_json::Value,
    tensors: Vec<Tensor>,
}

#[derive(Clone)]
pub(super) struct Tensor {
    name: String,
    dtype: &'static str,
    pub(super) shape: Vec<usize>,
    pub(super) bytes: Vec<u8>,
}

const ONE: [u8; 2] = [0x80, 0x3f];

impl Tiny {
    pub(super) fn bitnet() -> Self {
        let mut tiny = Self {
            config: serde_json::json!({
                "architectures": ["BitNetForCausalLM"],
                "model_type": "bitnet",
                "vocab_size": 5,
                "hidden_size": 4,
                "intermediate_size": 6,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "tie_word_embeddings": true,
                "quantization_config": {
                    "quant_method": "bitnet",
                    "linear_class": "autobitlinear",
                    "quantization_mode": "offline",
                },
            }),
            tensors: Vec::new(),
        };
        tiny.add("model.embed_tokens.weight", "BF16", &[5, 4], &ONE);
        tiny.add("model.norm.weight", "BF16", &[4], &ONE);
        let layer = "model.layers.0";
        tiny.add(&format!("{layer}.input_layernorm.weight"), "BF16", &[4], &ONE);
        tiny.add(&format!("{layer}.post_attention_layernorm.weight"), "BF16", &[4], &ONE);
        tiny.add(&format!("{layer}.self_attn.attn_sub_norm.weight"), "BF16", &[4], &ONE);
        tiny.add(&format!("{layer}.mlp.ffn_sub_norm.weight"), "BF16", &[6], &ONE);
        for (path, rows, k) in [
            ("self_attn.q_proj", 1, 4),
            ("self_attn.k_proj", 1, 4),
            ("self_attn.v_proj", 1, 4),
            ("self_attn.o_proj", 1, 4),
            ("mlp.gate_proj", 2, 4),
            ("mlp.up_proj", 2, 4),
            ("mlp.down_proj", 1, 6),
        ] {
            tiny.add(&format!("{layer}.{path}.weight"), "U8", &[rows, k], &[0x86]);
            tiny.add(&format!("{layer}.{path}.weight_scale"), "BF16", &[1], &ONE);
        }
        tiny
    }

    fn llama() -> Self {
        let mut tiny = Self::bitnet();
        tiny.set("architectures", serde_json::json!(["LlamaForCausalLM"]));
        tiny.set("model_type", serde_json::json!("llama"));
        tiny.set("quantization_config", serde_json::json!({"quant_method": "bitnet"}));
        tiny.tensors.retain(|tensor| !tensor.name.contains("_sub_norm"));
        tiny
    }

    pub(super) fn set(&mut self, key: &str, value: serde_json::Value) {
        self.config[key] = value;
    }

    /// Adds a tensor whose every element is `element`.
    fn add(&mut self, name: &str, dtype: &'static str, shape: &[usize], element: &[u8]) {
        let bytes = element.repeat(shape.iter().product());
        self.tensors.push(Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes });
    }

    pub(super) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name.ends_with(name)).unwrap()
    }

    /// Makes the MLP `n` wide, its gate and up matrices of these bytes, its down matrix of zeros.
    pub(super) fn set_gate(&mut self, n: usize, packed: &[u8]) {
        self.set("intermediate_size", n.into());
        for name in ["gate_proj.weight", "up_proj.weight"] {
            let tensor = self.tensor(name);
            tensor.shape = vec![n.div_ceil(4), 4];
            tensor.bytes = packed.to_vec();
        }
        let (down, norm) = ([1, n], [n]);
        for (name, shape, element) in [
            ("down_proj.weight", &down[..], &[0x55][..]),
            ("ffn_sub_norm.weight", &norm[..], &ONE[..]),
        ] {
            let tensor = self.tensor(name);
            tensor.shape = shape.to_vec();
            tensor.bytes = element.repeat(shape.iter().product());
        }
    }

    fn remove(&mut self, name: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|tensor| !tensor.name.ends_with(name));
        assert_eq!(self.tensors.len() + 1, before);
    }

    pub(super) fn write(&self, directory: &Path) {
        std::fs::write(directory.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(directory.join("model.safetensors"), safetensors(&self.tensors)).unwrap();
    }

    /// The message of the first error in opening the checkpoint and reading all of it, with the
    /// directory's path taken out; or "fine".
    fn verdict(&self) -> String {
        let directory = tempfile::tempdir().unwrap();
        self.write(directory.path());
        verdict(directory.path())
    }
}

/// A safetensors file, spelled out: length, JSON, elements.
fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for Tensor { name, dtype, shape, bytes } in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let info = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), info);
        data.extend(bytes);
    }
    with_header(&serde_json::Value::from(header).to_string(), &data)
}

fn with_header(json: &str, data: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json.as_bytes(), data].concat()
}

/// Opens a checkpoint and reads every weight.
fn read_all(directory: &Path) -> sterna::Result<()> {
    read_weights(&Checkpoint::open(directory)?)
}

fn read_weights(checkpoint: &Checkpoint) -> sterna::Result<()> {
    checkpoint.embedding()?;
    checkpoint.lm_head()?;
    checkpoint.final_norm()?;
    for layer in 0..checkpoint.config().num_hidden_layers {
        for (_, matrix) in checkpoint.layer(layer)?.linears() {
            Packed::try_pack(Layout::I2, matrix.shape(), |n, out| matrix.row(n, out))?;
        }
    }
    Ok(())
}

fn verdict(directory: &Path) -> String {
    let Err(error) = read_all(directory) else {
        return "fine".to_owned();
    };
    let message = error.to_string();
    assert!(!message.contains('\n'), "{message}");
    let prefix = directory.display().to_string();
    let message = message.strip_prefix(&prefix).expect("the message begins with the path");
    message.trim_start_matches(['/', '\\']).replace(&prefix, "DIR")
}

#[test]
fn the_tiny_checkpoints_are_fine() {
    assert_eq!(Tiny::bitnet().verdict(), "fine");
    assert_eq!(Tiny::llama().verdict(), "fine");
}

/// Worked example A: one column of four rows, and example B: eight rows of two columns.
#[test]
fn packed_rows_are_quarters_of_the_matrix() {
    let directory = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::bitnet();
    // Rows +1, 0, −1, −1 in each column.
    tiny.tensor("q_proj.weight").bytes.fill(0x06);
    // Eight rows of two columns, with two columns of zeros beside them.
    tiny.set_gate(8, &[0x86, 0x85, 0x55, 0x55, 0x18, 0x62, 0x55, 0x55]);
    tiny.write(directory.path());

    let layer = Checkpoint::open(directory.path()).unwrap().layer(0).unwrap();
    #[rustfmt::skip]
    assert_eq!(trits(&layer.q_proj), [
        1, 1, 1, 1,
        0, 0, 0, 0,
        -1, -1, -1, -1,
        -1, -1, -1, -1,
    ]);
    let example_b = [[1, 0], [-1, 1], [0, 0], [1, -1], [-1, -1], [0, 1], [1, 1], [-1, 0]];
    let expected: Vec<i8> = example_b.iter().flat_map(|&[a, b]| [a, b, 0, 0]).collect();
    assert_eq!(trits(&layer.gate_proj), expected);
    assert_eq!(trits(&layer.down_proj), [0; 32]);
}

/// Rows past the last are never read, whatever their bits.
#[test]
fn a_short_last_quarter_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let mut tiny = Tiny::bitnet();
    // N = 6, two packed rows: quarters hold rows (0, 1), (2, 3), (4, 5) and nothing. Code 3 there.
    tiny.tensor("gate_proj.weight").bytes = [[0b11_00_01_10; 4], [0b11_10_00_01; 4]].concat();
    // N = 2, one packed row: two quarters.
    tiny.tensor("k_proj.weight").bytes = vec![0b11_11_00_10; 4];
    tiny.write(directory.path());
    let layer = Checkpoint::open(directory.path()).unwrap().layer(0).unwrap();
    let rows: Vec<i8> = trits(&layer.gate_proj).chunks(4).map(|row| row[0]).collect();
    assert_eq!(rows, [1, 0, 0, -1, -1, 1]);
    assert_eq!(trits(&layer.k_proj), [1, 1, 1, 1, -1, -1, -1, -1]);
}

#[test]
fn the_scale_multiplies_or_divides_as_the_configuration_says() {
    let stored = 0.75f32;
    for (mut tiny, expected) in [(Tiny::bitnet(), stored), (Tiny::llama(), 1.0 / stored)] {
        let directory = tempfile::tempdir().unwrap();
        let scale = tiny.tensor("q_proj.weight_scale");
        // Writers differ in type and rank.
        scale.dtype = "F32";
        scale.shape = vec![];
        scale.bytes = stored.to_le_bytes().to_vec();
        let scale = tiny.tensor("k_proj.weight_scale");
        scale.dtype = "F16";
        scale.bytes = vec![0x00, 0x3a];
        tiny.tensor("v_proj.weight_scale").bytes = f32_to_bf16(stored).to_le_bytes().to_vec();
        tiny.write(directory.path());
        let layer = Checkpoint::open(directory.path()).unwrap().layer(0).unwrap();
        for matrix in [&layer.q_proj, &layer.k_proj, &layer.v_proj] {
            assert_eq!(scale_of(matrix), expected);
        }
        assert_eq!(scale_of(&layer.o_proj), 1.0);
    }
}

/// The packed checkpoint was made from the master weights of the other by transformers.
#[test]
fn ternarising_the_master_weights_gives_the_packed_ones() {
    let online = Checkpoint::open(&golden("bitnet-a-bf16")).unwrap();
    let packed = Checkpoint::open(&golden("bitnet-a-packed")).unwrap();
    assert_eq!(online.config().weight_form, WeightForm::Online);
    assert_eq!(packed.config().weight_form, WeightForm::PackedMultiply);
    for layer in 0..3 {
        let (online, packed) = (online.layer(layer).unwrap(), packed.layer(layer).unwrap());
        for ((linear, master), (_, stored)) in online.linears().iter().zip(packed.linears()) {
            let name = linear.weight(Naming::HuggingFace, layer);
            let found = trits(master);
            assert!(found == trits(stored), "{name}");
            assert!(found[master.shape().k()..][..master.shape().k()].iter().all(|&t| t == 0));
            // The stored scale is the absmean, rounded to bf16.
            assert_eq!(f32_to_bf16(scale_of(master)), f32_to_bf16(scale_of(stored)), "{name}");
        }
        for ((norm, master), (_, stored)) in online.norms().zip(packed.norms()) {
            assert_eq!(master, stored, "{}", norm.weight(Naming::HuggingFace, layer));
        }
    }
    assert!(bf16(&online.embedding().unwrap()) == bf16(&packed.embedding().unwrap()));
}

/// A matrix with its input and output as the original implementation computed them: packing,
/// quarter order and the direction of the scale are all in it.
#[test]
fn matrices_give_the_recorded_outputs() {
    for name in ["bitnet-a-packed", "bitnet-a-bf16", "llama-a-bitlinear"] {
        let checkpoint = Checkpoint::open(&golden(name)).unwrap();
        let expected = std::fs::read(golden(&format!("expected/{name}.safetensors"))).unwrap();
        let expected = safetensors::SafeTensors::deserialize(&expected).unwrap();
        let values = |name: &str| -> Vec<f32> {
            let tensor = expected.tensor(name).unwrap();
            assert_eq!(tensor.dtype(), safetensors::Dtype::F32);
            tensor.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
        };
        for (linear, matrix) in checkpoint.layer(0).unwrap().linears() {
            let (n, k) = (matrix.shape().n(), matrix.shape().k());
            let input = values(&format!("io.model.layers.0.{}.in", linear.path));
            let output = values(&format!("io.model.layers.0.{}.out", linear.path));
            let weights = trits(matrix);
            for (x, y) in input.chunks_exact(k).zip(output.chunks_exact(n)) {
                let scale = 127.0 / x.iter().fold(1e-5f32, |max, x| max.max(x.abs()));
                let largest = y.iter().fold(0f32, |max, y| max.max(y.abs()));
                for (row, &y) in weights.chunks_exact(k).zip(y) {
                    let sum: i32 = row
                        .iter()
                        .zip(x)
                        .map(|(&w, &x)| i32::from(w) * (x * scale).round_ties_even() as i32)
                        .sum();
                    let found = sum as f32 * (scale_of(matrix) / scale);
                    assert!((found - y).abs() <= 1e-5 * largest, "{name} {linear:?} {found} {y}");
                }
            }
        }
    }
}

#[test]
fn shards_are_one_checkpoint() {
    let files = ModelFiles::open(&golden("llama-a-bitlinear")).unwrap();
    assert_eq!(files.tensor_names().count(), files.infos().count());
    let shard = |name: &str| files.tensor(name).unwrap().unwrap().file;
    assert!(shard("lm_head.weight").ends_with("model-00001-of-00002.safetensors"));
    assert!(shard("model.norm.weight").ends_with("model-00002-of-00002.safetensors"));

    let checkpoint = Checkpoint::open(&golden("llama-a-bitlinear")).unwrap();
    assert_eq!(checkpoint.config().weight_form, WeightForm::PackedDivide);
    assert_eq!(checkpoint.unused_tensors(), [] as [&str; 0]);
    let head = checkpoint.lm_head().unwrap().unwrap();
    assert_eq!((head.shape().n(), head.shape().k()), (1000, 256));
    let TableData::Bf16(bits) = head.data() else { panic!("bf16 stays bf16") };
    let mut row = vec![0.0; 256];
    head.row(3, &mut row).unwrap();
    assert_eq!(row[5], bf16_to_f32(bits[3 * 256 + 5]));
    let embedding = checkpoint.embedding().unwrap();
    embedding.row(7, &mut row).unwrap();
    assert_eq!(row, [0.0; 256]);
    assert_eq!(verdict(&golden("llama-a-bitlinear")), "fine");
}

#[test]
fn headers_are_known_without_reading_tensors() {
    let files = ModelFiles::open(&golden("bitnet-a-packed")).unwrap();
    let info = files.info("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!((info.dtype.as_str(), info.shape.as_slice()), ("U8", [64, 256].as_slice()));
    assert_eq!(info.len_bytes, 64 * 256);
    assert_eq!(files.dtype(info).unwrap(), Dtype::U8);
    assert!(files.file("config.json").unwrap().unwrap().starts_with(b"{"));
    assert!(files.file("no such file").unwrap().is_none());
    assert!(files.tensor("no such tensor").unwrap().is_none());
    assert_eq!(files.label(), golden("bitnet-a-packed").display().to_string());
}

#[test]
fn memory_is_counted() {
    let memory = Checkpoint::open(&golden("llama-a-bitlinear")).unwrap().memory();
    // q, o 256x256; k, v 128x256; gate, up 768x256; down 256x768: 786,432 weights a layer.
    assert_eq!(memory.ternary, 3 * 786_432 / 4);
    assert_eq!((memory.embedding, memory.lm_head), (512_000, 512_000));
    assert_eq!(memory.norms, 4 * (3 * 2 * 256 + 256));
}

/// A name, what is done to the tiny model, and the message that must follow.
type Case = (&'static str, fn(&mut Tiny), &'static str);

fn check(model: &Tiny, cases: &[Case]) {
    for (name, change, expected) in cases {
        let mut tiny = model.clone();
        change(&mut tiny);
        assert_eq!(tiny.verdict(), *expected, "{name}");
    }
}

#[test]
fn malformed_tensors_are_refused() {
    check(
        &Tiny::bitnet(),
        &[
            (
                "wrong shape",
                |tiny| tiny.tensor("q_proj.weight").shape = vec![2, 2],
                "model.safetensors: tensor model.layers.0.self_attn.q_proj.weight: expected shape \
             [1, 4], found [2, 2]",
            ),
            (
                "too many axes",
                |tiny| tiny.tensor("input_layernorm.weight").shape = vec![1, 4],
                "model.safetensors: tensor model.layers.0.input_layernorm.weight: expected shape [4], \
             found [1, 4]",
            ),
            (
                "vocabulary of another size",
                |tiny| tiny.set("vocab_size", 6.into()),
                "model.safetensors: tensor model.embed_tokens.weight: expected shape [6, 4], found \
             [5, 4]",
            ),
            (
                "missing matrix",
                |tiny| tiny.remove("down_proj.weight"),
                ": tensor model.layers.0.mlp.down_proj.weight is missing",
            ),
            (
                "missing norm",
                |tiny| tiny.remove("ffn_sub_norm.weight"),
                ": tensor model.layers.0.mlp.ffn_sub_norm.weight is missing",
            ),
            (
                "more layers than the file",
                |tiny| tiny.set("num_hidden_layers", 2.into()),
                ": tensor model.layers.1.input_layernorm.weight is missing",
            ),
            (
                "missing scale",
                |tiny| tiny.remove("up_proj.weight_scale"),
                ": tensor model.layers.0.mlp.up_proj.weight_scale is missing (quantization_config says \
             packed weights)",
            ),
            (
                "NaN scale",
                |tiny| tiny.tensor("k_proj.weight_scale").bytes = vec![0xc0, 0x7f],
                "model.safetensors: tensor model.layers.0.self_attn.k_proj.weight_scale: expected a \
             positive number, found NaN",
            ),
            (
                "zero scale",
                |tiny| tiny.tensor("k_proj.weight_scale").bytes = vec![0, 0],
                "model.safetensors: tensor model.layers.0.self_attn.k_proj.weight_scale: expected a \
             positive number, found 0.0",
            ),
            (
                "infinite scale",
                |tiny| tiny.tensor("k_proj.weight_scale").bytes = vec![0x80, 0x7f],
                "model.safetensors: tensor model.layers.0.self_attn.k_proj.weight_scale: expected a \
             positive number, found inf",
            ),
            (
                "negative scale",
                |tiny| tiny.tensor("k_proj.weight_scale").bytes = vec![0x80, 0xbf],
                "model.safetensors: tensor model.layers.0.self_attn.k_proj.weight_scale: expected a \
             positive number, found -1.0",
            ),
            (
                "one scale a row",
                |tiny| {
                    tiny.remove("k_proj.weight_scale");
                    let name = "model.layers.0.self_attn.k_proj.weight_scale";
                    tiny.add(name, "BF16", &[2], &ONE);
                },
                "model.safetensors: tensor model.layers.0.self_attn.k_proj.weight_scale: expected \
             shape [1], found [2]",
            ),
            (
                "integer scale",
                |tiny| {
                    let scale = tiny.tensor("k_proj.weight_scale");
                    (scale.dtype, scale.bytes) = ("U8", vec![1]);
                },
                "model.safetensors: tensor model.layers.0.self_attn.k_proj.weight_scale: expected \
             BF16, F16 or F32, found U8",
            ),
            (
                "code 3",
                // Rows 2 and 3 of gate_proj are in bits 3:2.
                |tiny| tiny.tensor("gate_proj.weight").bytes[4 + 2] = 0b10_10_11_10,
                "model.safetensors: tensor model.layers.0.mlp.gate_proj.weight: expected codes 0, 1 \
             and 2, found 3 at row 3, column 2",
            ),
            (
                "NaN in the embedding",
                |tiny| {
                    tiny.tensor("embed_tokens.weight").bytes[2 * 13..][..2]
                        .copy_from_slice(&[0x81, 0xff])
                },
                "model.safetensors: tensor model.embed_tokens.weight: expected finite elements, found \
             NaN or infinity at row 3, column 1",
            ),
            (
                "infinity in a norm",
                |tiny| {
                    tiny.tensor("attn_sub_norm.weight").bytes[4..6].copy_from_slice(&[0x80, 0xff])
                },
                "model.safetensors: tensor model.layers.0.self_attn.attn_sub_norm.weight: expected \
             finite weights, found -inf at 2",
            ),
            (
                "a type of no use, asked for",
                |tiny| {
                    let norm = tiny.tensor("model.norm.weight");
                    (norm.dtype, norm.bytes) = ("F64", vec![0; 32]);
                },
                "model.safetensors: tensor model.norm.weight: expected BF16, F16 or F32, found F64",
            ),
            (
                "a type of no use, not asked for",
                |tiny| tiny.add("statistics", "I64", &[3], &[0; 8]),
                "fine",
            ),
            (
                "a type unheard of, not asked for",
                |tiny| tiny.add("statistics", "TRIT", &[3], &[0; 8]),
                "fine",
            ),
        ],
    );
}

#[test]
fn contradictions_are_refused() {
    check(
        &Tiny::bitnet(),
        &[
            (
                "master weights in an offline model",
                |tiny| {
                    tiny.remove("o_proj.weight");
                    tiny.add("model.layers.0.self_attn.o_proj.weight", "BF16", &[4, 4], &ONE);
                },
                "model.safetensors: tensor model.layers.0.self_attn.o_proj.weight: expected U8 \
             (quantization_config says packed weights), found BF16",
            ),
            (
                "packed weights in an online model",
                |tiny| tiny.config["quantization_config"]["quantization_mode"] = "online".into(),
                "model.safetensors: tensor model.layers.0.self_attn.q_proj.weight: expected BF16, F16 \
             or F32 (quantization_mode is online), found U8",
            ),
            (
                "no head, embeddings not tied",
                |tiny| tiny.set("tie_word_embeddings", false.into()),
                ": tensor lm_head.weight is missing (tie_word_embeddings is false)",
            ),
            (
                "a head beside tied embeddings, as some writers leave it",
                |tiny| tiny.add("lm_head.weight", "BF16", &[5, 4], &ONE),
                "fine",
            ),
            (
                "a head of another shape beside tied embeddings",
                |tiny| tiny.add("lm_head.weight", "BF16", &[6, 4], &ONE),
                "model.safetensors: tensor lm_head.weight: expected shape [5, 4], found [6, 4]",
            ),
            (
                "a packed head",
                |tiny| tiny.add("lm_head.weight_scale", "BF16", &[1], &ONE),
                "model.safetensors: tensor \"lm_head.weight_scale\" was not expected: config.json does \
             not say that this matrix is packed",
            ),
            (
                "a bias",
                |tiny| tiny.add("model.layers.0.self_attn.q_proj.bias", "BF16", &[4], &ONE),
                "model.safetensors: tensor \"model.layers.0.self_attn.q_proj.bias\" was not expected: \
             this version has no biases",
            ),
            (
                "normalised heads",
                |tiny| tiny.add("model.layers.0.self_attn.q_norm.weight", "BF16", &[2], &ONE),
                "model.safetensors: tensor \"model.layers.0.self_attn.q_norm.weight\" was not \
             expected: this architecture does not normalise heads",
            ),
            (
                "the other BitNet's sub-norms",
                |tiny| tiny.add("model.layers.0.mlp.ffn_layernorm.weight", "BF16", &[6], &ONE),
                "model.safetensors: tensor \"model.layers.0.mlp.ffn_layernorm.weight\" was not \
             expected: these sub-norms belong to another architecture, BitnetForCausalLM",
            ),
            (
                "a norm inside a linear layer",
                |tiny| tiny.add("model.layers.0.mlp.up_proj.rms_norm.weight", "BF16", &[4], &ONE),
                "model.safetensors: tensor \"model.layers.0.mlp.up_proj.rms_norm.weight\" was not \
             expected: config.json does not say use_rms_norm, a norm inside every linear layer",
            ),
            (
                "fewer layers than the file",
                |tiny| tiny.add("model.layers.1.input_layernorm.weight", "BF16", &[4], &ONE),
                "model.safetensors: tensor \"model.layers.1.input_layernorm.weight\" was not expected: \
             num_hidden_layers in config.json is smaller",
            ),
            (
                "a buffer of older versions",
                |tiny| {
                    tiny.add("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", &[1], &[0; 4])
                },
                "fine",
            ),
        ],
    );
    check(
        &Tiny::llama(),
        &[
            (
                "sub-norms in a Llama",
                |tiny| tiny.add("model.layers.0.mlp.ffn_sub_norm.weight", "BF16", &[6], &ONE),
                "model.safetensors: tensor \"model.layers.0.mlp.ffn_sub_norm.weight\" was not \
             expected: this architecture has no sub-norms",
            ),
            (
                "a divisor whose reciprocal is infinite",
                |tiny| tiny.tensor("v_proj.weight_scale").bytes = vec![0x01, 0x00],
                "model.safetensors: tensor model.layers.0.self_attn.v_proj.weight_scale: expected a \
             positive number, found 9.1835e-41",
            ),
        ],
    );
}

/// The tiny model with master weights in place of the packed ones.
fn online(dtype: &'static str, one: &[u8]) -> Tiny {
    let mut tiny = Tiny::bitnet();
    tiny.config["quantization_config"]["quantization_mode"] = "online".into();
    tiny.tensors.retain(|tensor| !tensor.name.contains("_proj."));
    for (path, n, k) in [
        ("self_attn.q_proj", 4, 4),
        ("self_attn.k_proj", 2, 4),
        ("self_attn.v_proj", 2, 4),
        ("self_attn.o_proj", 4, 4),
        ("mlp.gate_proj", 6, 4),
        ("mlp.up_proj", 6, 4),
        ("mlp.down_proj", 4, 6),
    ] {
        tiny.add(&format!("model.layers.0.{path}.weight"), dtype, &[n, k], one);
    }
    tiny
}

#[test]
fn master_weights_are_checked() {
    for (dtype, one) in [("BF16", &ONE[..]), ("F16", &[0, 0x3c]), ("F32", &[0, 0, 0x80, 0x3f])] {
        let tiny = online(dtype, one);
        assert_eq!(tiny.verdict(), "fine");
        let directory = tempfile::tempdir().unwrap();
        tiny.write(directory.path());
        let layer = Checkpoint::open(directory.path()).unwrap().layer(0).unwrap();
        assert_eq!((trits(&layer.up_proj), scale_of(&layer.up_proj)), (vec![1; 24], 1.0));
    }
    check(
        &online("BF16", &ONE),
        &[
            (
                "NaN",
                |tiny| {
                    tiny.tensor("up_proj.weight").bytes[2 * 9..][..2].copy_from_slice(&[0xc0, 0x7f])
                },
                "model.safetensors: tensor model.layers.0.mlp.up_proj.weight: expected finite weights, \
             found NaN at row 2, column 1",
            ),
            (
                "infinity",
                |tiny| tiny.tensor("down_proj.weight").bytes[..2].copy_from_slice(&[0x80, 0x7f]),
                "model.safetensors: tensor model.layers.0.mlp.down_proj.weight: expected finite \
             weights, found inf at row 0, column 0",
            ),
            (
                "a scale beside master weights",
                |tiny| tiny.add("model.layers.0.mlp.up_proj.weight_scale", "BF16", &[1], &ONE),
                "model.safetensors: tensor \"model.layers.0.mlp.up_proj.weight_scale\" was not \
             expected: config.json does not say that this matrix is packed",
            ),
        ],
    );
}

/// Files whose header and contents do not agree, byte by byte.
#[test]
fn malformed_files_are_refused() {
    const ONE_TENSOR: &str = r#"{"w":{"dtype":"U8","shape":[1,2],"data_offsets":[0,2]}}"#;
    let header = |json: &str| with_header(json, &[0x86, 0x18]);
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", vec![], "a file of 0 bytes, too short for a header"),
        ("seven bytes", vec![0; 7], "a file of 7 bytes, too short for a header"),
        (
            "header past the end",
            [&[0x39, 0, 0, 0, 0, 0, 0, 0], ONE_TENSOR.as_bytes()].concat(),
            "a header of 57 bytes in a file of 63 bytes",
        ),
        (
            "header length of all ones",
            [&[0xff; 8], ONE_TENSOR.as_bytes()].concat(),
            "a header of 18446744073709551615 bytes in a file of 63 bytes",
        ),
        (
            "truncated elements",
            with_header(ONE_TENSOR, &[0x86]),
            "tensor \"w\": offsets 0 to 2 in a file with 1 bytes of elements",
        ),
        (
            "trailing bytes",
            with_header(ONE_TENSOR, &[0x86, 0x18, 0]),
            "the tensors end at byte 2 of 3 bytes of elements",
        ),
        (
            "backwards",
            header(r#"{"w":{"dtype":"U8","shape":[1,2],"data_offsets":[2,0]}}"#),
            "tensor \"w\": offsets 2 to 0 run backwards",
        ),
        (
            "gap",
            header(r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#),
            "tensor \"w\": gap: expected to begin at 0, found 1",
        ),
        (
            "overlap",
            header(
                r#"{"v":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},
                    "w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            ),
            "tensor \"w\": overlap: expected to begin at 2, found 1",
        ),
        (
            "shape and length",
            header(r#"{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,2]}}"#),
            "tensor \"w\": shape [2] of BF16 does not take the 2 bytes at 0 to 2",
        ),
        (
            "shape past u64",
            header(
                r#"{"w":{"dtype":"U8","shape":[4294967296,4294967296,2],"data_offsets":[0,2]}}"#,
            ),
            "tensor \"w\": shape [4294967296, 4294967296, 2] of U8 does not take the 2 bytes at 0 \
             to 2",
        ),
        (
            "seventeen axes",
            header(
                r#"{"w":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,2],"data_offsets":[0,2]}}"#,
            ),
            "tensor \"w\": 17 axes; at most 16",
        ),
        (
            "offsets past u64",
            header(r#"{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,18446744073709551615]}}"#),
            "tensor \"w\": offsets 0 to 18446744073709551615 in a file with 2 bytes of elements",
        ),
    ];
    for (name, bytes, expected) in cases {
        let directory = tempfile::tempdir().unwrap();
        Tiny::bitnet().write(directory.path());
        std::fs::write(directory.path().join("model.safetensors"), bytes).unwrap();
        let expected = format!("model.safetensors: not a valid safetensors file: {expected}");
        assert_eq!(verdict(directory.path()), expected, "{name}");
    }
    // Broken JSON, with the parser's words.
    for (json, expected) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("[]", "invalid type: sequence, expected an object at line 1 column 0"),
        (&ONE_TENSOR[..20], "EOF while parsing a string at line 1 column 20"),
        (
            r#"{"w":{"dtype":"U8","shape":[-1],"data_offsets":[0,2]}}"#,
            "invalid value: integer `-1`, expected usize at line 1 column 30",
        ),
        (r#"{"w":{"dtype":"U8","shape":[2]}}"#, "missing field `data_offsets` at line 1 column 31"),
        (
            r#"{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8"}}"#,
            "key \"w\" appears twice at line 1 column 56",
        ),
    ] {
        let directory = tempfile::tempdir().unwrap();
        Tiny::bitnet().write(directory.path());
        std::fs::write(directory.path().join("model.safetensors"), header(json)).unwrap();
        assert_eq!(verdict(directory.path()), format!("model.safetensors: {expected}"));
    }
    let directory = tempfile::tempdir().unwrap();
    Tiny::bitnet().write(directory.path());
    let not_utf8 = [&[3, 0, 0, 0, 0, 0, 0, 0][..], b"{\"\xff"].concat();
    std::fs::write(directory.path().join("model.safetensors"), not_utf8).unwrap();
    assert!(verdict(directory.path()).starts_with("model.safetensors: "));
}

#[test]
fn malformed_indexes_are_refused() {
    let half = |from: usize, to: usize| safetensors(&Tiny::bitnet().tensors[from..to]);
    let name = |i: usize| Tiny::bitnet().tensors[i].name.clone();
    let count = Tiny::bitnet().tensors.len();
    let map = |shard: &dyn Fn(usize) -> &'static str| -> serde_json::Value {
        let map: serde_json::Map<_, _> = (0..count).map(|i| (name(i), shard(i).into())).collect();
        serde_json::json!({"metadata": {"total_size": 0}, "weight_map": map})
    };
    let right = map(&|i| if i < 9 { "a.safetensors" } else { "b.safetensors" });
    let run = |index: &str, a: Vec<u8>, b: Vec<u8>| {
        let directory = tempfile::tempdir().unwrap();
        Tiny::bitnet().write(directory.path());
        // The index decides, whatever else is there.
        std::fs::write(directory.path().join("model.safetensors"), b"not used").unwrap();
        std::fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
        std::fs::write(directory.path().join("a.safetensors"), a).unwrap();
        std::fs::write(directory.path().join("b.safetensors"), b).unwrap();
        verdict(directory.path())
    };
    // k_proj's weight is the last tensor of one shard, its scale the first of the other.
    assert_eq!(run(&right.to_string(), half(0, 9), half(9, count)), "fine");
    let moved = map(&|i| if i < 8 { "a.safetensors" } else { "b.safetensors" });
    assert_eq!(
        run(&moved.to_string(), half(0, 9), half(9, count)),
        format!(
            "b.safetensors: tensor {:?} is missing (model.safetensors.index.json says it is in \
             this file)",
            name(8)
        )
    );
    let missing = map(&|i| if i < 9 { "a.safetensors" } else { "c.safetensors" });
    let message = run(&missing.to_string(), half(0, 9), half(9, count));
    assert!(message.starts_with("c.safetensors: "), "{message}");
    for outside in
        ["../b.safetensors", "/etc/b", "d/b", "..", ".", "", "d\\b", "C:b", "a\0", "a\nb"]
    {
        let mut index = right.clone();
        index["weight_map"][name(19)] = outside.into();
        assert_eq!(
            run(&index.to_string(), half(0, 9), half(9, count)),
            format!(
                "model.safetensors.index.json: expected the name of a file in the same directory, \
                 found {outside:?}"
            )
        );
    }
    assert_eq!(
        run(&right.to_string(), half(0, 10), half(9, count)),
        format!("b.safetensors: tensor {:?} is also in DIR/a.safetensors", name(9))
    );
    assert_eq!(
        run(r#"{"weight_map":{"w":"a","w":"b"}}"#, half(0, 9), half(9, count)),
        "model.safetensors.index.json: key \"w\" appears twice at line 1 column 26"
    );
    assert_eq!(
        run("{}", half(0, 9), half(9, count)),
        "model.safetensors.index.json: missing field `weight_map` at line 1 column 2"
    );
}

#[test]
fn what_is_no_checkpoint_says_so() {
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(
        verdict(directory.path()),
        ": no model.safetensors, model.safetensors.index.json or GGUF file in this directory"
    );
    Tiny::bitnet().write(directory.path());
    std::fs::remove_file(directory.path().join("config.json")).unwrap();
    assert_eq!(verdict(directory.path()), ": no config.json in this directory");
    let path = directory.path().join("model.safetensors");
    assert!(verdict(&path).contains("not a directory"));
    assert!(Checkpoint::open(&directory.path().join("nothing")).is_err());
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    assert_eq!(verdict(directory.path()), "model.safetensors: not a regular file");
}

#[test]
fn embedded_files_are_a_checkpoint() {
    let tiny = Tiny::bitnet();
    let config = tiny.config.to_string().into_bytes();
    let model = safetensors(&tiny.tensors);
    let checkpoint = Checkpoint::embedded("tiny", embed(&config, &model)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    tiny.write(directory.path());
    let opened = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(checkpoint.config(), opened.config());
    assert!(bf16(&checkpoint.embedding().unwrap()) == bf16(&opened.embedding().unwrap()));
    let (a, b) = (checkpoint.layer(0).unwrap(), opened.layer(0).unwrap());
    for ((_, a), (_, b)) in a.linears().iter().zip(b.linears()) {
        assert_eq!(trits(a), trits(b));
    }
    let cut = embed(&config, &model[..model.len() - 1]);
    let message = Checkpoint::embedded("tiny", cut).unwrap_err().to_string();
    assert!(message.starts_with("tiny/model.safetensors: not a valid safetensors"), "{message}");
}

/// A file of the tiny checkpoint, leaked: the embedded form takes static bytes.
fn embed(config: &[u8], model: &[u8]) -> &'static [(&'static str, &'static [u8])] {
    let leak = |bytes: &[u8]| -> &'static [u8] { bytes.to_vec().leak() };
    vec![("config.json", leak(config)), ("model.safetensors", leak(model))].leak()
}

/// 2000 copies of `bytes`, each with one bit of its first `len` bytes changed.
fn corruptions(bytes: &[u8], len: usize) -> impl Iterator<Item = Vec<u8>> {
    let mut random = 1u64;
    (0..2000).map(move |_| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_041);
        let mut bytes = bytes.to_vec();
        bytes[(random >> 33) as usize % len] ^= 1 << (random >> 60 & 7);
        bytes
    })
}

/// Cut anywhere or with any bit of its header changed, a file is accepted exactly if the original
/// parser accepts it.
#[test]
fn the_header_parser_agrees_with_the_original() {
    let tiny = Tiny::bitnet();
    let config = tiny.config.to_string().into_bytes();
    let whole = safetensors(&tiny.tensors);
    let header_len = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let count = |bytes: &[u8]| {
        let files = ModelFiles::embedded("tiny", embed(&config, bytes));
        files.map(|files| files.tensor_names().count())
    };
    for len in (0..whole.len()).step_by(7) {
        assert!(count(&whole[..len]).is_err(), "cut at {len}");
    }
    for bytes in corruptions(&whole, header_len) {
        let shown = String::from_utf8_lossy(&bytes[8..header_len]);
        match (count(&bytes), safetensors::SafeTensors::read_metadata(&bytes)) {
            (Ok(count), Ok((_, metadata))) => assert_eq!(count, metadata.tensors().len()),
            (Err(_), Err(_)) => {}
            // A type that it does not know is no error before the tensor is asked for.
            (Ok(_), Err(error)) => {
                assert!(error.to_string().contains("unknown variant"), "{error}: {shown}");
            }
            (Err(error), Ok(_)) => panic!("{error}: {shown}"),
        }
    }
}

/// Whatever bit of a checkpoint is wrong, reading it ends in weights or in a message of one line.
#[test]
fn corrupt_checkpoints_do_not_panic() {
    for tiny in [Tiny::bitnet(), Tiny::llama(), online("BF16", &ONE)] {
        let config = tiny.config.to_string().into_bytes();
        let model = safetensors(&tiny.tensors);
        let read = |config: &[u8], model: &[u8]| {
            let result = Checkpoint::embedded("tiny", embed(config, model));
            if let Err(error) = result.and_then(|checkpoint| read_weights(&checkpoint)) {
                let message = error.to_string();
                assert!(message.len() < 500 && !message.contains('\n'), "{message}");
            }
        };
        corruptions(&model, model.len()).for_each(|model| read(&config, &model));
        corruptions(&config, config.len()).for_each(|config| read(&config, &model));
    }
}
