//! Whole models on the GPU, judged by the original implementation and by the reference backend.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cpu_ref::attention::{Cached, Heads};
use libtest_mimic::Failed;
use sterna::backend::gpu::{
    Capabilities, GemvPlan, Gpu, GpuBackend, SumPlans, Variant, WorkDone, self_test,
};
use sterna::backend::{
    Backend, Batch, Device, HeadChoice, LoadOptions, Output, Progress, Tap, Tokens, Want,
};
use sterna::config::{Activations, ModelConfig};
use sterna::format::{ModelFiles, ReadAt};
use sterna::kv_cache::{BLOCK, KvFormat, SequenceId};
use sterna::layout::{Layout, Packed};
use sterna::random::Random;
use sterna::sampler::{Sampler, Sampling};
use sterna::synthetic::{SyntheticModel, tiny_bitnet, tiny_bonsai, tiny_llama, tiny_normed};
use sterna::weights::{
    Checkpoint, Codes, Input, LayerWeights, Rotation, Table, TableData, TernaryMatrix, WeightScale,
    WeightSource,
};
use sterna::{Error, Transformer};

use crate::Case;
use crate::formats;
use crate::golden;
use crate::kernels::cooperative;
use crate::prefill;
use crate::util::{close, open, same};

/// Variants that every model runs on; the others differ from them only in the kernels for one token.
const VARIANTS: [Variant; 2] = [Variant::BitSerial, Variant::PackedDot];

pub fn cases(capabilities: Capabilities) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for variant in VARIANTS {
        let label = variant.gemv().name;
        for model in golden::MODELS {
            cases.push((
                format!("golden::{model}::{label}"),
                Box::new(move |_| {
                    let mut transformer = load(capabilities, &golden::checkpoint(model), variant)?;
                    golden::check_logits(model, &mut transformer)?;
                    golden::check_greedy(model, &mut transformer)?;
                    Ok(())
                }),
            ));
        }
    }
    let mut add = |name: &str, case: fn(Capabilities) -> Result<(), Failed>| {
        cases.push((name.to_owned(), Box::new(move |_| case(capabilities))));
    };
    add("the_built_in_model_writes_the_same_text_as_ref_and_cpu", built_in_model);
    add("a_decode_step_is_one_submit_and_allocates_nothing", decode_step);
    match capabilities {
        // Models of the original implementations and the built-in one show that larger limits change
        // nothing: the kernels are the same, with the same constants.
        Capabilities::Adapter => add("texts_that_the_device_chooses", sampled_texts),
        Capabilities::WebGpuDefault => cases.extend(other_cases(capabilities)),
    }
    cases
}

/// What runs within WebGPU's defaults only.
fn other_cases(capabilities: Capabilities) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for variant in Variant::ALL.into_iter().filter(|variant| !VARIANTS.contains(variant)) {
        let (source, label) = (SyntheticModel::new(tiny_bitnet(), 42), variant.gemv().name);
        cases.push((
            format!("agrees_with_ref::bitnet::{label}"),
            Box::new(move |_| agrees_with_reference(capabilities, &source, variant, false)),
        ));
    }
    for variant in VARIANTS {
        let label = variant.gemv().name;
        for model in golden::MODELS {
            cases.push((
                format!("golden_io::{model}::{label}"),
                Box::new(move |gpu| {
                    golden::check_io(model, &|matrix, x| bitlinear(gpu, variant, matrix, x))?;
                    Ok(())
                }),
            ));
        }
        for (name, config) in [
            ("bitnet", tiny_bitnet()),
            ("llama", tiny_llama()),
            ("normed", tiny_normed()),
            ("heads_of_100", ModelConfig { head_dim: 100, ..tiny_normed() }),
        ] {
            let source = SyntheticModel::new(config, 42);
            cases.push((
                format!("agrees_with_ref::{name}::{label}"),
                Box::new(move |_| agrees_with_reference(capabilities, &source, variant, false)),
            ));
        }
    }
    for (bits, group) in [(1, 128), (1, 64), (2, 64), (2, 128)] {
        let source = SyntheticModel::new(tiny_bonsai(bits, group), 43);
        for int8 in [false, true] {
            let source = source.clone();
            let label = if int8 { "group_gemv_int8" } else { "group_gemv" };
            cases.push((
                format!("agrees_with_ref::bonsai_{bits}_{group}::{label}"),
                Box::new(move |_| {
                    agrees_with_reference(capabilities, &source, Variant::BitSerial, int8)
                }),
            ));
        }
    }
    for kind in [Rotated::Groups, Rotated::Codes, Rotated::Sums] {
        cases.push((
            format!("agrees_with_ref::rotated::{kind:?}"),
            Box::new(move |_| {
                let source = RotatedModel::new(kind);
                agrees_with_reference(capabilities, &source, Variant::BitSerial, false)
            }),
        ));
    }
    cases.push((
        format!("golden::{}", golden::BONSAI),
        Box::new(move |_| {
            let checkpoint = golden::checkpoint(golden::BONSAI);
            let mut transformer = load(capabilities, &checkpoint, Variant::BitSerial)?;
            golden::check_logits(golden::BONSAI, &mut transformer)?;
            golden::check_greedy(golden::BONSAI, &mut transformer)?;
            Ok(())
        }),
    ));
    for case in formats::cases() {
        let name = format!("format::{}", case.name());
        cases.push((name, Box::new(move |_| format(capabilities, &case))));
    }
    for variant in VARIANTS {
        for fused in [false, true] {
            let plan = GemvPlan { fused, ..variant.into() };
            cases.push((
                format!("prefill_equals_decode::{plan}"),
                Box::new(move |_| prefill_equals_decode(capabilities, plan.into())),
            ));
        }
    }
    let mut add = |name: &str, case: fn(Capabilities) -> Result<(), Failed>| {
        cases.push((name.to_owned(), Box::new(move |_| case(capabilities))));
    };
    add("models_that_are_read_in_pieces_give_the_same_logits", read_in_pieces);
    add("sharded_matrices_give_the_same_tokens", sharded);
    add("sharded_groups_give_the_same_tokens", sharded_groups);
    add("the_device_names_its_kernels", names);
    add("a_rotation_past_the_limits_is_refused", long_rotation);
    add("a_batch_past_the_limits_is_refused", refusals);
    add("drafts_that_cannot_be_checked_are_refused", drafts_that_cannot_be_checked);
    add("logits_of_a_long_prompt_come_in_parts", many_logits);
    add("tokens_that_the_device_feeds_itself", token_loop);
    add("a_cache_in_shards_gives_the_same_logits", sharded_cache);
    add("a_layer_past_the_binding_limit", large_layer);
    add("forks_share_blocks_and_go_their_own_way", forks);
    add("a_block_is_read_and_written", read_and_write_block);
    add("snapshots_go_on_between_devices", snapshots);
    for head in [HeadChoice::Int8, HeadChoice::Exact] {
        cases.push((
            format!("drafts_lead_to_the_same_tokens::{head:?}"),
            Box::new(move |_| drafts(capabilities, head)),
        ));
    }
    let mut add = |name: &str, case: fn(Capabilities) -> Result<(), Failed>| {
        cases.push((name.to_owned(), Box::new(move |_| case(capabilities))));
    };
    add("a_lost_adapter_is_an_error_between_tokens", lost_between_tokens);
    add("a_lost_adapter_is_an_error_while_it_computes", lost_while_computing);
    add("a_lost_adapter_is_an_error_while_loading", lost_while_loading);
    cases
}

