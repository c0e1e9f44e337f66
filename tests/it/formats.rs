//! Every architecture in every format it ships in: the file gives the trits, scales, logits and
//! greedy tokens of the model it was written from.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use sterna::Device;
use sterna::config::Activation;
use sterna::format::float::f16_to_f32;
use sterna::format::ggml::GgmlType;
use sterna::format::gguf::Value;
use sterna::weights::{TernaryMatrix, WeightScale, WeightSource};

use crate::formats_common::{
    Answer, Case, Form, Gguf, GgufFile, Linears, Signs, all_trits, answer_on, cases, distance,
    judge_close, judge_exact,
};

const DEVICES: [Device; 2] = [Device::Reference, Device::Cpu];

fn on_reference(model: &dyn WeightSource) -> Answer {
    answer_on(model, Device::Reference, None).expect("the reference runs every model")
}

/// What multiplies every trit of row `n`.
fn row_scales(matrix: &TernaryMatrix, n: usize) -> Vec<f32> {
    let k = matrix.shape().k();
    match matrix.scale() {
        WeightScale::Tensor(scale) => vec![scale; k],
        WeightScale::Groups { group } => {
            let mut scales = vec![0; k / group];
            matrix.row_with_scales(n, &mut vec![0; k], &mut scales).unwrap();
            scales.iter().flat_map(|&bits| vec![f16_to_f32(bits); group]).collect()
        }
    }
}

/// Trits, scales, norms, rotations and tables: bit by bit, but for scales that the file rounds.
fn same_weights(expected: &dyn WeightSource, found: &dyn WeightSource, is_exact: bool) {
    let tables =
        |model: &dyn WeightSource| [Some(model.embedding().unwrap()), model.lm_head().unwrap()];
    for (expected, found) in tables(expected).iter().zip(&tables(found)) {
        assert_eq!(expected.is_some(), found.is_some(), "an LM head");
        let (Some(expected), Some(found)) = (expected, found) else { continue };
        assert_eq!(expected.shape(), found.shape());
        assert_eq!(expected.rotation(), found.rotation());
        let mut rows = [vec![0.0; expected.shape().k()], vec![0.0; expected.shape().k()]];
        for n in 0..expected.shape().n() {
            expected.row(n, &mut rows[0]).unwrap();
            found.row(n, &mut rows[1]).unwrap();
            assert!(rows[0] == rows[1], "row {n} of a table");
        }
    }
    assert_eq!(expected.final_norm().unwrap(), found.final_norm().unwrap());
    for layer in 0..expected.config().num_hidden_layers {
        let (expected, found) = (expected.layer(layer).unwrap(), found.layer(layer).unwrap());
        for ((norm, expected), (_, found)) in expected.norms().zip(found.norms()) {
            assert_eq!(expected, found, "layer {layer}, {norm:?}");
        }
        for ((linear, expected), (_, found)) in expected.linears().iter().zip(found.linears()) {
            let what = format!("layer {layer}, {}", linear.path);
            assert_eq!(expected.shape(), found.shape(), "{what}");
            assert_eq!(expected.input(), found.input(), "{what}");
            assert!(all_trits(expected) == all_trits(found), "{what}: trits");
            for n in 0..expected.shape().n() {
                let (expected, found) = (row_scales(expected, n), row_scales(found, n));
                // Rounding to an IEEE half changes a number by 2⁻¹¹ of it at most.
                let bound = if is_exact { 0.0 } else { expected[0] / 2048.0 };
                let is_close = |(a, b): (&f32, &f32)| (a - b).abs() <= bound;
                assert!(expected.iter().zip(&found).all(is_close), "{what}: scales of row {n}");
            }
        }
    }
}

/// The file on a device, against the model there and on the reference.
fn check(
    case: &Case,
    model: &dyn WeightSource,
    checkpoint: &sterna::Checkpoint,
    expected: &Answer,
    device: Device,
) -> Result<(), String> {
    if !case.is_exact() {
        let found = answer_on(checkpoint, device, Some(&expected.greedy))?;
        return judge_close(expected, &found);
    }
    let found = answer_on(checkpoint, device, None)?;
    if device == Device::Reference {
        return judge_exact(expected, &found);
    }
    let model = answer_on(model, device, None)?;
    if case.has_code_table() {
        // The same values, but the head's kernel for codes has another order of sums.
        let apart = distance(&model, &found);
        if apart.max.is_nan() || apart.max > 1e-5 {
            return Err(apart.to_string());
        }
    } else {
        judge_exact(&model, &found)?;
    }
    // Free running, and yet the same tokens.
    if found.greedy != expected.greedy {
        return Err(format!("tokens {:?}, expected {:?}", found.greedy, expected.greedy));
    }
    judge_close(expected, &found)
}

