//! The shipped WGSL, without an adapter: validation under WebGPU's default limits, translation for
//! every native API, the house rules, and the proof that the baseline GEMV only adds.

use std::collections::{BTreeSet, HashSet};

use naga::back::{self, PipelineConstants};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{
    AddressSpace, BinaryOperator, Expression, Function, GlobalVariable, Handle, MathFunction,
    Module, Scalar, ScalarKind, Statement, StorageAccess, TypeInner,
};
use sterna::backend::gpu::account::published_pipelines;
use sterna::backend::gpu::shader::{self, Access, KERNELS, Kernel};
use sterna::backend::gpu::{PassParams, Specialised};

/// WebGPU's default limits that a shader can exceed by itself.
const MAX_STORAGE_BUFFERS: usize = 8;
const MAX_WORKGROUP_BYTES: u32 = 16 * 1024;
const MAX_INVOCATIONS: u32 = 256;

/// Whether the kernel needs cooperative matrices, which run where an adapter has them.
fn is_cooperative(kernel: Kernel) -> bool {
    shader::COOPERATIVE.contains(&kernel)
}

/// What a kernel may use: no optional capability, but of the kernels that need them f16 and cooperative
/// matrices. `unpack2x16float` is part of WebGPU, but naga lists it apart for old OpenGL.
fn capabilities(kernel: Kernel) -> Capabilities {
    let optional = Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX;
    let all = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    if is_cooperative(kernel) { all | optional } else { all }
}

fn validate(kernel: Kernel, module: &Module) -> ModuleInfo {
    Validator::new(ValidationFlags::all(), capabilities(kernel))
        .validate(module)
        .unwrap_or_else(|error| panic!("{}: {}", kernel.name, error.emit_to_string(&kernel.wgsl())))
}

/// A module with its override constants at their defaults.
fn specialised(kernel: Kernel) -> (Module, ModuleInfo) {
    let module = kernel.module();
    let info = validate(kernel, &module);
    let entry = Some((naga::ShaderStage::Compute, "main"));
    let constants = PipelineConstants::default();
    let (module, info) =
        back::pipeline_constants::process_overrides(&module, &info, entry, &constants)
            .unwrap_or_else(|error| panic!("{}: {error}", kernel.name));
    (module.into_owned(), info.into_owned())
}

#[test]
fn every_kernel_is_valid_within_the_default_limits() {
    for &kernel in KERNELS {
        let (module, _) = specialised(kernel);
        let entry = &module.entry_points[0];
        assert_eq!(
            (module.entry_points.len(), entry.name.as_str()),
            (1, "main"),
            "{}",
            kernel.name
        );
        let invocations: u32 = entry.workgroup_size.iter().product();
        assert!(invocations <= MAX_INVOCATIONS, "{}: {invocations} invocations", kernel.name);
        let workgroup_bytes = workgroup_bytes(&module);
        assert!(workgroup_bytes <= MAX_WORKGROUP_BYTES, "{}: {workgroup_bytes} bytes", kernel.name);
    }
}

/// Bytes of workgroup memory.
fn workgroup_bytes(module: &Module) -> u32 {
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).expect("a valid module has layouts");
    let variables = module.global_variables.iter();
    let in_workgroup = variables.filter(|(_, variable)| variable.space == AddressSpace::WorkGroup);
    in_workgroup.map(|(_, variable)| layouter[variable.ty].size).sum()
}

/// A pipeline's module, its override constants resolved.
fn resolved(pipeline: &Specialised) -> (Module, ModuleInfo) {
    let module = pipeline.kernel.module();
    let info = validate(pipeline.kernel, &module);
    let constants =
        pipeline.constants.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let entry = Some((naga::ShaderStage::Compute, "main"));
    let (module, info) =
        back::pipeline_constants::process_overrides(&module, &info, entry, &constants)
            .unwrap_or_else(|error| panic!("{}: {error}", pipeline.kernel.name));
    (module.into_owned(), info.into_owned())
}