/// A file's answers are those of the model that it was written from.
fn format(capabilities: Capabilities, case: &formats::Case) -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let (model, checkpoint) = (case.model(), case.write(directory.path()));
    let expected = formats::answer_on(&model, Device::Reference, None)?;
    // Tiles of many tokens, which are compiled for each model, are other tests' point.
    let options = LoadOptions { max_batch: 16, ..LoadOptions::default() };
    let (gpu, variant) = (open(capabilities)?, Variant::PackedDot);
    let mut transformer = transformer(gpu, &checkpoint, variant, &options)?;
    let found = formats::answer(&mut transformer, Some(&expected.greedy))?;
    Ok(formats::judge_close(&expected, &found)?)
}

fn load(
    capabilities: Capabilities,
    source: &dyn WeightSource,
    variant: Variant,
) -> Result<Transformer, Error> {
    transformer(open(capabilities)?, source, variant, &LoadOptions::default())
}

fn transformer(
    gpu: Gpu,
    source: &dyn WeightSource,
    variant: Variant,
    options: &LoadOptions,
) -> Result<Transformer, Error> {
    let backend = GpuBackend::load(source, gpu, Some(variant.into()), options, &mut |_| {})?;
    Ok(Transformer::new(source.config().clone(), Box::new(backend)))
}

/// One BitLinear layer through the quantise and GEMV kernels.
fn bitlinear(
    gpu: &Gpu,
    variant: Variant,
    matrix: &TernaryMatrix,
    x: &[f32],
) -> Result<Vec<f32>, String> {
    let say = |error: Error| error.to_string();
    let packed = Packed::try_pack(variant.layout(), matrix.shape(), |n, out| matrix.row(n, out));
    let encoding = variant.gemv_encoding();
    let quantized = self_test::quantize(gpu, encoding, x, 1).map_err(say)?;
    let codes = self_test::decode_codes(encoding, &quantized.codes, x.len());
    let acc =
        self_test::multiply(gpu, variant.into(), &packed.map_err(say)?, &codes, 1).map_err(say)?;
    let WeightScale::Tensor(scale) = matrix.scale() else { panic!("one scale") };
    let scales = vec![scale; acc.len()];
    Ok(cpu_ref::gemv::dequantize(&acc, &scales, quantized.act_scale[0]))
}

/// Every tap of a forward pass, and what it returns.
type Trace = (Vec<(Tap, usize, Vec<f32>)>, Output);

fn trace(transformer: &mut Transformer, tokens: &[u32], want: Want) -> Result<Trace, Error> {
    let mut taps = Vec::new();
    let output = transformer.feed_tapped(tokens, want, &mut |tap, layer, values| {
        taps.push((tap, layer, values.to_vec()));
    })?;
    Ok((taps, output))
}

/// Prefill and decode: every step close to the reference's, the same greedy tokens.
fn agrees_with_reference(
    capabilities: Capabilities,
    source: &dyn WeightSource,
    variant: Variant,
    int8_activations: bool,
) -> Result<(), Failed> {
    let device = open(capabilities)?;
    // Its compiler keeps products and sums apart and divides exactly.
    let rounds_like_the_reference = device.adapter.name.starts_with("llvmpipe");
    let exact = rounds_like_the_reference
        && (int8_activations || source.config().activations != Activations::Float);
    // As many tokens a pass as the reference takes.
    let options = LoadOptions { int8_activations, max_batch: 64, ..LoadOptions::default() };
    let mut gpu = transformer(device, source, variant, &options)?;
    let mut reference = Transformer::load(source, Device::Reference, &options, &mut |_| {})?;
    let prompt: Vec<u32> = (0..70).map(|i| i * 37 % 301).collect();
    let (found, _) = trace(&mut gpu, &prompt, Want::LastLogits)?;
    let (expected, _) = trace(&mut reference, &prompt, Want::LastLogits)?;
    assert_eq!(found.len(), expected.len());
    for ((tap, layer, found), (_, _, expected)) in found.iter().zip(&expected) {
        // A difference in the last bits can move an int8 code by one step, 1/127 of the largest
        // activation, in a few of the values: the mean stays below half a step. Wrong arithmetic
        // lands at a tenth and more.
        let scale = expected.iter().fold(0.0f32, |max, value| max.max(value.abs()));
        let sum: f32 = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).sum();
        let mean = sum / found.len() as f32 / scale;
        let within = mean < 4e-3 && found.len() == expected.len();
        if exact && found != expected {
            return Err(format!("{tap:?} of layer {layer}: not the reference's bits").into());
        }
        if !within {
            return Err(format!("{tap:?} of layer {layer}: mean difference {mean}").into());
        }
    }
    let mut token = prompt[0];
    for index in 0..32 {
        let found = gpu.feed(&[token], Want::Token)?;
        let expected = reference.feed(&[token], Want::Token)?;
        if found != expected {
            return Err(format!("token {index}: {found:?}, expected {expected:?}").into());
        }
        if let Output::Token(next) = expected {
            token = next;
        }
    }
    Ok(())
}

/// The kernels of many tokens against those of one, in whole models.
fn prefill_equals_decode(capabilities: Capabilities, plans: SumPlans) -> Result<(), Failed> {
    let gpu = open(capabilities)?;
    let bound = match gpu.adapter.name.starts_with("llvmpipe") {
        true => prefill::Bound::Equal,
        false => prefill::Bound::MeanOfHalfAStep,
    };
    let source = SyntheticModel::new(tiny_bitnet(), 31);
    let options = LoadOptions::default();
    let backend = GpuBackend::load(&source, gpu, Some(plans), &options, &mut |_| {})?;
    let mut transformer = Transformer::new(source.config().clone(), Box::new(backend));
    Ok(prefill::check(&mut transformer, bound)?)
}

/// Whole models whose prompts go through cooperative matrices.
pub fn cooperative_cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let plans = |gpu: &Gpu| {
        let gemms = cooperative(gpu).into_iter();
        gemms.map(|gemm| SumPlans { gemm, ..Variant::PackedDot.into() })
    };
    cases.push((
        "prefill_equals_decode::gemm_i2_coop".to_owned(),
        Box::new(move |gpu| {
            plans(gpu).try_for_each(|plans| prefill_equals_decode(Capabilities::Adapter, plans))
        }),
    ));
    cases.push((
        "the_built_in_model_reads_a_prompt::gemm_i2_coop".to_owned(),
        Box::new(move |gpu| plans(gpu).try_for_each(built_in_prompt)),
    ));
    cases
}