#[test]
fn every_format_gives_the_model_it_was_written_from() {
    let cases = cases();
    let on_cpu = AtomicUsize::new(0);
    let problems: Vec<String> = cases
        .par_iter()
        .filter_map(|case| {
            let (model, directory) = (case.model(), tempfile::tempdir().unwrap());
            let checkpoint = case.write(directory.path());
            assert!(checkpoint.unused_tensors().is_empty(), "{}", case.name());
            same_weights(&model, &checkpoint, case.is_exact());
            let (a, b) = (model.config(), checkpoint.config());
            assert_eq!(
                (a.activations, a.hidden_act, a.tie_word_embeddings, a.head_dim),
                (b.activations, b.hidden_act, b.tie_word_embeddings, b.head_dim),
                "{}",
                case.name()
            );
            let expected = on_reference(&model);
            DEVICES.iter().find_map(|&device| {
                on_cpu.fetch_add(usize::from(device == Device::Cpu), Ordering::Relaxed);
                let verdict = check(case, &model, &checkpoint, &expected, device);
                verdict.err().map(|problem| format!("{} on {device:?}: {problem}", case.name()))
            })
        })
        .collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(on_cpu.into_inner() > 30);
}

/// The first case of that name and form.
fn case(like: &str, form: impl Fn(Form) -> bool) -> Case {
    let found = cases().into_iter().find(|case| case.like.starts_with(like) && form(case.form));
    found.unwrap_or_else(|| panic!("no case {like}"))
}

fn gguf_of(case: &Case) -> GgufFile {
    let Form::Gguf(form) = case.form else { panic!("a GGUF case") };
    GgufFile::of(&case.model(), form)
}

fn is_gguf(form: Form, ty: GgmlType) -> bool {
    matches!(form, Form::Gguf(Gguf { linears: Linears::Ternary(found), .. }) if found == ty)
}

/// Opens a spoilt file and fails unless its answers are far from the model's.
fn assert_far(what: &str, case: &Case, file: &GgufFile) {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = sterna::Checkpoint::open(&file.write(directory.path())).unwrap();
    assert_apart(what, &case.model(), &checkpoint);
}

/// Twice the bounds apart, after the same tokens.
fn assert_apart(what: &str, model: &dyn WeightSource, spoilt: &dyn WeightSource) {
    let expected = on_reference(model);
    let found = answer_on(spoilt, Device::Reference, Some(&expected.greedy)).unwrap();
    let apart = distance(&expected, &found);
    let is_far = apart.max > 0.4 && apart.mean > 0.06 && apart.cosine < 0.998;
    assert!(is_far && judge_close(&expected, &found).is_err(), "{what}: not noticed: {apart}");
}

