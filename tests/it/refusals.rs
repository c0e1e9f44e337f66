//! Files with one thing wrong: each is refused, or its weights are, in one line that says where, what
//! was expected and what was found.

use sterna::config::WeightForm;
use sterna::format::ggml::GgmlType;
use sterna::format::gguf::{Array, Strings, Value};
use sterna::weights::WeightSource;
use sterna::{Checkpoint, Result};

use crate::formats_common::{Case, Form, Gguf, GgufFile, HfFiles, Linears, Signs, cases};

/// What is wrong, how it is made so, and the message after the file's name.
type Refusal<T> = (&'static str, fn(&mut T), &'static str);

fn case(like: &str, wanted: impl Fn(&Case) -> bool) -> Case {
    let found = cases().into_iter().find(|case| case.like == like && wanted(case));
    found.unwrap_or_else(|| panic!("no case {like}"))
}

/// The GGUF file of a case whose linear layers are of that type.
fn gguf(like: &str, ty: GgmlType) -> GgufFile {
    gguf_case(&case(like, |case| {
        let Form::Gguf(form) = case.form else { return false };
        form.linears == Linears::Ternary(ty) && form.parts == 1
    }))
}

fn gguf_case(case: &Case) -> GgufFile {
    let Form::Gguf(form) = case.form else { panic!("a GGUF case") };
    GgufFile::of(&case.model(), Gguf { parts: 1, ..form })
}

/// Opens a checkpoint and reads every weight.
fn read_all(path: &std::path::Path) -> Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let mut row = vec![0.0; checkpoint.config().hidden_size];
    for table in [Some(checkpoint.embedding()?), checkpoint.lm_head()?].into_iter().flatten() {
        (0..table.shape().n()).try_for_each(|n| table.row(n, &mut row))?;
    }
    checkpoint.final_norm()?;
    checkpoint.frequencies()?;
    for layer in 0..checkpoint.config().num_hidden_layers {
        for (_, matrix) in checkpoint.layer(layer)?.linears() {
            let mut row = vec![0; matrix.shape().k()];
            (0..matrix.shape().n()).try_for_each(|n| matrix.row(n, &mut row))?;
        }
    }
    Ok(())
}

/// The message of the first error, without the path of the file; or "fine".
fn verdict(path: &std::path::Path) -> String {
    let Err(error) = read_all(path) else { return "fine".to_owned() };
    let message = error.to_string();
    assert!(!message.contains('\n') && message.len() < 600, "{message}");
    let rest = message.strip_prefix(&path.display().to_string());
    let rest = rest.unwrap_or_else(|| panic!("no file: {message}"));
    rest.trim_start_matches(['/', '\\']).to_owned()
}

fn verdict_of(bytes: &[u8]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    verdict(&path)
}

fn compare(verdicts: &[(&str, String, &str)]) {
    let wrong: Vec<_> = verdicts.iter().filter(|(_, found, expected)| found != expected).collect();
    let lines = wrong.iter().map(|(what, found, _)| format!("@@{what}\n{found}\n"));
    assert!(wrong.is_empty(), "{}", lines.collect::<String>());
}

fn check(file: &GgufFile, refusals: &[Refusal<GgufFile>]) {
    assert_eq!(verdict_of(&file.bytes()), "fine");
    let verdicts: Vec<_> = refusals
        .iter()
        .map(|&(what, spoil, expected)| {
            let mut file = file.clone();
            spoil(&mut file);
            (what, verdict_of(&file.bytes()), expected)
        })
        .collect();
    compare(&verdicts);
}

/// The file's bytes with another type number for a tensor.
fn with_type(file: &GgufFile, name: &str, id: u32) -> Vec<u8> {
    let mut bytes = file.bytes();
    let at = bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
    let axes = at + name.len();
    let count = u32::from_le_bytes(bytes[axes..axes + 4].try_into().unwrap()) as usize;
    bytes[axes + 4 + 8 * count..][..4].copy_from_slice(&id.to_le_bytes());
    bytes
}

fn text(value: &str) -> Value {
    Value::String(value.to_owned())
}

/// Another shape for a tensor, with zero bytes.
fn reshape(file: &mut GgufFile, name: &str, shape: &[usize]) {
    let (plan, bytes) = file.tensor(name);
    plan.shape = shape.to_vec();
    *bytes = vec![0; plan.ty.len_bytes(shape).unwrap() as usize];
}

/// Another type for a tensor, with zero bytes.
fn retype(file: &mut GgufFile, name: &str, ty: GgmlType) {
    let (plan, bytes) = file.tensor(name);
    plan.ty = ty;
    *bytes = vec![0; ty.len_bytes(&plan.shape).unwrap() as usize];
}