/// 32 greedy tokens after a prompt of a hundred, on the GPU and the SIMD CPU.
fn built_in_prompt(plans: SumPlans) -> Result<(), Failed> {
    let checkpoint = sterna::built_in::checkpoint()?;
    let text =
        "Once upon a time there was a little girl who lived in a house by the sea. ".repeat(8);
    let mut prompt = sterna::Model::encode(&checkpoint, &text)?;
    prompt.truncate(100);
    same("tokens of the prompt", &[prompt.len()], &[100])?;
    let greedy = |mut model: Transformer| -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::new();
        let mut next = prompt.clone();
        while tokens.len() < 32 {
            let Output::Token(token) = model.feed(&next, Want::Token)? else { break };
            tokens.push(token);
            next = vec![token];
        }
        Ok(tokens)
    };
    let options = LoadOptions::default();
    let expected = greedy(Transformer::load(&checkpoint, Device::Cpu, &options, &mut |_| {})?)?;
    // Nobody else's pipelines are counted.
    let gpu = Gpu::open(None, Capabilities::Adapter)?;
    let backend = GpuBackend::load(&checkpoint, gpu, Some(plans), &options, &mut |_| {})?;
    let kernel = plans.gemm.kernel(Layout::I2);
    let is_used = backend.gpu().compiled().iter().any(|pipeline| pipeline.kernel == kernel);
    same(kernel.name, &[is_used], &[true])?;
    same("refusals", &backend.device().notes, &[])?;
    let model = Transformer::new(checkpoint.config().clone(), Box::new(backend));
    same(&format!("{} {}", kernel.name, plans.gemm), &greedy(model)?, &expected)
}

/// How the weights of a [`RotatedModel`] are scaled, and what its table is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rotated {
    /// Groups of 128, and a table of groups.
    Groups,
    /// Groups of 64, and a table of int8 codes.
    Codes,
    /// One scale a matrix, and a table of int8 codes with minima.
    Sums,
}

/// A random model that is stored in rotated bases: blocks of 64, signs that differ from matrix to
/// matrix; Q and K read the same one.
struct RotatedModel {
    kind: Rotated,
    model: SyntheticModel,
    /// Values a block.
    block: usize,
}

impl RotatedModel {
    fn new(kind: Rotated) -> Self {
        let config = match kind {
            Rotated::Groups => tiny_bonsai(2, 128),
            Rotated::Codes => ModelConfig { head_dim: 96, ..tiny_bonsai(1, 64) },
            Rotated::Sums => ModelConfig {
                hidden_size: 128,
                intermediate_size: 192,
                head_dim: 32,
                ..tiny_bitnet()
            },
        };
        Self { kind, model: SyntheticModel::new(config, 44), block: 64 }
    }

    fn rotation(&self, k: usize, seed: u64) -> Option<Arc<Rotation>> {
        let mut random = Random::new(seed);
        let signs = (0..k).map(|_| if random.below(2) == 0 { 1.0 } else { -1.0 }).collect();
        Some(Arc::new(Rotation { block: self.block, signs }))
    }

    fn rotated(&self, matrix: TernaryMatrix, seed: u64) -> TernaryMatrix {
        let rotation = self.rotation(matrix.shape().k(), seed);
        matrix.with_input(Input { norm: None, rotation })
    }
}

impl WeightSource for RotatedModel {
    fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    fn embedding(&self) -> sterna::Result<Table> {
        let table = self.model.embedding()?;
        let (shape, k) = (table.shape(), table.shape().k());
        let rotation = self.rotation(k, 1);
        if self.kind == Rotated::Groups {
            return Ok(table.with_rotation(rotation));
        }
        let mut random = Random::new(2);
        let (groups, group) = (shape.len() / 32, 32);
        let scale: Vec<f32> = (0..groups).map(|_| 4e-4 * (1.0 + random.unit().abs())).collect();
        let has_min = self.kind == Rotated::Sums;
        let min = if has_min { random.floats(groups, 0.01) } else { Vec::new() };
        let codes = Codes { group, codes: random.codes(shape.len()), scale, min };
        Ok(Table::new(shape, TableData::Codes(codes)).with_rotation(rotation))
    }

    fn lm_head(&self) -> sterna::Result<Option<Table>> {
        Ok(None)
    }

    fn final_norm(&self) -> sterna::Result<Vec<f32>> {
        self.model.final_norm()
    }

    fn layer(&self, index: usize) -> sterna::Result<LayerWeights> {
        let layer = self.model.layer(index)?;
        Ok(LayerWeights {
            q_proj: self.rotated(layer.q_proj, 3),
            k_proj: self.rotated(layer.k_proj, 3),
            v_proj: self.rotated(layer.v_proj, 4),
            o_proj: layer.o_proj,
            gate_proj: layer.gate_proj,
            up_proj: self.rotated(layer.up_proj, 5),
            down_proj: self.rotated(layer.down_proj, 6),
            ..layer
        })
    }
}

/// Bindings of 96 KiB: the table and gate and up in two or three shards.
fn sharded_groups(capabilities: Capabilities) -> Result<(), Failed> {
    for bits in [1, 2] {
        let tiny = tiny_bonsai(bits, 64);
        let config = ModelConfig { vocab_size: 4000, intermediate_size: 2048, ..tiny };
        let source = SyntheticModel::new(config, 5);
        for int8_activations in [false, true] {
            let options = LoadOptions {
                context: Some(20),
                kv: Some(KvFormat::Int8),
                max_batch: 2,
                int8_activations,
                ..LoadOptions::default()
            };
            let variant = Variant::BitSerial;
            let mut whole = transformer(open(capabilities)?, &source, variant, &options)?;
            let gpu = open(capabilities)?.with_max_binding(96 << 10);
            let mut sharded = transformer(gpu, &source, variant, &options)?;
            let prompt: Vec<u32> = (0..9).map(|i| i * 31).collect();
            let expected = whole.feed(&prompt, Want::LastLogits)?;
            if sharded.feed(&prompt, Want::LastLogits)? != expected {
                return Err(format!("{bits} bits: shards change the logits").into());
            }
        }
    }
    Ok(())
}

fn names(capabilities: Capabilities) -> Result<(), Failed> {
    for (source, int8_activations, expected) in [
        (SyntheticModel::new(tiny_bonsai(1, 128), 1), false, "group_gemv"),
        (SyntheticModel::new(tiny_bonsai(1, 128), 1), true, "group_gemv_int8"),
        (SyntheticModel::new(tiny_normed(), 1), false, "gemv_planes (split)"),
        (SyntheticModel::new(tiny_llama(), 1), false, "gemv_planes (fused)"),
    ] {
        // The kernels of `agrees_with_reference`.
        let options = LoadOptions { int8_activations, max_batch: 64, ..LoadOptions::default() };
        let model = transformer(open(capabilities)?, &source, Variant::BitSerial, &options)?;
        same("gemv", &[model.device().gemv.as_str()], &[expected])?;
    }
    Ok(())
}