/// Each way to get a format wrong gives logits that no tolerance takes for the model's.
#[test]
fn wrong_readings_are_noticed() {
    let llama = case("Llama3-1.58", |form| is_gguf(form, GgmlType::I2S));
    let mut file = gguf_of(&llama);
    let Form::Gguf(form) = llama.form else { unreachable!() };
    let unpermuted = GgufFile::of(&llama.model(), Gguf { arch: "qwen3", ..form });
    for layer in 0..2 {
        for part in ["attn_q", "attn_k"] {
            let name = format!("blk.{layer}.{part}.weight");
            let own = unpermuted.clone().tensor(&name).1.clone();
            assert_ne!(file.tensor(&name).1, own);
            file.tensor(&name).1 = own;
        }
    }
    assert_far("q/k rows that are not permuted", &llama, &file);

    let mut file = gguf_of(&llama);
    *file.key("llama.rope.freq_base") = Value::F32(10_000.0);
    assert_far("another rotary base", &llama, &file);

    let mut file = gguf_of(&llama);
    for layer in 0..2 {
        let [gate, up] = ["gate", "up"].map(|part| format!("blk.{layer}.ffn_{part}.weight"));
        let bytes = file.tensor(&gate).1.clone();
        let other = std::mem::replace(&mut file.tensor(&up).1, bytes);
        file.tensor(&gate).1 = other;
    }
    assert_far("gate and up in each other's place", &llama, &file);

    // The other form of RoPE, from a file of an architecture whose rows are in their own order.
    let bitnet = case("2B4T", |form| is_gguf(form, GgmlType::I2S));
    let Form::Gguf(form) = bitnet.form else { unreachable!() };
    let permuted = GgufFile::of(&bitnet.model(), Gguf { arch: "llama", ..form });
    let mut file = gguf_of(&bitnet);
    for layer in 0..2 {
        for part in ["attn_q", "attn_k"] {
            let name = format!("blk.{layer}.{part}.weight");
            file.tensor(&name).1 = permuted.clone().tensor(&name).1.clone();
        }
    }
    assert_far("interleaved RoPE", &bitnet, &file);

    let scaled =
        case("2B4T", |form| matches!(form, Form::Gguf(Gguf { linears: Linears::Scaled, .. })));
    let mut file = gguf_of(&scaled);
    file.remove_key("bitnet.hidden_activation");
    assert_far("SiLU for relu²", &scaled, &file);

    let silu = case("1bitLLM", |form| is_gguf(form, GgmlType::I2S));
    assert_eq!(silu.config.hidden_act, Activation::Silu);
    let mut file = gguf_of(&silu);
    file.add_key("bitnet.hidden_activation", Value::String("relu2".to_owned()));
    assert_far("relu² for SiLU", &silu, &file);

    let arm = case("2B4T", |form| matches!(form, Form::Gguf(Gguf { linears: Linears::Arm64, .. })));
    assert_far("I2_S of the other layout", &arm, &gguf_of(&arm));

    let bonsai = case("Bonsai-8B", |form| is_gguf(form, GgmlType::Q1_0));
    let mut file = gguf_of(&bonsai);
    *file.key("qwen3.rope.scaling.factor") = Value::F32(1.0);
    assert_far("no YaRN", &bonsai, &file);
    let mut file = gguf_of(&bonsai);
    for layer in 0..2 {
        let [q, k] = ["q", "k"].map(|part| format!("blk.{layer}.attn_{part}_norm.weight"));
        let mut norms = [file.tensor(&q).1.clone(), file.tensor(&k).1.clone()];
        norms.iter_mut().for_each(|norm| norm.rotate_left(4));
        let [a, b] = norms;
        file.tensor(&q).1 = a;
        file.tensor(&k).1 = b;
    }
    assert_far("head norms one element off", &bonsai, &file);
}

/// The scale that divides, read as one that multiplies.
#[test]
fn the_reciprocal_scale_is_noticed() {
    let case = case("Llama3-1.58", |form| form == Form::PackedDivide);
    let directory = tempfile::tempdir().unwrap();
    case.write(directory.path());
    let path = directory.path().join("config.json");
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json["quantization_config"]["linear_class"] = "autobitlinear".into();
    std::fs::write(&path, json.to_string()).unwrap();
    let checkpoint = sterna::Checkpoint::open(directory.path()).unwrap();
    assert_apart("multiply", &case.model(), &checkpoint);
}

#[test]
fn wrong_rotations_are_noticed() {
    let case = cases().into_iter().find(|case| case.rotation == Some(Signs::Explicit)).unwrap();
    type Spoil = fn(&mut GgufFile);
    let wrong: [(&str, Spoil); 4] = [
        ("signs left out", |file| {
            *file.key("prism.hadamard.sign_mode") = Value::String("identity".to_owned());
            file.remove_key("prism.hadamard.sign_widths");
            file.remove_key("prism.hadamard.sign_values");
        }),
        ("smaller blocks", |file| *file.key("prism.hadamard.block_size") = Value::U32(64)),
        ("no rotation", |file| {
            file.keys.retain(|(key, _)| !key.starts_with("prism.hadamard."));
        }),
        ("a table that is not rotated back", |file| {
            file.remove_key("prism.hadamard.inverse_weight_names");
            let names = file.key("prism.hadamard.weight_names");
            let Value::Array(sterna::format::gguf::Array::String(strings)) = names else {
                panic!("strings")
            };
            let mut kept = sterna::format::gguf::Strings::default();
            strings.iter().filter(|name| *name != "token_embd.weight").for_each(|n| kept.push(n));
            *strings = kept;
        }),
    ];
    for (what, spoil) in wrong {
        let mut file = gguf_of(&case);
        spoil(&mut file);
        assert_far(what, &case, &file);
    }
}
