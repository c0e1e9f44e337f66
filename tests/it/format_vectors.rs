//! `docs/format-vectors.json`, which the text of `docs/formats.md` was turned into without this
//! crate: every vector, encoded and decoded.

use std::collections::HashMap;
use std::path::Path;

use cpu_ref::rope::Scaling;
use cpu_ref::{gemv, group_gemv, hadamard, quantize_absmax, rope, ternarize_absmean};
use serde::Deserialize;
use serde_json::json;
use sterna::Checkpoint;
use sterna::convert::write_hf;
use sterna::format::float::f16_to_f32;
use sterna::format::ggml::{GgmlType, TernaryType, i2s_scale, i2s_tail};
use sterna::format::gguf::{TensorPlan, Value, Writer};
use sterna::format::{Dtype, ModelFiles};
use sterna::layout::{Layout, Packed, Pieces, Signs};
use sterna::shape::MatShape;
use sterna::weights::{TernaryMatrix, WeightScale, WeightSource};

use super::checkpoint::{Tiny, trits};

/// The file; a vector that no test here looks at is an unknown field.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vectors {
    #[serde(rename = "about")]
    _about: String,
    rows: Vec<Row>,
    i2_s_tail: Tail,
    floats: Vec<Floats>,
    hugging_face: Vec<HuggingFace>,
    mlx: Vec<Mlx>,
    gguf: String,
    safetensors: String,
    interleaved_head: InterleavedHead,
    rope: Rope,
    yarn: Vec<Yarn>,
    absmax: Vec<Absmax>,
    absmean: Vec<Absmean>,
    bitlinear: BitLinear,
    groups: Groups,
    hadamard: Vec<Hadamard>,
    layouts: Vec<OneWeight>,
}

#[derive(Deserialize)]
struct Row {
    r#type: String,
    what: String,
    weights: String,
    scales: Vec<u16>,
    bytes: String,
}

#[derive(Deserialize)]
struct Tail {
    scale: f32,
    bytes: String,
}

#[derive(Deserialize)]
struct Floats {
    r#type: String,
    bytes: String,
    values: Vec<f32>,
}

#[derive(Deserialize)]
struct HuggingFace {
    what: String,
    rows: Vec<String>,
    packed: Vec<String>,
}

#[derive(Deserialize)]
struct Mlx {
    bits: usize,
    weights: String,
    codes: String,
    scale: String,
    bias: String,
    value: f32,
}

#[derive(Deserialize)]
struct InterleavedHead {
    head_dim: usize,
    file_rows: Vec<usize>,
}

#[derive(Deserialize)]
struct Rope {
    x: Vec<f32>,
    theta: f32,
    position: usize,
    half_split: Vec<f32>,
    interleaved: Vec<f32>,
}

#[derive(Deserialize)]
struct Yarn {
    theta: f32,
    head_dim: usize,
    factor: f32,
    original_context: f32,
    attention_factor: f32,
    frequencies: Vec<(usize, f32)>,
}

#[derive(Deserialize)]
struct Absmax {
    what: String,
    x: Vec<f32>,
    codes: Vec<i8>,
    act_scale: f32,
}

#[derive(Deserialize)]
struct Absmean {
    what: String,
    w: Vec<f32>,
    weights: String,
    scale: f32,
}

#[derive(Deserialize)]
struct BitLinear {
    weights: Vec<String>,
    codes: Vec<i8>,
    sums: Vec<i32>,
    scale: f32,
    act_scale: f32,
    y: Vec<f32>,
}

#[derive(Deserialize)]
struct Groups {
    weights: String,
    scales: Vec<f32>,
    x: Vec<f32>,
    y: f32,
}

#[derive(Deserialize)]
struct Hadamard {
    x: Vec<f32>,
    signs: Vec<f32>,
    block: usize,
    rotated: Vec<f32>,
}

#[derive(Deserialize)]
struct OneWeight {
    layout: String,
    shape: [usize; 2],
    at: [usize; 2],
    weight: i8,
    words: Vec<(usize, u32)>,
}