fn long_rotation(capabilities: Capabilities) -> Result<(), Failed> {
    let config = ModelConfig { hidden_size: 8192, num_hidden_layers: 1, ..tiny_bitnet() };
    let source =
        RotatedModel { kind: Rotated::Sums, model: SyntheticModel::new(config, 44), block: 8192 };
    match load(capabilities, &source, Variant::BitSerial) {
        Err(Error::Dimension { found: 8192, max: 4096, .. }) => Ok(()),
        Err(other) => Err(other.into()),
        Ok(_) => Err("a block past a workgroup's memory was accepted".into()),
    }
}

/// Bindings of 32 KiB: the tables and the largest matrices fall into several shards.
fn sharded(capabilities: Capabilities) -> Result<(), Failed> {
    let config = ModelConfig { intermediate_size: 1000, ..tiny_llama() };
    let source = SyntheticModel::new(config, 5);
    for variant in Variant::ALL {
        // Activations are not sharded, nor is a block of the KV cache.
        let options = LoadOptions { context: Some(40), max_batch: 2, ..LoadOptions::default() };
        let mut whole = transformer(open(capabilities)?, &source, variant, &options)?;
        let gpu = open(capabilities)?.with_max_binding(32 << 10);
        let mut sharded = transformer(gpu, &source, variant, &options)?;
        let prompt: Vec<u32> = (0..9).map(|i| i * 31).collect();
        let expected = whole.feed(&prompt, Want::LastLogits)?;
        if sharded.feed(&prompt, Want::LastLogits)? != expected {
            return Err(format!("{variant:?}: shards change the logits").into());
        }
        // One token at a time, the steps are other kernels.
        for token in [3, 77, 120] {
            let expected = whole.feed(&[token], Want::LastLogits)?;
            if sharded.feed(&[token], Want::LastLogits)? != expected {
                return Err(format!("{variant:?}: shards change a token's logits").into());
            }
        }
    }
    let gpu = open(capabilities)?.with_max_binding(1 << 10);
    match transformer(gpu, &source, Variant::BitSerial, &LoadOptions::default()) {
        Err(Error::GpuLimit { .. }) => Ok(()),
        Err(other) => Err(other.into()),
        Ok(_) => Err("a buffer past the limit was accepted".into()),
    }
}

/// 64 greedy tokens on the GPU, the SIMD CPU and the reference.
fn built_in_model(capabilities: Capabilities) -> Result<(), Failed> {
    let checkpoint = sterna::built_in::checkpoint()?;
    let prompt = sterna::Model::encode(&checkpoint, "Once upon a time")?;
    let greedy = |mut model: Transformer| -> Result<Vec<u32>, Error> {
        let mut tokens = Vec::new();
        let mut next = prompt.clone();
        while tokens.len() < 64 {
            let Output::Token(token) = model.feed(&next, Want::Token)? else { break };
            tokens.push(token);
            next = vec![token];
        }
        Ok(tokens)
    };
    let options = LoadOptions::default();
    let on = |device| Transformer::load(&checkpoint, device, &options, &mut |_| {});
    let expected = greedy(on(Device::Reference)?)?;
    same("cpu", &greedy(on(Device::Cpu)?)?, &expected)?;
    for variant in VARIANTS {
        let found = greedy(load(capabilities, &checkpoint, variant)?)?;
        same(variant.gemv().name, &found, &expected)?;
    }
    Ok(())
}

/// A file by name.
type NamedReader = (String, Arc<dyn ReadAt>);

/// The files of a directory, in memory but read in pieces.
fn readers(path: &Path) -> Result<Vec<NamedReader>, Failed> {
    struct Pieces(Vec<u8>);
    impl ReadAt for Pieces {
        fn len_bytes(&self) -> io::Result<u64> {
            Ok(self.0.len() as u64)
        }

        fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            let rest = self.0.get(offset as usize..).unwrap_or_default();
            io::Read::read_exact(&mut &rest[..], buffer)
        }
    }
    let mut readers = Vec::new();
    for entry in std::fs::read_dir(path)? {
        let (name, path) = entry.map(|entry| (entry.file_name(), entry.path()))?;
        let reader: Arc<dyn ReadAt> = Arc::new(Pieces(std::fs::read(path)?));
        readers.push((name.to_string_lossy().into_owned(), reader));
    }
    Ok(readers)
}

/// A table that is uploaded piece by piece from its file is the table that is mapped: of every type, with
/// its int8 rows, over several buffers.
fn read_in_pieces(capabilities: Capabilities) -> Result<(), Failed> {
    // What the files do not say, nobody says here.
    let cases = || formats::cases().into_iter().filter(|case| !case.name().contains("Arm64"));
    let of_codes = cases().filter(|case| case.has_code_table()).take(4);
    let others = cases().filter(|case| !case.has_code_table()).take(3);
    let mut count = 0;
    for case in of_codes.chain(others) {
        let directory = tempfile::tempdir()?;
        let mapped = case.write(directory.path());
        let read = Checkpoint::new(ModelFiles::from_readers("set", readers(directory.path())?)?)?;
        if !matches!(read.stored_embedding()?.data(), TableData::Stored(_)) {
            continue;
        }
        count += 1;
        let answer = |checkpoint: &Checkpoint| -> Result<_, Failed> {
            let gpu = open(capabilities)?.with_max_binding(72 << 10);
            // Activations are not sharded, nor is a block of the KV cache.
            let options = LoadOptions {
                context: Some(64),
                kv: Some(KvFormat::Int8),
                max_batch: 2,
                ..LoadOptions::default()
            };
            let mut model = transformer(gpu, checkpoint, Variant::PackedDot, &options)?;
            Ok(formats::answer(&mut model, None)?)
        };
        let judged = formats::judge_exact(&answer(&mapped)?, &answer(&read)?);
        judged.map_err(|problem| format!("{}: {problem}", case.name()))?;
    }
    if count < 4 { Err(format!("{count} cases").into()) } else { Ok(()) }
}

/// Texts that the device chooses by itself are the reference's: drawn by the same seeds, and the best
/// under a penalty. With the int8 head, whose draws follow its own logits, they are reproducible.
fn sampled_texts(capabilities: Capabilities) -> Result<(), Failed> {
    let checkpoint = sterna::built_in::checkpoint()?;
    let prompt: Vec<u32> = sterna::Model::encode(&checkpoint, "Once upon a time")?;
    let random = |temperature, top_k, top_p, min_p, seed| Sampling::Random {
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
    };
    let text = |model: &mut Transformer, sampling, penalty| -> Result<Vec<u32>, Error> {
        let mut sampler = Sampler::new(sampling, penalty)?;
        sampler.observe(&prompt);
        model.reset();
        model.choose_with(sampler)?;
        model.prompt(&prompt)?;
        (0..24).map(|index| model.next_token(24 - index)).collect()
    };
    // Greedy texts are those of the exact rows with either head.
    let mut greedy = None;
    for head in [HeadChoice::Exact, HeadChoice::Int8] {
        let options = LoadOptions { head, ..LoadOptions::default() };
        let mut cpu = Transformer::load(&checkpoint, Device::Cpu, &options, &mut |_| {})?;
        let mut gpu = transformer(open(capabilities)?, &checkpoint, Variant::BitSerial, &options)?;
        for (sampling, penalty) in [
            (random(0.7, None, 1.0, 0.0, 3), 1.0),
            (random(1.0, Some(40), 0.95, 0.0, 4), 1.0),
            (random(1.2, None, 0.9, 0.05, 5), 1.3),
            (Sampling::Greedy, 1.3),
        ] {
            let expected = text(&mut cpu, sampling, penalty)?;
            let what = format!("{head:?} head, {sampling:?}, penalty {penalty}");
            same(&what, &text(&mut gpu, sampling, penalty)?, &expected)?;
            if sampling == Sampling::Greedy {
                same(&what, &expected, greedy.get_or_insert_with(|| expected.clone()))?;
            }
        }
    }
    Ok(())
}

