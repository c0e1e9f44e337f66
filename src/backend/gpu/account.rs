//! What a prompt and a decode step have a GPU do, counted where it is recorded, on a device that
//! computes nothing.

use std::sync::{Arc, Mutex, PoisonError};

use cpu_ref::layout::TILE_ROWS;

use super::kernels::{Gemm, GemmPlan, GemvPlan, Rotate, Variant, hadamard};
use super::record::{Call, Specialised, WorkDone};
use super::{Capabilities, Cooperative, Gpu, GpuBackend, shader};
use crate::backend::{
    Backend, Batch, DeviceInfo, HeadWork, LoadOptions, OnProgress, Output, Tap, Want,
};
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::kv_cache::{Blocks, KvFormat};
use crate::layout::Layout;
use crate::model::Transformer;
use crate::sampler::Sampler;
use crate::shape::MatShape;
use crate::synthetic::{Shapes, bitnet_2b4t, published};
use crate::weights::WeightSource;

/// Parts of a forward pass: the steps, and what is around them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// Passes, submits and what is read back.
    Pass,
    /// Token ids to the residual stream.
    Embed,
    /// Norm, query, key and value, RoPE, the cache.
    Qkv,
    /// Attention over the cache.
    Attend,
    /// Output matrix and residual.
    ProjectOut,
    /// Norm, gate and up, activation.
    GateUp,
    /// Down matrix and residual.
    Down,
    /// Final norm and logits.
    Head,
    /// The choice of a token.
    Choose,
}

impl Part {
    /// Every part, in the order of a pass.
    pub const ALL: [Self; 9] = [
        Self::Pass,
        Self::Embed,
        Self::Qkv,
        Self::Attend,
        Self::ProjectOut,
        Self::GateUp,
        Self::Down,
        Self::Head,
        Self::Choose,
    ];

    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Embed => "embed",
            Self::Qkv => "qkv",
            Self::Attend => "attend",
            Self::ProjectOut => "project_out",
            Self::GateUp => "gate_up",
            Self::Down => "down",
            Self::Head => "head",
            Self::Choose => "choose",
        }
    }

    /// Whether every layer has it.
    pub fn is_of_layers(self) -> bool {
        use Part::{Attend, Down, GateUp, ProjectOut, Qkv};
        matches!(self, Qkv | Attend | ProjectOut | GateUp | Down)
    }
}

/// What some tokens had a device do, by parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Account {
    /// How many tokens.
    pub n_tokens: u64,
    /// Position of the first.
    pub start: usize,
    parts: [WorkDone; Part::ALL.len()],
}

impl Account {
    /// The work of one part, of all layers.
    pub fn part(&self, part: Part) -> WorkDone {
        self.parts[part as usize]
    }

    /// The work of the parts that `is_in` takes.
    pub fn sum(&self, is_in: impl Fn(Part) -> bool) -> WorkDone {
        let parts = Part::ALL.into_iter().filter(|&part| is_in(part));
        parts.fold(WorkDone::default(), |sum, part| sum.plus(self.part(part)))
    }

    /// The work of all parts.
    pub fn total(&self) -> WorkDone {
        self.sum(|_| true)
    }
}

/// What a dry run counted.
#[derive(Debug, Clone)]
pub struct DryRun {
    /// The kernels of the model's matrices.
    pub gemv: String,
    /// How the table that makes the logits is stored.
    pub head: &'static str,
    /// Layers.
    pub n_layers: usize,
    /// A prompt, and the choice of the token after it.
    pub prompt: Account,
    /// Greedy decoding.
    pub decode: Account,
    /// Every pipeline that was made for the model.
    pub compiled: Vec<Specialised>,
}

/// What a dry run is of.
#[derive(Debug, Clone, Copy)]
pub struct DryRunOptions {
    /// How matrices with one scale are multiplied: nothing can be measured or checked here.
    pub plan: GemvPlan,
    /// Limits of the device.
    pub capabilities: Capabilities,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Tokens to decode after it.
    pub n_decode: usize,
    /// How the model is loaded.
    pub load: LoadOptions,
}

