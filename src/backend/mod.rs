//! The `Backend` trait: a loaded model that runs in steps, and the choice of a device.

mod choices;
pub mod gpu;
pub mod reference;
pub mod simd;

use std::task::{Context, Poll};
use std::time::Duration;

use crate::config::{Activations, ModelConfig};
use crate::error::{Error, Result};
use crate::kv_cache::{Blocks, KvFormat, SequenceId};
use crate::sampler::Sampler;
use crate::wait::block_on;
use crate::weights::WeightSource;

use reference::Reference;
use simd::SimdBackend;

/// What a forward pass reads.
#[derive(Debug, Clone, Copy)]
pub enum Tokens<'a> {
    /// M token ids, 1 ≤ M ≤ [`Backend::max_batch`]; each below the vocabulary size.
    Given(&'a [u32]),
    /// The one that the pass before chose, which may not have reached the host yet.
    Chosen,
}

impl Tokens<'_> {
    /// M.
    pub fn count(self) -> usize {
        match self {
            Self::Given(tokens) => tokens.len(),
            Self::Chosen => 1,
        }
    }
}

/// The tokens of one forward pass and what is wanted of it.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Whose positions these are.
    pub sequence: SequenceId,
    /// What the pass reads.
    pub tokens: Tokens<'a>,
    /// Position of the first token; the KV cache holds all positions before it.
    pub start: usize,
    /// What [`Backend::finish`] returns.
    pub want: Want,
}

impl Batch<'_> {
    /// Checks the batch against a backend's limits.
    ///
    /// # Errors
    /// If there is no token, more than `max_batch` or than [`Want`] takes, one outside the vocabulary, or the last
    /// position is past the capacity.
    pub fn check(&self, max_batch: usize, capacity: usize, vocab_size: usize) -> Result<()> {
        let found = self.tokens.count();
        if found == 0 {
            return Err(Error::EmptyPrompt);
        }
        if found > max_batch {
            return Err(Error::Dimension { name: "tokens of a batch", found, max: max_batch });
        }
        if self.want == Want::Tokens && found > MAX_DRAFT + 1 {
            let name = "tokens of a batch that all have a token after them";
            return Err(Error::Dimension { name, found, max: MAX_DRAFT + 1 });
        }
        let needed = self.start + found;
        if needed > capacity {
            return Err(Error::ContextOverflow { needed, capacity });
        }
        let Tokens::Given(tokens) = self.tokens else { return Ok(()) };
        match tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(&token) => Err(Error::TokenOutOfRange { token, vocab_size }),
            None => Ok(()),
        }
    }

    /// How many rows of logits the pass computes, counted from its last token.
    pub fn logit_rows(&self) -> usize {
        self.want.logit_rows(self.tokens.count())
    }
}

/// What a forward pass returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Nothing: a prompt chunk that only fills the KV cache. The head is skipped.
    Nothing,
    /// The token after the last position, as the sampler of [`Backend::choose_with`] chooses it;
    /// [`Backend::take`] hands it out.
    Token,
    /// A token after every position of the batch, each chosen as if the tokens before it in the batch were
    /// text; [`Backend::take`] hands out M of them, and [`Backend::keep`] says how many were. M
    /// is at most [`MAX_DRAFT`] + 1.
    Tokens,
    /// Logits `[V]` of the last position.
    LastLogits,
    /// Logits `[M, V]` of all positions.
    AllLogits,
}

impl Want {
    /// How many rows of logits a pass of `n_tokens` computes.
    pub fn logit_rows(self, n_tokens: usize) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Token | Self::LastLogits => 1,
            Self::AllLogits | Self::Tokens => n_tokens,
        }
    }
}

/// The result of a forward pass.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// For [`Want::Nothing`]; of a backend also for [`Want::Token`] and [`Want::Tokens`].
    Nothing,
    /// For [`Want::Token`].
    Token(u32),
    /// For [`Want::LastLogits`] and [`Want::AllLogits`].
    Logits(Vec<f32>),
}

/// Most tokens that are proposed to a model at once, to be checked in one pass.
pub const MAX_DRAFT: usize = 7;

/// A step's result, as a tap sees it: row-major f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tap {
    /// After `embed`, `project_out` and `down`: the residual stream `[M, hidden]`.
    Hidden,
    /// After `qkv`: queries `[M, H·D]` with RoPE applied.
    Query,
    /// After `attend`: `[M, H·D]`.
    Attended,
    /// After `gate_up`: `act(gate)·up`, `[M, intermediate]`.
    Gated,
}