/// Drafts of random lengths, of which some tokens are wrong, lead to the text of one token at a time, by
/// every way to choose: so each of a draft's tokens is chosen as it is alone.
fn drafts(capabilities: Capabilities, head: HeadChoice) -> Result<(), Failed> {
    let random = |temperature, top_k, top_p, seed| Sampling::Random {
        temperature,
        top_k,
        top_p,
        min_p: 0.0,
        seed,
    };
    let prompt: Vec<u32> = (0..9).map(|i| i * 37 % 301).collect();
    let (text_len, mut numbers) = (60, Random::new(81));
    let (mut accepted, mut rejected) = (0, 0);
    for config in [tiny_bitnet(), tiny_normed(), tiny_bonsai(2, 64)] {
        let source = SyntheticModel::new(config, 9);
        let (context, int8_activations) =
            (Some(128), source.config().activations == Activations::Float);
        let options = LoadOptions { context, head, int8_activations, ..LoadOptions::default() };
        let mut model = transformer(open(capabilities)?, &source, Variant::PackedDot, &options)?;
        for (sampling, penalty) in [
            (Sampling::Greedy, 1.0),
            (Sampling::Greedy, 1.4),
            (Sampling::Greedy, 0.6),
            (random(1.0, None, 1.0, 1), 1.0),
            (random(1.2, Some(30), 0.9, 2), 1.3),
        ] {
            let what = format!("{:?} {sampling:?} penalty {penalty}", source.config().architecture);
            let mut sampler = Sampler::new(sampling, penalty)?;
            sampler.observe(&prompt);
            let begin = |model: &mut Transformer| {
                model.reset();
                model.choose_with(sampler.clone())?;
                model.prompt(&prompt)
            };
            begin(&mut model)?;
            let expected: Vec<u32> =
                (0..text_len).map(|_| model.next_token(1)).collect::<Result<_, _>>()?;
            begin(&mut model)?;
            let mut text = vec![model.next_token(1)?];
            while text.len() < expected.len() {
                let rest = &expected[text.len()..];
                if numbers.below(4) == 0 {
                    // What the device feeds itself after a draft.
                    text.push(model.next_token(1)?);
                    continue;
                }
                let limit = model.draft_limit().min(rest.len() - 1);
                let mut draft = rest[..numbers.below(limit + 1)].to_vec();
                for token in &mut draft {
                    *token = if numbers.below(6) == 0 { numbers.below(301) as u32 } else { *token };
                }
                let last = text[text.len() - 1];
                let found = check(&mut model, last, &draft)?;
                accepted += found.len() - 1;
                rejected += draft.len() + 1 - found.len();
                text.extend(found);
            }
            same(&what, &text, &expected)?;
            same(&what, &[model.position()], &[prompt.len() + text_len - 1])?;
        }
    }
    if accepted < 200 || rejected < 100 {
        return Err(format!("{accepted} drafted tokens right, {rejected} wrong: no test").into());
    }
    Ok(())
}

/// Checks a draft and takes the tokens that it makes.
fn check(model: &mut Transformer, last: u32, draft: &[u32]) -> Result<Vec<u32>, Error> {
    model.check_draft(last, draft, |_| false)?;
    (0..model.ahead()).map(|_| model.next_token(1)).collect()
}

fn drafts_that_cannot_be_checked(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(tiny_bitnet(), 9);
    let mut model = load(capabilities, &source, Variant::PackedDot)?;
    model.prompt(&[1, 2, 3])?;
    if model.draft_limit() != 0 {
        return Err("a draft before the token before it is known".into());
    }
    let token = model.next_token(1)?;
    let next = model.next_token(1)?;
    model.reset();
    model.prompt(&[1, 2, 3])?;
    same("token", &[model.next_token(1)?], &[token])?;
    let unknown = model.check_draft(token, &[1, 1 << 20], |_| false);
    if !matches!(unknown, Err(Error::TokenOutOfRange { .. })) {
        return Err(format!("a token that is none: {unknown:?}").into());
    }
    let long = model.check_draft(token, &[1; 8], |_| false);
    if !matches!(long, Err(Error::Dimension { found: 8, max: 7, .. })) {
        return Err(format!("a long draft: {long:?}").into());
    }
    same("an empty draft", &check(&mut model, token, &[])?, &[next])?;
    same("position", &[model.position()], &[4])?;
    Ok(())
}

/// More rows of logits than a pass computes, and the same one by one.
fn many_logits(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(ModelConfig { vocab_size: 1700, ..tiny_bitnet() }, 9);
    let config = source.config();
    // Room for ten rows of logits; a token's widest activations take less. The table is in six shards.
    let gpu = open(capabilities)?.with_max_binding(10 * 4 * config.vocab_size as u64 + 3);
    let head = HeadChoice::Exact;
    let options = LoadOptions { context: Some(20), head, ..LoadOptions::default() };
    let plan = Some(Variant::BitSerial.into());
    let mut backend = GpuBackend::load(&source, gpu, plan, &options, &mut |_| {})?;
    same("rows of logits", &[backend.max_logit_rows()], &[10])?;
    let tokens: Vec<u32> = (0..13).map(|i| i * 11 % 301).collect();
    let sequence = backend.sequences().open();
    let tokens_in = Tokens::Given(&tokens[..11]);
    let all = Batch { sequence, tokens: tokens_in, start: 0, want: Want::AllLogits };
    match backend.begin(all) {
        Err(Error::Dimension { name: "rows of logits of a batch", found: 11, max: 10 }) => {}
        other => return Err(format!("{other:?}").into()),
    }
    let mut transformer = Transformer::new(config.clone(), Box::new(backend));
    let found = transformer.feed(&tokens, Want::AllLogits)?;
    transformer.reset();
    let mut expected = Vec::new();
    for token in &tokens {
        let Output::Logits(logits) = transformer.feed(&[*token], Want::LastLogits)? else {
            return Err("no logits".into());
        };
        expected.extend(logits);
    }
    let Output::Logits(found) = found else { return Err("no logits".into()) };
    close("logits", &found, &expected, |_| 0.05)
}

