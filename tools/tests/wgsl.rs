//! The WGSL that `sterna-tools wgsl` writes.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::Value;
use sterna::backend::gpu::shader::KERNELS;

#[test]
fn every_kernel_is_written_as_wgsl_with_its_pipelines() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let out = directory.path().join("wgsl");
    let program = env!("CARGO_BIN_EXE_sterna-tools");
    let status = Command::new(program).args(["wgsl", "--out"]).arg(&out).status();
    assert!(status.expect("it starts").success());
    let read = |name: &str| std::fs::read_to_string(out.join(name)).expect("a file");
    for kernel in KERNELS {
        assert_eq!(read(&format!("{}.wgsl", kernel.name)), kernel.wgsl());
    }
    let pipelines: Vec<Value> = serde_json::from_str(&read("pipelines.json")).expect("JSON");
    let name = |pipeline: &Value| pipeline["kernel"].as_str().expect("a name").to_owned();
    let found: BTreeSet<String> = pipelines.iter().map(name).collect();
    let expected: BTreeSet<String> = KERNELS.iter().map(|kernel| kernel.name.to_owned()).collect();
    assert_eq!(found, expected);
    for pipeline in &pipelines {
        let source = read(&format!("{}.wgsl", name(pipeline)));
        let constants = pipeline["constants"].as_object().expect("constants");
        for (constant, value) in constants {
            assert!(source.contains(&format!("override {constant}:")), "{constant} of {pipeline}");
            assert!(value.is_number(), "{constant} of {pipeline}");
        }
        let buffers = pipeline["buffers"].as_array().expect("buffers");
        assert_eq!(buffers.len(), source.matches("@binding(").count(), "{pipeline}");
    }
}