/// Loads a model on a dry device, feeds it a prompt, decodes, and counts.
///
/// Everything is recorded as on any GPU, through the same code, except that one layer stands for all.
/// Tokens are asked for one by one: ahead of the reader, a fast device gets up to 16 in one pass of one
/// submit. Of the rows that the int8 head computes exactly, which depend on the data, one is counted.
///
/// # Errors
/// If a tensor is malformed, a matrix does not fit the limits, or the tokens do not fit the context.
pub fn dry_run(
    source: &dyn WeightSource,
    options: &DryRunOptions,
    progress: OnProgress<'_>,
) -> Result<DryRun> {
    let gpu = Gpu::dry(options.capabilities)?;
    let backend =
        GpuBackend::load(source, gpu, Some(options.plan.into()), &options.load, progress)?;
    let compiled = backend.gpu().compiled();
    let gemv = backend.device().gemv.clone();
    let ledger = Ledger::default();
    let counted = Counted { backend, ledger: Arc::clone(&ledger) };
    let mut model = Transformer::new(source.config().clone(), Box::new(counted));

    let mut output = model.feed(&vec![0; options.n_prompt], Want::Token)?;
    let prompt = close(&ledger, options.n_prompt, 0);
    for _ in 0..options.n_decode {
        let Output::Token(token) = output else { unreachable!("a token was wanted") };
        output = model.feed(&[token], Want::Token)?;
    }
    let decode = close(&ledger, options.n_decode, options.n_prompt);
    let (head, n_layers) = (head_format(&compiled), source.config().num_hidden_layers);
    Ok(DryRun { gemv, head, n_layers, prompt, decode, compiled })
}

/// What one pass of a model has a dry device do that feeds `n_tokens`, 1 to 8, after the prompt and chooses
/// a token after each: the check of a draft, or a single step.
///
/// # Errors
/// As for [`dry_run`].
pub fn dry_check(
    source: &dyn WeightSource,
    options: &DryRunOptions,
    n_tokens: usize,
) -> Result<Account> {
    let gpu = Gpu::dry(options.capabilities)?;
    let backend =
        GpuBackend::load(source, gpu, Some(options.plan.into()), &options.load, &mut |_| {})?;
    let ledger = Ledger::default();
    let counted = Counted { backend, ledger: Arc::clone(&ledger) };
    let mut model = Transformer::new(source.config().clone(), Box::new(counted));
    model.feed(&vec![0; options.n_prompt], Want::Token)?;
    close(&ledger, options.n_prompt, 0);
    model.check_draft(0, &vec![0; n_tokens.saturating_sub(1)], |_| false)?;
    Ok(close(&ledger, n_tokens, options.n_prompt))
}

/// Every kernel and variant with constants of published models: those of BitNet 2B4T, of Bonsai the
/// kernels of groups. A rotation, which no published shape says, has Bonsai's sizes.
///
/// # Errors
/// As for [`dry_run`].
pub fn published_pipelines() -> Result<Vec<Specialised>> {
    let mut all = Vec::new();
    let mut add = |config: ModelConfig, variant: Variant, int8_activations| {
        let load = LoadOptions { int8_activations, ..LoadOptions::default() };
        let (plan, capabilities) = (GemvPlan::from(variant), Capabilities::Adapter);
        let options = DryRunOptions { plan, capabilities, n_prompt: 1, n_decode: 0, load };
        all.extend(dry_run(&Shapes::new(config), &options, &mut |_| {})?.compiled);
        Ok::<_, Error>(())
    };
    for variant in Variant::ALL {
        add(bitnet_2b4t(), variant, false)?;
    }
    for name in ["bonsai-1.7b", "ternary-bonsai-1.7b"] {
        // Packing a table takes its time, and its length is only a bound.
        let config = published(name).expect("one of the names");
        let config = ModelConfig { vocab_size: 4096, ..config };
        add(config.clone(), Variant::BitSerial, false)?;
        add(config, Variant::BitSerial, true)?;
    }
    for rotate in [Rotate::Input, Rotate::HeadInput, Rotate::Back] {
        let Call { kernel, constants, .. } = hadamard(2048, 2048, rotate);
        all.push(Specialised { kernel, constants });
    }
    all.extend(cooperative_pipelines()?);
    Ok(all)
}

/// Products of a prompt of BitNet 2B4T on the cooperative matrices that adapters have; a dry device
/// has none.
fn cooperative_pipelines() -> Result<Vec<Specialised>> {
    let shape = MatShape::new(2560, 6912)?;
    let gemm =
        Gemm { layout: Layout::I2, shape, tile_base: 0, tiles: 2560 / TILE_ROWS, max_tokens: 512 };
    // Mesa's rasteriser with AVX and with AVX-512, Apple; NVIDIA, AMD.
    let cooperative = [(8, 8), (8, 16), (8, 32), (16, 32), (16, 64)];
    let plans = cooperative
        .into_iter()
        .flat_map(|(size, subgroup)| GemmPlan::all_of(Cooperative { size, subgroup }));
    Ok(plans
        .map(|plan| {
            let Call { kernel, constants, .. } = gemm.tiled(plan);
            Specialised { kernel, constants }
        })
        .collect())
}

