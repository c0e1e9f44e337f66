//! The `Backend` trait: a loaded model that runs in steps, and the choice of a device.

use crate::error::Result;

/// The tokens of one forward pass and what is wanted of it.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// M token ids, 1 ≤ M ≤ [`Backend::max_batch`]; each below the vocabulary size.
    pub tokens: &'a [u32],
    /// Position of the first token; the KV cache holds all positions before it.
    pub start: usize,
    /// What [`Backend::finish`] returns.
    pub want: Want,
}

/// What a forward pass returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Nothing: a prompt chunk that only fills the KV cache. The head is skipped.
    Nothing,
    /// The greedy token after the last position; the logits stay on the device.
    Token,
    /// Logits `[V]` of the last position.
    LastLogits,
    /// Logits `[M, V]` of all positions.
    AllLogits,
}

/// The result of a forward pass.
#[derive(Debug, Clone, PartialEq)]
pub enum Output {
    /// For [`Want::Nothing`].
    Nothing,
    /// For [`Want::Token`].
    Token(u32),
    /// For [`Want::LastLogits`] and [`Want::AllLogits`].
    Logits(Vec<f32>),
}

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
/// and `argmax` if the [`Want`] asks for them, then `finish`. A step may run at once or be recorded
/// and run by `finish`. `model.rs` is the only caller that needs to know the order.
pub trait Backend: Send {
    /// The device and the variants in use, for people.
    fn device(&self) -> &DeviceInfo;
    /// Most tokens of one pass.
    fn max_batch(&self) -> usize;
    /// Positions the KV cache holds.
    fn capacity(&self) -> usize;

    /// Starts a forward pass.
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
    /// Greedy token of the last row of logits.
    ///
    /// # Errors
    /// If the device fails.
    fn argmax(&mut self) -> Result<()>;
    /// Completes the pass and returns what the batch wants.
    ///
    /// # Errors
    /// If the device fails, or the logits are NaN.
    fn finish(&mut self) -> Result<Output>;

    /// Completes what has been recorded so far and reads a step's result; the pass goes on after
    /// it. For finding where two backends part.
    ///
    /// # Errors
    /// If the device fails.
    fn read(&mut self, tap: Tap) -> Result<Vec<f32>>;
}

/// How a model is to be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadOptions {
    /// Positions of the KV cache; `None`: the model's maximum, at most 4096.
    pub context: Option<usize>,
    /// Most tokens of one prompt chunk.
    pub max_batch: usize,
    /// CPU threads; `None`: one per physical core.
    pub threads: Option<usize>,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { context: None, max_batch: 64, threads: None }
    }
}

/// What a backend runs on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As `--device` takes it: `gpu:0`, `cpu`, `ref`.
    pub name: String,
    /// Adapter and driver, or CPU level and threads.
    pub description: String,
    /// The GEMV variant in use, by kernel name.
    pub gemv: String,
}
