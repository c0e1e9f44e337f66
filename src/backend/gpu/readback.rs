//! Reading results back.

use super::buffer::Slice;
use super::device::Gpu;
use super::record::WorkDone;
use crate::error::Result;

/// A buffer that the host can map, made at load for what every step reads back.
pub struct Staging {
    buffer: wgpu::Buffer,
}

impl Gpu {
    /// A staging buffer of `len_words` u32.
    pub fn staging(&self, len_words: usize) -> Staging {
        let buffer = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("staging"),
            size: len_words as u64 * 4,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        Staging { buffer }
    }

    /// Waits for everything submitted and hands the first `len_words` of `staging` to `use_words`.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`] if the device was lost or reported an error.
    pub fn read_staging<T>(
        &self,
        staging: &Staging,
        len_words: usize,
        use_words: impl FnOnce(&[u32]) -> T,
    ) -> Result<T> {
        const OPERATION: &str = "read a result back";
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let range = 0..len_words as u64 * 4;
        self.work.add(WorkDone { readback_bytes: range.end, ..WorkDone::default() });
        staging.buffer.map_async(wgpu::MapMode::Read, range.clone(), move |result| {
            // The receiver waits below; it is gone only if waiting failed.
            let _ = sender.send(result);
        });
        self.wait(OPERATION)?;
        // Another thread's poll may still be on its way to the callback.
        receiver
            .recv_timeout(self.patience())
            .map_err(|_| self.silent(OPERATION))?
            .map_err(|source| self.error(OPERATION, source.to_string()))?;
        let result = {
            let bytes = staging
                .buffer
                .get_mapped_range(range)
                .map_err(|source| self.error(OPERATION, source.to_string()))?;
            // Mapped memory is aligned to 8 bytes at least.
            use_words(bytemuck::cast_slice(&bytes))
        };
        staging.buffer.unmap();
        Ok(result)
    }

    /// Copies the first `len_words` of a storage buffer to the host: for taps and tests.
    ///
    /// # Errors
    /// [`crate::Error::Gpu`] if the device was lost or reported an error.
    pub fn read(&self, slice: &Slice, len_words: usize) -> Result<Vec<u32>> {
        let staging = self.staging(len_words);
        let copy = self.begin_recording();
        copy.submit(self, |encoder| staging.copy_from(encoder, slice, 0, len_words));
        self.read_staging(&staging, len_words, <[u32]>::to_vec)
    }
}

impl Staging {
    /// Records a copy of `len_words` from word `first` of `slice` to the start of the staging
    /// buffer.
    pub fn copy_from(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        slice: &Slice,
        first: usize,
        len_words: usize,
    ) {
        let offset = slice.offset + first as u64 * 4;
        encoder.copy_buffer_to_buffer(&slice.buffer, offset, &self.buffer, 0, len_words as u64 * 4);
    }
}
