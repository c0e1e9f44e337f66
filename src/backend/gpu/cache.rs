//! The KV cache on the device: blocks of 64 positions in a few buffers a layer, which grow.
//!
//! A layer has a buffer of keys and one of values, and one of scales if they are int8; where a binding
//! cannot hold all blocks there are several of each, shards of equally many blocks. Room is made for
//! half as many blocks again as there are, layer by layer. What a position costs beside its block grows
//! with it: its rotary angles, and room for what its block gives to attention.

use cpu_ref::kv::f16_bits;
use cpu_ref::quantize_absmax::{Quantized, quantize_absmax};
use cpu_ref::rope::{Frequencies, angles};

use super::buffer::Slice;
use super::device::Gpu;
use super::kernels::{KvLayout, KvShard, partial_words};
use super::record::WorkDone;
use crate::error::{Error, Result};
use crate::kv_cache::{BLOCK, KvFormat};

/// Blocks there is room for at first.
const FIRST_BLOCKS: usize = 4;

/// One layer's keys, values and scales of a shard.
#[derive(Clone)]
pub(super) struct ShardBuffers {
    pub(super) keys: Slice,
    pub(super) values: Slice,
    /// One word where the format has none.
    pub(super) scales: Slice,
}

impl ShardBuffers {
    fn new(gpu: &Gpu, layout: KvLayout, blocks: usize) -> Result<Self> {
        let [keys, values, scales] = layout.block_words().map(|words| words * blocks);
        Ok(Self {
            keys: gpu.storage("keys", keys)?,
            values: gpu.storage("values", values)?,
            scales: gpu.storage("scales of keys and values", scales)?,
        })
    }

    fn parts(&self) -> [&Slice; 3] {
        [&self.keys, &self.values, &self.scales]
    }
}

/// The cache of all layers, and what else follows positions.
pub(super) struct Cache {
    pub(super) layout: KvLayout,
    n_layers: usize,
    /// Most positions of a sequence, in blocks.
    capacity_blocks: usize,
    /// Most tokens of a pass.
    max_batch: usize,
    /// Most blocks of a shard.
    shard_blocks: usize,
    /// Blocks there is room for.
    blocks: usize,
    /// By layer and shard.
    layers: Vec<Vec<ShardBuffers>>,
    /// Blocks of a sequence for which there are angles and room in `partials`.
    depth: usize,
    frequencies: Frequencies,
    /// `[64·depth, D/2]` (cos, sin).
    pub(super) angles: Slice,
    /// `[depth, H, D + 2]`.
    pub(super) partials: Slice,
    /// What goes from one part of a batch's attention to the next, and back.
    pub(super) states: Option<[Slice; 2]>,
    /// The blocks of the sequence that was fed last.
    pub(super) table: Slice,
    /// What the table holds.
    uploaded: Vec<u32>,
    /// What is bound where a kernel reads, or writes, nothing.
    pub(super) unread: Slice,
    pub(super) unwritten: Slice,
}

impl Cache {
    pub(super) fn new(
        gpu: &Gpu,
        layout: KvLayout,
        n_layers: usize,
        (capacity, max_batch): (usize, usize),
        frequencies: Frequencies,
    ) -> Result<Self> {
        let [keys, values, _] = layout.block_words();
        let largest = keys.max(values) as u64 * 4;
        // One that is too large is refused when it is made.
        let shard_blocks =
            usize::try_from(gpu.max_binding() / largest).unwrap_or(usize::MAX).max(1);
        let capacity_blocks = capacity.div_ceil(BLOCK);
        let (angles, partials) = (gpu.storage("rope angles", 1)?, gpu.storage("partials", 1)?);
        let mut cache = Self {
            layout,
            n_layers,
            capacity_blocks,
            max_batch,
            shard_blocks,
            blocks: 0,
            layers: vec![Vec::new(); if gpu.is_dry() { 1 } else { n_layers }],
            depth: 0,
            frequencies,
            angles,
            partials,
            states: None,
            table: gpu.storage("blocks of a sequence", capacity_blocks)?,
            uploaded: Vec::new(),
            unread: gpu.storage("unread", 1)?,
            unwritten: gpu.storage("unwritten", 1)?,
        };
        let first = FIRST_BLOCKS.min(capacity_blocks);
        cache.grow_layers(gpu, first)?;
        cache.grow_depth(gpu, first)?;
        Ok(cache)
    }

