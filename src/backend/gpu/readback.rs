//! Reading results back.

use std::collections::VecDeque;

use web_time::{Duration, Instant};

use super::buffer::Slice;
use super::device::Gpu;
use super::record::WorkDone;
use crate::error::{Error, Result};
use crate::wait::block_on;

mod arrival;

pub(super) use arrival::{Arrival, arrival};

/// A buffer that the host can map, made at load for what every step reads back.
pub struct Staging {
    buffer: wgpu::Buffer,
}

const READ_BACK: &str = "read a result back";

/// Whether a buffer has been mapped.
type Mapped = Arrival<MapResult>;
type MapResult = std::result::Result<(), wgpu::BufferAsyncError>;

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
        block_on(self.read_staging_async(staging, len_words, use_words))
    }

    /// [`Gpu::read_staging`] where nothing may block.
    ///
    /// # Errors
    /// As for [`Gpu::read_staging`].
    pub async fn read_staging_async<T>(
        &self,
        staging: &Staging,
        len_words: usize,
        use_words: impl FnOnce(&[u32]) -> T,
    ) -> Result<T> {
        let mapped = self.map(staging, len_words);
        self.done(READ_BACK).await?;
        let mapped = self.arrived(mapped).await?;
        self.use_mapped(staging, mapped, len_words, use_words)
    }

    #[cfg(target_family = "wasm")]
    async fn arrived(&self, mapped: Mapped) -> Result<MapResult> {
        Ok(mapped.arrived().await)
    }

    #[cfg(not(target_family = "wasm"))]
    async fn arrived(&self, mapped: Mapped) -> Result<MapResult> {
        self.wait_mapped(&mapped)
    }

    /// What came of a mapping, after a wait for everything submitted.
    fn wait_mapped(&self, mapped: &Mapped) -> Result<MapResult> {
        // Another thread's poll may still be on its way to the callback.
        mapped.wait(self.patience()).ok_or_else(|| match cfg!(target_family = "wasm") {
            true => Error::WouldBlock,
            false => self.silent(READ_BACK),
        })
    }

    /// Asks for the first `len_words` of `staging` once everything submitted has run.
    fn map(&self, staging: &Staging, len_words: usize) -> Mapped {
        let (sender, mapped) = arrival();
        let range = 0..len_words as u64 * 4;
        self.work.add(WorkDone { readback_bytes: range.end, ..WorkDone::default() });
        staging.buffer.map_async(wgpu::MapMode::Read, range, move |result| {
            sender.send(result);
        });
        mapped
    }

    /// Hands the words to `use_words` after a wait for them.
    fn use_mapped<T>(
        &self,
        staging: &Staging,
        mapped: MapResult,
        len_words: usize,
        use_words: impl FnOnce(&[u32]) -> T,
    ) -> Result<T> {
        if let Err(source) = mapped {
            // Why the device is gone says more than that there was nothing to read.
            self.check(READ_BACK)?;
            return Err(self.error(READ_BACK, source.to_string()));
        }
        let result = {
            let bytes = staging
                .buffer
                .get_mapped_range(0..len_words as u64 * 4)
                .map_err(|source| self.error(READ_BACK, source.to_string()))?;
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
        block_on(self.read_async(slice, len_words))
    }

    /// [`Gpu::read`] where nothing may block.
    ///
    /// # Errors
    /// As for [`Gpu::read`].
    pub async fn read_async(&self, slice: &Slice, len_words: usize) -> Result<Vec<u32>> {
        let staging = self.staging(len_words);
        let copy = self.begin_recording();
        copy.submit(self, |encoder| staging.copy_from(encoder, slice, 0, len_words));
        self.read_staging_async(&staging, len_words, <[u32]>::to_vec).await
    }
}

impl Staging {
    /// Records a copy of `len_words` from the start of `slice` to word `to` of the staging buffer.
    pub fn copy_from(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        slice: &Slice,
        to: usize,
        len_words: usize,
    ) {
        let (to, len) = (to as u64 * 4, len_words as u64 * 4);
        self.copy_bytes_from(encoder, (&slice.buffer, slice.offset), to, len);
    }

    /// Records a copy of bytes of a buffer, from an offset on, to byte `to` of the staging buffer.
    pub(super) fn copy_bytes_from(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        (buffer, offset): (&wgpu::Buffer, u64),
        to: u64,
        len: u64,
    ) {
        encoder.copy_buffer_to_buffer(buffer, offset, &self.buffer, to, len);
    }
}

/// Token ids on their way to the host, one staging buffer a submit.
pub(super) struct TokenRing {
    free: Vec<Staging>,
    flights: VecDeque<Flight>,
    ready: VecDeque<ChosenToken>,
}