/// A model loaded on a device.
///
/// One forward pass is `begin`, `embed`, then for each layer the five steps in order, then `head`
/// and `choose` if the [`Want`] asks for them, then `finish`. A step may run at once or be recorded
/// and run later, at `take` at the latest. `model.rs` is the only caller that needs to know the
/// order.
///
/// It may go from thread to thread, except in a browser, where WebGPU's objects stay where they were
/// made.
pub trait Backend: wgpu::WasmNotSend {
    /// The device and the variants in use, for people.
    fn device(&self) -> &DeviceInfo;
    /// Most tokens of one pass.
    fn max_batch(&self) -> usize;
    /// Tokens of a prompt that the next pass should take, at most [`Backend::max_batch`]: fewer where
    /// a device would be busy with them for too long.
    fn chunk(&self) -> usize {
        self.max_batch()
    }

    /// Most tokens of one pass with [`Want::AllLogits`].
    fn max_logit_rows(&self) -> usize {
        self.max_batch()
    }

    /// Positions a sequence may have.
    fn capacity(&self) -> usize;

    /// The sequences in the KV cache: [`Backend::begin`] gives them blocks, the caller opens, forks and
    /// closes them.
    fn sequences(&mut self) -> &mut Blocks;
    /// How keys and values are held.
    fn kv_format(&self) -> KvFormat;
    /// Bytes that the KV cache has allocated.
    fn kv_bytes(&self) -> u64;
    /// A block's contents in the order that every backend has outside: for each layer the keys
    /// `[64, G, D]`, then the values, little-endian in [`Backend::kv_format`]; after int8 values the
    /// scales of the keys `[64, G]`, then of the values, f32. What was recorded before is complete.
    ///
    /// # Errors
    /// If the device fails.
    fn read_block(&mut self, block: u32) -> Result<Vec<u8>>;
    /// Writes what [`Backend::read_block`] returns, into a block of a sequence that was prepared;
    /// makes room for it.
    ///
    /// # Errors
    /// If the length is not a block's, there is no memory, or the device fails.
    fn write_block(&mut self, block: u32, bytes: &[u8]) -> Result<()>;
    /// How many chosen tokens should wait to be taken, so that the device never idles: 1 where a
    /// pass is complete when `finish` returns. It may change from token to token.
    fn lead(&self) -> usize {
        1
    }

    /// How the int8 head has worked since the model was loaded; `None` if there is none.
    fn head_work(&self) -> Option<HeadWork> {
        None
    }

    /// What passes have read since the model was loaded; `None` where nobody counts.
    fn traffic(&self) -> Option<Traffic> {
        None
    }

    /// Bytes that it has allocated on a device of its own; `None` where there is none, or where the
    /// driver's interface does not say.
    fn device_bytes(&self) -> Option<u64> {
        None
    }

    /// Times every kernel from now on, each in a pass of its own, which is slower in all. Whoever runs
    /// its steps at once leaves that to the caller.
    fn start_profile(&mut self) -> Profiling {
        Profiling::Steps
    }

    /// The times since [`Backend::start_profile`]; nothing is timed after it.
    ///
    /// # Errors
    /// If the device fails.
    fn end_profile(&mut self) -> Result<Vec<PartTime>> {
        Ok(Vec::new())
    }

    /// How tokens are chosen from now on; the greedy sampler is the first. Tokens that were chosen
    /// and not taken are forgotten.
    ///
    /// # Errors
    /// If the device fails.
    fn choose_with(&mut self, sampler: Sampler) -> Result<()>;

