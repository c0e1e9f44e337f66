//! Whole models on the CPU backends, judged by the original implementation and by each other.

use sterna::Transformer;
use sterna::backend::{Device, LoadOptions};
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_bonsai, tiny_llama, tiny_normed};
use sterna::weights::{TernaryMatrix, WeightScale};

use crate::{golden, prefill};

fn load(model: &str, device: Device) -> Transformer {
    let checkpoint = golden::checkpoint(model);
    Transformer::load(&checkpoint, device, &LoadOptions::default(), &mut |_| {})
        .expect("the golden checkpoints load")
}

fn each(device: Device, check: impl Fn(&str, &mut Transformer) -> Result<(), String>) {
    for model in golden::MODELS {
        check(model, &mut load(model, device)).unwrap_or_else(|problem| panic!("{problem}"));
    }
}

#[test]
fn logits_on_ref() {
    each(Device::Reference, golden::check_logits);
}

#[test]
fn logits_on_cpu() {
    each(Device::Cpu, golden::check_logits);
}

#[test]
fn greedy_tokens_on_ref() {
    each(Device::Reference, golden::check_greedy);
}

#[test]
fn greedy_tokens_on_cpu() {
    each(Device::Cpu, golden::check_greedy);
}

fn prefill_equals_decode(device: Device) {
    for (config, int8_activations) in [
        (tiny_bitnet(), false),
        (tiny_llama(), false),
        (tiny_normed(), false),
        (tiny_bonsai(2, 64), true),
    ] {
        let source = SyntheticModel::new(config, 31);
        let options = LoadOptions { int8_activations, ..LoadOptions::default() };
        let mut transformer = Transformer::load(&source, device, &options, &mut |_| {}).unwrap();
        prefill::check(&mut transformer, prefill::Bound::Equal).unwrap();
    }
}

#[test]
fn prefill_equals_decode_on_ref() {
    prefill_equals_decode(Device::Reference);
}

#[test]
fn prefill_equals_decode_on_cpu() {
    prefill_equals_decode(Device::Cpu);
}

fn bonsai(device: Device) {
    let mut transformer = load(golden::BONSAI, device);
    golden::check_logits(golden::BONSAI, &mut transformer).unwrap();
    golden::check_greedy(golden::BONSAI, &mut transformer).unwrap();
}

#[test]
fn bonsai_on_ref() {
    bonsai(Device::Reference);
}

#[test]
fn bonsai_on_cpu() {
    bonsai(Device::Cpu);
}

fn gguf_files(device: Device) {
    for model in golden::GGUF {
        let mut transformer = load(model, device);
        golden::check_logits(model, &mut transformer).unwrap();
        golden::check_greedy(model, &mut transformer).unwrap();
    }
}

#[test]
fn gguf_files_on_ref() {
    gguf_files(Device::Reference);
}

#[test]
fn gguf_files_on_cpu() {
    gguf_files(Device::Cpu);
}

#[test]
fn single_matrices_on_ref() {
    let bitlinear = |matrix: &TernaryMatrix, x: &[f32]| {
        let (n, k) = (matrix.shape().n(), matrix.shape().k());
        let mut trits = vec![0; n * k];
        for (row, out) in trits.chunks_exact_mut(k).enumerate() {
            matrix.row(row, out).map_err(|error| error.to_string())?;
        }
        let x = cpu_ref::quantize_absmax::quantize_absmax(x);
        let acc = cpu_ref::gemv::gemv(&trits, &x.codes);
        let WeightScale::Tensor(scale) = matrix.scale() else { return Err("one scale".to_owned()) };
        Ok(cpu_ref::gemv::dequantize(&acc, &vec![scale; n], x.act_scale))
    };
    for model in golden::MODELS {
        golden::check_io(model, &bitlinear).unwrap_or_else(|problem| panic!("{problem}"));
    }
}
