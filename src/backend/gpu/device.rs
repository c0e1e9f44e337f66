//! Adapters: listing them, choosing one, opening a device.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::profile::Profile;
use super::record::{Pipelines, Specialised, Work};
use crate::error::{Error, Result};
use crate::wait::block_on;

/// An adapter as wgpu reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterDescription {
    /// N of `gpu:N`.
    pub index: usize,
    /// The adapter's name.
    pub name: String,
    /// What kind of device it is.
    pub kind: AdapterKind,
    /// vulkan, metal, dx12 …
    pub api: String,
    /// Driver name and version.
    pub driver: String,
    /// The vendor's PCI number; 0 where the API does not say.
    pub vendor: u32,
    /// Its PCI address, as `0000:65:00.0`; empty where the API does not say.
    pub pci: String,
}

/// Kinds of adapters, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdapterKind {
    /// A discrete GPU.
    Discrete,
    /// A GPU that shares the CPU's memory.
    Integrated,
    /// A GPU behind a virtual machine.
    Virtual,
    /// Not said by the driver.
    Other,
    /// A software rasteriser: never chosen by `auto`.
    Software,
}

impl std::fmt::Display for AdapterKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Discrete => "discrete GPU",
            Self::Integrated => "integrated GPU",
            Self::Virtual => "virtual GPU",
            Self::Other => "unknown kind",
            Self::Software => "software rasteriser",
        })
    }
}

impl std::fmt::Display for AdapterDescription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({}, {}", self.name, self.kind, self.api)?;
        // A browser has drivers, and keeps them to itself.
        let driver = if self.driver.is_empty() { "" } else { ", " };
        write!(f, "{driver}{})", self.driver)
    }
}

/// What a device is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Capabilities {
    /// WebGPU's default limits and no optional feature: the baseline that runs everywhere.
    WebGpuDefault,
    /// What the adapter offers: its limits, and the features that some kernel gains from.
    #[default]
    Adapter,
}

/// Square matrices that the lanes of a subgroup multiply together: f16 by f16, added up in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cooperative {
    /// Rows and columns: one of [`Self::SIZES`].
    pub size: usize,
    /// Lanes of a subgroup; the most, where the driver chooses.
    pub subgroup: usize,
}

impl Cooperative {
    /// What `size` may be: what WGSL has.
    pub const SIZES: [usize; 2] = [8, 16];

    /// What has to be asked of a device.
    const FEATURES: wgpu::Features =
        wgpu::Features::SHADER_F16.union(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);

    /// The largest that an adapter has.
    fn of(adapter: &wgpu::Adapter) -> Option<Self> {
        use wgpu::CooperativeScalarType::{F16, F32};

        if !adapter.features().contains(Self::FEATURES) {
            return None;
        }
        let all = adapter.cooperative_matrix_properties();
        let has = |size: &usize| {
            all.iter().any(|found| {
                [found.m_size, found.n_size, found.k_size] == [*size as u32; 3]
                    && (found.ab_type, found.cr_type) == (F16, F32)
            })
        };
        let size = Self::SIZES.into_iter().rev().find(has)?;
        let info = adapter.get_info();
        let subgroup = match info.backend {
            // wgpu says 4 to 64 of all of Apple's; those that have such matrices have 32.
            wgpu::Backend::Metal => 32,
            _ => info.subgroup_max_size as usize,
        };
        Some(Self { size, subgroup })
    }

    /// Where wgpu takes the features that it calls experimental.
    #[expect(unsafe_code, reason = "wgpu has no safe way to say that its experiments are wanted")]
    fn experiments(cooperative: Option<Self>) -> wgpu::ExperimentalFeatures {
        match cooperative {
            None => wgpu::ExperimentalFeatures::disabled(),
            // SAFETY: nothing but the kernels of `shader::COOPERATIVE` uses them, which load and store
            // whole matrices inside of workgroup arrays, in uniform control flow. What wgpu or a driver
            // may still do wrong with them, the check against the reference has to find.
            Some(_) => unsafe { wgpu::ExperimentalFeatures::enabled() },
        }
    }
}

fn instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle_from_env();
    // Whatever the environment says: what computes nothing is no adapter.
    descriptor.backend_options.noop.enable = false;
    descriptor.backend_options.dx12.shader_compiler = dx12_compiler();
    wgpu::Instance::new(descriptor)
}