fn vectors() -> Vectors {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/format-vectors.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn bytes(hex: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(byte).collect()
}

fn weights(text: &str) -> Vec<i8> {
    let weight = |character| match character {
        '-' => -1,
        '0' => 0,
        '+' => 1,
        other => panic!("{other:?} is no weight"),
    };
    text.chars().map(weight).collect()
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    let close = |(a, b): (&f32, &f32)| (a - b).abs() <= tolerance * b.abs();
    assert!(found.iter().zip(expected).all(close), "expected {expected:?}, found {found:?}");
}

#[test]
fn rows_of_ternary_types() {
    let types = HashMap::from([
        ("I2_S", TernaryType::I2S),
        ("I2_S (Arm)", TernaryType::I2SArm),
        ("TQ1_0", TernaryType::Tq1_0),
        ("TQ2_0", TernaryType::Tq2_0),
        ("Q1_0", TernaryType::Q1_0),
        ("Q2_0", TernaryType::Q2_0),
        ("PQ2_0", TernaryType::Pq2_0),
        ("PTQ1_0", TernaryType::Ptq1_0),
    ]);
    let mut seen = Vec::new();
    for Row { r#type, what, weights: text, scales, bytes: hex } in vectors().rows {
        let (ty, expected, packed) = (types[r#type.as_str()], weights(&text), bytes(&hex));
        let (mut found, mut found_scales) = (vec![9; expected.len()], vec![9; scales.len()]);
        ty.decode_row(&packed, &mut found, &mut found_scales).unwrap();
        assert_eq!((found, &found_scales), (expected.clone(), &scales), "{}: {what}", r#type);
        let mut encoded = vec![0xaa; packed.len()];
        ty.encode_row(&expected, &scales, &mut encoded);
        assert_eq!(encoded, packed, "{}: {what}", r#type);
        seen.push(ty);
    }
    assert!(TernaryType::ALL.iter().all(|ty| seen.contains(ty)), "every type has a vector");
}

#[test]
fn the_tail_of_i2_s() {
    let Tail { scale, bytes: hex } = vectors().i2_s_tail;
    let tail = bytes(&hex);
    assert_eq!(i2s_tail(scale).as_slice(), tail);
    assert_eq!(i2s_scale(*tail.first_chunk().unwrap()), Some(scale));
}

#[test]
fn rows_of_floats() {
    let floats = vectors().floats;
    for Floats { r#type, bytes: hex, values } in &floats {
        let ty = GgmlType::from_name(r#type).unwrap().float().unwrap();
        let mut found = vec![0.0; values.len()];
        ty.decode_row(&bytes(hex), &mut found);
        assert_eq!(&found, values, "{}", r#type);
    }
    let has_vector = |ty: &GgmlType| floats.iter().any(|floats| floats.r#type == ty.name());
    assert!(GgmlType::ALL.iter().filter(|ty| ty.float().is_some()).all(has_vector));
}

/// Unpacked from a checkpoint, and packed again by the converter.
#[test]
fn hugging_face_packing() {
    for HuggingFace { what, rows, packed } in vectors().hugging_face {
        let (n, packed) = (rows.len(), bytes(&packed.concat()));
        let (input, output) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut tiny = Tiny::bitnet();
        tiny.set_gate(n, &packed);
        tiny.write(input.path());
        let checkpoint = Checkpoint::open(input.path()).unwrap();
        let expected = weights(&rows.concat());
        assert_eq!(trits(&checkpoint.layer(0).unwrap().gate_proj), expected, "{what}");

        write_hf(&checkpoint, output.path(), &mut |_, _| {}).unwrap();
        let files = ModelFiles::open(output.path()).unwrap();
        let written = files.tensor("model.layers.0.mlp.gate_proj.weight").unwrap().unwrap();
        assert_eq!((written.dtype, &written.bytes[..]), (Dtype::U8, &packed[..]), "{what}");
    }
}

/// A Qwen3 of one layer whose every matrix is 64 × 64 and has the vector as each row.
fn mlx_checkpoint(vector: &Mlx) -> Checkpoint {
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": true,
        "quantization": {"group_size": 64, "bits": vector.bits},
    });
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    let mut add = |name: String, dtype: &str, shape: &[usize], element: &[u8]| {
        let start = data.len();
        data.extend(element.repeat(shape[0]));
        let offsets = [start, data.len()];
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
    };
    let attention = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| ("self_attn", name));
    let mlp = ["gate_proj", "up_proj", "down_proj"].map(|name| ("mlp", name));
    let linears = attention.into_iter().chain(mlp);
    let linears = linears.map(|(module, name)| format!("layers.0.{module}.{name}"));
    for module in linears.chain(["embed_tokens".to_owned()]) {
        let name = |part: &str| format!("model.{module}.{part}");
        add(name("weight"), "U32", &[64, 2 * vector.bits], &bytes(&vector.codes));
        add(name("scales"), "F16", &[64, 1], &bytes(&vector.scale));
        add(name("biases"), "F16", &[64, 1], &bytes(&vector.bias));
    }
    let norms = ["input_layernorm", "post_attention_layernorm", "self_attn.q_norm"]
        .into_iter()
        .chain(["self_attn.k_norm"])
        .map(|norm| format!("model.layers.0.{norm}.weight"));
    for norm in norms.chain(["model.norm.weight".to_owned()]) {
        add(norm, "BF16", &[64], &[0x80, 0x3f]);
    }
    let header = serde_json::Value::from(header).to_string();
    let model = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    let files = [
        ("config.json".to_owned(), config.to_string().into_bytes()),
        ("model.safetensors".to_owned(), model),
    ];
    Checkpoint::new(ModelFiles::in_memory("mlx", files).unwrap()).unwrap()
}

fn assert_mlx_row(matrix: &TernaryMatrix, vector: &Mlx) {
    assert_eq!(matrix.scale(), WeightScale::Groups { group: 64 });
    let (mut found, mut scales) = (vec![9; 64], vec![0; 1]);
    matrix.row_with_scales(63, &mut found, &mut scales).unwrap();
    assert_eq!(found, weights(&vector.weights));
    assert_eq!(f16_to_f32(scales[0]), vector.value);
}

#[test]
fn mlx_packs() {
    for vector in vectors().mlx {
        let checkpoint = mlx_checkpoint(&vector);
        let layer = checkpoint.layer(0).unwrap();
        layer.linears().iter().for_each(|(_, matrix)| assert_mlx_row(matrix, &vector));
        let mut row = vec![0.0; 64];
        checkpoint.embedding().unwrap().row(5, &mut row).unwrap();
        let expected = weights(&vector.weights);
        let expected: Vec<f32> = expected.iter().map(|&t| f32::from(t) * vector.value).collect();
        assert_eq!(row, expected);
    }
}

#[test]
fn containers() {
    let Vectors { gguf, safetensors, .. } = vectors();
    let file = bytes(&gguf);
    let files = ModelFiles::in_memory("set", [("m.gguf".to_owned(), file.clone())]).unwrap();
    let metadata = files.metadata().unwrap();
    assert_eq!(metadata.require::<&str>("general.architecture").unwrap(), "llama");
    assert_eq!(metadata.require::<u32>("llama.block_count").unwrap(), 1);
    let info = files.info("t.weight").unwrap();
    assert_eq!(
        (info.dtype.as_str(), &info.shape[..], info.len_bytes),
        ("TQ2_0", &[1, 256][..], 66)
    );
    let elements = files.slice(info, 0..66).unwrap();
    assert_eq!(&elements[..], &file[160..]);

    let keys = [
        ("general.architecture", Value::String("llama".to_owned())),
        ("llama.block_count", Value::U32(1)),
    ];
    let plan = TensorPlan { name: "t.weight".to_owned(), ty: GgmlType::Tq2_0, shape: vec![1, 256] };
    let mut writer = Writer::new(Vec::new(), &keys, &[plan]).unwrap();
    writer.write(&elements).unwrap();
    let written = writer.finish().unwrap();
    // The writer pads the last tensor too.
    assert_eq!(written[..file.len()], file);
    assert!(written.len() == 256 && written[file.len()..].iter().all(|&byte| byte == 0));

    let name = "model.safetensors".to_owned();
    let files = ModelFiles::in_memory("set", [(name, bytes(&safetensors))]).unwrap();
    let tensor = files.tensor("w").unwrap().unwrap();
    assert_eq!((tensor.dtype, &tensor.shape[..]), (Dtype::U8, &[1, 2][..]));
    assert_eq!(tensor.bytes[..], [0x86, 0x18]);
}

/// The row of the model that stands in row `n` of a `llama` GGUF file, within a head.
fn file_row(n: usize, head_dim: usize) -> usize {
    n / 2 + n % 2 * (head_dim / 2)
}

/// The vector, and a file of bitnet.cpp's order against the checkpoint it was made from.
#[test]
fn interleaved_heads() {
    let InterleavedHead { head_dim, file_rows } = vectors().interleaved_head;
    let expected: Vec<usize> = (0..head_dim).map(|n| file_row(n, head_dim)).collect();
    assert_eq!(file_rows, expected);

    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let original = Checkpoint::open(&golden.join("llama-a-bitlinear")).unwrap();
    let files = ModelFiles::open(&golden.join("gguf/llama-a-i2_s.gguf")).unwrap();
    let layer = original.layer(0).unwrap();
    for (name, matrix) in [("attn_q", &layer.q_proj), ("attn_k", &layer.k_proj)] {
        let info = files.info(&format!("blk.0.{name}.weight")).unwrap();
        let (n, k) = (matrix.shape().n(), matrix.shape().k());
        let stored = files.slice(info, 0..n * k / 4).unwrap();
        let (mut found, mut expected) = (vec![0; k], vec![0; k]);
        for (n, row) in stored.chunks_exact(k / 4).enumerate() {
            TernaryType::I2S.decode_row(row, &mut found, &mut []).unwrap();
            matrix.row(n / 64 * 64 + file_row(n % 64, 64), &mut expected).unwrap();
            assert_eq!(found, expected, "{name} row {n}");
        }
    }
}

#[test]
fn rotary_embedding() {
    let Vectors { rope: vector, yarn, .. } = vectors();
    let frequencies = rope::frequencies(vector.theta, vector.x.len(), Scaling::None);
    let (cos, sin) = rope::angles(vector.position, &frequencies);
    let mut head = vector.x.clone();
    rope::rotate(&mut head, &cos, &sin);
    assert_close(&head, &vector.half_split, 1e-6);

    // Interleaved is half-split on a head whose pairs have been put apart.
    let half = vector.x.len() / 2;
    let place = |i: usize| if i < half { 2 * i } else { 2 * (i - half) + 1 };
    let mut apart: Vec<f32> = (0..2 * half).map(|i| vector.x[place(i)]).collect();
    rope::rotate(&mut apart, &cos, &sin);
    let expected: Vec<f32> = (0..2 * half).map(|i| vector.interleaved[place(i)]).collect();
    assert_close(&apart, &expected, 1e-6);

    for Yarn { theta, head_dim, factor, original_context, attention_factor, frequencies } in yarn {
        let scaling = Scaling::Yarn {
            factor,
            original_context,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: Scaling::yarn_attention_factor(factor),
        };
        let found = rope::frequencies(theta, head_dim, scaling);
        assert_close(&[found.attention_factor], &[attention_factor], 1e-6);
        for (i, expected) in frequencies {
            assert_close(&[found.inv_freq[i]], &[expected], 2e-6);
        }
    }
}

#[test]
fn quantisers() {
    let Vectors { absmax, absmean, .. } = vectors();
    for Absmax { what, x, codes, act_scale } in absmax {
        let found = quantize_absmax::quantize_absmax(&x);
        assert_eq!((found.codes, found.act_scale), (codes, act_scale), "{what}");
    }
    for Absmean { what, w, weights: text, scale } in absmean {
        assert_eq!(ternarize_absmean::ternarize_absmean(&w), (weights(&text), scale), "{what}");
    }
}

#[test]
fn linear_layers() {
    let Vectors { bitlinear, groups, hadamard, .. } = vectors();
    let BitLinear { weights: rows, codes, sums, scale, act_scale, y } = bitlinear;
    assert_eq!(gemv::gemv(&weights(&rows.concat()), &codes), sums);
    assert_eq!(gemv::dequantize(&sums, &vec![scale; sums.len()], act_scale), y);

    let Groups { weights: row, scales, x, y } = groups;
    assert_eq!(group_gemv::group_dot(&weights(&row), &scales, &x), y);

    for Hadamard { x, signs, block, rotated } in hadamard {
        assert_eq!(hadamard::rotate(&x, &signs, block), rotated);
        assert_eq!(hadamard::rotate_back(&rotated, &signs, block), x);
    }
}

/// Packs a matrix that holds the layout's padding but for one weight: the words that differ.
fn odd_words<L: Pieces>(layout: L, vector: &OneWeight) -> Vec<(usize, u32)> {
    let ([n, k], [row, column]) = (vector.shape, vector.at);
    let shape = MatShape::new(n, k).unwrap();
    let mut trits = vec![L::PADDING; n * k];
    let plain = Packed::pack(layout, shape, &trits);
    trits[row * k + column] = vector.weight;
    let packed = Packed::pack(layout, shape, &trits);
    let words = packed.words().iter().zip(plain.words()).enumerate();
    words.filter(|(_, (word, plain))| word != plain).map(|(i, (&word, _))| (i, word)).collect()
}

#[test]
fn the_layouts_of_this_crate() {
    for vector in vectors().layouts {
        let found = match vector.layout.as_str() {
            "I2" => odd_words(Layout::I2, &vector),
            "planes" => odd_words(Layout::Planes, &vector),
            "signs" => odd_words(Signs, &vector),
            other => panic!("no layout {other}"),
        };
        assert_eq!(found, vector.words, "{}", vector.layout);
    }
}