    /// Starts a forward pass. Given tokens make it forget those that were chosen and not taken.
    ///
    /// # Errors
    /// If the batch does not fit, or a token is outside the vocabulary.
    fn begin(&mut self, batch: Batch<'_>) -> Result<()>;
    /// Token ids → residual stream `[M, hidden]`.
    ///
    /// # Errors
    /// If the device fails; so for every step.
    fn embed(&mut self) -> Result<()>;
    /// Norm, quantise, Q/K/V matrices, RoPE on Q and K, K and V into the cache.
    ///
    /// # Errors
    /// If the device fails.
    fn qkv(&mut self, layer: usize) -> Result<()>;
    /// Attention of Q over the cache.
    ///
    /// # Errors
    /// If the device fails.
    fn attend(&mut self, layer: usize) -> Result<()>;
    /// Sub-norm, quantise, output matrix, residual.
    ///
    /// # Errors
    /// If the device fails.
    fn project_out(&mut self, layer: usize) -> Result<()>;
    /// Norm, quantise, gate and up matrices, activation.
    ///
    /// # Errors
    /// If the device fails.
    fn gate_up(&mut self, layer: usize) -> Result<()>;
    /// Sub-norm, quantise, down matrix, residual.
    ///
    /// # Errors
    /// If the device fails.
    fn down(&mut self, layer: usize) -> Result<()>;
    /// Final norm and logits of the rows that the batch wants.
    ///
    /// # Errors
    /// If the device fails.
    fn head(&mut self) -> Result<()>;
    /// Chooses a token by the last row of logits; for [`Want::Tokens`], one by each.
    ///
    /// # Errors
    /// If the device fails, or the logits are NaN.
    fn choose(&mut self) -> Result<()>;
    /// Completes the pass and returns what the batch wants.
    ///
    /// # Errors
    /// If the device fails.
    fn finish(&mut self) -> Result<Output>;
    /// Whether the next pass, or the next token where there is one to come, can be had without waiting;
    /// else has the context woken when it can. Who may block need not ask.
    ///
    /// # Errors
    /// If the device fails.
    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The oldest chosen token that was not taken; waits for it.
    ///
    /// # Errors
    /// If the device fails, or the logits were NaN: then this token and the ones after it are
    /// forgotten.
    fn take(&mut self) -> Result<u32>;

    /// Of the tokens that a pass of [`Want::Tokens`] chose and that were taken, the first `n` are text:
    /// what is chosen next follows them, with the sampler's random numbers and memory as if only they
    /// had been chosen. The others are forgotten.
    ///
    /// # Errors
    /// [`Error::NoToken`] if `n` is 0 or fewer were taken; if the device fails.
    fn keep(&mut self, n: usize) -> Result<()>;

    /// Completes what has been recorded so far and reads a step's result; the pass goes on after
    /// it. For finding where two backends part.
    ///
    /// # Errors
    /// If the device fails.
    fn read(&mut self, tap: Tap) -> Result<Vec<f32>>;
}

/// Bytes that forward passes have read, each counted once a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Of the weights: matrices, scales, norms, the rows of the head and those that were looked up.
    pub weights: u64,
    /// Of the KV cache.
    pub cache: u64,
}

impl Traffic {
    /// What was read since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self { weights: self.weights - earlier.weights, cache: self.cache - earlier.cache }
    }
}

/// What of a pass can be timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profiling {
    /// Kernels, by the device's own clock.
    Kernels,
    /// Steps, by the host's clock: they run at once.
    Steps,
    /// Nothing: the device has no clock that can be read.
    Nothing,
}

/// The time that a part of a pass took.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartTime {
    /// The kernel, or the step.
    pub name: &'static str,
    /// How often it ran.
    pub calls: u64,
    /// In all.
    pub time: Duration,
}

/// How a model is to be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Positions that a sequence may have; `None`: the model's maximum, at most 32,768. Memory is taken
    /// as they are used.
    pub context: Option<usize>,
    /// How keys and values are held; `None`: see [`LoadOptions::kv_format`].
    pub kv: Option<KvFormat>,
    /// Most tokens of one prompt chunk. A backend takes fewer where its buffers do not hold as many,
    /// and a CPU, to which more than 64 are of no use, that many.
    pub max_batch: usize,
    /// CPU threads; `None`: one per physical core.
    pub threads: Option<usize>,
    /// Binds each thread but the caller's to a processor of its own, one of each core first. Linux alone;
    /// elsewhere, or with fewer processors than threads, the CPU backend does not load.
    pub pin: bool,
    /// Quantises the activations of a model that is defined with f32 ones: faster, and not the
    /// model's own numbers. See [`Activations::Int8Group`].
    pub int8_activations: bool,
    /// How tokens are chosen from the hidden state.
    pub head: HeadChoice,
    /// How ternary matrices lie in memory; only the CPU has a choice.
    pub packing: Packing,
    /// Most rows of logits of one pass on a GPU, at most 64. 1 is enough for text without drafts, and saves
    /// the kernels of more, which take time to compile.
    pub max_logit_rows: usize,
    /// Whether packed weights are kept in a file for the next load; only the CPU backend does.
    pub keep_packed: KeepPacked,
    /// Whether kernels are chosen by measuring them; only GPUs have a choice.
    pub tune: Tune,
    /// Whether a CPU leaves out weights whose inputs are 0.
    pub sparse: Sparse,
}