fn refusals(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(tiny_bitnet(), 1);
    let mut model = load(capabilities, &source, Variant::BitSerial)?;
    let vocab_size = source.config().vocab_size;
    match model.feed(&[vocab_size as u32], Want::Token) {
        Err(Error::TokenOutOfRange { .. }) => {}
        other => return Err(format!("a token past the vocabulary: {other:?}").into()),
    }
    match model.feed(&vec![1; model.capacity() + 1], Want::Token) {
        Err(Error::ContextOverflow { .. }) => {}
        other => return Err(format!("a prompt past the context: {other:?}").into()),
    }
    // The model still works afterwards.
    model.feed(&[1, 2, 3], Want::Token)?;
    Ok(())
}

/// Fails unless a result is the one-line error of a lost adapter.
fn judge_lost<T>(adapter: &str, result: Result<T, Error>) -> Result<(), Failed> {
    let Err(error) = result else { return Err("a lost adapter went unnoticed".into()) };
    let message = error.to_string();
    let says = |part| message.contains(part);
    if !says(adapter) || !says("the device was lost") || message.lines().count() != 1 {
        return Err(format!("{message:?} does not say that {adapter} was lost").into());
    }
    Ok(())
}

/// What a call may take that has nothing to wait for.
const AT_ONCE: Duration = Duration::from_secs(20);

fn judge_time(start: Instant) -> Result<(), Failed> {
    match start.elapsed() {
        elapsed if elapsed <= AT_ONCE => Ok(()),
        elapsed => Err(format!("the error took {elapsed:?}").into()),
    }
}

/// Decoding says that the adapter is gone, and goes on saying so.
fn lost_between_tokens(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(tiny_bitnet(), 4);
    for want in [Want::Token, Want::LastLogits, Want::AllLogits, Want::Nothing] {
        let gpu = Gpu::open(None, capabilities)?;
        let (adapter, kill) = (gpu.adapter.name.clone(), gpu.kill_switch());
        let options = LoadOptions::default();
        let mut model = transformer(gpu, &source, Variant::PackedDot, &options)?;
        model.feed(&[1, 2, 3], Want::Token)?;
        kill();
        let start = Instant::now();
        judge_lost(&adapter, model.feed(&[4], want))?;
        // More often than there are buffers to read back.
        for _ in 0..10 {
            judge_lost(&adapter, model.feed(&[4], Want::Token))?;
        }
        judge_time(start)?;
    }
    Ok(())
}

/// The adapter goes while another thread decodes.
fn lost_while_computing(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(tiny_bitnet(), 5);
    for delay_ms in [1, 3, 10, 30] {
        let gpu = Gpu::open(None, capabilities)?;
        let (adapter, kill) = (gpu.adapter.name.clone(), gpu.kill_switch());
        let mut model = transformer(gpu, &source, Variant::BitSerial, &LoadOptions::default())?;
        model.feed(&[1], Want::Token)?;
        let start = Instant::now();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(delay_ms));
            kill();
        });
        let result = loop {
            model.reset();
            if let Err(error) = model.feed(&[1, 2, 3, 4, 5, 6, 7, 8], Want::Token) {
                break Err::<(), _>(error);
            }
            if start.elapsed() > AT_ONCE {
                break Ok(());
            }
        };
        killer.join().map_err(|_| "the killer panicked")?;
        judge_lost(&adapter, result)?;
        judge_time(start)?;
    }
    Ok(())
}

/// The adapter goes between two layers of a load.
fn lost_while_loading(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(tiny_bitnet(), 6);
    let gpu = Gpu::open(None, capabilities)?;
    let (adapter, kill) = (gpu.adapter.name.clone(), gpu.kill_switch());
    let plan = Some(Variant::BitSerial.into());
    let start = Instant::now();
    let mut progress = |at: Progress| {
        if at.done == 1 {
            kill();
        }
    };
    let options = LoadOptions::default();
    let loaded = GpuBackend::load(&source, gpu, plan, &options, &mut progress);
    judge_lost(&adapter, loaded)?;
    judge_time(start)
}

/// A decode step is one pass, one submit and eight bytes read back (the token, and how many exact
/// logits it took), and makes no buffer, bind group or pipeline. Chosen tokens that are fed where they are need fewer passes and submits.
fn decode_step(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(tiny_llama(), 1);
    // Nobody else's buffers are counted.
    let gpu = Gpu::open(None, capabilities)?;
    let counts = gpu.resource_counts();
    let options = LoadOptions::default();
    let mut backend =
        GpuBackend::load(&source, gpu, Some(Variant::PackedDot.into()), &options, &mut |_| {})?;
    let loaded = backend.resource_counts();
    if loaded == counts {
        return Err("the counters do not count".into());
    }
    let layers = source.config().num_hidden_layers;
    // Per layer: one for each of the five steps; embedding, and of the int8 head input, rows, candidates and pick.
    let dispatches_a_token = 5 * layers as u64 + 5;
    let sequence = backend.sequences().open();
    let step = |backend: &mut GpuBackend, tokens: Tokens, position: usize| -> Result<(), Error> {
        backend.begin(Batch { sequence, tokens, start: position, want: Want::Token })?;
        backend.embed()?;
        for layer in 0..layers {
            backend.qkv(layer)?;
            backend.attend(layer)?;
            backend.project_out(layer)?;
            backend.gate_up(layer)?;
            backend.down(layer)?;
        }
        backend.head()?;
        backend.choose()?;
        backend.finish().map(|_| ())
    };
    // The first steps wait for the driver's compiler, and are split as on a slow device.
    for _ in 0..4 {
        step(&mut backend, Tokens::Given(&[7]), 0)?;
        backend.take()?;
    }
    let before = backend.work_done();
    for position in 0..50 {
        step(&mut backend, Tokens::Given(&[7]), position)?;
        backend.take()?;
    }
    let WorkDone { passes, dispatches, submits, readback_bytes, .. } =
        backend.work_done().since(before);
    same("passes, submits, bytes", &[passes, submits, readback_bytes], &[50, 50, 50 * 8])?;
    same("dispatches", &[dispatches], &[50 * dispatches_a_token])?;
    let after = backend.resource_counts();
    if after != loaded {
        return Err(format!("{loaded:?} after loading, {after:?} after 50 tokens").into());
    }
    let before = backend.work_done();
    step(&mut backend, Tokens::Given(&[7]), 0)?;
    let (mut fed, mut taken) = (1, 0);
    while taken < 100 {
        while fed - taken < backend.lead() {
            step(&mut backend, Tokens::Chosen, fed)?;
            fed += 1;
        }
        backend.take()?;
        taken += 1;
    }
    // Until nothing is on its way.
    while taken < fed {
        backend.take()?;
        taken += 1;
    }
    let work = backend.work_done().since(before);
    let fed = fed as u64;
    same("dispatches ahead", &[work.dispatches], &[fed * dispatches_a_token])?;
    same("bytes", &[work.readback_bytes], &[fed * 8])?;
    if work.passes != work.submits || work.submits > fed / 2 {
        return Err(format!("{work:?} for {fed} tokens").into());
    }
    let after = backend.resource_counts();
    if after != loaded {
        return Err(format!("{loaded:?} after loading, {after:?} after tokens ahead").into());
    }
    match (step(&mut backend, Tokens::Given(&[7]), 0), backend.take(), backend.take()) {
        (Ok(()), Ok(_), Err(Error::NoToken)) => {}
        other => return Err(format!("a token that was not chosen: {other:?}").into()),
    }
    Ok(())
}