/// DXC, which knows packed dot products and is linked in: Windows itself only has FXC, with which
/// they are emulated. Where there is no DXC to link, and elsewhere, wgpu's own choice.
fn dx12_compiler() -> wgpu::Dx12Compiler {
    if cfg!(all(windows, target_arch = "x86_64", target_env = "msvc")) {
        wgpu::Dx12Compiler::StaticDxc.with_env()
    } else {
        wgpu::Dx12Compiler::default().with_env()
    }
}

async fn adapters_of(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    instance.enumerate_adapters(wgpu::Backends::all()).await
}

fn describe(index: usize, info: &wgpu::AdapterInfo) -> AdapterDescription {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => AdapterKind::Discrete,
        wgpu::DeviceType::IntegratedGpu => AdapterKind::Integrated,
        wgpu::DeviceType::VirtualGpu => AdapterKind::Virtual,
        wgpu::DeviceType::Cpu => AdapterKind::Software,
        wgpu::DeviceType::Other => AdapterKind::Other,
    };
    let driver = format!("{} {}", info.driver, info.driver_info).trim().to_owned();
    // Browsers often do not tell.
    let name = if info.name.is_empty() { "a GPU without a name" } else { &info.name };
    AdapterDescription {
        index,
        name: name.to_owned(),
        kind,
        api: info.backend.to_string(),
        driver,
        vendor: info.vendor,
        pci: info.device_pci_bus_id.clone(),
    }
}

/// Every adapter, in the order that `gpu:N` counts.
#[cfg(not(target_family = "wasm"))]
pub fn adapters() -> Vec<AdapterDescription> {
    pollster::block_on(adapters_async())
}

/// Every adapter, in the order that `gpu:N` counts. A browser has one, or none.
pub async fn adapters_async() -> Vec<AdapterDescription> {
    describe_all(&adapters_of(&instance()).await).await
}

async fn describe_all(adapters: &[wgpu::Adapter]) -> Vec<AdapterDescription> {
    let all = adapters.iter().enumerate();
    let all = all.map(|(index, adapter)| describe(index, &adapter.get_info())).collect();
    #[cfg(target_family = "wasm")]
    let all = {
        let mut all: Vec<AdapterDescription> = all;
        if let (Some(adapter), Some(info)) = (all.first_mut(), super::browser::info().await) {
            info.complete(adapter);
        }
        all
    };
    all
}

/// Numbers of driver objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceCounts {
    /// Buffers, staging included.
    pub buffers: isize,
    /// Bind groups.
    pub bind_groups: isize,
    /// Compute pipelines.
    pub compute_pipelines: isize,
}

/// Submissions that a wait takes one by one.
const MAX_PENDING: usize = 64;

/// An open device and its queue.
pub struct Gpu {
    /// The adapter it was opened on.
    pub adapter: AdapterDescription,
    /// What it was asked for.
    pub capabilities: Capabilities,
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    max_binding: u64,
    cooperative: Option<Cooperative>,
    /// Whether every kernel is checked at run time, those of `shader::UNCHECKED` too.
    pub(super) checked: bool,
    /// On a dry device, the buffer that is bound in the place of all weights.
    pub(super) stand_in: Option<wgpu::Buffer>,
    pub(super) work: Work,
    /// Where kernels are timed one by one, while they are.
    profile: Mutex<Option<Profile>>,
    /// What was submitted and not waited for yet.
    pub(super) pending: Mutex<VecDeque<wgpu::SubmissionIndex>>,
    pub(super) pipelines: Pipelines,
    /// Kernels with their constants, one for each pipeline that was made.
    pub(super) compiled: Mutex<Vec<Specialised>>,
    /// The first error that no call returned: validation outside a scope, or a lost device.
    failure: Arc<Mutex<Option<String>>>,
    /// What the browser has not said yet of objects that were made.
    #[cfg(target_family = "wasm")]
    pub(super) verdicts: super::record::Verdicts,
}

impl Gpu {
    /// Opens adapter `index`, or the best one there is.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if it is not there, [`Error::Gpu`] if the driver refuses.
    pub fn open(index: Option<usize>, capabilities: Capabilities) -> Result<Self> {
        block_on(Self::open_async(index, capabilities))
    }

