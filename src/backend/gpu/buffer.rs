//! Buffers: made at load, and never after.

use super::device::Gpu;
use crate::error::{Error, Result};

/// A range of a buffer, as a kernel binds it.
#[derive(Debug, Clone)]
pub struct Slice {
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    /// Whether it holds weights, which a dispatch that binds it is counted to read.
    pub(super) is_weights: bool,
}

impl Slice {
    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.size
    }

    /// Words `first..first + len_words` of this slice.
    ///
    /// # Panics
    /// If they are not inside it.
    pub fn words(&self, first: usize, len_words: usize) -> Self {
        let (offset, size) = (first as u64 * 4, len_words as u64 * 4);
        assert!(offset + size <= self.size, "{first} + {len_words} words of {}", self.size / 4);
        Self { offset: self.offset + offset, size, ..self.clone() }
    }

    pub(crate) fn binding(&self) -> wgpu::BindingResource<'_> {
        if self.offset + self.size > self.buffer.size() {
            // Weights of a dry device: what stands in for them is shorter.
            return self.buffer.as_entire_binding();
        }
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &self.buffer,
            offset: self.offset,
            size: wgpu::BufferSize::new(self.size),
        })
    }
}

/// Bytes of the buffer that stands in for weights on a dry device.
#[cfg(not(target_family = "wasm"))]
const STAND_IN_BYTES: u64 = 256;

const STORAGE: wgpu::BufferUsages = wgpu::BufferUsages::STORAGE
    .union(wgpu::BufferUsages::COPY_SRC)
    .union(wgpu::BufferUsages::COPY_DST);

impl Gpu {
    /// A storage buffer of `len_words` zeroed u32 (or f32, i32).
    ///
    /// # Errors
    /// [`Error::GpuLimit`] if it is larger than a binding may be.
    pub fn storage(&self, what: &str, len_words: usize) -> Result<Slice> {
        let size = self.checked_size(what, len_words)?;
        Ok(Slice { buffer: self.buffer(what, size), offset: 0, size, is_weights: false })
    }

    /// A storage buffer for `len_words` u32 of weights.
    ///
    /// # Errors
    /// [`Error::GpuLimit`] if it is larger than a binding may be.
    pub(super) fn weights(&self, what: &str, len_words: usize) -> Result<Slice> {
        let size = self.checked_size(what, len_words)?;
        Ok(Slice { buffer: self.weights_buffer(what, size), offset: 0, size, is_weights: true })
    }

    /// Copies bytes into weights, from byte `offset` on.
    pub(super) fn write_weights(&self, weights: &Slice, offset: u64, bytes: &[u8]) {
        if self.stand_in.is_none() {
            self.queue.write_buffer(&weights.buffer, weights.offset + offset, bytes);
        }
    }

    /// Weights that are known at once.
    ///
    /// # Errors
    /// [`Error::GpuLimit`] if they are larger than a binding may be.
    pub(super) fn upload_weights<T: bytemuck::NoUninit>(
        &self,
        what: &str,
        words: &[T],
    ) -> Result<Slice> {
        const { assert!(size_of::<T>().is_multiple_of(4)) };
        let slice = self.weights(what, size_of_val(words) / 4)?;
        self.write_weights(&slice, 0, bytemuck::cast_slice(words));
        Ok(slice)
    }

    fn buffer(&self, what: &str, size: u64) -> wgpu::Buffer {
        self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size,
            usage: STORAGE,
            mapped_at_creation: false,
        })
    }

    /// A buffer for weights; on a dry device, the one that stands in for all of them.
    fn weights_buffer(&self, what: &str, size: u64) -> wgpu::Buffer {
        self.stand_in.clone().unwrap_or_else(|| self.buffer(what, size))
    }

    /// A storage buffer that holds `words`.
    ///
    /// # Errors
    /// [`Error::GpuLimit`] if it is larger than a binding may be.
    pub fn upload<T: bytemuck::NoUninit>(&self, what: &str, words: &[T]) -> Result<Slice> {
        const { assert!(size_of::<T>().is_multiple_of(4)) };
        let slice = self.storage(what, size_of_val(words) / 4)?;
        self.queue.write_buffer(&slice.buffer, 0, bytemuck::cast_slice(words));
        Ok(slice)
    }

    /// Several arrays of weights in one buffer, each at an offset that may be bound.
    ///
    /// # Errors
    /// [`Error::GpuLimit`] if an array is larger than a binding may be, or all of them together
    /// than a buffer.
    pub fn upload_together(&self, what: &str, parts: &[&[u32]]) -> Result<Vec<Slice>> {
        let limits = self.device.limits();
        let align = u64::from(limits.min_storage_buffer_offset_alignment);
        let mut ranges = Vec::with_capacity(parts.len());
        let mut end = 0u64;
        for part in parts {
            let size = self.checked_size(what, part.len())?;
            let offset = end.next_multiple_of(align);
            ranges.push((offset, size));
            end = offset + size;
        }
        if end > limits.max_buffer_size {
            return Err(self.limit(what, end, limits.max_buffer_size));
        }
        let buffer = self.weights_buffer(what, end);
        let slice =
            |(offset, size)| Slice { buffer: buffer.clone(), offset, size, is_weights: true };
        let slices: Vec<_> = ranges.into_iter().map(slice).collect();
        for (part, slice) in parts.iter().zip(&slices) {
            self.write_weights(slice, 0, bytemuck::cast_slice(part));
        }
        // Staging memory is freed when a submission has run: one a layer keeps the peak low.
        self.queue.submit([]);
        Ok(slices)
    }

    /// What stands in for weights on a dry device.
    #[cfg(not(target_family = "wasm"))]
    pub(super) fn make_stand_in(device: &wgpu::Device) -> wgpu::Buffer {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("stand-in"),
            size: STAND_IN_BYTES,
            usage: STORAGE,
            mapped_at_creation: false,
        })
    }

    fn checked_size(&self, what: &str, len_words: usize) -> Result<u64> {
        // An empty binding is invalid: one word stands for nothing.
        let size = len_words.max(1) as u64 * 4;
        if size > self.max_binding() {
            return Err(self.limit(what, size, self.max_binding()));
        }
        Ok(size)
    }

    fn limit(&self, what: &str, needed: u64, limit: u64) -> Error {
        let what = format!("{what} (bytes)");
        Error::GpuLimit { adapter: self.adapter.name.clone(), what, needed, limit }
    }
}
