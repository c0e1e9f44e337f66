//! The kernels as SPIR-V, as wgpu gives them to a Vulkan driver.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use naga::back::{pipeline_constants, spv};
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use sterna::backend::gpu::account::published_pipelines;
use sterna::backend::gpu::shader::{COOPERATIVE, KERNELS};
use sterna::backend::gpu::{Specialised, Variant};

/// Writes every kernel, and every variant of it, to a file of its own.
pub fn write(out: &Path) -> anyhow::Result<()> {
    let mut files = BTreeMap::new();
    for (name, pipeline) in pipelines()? {
        let words = compile(&pipeline).with_context(|| name.clone())?;
        files.insert(name, words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>());
    }
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    for (name, bytes) in files {
        let path = out.join(format!("{name}.spv"));
        fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// The pipelines of published models by name.
fn pipelines() -> anyhow::Result<BTreeMap<String, Specialised>> {
    let mut named: BTreeMap<String, Specialised> = BTreeMap::new();
    for pipeline in published_pipelines()? {
        let slot = named.entry(name(&pipeline)).or_insert_with(|| pipeline.clone());
        // Of several matrices, the one with the longest rows.
        if row_len(&pipeline) > row_len(slot) {
            *slot = pipeline;
        }
    }
    let is_missing = |kernel: &&_| !named.values().any(|pipeline| pipeline.kernel == **kernel);
    if let Some(kernel) = KERNELS.iter().find(is_missing) {
        bail!("{}: none of the models has this kernel", kernel.name);
    }
    Ok(named)
}

fn constant(pipeline: &Specialised, name: &str) -> Option<f64> {
    pipeline.constants.iter().find(|(constant, _)| *constant == name).map(|(_, value)| *value)
}

fn row_len(pipeline: &Specialised) -> f64 {
    let chunks = constant(pipeline, "KC").map(|chunks| 64.0 * chunks);
    constant(pipeline, "K").or(chunks).unwrap_or_default()
}

/// The kernel, and what makes it a variant.
fn name(pipeline: &Specialised) -> String {
    let kernel = pipeline.kernel.name;
    let mut name = kernel.to_owned();
    let encoding = constant(pipeline, "ENCODING");
    let is_read_by =
        |variant: &Variant| encoding == Some(variant.gemv_encoding().constant() as f64);
    if let Some(variant) = Variant::ALL.into_iter().find(is_read_by) {
        let gemv = variant.gemv().name;
        // A fused step is a GEMV; a quantisation only makes one's input.
        let layout = gemv.strip_prefix("gemv_").unwrap_or(gemv);
        name += if kernel.starts_with("fused_") { "." } else { ".for_" };
        name += if kernel.starts_with("fused_") { gemv } else { layout };
    }
    match constant(pipeline, "BINARY") {
        Some(binary) if binary != 0.0 => name += ".binary",
        Some(_) => name += ".ternary",
        None => {}
    }
    // Of a tile of cooperative matrices.
    if let Some(subgroup) = constant(pipeline, "SUBGROUP") {
        let [rows, tokens] = ["R", "T"].map(|side| constant(pipeline, side).unwrap_or_default());
        name += &format!(".{rows}x{tokens}.{subgroup}_lanes");
    }
    if let Some(tokens) = constant(pipeline, "TOKENS").filter(|&tokens| tokens > 1.0) {
        name += &format!(".{tokens}_tokens");
    }
    name
}

/// The SPIR-V of a pipeline, as wgpu-hal 30 makes it for a Vulkan 1.3 driver with integer dot
/// products, 8-bit integers, robustness of buffers and native zeroes in workgroup memory, and for the
/// kernels that need them with f16 and cooperative matrices
/// (`vulkan/adapter.rs`, `open`; `vulkan/device.rs`, `compile_stage`).
fn compile(pipeline: &Specialised) -> anyhow::Result<Vec<u32>> {
    let (stage, entry_point) = (naga::ShaderStage::Compute, "main");
    let module = pipeline.kernel.module();
    let info = Validator::new(ValidationFlags::all(), Capabilities::all()).validate(&module)?;
    let constants =
        pipeline.constants.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let entry = Some((stage, entry_point));
    let (module, info) = pipeline_constants::process_overrides(&module, &info, entry, &constants)?;
    let options = options(pipeline);
    let pipeline =
        spv::PipelineOptions { shader_stage: stage, entry_point: entry_point.to_owned() };
    Ok(spv::write_vec(&module, &info, &options, Some(&pipeline))?)
}

fn options(pipeline: &Specialised) -> spv::Options<'static> {
    let checks = pipeline.kernel.runtime_checks();
    let mut capabilities = vec![
        spv::Capability::Shader,
        spv::Capability::Matrix,
        spv::Capability::Sampled1D,
        spv::Capability::Image1D,
        spv::Capability::ImageQuery,
        spv::Capability::DerivativeControl,
        spv::Capability::StorageImageExtendedFormats,
        spv::Capability::DotProductInputAllKHR,
        spv::Capability::DotProductInput4x8BitKHR,
        spv::Capability::DotProductInput4x8BitPackedKHR,
        spv::Capability::DotProductKHR,
        spv::Capability::Int8,
    ];
    if COOPERATIVE.contains(&pipeline.kernel) {
        capabilities.extend([
            spv::Capability::Float16,
            spv::Capability::CooperativeMatrixKHR,
            spv::Capability::VulkanMemoryModel,
        ]);
    }
    spv::Options {
        lang_version: (1, 6),
        flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
        capabilities: Some(capabilities.into_iter().collect()),
        bounds_check_policies: BoundsCheckPolicies {
            index: match checks.bounds_checks {
                true => BoundsCheckPolicy::Restrict,
                false => BoundsCheckPolicy::Unchecked,
            },
            // The hardware checks buffers.
            ..BoundsCheckPolicies::default()
        },
        zero_initialize_workgroup_memory: match pipeline.kernel.zeroes_workgroup_memory() {
            true => spv::ZeroInitializeWorkgroupMemoryMode::Native,
            false => spv::ZeroInitializeWorkgroupMemoryMode::None,
        },
        force_loop_bounding: checks.force_loop_bounding,
        emit_int_div_checks: checks.int_div_checks,
        ..spv::Options::default()
    }
}