    /// Bytes that keys, values and scales take.
    pub(super) fn len_bytes(&self) -> u64 {
        self.block_bytes() * (self.n_layers * self.blocks) as u64
    }

    /// Bytes of a layer's block.
    fn block_bytes(&self) -> u64 {
        self.layout.block_words().iter().sum::<usize>() as u64 * 4
    }

    pub(super) fn shards(&self) -> usize {
        self.blocks.div_ceil(self.shard_blocks)
    }

    pub(super) fn shard_of(&self, block: u32) -> usize {
        block as usize / self.shard_blocks
    }

    pub(super) fn shard(&self, index: usize) -> KvShard {
        let (layout, blocks) = (self.layout, self.shard_blocks);
        // A single shard may have any block: pipelines do not depend on the adapter's limits.
        match self.shards() {
            1 => KvShard::whole(layout),
            _ => KvShard { layout, base: index * blocks, blocks },
        }
    }

    pub(super) fn buffers(&self, layer: usize, shard: usize) -> &ShardBuffers {
        // Layers of a dry device share one.
        &self.layers[layer.min(self.layers.len() - 1)][shard]
    }

    /// Whether there is room for so many blocks, and for a sequence of so many.
    pub(super) fn has_room(&self, blocks: usize, depth: usize) -> bool {
        blocks <= self.blocks && depth <= self.depth
    }

    /// Makes room for so many blocks, of `sequences` sequences, and for one sequence of `depth`. What was
    /// recorded must have been submitted; operations on the buffers must be made again.
    ///
    /// # Errors
    /// If the device fails or has no memory left.
    pub(super) fn grow(
        &mut self,
        gpu: &Gpu,
        blocks: usize,
        depth: usize,
        sequences: usize,
    ) -> Result<()> {
        let more = |needed: usize, now: usize, most: usize| {
            needed.max((now + (now / 2).max(FIRST_BLOCKS)).min(most))
        };
        if blocks > self.blocks {
            let most = sequences.max(1) * self.capacity_blocks;
            self.grow_layers(gpu, more(blocks, self.blocks, most))?;
        }
        if depth > self.depth {
            self.grow_depth(gpu, more(depth, self.depth, self.capacity_blocks))?;
        }
        Ok(())
    }

    fn grow_layers(&mut self, gpu: &Gpu, blocks: usize) -> Result<()> {
        let size = |shard: usize, blocks: usize| {
            blocks.saturating_sub(shard * self.shard_blocks).min(self.shard_blocks)
        };
        for layer in &mut self.layers {
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            for shard in 0..blocks.div_ceil(self.shard_blocks) {
                let (before, after) = (size(shard, self.blocks), size(shard, blocks));
                if before == after {
                    continue;
                }
                let buffers = ShardBuffers::new(gpu, self.layout, after)?;
                if let Some(old) = layer.get(shard) {
                    for (from, to) in old.parts().into_iter().zip(buffers.parts()) {
                        let to = &to.buffer;
                        encoder.copy_buffer_to_buffer(&from.buffer, 0, to, 0, from.size);
                    }
                    layer[shard] = buffers;
                } else {
                    layer.push(buffers);
                }
            }
            // The old buffers are freed when they have been copied: one layer at a time.
            submit(gpu, encoder);
            gpu.wait("make room in the KV cache")?;
        }
        self.blocks = blocks;
        if self.shards() > 1 && self.states.is_none() {
            let words = partial_words(self.layout.heads) * self.max_batch;
            let state = || gpu.storage("state of attention", words);
            self.states = Some([state()?, state()?]);
        }
        Ok(())
    }