/// What is translated, and how.
///
/// | API | version | packed dot products |
/// | --- | --- | --- |
/// | Vulkan: SPIR-V | 1.0; 1.6 is tested with the tool that writes it | emulated in 1.0 |
/// | Metal: MSL | 2.1 | products of four bytes, one by one: Apple has no instruction |
/// | DirectX 12: HLSL | 6.0, and 6.4 as DXC takes it | emulated before 6.4 |
/// | OpenGL: GLSL ES | 3.10: the oldest with compute | emulated |
///
/// A browser gets the WGSL as it stands. Nothing else that a kernel uses is missing anywhere: no kernel needs
/// an optional feature, but those of cooperative matrices. They run where an adapter has these, which is
/// Vulkan with `VK_KHR_cooperative_matrix` and Metal, from MSL 2.3 on; naga writes them in neither HLSL nor
/// GLSL, which the test wants to be told of when it changes.
#[test]
fn every_pipeline_translates_to_every_api() {
    let pipelines = published_pipelines().expect("dry runs");
    for kernel in KERNELS {
        let is_in = pipelines.iter().any(|pipeline| pipeline.kernel == *kernel);
        assert!(is_in, "{}: no published model has it", kernel.name);
    }
    for pipeline in &pipelines {
        let (module, info) = resolved(pipeline);
        let translated = Translated { pipeline, module: &module, info: &info };
        let bytes = workgroup_bytes(&module);
        assert!(bytes <= MAX_WORKGROUP_BYTES, "{}: {bytes} bytes", translated.name());
        if is_cooperative(pipeline.kernel) {
            translated.spirv();
            assert!(translated.msl((2, 3)).contains("simdgroup_multiply_accumulate"));
            for (api, supported) in [
                ("HLSL", back::hlsl::supported_capabilities()),
                ("GLSL", back::glsl::supported_capabilities()),
            ] {
                assert!(!supported.contains(Capabilities::COOPERATIVE_MATRIX), "{api}: translate");
            }
            continue;
        }
        let has_packed_dot = pipeline.kernel.name.ends_with("_i2");
        translated.spirv();
        translated.msl((2, 1));
        let old = translated.hlsl(back::hlsl::ShaderModel::V6_0);
        let new = translated.hlsl(back::hlsl::ShaderModel::V6_4);
        assert!(!old.contains("dot4add"), "{}", translated.name());
        assert!(!has_packed_dot || new.contains("dot4add_u8packed"), "{}", translated.name());
        translated.glsl();
    }
}

/// A pipeline on its way to another language.
struct Translated<'a> {
    pipeline: &'a Specialised,
    module: &'a Module,
    info: &'a ModuleInfo,
}

impl Translated<'_> {
    fn name(&self) -> String {
        format!("{} {:?}", self.pipeline.kernel.name, self.pipeline.constants)
    }

    fn fail(&self, api: &str, error: &dyn std::fmt::Display) -> ! {
        panic!("{}: {api}: {error}", self.name())
    }

    fn spirv(&self) {
        let options = back::spv::Options::default();
        let spirv = back::spv::write_vec(self.module, self.info, &options, None)
            .unwrap_or_else(|error| self.fail("SPIR-V", &error));
        assert_eq!(spirv[0], 0x0723_0203, "{}: SPIR-V magic", self.name());
    }

    fn msl(&self, lang_version: (u8, u8)) -> String {
        let options = back::msl::Options { lang_version, ..Default::default() };
        let pipeline_options = back::msl::PipelineOptions::default();
        let (msl, _) = back::msl::write_string(self.module, self.info, &options, &pipeline_options)
            .unwrap_or_else(|error| self.fail("MSL", &error));
        assert!(msl.contains("kernel void"), "{}: MSL has a kernel", self.name());
        msl
    }

    fn hlsl(&self, shader_model: back::hlsl::ShaderModel) -> String {
        let options = back::hlsl::Options { shader_model, ..Default::default() };
        let pipeline_options = back::hlsl::PipelineOptions::default();
        let mut hlsl = String::new();
        back::hlsl::Writer::new(&mut hlsl, &options, &pipeline_options)
            .write(self.module, self.info, None)
            .unwrap_or_else(|error| self.fail("HLSL", &error));
        assert!(hlsl.contains("[numthreads("), "{}: HLSL has an entry point", self.name());
        hlsl
    }

    fn glsl(&self) {
        let options = back::glsl::Options {
            version: back::glsl::Version::new_gles(310),
            ..Default::default()
        };
        let pipeline_options = back::glsl::PipelineOptions {
            shader_stage: naga::ShaderStage::Compute,
            entry_point: "main".to_owned(),
            multiview: None,
        };
        let policies = naga::proc::BoundsCheckPolicies::default();
        let (module, info) = (self.module, self.info);
        let mut glsl = String::new();
        back::glsl::Writer::new(&mut glsl, module, info, &options, &pipeline_options, policies)
            .unwrap_or_else(|error| self.fail("GLSL", &error))
            .write()
            .unwrap_or_else(|error| self.fail("GLSL", &error));
        assert!(glsl.contains("local_size_x"), "{}: GLSL has a workgroup", self.name());
    }
}