#[test]
fn types_that_are_not_read() {
    let llama = gguf("Llama3-1.58", GgmlType::I2S);
    let (up, embedding) = ("blk.1.ffn_up.weight", "token_embd.weight");
    let of = |name, id| verdict_of(&with_type(&llama, name, id));
    compare(&[
        (
            "38",
            of(up, 38),
            ": tensor \"blk.1.ffn_up.weight\": this version does not read TL1: a lookup-table \
                 layout that only its bitnet.cpp build can read; use the I2_S file, or the \
                 Hugging Face checkpoint",
        ),
        (
            "39",
            of(up, 39),
            ": tensor \"blk.1.ffn_up.weight\": this version does not read TL2 or MXFP4: a \
                 lookup-table layout that only its bitnet.cpp build can read; use the I2_S file, \
                 or the Hugging Face checkpoint",
        ),
        (
            "40",
            of(up, 40),
            ": tensor \"blk.1.ffn_up.weight\": this version does not read NVFP4 or an early \
                 Q1_0: the number has two meanings; use a file with Q1_0 as type 41",
        ),
        (
            "134",
            of(up, 134),
            ": tensor \"blk.1.ffn_up.weight\": this version does not read IQ1_BN: convert the \
                 model to one of the types it reads: I2_S, TQ1_0, TQ2_0, Q1_0, Q2_0, PQ2_0 or \
                 PTQ1_0 for matrices; F32, F16, BF16, Q8_0, Q6_K, Q4_0 or Q4_K for embeddings",
        ),
        (
            "13",
            of(embedding, 13),
            ": tensor \"token_embd.weight\": this version does not read Q5_K: convert the \
                 model to one of the types it reads: I2_S, TQ1_0, TQ2_0, Q1_0, Q2_0, PQ2_0 or \
                 PTQ1_0 for matrices; F32, F16, BF16, Q8_0, Q6_K, Q4_0 or Q4_K for embeddings",
        ),
        (
            "77",
            of(up, 77),
            ": tensor \"blk.1.ffn_up.weight\": this version does not read type 77: convert \
                 the model to one of the types it reads: I2_S, TQ1_0, TQ2_0, Q1_0, Q2_0, PQ2_0 or \
                 PTQ1_0 for matrices; F32, F16, BF16, Q8_0, Q6_K, Q4_0 or Q4_K for embeddings",
        ),
        (
            "norm",
            of("output_norm.weight", 26),
            ": tensor output_norm.weight: expected BF16, F16 or F32, found I32",
        ),
    ]);
}