/// A token as the device chose it.
pub(super) struct ChosenToken {
    pub(super) token: u32,
    /// Exact logits that it took the int8 head.
    pub(super) candidates: u32,
    /// Position of the logits.
    pub(super) position: usize,
}

/// The tokens of one submit.
struct Flight {
    staging: Staging,
    mapped: Mapped,
    submission: wgpu::SubmissionIndex,
    submitted: Instant,
    first_position: usize,
    count: usize,
}

/// A submit whose tokens have arrived.
pub(super) struct Landing {
    /// How many.
    pub(super) count: usize,
    /// When it was submitted.
    pub(super) submitted: Instant,
}

impl TokenRing {
    /// Staging buffers, made at load, for up to `tokens` a submit: a word each, followed by the number
    /// of its candidates. Where more submits are on their way, the oldest is waited for.
    pub(super) fn new(gpu: &Gpu, submits: usize, tokens: usize) -> Self {
        let free = (0..submits).map(|_| gpu.staging(2 * tokens)).collect();
        Self { free, flights: VecDeque::new(), ready: VecDeque::new() }
    }

    /// A staging buffer to copy tokens to.
    pub(super) fn staging(&mut self, gpu: &Gpu) -> Result<Staging> {
        while self.free.is_empty() {
            self.land(gpu)?;
        }
        Ok(self.free.pop().expect("one was free"))
    }

    /// Tokens were copied to `staging` in a submission.
    pub(super) fn launch(
        &mut self,
        gpu: &Gpu,
        staging: Staging,
        submission: wgpu::SubmissionIndex,
        (first_position, count): (usize, usize),
    ) {
        let mapped = gpu.map(&staging, 2 * count);
        let submitted = Instant::now();
        let flight = Flight { staging, mapped, submission, submitted, first_position, count };
        self.flights.push_back(flight);
    }

    /// Waits for the oldest submit; `None` if there is none.
    pub(super) fn land(&mut self, gpu: &Gpu) -> Result<Option<Landing>> {
        let Some(flight) = self.flights.pop_front() else { return Ok(None) };
        let submission = flight.submission.clone();
        let mapped = gpu.wait_for(Some(submission), READ_BACK);
        let mapped = mapped.and_then(|()| gpu.wait_mapped(&flight.mapped));
        self.touch_down(gpu, flight, mapped).map(Some)
    }

    /// Whether there is a token to take; else takes in the oldest submit that has run, or has `context`
    /// woken when it has.
    #[cfg(target_family = "wasm")]
    pub(super) fn poll_land(
        &mut self,
        gpu: &Gpu,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<Option<Landing>>> {
        use std::task::{Poll, ready};

        let Some(flight) = self.flights.front().filter(|_| self.ready.is_empty()) else {
            return Poll::Ready(Ok(None));
        };
        let mapped = ready!(flight.mapped.poll(context));
        let flight = self.flights.pop_front().expect("it is the front one");
        Poll::Ready(self.touch_down(gpu, flight, Ok(mapped)).map(Some))
    }

    /// Whether no token is here or on its way.
    #[cfg(target_family = "wasm")]
    pub(super) fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.flights.is_empty()
    }

    /// Takes the tokens of a submit that has run out of its staging buffer.
    fn touch_down(
        &mut self,
        gpu: &Gpu,
        flight: Flight,
        mapped: Result<MapResult>,
    ) -> Result<Landing> {
        let Flight { staging, submitted, first_position, count, .. } = flight;
        let ready = &mut self.ready;
        let landed = mapped.and_then(|mapped| {
            gpu.use_mapped(&staging, mapped, 2 * count, |words| {
                let tokens = words.chunks_exact(2).zip(first_position..);
                ready.extend(tokens.map(|(words, position)| ChosenToken {
                    token: words[0],
                    candidates: words[1],
                    position,
                }));
            })
        });
        if landed.is_err() {
            staging.buffer.unmap();
        }
        // Also after an error: without buffers, the next caller would wait for nothing.
        self.free.push(staging);
        landed?;
        Ok(Landing { count, submitted })
    }

    /// The oldest token that has arrived.
    pub(super) fn next(&mut self) -> Option<ChosenToken> {
        self.ready.pop_front()
    }

    /// Drops every token.
    pub(super) fn forget(&mut self) {
        self.ready.clear();
        for flight in self.flights.drain(..) {
            flight.staging.buffer.unmap();
            self.free.push(flight.staging);
        }
    }
}

/// How long a submit ran: since it was handed over, or since the one before it was complete.
pub(super) fn run_time(submitted: Instant, previous_done: &mut Instant) -> Duration {
    let now = Instant::now();
    let time = now - submitted.max(*previous_done);
    *previous_done = now;
    time
}