#[test]
fn kernels_follow_the_house_rules() {
    for &kernel in KERNELS {
        let name = kernel.name;
        let source = kernel.wgsl();
        assert!(source.starts_with(&format!("// {name}: ")), "{name}: the header names the kernel");
        assert!(source.contains("Twin: cpu-ref/src/"), "{name}: the header names its twin");
        let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
        // An optional feature leaves adapters out. These two are what cooperative matrices are made of,
        // and there are other kernels for whoever has none.
        let enabled: Vec<_> = code.clone().filter(|line| line.starts_with("enable ")).collect();
        let allowed: &[&str] = match is_cooperative(kernel) {
            true => &["enable f16;", "enable wgpu_cooperative_matrix;"],
            false => &[],
        };
        assert_eq!(enabled, allowed, "{name}");
        let code = code.filter(|line| !line.starts_with("enable "));
        for word in ["enable ", "subgroup", "atomic"] {
            assert!(!code.clone().any(|line| line.contains(word)), "{name}: {word}");
        }
        // Without an override, wgpu's Vulkan backend ignores part of the pipeline options.
        assert!(kernel.module().overrides.iter().next().is_some(), "{name}: no override");

        let bindings = kernel.bindings();
        let numbers: Vec<_> = bindings.iter().map(|binding| binding.number).collect();
        assert_eq!(numbers, (0..bindings.len() as u32).collect::<Vec<_>>(), "{name}");
        let order = |access| match access {
            Access::Uniform => 0,
            Access::Read => 1,
            Access::Write => 2,
        };
        assert!(bindings.is_sorted_by_key(|b| order(b.access)), "{name}: pass, inputs, outputs");
        assert!(bindings.len() - 1 <= MAX_STORAGE_BUFFERS, "{name}: storage buffers");
        for binding in &bindings {
            let row = format!("| {} | {} ", binding.number, binding.name.trim_end_matches('_'));
            assert!(source.contains(row.trim_end()), "{name}: the header lists {}", binding.name);
        }
        let index = include_str!("../../shaders/README.md");
        assert!(index.contains(&format!("`{name}`")), "{name}: missing in shaders/README.md");
    }
}