    fn grow_depth(&mut self, gpu: &Gpu, depth: usize) -> Result<()> {
        let half = self.layout.heads.dim / 2;
        let new: Vec<[f32; 2]> = (BLOCK * self.depth..BLOCK * depth)
            .flat_map(|position| {
                let (cos, sin) = angles(position, &self.frequencies);
                cos.into_iter().zip(sin).map(|(cos, sin)| [cos, sin])
            })
            .collect();
        let all = gpu.storage("rope angles", 2 * half * BLOCK * depth)?;
        let old_bytes = (8 * half * BLOCK * self.depth) as u64;
        if old_bytes > 0 {
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            let from = &self.angles.buffer;
            encoder.copy_buffer_to_buffer(from, 0, &all.buffer, 0, old_bytes);
            submit(gpu, encoder);
        }
        gpu.queue.write_buffer(&all.buffer, old_bytes, bytemuck::cast_slice(&new));
        let partials = partial_words(self.layout.heads) * depth;
        (self.angles, self.partials) = (all, gpu.storage("partials", partials)?);
        self.depth = depth;
        Ok(())
    }

    /// Whether the table differs from what passes that are recorded may have read of it.
    pub(super) fn changes(&self, table: &[u32]) -> bool {
        self.uploaded.iter().zip(table).any(|(a, b)| a != b)
    }

    /// Uploads what is new in the table of a sequence.
    pub(super) fn set_table(&mut self, gpu: &Gpu, table: &[u32]) {
        let same = self.uploaded.iter().zip(table).take_while(|(a, b)| a == b).count();
        if same < table.len() {
            let bytes = bytemuck::cast_slice(&table[same..]);
            gpu.queue.write_buffer(&self.table.buffer, 4 * same as u64, bytes);
            self.uploaded.truncate(same);
            self.uploaded.extend(&table[same..]);
        }
    }

    /// The blocks of the sequence that was fed last, from one on, as far as they are in one shard.
    pub(super) fn run_from(&self, first: usize, end: usize) -> (usize, usize) {
        let shard = self.shard_of(self.uploaded[first]);
        let run = self.uploaded[first..end].iter();
        (shard, first + run.take_while(|&&block| self.shard_of(block) == shard).count())
    }

    /// Where a layer has a part (keys, values, scales) of a block: buffer, first byte, bytes.
    fn place(&self, layer: usize, part: usize, block: u32) -> (&wgpu::Buffer, u64, u64) {
        let shard = self.shard_of(block);
        let slice = self.buffers(layer, shard).parts()[part];
        let size = self.layout.block_words()[part] as u64 * 4;
        (&slice.buffer, (block as usize - shard * self.shard_blocks) as u64 * size, size)
    }

    /// Every layer's parts of a block, in order.
    fn places(&self, block: u32) -> impl Iterator<Item = (&wgpu::Buffer, u64, u64)> {
        let all = (0..self.layers.len())
            .flat_map(move |layer| (0..3).map(move |part| self.place(layer, part, block)));
        all.filter(|&(.., size)| size > 0)
    }

    /// Copies a block of every layer to another.
    pub(super) fn copy_block(&self, gpu: &Gpu, from: u32, to: u32) {
        let size = self.block_bytes();
        // A copy within a buffer is not allowed.
        let scratch = gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("block"),
            size,
            usage: wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        for ((from, from_at, size), (to, to_at, _)) in self.places(from).zip(self.places(to)) {
            encoder.copy_buffer_to_buffer(from, from_at, &scratch, 0, size);
            encoder.copy_buffer_to_buffer(&scratch, 0, to, to_at, size);
        }
        submit(gpu, encoder);
    }

    fn check_block(&self, block: u32) -> Result<()> {
        match block as usize {
            found if found >= self.blocks => {
                let (name, max) = ("block of the KV cache", self.blocks.saturating_sub(1));
                Err(Error::Dimension { name, found, max })
            }
            _ => Ok(()),
        }
    }

