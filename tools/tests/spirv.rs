//! The SPIR-V that `sterna-tools spirv` writes.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use sterna::backend::gpu::shader::KERNELS;

/// The instructions of a module: opcode and operands.
fn instructions(words: &[u32]) -> Vec<(u32, &[u32])> {
    const HEADER_WORDS: usize = 5;
    let mut rest = &words[HEADER_WORDS..];
    let mut found = Vec::new();
    while let Some(&first) = rest.first() {
        let (len, opcode) = ((first >> 16) as usize, first & 0xffff);
        assert!(len > 0 && len <= rest.len(), "a whole instruction");
        found.push((opcode, &rest[1..len]));
        rest = &rest[len..];
    }
    found
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u32>> {
    let entries = std::fs::read_dir(directory).expect("the directory");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("an entry").path();
        let bytes = std::fs::read(&path).expect("a file");
        let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, words.collect())
    };
    entries.map(read).collect()
}

#[test]
fn every_kernel_is_written_as_spirv() {
    // https://registry.khronos.org/SPIR-V/specs/unified1/SPIRV.html
    const MAGIC: u32 = 0x0723_0203;
    const VERSION_1_6: u32 = 0x0001_0600;
    const OP_ENTRY_POINT: u32 = 15;
    const GL_COMPUTE: u32 = 5;
    const OP_BIT_COUNT: u32 = 205;
    const OP_U_DOT: u32 = 4451;
    let directory = tempfile::tempdir().expect("a temporary directory");
    let out = directory.path().join("spirv");
    let run = |out: &Path| {
        let program = env!("CARGO_BIN_EXE_sterna-tools");
        Command::new(program).args(["spirv", "--out"]).arg(out).status().expect("it starts")
    };
    assert!(run(&out).success());
    let files = files(&out);
    for kernel in KERNELS {
        let is_of = |file: &&String| file.split('.').next() == Some(kernel.name);
        assert!(files.keys().any(|file| is_of(&file)), "{} is missing", kernel.name);
    }
    for (file, words) in &files {
        assert_eq!(words[..2], [MAGIC, VERSION_1_6], "{file}");
        let instructions = instructions(words);
        let has = |wanted| instructions.iter().any(|&(opcode, _)| opcode == wanted);
        let entries = instructions.iter().filter(|(opcode, _)| *opcode == OP_ENTRY_POINT);
        let entries: Vec<_> = entries.map(|(_, operands)| operands).collect();
        let main = u32::from_le_bytes(*b"main");
        assert_eq!(entries.len(), 1, "{file}");
        // Execution model, function, name.
        assert_eq!((entries[0][0], &entries[0][2..4]), (GL_COMPUTE, &[main, 0][..]), "{file}");
        let stem = file.strip_suffix(".spv").expect("a SPIR-V file");
        // As the driver gets them where it has packed dots: not emulated.
        assert!(!stem.ends_with("_i2") || stem.starts_with("quantize") || has(OP_U_DOT), "{file}");
        assert!(!stem.ends_with("gemv_planes") || has(OP_BIT_COUNT), "{file}");
        assert!(stem != "gemv_planes" || !has(OP_U_DOT), "{file}");
        validate(&out.join(file));
    }
    for kernel in ["fused_qkv", "fused_gated", "fused_residual"] {
        for variant in ["gemv_planes", "gemv_i2", "gemv_i2_signed", "gemv_i2_half"] {
            assert!(files.contains_key(&format!("{kernel}.{variant}.spv")), "{kernel} {variant}");
        }
    }
    // A second run replaces them.
    assert!(run(&out).success());
    // A directory cannot be where a file is.
    assert!(!run(&out.join("argmax.spv")).success());
}

/// Khronos' validator, where it is installed.
fn validate(file: &Path) {
    let Ok(output) =
        Command::new("spirv-val").args(["--target-env", "vulkan1.3"]).arg(file).output()
    else {
        return;
    };
    let problem = String::from_utf8_lossy(&output.stderr);
    // One that is older than SPV_KHR_cooperative_matrix does not know the capability.
    let is_cooperative =
        file.file_name().is_some_and(|name| name.to_string_lossy().contains("_coop"));
    if is_cooperative && problem.contains("Invalid capability operand: 6022") {
        return;
    }
    assert!(output.status.success(), "{}: {problem}", file.display());
}
