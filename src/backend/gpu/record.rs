//! Operations: a pipeline, its bind group and its grid, made at load and recorded at decode.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::Slice;
use super::device::Gpu;
use super::shader::{Access, Binding, Kernel, UNCHECKED};
use crate::error::{Error, Result};
use crate::kv_cache::BLOCK;
use crate::sampler::{Sampler, Sampling};

/// What distinguishes pipelines: source, whether it is checked at run time, constants.
type PipelineKey = (Kernel, bool, Vec<(&'static str, u64)>);

/// A compiled pipeline with the layout of its bind group, and what that was reflected from.
#[derive(Clone)]
struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    bindings: Arc<[Binding]>,
}

/// Pipelines that are kept: more than any two models need, so that testing many shapes does not fill memory.
const MAX_PIPELINES: usize = 256;

/// The pipelines of a device: each is compiled once, until 256 others have been.
#[derive(Clone, Default)]
pub struct Pipelines {
    made: Arc<Mutex<HashMap<PipelineKey, Pipeline>>>,
}

/// A kernel with its constants and grid: what `kernels.rs` returns.
#[derive(Debug, Clone)]
pub struct Call {
    /// Which kernel.
    pub kernel: Kernel,
    /// Override constants.
    pub constants: Vec<(&'static str, f64)>,
    /// Workgroups along x.
    pub x: u32,
    /// Workgroups along y.
    pub y: Rows,
    /// The least length in words of each storage binding, where the kernel runs unchecked.
    pub(super) words: Vec<usize>,
    /// Words that it writes: for each token, for each row of logits, or in all, as `y` follows them.
    /// At most, where a token may be another shard's.
    pub writes: usize,
    /// How much of the weights that are bound it reads.
    pub weights: WeightsRead,
    /// Bytes of the KV cache that it reads for each position, each counted once.
    pub cache_bytes: usize,
}

impl Call {
    /// The least length in words of each storage binding that a kernel of [`UNCHECKED`] is given.
    pub fn words(&self) -> &[usize] {
        &self.words
    }

    /// Whether the buffers hold all that a kernel of [`UNCHECKED`] could touch.
    ///
    /// # Errors
    /// What is too short, for people.
    pub fn check_lengths(&self, buffers: &[&Slice]) -> std::result::Result<(), String> {
        let name = self.kernel.name;
        assert_eq!(self.words.len(), buffers.len(), "{name}: a length for each binding");
        for (at, (&words, buffer)) in self.words.iter().zip(buffers).enumerate() {
            let found = buffer.len_bytes() / 4;
            if (words as u64) > found {
                return Err(format!(
                    "{name}: storage binding {at}: expected {words} words, found {found}"
                ));
            }
        }
        Ok(())
    }

    /// Words that it writes in such a pass, at most.
    pub fn words_written(&self, params: &PassParams) -> u64 {
        self.writes as u64 * u64::from(self.y.units(params))
    }
}

/// How much of its weights a dispatch reads, each counted once however many workgroups load it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightsRead {
    /// All that is bound.
    All,
    /// One of so many rows, for each token, or row of logits.
    RowOf(usize),
}

/// A kernel with the constants of a pipeline.
#[derive(Debug, Clone, PartialEq)]
pub struct Specialised {
    /// Which kernel.
    pub kernel: Kernel,
    /// Override constants.
    pub constants: Vec<(&'static str, f64)>,
}

impl Kernel {
    /// The checks that are compiled into the kernel.
    pub fn runtime_checks(self) -> wgpu::ShaderRuntimeChecks {
        if UNCHECKED.contains(&self) {
            wgpu::ShaderRuntimeChecks::unchecked()
        } else {
            wgpu::ShaderRuntimeChecks::checked()
        }
    }

    /// Whether workgroup memory starts as zeros.
    pub fn zeroes_workgroup_memory(self) -> bool {
        !UNCHECKED.contains(&self)
    }
}

/// Workgroups along y, which follow the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rows {
    /// One.
    One,
    /// One a token.
    Tokens,
    /// One for every so many tokens.
    TokenTiles(u32),
    /// One a row of logits.
    LogitRows,
    /// One for every so many rows of logits.
    LogitRowTiles(u32),
    /// One for every `tile` of the rows that a token has `a_token` of.
    HeadTiles {
        /// Rows of a token.
        a_token: u32,
        /// Rows of a workgroup.
        tile: u32,
    },
    /// One a block of the KV cache, up to the first token's.
    Blocks,
}

impl Rows {
    /// How many there are.
    fn workgroups(self, params: &PassParams) -> u32 {
        match self {
            Self::TokenTiles(size) | Self::LogitRowTiles(size) => self.units(params).div_ceil(size),
            Self::HeadTiles { a_token, tile } => (a_token * self.units(params)).div_ceil(tile),
            Self::One | Self::Tokens | Self::LogitRows | Self::Blocks => self.units(params),
        }
    }

    /// What they follow: tokens, rows of logits, blocks, or one thing.
    fn units(self, params: &PassParams) -> u32 {
        match self {
            Self::One => 1,
            Self::Tokens | Self::TokenTiles(_) | Self::HeadTiles { .. } => params.n_tokens,
            Self::Blocks => params.start / BLOCK as u32 + 1,
            Self::LogitRows | Self::LogitRowTiles(_) => params.n_logit_rows,
        }
    }
}

/// The uniform of every kernel: `shaders/shared/pass.wgsl`.
#[derive(Debug, Clone, Copy, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub struct PassParams {
    /// M.
    pub n_tokens: u32,
    /// Position of the first token.
    pub start: u32,
    /// First token whose logits are wanted.
    pub first_logit_row: u32,
    /// How many rows of logits.
    pub n_logit_rows: u32,
    /// Where the first token's id is in the buffer of tokens.
    pub token_in: u32,
    /// Where the chosen token's id goes.
    pub token_out: u32,
    /// The random number that chooses, in [0, 1).
    pub uniform: f32,
    /// 0: greedy.
    pub temperature: f32,
    /// Of repetition; 1: none.
    pub penalty: f32,
    /// Tokens kept by rank; 0: all.
    pub top_k: u32,
    /// Probability kept by rank; 1: all.
    pub top_p: f32,
    /// Probability kept, as a share of the best's; 0: all.
    pub min_p: f32,
    /// Block of the KV cache that holds position `start`.
    pub block: u32,
    /// Blocks of the sequence that a part of attention takes: from here
    pub first_block: u32,
    /// to here.
    pub end_block: u32,
}