/// Tokens that the device feeds itself are those of feeding them one by one, however many are asked
/// for at a time, and also after a text that was given up.
fn token_loop(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(tiny_bitnet(), 3);
    let prompt = [5, 6, 7, 8, 9];
    let mut model = load(capabilities, &source, Variant::BitSerial)?;
    let mut expected = Vec::new();
    let mut next = prompt.to_vec();
    while expected.len() < 60 {
        let Output::Token(token) = model.feed(&next, Want::Token)? else { break };
        expected.push(token);
        next = vec![token];
    }
    for limit in [1, 3, 60, 1000] {
        model.reset();
        model.prompt(&prompt)?;
        same("prompt", &[model.position()], &[prompt.len()])?;
        for index in 0..expected.len() {
            let token = model.next_token(limit.min(expected.len() - index))?;
            same("token", &[token], &expected[index..][..1])?;
            same("position", &[model.position()], &[prompt.len() + index])?;
        }
    }
    // Given up with tokens on their way, in the middle of a text and at its start.
    for taken in [0, 7] {
        model.reset();
        model.prompt(&prompt)?;
        for _ in 0..taken {
            model.next_token(1000)?;
        }
    }
    let position = model.position();
    same(
        "fed after giving up",
        &[model.feed(&expected[6..7], Want::Token)?],
        &[Output::Token(expected[7])],
    )?;
    same("position", &[model.position()], &[position + 1])?;
    // To the last position of the context, and not past it.
    let options = LoadOptions { context: Some(prompt.len() + 9), ..LoadOptions::default() };
    let mut model = transformer(open(capabilities)?, &source, Variant::BitSerial, &options)?;
    model.prompt(&prompt)?;
    for expected in &expected[..10] {
        same("token", &[model.next_token(1000)?], &[*expected])?;
    }
    match model.next_token(1000) {
        Err(Error::ContextOverflow { .. }) => Ok(()),
        other => Err(format!("a token past the context: {other:?}").into()),
    }
}

/// Heads of 32 and one layer more than none: blocks of 64 positions are 16 KiB of f32 keys.
fn cache_source() -> SyntheticModel {
    SyntheticModel::new(ModelConfig { num_hidden_layers: 2, ..tiny_llama() }, 9)
}

/// Tokens of a pass of the tests of the cache: a constant of the kernels, so the same in all.
const CACHE_BATCH: usize = 100;

fn backend(
    gpu: Gpu,
    source: &SyntheticModel,
    kv: KvFormat,
    max_batch: usize,
) -> Result<GpuBackend, Error> {
    let options =
        LoadOptions { kv: Some(kv), max_batch, head: HeadChoice::Exact, ..LoadOptions::default() };
    GpuBackend::load(source, gpu, Some(Variant::PackedDot.into()), &options, &mut |_| {})
}

/// Logits of the last of some tokens of a sequence.
fn logits(
    backend: &mut GpuBackend,
    sequence: SequenceId,
    tokens: &[u32],
    start: usize,
) -> Result<Vec<f32>, Error> {
    backend.begin(Batch {
        sequence,
        tokens: Tokens::Given(tokens),
        start,
        want: Want::LastLogits,
    })?;
    backend.embed()?;
    for layer in 0..2 {
        backend.qkv(layer)?;
        backend.attend(layer)?;
        backend.project_out(layer)?;
        backend.gate_up(layer)?;
        backend.down(layer)?;
    }
    backend.head()?;
    match backend.finish()? {
        Output::Logits(logits) => Ok(logits),
        other => panic!("{other:?} are no logits"),
    }
}

/// Blocks in many shards, taken by two sequences in turn, prompts and single tokens: the same bits as in
/// one; and the cache is as large as its blocks.
fn sharded_cache(capabilities: Capabilities) -> Result<(), Failed> {
    let config = ModelConfig { num_key_value_heads: 6, ..cache_source().config().clone() };
    let source = SyntheticModel::new(config.clone(), 9);
    let text: Vec<u32> = (0..400).map(|i| i * 37 % 301).collect();
    for (kv, bytes) in [(KvFormat::F32, 4 * 64), (KvFormat::F16, 2 * 64), (KvFormat::Int8, 64 + 8)]
    {
        let mut whole = backend(open(capabilities)?, &source, kv, CACHE_BATCH)?;
        // Two blocks of f32, five of f16, ten of int8: each shard is a constant of its kernels.
        let gpu = open(capabilities)?.with_max_binding(128 << 10);
        let mut sharded = backend(gpu, &source, kv, CACHE_BATCH)?;
        let block_bytes =
            (config.num_key_value_heads * config.num_hidden_layers * 64 * bytes) as u64;
        same("bytes at first", &[whole.kv_bytes()], &[4 * block_bytes])?;
        let [one, other] = [&mut whole, &mut sharded].map(|backend| {
            let open = backend.sequences().open();
            (open, backend.sequences().open())
        });
        let mut ends = [0; 2];
        for len in [20, 17, 1].into_iter().cycle().take(23) {
            for (turn, end) in ends.iter_mut().enumerate() {
                let tokens = &text[*end..*end + len - turn.min(len - 1)];
                let [a, b] = [one, other].map(|(first, second)| [first, second][turn]);
                let expected = logits(&mut whole, a, tokens, *end)?;
                let found = logits(&mut sharded, b, tokens, *end)?;
                same(&format!("{kv:?} sequence {turn} from {end}"), &found, &expected)?;
                *end += tokens.len();
            }
        }
        // 5 + 5 blocks in use: room grows by half, and by four at least.
        same("bytes", &[whole.kv_bytes(), sharded.kv_bytes()], &[12 * block_bytes; 2])?;
    }
    Ok(())
}

