//! Measuring on a device: kernels by its own clock, and the same tokens as without.

use std::ops::ControlFlow;

use libtest_mimic::Failed;
use sterna::Transformer;
use sterna::backend::gpu::{Capabilities, Gpu, GpuBackend};
use sterna::backend::{Device, LoadOptions};
use sterna::measure::bandwidth::Bandwidth;
use sterna::measure::bench::{BenchOptions, bench, profile};
use sterna::synthetic::{SyntheticModel, tiny_bitnet};
use sterna::weights::WeightSource;

use crate::Case;

const TEXT: [u32; 5] = [3, 1, 4, 1, 5];

pub fn cases(capabilities: Capabilities) -> Vec<Case> {
    let has_clock = capabilities == Capabilities::Adapter;
    vec![
        (
            "measure::kernels_are_timed".into(),
            Box::new(move |gpu: &Gpu| kernels_are_timed(gpu, has_clock)),
        ),
        ("measure::bytes_are_counted".into(), Box::new(bytes_are_counted)),
        ("measure::memory_has_a_speed".into(), Box::new(memory_has_a_speed)),
    ]
}

fn model(gpu: &Gpu) -> Result<Transformer, Failed> {
    let source = SyntheticModel::new(tiny_bitnet(), 5);
    let gpu = Gpu::open(Some(gpu.adapter.index), gpu.capabilities)?;
    let load = LoadOptions::default();
    let backend = GpuBackend::load(&source, gpu, None, &load, &mut |_| {})?;
    Ok(Transformer::new(source.config().clone(), Box::new(backend)))
}

fn tokens(model: &mut Transformer) -> Result<Vec<u32>, Failed> {
    model.reset();
    model.prompt(&TEXT)?;
    Ok((0..9).map(|_| model.next_token(3)).collect::<Result<_, _>>()?)
}

/// Every kernel of a token is there as often as it ran, and what is timed says what it says untimed.
fn kernels_are_timed(gpu: &Gpu, has_clock: bool) -> Result<(), Failed> {
    let mut model = model(gpu)?;
    let expected = tokens(&mut model)?;
    let found = profile(&mut model, &TEXT, (4, 6), &mut |_| ControlFlow::Continue(()))?;
    assert_eq!(tokens(&mut model)?, expected);
    let Some(found) = found else {
        // WebGPU's defaults have no timestamps.
        assert!(!has_clock, "{} has no timestamps", gpu.adapter);
        return Ok(());
    };
    assert_eq!(found.clock, "the device's");
    let calls = |name: &str| {
        let part = found.parts.iter().find(|part| part.name == name);
        part.unwrap_or_else(|| panic!("no {name}: {:?}", found.parts)).calls_per_token
    };
    assert_eq!((calls("embedding"), calls("head_int8")), (1.0, 1.0));
    assert!(found.parts.iter().all(|part| part.calls_per_token >= 1.0), "{:?}", found.parts);
    assert!(found.parts.iter().any(|part| part.us_per_token > 0.0), "{:?}", found.parts);
    assert_eq!(model.end_profile()?, []);
    model.start_profile();
    let during = tokens(&mut model)?;
    model.end_profile()?;
    assert_eq!(during, expected);
    Ok(())
}

/// What a reply is counted to read is near what the CPU counts, which packs the same weights.
fn bytes_are_counted(gpu: &Gpu) -> Result<(), Failed> {
    let options =
        BenchOptions { prompts: vec![5], replies: vec![4], depths: vec![0], repetitions: 1 };
    let mut goes_on = |_: sterna::measure::Event<'_>| ControlFlow::Continue(());
    let mut on_gpu = model(gpu)?;
    let source = SyntheticModel::new(tiny_bitnet(), 5);
    let load = LoadOptions::default();
    let mut on_cpu = Transformer::load(&source, Device::Cpu, &load, &mut |_| {})?;
    let results = [&mut on_gpu, &mut on_cpu].map(|model| {
        bench(model, &TEXT, &options, &mut goes_on).map(|mut results| results.remove(1))
    });
    let [gpu, cpu] = results;
    let (gpu, cpu) = (gpu?, cpu?);
    assert_eq!(gpu.cache_bytes_per_token, cpu.cache_bytes_per_token);
    let ratio = gpu.weight_bytes_per_token.unwrap() / cpu.weight_bytes_per_token.unwrap();
    // Small matrices are padded, and have more beside them, than those of a real model.
    assert!((0.8..1.5).contains(&ratio), "{ratio}");
    assert!(on_gpu.device_bytes().is_none_or(|bytes| bytes > 100_000));
    assert_eq!(on_cpu.device_bytes(), None);
    Ok(())
}

fn memory_has_a_speed(gpu: &Gpu) -> Result<(), Failed> {
    let measured = Bandwidth::of_gpu(gpu)?;
    assert!(measured.gb_per_second > 0.05 && measured.gb_per_second < 1e5, "{measured:?}");
    assert!(measured.method.starts_with("copy of "), "{measured:?}");
    Ok(())
}