const _: () = assert!(size_of::<PassParams>() == 60);

impl Default for PassParams {
    /// No token; a greedy choice.
    fn default() -> Self {
        Self { penalty: 1.0, top_p: 1.0, ..bytemuck::Zeroable::zeroed() }
    }
}

impl PassParams {
    /// How the sampler's next token is chosen.
    pub(super) fn sample(&mut self, sampler: &mut Sampler) {
        let Sampling::Random { temperature, top_k, top_p, min_p, .. } = sampler.sampling() else {
            return;
        };
        // Rounding may not reach 1.
        self.uniform = (sampler.next_uniform() as f32).min(1.0 - f32::EPSILON / 2.0);
        let top_k = top_k.map_or(0, |k| u32::try_from(k).unwrap_or(u32::MAX));
        (self.temperature, self.top_k, self.top_p, self.min_p) = (temperature, top_k, top_p, min_p);
    }
}

/// A dispatch that is ready to be recorded.
#[derive(Clone)]
pub struct Op {
    kernel: &'static str,
    pipeline: wgpu::ComputePipeline,
    bind_group: wgpu::BindGroup,
    x: u32,
    y: Rows,
    traffic: Traffic,
}

/// The bytes that a dispatch moves.
#[derive(Debug, Clone, Copy)]
struct Traffic {
    weights: u64,
    weights_a_unit: u64,
    cache_a_position: u64,
    written_a_unit: u64,
}

impl Traffic {
    fn new(call: &Call, read: u64) -> Self {
        let (weights, weights_a_unit) = match call.weights {
            WeightsRead::All => (read, 0),
            WeightsRead::RowOf(rows) => (0, read / rows as u64),
        };
        let cache_a_position = call.cache_bytes as u64;
        let written_a_unit = call.writes as u64 * 4;
        Self { weights, weights_a_unit, cache_a_position, written_a_unit }
    }

    /// What it adds to the work done.
    fn of(&self, y: Rows, params: &PassParams) -> WorkDone {
        let tokens = u64::from(params.n_tokens);
        WorkDone {
            dispatches: 1,
            weight_bytes: self.weights + self.weights_a_unit * u64::from(y.units(params)),
            cache_bytes: self.cache_a_position * (u64::from(params.start) + tokens),
            bytes_written: self.written_a_unit * u64::from(y.units(params)),
            ..WorkDone::default()
        }
    }
}

