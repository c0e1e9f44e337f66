//! Adapters: listing them, choosing one, opening a device.

use std::sync::{Arc, Mutex};

use super::record::Work;
use crate::error::{Error, Result};

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
        write!(f, "{} ({}, {}, {})", self.name, self.kind, self.api, self.driver)
    }
}

/// What a device is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Capabilities {
    /// WebGPU's default limits and no optional feature: the baseline that runs everywhere.
    WebGpuDefault,
    /// What the adapter offers.
    #[default]
    Adapter,
}

fn instance() -> wgpu::Instance {
    wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle_from_env())
}

fn adapters_of(instance: &wgpu::Instance) -> Vec<wgpu::Adapter> {
    pollster::block_on(instance.enumerate_adapters(wgpu::Backends::all()))
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
    AdapterDescription {
        index,
        name: info.name.clone(),
        kind,
        api: info.backend.to_string(),
        driver,
        vendor: info.vendor,
    }
}

/// Every adapter, in the order that `gpu:N` counts.
pub fn adapters() -> Vec<AdapterDescription> {
    let instance = instance();
    let adapters = adapters_of(&instance);
    adapters.iter().enumerate().map(|(i, adapter)| describe(i, &adapter.get_info())).collect()
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

/// An open device and its queue.
pub struct Gpu {
    /// The adapter it was opened on.
    pub adapter: AdapterDescription,
    /// What it was asked for.
    pub capabilities: Capabilities,
    pub(crate) device: wgpu::Device,
    pub(crate) queue: wgpu::Queue,
    max_binding: u64,
    /// Whether every kernel is checked at run time, those of `shader::UNCHECKED` too.
    pub(super) checked: bool,
    pub(super) work: Work,
    /// The first error that no call returned: validation outside a scope, or a lost device.
    failure: Arc<Mutex<Option<String>>>,
}

impl Gpu {
    /// Opens adapter `index`, or the best one there is.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] if it is not there, [`Error::Gpu`] if the driver refuses.
    pub fn open(index: Option<usize>, capabilities: Capabilities) -> Result<Self> {
        let instance = instance();
        let mut all = adapters_of(&instance);
        let descriptions: Vec<_> =
            all.iter().enumerate().map(|(i, adapter)| describe(i, &adapter.get_info())).collect();
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
        Self::from_adapter(&all.swap_remove(chosen), descriptions[chosen].clone(), capabilities)
    }

    /// Another device on the same adapter, asked for the same.
    ///
    /// # Errors
    /// As for [`Gpu::open`].
    pub(super) fn open_again(&self) -> Result<Self> {
        let other = Self::open(Some(self.adapter.index), self.capabilities)?;
        Ok(if self.checked { other.with_runtime_checks() } else { other })
    }

    fn from_adapter(
        adapter: &wgpu::Adapter,
        description: AdapterDescription,
        capabilities: Capabilities,
    ) -> Result<Self> {
        let (required_limits, required_features) = match capabilities {
            Capabilities::WebGpuDefault => (wgpu::Limits::default(), wgpu::Features::empty()),
            // Timestamps make measuring better; nothing needs them.
            Capabilities::Adapter => {
                (adapter.limits(), adapter.features() & wgpu::Features::TIMESTAMP_QUERY)
            }
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("sterna"),
            required_limits,
            required_features,
            memory_hints: wgpu::MemoryHints::Performance,
            ..Default::default()
        };
        let (device, queue) =
            pollster::block_on(adapter.request_device(&descriptor)).map_err(|source| {
                Error::Gpu {
                    adapter: description.name.clone(),
                    operation: "open the device",
                    problem: one_line(&source.to_string()),
                }
            })?;
        let failure = Arc::new(Mutex::new(None));
        let note = |failure: &Arc<Mutex<Option<String>>>, problem: String| {
            if let Ok(mut slot) = failure.lock() {
                slot.get_or_insert(problem);
            }
        };
        let slot = Arc::clone(&failure);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
            note(&slot, one_line(&error.to_string()));
        }));
        let slot = Arc::clone(&failure);
        device.set_device_lost_callback(move |reason, message| {
            if reason != wgpu::DeviceLostReason::Destroyed {
                note(&slot, format!("device lost: {}", one_line(&message)));
            }
        });
        let limits = device.limits();
        let max_binding = limits.max_storage_buffer_binding_size.min(limits.max_buffer_size);
        let work = Work::default();
        let checked = false;
        Ok(Self {
            adapter: description,
            capabilities,
            device,
            queue,
            max_binding,
            checked,
            work,
            failure,
        })
    }

    /// The error of this device for a failed operation.
    pub(crate) fn error(&self, operation: &'static str, problem: impl Into<String>) -> Error {
        Error::Gpu { adapter: self.adapter.name.clone(), operation, problem: problem.into() }
    }

    /// Fails if the driver has reported an error since the device was opened.
    pub(crate) fn check(&self, operation: &'static str) -> Result<()> {
        let failure = self.failure.lock().ok().and_then(|slot| slot.clone());
        failure.map_or(Ok(()), |problem| Err(self.error(operation, problem)))
    }

    /// Waits until everything submitted has run.
    pub(crate) fn wait(&self, operation: &'static str) -> Result<()> {
        self.device
            .poll(wgpu::PollType::wait_indefinitely())
            .map_err(|source| self.error(operation, source.to_string()))?;
        self.check(operation)
    }

    /// Waits until a submission has run.
    pub(crate) fn wait_for(
        &self,
        operation: &'static str,
        submission: wgpu::SubmissionIndex,
    ) -> Result<()> {
        self.device
            .poll(wgpu::PollType::Wait { submission_index: Some(submission), timeout: None })
            .map_err(|source| self.error(operation, source.to_string()))?;
        self.check(operation)
    }

    /// Whether passes can be timed on the device itself.
    pub(crate) fn has_timestamps(&self) -> bool {
        self.device.features().contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    /// Most lanes of a workgroup.
    pub(crate) fn lanes(&self) -> u32 {
        let limits = self.device.limits();
        limits.max_compute_invocations_per_workgroup.min(limits.max_compute_workgroup_size_x)
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