#[test]
fn the_pass_uniform_has_the_same_offsets_in_rust() {
    let expected = [
        ("n_tokens", std::mem::offset_of!(PassParams, n_tokens)),
        ("start", std::mem::offset_of!(PassParams, start)),
        ("first_logit_row", std::mem::offset_of!(PassParams, first_logit_row)),
        ("n_logit_rows", std::mem::offset_of!(PassParams, n_logit_rows)),
        ("token_in", std::mem::offset_of!(PassParams, token_in)),
        ("token_out", std::mem::offset_of!(PassParams, token_out)),
        ("uniform_", std::mem::offset_of!(PassParams, uniform)),
        ("temperature", std::mem::offset_of!(PassParams, temperature)),
        ("penalty", std::mem::offset_of!(PassParams, penalty)),
        ("top_k", std::mem::offset_of!(PassParams, top_k)),
        ("top_p", std::mem::offset_of!(PassParams, top_p)),
        ("min_p", std::mem::offset_of!(PassParams, min_p)),
        ("block", std::mem::offset_of!(PassParams, block)),
        ("first_block", std::mem::offset_of!(PassParams, first_block)),
        ("end_block", std::mem::offset_of!(PassParams, end_block)),
    ];
    for &kernel in KERNELS {
        let module = kernel.module();
        let uniform =
            module.global_variables.iter().find(|(_, v)| v.space == AddressSpace::Uniform);
        let (_, uniform) = uniform.expect("every kernel has the pass uniform");
        let TypeInner::Struct { members, span } = &module.types[uniform.ty].inner else {
            panic!("{}: the uniform is a struct", kernel.name)
        };
        let found: Vec<_> = members
            .iter()
            .map(|member| (member.name.as_deref().unwrap_or_default(), member.offset as usize))
            .collect();
        assert_eq!(found, expected, "{}", kernel.name);
        assert_eq!(*span as usize, size_of::<PassParams>(), "{}", kernel.name);
    }
}

/// Calls `visit` on every statement of a block, nested ones included.
fn walk<'m>(block: &'m naga::Block, visit: &mut dyn FnMut(&'m Statement)) {
    for statement in block.iter() {
        visit(statement);
        match statement {
            Statement::Block(inner) => walk(inner, visit),
            Statement::If { accept, reject, .. } => {
                walk(accept, visit);
                walk(reject, visit);
            }
            Statement::Loop { body, continuing, .. } => {
                walk(body, visit);
                walk(continuing, visit);
            }
            Statement::Switch { cases, .. } => {
                cases.iter().for_each(|case| walk(&case.body, visit))
            }
            _ => {}
        }
    }
}

/// The variable that a pointer expression points into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Root {
    Global(Handle<GlobalVariable>),
    Local(Handle<naga::LocalVariable>),
}

fn root(function: &Function, pointer: Handle<Expression>) -> Root {
    match function.expressions[pointer] {
        Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => {
            root(function, base)
        }
        Expression::GlobalVariable(global) => Root::Global(global),
        Expression::LocalVariable(local) => Root::Local(local),
        ref other => panic!("not a pointer to a variable: {other:?}"),
    }
}

#[test]
fn no_kernel_reads_what_it_writes() {
    for &kernel in KERNELS {
        let module = kernel.module();
        let functions = module.functions.iter().map(|(_, function)| function);
        for function in functions.chain(module.entry_points.iter().map(|entry| &entry.function)) {
            for (_, expression) in function.expressions.iter() {
                let Expression::Load { pointer } = *expression else { continue };
                let Root::Global(global) = root(function, pointer) else { continue };
                let writable = matches!(module.global_variables[global].space,
                    AddressSpace::Storage { access } if access.contains(StorageAccess::STORE));
                let variable = &module.global_variables[global].name;
                // One lane of one workgroup sets a bit of a word.
                let sets_a_bit = [shader::SAMPLE, shader::HEAD_PICK].contains(&kernel)
                    && variable.as_deref() == Some("seen");
                assert!(!writable || sets_a_bit, "{}: reads its output {variable:?}", kernel.name);
            }
        }
    }
}

/// Everything that a value is computed with, followed through variables, workgroup memory and
/// calls; the indices of loads and stores are addressing, not part of the value.
struct ValueFlow<'m> {
    module: &'m Module,
    seen: HashSet<(Option<Handle<Function>>, Handle<Expression>)>,
    seen_roots: HashSet<(Option<Handle<Function>>, Root)>,
    operators: BTreeSet<String>,
}

/// `None` is the entry point.
type FunctionId = Option<Handle<Function>>;

impl<'m> ValueFlow<'m> {
    fn new(module: &'m Module) -> Self {
        let (seen, seen_roots) = (HashSet::new(), HashSet::new());
        Self { module, seen, seen_roots, operators: BTreeSet::new() }
    }

