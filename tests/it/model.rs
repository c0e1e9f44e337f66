//! Whole models on the CPU backends, judged by the original implementation and by each other.

use sterna::Transformer;
use sterna::backend::{Device, LoadOptions};
use sterna::weights::{TernaryMatrix, WeightScale};

use crate::golden;

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

#[test]
fn bonsai_on_ref() {
    let mut transformer = load(golden::BONSAI, Device::Reference);
    golden::check_logits(golden::BONSAI, &mut transformer).unwrap();
    golden::check_greedy(golden::BONSAI, &mut transformer).unwrap();
}

#[test]
fn gguf_files_on_ref() {
    for model in golden::GGUF {
        let mut transformer = load(model, Device::Reference);
        golden::check_logits(model, &mut transformer).unwrap();
        golden::check_greedy(model, &mut transformer).unwrap();
    }
}

/// Those with one scale a matrix.
#[test]
fn gguf_files_on_cpu() {
    for model in golden::GGUF.into_iter().filter(|model| !model.contains("qwen3")) {
        let mut transformer = load(model, Device::Cpu);
        golden::check_logits(model, &mut transformer).unwrap();
        golden::check_greedy(model, &mut transformer).unwrap();
    }
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