/// Whether a SIMD CPU keeps what it needs to leave out weights whose inputs are 0. Results are the same
/// bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sparse {
    /// No.
    #[default]
    Off,
    /// For models with relu², whose MLPs are mostly 0: `down_proj` is kept by columns and `up_proj` by
    /// rows too, a quarter of a byte more for each of their weights. A decode step of a layer whose gates
    /// are mostly closed reads the rows of the others alone, and one whose inputs of `down_proj` are
    /// mostly 0 the columns of the others. On levels where that is known to be faster: AVX2 and AVX-512.
    Auto,
}

/// What a device that chooses tokens reads of the LM head; the reference always reads the model's own
/// rows. Logits that are handed out come
/// from the model's own rows in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadChoice {
    /// int8 rows with a scale each, half the bytes of 16-bit ones or less; for greedy tokens the CPU reads
    /// six bits of each code. They are those of the model's own rows all the same: every row that could
    /// be the best is computed from those, too. Random draws follow the int8 logits.
    #[default]
    Int8,
    /// The model's own rows.
    Exact,
}

/// How many bytes the ternary matrices of a model on the CPU take. The results are the same. Matrices with
/// scales of groups have no choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packing {
    /// [`Packing::Base3`] where the processor decodes it as fast as its memory delivers it (AVX-512 VBMI,
    /// two threads or more) and no cache holds the matrices (more than 64 MiB at two bits); else
    /// [`Packing::TwoBits`].
    #[default]
    Auto,
    /// Two bits a weight.
    TwoBits,
    /// Five weights a byte, 1.6 bits each.
    Base3,
}

/// Whether the packed weights of a model on the CPU are kept in a file of the user's cache directory
/// ([`gpu::tune::directory`]), about as large as they are in memory, which the next load of the same files
/// maps instead of packing anew.
///
/// A file that was made from other files or with other options, by another version, or that is not whole,
/// is made again, and [`DeviceInfo::notes`] says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeepPacked {
    /// No file is read or written.
    #[default]
    Off,
    /// The file's header and length are checked.
    On,
    /// All of its contents are checked, too, by their SHA-256.
    Check,
}

/// How the int8 head chose greedy tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeadWork {
    /// Tokens chosen and taken.
    pub tokens: u64,
    /// Rows that were computed from the model's own table, in all.
    pub candidates: u64,
    /// The most for one token.
    pub most: u64,
}

/// How a GPU's kernels are chosen; every one of them is checked before it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tune {
    /// By the adapter's vendor and name.
    #[default]
    Off,
    /// By speed: as an earlier measurement that was kept says, else as a new one of less than two
    /// seconds does. See [`gpu::tune`].
    Auto,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            context: None,
            kv: None,
            max_batch: 512,
            max_logit_rows: 64,
            threads: None,
            pin: false,
            int8_activations: false,
            head: HeadChoice::default(),
            packing: Packing::default(),
            keep_packed: KeepPacked::default(),
            tune: Tune::Off,
            sparse: Sparse::Off,
        }
    }
}

/// Most tokens of a prompt chunk on a CPU: the activations of more leave its caches.
const HOST_BATCH: usize = 64;

/// Positions of a sequence where neither the caller nor the model says less.
pub const DEFAULT_CONTEXT: usize = 32_768;

/// Bytes of a whole context up to which keys and values are f32 by default.
pub const F32_CACHE: u64 = 64 << 20;
/// Bytes of a whole context up to which they are f16 by default.
pub const F16_CACHE: u64 = 2 << 30;

impl LoadOptions {
    /// What the linear layers of this model multiply with.
    ///
    /// # Errors
    /// [`Error::Int8Activations`] if int8 is asked for and the model has it by definition.
    pub fn activations(&self, config: &ModelConfig) -> Result<Activations> {
        match (config.activations, self.int8_activations) {
            (Activations::Float, true) => Ok(Activations::Int8Group),
            (_, true) => Err(Error::Int8Activations),
            (activations, false) => Ok(activations),
        }
    }

    /// How keys and values are held: as asked for, else f32 where a whole context of it takes at most
    /// [`F32_CACHE`], f16 up to [`F16_CACHE`], int8 beyond.
    ///
    /// # Errors
    /// As for [`LoadOptions::capacity`].
    pub fn kv_format(&self, config: &ModelConfig) -> Result<KvFormat> {
        let values = 2 * config.num_hidden_layers * config.kv_size() * self.capacity(config)?;
        Ok(self.kv.unwrap_or(match values as u64 {
            values if 4 * values <= F32_CACHE => KvFormat::F32,
            values if 2 * values <= F16_CACHE => KvFormat::F16,
            _ => KvFormat::Int8,
        }))
    }