    /// The operators on the way to the result of the function of that name.
    fn operators_of(module: &'m Module, function: &str) -> BTreeSet<String> {
        let mut flow = Self::new(module);
        let named = |f: &Function| f.name.as_deref() == Some(function);
        let (handle, _) = module.functions.iter().find(|(_, f)| named(f)).expect("a function");
        flow.follow_results(handle);
        flow.operators
    }

    /// The same with the workgroup variable `input` taken as given.
    fn operators_of_given(module: &'m Module, function: &str, input: &str) -> BTreeSet<String> {
        let mut flow = Self::new(module);
        let mut globals = module.global_variables.iter();
        let (input, _) =
            globals.find(|(_, v)| v.name.as_deref() == Some(input)).expect("the input is a global");
        flow.seen_roots.insert((None, Root::Global(input)));
        let mut functions = module.functions.iter();
        let named = |f: &Function| f.name.as_deref() == Some(function);
        let (handle, _) = functions.find(|(_, f)| named(f)).expect("a function");
        flow.follow_results(handle);
        flow.operators
    }

    /// The operators on the way to every store into the global named `output`.
    fn operators_into(module: &'m Module, output: &str) -> BTreeSet<String> {
        let mut flow = Self::new(module);
        let global =
            module.global_variables.iter().find(|(_, v)| v.name.as_deref() == Some(output));
        let (global, _) = global.expect("the output is a global");
        flow.follow_stores(None, Root::Global(global));
        flow.operators
    }

    fn function(&self, id: FunctionId) -> &'m Function {
        match id {
            Some(handle) => &self.module.functions[handle],
            None => &self.module.entry_points[0].function,
        }
    }

    fn all_functions(&self) -> Vec<FunctionId> {
        self.module.functions.iter().map(|(handle, _)| Some(handle)).chain([None]).collect()
    }

    /// Follows every value stored into a variable: in `id` for a local one, everywhere for a global.
    fn follow_stores(&mut self, id: FunctionId, target: Root) {
        let (scope, key) = match target {
            Root::Local(_) => (vec![id], id),
            Root::Global(_) => (self.all_functions(), None),
        };
        if !self.seen_roots.insert((key, target)) {
            return;
        }
        for id in scope {
            let function = self.function(id);
            let mut values = Vec::new();
            walk(&function.body, &mut |statement| match *statement {
                Statement::Store { pointer, value } if root(function, pointer) == target => {
                    values.push(value);
                }
                _ => {}
            });
            if let Root::Local(local) = target {
                values.extend(function.local_variables[local].init);
            }
            for value in values {
                self.follow(id, value);
            }
        }
    }

    fn follow(&mut self, id: FunctionId, handle: Handle<Expression>) {
        if !self.seen.insert((id, handle)) {
            return;
        }
        let function = self.function(id);
        match function.expressions[handle] {
            Expression::Binary { op, left, right } => {
                self.operators.insert(format!("{op:?}"));
                self.follow(id, left);
                self.follow(id, right);
            }
            Expression::Unary { op, expr } => {
                self.operators.insert(format!("{op:?}"));
                self.follow(id, expr);
            }
            Expression::Math { fun, arg, arg1, arg2, arg3 } => {
                self.operators.insert(format!("{fun:?}"));
                for arg in [Some(arg), arg1, arg2, arg3].into_iter().flatten() {
                    self.follow(id, arg);
                }
            }
            Expression::Select { condition, accept, reject } => {
                for value in [condition, accept, reject] {
                    self.follow(id, value);
                }
            }
            Expression::As { expr, .. } => self.follow(id, expr),
            Expression::Splat { value, .. } => self.follow(id, value),
            Expression::Swizzle { vector, .. } => self.follow(id, vector),
            Expression::Compose { ref components, .. } => {
                for &component in components {
                    self.follow(id, component);
                }
            }
            Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => {
                self.follow(id, base);
            }
            Expression::Load { pointer } => {
                let target = root(function, pointer);
                let is_input = matches!(target, Root::Global(global)
                    if self.module.global_variables[global].space != AddressSpace::WorkGroup);
                if !is_input {
                    self.follow_stores(id, target);
                }
            }
            Expression::FunctionArgument(index) if id.is_some() => self.follow_arguments(id, index),
            Expression::CallResult(callee) => self.follow_results(callee),
            Expression::Literal(_)
            | Expression::Constant(_)
            | Expression::Override(_)
            | Expression::ZeroValue(_)
            | Expression::FunctionArgument(_) => {}
            ref other => panic!("an expression this proof does not know: {other:?}"),
        }
    }

    /// Follows what a function returns.
    fn follow_results(&mut self, callee: Handle<Function>) {
        let mut results = Vec::new();
        walk(&self.function(Some(callee)).body, &mut |statement| {
            if let Statement::Return { value: Some(value) } = *statement {
                results.push(value);
            }
        });
        for result in results {
            self.follow(Some(callee), result);
        }
    }

    /// Follows what every caller passes for an argument.
    fn follow_arguments(&mut self, callee: FunctionId, index: u32) {
        for id in self.all_functions() {
            let mut passed = Vec::new();
            walk(&self.function(id).body, &mut |statement| match statement {
                Statement::Call { function, arguments, .. } if Some(*function) == callee => {
                    passed.push(arguments[index as usize]);
                }
                _ => {}
            });
            for argument in passed {
                self.follow(id, argument);
            }
        }
    }
}