    /// [`Gpu::open`] where nothing may block.
    ///
    /// # Errors
    /// As for [`Gpu::open`].
    pub async fn open_async(index: Option<usize>, capabilities: Capabilities) -> Result<Self> {
        let instance = instance();
        let mut all = adapters_of(&instance).await;
        let descriptions = describe_all(&all).await;
        let best = || {
            let usable = |d: &&AdapterDescription| d.api != "gl";
            descriptions.iter().filter(usable).min_by_key(|d| (d.kind, d.index)).map(|d| d.index)
        };
        let chosen = index.or_else(best).filter(|&index| index < all.len());
        let Some(chosen) = chosen else {
            let wanted = index.map_or("gpu".to_owned(), |index| format!("gpu:{index}"));
            let found = match all.len() {
                0 => "no adapter found (is a Vulkan, Metal or DX12 driver installed?)".to_owned(),
                n => format!("the adapters are gpu:0 to gpu:{}", n - 1),
            };
            return Err(Error::NoAdapter { wanted, found });
        };
        let description = descriptions[chosen].clone();
        Self::from_adapter(&all.swap_remove(chosen), description, capabilities).await
    }

    /// Another device on the same adapter, asked for the same.
    ///
    /// # Errors
    /// As for [`Gpu::open`].
    pub(super) async fn open_again(&self) -> Result<Self> {
        let other = Self::open_async(Some(self.adapter.index), self.capabilities).await?;
        Ok(if self.checked { other.with_runtime_checks() } else { other })
    }

    /// A device that computes nothing and needs no adapter: it takes buffers, pipelines and
    /// commands, and counts them. Weights get no memory, so that a large model fits any machine.
    ///
    /// [`Capabilities::Adapter`] has buffers of up to 2 GiB, as hardware GPUs do.
    ///
    /// # Errors
    /// [`Error::Gpu`] if wgpu refuses.
    #[cfg(not(target_family = "wasm"))]
    pub fn dry(capabilities: Capabilities) -> Result<Self> {
        let largest = i32::MAX as u64 & !3;
        let limits = match capabilities {
            Capabilities::WebGpuDefault => wgpu::Limits::default(),
            Capabilities::Adapter => wgpu::Limits {
                max_buffer_size: largest,
                max_storage_buffer_binding_size: largest,
                ..wgpu::Limits::default()
            },
        };
        let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
        descriptor.backends = wgpu::Backends::NOOP;
        descriptor.backend_options.noop = wgpu::NoopBackendOptions {
            limits: Some(limits),
            ..wgpu::NoopBackendOptions::enabled()
        };
        let instance = wgpu::Instance::new(descriptor);
        let adapter = pollster::block_on(adapters_of(&instance)).pop();
        let adapter = adapter.expect("wgpu is built with its noop backend");
        let description = AdapterDescription {
            index: 0,
            name: "dry".to_owned(),
            vendor: 0,
            pci: String::new(),
            kind: AdapterKind::Other,
            api: "noop".to_owned(),
            driver: "computes nothing".to_owned(),
        };
        let mut gpu = block_on(Self::from_adapter(&adapter, description, capabilities))?;
        gpu.stand_in = Some(Self::make_stand_in(&gpu.device));
        Ok(gpu)
    }

    /// Whether it only counts what it is given to do.
    pub fn is_dry(&self) -> bool {
        self.stand_in.is_some()
    }