    /// See [`crate::backend::Backend::read_block`].
    pub(super) fn read_block(&self, gpu: &Gpu, block: u32) -> Result<Vec<u8>> {
        self.check_block(block)?;
        let len_bytes = self.block_bytes() * self.layers.len() as u64;
        let staging = gpu.staging((len_bytes / 4) as usize);
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        let mut at = 0;
        for (buffer, offset, size) in self.places(block) {
            staging.copy_bytes_from(&mut encoder, (buffer, offset), at, size);
            at += size;
        }
        submit(gpu, encoder);
        gpu.read_staging(&staging, (len_bytes / 4) as usize, |words| {
            let layers = words.chunks_exact((self.block_bytes() / 4) as usize);
            layers.flat_map(|words| to_rows(self.layout, words)).collect()
        })
    }

    /// See [`crate::backend::Backend::write_block`].
    pub(super) fn write_block(&self, gpu: &Gpu, block: u32, bytes: &[u8]) -> Result<()> {
        self.check_block(block)?;
        let layer_bytes = row_bytes(self.layout);
        let (found, max) = (bytes.len(), layer_bytes * self.n_layers);
        if found != max {
            return Err(Error::Dimension { name: "bytes of a block", found, max });
        }
        for (layer, rows) in bytes.chunks_exact(layer_bytes).enumerate().take(self.layers.len()) {
            let words = from_rows(self.layout, rows);
            let mut at = 0;
            for (part, len) in self.layout.block_words().into_iter().enumerate() {
                let (buffer, offset, _) = self.place(layer, part, block);
                let bytes = bytemuck::cast_slice(&words[at..at + len]);
                gpu.queue.write_buffer(buffer, offset, bytes);
                at += len;
            }
        }
        gpu.queue.submit([]);
        gpu.check("write a block of the KV cache")
    }
}

fn submit(gpu: &Gpu, encoder: wgpu::CommandEncoder) {
    let index = gpu.queue.submit([encoder.finish()]);
    gpu.work.add(WorkDone { submits: 1, ..WorkDone::default() });
    gpu.submitted(index);
}

/// Bytes of a value.
fn value_bytes(format: KvFormat) -> usize {
    match format {
        KvFormat::F32 => 4,
        KvFormat::F16 => 2,
        KvFormat::Int8 => 1,
    }
}

/// Bytes of a layer's block as rows: keys `[64, G, D]`, values, scales `[64, G]` of both.
fn row_bytes(layout: KvLayout) -> usize {
    let scales = if layout.format == KvFormat::Int8 { 8 } else { 0 };
    BLOCK * layout.heads.kv * (2 * layout.heads.dim * value_bytes(layout.format) + scales)
}

/// Where each byte of a layer's block as rows is in the block's words, in order; runs of bytes that
/// stay together: `(rows, words, len)`.
fn moves(layout: KvLayout) -> Vec<(usize, usize, usize)> {
    let KvLayout { heads, format } = layout;
    let (size, unit) = (value_bytes(format), 16);
    let head_bytes = heads.dim * size;
    let [key_bytes, value_words_bytes, _] = layout.block_words().map(|words| 4 * words);
    let mut all = Vec::new();
    let mut row = 0;
    for slot in 0..BLOCK {
        for kv_head in 0..heads.kv {
            for at in (0..head_bytes).step_by(unit) {
                let unit_at = (kv_head * layout.key_units() + at / unit) * BLOCK + slot;
                let len = unit.min(head_bytes - at);
                all.push((row, unit_at * unit, len));
                row += len;
            }
        }
    }
    for slot in 0..BLOCK {
        for kv_head in 0..heads.kv {
            let at = (kv_head * BLOCK + slot) * layout.value_words() * 4;
            all.push((row, key_bytes + at, head_bytes));
            row += head_bytes;
        }
    }
    if format == KvFormat::Int8 {
        for is_value in 0..2 {
            for slot in 0..BLOCK {
                for kv_head in 0..heads.kv {
                    let at = ((kv_head * 2 + is_value) * BLOCK + slot) * 4;
                    all.push((row, key_bytes + value_words_bytes + at, 4));
                    row += 4;
                }
            }
        }
    }
    all
}

/// The words of a layer's block as rows.
fn to_rows(layout: KvLayout, words: &[u32]) -> Vec<u8> {
    // Words are the device's, which are little-endian.
    let words: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut rows = Vec::with_capacity(row_bytes(layout));
    for (_, at, len) in moves(layout) {
        rows.extend_from_slice(&words[at..at + len]);
    }
    rows
}