    /// Most tokens of a prompt chunk on a CPU.
    pub(crate) fn host_batch(&self) -> usize {
        self.max_batch.min(HOST_BATCH)
    }

    /// Positions a sequence may have.
    ///
    /// # Errors
    /// [`Error::ContextOverflow`] if more are asked for than the model was made for,
    /// [`Error::Dimension`] if there is no room for a token in context or batch.
    pub fn capacity(&self, config: &ModelConfig) -> Result<usize> {
        let max = config.max_position_embeddings;
        if self.max_batch == 0 {
            return Err(Error::Dimension { name: "max_batch", found: 0, max });
        }
        match self.context {
            None => Ok(max.min(DEFAULT_CONTEXT)),
            Some(0) => Err(Error::Dimension { name: "context", found: 0, max }),
            Some(needed) if needed > max => Err(Error::ContextOverflow { needed, capacity: max }),
            Some(context) => Ok(context),
        }
    }
}

/// How far a load has come, in layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Layers loaded.
    pub done: usize,
    /// Layers there are.
    pub total: usize,
}

/// Called before each layer of a load, and once at its end.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress);

/// What a backend runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As `--device` takes it: `gpu:0`, `cpu`, `ref`.
    pub name: String,
    /// Adapter and driver, or CPU level and threads.
    pub description: String,
    /// The GEMV variants in use, by kernel name.
    pub gemv: String,
    /// How tokens are chosen, by kernel name, and why not otherwise.
    pub head: String,
    /// What happened while the model was loaded, one line each.
    pub notes: Vec<String>,
}

/// A device as `--device` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// The best device there is: a discrete GPU, else an integrated one, else the SIMD CPU.
    Auto,
    /// The best GPU there is, or the adapter of that index; a software rasteriser counts.
    Gpu(Option<usize>),
    /// The SIMD CPU backend.
    Cpu,
    /// The scalar reference.
    Reference,
}

impl std::str::FromStr for Device {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let unknown = || Error::UnknownDevice { found: name.to_owned() };
        match name {
            "auto" => Ok(Self::Auto),
            "gpu" => Ok(Self::Gpu(None)),
            "cpu" => Ok(Self::Cpu),
            "ref" => Ok(Self::Reference),
            _ => {
                let index = name.strip_prefix("gpu:").ok_or_else(unknown)?;
                Ok(Self::Gpu(Some(index.parse().map_err(|_| unknown())?)))
            }
        }
    }
}

/// A device that there is, and whether `auto` takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AvailableDevice {
    /// As `--device` takes it.
    pub name: String,
    /// Adapter, kind and driver, or CPU level.
    pub description: String,
    /// Why `auto` takes it or does not.
    pub auto: String,
    /// Whether `auto` takes it.
    pub chosen: bool,
}

/// Every device, adapters first, with what `auto` would choose and why.
///
/// # Errors
/// If the CPU level that `STERNA_CPU` asks for is not available.
#[cfg(not(target_family = "wasm"))]
pub fn devices() -> Result<Vec<AvailableDevice>> {
    let adapters = gpu::adapters();
    let chosen = auto_adapter(&adapters);
    let mut devices: Vec<_> = adapters
        .iter()
        .map(|adapter| {
            let is_chosen = chosen == Some(adapter.index);
            let auto = match adapter.kind {
                _ if is_chosen => "the first of the best kind of GPU there is",
                _ if adapter.api == "gl" => "only on request: the OpenGL path is not tested",
                gpu::AdapterKind::Software => "only on request: slower than the CPU backend",
                gpu::AdapterKind::Other | gpu::AdapterKind::Virtual => {
                    "only on request: not known to be a hardware GPU"
                }
                _ => "an earlier or faster kind of GPU comes first",
            };
            AvailableDevice {
                name: format!("gpu:{}", adapter.index),
                description: adapter.to_string(),
                auto: auto.to_owned(),
                chosen: is_chosen,
            }
        })
        .collect();
    let fallback = if chosen.is_none() { "no hardware GPU" } else { "a hardware GPU comes first" };
    devices.push(AvailableDevice {
        name: "cpu".to_owned(),
        description: simd::description(&LoadOptions::default())?,
        auto: fallback.to_owned(),
        chosen: chosen.is_none(),
    });
    devices.push(AvailableDevice {
        name: "ref".to_owned(),
        description: "scalar reference: slow, defines what is right".to_owned(),
        auto: "only on request".to_owned(),
        chosen: false,
    });
    Ok(devices)
}

