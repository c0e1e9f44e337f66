//! One error type; one variant per cause.

use std::path::PathBuf;

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, with what was expected, what was found and where.
///
/// `file` is a path, or the name of an embedded file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or mapped.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The directory lacks a file that a checkpoint must have.
    #[error("{}: no {expected} in this directory", path.display())]
    NotACheckpoint {
        /// The directory.
        path: PathBuf,
        /// The missing file.
        expected: &'static str,
    },
    /// A JSON file does not parse or lacks a field.
    #[error("{file}: {source}")]
    Json {
        /// The JSON file.
        file: String,
        /// The parser's reason, with line and column.
        source: serde_json::Error,
    },
    /// A safetensors header or its offsets do not describe the file.
    #[error("{file}: not a valid safetensors file: {problem}")]
    Safetensors {
        /// The file.
        file: String,
        /// What is inconsistent, in numbers.
        problem: String,
    },
    /// A GGUF header or its offsets do not describe the file.
    #[error("{file}: not a valid GGUF file: {problem}")]
    Gguf {
        /// The file.
        file: String,
        /// What is inconsistent, in numbers.
        problem: String,
    },
    /// A GGUF file is of another version or byte order.
    #[error(
        "{file}: expected GGUF version 2 or 3 in little-endian order, found {found}; convert the model again"
    )]
    GgufVersion {
        /// The file.
        file: String,
        /// Its version.
        found: String,
    },
    /// The parts of a split GGUF model do not belong together.
    #[error("{file}: expected {expected}, found {found}")]
    GgufSplit {
        /// The part.
        file: String,
        /// What the other parts, or the file's name, ask for.
        expected: String,
        /// What the part says.
        found: String,
    },
    /// A directory holds several models.
    #[error("{}: expected one model, found {found}; name one of the files", path.display())]
    SeveralModels {
        /// The directory.
        path: PathBuf,
        /// Their files.
        found: String,
    },
    /// A key of a GGUF file is missing or has another type than its meaning requires.
    #[error("{file}: {key}: expected {expected}, found {found}")]
    Metadata {
        /// The GGUF file.
        file: String,
        /// The key.
        key: String,
        /// The type that would do.
        expected: &'static str,
        /// The value in the file.
        found: String,
    },
    /// The model needs a tensor whose element type this version does not read.
    #[error("{file}: tensor {tensor}: this version does not read {found}: {remedy}")]
    GgmlType {
        /// The GGUF file.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The type.
        found: String,
        /// What would help.
        remedy: &'static str,
    },
    /// The index of a sharded checkpoint names a file outside its directory.
    #[error("{file}: expected the name of a file in the same directory, found {found}")]
    ShardName {
        /// The index.
        file: String,
        /// The name in the index.
        found: String,
    },
    /// Two shards hold a tensor of the same name.
    #[error("{file}: tensor {tensor} is also in {other}")]
    DuplicateTensor {
        /// The shard read last.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The shard read before.
        other: String,
    },
    /// The checkpoint holds a tensor that would change the computation, but not in this model.
    #[error("{file}: tensor {tensor} was not expected: {reason}")]
    UnexpectedTensor {
        /// The checkpoint or shard.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// Why the model cannot have it.
        reason: &'static str,
    },
    /// The checkpoint lacks a tensor that the configuration requires.
    #[error("{file}: tensor {tensor} is missing{}", hint.map(|hint| format!(" ({hint})")).unwrap_or_default())]
    MissingTensor {
        /// The checkpoint or shard.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// What in the configuration asks for it.
        hint: Option<&'static str>,
    },
    /// A tensor has another shape than the configuration requires.
    #[error("{file}: tensor {tensor}: expected shape {expected:?}, found {found:?}")]
    TensorShape {
        /// The checkpoint or shard.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The shape that the configuration implies.
        expected: Vec<usize>,
        /// The shape in the file.
        found: Vec<usize>,
    },
    /// A tensor has another element type than the configuration requires.
    #[error("{file}: tensor {tensor}: expected {expected}, found {found}")]
    TensorDtype {
        /// The checkpoint or shard.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The types that would do.
        expected: &'static str,
        /// The type in the file.
        found: String,
    },
    /// A tensor holds a value that no valid checkpoint has.
    #[error("{file}: tensor {tensor}: expected {expected}, found {found}")]
    TensorValue {
        /// The checkpoint or shard.
        file: String,
        /// The tensor's name.
        tensor: String,
        /// The values that are valid.
        expected: &'static str,
        /// The value, and where it stands.
        found: String,
    },
    /// The checkpoint is of an architecture that this version does not run.
    #[error("{file}: unknown architecture {found:?}; this version runs {expected}")]
    UnknownArchitecture {
        /// The configuration file.
        file: String,
        /// The name in the file.
        found: String,
        /// The names that would do.
        expected: &'static str,
    },
    /// A configuration value is missing, out of range or contradicts another.
    #[error("{file}: {key}: expected {expected}, found {found}")]
    Config {
        /// The configuration file.
        file: String,
        /// The key, dotted for nested ones.
        key: String,
        /// What is supported or consistent.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// int8 activations were asked for where they are no choice.
    #[error(
        "int8 activations are for models whose weights have a scale for each group of inputs; this one has int8 activations by definition"
    )]
    Int8Activations,
    /// The device's kernels do not run this model.
    #[error("{device} does not run models with {what}")]
    UnsupportedOnDevice {
        /// The kind of device.
        device: &'static str,
        /// What of the model it has no kernel for.
        what: &'static str,
    },
    /// A conversion would replace a file.
    #[error("{}: it is there already; --force replaces it", path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The target of a conversion cannot hold the model.
    #[error("the model cannot be converted: {problem}")]
    Conversion {
        /// Why, and what would do.
        problem: String,
    },
    /// Two models that should hold the same weights do not.
    #[error("{what}: expected {expected}, found {found}")]
    Differs {
        /// The tensor and the place.
        what: String,
        /// The first model's value.
        expected: String,
        /// The second model's value.
        found: String,
    },
    /// The tokenizer file cannot be used.
    #[error("{file}: {problem}")]
    Tokenizer {
        /// The tokenizer file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The chat template failed.
    #[error("{file}: chat template: {source}")]
    ChatTemplate {
        /// The file the template is from.
        file: String,
        /// The template engine's reason.
        source: minijinja::Error,
    },
    /// The model has no chat template.
    #[error("{file}: no chat template; this model completes plain text")]
    NoChatTemplate {
        /// The model.
        file: String,
    },
    /// A dimension is zero or too large.
    #[error("{name}: expected 1 to {max}, found {found}")]
    Dimension {
        /// Which dimension.
        name: &'static str,
        /// Its value.
        found: usize,
        /// The largest supported value.
        max: usize,
    },
    /// A token id is outside the vocabulary.
    #[error("token {token} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The token id.
        token: u32,
        /// V.
        vocab_size: usize,
    },
    /// There is nothing to continue from.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A chosen token is asked for before one was chosen.
    #[error("no token has been chosen yet")]
    NoToken,
    /// The tokens do not fit the context.
    #[error(
        "{needed} tokens do not fit the context of {capacity}; --context sets it, up to the model's maximum"
    )]
    ContextOverflow {
        /// Positions needed.
        needed: usize,
        /// Positions there are.
        capacity: usize,
    },
    /// A sequence of the KV cache has been closed, or belongs to another model.
    #[error("the sequence is not open")]
    NoSequence,
    /// The caller has ended a prompt before it was through.
    #[error("cancelled")]
    Cancelled,
    /// Something would have to wait for a device where nothing may: in a browser.
    #[error("a browser does not allow to wait for the GPU; await the call's `async` form")]
    WouldBlock,
    /// A file is no session, or not all of one.
    #[error("{}: not a valid session file: {problem}", path.display())]
    Snapshot {
        /// The file.
        path: PathBuf,
        /// What is inconsistent, in numbers.
        problem: String,
    },
    /// A session was saved by another model, or the same one in other files.
    #[error("{}: a session of another model: expected identity {expected}, found {found}", path.display())]
    SnapshotModel {
        /// The file.
        path: PathBuf,
        /// The loaded model's identity, shortened.
        expected: String,
        /// The one in the file.
        found: String,
    },
    /// A session's KV cache cannot be had in this format without loss.
    #[error("{}: expected a KV cache of {expected}, found {found}; load the model with --kv {found}", path.display())]
    SnapshotFormat {
        /// The file.
        path: PathBuf,
        /// The format of the loaded model's cache.
        expected: &'static str,
        /// The one in the file.
        found: &'static str,
    },
    /// There is no memory for more of the KV cache.
    #[error(
        "no memory for another {bytes} bytes of KV cache; a shorter --context or --kv int8 needs less"
    )]
    KvMemory {
        /// Bytes of a block.
        bytes: usize,
    },
    /// The bytes of a block of the KV cache are not as many as the format has.
    #[error("a block of the KV cache: expected {expected} bytes, found {found}")]
    BlockLength {
        /// Bytes of a block.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A sampling option is out of range.
    #[error("{option}: expected {expected}, found {found}")]
    Sampling {
        /// The option.
        option: &'static str,
        /// Its valid range.
        expected: &'static str,
        /// The value given.
        found: String,
    },
    /// A device name does not parse.
    #[error("unknown device {found:?}: expected auto, gpu, gpu:N, cpu or ref")]
    UnknownDevice {
        /// The name given.
        found: String,
    },
    /// No adapter answers to the request.
    #[error("no GPU adapter for {wanted:?}: {found}")]
    NoAdapter {
        /// The device asked for.
        wanted: String,
        /// What is there instead.
        found: String,
    },
    /// The adapter's limits are too small for the model.
    #[error("{adapter}: {what} needs {needed}, the adapter's limit is {limit}")]
    GpuLimit {
        /// The adapter.
        adapter: String,
        /// What does not fit.
        what: String,
        /// The amount needed.
        needed: u64,
        /// The adapter's limit.
        limit: u64,
    },
    /// The driver reported an error, or lost the device.
    #[error("{adapter}: {operation}: {problem}")]
    Gpu {
        /// The adapter.
        adapter: String,
        /// What was being done.
        operation: &'static str,
        /// The driver's words.
        problem: String,
    },
    /// A plan for a matrix product on a GPU has a value that its kernels do not.
    #[error("plan of a matrix product: {field}: expected one of {allowed:?}, found {found}")]
    Plan {
        /// Which number.
        field: &'static str,
        /// Its value.
        found: usize,
        /// The values there are.
        allowed: &'static [usize],
    },
    /// A plan for a GEMM on a GPU needs cooperative matrices that the device does not have.
    #[error(
        "{adapter}: expected cooperative matrices of {size}x{size}, f16 with f32 sums, on subgroups of up to {subgroup} lanes, found {found}"
    )]
    Cooperative {
        /// The adapter.
        adapter: String,
        /// Rows and columns.
        size: usize,
        /// Lanes of a subgroup.
        subgroup: usize,
        /// What the device has.
        found: String,
    },
    /// Every variant of a kernel failed its exactness check on this adapter.
    #[error("{device}: kernel {kernel} gives wrong results here: {problem}")]
    SelfTest {
        /// The device.
        device: String,
        /// The kernel.
        kernel: String,
        /// First wrong index, with both values.
        problem: String,
    },
    /// The environment or the caller asks for CPU kernels that this machine does not run.
    #[error("STERNA_CPU: expected one of {expected}, found {found:?}")]
    CpuLevel {
        /// The levels that this machine runs.
        expected: String,
        /// The level asked for.
        found: String,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} worker threads: {problem}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// The system's reason.
        problem: String,
    },
    /// The model computed NaN logits.
    #[error("the logits at position {position} are not numbers; the model or the device is broken")]
    NanLogits {
        /// The position of the token whose successor was asked for.
        position: usize,
    },
    /// A name is not that of a model on the hub.
    #[error("expected ORG/NAME or ORG/NAME:FILE.gguf, found {found}")]
    HubName {
        /// The name given.
        found: String,
    },
    /// A revision is not the name of a branch, tag or commit.
    #[error("expected a branch, tag or commit, found {found}")]
    HubRevision {
        /// The revision given.
        found: String,
    },
    /// A setting of the hub, from the environment or a file, is invalid.
    #[error("{name}: expected {expected}, found {found}")]
    HubSetting {
        /// The variable or the file.
        name: String,
        /// What would do.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The hub has no such model, revision or file.
    #[error("{what}: not found on {endpoint}; check name and revision")]
    HubNotFound {
        /// The model and revision, or the file.
        what: String,
        /// The hub.
        endpoint: String,
    },
    /// The hub does not let this user read the model.
    #[error("{what}: not authorised (status {status}): {hint}")]
    HubNotAuthorised {
        /// The model and revision, or the file.
        what: String,
        /// 401 or 403.
        status: u16,
        /// What would help.
        hint: String,
    },
    /// The hub answers no more requests for a while.
    #[error("{what}: the hub limits requests (status 429); try again {}, or set HF_TOKEN", retry_after.map_or("later".to_owned(), |seconds| format!("in {seconds} s")))]
    HubRateLimited {
        /// The model and revision, or the file.
        what: String,
        /// When the hub takes requests again, in seconds, if it says so.
        retry_after: Option<u64>,
    },
    /// The hub failed, again and again.
    #[error("{what}: the server failed (status {status}), and again when asked again; try later")]
    HubServer {
        /// The model and revision, or the file.
        what: String,
        /// 500 or more.
        status: u16,
    },
    /// The hub could not be reached, or the connection was cut, again and again.
    #[error("{what}: {problem}; pull again to continue")]
    HubConnection {
        /// The model and revision, or the file.
        what: String,
        /// The last failure.
        problem: String,
    },
    /// The hub's answer is not what its protocol says.
    #[error("{what}: expected {expected}, found {found}")]
    HubAnswer {
        /// The model and revision, or the file.
        what: String,
        /// What the protocol says.
        expected: &'static str,
        /// What the answer says.
        found: String,
    },
    /// A download has other bytes than the hub announced.
    #[error("{file}: expected {expected}, found {found}; the download was deleted, pull again")]
    HubChecksum {
        /// The model and file.
        file: String,
        /// The announced checksum.
        expected: String,
        /// The checksum of what arrived.
        found: String,
    },
    /// The repository names a file that would be outside its directory, or is no file's name.
    #[error("{name}: expected the name of a file inside the model, found {found}")]
    HubFileName {
        /// The model.
        name: String,
        /// The name in the repository.
        found: String,
    },
    /// The repository holds several models.
    #[error("{name} holds several models; add one of these to the name: {found}")]
    HubAmbiguous {
        /// The model.
        name: String,
        /// The files, with their sizes.
        found: String,
    },
    /// The repository holds no model in a format that this version reads.
    #[error("{name}: no model.safetensors or GGUF file to pull: {problem}")]
    HubNoModel {
        /// The model.
        name: String,
        /// What it holds or lacks.
        problem: String,
    },
    /// The cache does not hold the whole model, and nothing may be downloaded.
    #[error("{name}: not in the cache {}: {missing}; offline, so nothing was downloaded", cache.display())]
    HubOffline {
        /// The model and revision.
        name: String,
        /// The cache.
        cache: PathBuf,
        /// What is missing.
        missing: String,
    },
    /// The model does not fit on the disk.
    #[error("{}: {needed} are needed, {free} are free", cache.display())]
    HubDisk {
        /// The cache.
        cache: PathBuf,
        /// The size of what is to be downloaded.
        needed: String,
        /// The free space.
        free: String,
    },
    /// A file that a meter reads is not there, or no more.
    #[error("{}: no such file", path.display())]
    MeterVanished {
        /// The file.
        path: PathBuf,
    },
    /// A file that a meter reads may not be read.
    #[error("{}: permission denied; {fix}", path.display())]
    MeterPermission {
        /// The file.
        path: PathBuf,
        /// What would help.
        fix: &'static str,
    },
    /// A meter shows something that is no value of its kind.
    #[error("{}: expected {expected}, found {found}", path.display())]
    MeterValue {
        /// The file, or the meter.
        path: PathBuf,
        /// What would do.
        expected: String,
        /// What is there.
        found: String,
    },
    /// A counter of energy fell, and did not wrap.
    #[error(
        "{meter}: the counter fell from {before} to {after} {unit} ({reason}): it was reset; measure again"
    )]
    CounterFell {
        /// The meter.
        meter: String,
        /// Its value before.
        before: u64,
        /// Its value now.
        after: u64,
        /// What it counts.
        unit: &'static str,
        /// Why that is no wrap.
        reason: String,
    },
    /// A counter of energy grew by more than can have been used.
    #[error(
        "{meter}: the counter grew by {joules:.0} J in {seconds:.1} s, more than {max_watts} W: it was reset; measure again"
    )]
    CounterLeapt {
        /// The meter.
        meter: String,
        /// By how much it grew.
        joules: f64,
        /// In which time.
        seconds: f64,
        /// More than anything of the kind draws.
        max_watts: f64,
    },
    /// A battery measures only what it feeds.
    #[error(
        "{meter}: expected a battery that is discharging, found status {status:?}; unplug the power supply"
    )]
    BatteryNotDischarging {
        /// The battery.
        meter: String,
        /// What it does instead.
        status: String,
    },
    /// A discharging battery's gauge went up.
    #[error(
        "{meter}: the battery's gauge rose from {before} to {after} while discharging; measure again"
    )]
    BatteryRose {
        /// The battery.
        meter: String,
        /// µWh or µAh before.
        before: f64,
        /// µWh or µAh now.
        after: f64,
    },
    /// A perf event cannot be opened or read.
    #[error("{event}: {source}")]
    PerfEvent {
        /// The event and its CPU.
        event: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A perf event may not be opened.
    #[error("{event}: permission denied (perf_event_paranoid is {paranoid}); {fix}")]
    PerfPermission {
        /// The event and its CPU.
        event: String,
        /// The kernel's setting.
        paranoid: String,
        /// What would help.
        fix: &'static str,
    },
    /// NVIDIA's library failed.
    #[error("{gpu}: {problem}")]
    Nvml {
        /// The GPU.
        gpu: String,
        /// The library's words.
        problem: String,
    },
    /// A counter of an Apple chip failed.
    #[error("energy of the {part}: {problem}")]
    IoReport {
        /// The part of the chip.
        part: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A model does not fit the memory that is free.
    #[error(
        "{model}: needs {:.1} GB of memory, found {:.1} GB free; take a smaller model, or a shorter context",
        *needed as f64 / 1e9,
        *available as f64 / 1e9
    )]
    ModelMemory {
        /// The model.
        model: String,
        /// Bytes it takes.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },
    /// A report holds something else than it should.
    #[error("{file}: {key}: expected {expected}, found {found}")]
    Report {
        /// The file.
        file: String,
        /// Where in it.
        key: String,
        /// What would do.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Two meters count some of the same joules.
    #[error("{first} and {second} overlap; their energies cannot be added")]
    MetersOverlap {
        /// What one measures.
        first: String,
        /// What the other measures.
        second: String,
    },
    /// A meter has no energy for a window.
    #[error("{meter}: not measured: {problem}")]
    NotMeasured {
        /// The meter.
        meter: String,
        /// Why.
        problem: String,
    },
}