    async fn from_adapter(
        adapter: &wgpu::Adapter,
        description: AdapterDescription,
        capabilities: Capabilities,
    ) -> Result<Self> {
        let cooperative = match capabilities {
            Capabilities::WebGpuDefault => None,
            Capabilities::Adapter => Cooperative::of(adapter),
        };
        let (required_limits, mut required_features) = match capabilities {
            Capabilities::WebGpuDefault => (wgpu::Limits::default(), wgpu::Features::empty()),
            // Timestamps make measuring better; nothing needs them.
            Capabilities::Adapter => {
                (adapter.limits(), adapter.features() & wgpu::Features::TIMESTAMP_QUERY)
            }
        };
        if cooperative.is_some() {
            required_features |= Cooperative::FEATURES;
        }
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("sterna"),
            required_limits,
            required_features,
            experimental_features: Cooperative::experiments(cooperative),
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        };
        let (device, queue) =
            adapter.request_device(&descriptor).await.map_err(|source| Error::Gpu {
                adapter: description.name.clone(),
                operation: "open the device",
                problem: one_line(&source.to_string()),
            })?;
        let failure = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&failure);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            if let Ok(mut slot) = slot.lock() {
                slot.get_or_insert_with(|| one_line(&error.to_string()));
            }
        }));
        let slot = Arc::clone(&failure);
        device.set_device_lost_callback(move |_, message| {
            // Why the device is gone says more than what could not be done without it.
            if let Ok(mut slot) = slot.lock() {
                let message = one_line(&message);
                *slot = Some(format!("the device was lost: {}", message.trim_end_matches('.')));
            }
        });
        let limits = device.limits();
        let max_binding = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        Ok(Self {
            adapter: description,
            capabilities,
            device,
            queue,
            max_binding,
            cooperative,
            checked: false,
            stand_in: None,
            work: Work::default(),
            profile: Mutex::default(),
            pending: Mutex::default(),
            pipelines: Pipelines::default(),
            compiled: Mutex::default(),
            failure,
            #[cfg(target_family = "wasm")]
            verdicts: Default::default(),
        })
    }

    /// The same device for another model: kernels that both need are compiled once.
    pub fn share(&self) -> Self {
        Self {
            adapter: self.adapter.clone(),
            capabilities: self.capabilities,
            device: self.device.clone(),
            queue: self.queue.clone(),
            max_binding: self.max_binding,
            cooperative: self.cooperative,
            checked: self.checked,
            stand_in: self.stand_in.clone(),
            work: Work::default(),
            profile: Mutex::default(),
            pending: Mutex::default(),
            pipelines: self.pipelines.clone(),
            compiled: Mutex::default(),
            failure: Arc::clone(&self.failure),
            #[cfg(target_family = "wasm")]
            verdicts: Default::default(),
        }
    }

    /// The pipelines made so far.
    pub fn pipelines(&self) -> Pipelines {
        self.pipelines.clone()
    }

    /// The error of this device for a failed operation.
    pub(crate) fn error(&self, operation: &'static str, problem: impl Into<String>) -> Error {
        Error::Gpu { adapter: self.adapter.name.clone(), operation, problem: problem.into() }
    }

    /// Fails if the driver has reported an error since the device was opened.
    pub(crate) fn check(&self, operation: &'static str) -> Result<()> {
        // The loss of a device is reported when it is polled.
        let polled = self.device.poll(wgpu::PollType::Poll);
        self.check_reported(operation)?;
        polled.map(|_| ()).map_err(|source| self.error(operation, source.to_string()))
    }

    fn check_reported(&self, operation: &'static str) -> Result<()> {
        let failure = self.failure.lock().ok().and_then(|slot| slot.clone());
        failure.map_or(Ok(()), |problem| Err(self.error(operation, problem)))
    }

    /// Waits until everything submitted has run. In a browser it does not wait, and what runs next
    /// follows all the same.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver reports an error, or one submission takes longer than
    /// [`Self::patience`].
    pub(crate) fn wait(&self, operation: &'static str) -> Result<()> {
        let next = || {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            pending.pop_front()
        };
        while let Some(index) = next() {
            self.wait_for(Some(index), operation)?;
        }
        self.wait_for(None, operation)
    }

    /// [`Gpu::wait`] where nothing may block.
    ///
    /// # Errors
    /// As for [`Gpu::wait`].
    #[cfg(not(target_family = "wasm"))]
    pub(crate) async fn done(&self, operation: &'static str) -> Result<()> {
        self.wait(operation)
    }

    /// Waits until everything submitted has run, and what was made is known to be sound. A browser loses
    /// a device that does not answer.
    ///
    /// # Errors
    /// [`Error::Gpu`] if the driver reports an error.
    #[cfg(target_family = "wasm")]
    pub(crate) async fn done(&self, operation: &'static str) -> Result<()> {
        self.settle().await?;
        self.submitted_work().arrived().await;
        self.check_reported(operation)
    }

    /// Arrives when everything submitted so far has run.
    #[cfg(target_family = "wasm")]
    pub(super) fn submitted_work(&self) -> super::readback::Arrival<()> {
        let (sender, arrival) = super::readback::arrival();
        self.queue.on_submitted_work_done(move || sender.send(()));
        arrival
    }

    /// Notes what [`Gpu::wait`] waits for, piece by piece.
    pub(super) fn submitted(&self, index: wgpu::SubmissionIndex) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        // The oldest have been waited for by themselves, or are waited for with the next.
        if pending.len() == MAX_PENDING {
            pending.pop_front();
        }
        pending.push_back(index);
    }

    /// Waits for a submission, or for the last.
    ///
    /// # Errors
    /// As for [`Gpu::wait`].
    pub(super) fn wait_for(
        &self,
        submission_index: Option<wgpu::SubmissionIndex>,
        operation: &'static str,
    ) -> Result<()> {
        let timeout = Some(self.patience());
        match self.device.poll(wgpu::PollType::Wait { submission_index, timeout }) {
            Ok(_) => self.check_reported(operation),
            Err(source) => {
                // Why the device is gone says more than that there was nothing to wait for.
                self.check(operation)?;
                match source {
                    wgpu::PollError::Timeout => Err(self.silent(operation)),
                    source => Err(self.error(operation, source.to_string())),
                }
            }
        }
    }

    /// The error of a device that has not answered for as long as it may take.
    pub(super) fn silent(&self, operation: &'static str) -> Error {
        let seconds = self.patience().as_secs();
        self.error(operation, format!("the GPU has not answered for {seconds} s"))
    }

    /// How long one submission may take: far longer than the watchdogs of hardware drivers allow. A
    /// software rasteriser has no watchdog and may need minutes for a chunk of a prompt.
    pub(super) fn patience(&self) -> Duration {
        match self.adapter.kind {
            AdapterKind::Software => Duration::from_secs(600),
            _ => Duration::from_secs(60),
        }
    }

    /// Something that destroys the device when it is called, wherever the device is then: what a
    /// lost adapter looks like to a program.
    pub fn kill_switch(&self) -> impl Fn() + wgpu::WasmNotSend + 'static {
        let device = self.device.clone();
        move || device.destroy()
    }

    /// Whether passes can be timed on the device itself.
    pub(crate) fn has_timestamps(&self) -> bool {
        self.device.features().contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    /// Where kernels are timed one by one, while they are.
    pub(super) fn profile(&self) -> MutexGuard<'_, Option<Profile>> {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of all buffers; `None` where wgpu does not count them.
    pub(super) fn buffer_bytes(&self) -> Option<u64> {
        let bytes = self.device.get_internal_counters().hal.buffer_memory.read();
        u64::try_from(bytes).ok().filter(|&bytes| bytes > 0)
    }

    /// Most lanes of a workgroup.
    pub(crate) fn lanes(&self) -> u32 {
        let limits = self.device.limits();
        limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x)
    }

    /// The cooperative matrices that kernels may use.
    pub fn cooperative(&self) -> Option<Cooperative> {
        self.cooperative
    }

    /// Fails if a workgroup of so many lanes is too large.
    pub(super) fn check_lanes(&self, kernel: &str, lanes: usize) -> Result<()> {
        let limit = self.lanes();
        if lanes > limit as usize {
            let (adapter, what) = (self.adapter.name.clone(), format!("kernel {kernel} (lanes)"));
            let (needed, limit) = (lanes as u64, u64::from(limit));
            return Err(Error::GpuLimit { adapter, what, needed, limit });
        }
        Ok(())
    }

    /// Frees everything on the device, which a browser would do at some time after it was dropped. It can
    /// be used no more.
    pub(super) fn destroy(&self) {
        self.device.destroy();
    }

    /// Bytes of the largest storage binding; larger matrices are sharded by rows.
    pub fn max_binding(&self) -> u64 {
        self.max_binding
    }

    /// How many objects of the driver exist: a decode step must not make any.
    pub fn resource_counts(&self) -> ResourceCounts {
        let hal = self.device.get_internal_counters().hal;
        ResourceCounts {
            buffers: hal.buffers.read(),
            bind_groups: hal.bind_groups.read(),
            compute_pipelines: hal.compute_pipelines.read(),
        }
    }

    /// Shards matrices as if the adapter's bindings were no larger than this.
    #[must_use]
    pub fn with_max_binding(mut self, len_bytes: u64) -> Self {
        self.max_binding = self.max_binding.min(len_bytes);
        self
    }

    /// Leaves bounds checks, bounds on loops and zeroed workgroup memory in every kernel, those of
    /// [`UNCHECKED`](super::shader::UNCHECKED) too: to find a driver or a kernel that needs them.
    #[must_use]
    pub fn with_runtime_checks(mut self) -> Self {
        self.checked = true;
        self
    }
}

/// Drivers report over several lines; an error is one.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
