//! Buffers: made at load, and never after.

use super::device::Gpu;
use crate::error::{Error, Result};

/// A range of a buffer, as a kernel binds it.
#[derive(Debug, Clone)]
pub struct Slice {
    pub(crate) buffer: wgpu::Buffer,
    pub(crate) offset: u64,
    pub(crate) size: u64,
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
        Self { buffer: self.buffer.clone(), offset: self.offset + offset, size }
    }

    pub(crate) fn binding(&self) -> wgpu::BindingResource<'_> {
        wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer: &self.buffer,
            offset: self.offset,
            size: wgpu::BufferSize::new(self.size),
        })
    }
}

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
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size,
            usage: STORAGE,
            mapped_at_creation: false,
        });
        Ok(Slice { buffer, offset: 0, size })
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

    /// Several arrays in one buffer, each at an offset that may be bound.
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
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size: end,
            usage: STORAGE,
            mapped_at_creation: false,
        });
        for (part, (offset, _)) in parts.iter().zip(&ranges) {
            self.queue.write_buffer(&buffer, *offset, bytemuck::cast_slice(part));
        }
        // Staging memory is freed when a submission has run: one a layer keeps the peak low.
        self.queue.submit([]);
        let slice = |(offset, size)| Slice { buffer: buffer.clone(), offset, size };
        Ok(ranges.into_iter().map(slice).collect())
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