/// The operators of a sum without products.
fn additions() -> BTreeSet<String> {
    [
        format!("{:?}", BinaryOperator::Add),
        format!("{:?}", BinaryOperator::Subtract),
        format!("{:?}", BinaryOperator::And),
        format!("{:?}", BinaryOperator::ExclusiveOr),
        format!("{:?}", BinaryOperator::ShiftLeft),
        format!("{:?}", MathFunction::CountOneBits),
    ]
    .into()
}

/// Whether a module's accumulation path is free of multiplications and dot products.
fn adds_only(module: &Module) -> Result<(), BTreeSet<String>> {
    let allowed = additions();
    let found = ValueFlow::operators_into(module, "acc");
    let forbidden: BTreeSet<String> = found.difference(&allowed).cloned().collect();
    // The proof is worth something only if it has seen the inner loop.
    let inner = ["CountOneBits", "Dot4U8Packed", "Dot4I8Packed", "Fma"];
    assert!(inner.iter().any(|&operator| found.contains(operator)), "{found:?}");
    if forbidden.is_empty() { Ok(()) } else { Err(forbidden) }
}

#[test]
fn the_baseline_gemv_and_gemm_only_add() {
    for kernel in [shader::GEMV_PLANES, shader::GEMM_PLANES, shader::GEMM_PLANES_FEW] {
        assert_eq!(adds_only(&kernel.module()), Ok(()), "{}", kernel.name);
    }
}

/// What the sums of groups are made with, before their scales: in the float kernel, each term is an
/// activation's bits with the sign flipped or all masked.
fn group_sums_only_add(kernel: Kernel, module: &Module) -> Result<(), BTreeSet<String>> {
    let (function, term) = if kernel == shader::GROUP_GEMV {
        ("block_sums", MathFunction::ExtractBits)
    } else {
        ("group_sums", MathFunction::CountOneBits)
    };
    let mut allowed = additions();
    // Bits of a weight on their way to a mask.
    allowed.extend([format!("{term:?}"), format!("{:?}", BinaryOperator::ShiftRight)]);
    let found = ValueFlow::operators_of(module, function);
    assert!(found.contains(&format!("{term:?}")), "{found:?}");
    let forbidden: BTreeSet<String> = found.difference(&allowed).cloned().collect();
    if forbidden.is_empty() { Ok(()) } else { Err(forbidden) }
}