/// A layer whose keys, and values, are more than the 128 MiB that a binding is promised: a few tokens
/// and one attend to all of them.
fn large_layer(capabilities: Capabilities) -> Result<(), Failed> {
    let heads = Heads { query: 32, kv: 32, dim: 256 };
    let config = ModelConfig {
        num_hidden_layers: 1,
        num_attention_heads: heads.query,
        num_key_value_heads: heads.kv,
        head_dim: heads.dim,
        max_position_embeddings: 4300,
        ..tiny_llama()
    };
    let mut backend =
        backend(open(capabilities)?, &SyntheticModel::new(config, 9), KvFormat::F32, 3)?;
    let is_llvmpipe = backend.device().description.starts_with("llvmpipe");
    let (row, full) = (heads.kv * heads.dim, 65);
    let sequence = backend.sequences().open();
    backend.sequences().prepare(sequence, 0, full * BLOCK)?;
    let [mut keys, mut values] = [Vec::new(), Vec::new()];
    let mut random = Random::new(27);
    for block in backend.sequences().table(sequence)?.to_vec() {
        let rows = random.floats(2 * BLOCK * row, 1.0);
        let bytes: Vec<u8> = rows.iter().flat_map(|x| x.to_le_bytes()).collect();
        backend.write_block(block, &bytes)?;
        keys.extend_from_slice(&rows[..BLOCK * row]);
        values.extend_from_slice(&rows[BLOCK * row..]);
    }
    let mut start = full * BLOCK;
    for tokens in [&[5, 6, 7][..], &[8]] {
        let (want, given) = (Want::LastLogits, Tokens::Given(tokens));
        backend.begin(Batch { sequence, tokens: given, start, want })?;
        backend.embed()?;
        backend.qkv(0)?;
        let query = backend.read(Tap::Query)?;
        backend.attend(0)?;
        let found = backend.read(Tap::Attended)?;
        backend.project_out(0)?;
        backend.gate_up(0)?;
        backend.down(0)?;
        backend.head()?;
        backend.finish()?;
        same("bytes", &[backend.kv_bytes() > 2 * (128 << 20)], &[true])?;
        // The tokens' own keys and values.
        let last = *backend.sequences().table(sequence)?.last().expect("blocks");
        let bytes = backend.read_block(last)?;
        let words = bytes.as_chunks::<4>().0;
        let rows: Vec<f32> = words.iter().map(|&word| f32::from_le_bytes(word)).collect();
        for (all, rows) in [&mut keys, &mut values].into_iter().zip(rows.chunks(BLOCK * row)) {
            all.truncate(full * BLOCK * row);
            all.extend_from_slice(rows);
        }
        for (query, found) in query.chunks(row).zip(found.chunks(row)) {
            start += 1;
            let [keys, values] = [&keys, &values].map(|rows| &rows[..start * row]);
            let cached = Cached { keys, values, scales: None };
            let expected = cpu_ref::attention::attention(query, cached, heads);
            let what = format!("position {start}");
            match is_llvmpipe {
                true => same(&what, found, &expected)?,
                false => close(&what, found, &expected, |_| 1e-5)?,
            }
        }
    }
    Ok(())
}

/// A session that is saved on one device and restored on another goes on with the same greedy tokens.
fn snapshots(capabilities: Capabilities) -> Result<(), Failed> {
    let source = SyntheticModel::new(tiny_bitnet(), 9);
    let identity = source.identity()?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("session");
    let prompt: Vec<u32> = (0..130).map(|i| i * 37 % 301).collect();
    let take = |model: &mut Transformer, n: usize| -> Result<Vec<u32>, Error> {
        (0..n).map(|index| model.next_token(n - index)).collect()
    };
    for kv in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        let options = LoadOptions { kv: Some(kv), ..LoadOptions::default() };
        let load = |is_gpu| -> Result<Transformer, Error> {
            if is_gpu {
                return transformer(open(capabilities)?, &source, Variant::BitSerial, &options);
            }
            Transformer::load(&source, Device::Cpu, &options, &mut |_| {})
        };
        for (from, to) in [(true, false), (false, true), (true, true)] {
            let mut origin = load(from)?;
            origin.prompt(&prompt)?;
            let before = take(&mut origin, 7)?;
            origin.save(&path, &identity)?;
            let expected = take(&mut origin, 20)?;
            let mut other = load(to)?;
            let session = other.restore(&path, &identity)?;
            let what = format!("{kv:?}, gpu {from} to gpu {to}");
            same(&what, session.tokens(), &[prompt.clone(), before].concat())?;
            let empty = other.switch(session)?;
            other.close(empty)?;
            same(&what, &take(&mut other, 20)?, &expected)?;
        }
    }
    Ok(())
}

/// Eight forks of a prefix cost one prefix, and each gives what it would alone.
fn forks(capabilities: Capabilities) -> Result<(), Failed> {
    let source = cache_source();
    let text: Vec<u32> = (0..200).map(|i| i * 31 % 301).collect();
    for kv in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        let mut backend = backend(open(capabilities)?, &source, kv, CACHE_BATCH)?;
        let first = backend.sequences().open();
        logits(&mut backend, first, &text[..100], 0)?;
        logits(&mut backend, first, &text[100..150], 100)?;
        let before = backend.sequences().in_use();
        let mut forks = Vec::new();
        for _ in 0..7 {
            forks.push(backend.sequences().fork(first, 140)?);
        }
        same("blocks of eight", &[backend.sequences().in_use()], &[before])?;
        let mut answers = Vec::new();
        for (n, &fork) in forks.iter().enumerate() {
            logits(&mut backend, fork, &text[n..n + 5], 140)?;
            answers.push(logits(&mut backend, fork, &[7], 145)?);
        }
        same("a block more each", &[backend.sequences().in_use()], &[before + 7])?;
        let after = logits(&mut backend, first, &[9], 150)?;
        for (n, fork) in forks.into_iter().enumerate() {
            backend.sequences().close(fork)?;
            if n % 3 > 0 {
                continue;
            }
            let alone = backend.sequences().open();
            logits(&mut backend, alone, &text[..100], 0)?;
            logits(&mut backend, alone, &[&text[100..140], &text[n..n + 5]].concat(), 100)?;
            same("a fork", &logits(&mut backend, alone, &[7], 145)?, &answers[n])?;
            backend.sequences().close(alone)?;
        }
        same("the origin", &logits(&mut backend, first, &[9], 150)?, &after)?;
    }
    Ok(())
}

/// What is read of the blocks of a sequence makes another that goes on in the same way.
fn read_and_write_block(capabilities: Capabilities) -> Result<(), Failed> {
    let source = cache_source();
    let text: Vec<u32> = (0..90).map(|i| i * 29 % 301).collect();
    for kv in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
        let mut backend = backend(open(capabilities)?, &source, kv, CACHE_BATCH)?;
        let first = backend.sequences().open();
        logits(&mut backend, first, &text, 0)?;
        let blocks = backend.sequences().table(first)?.to_vec();
        let contents = blocks.iter().map(|&block| backend.read_block(block));
        let contents = contents.collect::<Result<Vec<_>, _>>()?;
        let expected = logits(&mut backend, first, &[3], 90)?;
        // Room that is not there yet.
        let mut others = [(); 3].map(|()| backend.sequences().open());
        for other in others {
            backend.sequences().prepare(other, 0, 90)?;
        }
        others.reverse();
        for other in others {
            let table = backend.sequences().table(other)?.to_vec();
            for (&block, bytes) in table.iter().zip(&contents) {
                backend.write_block(block, bytes)?;
                same("bytes", &backend.read_block(block)?, bytes)?;
            }
            same("logits", &logits(&mut backend, other, &[3], 90)?, &expected)?;
        }
        match (backend.write_block(0, &contents[0][1..]), backend.read_block(1000)) {
            (Err(Error::Dimension { .. }), Err(Error::Dimension { .. })) => {}
            other => return Err(format!("a wrong block: {other:?}").into()),
        }
    }
    Ok(())
}
