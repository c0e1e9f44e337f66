//! Times of kernels by the device's own clock, each in a compute pass of its own.
//!
//! WebGPU has timestamps at the ends of passes only. Passes cost time themselves, so what is timed
//! like this is slower in all than what is not; the shares are what it is for.

use std::time::Duration;

use super::buffer::Slice;
use super::device::Gpu;
use super::readback::Staging;
use crate::backend::PartTime;
use crate::error::Result;

/// Most timestamps of a set.
const MAX_QUERIES: usize = wgpu::QUERY_SET_MAX_QUERIES as usize;
/// Bytes of a timestamp.
const TICK_BYTES: u64 = wgpu::QUERY_SIZE as u64;

/// Kernels that are being timed.
pub(super) struct Profile {
    /// Sets of what is recorded, with the kernels that have two places each.
    open: Vec<(wgpu::QuerySet, Vec<&'static str>)>,
    /// Of what was submitted.
    submitted: Vec<(Staging, Vec<&'static str>)>,
}

impl Profile {
    /// Two places for the next kernel.
    pub(super) fn next(
        &mut self,
        gpu: &Gpu,
        kernel: &'static str,
    ) -> wgpu::ComputePassTimestampWrites<'_> {
        let is_full = |kernels: &Vec<_>| 2 * kernels.len() + 2 > MAX_QUERIES;
        if self.open.last().is_none_or(|(_, kernels)| is_full(kernels)) {
            let set = gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("kernels"),
                ty: wgpu::QueryType::Timestamp,
                count: MAX_QUERIES as u32,
            });
            self.open.push((set, Vec::new()));
        }
        let (query_set, kernels) = self.open.last_mut().expect("there is one now");
        let first = 2 * kernels.len() as u32;
        kernels.push(kernel);
        wgpu::ComputePassTimestampWrites {
            query_set,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        }
    }

    /// Copies the times of what is recorded to where the host can read them.
    pub(super) fn resolve(&mut self, gpu: &Gpu, encoder: &mut wgpu::CommandEncoder) {
        for (set, kernels) in self.open.drain(..) {
            let count = 2 * kernels.len();
            let size = count as u64 * TICK_BYTES;
            let buffer = gpu.device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("times of kernels"),
                size,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            encoder.resolve_query_set(&set, 0..count as u32, &buffer, 0);
            let staging = gpu.staging(2 * count);
            let ticks = Slice { buffer, offset: 0, size, is_weights: false };
            staging.copy_from(encoder, &ticks, 0, 2 * count);
            self.submitted.push((staging, kernels));
        }
    }
}

impl Gpu {
    /// Times every kernel from now on; false if the device has no timestamps.
    pub(super) fn start_profile(&self) -> bool {
        if self.has_timestamps() {
            *self.profile() = Some(Profile { open: Vec::new(), submitted: Vec::new() });
        }
        self.has_timestamps()
    }

    /// The times since [`Gpu::start_profile`], by kernel. What was recorded and not submitted is not
    /// among them, nor are kernels whose clock ran backwards.
    pub(super) fn end_profile(&self) -> Result<Vec<PartTime>> {
        let Some(Profile { submitted, .. }) = self.profile().take() else { return Ok(Vec::new()) };
        let period = f64::from(self.queue.get_timestamp_period());
        let mut times: Vec<PartTime> = Vec::new();
        for (staging, kernels) in submitted {
            let ticks = self.read_staging(&staging, 4 * kernels.len(), |words| {
                let pairs = words.chunks_exact(4);
                let tick = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
                pairs.map(|w| tick(w[2], w[3]).checked_sub(tick(w[0], w[1]))).collect::<Vec<_>>()
            })?;
            for (name, ticks) in kernels.into_iter().zip(ticks) {
                let Some(ticks) = ticks else { continue };
                let time = Duration::from_nanos((ticks as f64 * period) as u64);
                match times.iter_mut().find(|part| part.name == name) {
                    Some(part) => {
                        (part.calls, part.time) = (part.calls + 1, part.time + time);
                    }
                    None => times.push(PartTime { name, calls: 1, time }),
                }
            }
        }
        Ok(times)
    }
}