/// Bytes from one set of parameters in their buffer to the next: the largest offset alignment.
pub(super) const PARAMS_STRIDE: u32 = 256;
/// Sets of parameters in their buffer: passes that are recorded before a submit have one each;
pub(super) const PARAMS_SLOTS: u32 = 64;
/// and so have the parts of attention after them.
pub(super) const PART_SLOTS: u32 = 32;

/// What a dispatch is recorded with: the parameters of its pass, and which set of the buffer holds
/// them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Parameters {
    pub(super) values: PassParams,
    pub(super) slot: u32,
}

impl Op {
    fn record(&self, pass: &mut wgpu::ComputePass<'_>, parameters: &Parameters) {
        let y = self.y.workgroups(&parameters.values);
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.bind_group, &[parameters.slot * PARAMS_STRIDE]);
        pass.dispatch_workgroups(self.x, y, 1);
    }
}

/// An open command encoder with its one compute pass.
pub(super) struct Recording {
    /// `None` while one pass gives way to the next.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: wgpu::CommandEncoder,
}

impl Recording {
    /// Records a dispatch.
    pub(super) fn dispatch(&mut self, gpu: &Gpu, op: &Op, parameters: &Parameters) {
        if let Some(profile) = &mut *gpu.profile() {
            let writes = profile.next(gpu, op.kernel);
            self.pass = None;
            self.pass = Some(begin_pass(&mut self.encoder, Some(writes)));
        }
        op.record(self.pass.as_mut().expect("there is one between calls"), parameters);
        gpu.work.add(op.traffic.of(op.y, &parameters.values));
    }

    /// Ends the pass and lets `copies` add to the encoder.
    pub(super) fn finish(
        self,
        copies: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> wgpu::CommandBuffer {
        let Self { pass, mut encoder } = self;
        drop(pass);
        copies(&mut encoder);
        encoder.finish()
    }

    /// Ends the pass, lets `copies` add to the encoder, and submits.
    pub(super) fn submit(
        self,
        gpu: &Gpu,
        copies: impl FnOnce(&mut wgpu::CommandEncoder),
    ) -> wgpu::SubmissionIndex {
        let commands = self.finish(|encoder| {
            copies(encoder);
            if let Some(profile) = &mut *gpu.profile() {
                profile.resolve(gpu, encoder);
            }
        });
        let index = gpu.queue.submit([commands]);
        gpu.work.add(WorkDone { submits: 1, ..WorkDone::default() });
        gpu.submitted(index.clone());
        index
    }
}

fn begin_pass(
    encoder: &mut wgpu::CommandEncoder,
    timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
) -> wgpu::ComputePass<'static> {
    let descriptor = wgpu::ComputePassDescriptor { label: None, timestamp_writes };
    encoder.begin_compute_pass(&descriptor).forget_lifetime()
}

fn source_of(kernel: Kernel) -> wgpu::ShaderModuleDescriptor<'static> {
    let source = wgpu::ShaderSource::Wgsl(kernel.wgsl().into());
    wgpu::ShaderModuleDescriptor { label: Some(kernel.name), source }
}

/// Kernels, and whether the browser refuses what was made of them.
#[cfg(target_family = "wasm")]
pub(super) type Verdicts =
    Mutex<Vec<(&'static str, std::pin::Pin<Box<dyn Future<Output = Option<wgpu::Error>>>>)>>;

/// Counts what a device was given to do.
#[derive(Debug, Default)]
pub(super) struct Work(Mutex<WorkDone>);

impl Work {
    pub(super) fn add(&self, done: WorkDone) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *all = all.plus(done);
    }
}

/// What a device was given to do since it was opened, counted where it is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkDone {
    /// Command encoders, each with one compute pass.
    pub passes: u64,
    /// Dispatches.
    pub dispatches: u64,
    /// Submits to the queue.
    pub submits: u64,
    /// Bytes read back.
    pub readback_bytes: u64,
    /// Bytes of weights that dispatches read: what each binds, once; of tables whose rows are looked
    /// up, those rows.
    pub weight_bytes: u64,
    /// Bytes of the KV cache that dispatches read, each once a dispatch.
    pub cache_bytes: u64,
    /// Bytes that dispatches write.
    pub bytes_written: u64,
}