/// The device that [`Device::Auto`] stands for on this machine.
#[cfg(not(target_family = "wasm"))]
pub fn resolve_auto() -> Device {
    pollster::block_on(resolve_auto_async())
}

/// The device that [`Device::Auto`] stands for on this machine, or in this browser.
pub async fn resolve_auto_async() -> Device {
    match auto_adapter(&gpu::adapters_async().await) {
        Some(index) => Device::Gpu(Some(index)),
        None => Device::Cpu,
    }
}

/// The adapter that `auto` takes: the first discrete, else the first integrated GPU.
fn auto_adapter(adapters: &[gpu::AdapterDescription]) -> Option<usize> {
    // Browsers do not tell what kind of GPU they have, only that it is none.
    let browsers = cfg!(target_family = "wasm").then_some(gpu::AdapterKind::Other);
    let hardware = |adapter: &&gpu::AdapterDescription| {
        let kinds = [gpu::AdapterKind::Discrete, gpu::AdapterKind::Integrated];
        adapter.api != "gl" && kinds.into_iter().chain(browsers).any(|kind| kind == adapter.kind)
    };
    adapters.iter().filter(hardware).min_by_key(|a| (a.kind, a.index)).map(|a| a.index)
}

/// Loads a model on a device.
///
/// # Errors
/// If the device is not there, or a tensor is missing or malformed.
pub fn load(
    source: &dyn WeightSource,
    device: Device,
    options: &LoadOptions,
    progress: OnProgress<'_>,
) -> Result<Box<dyn Backend>> {
    block_on(load_async(source, device, options, progress))
}

/// [`load`] where nothing may block.
///
/// # Errors
/// As for [`load`].
pub async fn load_async(
    source: &dyn WeightSource,
    device: Device,
    options: &LoadOptions,
    progress: OnProgress<'_>,
) -> Result<Box<dyn Backend>> {
    let device = match device {
        Device::Auto => resolve_auto_async().await,
        device => device,
    };
    Ok(match device {
        Device::Reference => Box::new(Reference::load(source, options, progress)?),
        Device::Gpu(index) => {
            let gpu = gpu::Gpu::open_async(index, gpu::Capabilities::Adapter).await?;
            Box::new(gpu::GpuBackend::load_async(source, gpu, None, options, progress).await?)
        }
        Device::Auto | Device::Cpu => Box::new(SimdBackend::load(source, options, progress)?),
    })
}

#[cfg(test)]
mod tests {
    use super::gpu::{AdapterDescription, AdapterKind};
    use super::*;

    fn adapter(index: usize, kind: AdapterKind, api: &str) -> AdapterDescription {
        let (name, driver) = ("a".to_owned(), "d".to_owned());
        let (api, pci) = (api.to_owned(), String::new());
        AdapterDescription { index, name, kind, api, driver, vendor: 0, pci }
    }

    #[test]
    fn auto_prefers_discrete_then_integrated_and_never_software() {
        let software = adapter(0, AdapterKind::Software, "vulkan");
        let integrated = adapter(1, AdapterKind::Integrated, "vulkan");
        let discrete = adapter(2, AdapterKind::Discrete, "vulkan");
        let gl = adapter(3, AdapterKind::Discrete, "gl");
        assert_eq!(auto_adapter(&[]), None);
        assert_eq!(auto_adapter(&[software.clone(), gl]), None);
        assert_eq!(auto_adapter(&[software.clone(), integrated.clone()]), Some(1));
        assert_eq!(auto_adapter(&[software, integrated, discrete]), Some(2));
    }

    #[test]
    fn device_names() {
        assert_eq!("gpu:3".parse::<Device>().unwrap(), Device::Gpu(Some(3)));
        for (name, device) in [
            ("auto", Device::Auto),
            ("gpu", Device::Gpu(None)),
            ("cpu", Device::Cpu),
            ("ref", Device::Reference),
        ] {
            assert_eq!(name.parse::<Device>().unwrap(), device);
        }
        for name in ["", "gpu:", "gpu:x", "gpu:-1", "cuda"] {
            assert!(name.parse::<Device>().is_err(), "{name}");
        }
    }
}