/// The inverse of [`to_rows`], zeros where a word has more room than values.
fn from_rows(layout: KvLayout, rows: &[u8]) -> Vec<u32> {
    let mut bytes = vec![0u8; layout.block_words().iter().sum::<usize>() * 4];
    for (row, at, len) in moves(layout) {
        bytes[at..at + len].copy_from_slice(&rows[row..row + len]);
    }
    let words = bytes.as_chunks::<4>().0;
    words.iter().map(|&word| u32::from_le_bytes(word)).collect()
}

/// Keys and values `[S, G, D]` as a cache of so many blocks has them, position `s` in block
/// `table[s / 64]`: keys, values, scales.
pub fn pack(layout: KvLayout, rows: [&[f32]; 2], table: &[u32], blocks: usize) -> [Vec<u32>; 3] {
    let KvLayout { heads, format } = layout;
    let kv_size = heads.kv * heads.dim;
    let block_words = layout.block_words();
    let mut packed = block_words.map(|words| vec![0u32; words * blocks]);
    let chunks = rows.map(|rows| rows.chunks(BLOCK * kv_size));
    let [keys, values] = chunks;
    for ((keys, values), &block) in keys.zip(values).zip(table) {
        let mut bytes = Vec::with_capacity(row_bytes(layout));
        let mut scales = Vec::new();
        for rows in [keys, values] {
            for slot in 0..BLOCK {
                for kv_head in 0..heads.kv {
                    let at = slot * kv_size + kv_head * heads.dim;
                    let zeros = vec![0.0; heads.dim];
                    let head = rows.get(at..at + heads.dim).unwrap_or(&zeros);
                    match format {
                        KvFormat::F32 => bytes.extend(head.iter().flat_map(|x| x.to_le_bytes())),
                        KvFormat::F16 => {
                            bytes.extend(head.iter().flat_map(|&x| f16_bits(x).to_le_bytes()));
                        }
                        KvFormat::Int8 => {
                            let Quantized { codes, act_scale } = quantize_absmax(head);
                            bytes.extend(codes.iter().map(|&code| code as u8));
                            scales.extend(act_scale.to_le_bytes());
                        }
                    }
                }
            }
        }
        bytes.extend(scales);
        let words = from_rows(layout, &bytes);
        let mut at = 0;
        for (part, len) in packed.iter_mut().zip(block_words) {
            part[block as usize * len..][..len].copy_from_slice(&words[at..at + len]);
            at += len;
        }
    }
    packed
}

#[cfg(test)]
mod tests {
    use cpu_ref::attention::Heads;

    use super::*;

    #[test]
    fn rows_come_back() {
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
            for (kv, dim) in [(1, 2), (2, 20), (3, 64), (1, 100)] {
                let layout = KvLayout { heads: Heads { query: kv, kv, dim }, format };
                let rows: Vec<u8> = (0..row_bytes(layout)).map(|i| (i * 7 % 251) as u8).collect();
                let words = from_rows(layout, &rows);
                assert_eq!(to_rows(layout, &words), rows, "{layout:?}");
                let mut used: Vec<usize> =
                    moves(layout).iter().flat_map(|&(_, at, len)| at..at + len).collect();
                used.sort_unstable();
                used.dedup();
                assert_eq!(used.len(), rows.len(), "{layout:?}");
            }
        }
    }

    #[test]
    fn a_key_is_in_units_of_its_slot() {
        let layout = KvLayout { heads: Heads { query: 2, kv: 2, dim: 8 }, format: KvFormat::F32 };
        let mut rows = vec![0u8; row_bytes(layout)];
        // Position 3, head 1, dimension 5.
        rows[4 * ((3 * 2 + 1) * 8 + 5)] = 1;
        let words = from_rows(layout, &rows);
        // Units of head 1 follow the two of head 0.
        assert_eq!(words[((2 + 1) * 64 + 3) * 4 + 1], 1);
        assert_eq!(words.iter().sum::<u32>(), 1);
    }
}