/// How the rows of the head are stored, as its kernel was told.
fn head_format(compiled: &[Specialised]) -> &'static str {
    if compiled.iter().any(|pipeline| pipeline.kernel == shader::HEAD_INT8) {
        return "int8";
    }
    let constant = |pipeline: &Specialised, name| {
        let mut constants = pipeline.constants.iter();
        constants.find(|(constant, _)| *constant == name).map(|(_, value)| *value as u32)
    };
    let head = compiled.iter().rfind(|pipeline| pipeline.kernel == shader::LM_HEAD);
    match head.map(|head| constant(head, "FORMAT")) {
        Some(Some(0)) => "bf16",
        Some(Some(1)) => "f16",
        Some(Some(2)) => "f32",
        Some(_) => "int8",
        None => "packed",
    }
}

/// The work so far, by parts.
type Ledger = Arc<Mutex<[WorkDone; Part::ALL.len()]>>;

/// The account of the tokens since the last one.
fn close(ledger: &Ledger, n_tokens: usize, start: usize) -> Account {
    let mut parts = ledger.lock().unwrap_or_else(PoisonError::into_inner);
    Account { n_tokens: n_tokens as u64, start, parts: std::mem::take(&mut *parts) }
}

/// A backend that enters the work of each step into a ledger.
struct Counted {
    backend: GpuBackend,
    ledger: Ledger,
}

impl Counted {
    fn count<T>(&mut self, part: Part, step: impl FnOnce(&mut GpuBackend) -> T) -> T {
        let before = self.backend.work_done();
        let result = step(&mut self.backend);
        let done = self.backend.work_done().since(before);
        let mut parts = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = &mut parts[part as usize];
        *entry = entry.plus(done);
        result
    }
}

impl Backend for Counted {
    fn device(&self) -> &DeviceInfo {
        self.backend.device()
    }

    fn max_batch(&self) -> usize {
        self.backend.max_batch()
    }

    fn chunk(&self) -> usize {
        self.backend.chunk()
    }

    fn max_logit_rows(&self) -> usize {
        self.backend.max_logit_rows()
    }

    fn capacity(&self) -> usize {
        self.backend.capacity()
    }

    fn sequences(&mut self) -> &mut Blocks {
        self.backend.sequences()
    }

    fn kv_format(&self) -> KvFormat {
        self.backend.kv_format()
    }

    fn kv_bytes(&self) -> u64 {
        self.backend.kv_bytes()
    }

    fn read_block(&mut self, block: u32) -> Result<Vec<u8>> {
        self.backend.read_block(block)
    }

    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<()> {
        self.backend.write_block(block, bytes)
    }

    fn keep(&mut self, n: usize) -> Result<()> {
        self.count(Part::Pass, |backend| backend.keep(n))
    }

    fn lead(&self) -> usize {
        self.backend.lead()
    }

    fn head_work(&self) -> Option<HeadWork> {
        self.backend.head_work()
    }

    fn choose_with(&mut self, sampler: Sampler) -> Result<()> {
        self.count(Part::Pass, |backend| backend.choose_with(sampler))
    }

    fn begin(&mut self, batch: Batch<'_>) -> Result<()> {
        self.count(Part::Pass, |backend| backend.begin(batch))
    }

    fn embed(&mut self) -> Result<()> {
        self.count(Part::Embed, Backend::embed)
    }

    fn qkv(&mut self, layer: usize) -> Result<()> {
        self.count(Part::Qkv, |backend| backend.qkv(layer))
    }

    fn attend(&mut self, layer: usize) -> Result<()> {
        self.count(Part::Attend, |backend| backend.attend(layer))
    }

    fn project_out(&mut self, layer: usize) -> Result<()> {
        self.count(Part::ProjectOut, |backend| backend.project_out(layer))
    }

    fn gate_up(&mut self, layer: usize) -> Result<()> {
        self.count(Part::GateUp, |backend| backend.gate_up(layer))
    }

    fn down(&mut self, layer: usize) -> Result<()> {
        self.count(Part::Down, |backend| backend.down(layer))
    }

    fn head(&mut self) -> Result<()> {
        self.count(Part::Head, Backend::head)
    }

    fn choose(&mut self) -> Result<()> {
        self.count(Part::Choose, Backend::choose)
    }

    fn finish(&mut self) -> Result<Output> {
        self.count(Part::Pass, Backend::finish)
    }

    fn take(&mut self) -> Result<u32> {
        self.count(Part::Pass, Backend::take)
    }

    fn read(&mut self, tap: Tap) -> Result<Vec<f32>> {
        self.count(Part::Pass, |backend| backend.read(tap))
    }
}