#[test]
fn the_sums_of_groups_only_add() {
    for (kernel, addition, product) in [
        (shader::GROUP_GEMV, "t0 += signed_x(", "t0 += 2.0 * signed_x("),
        (shader::GROUP_GEMV_INT8, "low << vec4(0u, 1u, 2u, 3u)", "low * vec4(1u, 2u, 4u, 8u)"),
    ] {
        assert_eq!(group_sums_only_add(kernel, &kernel.module()), Ok(()), "{}", kernel.name);
        let source = kernel.wgsl();
        let mutated = source.replace(addition, product);
        assert_ne!(source, mutated);
        let module = naga::front::wgsl::parse_str(&mutated).expect("the mutant is valid WGSL");
        let forbidden = group_sums_only_add(kernel, &module);
        assert_eq!(forbidden, Err(["Multiply".to_owned()].into()), "{}", kernel.name);
    }
}

/// The sums of the fused steps' bit-serial form, of the bit planes that the same kernel has made.
fn fused_sums_only_add(module: &Module) -> Result<(), BTreeSet<String>> {
    let found = ValueFlow::operators_of_given(module, "planes_sum", "codes");
    assert!(found.contains("CountOneBits"), "{found:?}");
    let forbidden: BTreeSet<String> = found.difference(&additions()).cloned().collect();
    if forbidden.is_empty() { Ok(()) } else { Err(forbidden) }
}

#[test]
fn the_fused_baseline_only_adds() {
    for kernel in [shader::FUSED_QKV, shader::FUSED_GATED, shader::FUSED_RESIDUAL] {
        assert_eq!(fused_sums_only_add(&kernel.module()), Ok(()), "{}", kernel.name);
        let source = kernel.wgsl();
        let mutated = source.replace("low << vec4(0u, 1u, 2u, 3u)", "low * vec4(1u, 2u, 4u, 8u)");
        assert_ne!(source, mutated);
        let module = naga::front::wgsl::parse_str(&mutated).expect("the mutant is valid WGSL");
        assert_eq!(fused_sums_only_add(&module), Err(["Multiply".to_owned()].into()));
    }
}

#[test]
fn the_proof_objects_to_a_multiplication() {
    for (kernel, product) in [
        (shader::GEMV_I2, "Dot4U8Packed"),
        (shader::GEMM_I2, "Dot4U8Packed"),
        (shader::GEMM_I2_FEW, "Dot4U8Packed"),
        (shader::GEMV_I2_SIGNED, "Dot4I8Packed"),
        (shader::GEMV_I2_HALF, "Fma"),
    ] {
        let forbidden = adds_only(&kernel.module()).expect_err("it multiplies");
        assert!(forbidden.contains(product), "{}: {forbidden:?}", kernel.name);
    }
    // The same kernels with a shift written as a product.
    for (kernel, shift, product) in [
        (shader::GEMV_PLANES, "low << vec4(0u, 1u, 2u, 3u)", "low * vec4(1u, 2u, 4u, 8u)"),
        (shader::GEMM_PLANES, "high1.x, sum << vec4(1u)", "high1.x, sum * vec4(2u)"),
    ] {
        let source = kernel.wgsl();
        let mutated = source.replace(shift, product);
        assert_ne!(source, mutated);
        let module = naga::front::wgsl::parse_str(&mutated).expect("the mutant is valid WGSL");
        assert_eq!(adds_only(&module), Err(["Multiply".to_owned()].into()));
    }
}

#[test]
fn the_accumulators_are_integers() {
    for kernel in [
        shader::GEMV_PLANES,
        shader::GEMM_PLANES,
        shader::GEMM_PLANES_FEW,
        shader::GEMM_I2_FEW,
        shader::GEMV_I2,
        shader::GEMV_I2_SIGNED,
        shader::GEMV_I2_HALF,
        shader::GEMM_I2,
        shader::GEMM_I2_COOP8,
        shader::GEMM_I2_COOP16,
    ] {
        let module = kernel.module();
        let acc = module.global_variables.iter().find(|(_, v)| v.name.as_deref() == Some("acc"));
        let TypeInner::Array { base, .. } = module.types[acc.expect("acc is a global").1.ty].inner
        else {
            panic!("{}: acc is an array", kernel.name)
        };
        let scalar = module.types[base].inner.scalar();
        assert_eq!(scalar, Some(Scalar { kind: ScalarKind::Sint, width: 4 }), "{}", kernel.name);
    }
}