impl WorkDone {
    /// What was done since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        self.combine(earlier, |a, b| a - b)
    }

    /// This and other work.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        self.combine(other, |a, b| a + b)
    }

    fn combine(self, other: Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            passes: with(self.passes, other.passes),
            dispatches: with(self.dispatches, other.dispatches),
            submits: with(self.submits, other.submits),
            readback_bytes: with(self.readback_bytes, other.readback_bytes),
            weight_bytes: with(self.weight_bytes, other.weight_bytes),
            cache_bytes: with(self.cache_bytes, other.cache_bytes),
            bytes_written: with(self.bytes_written, other.bytes_written),
        }
    }
}

impl Gpu {
    /// What this device was given to do since it was opened.
    pub fn work_done(&self) -> WorkDone {
        *self.work.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pipelines that were made on this device, in that order.
    pub fn compiled(&self) -> Vec<Specialised> {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes an operation: `buffers` in the order of the kernel's storage bindings.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver refuses the shader or the buffers, [`Error::GpuLimit`] if the
    /// grid is too large.
    ///
    /// # Panics
    /// If an unchecked kernel could leave one of the buffers: the caller sized it wrongly.
    pub fn op(
        &self,
        pipelines: &Pipelines,
        call: &Call,
        params: &wgpu::Buffer,
        buffers: &[&Slice],
    ) -> Result<Op> {
        let limit = self.device.limits().max_compute_workgroups_per_dimension;
        if call.x > limit {
            return Err(Error::GpuLimit {
                adapter: self.adapter.name.clone(),
                what: format!("kernel {} (workgroups)", call.kernel.name),
                needed: u64::from(call.x),
                limit: u64::from(limit),
            });
        }
        let Pipeline { pipeline, layout, bindings } = self.pipeline(pipelines, call)?;
        assert_eq!(bindings.len(), buffers.len() + 1, "buffers of {}", call.kernel.name);
        if UNCHECKED.contains(&call.kernel)
            && let Err(problem) = call.check_lengths(buffers)
        {
            panic!("{problem}");
        }
        assert!(call.writes > 0, "{} does not say what it writes", call.kernel.name);
        let weights = buffers.iter().filter(|slice| slice.is_weights);
        let traffic = Traffic::new(call, weights.map(|slice| slice.len_bytes()).sum());
        let mut storage = buffers.iter();
        let entries: Vec<_> = bindings
            .iter()
            .map(|binding| wgpu::BindGroupEntry {
                binding: binding.number,
                resource: match binding.access {
                    Access::Uniform => wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer: params,
                        offset: 0,
                        size: wgpu::BufferSize::new(size_of::<PassParams>() as u64),
                    }),
                    Access::Read | Access::Write => {
                        storage.next().expect("the lengths agree").binding()
                    }
                },
            })
            .collect();
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let bind_group = self.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(call.kernel.name),
            layout: &layout,
            entries: &entries,
        });
        self.pop(scope, call.kernel.name)?;
        Ok(Op { kernel: call.kernel.name, pipeline, bind_group, x: call.x, y: call.y, traffic })
    }

    /// Fails if the driver refuses what was made in the scope.
    #[cfg(not(target_family = "wasm"))]
    fn pop(&self, scope: wgpu::ErrorScopeGuard, kernel: &'static str) -> Result<()> {
        self.accept(pollster::block_on(scope.pop()), kernel)
    }

    /// Notes the scope for [`Gpu::settle`]: a browser says later what it refuses.
    #[cfg(target_family = "wasm")]
    fn pop(&self, scope: wgpu::ErrorScopeGuard, kernel: &'static str) -> Result<()> {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        verdicts.push((kernel, Box::pin(scope.pop())));
        Ok(())
    }

    /// Fails if the browser refuses something that was made.
    #[cfg(target_family = "wasm")]
    pub(super) async fn settle(&self) -> Result<()> {
        let verdicts = {
            let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *verdicts)
        };
        for (kernel, verdict) in verdicts {
            self.accept(verdict.await, kernel)?;
        }
        Ok(())
    }

    fn accept(&self, refusal: Option<wgpu::Error>, kernel: &str) -> Result<()> {
        match refusal {
            None => Ok(()),
            Some(error) => {
                let words = error.to_string();
                let words = words.split_whitespace().collect::<Vec<_>>().join(" ");
                Err(self.error("make a pipeline", format!("kernel {kernel}: {words}")))
            }
        }
    }

    fn pipeline(&self, pipelines: &Pipelines, call: &Call) -> Result<Pipeline> {
        let constants: Vec<_> =
            call.constants.iter().map(|&(name, value)| (name, value.to_bits())).collect();
        let key = (call.kernel, self.is_checked(call.kernel), constants);
        let lock = || pipelines.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = lock().get(&key) {
            return Ok(pipeline.clone());
        }
        let pipeline = self.compile(call)?;
        let mut made = lock();
        if made.len() == MAX_PIPELINES {
            // Operations keep theirs.
            made.clear();
        }
        made.insert(key, pipeline.clone());
        Ok(pipeline)
    }

    /// Whether the kernel is compiled with checks at run time.
    fn is_checked(&self, kernel: Kernel) -> bool {
        self.checked || !UNCHECKED.contains(&kernel)
    }

    fn compile(&self, call: &Call) -> Result<Pipeline> {
        let name = call.kernel.name;
        let bindings: Arc<[Binding]> = call.kernel.bindings().into();
        let entries: Vec<_> = bindings
            .iter()
            .map(|binding| wgpu::BindGroupLayoutEntry {
                binding: binding.number,
                visibility: wgpu::ShaderStages::COMPUTE,
                ty: wgpu::BindingType::Buffer {
                    ty: match binding.access {
                        Access::Uniform => wgpu::BufferBindingType::Uniform,
                        Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
                        Access::Write => wgpu::BufferBindingType::Storage { read_only: false },
                    },
                    has_dynamic_offset: binding.access == Access::Uniform,
                    min_binding_size: None,
                },
                count: None,
            })
            .collect();
        let scope = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let layout = self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(name),
            entries: &entries,
        });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(name),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let is_checked = self.is_checked(call.kernel);
        let module = match is_checked {
            true => self.device.create_shader_module(source_of(call.kernel)),
            false => self.unchecked_module(call.kernel),
        };
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(name),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some("main"),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &call.constants,
                zero_initialize_workgroup_memory: is_checked,
            },
            cache: None,
        });
        self.pop(scope, name)?;
        self.check("make a pipeline")?;
        let (kernel, constants) = (call.kernel, call.constants.clone());
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        compiled.push(Specialised { kernel, constants });
        Ok(Pipeline { pipeline, layout, bindings })
    }

    /// The module of a kernel of [`UNCHECKED`], without runtime checks.
    #[expect(unsafe_code, reason = "wgpu has no safe way to leave the checks out")]
    fn unchecked_module(&self, kernel: Kernel) -> wgpu::ShaderModule {
        assert!(UNCHECKED.contains(&kernel), "{} is not on the list", kernel.name);
        let checks = wgpu::ShaderRuntimeChecks::unchecked();
        // SAFETY: the kernel is one of ours and on the list of those whose every loop ends, whose every
        // divisor is a constant other than 0, and whose every index of a binding is below the length
        // that `Gpu::op` has asserted of the buffer (`Call::words`); indices of workgroup arrays are
        // below constants that size them.
        unsafe { self.device.create_shader_module_trusted(source_of(kernel), checks) }
    }

    /// Runs operations in one pass of one submit, and waits for them.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver fails.
    pub fn run_all<'a>(
        &self,
        uniform: &wgpu::Buffer,
        params: PassParams,
        ops: impl IntoIterator<Item = &'a Op>,
    ) -> Result<()> {
        self.queue.write_buffer(uniform, 0, bytemuck::bytes_of(&params));
        let parameters = Parameters { values: params, slot: 0 };
        let mut recording = self.begin_recording();
        for op in ops {
            recording.dispatch(self, op, &parameters);
        }
        recording.submit(self, |_| {});
        self.wait("run kernels")
    }

    /// Opens a command encoder with its one compute pass.
    pub(super) fn begin_recording(&self) -> Recording {
        self.begin_timed_recording(None)
    }

    /// [`Self::begin_recording`] with the times at which the pass begins and ends.
    pub(super) fn begin_timed_recording(
        &self,
        timestamp_writes: Option<wgpu::ComputePassTimestampWrites<'_>>,
    ) -> Recording {
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let pass = Some(begin_pass(&mut encoder, timestamp_writes));
        self.work.add(WorkDone { passes: 1, ..WorkDone::default() });
        Recording { pass, encoder }
    }

    /// A uniform buffer of [`PassParams`].
    pub fn params_buffer(&self) -> wgpu::Buffer {
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("pass"),
            size: u64::from((PARAMS_SLOTS + PART_SLOTS) * PARAMS_STRIDE),
            usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    }
}
