//! The kernels as WGSL, as a browser gets them, and the pipelines that are made of them.

use std::fs;
use std::path::Path;

use anyhow::Context;
use serde_json::{Map, Value, json};
use sterna::backend::gpu::Specialised;
use sterna::backend::gpu::account::published_pipelines;
use sterna::backend::gpu::shader::{Access, KERNELS, Kernel};

/// Writes every kernel to a file of its own, and `pipelines.json`: what each of the pipelines of published
/// models is made of.
pub fn write(out: &Path) -> anyhow::Result<()> {
    let mut distinct: Vec<Specialised> = Vec::new();
    for pipeline in published_pipelines()? {
        if !distinct.contains(&pipeline) {
            distinct.push(pipeline);
        }
    }
    let pipelines: Vec<Value> = distinct.iter().map(describe).collect();
    fs::create_dir_all(out).with_context(|| out.display().to_string())?;
    let write = |name: String, text: String| {
        let path = out.join(name);
        fs::write(&path, text).with_context(|| path.display().to_string())
    };
    for kernel in KERNELS {
        write(format!("{}.wgsl", kernel.name), kernel.wgsl())?;
    }
    write("pipelines.json".to_owned(), format!("{:#}\n", Value::from(pipelines)))
}

/// Kernel, override constants, and the types of the buffers of group 0 in the order of their bindings.
fn describe(pipeline: &Specialised) -> Value {
    let constants = pipeline.constants.iter();
    let constants: Map<_, _> =
        constants.map(|&(name, value)| (name.to_owned(), value.into())).collect();
    json!({
        "kernel": pipeline.kernel.name,
        "constants": constants,
        "buffers": buffers(pipeline.kernel),
    })
}

/// In WebGPU's words.
fn buffers(kernel: Kernel) -> Vec<&'static str> {
    let name = |access| match access {
        Access::Uniform => "uniform",
        Access::Read => "read-only-storage",
        Access::Write => "storage",
    };
    kernel.bindings().into_iter().map(|binding| name(binding.access)).collect()
}