#[test]
fn linear_layers_of_one_scale() {
    check(
        &gguf("Llama3-1.58", GgmlType::I2S),
        &[
            (
                "I2_S scale of 0",
                |file| i2s_scale(file, 0.0),
                ": tensor blk.1.ffn_up.weight: expected a positive scale (quantise with one \
                 thread: bitnet.cpp's quantiser loses it with more), found 0.0",
            ),
            (
                "I2_S scale of NaN",
                |file| i2s_scale(file, f32::NAN),
                ": tensor blk.1.ffn_up.weight: expected a positive scale (quantise with one \
                 thread: bitnet.cpp's quantiser loses it with more), found NaN",
            ),
            (
                "infinite I2_S scale",
                |file| i2s_scale(file, f32::INFINITY),
                ": tensor blk.1.ffn_up.weight: expected a positive scale (quantise with one \
                 thread: bitnet.cpp's quantiser loses it with more), found inf",
            ),
            (
                "negative I2_S scale",
                |file| i2s_scale(file, -1.0),
                ": tensor blk.1.ffn_up.weight: expected a positive scale (quantise with one \
                 thread: bitnet.cpp's quantiser loses it with more), found -1.0",
            ),
            (
                "code 3",
                |file| file.tensor("blk.1.ffn_up.weight").1[64 + 5] |= 0x30,
                ": tensor blk.1.ffn_up.weight: expected codes 0, 1 and 2, found 3 at row 1, \
                 column 37",
            ),
            (
                "quantised again",
                |file| retype(file, "blk.0.attn_k.weight", GgmlType::Q8_0),
                ": tensor blk.0.attn_k.weight: expected a ternary or binary type (a linear layer \
                 that was quantised again is no longer the model), found Q8_0",
            ),
            (
                "not ternary",
                |file| {
                    retype(file, "blk.1.attn_v.weight", GgmlType::F16);
                    let bytes = &mut file.tensor("blk.1.attn_v.weight").1;
                    bytes[..2].copy_from_slice(&[0x00, 0x3c]);
                    bytes[512..514].copy_from_slice(&[0x01, 0x3c]);
                },
                ": tensor blk.1.attn_v.weight: expected 0 and ± one number: ternary weights \
                 (convert the Hugging Face checkpoint, which says how to make them ternary), \
                 found 1 at row 0, column 0",
            ),
            (
                "NaN among floats",
                |file| {
                    retype(file, "blk.1.attn_v.weight", GgmlType::F32);
                    let bytes = &mut file.tensor("blk.1.attn_v.weight").1;
                    bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
                },
                ": tensor blk.1.attn_v.weight: expected 0 and ± one number: ternary weights \
                 (convert the Hugging Face checkpoint, which says how to make them ternary), \
                 found NaN at row 0, column 0",
            ),
            (
                "infinity among floats",
                |file| {
                    retype(file, "blk.1.attn_v.weight", GgmlType::F32);
                    let bytes = &mut file.tensor("blk.1.attn_v.weight").1;
                    bytes[..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
                },
                ": tensor blk.1.attn_v.weight: expected 0 and ± one number: ternary weights \
                 (convert the Hugging Face checkpoint, which says how to make them ternary), \
                 found inf at row 0, column 0",
            ),
            (
                "rows of parts of blocks",
                |file| {
                    *file.key("llama.feed_forward_length") = Value::U32(300);
                    for layer in 0..2 {
                        let name = |part: &str| format!("blk.{layer}.ffn_{part}.weight");
                        reshape(file, &name("gate"), &[300, 256]);
                        reshape(file, &name("up"), &[300, 256]);
                        reshape(file, &name("down"), &[256, 300]);
                        for (part, rows, k) in
                            [("gate", 300, 256), ("up", 300, 256), ("down", 256, 300)]
                        {
                            let at = rows * k / 4;
                            file.tensor(&name(part)).1[at..at + 4]
                                .copy_from_slice(&1f32.to_le_bytes());
                        }
                    }
                },
                ": tensor blk.0.ffn_down.weight: expected rows of whole blocks, found 300 columns \
                 of I2_S",
            ),
            (
                "a scale beside a matrix, of 0",
                |file| file.add_tensor("blk.0.attn_q.scale", GgmlType::F32, &[1], vec![0; 4]),
                ": tensor blk.0.attn_q.scale: expected a positive number, also times the matrix's \
                 own scale, found 0.0",
            ),
            (
                "a scale beside a matrix, too large for it",
                |file| {
                    i2s_scale(file, 1e30);
                    let huge = 1e30f32.to_le_bytes().to_vec();
                    file.add_tensor("blk.1.ffn_up.scale", GgmlType::F32, &[1], huge);
                },
                ": tensor blk.1.ffn_up.scale: expected a positive number, also times the matrix's \
                 own scale, found 1e30",
            ),
            (
                "two scales beside a matrix",
                |file| file.add_tensor("blk.0.attn_q.scale", GgmlType::F32, &[2], vec![0; 8]),
                ": tensor blk.0.attn_q.scale: expected shape [1], found [2]",
            ),
        ],
    );
}

/// Sets the scale of a matrix `[512, 256]`.
fn i2s_scale(file: &mut GgufFile, scale: f32) {
    let bytes = &mut file.tensor("blk.1.ffn_up.weight").1;
    bytes[512 * 256 / 4..][..4].copy_from_slice(&scale.to_le_bytes());
}

#[test]
fn linear_layers_with_scales_of_groups() {
    check(
        &gguf("2B4T", GgmlType::Tq2_0),
        &[
            (
                "code 3",
                |file| file.tensor("blk.1.attn_q.weight").1[3] |= 0x0c,
                ": tensor blk.1.attn_q.weight: expected codes 0, 1 and 2, found 3 at row 0, \
                 column 35",
            ),
            (
                "several scales in a BitNet",
                |file| file.tensor("blk.1.attn_q.weight").1[64..66].copy_from_slice(&[0, 0x3c]),
                ": tensor blk.1.attn_q.weight: expected one scale for the whole matrix, as in the \
                 first layer and as int8 activations ask for, found several",
            ),
            (
                "NaN",
                |file| {
                    file.tensor("blk.1.attn_q.weight").1[66 + 64..][..2].copy_from_slice(&[1, 0x7e])
                },
                ": tensor blk.1.attn_q.weight: expected finite scales, found NaN at row 1, column \
                 0",
            ),
            (
                "infinity in the first layer",
                |file| file.tensor("blk.0.ffn_up.weight").1[64..66].copy_from_slice(&[0, 0xfc]),
                ": tensor blk.0.ffn_up.weight: expected finite scales, found -inf at row 0, \
                 column 0",
            ),
        ],
    );
    check(
        &gguf("Bonsai-8B", GgmlType::Q2_0),
        &[
            (
                "code 3",
                |file| file.tensor("blk.1.ffn_down.weight").1[2] |= 0xc0,
                ": tensor blk.1.ffn_down.weight: expected codes 0, 1 and 2, found 3 at row 0, \
                 column 3",
            ),
            (
                "code 3 in a table",
                |file| file.tensor("output.weight").1[18 * 4 + 2] |= 0x03,
                ": tensor output.weight: expected codes 0, 1 and 2, found 3 at row 1, column 0",
            ),
            (
                "NaN in a table",
                |file| file.tensor("token_embd.weight").1[18..20].copy_from_slice(&[1, 0x7c]),
                ": tensor token_embd.weight: expected finite scales, found NaN at row 0, column \
                 64",
            ),
            (
                "one scale in a later layer",
                |file| {
                    retype(file, "blk.1.attn_output.weight", GgmlType::I2S);
                    let bytes = &mut file.tensor("blk.1.attn_output.weight").1;
                    let at = bytes.len() - 32;
                    bytes[at..at + 4].copy_from_slice(&1f32.to_le_bytes());
                },
                ": tensor blk.1.attn_output.weight: expected a scale for each group of inputs, as \
                 in the first layer, found one scale",
            ),
            (
                "a scale beside scales of groups",
                |file| {
                    let two = 2f32.to_le_bytes().to_vec();
                    file.add_tensor("blk.1.attn_q.scale", GgmlType::F32, &[1], two);
                },
                ": tensor \"blk.1.attn_q.scale\" was not expected: its matrix has a scale for \
                 each group of inputs",
            ),
        ],
    );
}

#[test]
fn keys() {
    check(
        &gguf("Llama3-1.58", GgmlType::I2S),
        &[
            (
                "no architecture",
                |file| file.remove_key("general.architecture"),
                ": general.architecture: expected a string, found nothing",
            ),
            (
                "qwen35",
                |file| *file.key("general.architecture") = text("qwen35"),
                ": unknown architecture \"qwen35\"; this version runs bitnet, bitnet-25, \
                 bitnet-b1.58, llama and qwen3",
            ),
            (
                "gemma3",
                |file| *file.key("general.architecture") = text("gemma3"),
                ": unknown architecture \"gemma3\"; this version runs bitnet, bitnet-25, \
                 bitnet-b1.58, llama and qwen3",
            ),
            (
                "minicpm",
                |file| *file.key("general.architecture") = text("minicpm"),
                ": unknown architecture \"minicpm\"; this version runs bitnet, bitnet-25, \
                 bitnet-b1.58, llama and qwen3",
            ),
            (
                "a number",
                |file| *file.key("general.architecture") = Value::U32(1),
                ": general.architecture: expected a string, found 1",
            ),
            (
                "no width",
                |file| file.remove_key("llama.embedding_length"),
                ": llama.embedding_length: expected 1 to 16777216, found nothing",
            ),
            (
                "width of 0",
                |file| *file.key("llama.embedding_length") = Value::U64(0),
                ": llama.embedding_length: expected 1 to 16777216, found 0",
            ),
            (
                "huge width",
                |file| *file.key("llama.embedding_length") = Value::U64(1 << 60),
                ": llama.embedding_length: expected 1 to 16777216, found 1152921504606846976",
            ),
            (
                "another width",
                |file| *file.key("llama.embedding_length") = Value::U64(512),
                ": tensor token_embd.weight: expected shape [301, 512], found [301, 256]",
            ),
            (
                "negative layers",
                |file| *file.key("llama.block_count") = Value::I32(-1),
                ": llama.block_count: expected an integer from 0, found -1",
            ),
            (
                "more layers",
                |file| *file.key("llama.block_count") = Value::I32(3),
                ": tensor blk.2.attn_norm.weight is missing",
            ),
            (
                "fewer layers",
                |file| *file.key("llama.block_count") = Value::I32(1),
                ": tensor \"blk.1.attn_k.weight\" was not expected: block_count is smaller",
            ),
            (
                "no layers",
                |file| file.remove_key("llama.block_count"),
                ": llama.block_count: expected 1 to 4096, found nothing",
            ),
            (
                "no heads",
                |file| file.remove_key("llama.attention.head_count"),
                ": llama.attention.head_count: expected 1 to 65536, found nothing",
            ),
            (
                "3 heads",
                |file| *file.key("llama.attention.head_count") = Value::U32(3),
                ": llama.attention.head_count_kv: expected a divisor of attention.head_count = 3, \
                 found 2",
            ),
            (
                "3 kv heads",
                |file| *file.key("llama.attention.head_count_kv") = Value::U32(3),
                ": llama.attention.head_count_kv: expected a divisor of attention.head_count = 4, \
                 found 3",
            ),
            (
                "no feed-forward",
                |file| file.remove_key("llama.feed_forward_length"),
                ": llama.feed_forward_length: expected 1 to 16777216, found nothing",
            ),
            (
                "no context",
                |file| file.remove_key("llama.context_length"),
                ": llama.context_length: expected 1 to 16777216, found nothing",
            ),
            (
                "no eps",
                |file| file.remove_key("llama.attention.layer_norm_rms_epsilon"),
                ": llama.attention.layer_norm_rms_epsilon: expected a positive number, found \
                 nothing",
            ),
            (
                "eps in quotes",
                |file| *file.key("llama.attention.layer_norm_rms_epsilon") = text("1e-5"),
                ": llama.attention.layer_norm_rms_epsilon: expected a float, found the string \
                 \"1e-5\"",
            ),
            (
                "rotary base of 0",
                |file| *file.key("llama.rope.freq_base") = Value::F32(0.0),
                ": llama.rope.freq_base: expected a positive number, found 0.0",
            ),
            (
                "values of another length",
                |file| file.add_key("llama.attention.value_length", Value::U32(32)),
                ": llama.attention.value_length: expected 64, as attention.key_length, found 32",
            ),
            (
                "keys of an odd length",
                |file| file.add_key("llama.attention.key_length", Value::U32(63)),
                ": llama.attention.key_length: expected an even number, found 63",
            ),
            (
                "keys of a huge length",
                |file| file.add_key("llama.attention.key_length", Value::U32(1 << 31)),
                ": llama.attention.key_length: expected 1 to 65536, found 2147483648",
            ),
            (
                "partial rotation",
                |file| file.add_key("llama.rope.dimension_count", Value::U32(32)),
                ": llama.rope.dimension_count: expected 64, as attention.key_length, found 32",
            ),
            (
                "a sliding window",
                |file| file.add_key("llama.attention.sliding_window", Value::U32(4096)),
                ": llama.attention.sliding_window: expected 0, found 4096",
            ),
            (
                "soft caps",
                |file| file.add_key("llama.final_logit_softcapping", Value::F32(30.0)),
                ": llama.final_logit_softcapping: expected 0, found 30",
            ),
            (
                "experts",
                |file| file.add_key("llama.expert_count", Value::U32(8)),
                ": llama.expert_count: expected 0, found 8",
            ),
            (
                "a scale of embeddings",
                |file| file.add_key("llama.embedding_scale", Value::F32(12.0)),
                ": llama.embedding_scale: expected 1, found 12",
            ),
            (
                "both directions",
                |file| file.add_key("llama.attention.causal", Value::Bool(false)),
                ": llama.attention.causal: expected true, found false",
            ),
            (
                "long rope",
                |file| file.add_key("llama.rope.scaling.type", text("longrope")),
                ": llama.rope.scaling.type: expected none, linear or yarn, found \"longrope\"",
            ),
            (
                "YaRN without a factor",
                |file| file.add_key("llama.rope.scaling.type", text("yarn")),
                ": llama.rope.scaling.factor: expected a positive number, found nothing",
            ),
            (
                "GELU",
                |file| file.add_key("llama.hidden_activation", text("gelu")),
                ": llama.hidden_activation: expected silu or relu2, found \"gelu\"",
            ),
        ],
    );
}

#[test]
fn tensors_of_a_llama() {
    check(
        &gguf("Llama3-1.58", GgmlType::I2S),
        &[
            (
                "no embedding",
                |file| file.remove_tensor("token_embd.weight"),
                ": tensor token_embd.weight is missing",
            ),
            (
                "no last norm",
                |file| file.remove_tensor("output_norm.weight"),
                ": tensor output_norm.weight is missing",
            ),
            (
                "no norm",
                |file| file.remove_tensor("blk.0.attn_norm.weight"),
                ": tensor blk.0.attn_norm.weight is missing",
            ),
            (
                "no matrix",
                |file| file.remove_tensor("blk.1.ffn_down.weight"),
                ": tensor blk.1.ffn_down.weight is missing",
            ),
            (
                "embedding of an axis",
                |file| reshape(file, "token_embd.weight", &[256]),
                ": tensor token_embd.weight: expected two dimensions, found [256]",
            ),
            (
                "wide embedding",
                |file| reshape(file, "token_embd.weight", &[301, 512]),
                ": tensor token_embd.weight: expected shape [301, 256], found [301, 512]",
            ),
            (
                "short head",
                |file| reshape(file, "output.weight", &[300, 256]),
                ": tensor output.weight: expected shape [301, 256], found [300, 256]",
            ),
            (
                "long norm",
                |file| reshape(file, "blk.1.ffn_norm.weight", &[257]),
                ": tensor blk.1.ffn_norm.weight: expected shape [256], found [257]",
            ),
            (
                "wide matrix",
                |file| reshape(file, "blk.1.attn_k.weight", &[128, 512]),
                ": tensor blk.1.attn_k.weight: expected shape [128, 256], found [128, 512]",
            ),
            (
                "long matrix",
                |file| reshape(file, "blk.1.attn_k.weight", &[256, 256]),
                ": tensor blk.1.attn_k.weight: expected shape [128, 256], found [256, 256]",
            ),
            (
                "integer norm",
                |file| retype(file, "output_norm.weight", GgmlType::Q8_0),
                ": tensor output_norm.weight: expected BF16, F16 or F32, found Q8_0",
            ),
            (
                "I2_S embedding",
                |file| retype(file, "token_embd.weight", GgmlType::I2S),
                ": tensor token_embd.weight: expected F32, F16, BF16, Q8_0, Q6_K, Q4_0, Q4_K or a \
                 type with scales of groups, found I2_S",
            ),
            (
                "NaN in the embedding",
                |file| {
                    file.tensor("token_embd.weight").1[2 * 259..][..2].copy_from_slice(&[1, 0x7e])
                },
                ": tensor token_embd.weight: expected finite elements, found NaN or infinity at \
                 row 1, column 3",
            ),
            (
                "infinity in a norm",
                |file| {
                    let bytes = &mut file.tensor("blk.0.ffn_norm.weight").1;
                    bytes[12..16].copy_from_slice(&f32::INFINITY.to_le_bytes());
                },
                ": tensor blk.0.ffn_norm.weight: expected finite weights, found inf at 3",
            ),
            (
                "a bias",
                |file| file.add_tensor("blk.0.attn_q.bias", GgmlType::F32, &[256], vec![0; 1024]),
                ": tensor \"blk.0.attn_q.bias\" was not expected: this version has no such tensor \
                 in this architecture",
            ),
            (
                "a sub-norm",
                |file| {
                    let ones = [0, 0, 0x80, 0x3f].repeat(256);
                    file.add_tensor("blk.0.attn_sub_norm.weight", GgmlType::F32, &[256], ones);
                },
                ": tensor \"blk.0.attn_sub_norm.weight\" was not expected: this version has no \
                 such tensor in this architecture",
            ),
            (
                "an expert",
                |file| {
                    file.add_tensor("blk.0.ffn_gate_inp.weight", GgmlType::F32, &[1], vec![0; 4]);
                },
                ": tensor \"blk.0.ffn_gate_inp.weight\" was not expected: this version has no \
                 such tensor in this architecture",
            ),
            (
                "a tensor of no layer",
                |file| file.add_tensor("v.patch_embd", GgmlType::F32, &[1], vec![0; 4]),
                ": tensor \"v.patch_embd\" was not expected: this version has no such tensor in \
                 this architecture",
            ),
            (
                "a rotary factor of 0",
                |file| file.add_tensor("rope_freqs.weight", GgmlType::F32, &[32], vec![0; 128]),
                ": tensor rope_freqs.weight: expected positive numbers, found 0",
            ),
            (
                "rotary factors of the whole head",
                |file| file.add_tensor("rope_freqs.weight", GgmlType::F32, &[64], vec![0; 256]),
                ": tensor rope_freqs.weight: expected shape [32], found [64]",
            ),
            (
                "norms inside linear layers, but one",
                |file| {
                    let ones = [0, 0, 0x80, 0x3f].repeat(256);
                    file.add_tensor("blk.0.attn_q_norm_in.weight", GgmlType::F32, &[256], ones);
                },
                ": tensor blk.0.attn_k_norm_in.weight is missing (blk.0.attn_q has a norm inside)",
            ),
        ],
    );
}

#[test]
fn tensors_of_other_architectures() {
    check(
        &gguf("2B4T", GgmlType::I2S),
        &[
            (
                "no sub-norm",
                |file| file.remove_tensor("blk.1.ffn_sub_norm.weight"),
                ": tensor blk.1.ffn_sub_norm.weight is missing",
            ),
            (
                "keys of another length",
                |file| file.add_key("bitnet-25.attention.key_length", Value::U32(32)),
                ": bitnet-25.attention.key_length: expected embedding_length / \
                 attention.head_count, for bitnet-25, found 32",
            ),
            (
                "a head of another shape",
                |file| file.add_tensor("output.weight", GgmlType::F16, &[1, 256], vec![0; 512]),
                ": tensor output.weight: expected shape [301, 256], found [1, 256]",
            ),
        ],
    );
    check(
        &gguf("Bonsai-8B", GgmlType::Q1_0),
        &[
            (
                "no head norm",
                |file| file.remove_tensor("blk.0.attn_k_norm.weight"),
                ": tensor blk.0.attn_k_norm.weight is missing",
            ),
            (
                "short head norm",
                |file| reshape(file, "blk.0.attn_q_norm.weight", &[64]),
                ": tensor blk.0.attn_q_norm.weight: expected shape [128], found [64]",
            ),
        ],
    );
    check(
        &gguf("Bonsai-8B", GgmlType::Pq2_0),
        &[(
            "infinity in a group",
            |file| file.tensor("blk.1.attn_v.weight").1[34..36].copy_from_slice(&[0, 0x7c]),
            ": tensor blk.1.attn_v.weight: expected finite scales, found inf at row 0, column \
                 128",
        )],
    );
}

fn strings(names: &[&str]) -> Value {
    let mut strings = Strings::default();
    names.iter().for_each(|name| strings.push(name));
    Value::Array(Array::String(strings))
}

/// Adds a name to a list of a rotation.
fn add_name(file: &mut GgufFile, key: &str, name: &str) {
    let Value::Array(Array::String(names)) = file.key(key) else { panic!("strings") };
    names.push(name);
}

/// The signs, one after another.
fn sign_values(file: &mut GgufFile) -> &mut Vec<i8> {
    let Value::Array(Array::I8(values)) = file.key("prism.hadamard.sign_values") else {
        panic!("i8")
    };
    values
}

fn sign_widths(file: &mut GgufFile) -> &mut Vec<u32> {
    let Value::Array(Array::U32(values)) = file.key("prism.hadamard.sign_widths") else {
        panic!("u32")
    };
    values
}

#[test]
fn rotations() {
    let rotated = case("Bonsai 2", |case| case.rotation == Some(Signs::Explicit));
    check(
        &gguf_case(&rotated),
        &[
            (
                "no version",
                |file| file.remove_key("prism.hadamard.version"),
                ": prism.hadamard.version: expected an integer from 0, found nothing",
            ),
            (
                "version 2",
                |file| *file.key("prism.hadamard.version") = Value::U32(2),
                ": prism.hadamard.version: expected 1, found 2",
            ),
            (
                "no block",
                |file| file.remove_key("prism.hadamard.block_size"),
                ": prism.hadamard.block_size: expected an integer from 0, found nothing",
            ),
            (
                "block of 96",
                |file| *file.key("prism.hadamard.block_size") = Value::U32(96),
                ": prism.hadamard.block_size: expected a power of two from 2 to 4096, found 96",
            ),
            (
                "block of 1",
                |file| *file.key("prism.hadamard.block_size") = Value::U32(1),
                ": prism.hadamard.block_size: expected a power of two from 2 to 4096, found 1",
            ),
            (
                "huge block",
                |file| *file.key("prism.hadamard.block_size") = Value::U32(8192),
                ": prism.hadamard.block_size: expected a power of two from 2 to 4096, found 8192",
            ),
            (
                "wide block",
                |file| *file.key("prism.hadamard.block_size") = Value::U32(1024),
                ": prism.hadamard.sign_widths: expected multiples of block_size = 1024, found 256",
            ),
            (
                "no transform",
                |file| file.remove_key("prism.hadamard.transform"),
                ": prism.hadamard.transform: expected a string, found nothing",
            ),
            (
                "a transform",
                |file| *file.key("prism.hadamard.transform") = text("dct"),
                ": prism.hadamard.transform: expected \"normalized-sylvester-walsh-hadamard\", \
                 found \"dct\"",
            ),
            (
                "no axis",
                |file| file.remove_key("prism.hadamard.axis"),
                ": prism.hadamard.axis: expected a string, found nothing",
            ),
            (
                "an axis",
                |file| *file.key("prism.hadamard.axis") = text("output"),
                ": prism.hadamard.axis: expected \"input-last-dimension\", found \"output\"",
            ),
            (
                "no mode",
                |file| file.remove_key("prism.hadamard.sign_mode"),
                ": prism.hadamard.sign_mode: expected a string, found nothing",
            ),
            (
                "a mode",
                |file| *file.key("prism.hadamard.sign_mode") = text("random"),
                ": prism.hadamard.sign_mode: expected \"identity\" or \"explicit\", found \
                 \"random\"",
            ),
            (
                "no widths",
                |file| file.remove_key("prism.hadamard.sign_widths"),
                ": prism.hadamard.sign_widths: expected an array of integers from 0, found \
                 nothing",
            ),
            (
                "no signs",
                |file| file.remove_key("prism.hadamard.sign_values"),
                ": prism.hadamard.sign_values: expected an array of integers of 32 bits, found \
                 nothing",
            ),
            (
                "no names",
                |file| file.remove_key("prism.hadamard.weight_names"),
                ": prism.hadamard.weight_names: expected the names of rotated weights, found none",
            ),
            (
                "no name",
                |file| *file.key("prism.hadamard.weight_names") = strings(&[]),
                ": prism.hadamard.weight_names: expected the names of rotated weights, found none",
            ),
            (
                "another key",
                |file| file.add_key("prism.hadamard.seed", Value::U32(1)),
                ": prism.hadamard.seed: expected no such key in version 1 (a rotation that is \
                 left out makes nonsense), found it",
            ),
            (
                "a sign too few",
                |file| {
                    sign_values(file).pop();
                },
                ": prism.hadamard.sign_values: expected as many signs as sign_widths says, found \
                 767 signs",
            ),
            (
                "a sign too many",
                |file| sign_values(file).push(1),
                ": prism.hadamard.sign_values: expected as many signs as sign_widths says, found \
                 769 signs",
            ),
            (
                "a sign of 0",
                |file| sign_values(file)[300] = 0,
                ": prism.hadamard.sign_values: expected signs of 1 and -1, found 0",
            ),
            (
                "a width twice",
                |file| {
                    sign_widths(file)[1] = 256;
                    sign_values(file).truncate(512);
                },
                ": prism.hadamard.sign_widths: expected every width once, found 256",
            ),
            (
                "a width without signs",
                |file| {
                    sign_widths(file).pop();
                    sign_values(file).truncate(256);
                },
                ": tensor blk.0.attn_output.weight: expected a width in \
                 prism.hadamard.sign_widths, found 512 columns",
            ),
            (
                "a width of part of a block",
                |file| {
                    sign_widths(file).push(64);
                    sign_values(file).extend([1; 64]);
                },
                ": prism.hadamard.sign_widths: expected multiples of block_size = 128, found 64",
            ),
            (
                "a width of 0",
                |file| sign_widths(file).push(0),
                ": prism.hadamard.sign_widths: expected multiples of block_size = 128, found 0",
            ),
            (
                "a norm",
                |file| add_name(file, "prism.hadamard.weight_names", "blk.0.attn_norm.weight"),
                ": prism.hadamard.weight_names: expected weights that this architecture rotates, \
                 found \"blk.0.attn_norm.weight\"",
            ),
            (
                "no layer",
                |file| add_name(file, "prism.hadamard.weight_names", "blk.2.attn_q.weight"),
                ": prism.hadamard.weight_names: expected weights that this architecture rotates, \
                 found \"blk.2.attn_q.weight\"",
            ),
            (
                "a name twice",
                |file| add_name(file, "prism.hadamard.weight_names", "blk.0.attn_q.weight"),
                ": prism.hadamard.weight_names: expected every name once, found \
                 \"blk.0.attn_q.weight\"",
            ),
            (
                "another table",
                |file| add_name(file, "prism.hadamard.inverse_weight_names", "output.weight"),
                ": prism.hadamard.inverse_weight_names: expected token_embd.weight alone, found \
                 \"output.weight\"",
            ),
            (
                "a head that is rotated and an embedding that is not",
                |file| file.remove_key("prism.hadamard.inverse_weight_names"),
                ": prism.hadamard.weight_names: expected weights that this architecture rotates, \
                 found \"token_embd.weight\"",
            ),
        ],
    );
}

#[test]
fn mlx_packs() {
    let packs = |bits: usize| {
        let form = WeightForm::Mlx { bits, group: 128 };
        case("Bonsai-8B", |case| case.form == Form::Mlx && case.config.weight_form == form)
    };
    let (bonsai, ternary) = (packs(1), packs(2));
    let verdict_of = |files: &HfFiles| {
        let directory = tempfile::tempdir().unwrap();
        files.write(directory.path());
        verdict(directory.path())
    };
    let of = |case: &Case, spoil: fn(&mut HfFiles)| {
        let mut files = HfFiles::of(&case.model(), case.form);
        spoil(&mut files);
        verdict_of(&files)
    };
    assert_eq!(of(&bonsai, |_| {}), "fine");
    assert_eq!(of(&ternary, |_| {}), "fine");
    compare(&[
        (
            "bf16 scales",
            of(&bonsai, |files| files.tensor("layers.1.self_attn.q_proj.scales").dtype = "BF16"),
            "model.safetensors: tensor model.layers.1.self_attn.q_proj.scales: expected F16, \
                 found BF16",
        ),
        (
            "scales of other groups",
            of(&bonsai, |files| {
                let scales = files.tensor("layers.1.self_attn.q_proj.scales");
                scales.shape[1] *= 2;
                scales.bytes = scales.bytes.repeat(2);
            }),
            "model.safetensors: tensor model.layers.1.self_attn.q_proj.scales: expected shape \
                 [512, 2], found [512, 4]",
        ),
        (
            "f32 biases",
            of(&bonsai, |files| {
                let biases = files.tensor("layers.1.self_attn.q_proj.biases");
                biases.dtype = "F32";
                biases.bytes = biases.bytes.repeat(2);
            }),
            "model.safetensors: tensor model.layers.1.self_attn.q_proj.biases: expected F16, \
                 found F32",
        ),
        (
            "no biases",
            of(&bonsai, |files| {
                files.tensors.retain(|tensor| !tensor.name.ends_with("1.mlp.up_proj.biases"));
            }),
            ": tensor model.layers.1.mlp.up_proj.biases is missing (quantization says packed \
                 weights)",
        ),
        (
            "another bias",
            of(&bonsai, |files| {
                files.tensor("layers.1.mlp.up_proj.biases").bytes[6..8].copy_from_slice(&[0, 0]);
            }),
            "model.safetensors: tensor model.layers.1.mlp.up_proj.biases: expected -scale/2 \
                 (weights that are two opposite values), found 0 at row 1, column 128",
        ),
        (
            "another bias of three values",
            of(&ternary, |files| {
                files.tensor("layers.1.mlp.up_proj.biases").bytes[6..8].copy_from_slice(&[0, 0]);
            }),
            "model.safetensors: tensor model.layers.1.mlp.up_proj.biases: expected -scale \
                 (ternary weights), found 0 at row 1, column 128",
        ),
        (
            "an infinite scale",
            of(&ternary, |files| {
                let scales = files.tensor("layers.1.mlp.up_proj.scales");
                scales.bytes[6..8].copy_from_slice(&[0, 0x7c]);
            }),
            "model.safetensors: tensor model.layers.1.mlp.up_proj.scales: expected finite \
                 scales, found inf at row 1, column 128",
        ),
        (
            "code 3",
            of(&ternary, |files| files.tensor("layers.1.mlp.down_proj.weight").bytes[1] |= 0x0c),
            "model.safetensors: tensor model.layers.1.mlp.down_proj.weight: expected codes 0, \
                 1 and 2, found 3 at row 0, column 5",
        ),
        (
            "codes as bytes",
            of(&ternary, |files| {
                let codes = files.tensor("layers.1.mlp.down_proj.weight");
                codes.dtype = "U8";
                codes.shape[1] *= 4;
            }),
            "model.safetensors: tensor model.layers.1.mlp.down_proj.weight: expected U32 \
                 (quantization says packed weights), found U8",
        ),
        (
            "another number of bits",
            of(&ternary, |files| {
                files.config["quantization"]["bits"] = 1.into();
            }),
            "model.safetensors: tensor model.embed_tokens.weight: expected shape [301, 8], \
                 found [301, 16]",
        ),
        (
            "groups that do not fit",
            of(&ternary, |files| {
                files.config["quantization"]["group_size"] = 256.into();
                files.config["hidden_size"] = 384.into();
            }),
            "model.safetensors: tensor model.embed_tokens.weight: expected a multiple of the \
                 group size in config.json, found 384 columns, groups of 256",
        ),
    ]);
}

/// What the library refuses, the program refuses in the same line and with exit code 1.
#[cfg(feature = "cli")]
#[test]
fn the_program_says_the_same() {
    use crate::cli::{failure, sterna};

    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("m.gguf");
    let run = |command: &str, bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let message = failure(sterna(&format!("{command} --device ref -m {}", path.display())), 1);
        let prefix = format!("error: {}: ", path.display());
        let rest = message.strip_prefix(&prefix).unwrap_or_else(|| panic!("{message}"));
        rest.trim_end().to_owned()
    };
    let out = directory.path().join("out.safetensors");
    let logits = format!("logits --tokens 1 --out {}", out.display());
    let llama = gguf("Llama3-1.58", GgmlType::I2S);
    let spoilt = |spoil: fn(&mut GgufFile)| {
        let mut file = llama.clone();
        spoil(&mut file);
        file.bytes()
    };
    let rotated = case("Bonsai 2", |case| case.rotation == Some(Signs::Explicit));
    let mut rotated = gguf_case(&rotated);
    *rotated.key("prism.hadamard.version") = Value::U32(2);
    for bytes in [
        with_type(&llama, "blk.1.ffn_up.weight", 38),
        with_type(&llama, "blk.1.ffn_up.weight", 134),
        spoilt(|file| i2s_scale(file, 0.0)),
        spoilt(|file| *file.key("general.architecture") = text("qwen35")),
        spoilt(|file| file.add_key("llama.expert_count", Value::U32(8))),
        spoilt(|file| file.remove_tensor("blk.1.ffn_down.weight")),
        spoilt(|file| reshape(file, "blk.1.attn_k.weight", &[128, 512])),
        rotated.bytes(),
    ] {
        let found = run(&logits, &bytes);
        assert_eq!(found, verdict_of(&bytes).trim_start_matches(": "));
        assert!(found.len() > 20 && !out.exists(), "{found}");
    }
    compare(&[
        (
            "no tokenizer",
            run("run Hello", &llama.bytes()),
            "tokenizer.ggml.model: expected a string, found nothing",
        ),
        (
            "more tokens than rows",
            run(
                "run Hello",
                &spoilt(|file| {
                    let names: Vec<String> = (0..400).map(|i| format!("t{i}")).collect();
                    let names: Vec<&str> = names.iter().map(String::as_str).collect();
                    file.add_key("tokenizer.ggml.model", text("gpt2"));
                    file.add_key("tokenizer.ggml.pre", text("llama-bpe"));
                    file.add_key("tokenizer.ggml.tokens", strings(&names));
                    file.add_key(
                        "tokenizer.ggml.token_type",
                        Value::Array(Array::I32(vec![1; 400])),
                    );
                    file.add_key("tokenizer.ggml.merges", strings(&[]));
                }),
            ),
            "tokenizer.ggml.tokens: expected 1 to 301 tokens, the model's vocab_size, found \
                 400",
        ),
    ]);
}
