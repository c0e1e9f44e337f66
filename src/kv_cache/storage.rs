//! The blocks of a CPU backend, and where in a block a value is.
//!
//! A block is one allocation: for each layer and key/value head one *chunk*,
//!
//! ```text
//! keys [D][64] | values [64][D] | key scales [64] | value scales [64]
//! ```
//!
//! in the cache's format, scales (f32) only for int8. Keys lie by dimension, so that the scores of
//! neighbouring positions are computed side by side; dimension *d* is row [`key_row`], which groups
//! the rows by the lane `d mod 16` that the dot product sums them in. A chunk is what attention reads
//! of a head, all in a row, and every part of it begins at a cache line.

use bytemuck::{Pod, Zeroable, cast_slice, cast_slice_mut};
use cpu_ref::reduce::DOT_LANES;

use super::{BLOCK, KvFormat, Prepared};
use crate::config::ModelConfig;
use crate::error::{Error, Result};

/// What a block's memory is made of: a cache line.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub struct Line([u32; 16]);

/// The dimensions of a model's keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Layers.
    pub layers: usize,
    /// G, key/value heads.
    pub heads: usize,
    /// D, values a head.
    pub dim: usize,
    /// How they are held.
    pub format: KvFormat,
}

impl KvShape {
    /// Of a model.
    pub fn new(config: &ModelConfig, format: KvFormat) -> Self {
        Self {
            layers: config.num_hidden_layers,
            heads: config.num_key_value_heads,
            dim: config.head_dim,
            format,
        }
    }

    /// Bytes of one position in all layers, in any backend.
    pub fn position_bytes(&self) -> usize {
        2 * self.layers * self.heads * (self.dim * value_bytes(self.format) + self.scale_bytes())
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        BLOCK * self.position_bytes()
    }

    /// Bytes of a scale.
    fn scale_bytes(&self) -> usize {
        if self.format == KvFormat::Int8 { size_of::<f32>() } else { 0 }
    }

    /// Lines of one head's chunk.
    pub fn chunk_lines(&self) -> usize {
        self.block_bytes() / (self.layers * self.heads) / size_of::<Line>()
    }
}

/// Bytes of a value.
pub(crate) fn value_bytes(format: KvFormat) -> usize {
    match format {
        KvFormat::F32 => 4,
        KvFormat::F16 => 2,
        KvFormat::Int8 => 1,
    }
}

/// The row of a chunk's keys that holds dimension `d` of `dim`: lane by lane, and within a lane in
/// order.
pub fn key_row(d: usize, dim: usize) -> usize {
    let lane = d % DOT_LANES;
    lane * (dim / DOT_LANES) + lane.min(dim % DOT_LANES) + d / DOT_LANES
}

/// A head's keys and values in a block.
#[derive(Debug, Clone, Copy)]
pub enum HeadChunk<'a> {
    /// Keys `[D][64]` in the order of [`key_row`], values `[64][D]`.
    F32(&'a [f32], &'a [f32]),
    /// The same as half bits.
    F16(&'a [u16], &'a [u16]),
    /// The same as codes, with the scales of the keys `[64]` and of the values.
    Int8(&'a [i8], &'a [i8], &'a [f32], &'a [f32]),
}

/// [`HeadChunk`], to be written.
#[derive(Debug)]
pub enum HeadChunkMut<'a> {
    /// See [`HeadChunk::F32`].
    F32(&'a mut [f32], &'a mut [f32]),
    /// See [`HeadChunk::F16`].
    F16(&'a mut [u16], &'a mut [u16]),
    /// See [`HeadChunk::Int8`].
    Int8(&'a mut [i8], &'a mut [i8], &'a mut [f32], &'a mut [f32]),
}

impl<'a> HeadChunk<'a> {
    fn of(lines: &'a [Line], shape: &KvShape) -> Self {
        let values = shape.dim * BLOCK;
        match shape.format {
            KvFormat::F32 => {
                let (keys, values) = cast_slice(lines).split_at(values);
                Self::F32(keys, values)
            }
            KvFormat::F16 => {
                let (keys, values) = cast_slice(lines).split_at(values);
                Self::F16(keys, values)
            }
            KvFormat::Int8 => {
                let (codes, scales) = lines.split_at(2 * values / size_of::<Line>());
                let (keys, values) = cast_slice(codes).split_at(values);
                let (key_scales, value_scales) = cast_slice(scales).split_at(BLOCK);
                Self::Int8(keys, values, key_scales, value_scales)
            }
        }
    }

    /// D.
    pub fn dim(self) -> usize {
        let len = match self {
            Self::F32(keys, _) => keys.len(),
            Self::F16(keys, _) => keys.len(),
            Self::Int8(keys, ..) => keys.len(),
        };
        len / BLOCK
    }

    /// The address of the first key, for hints.
    pub(crate) fn start(self) -> *const u8 {
        match self {
            Self::F32(keys, _) => keys.as_ptr().cast(),
            Self::F16(keys, _) => keys.as_ptr().cast(),
            Self::Int8(keys, ..) => keys.as_ptr().cast(),
        }
    }
}

impl<'a> HeadChunkMut<'a> {
    /// The view of one chunk's lines.
    ///
    /// # Panics
    /// If they are not [`KvShape::chunk_lines`].
    pub fn of(lines: &'a mut [Line], shape: &KvShape) -> Self {
        assert_eq!(lines.len(), shape.chunk_lines(), "the lines of a chunk");
        let values = shape.dim * BLOCK;
        match shape.format {
            KvFormat::F32 => {
                let (keys, values) = cast_slice_mut(lines).split_at_mut(values);
                Self::F32(keys, values)
            }
            KvFormat::F16 => {
                let (keys, values) = cast_slice_mut(lines).split_at_mut(values);
                Self::F16(keys, values)
            }
            KvFormat::Int8 => {
                let (codes, scales) = lines.split_at_mut(2 * values / size_of::<Line>());
                let (keys, values) = cast_slice_mut(codes).split_at_mut(values);
                let (key_scales, value_scales) = cast_slice_mut(scales).split_at_mut(BLOCK);
                Self::Int8(keys, values, key_scales, value_scales)
            }
        }
    }

    /// D.
    pub fn dim(&self) -> usize {
        let len = match self {
            Self::F32(keys, _) => keys.len(),
            Self::F16(keys, _) => keys.len(),
            Self::Int8(keys, ..) => keys.len(),
        };
        len / BLOCK
    }
}

/// The storage of all blocks; a block is allocated when it is first needed and kept for reuse.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    blocks: Vec<Box<[Line]>>,
}

impl KvCache {
    /// No blocks yet.
    pub fn new(shape: KvShape) -> Self {
        Self { shape, blocks: Vec::new() }
    }

    /// The dimensions.
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Bytes allocated: those of the blocks there are.
    pub fn bytes(&self) -> u64 {
        self.blocks.len() as u64 * self.shape.block_bytes() as u64
    }

    /// Makes room and copies as [`super::Blocks::prepare`] asks for.
    ///
    /// # Errors
    /// [`Error::KvMemory`].
    pub fn apply(&mut self, prepared: Prepared) -> Result<()> {
        self.make_room(prepared.blocks)?;
        if let Some((from, to)) = prepared.copy {
            let blocks = self.blocks.get_disjoint_mut([from as usize, to as usize]);
            let [from, to] = blocks.expect("two blocks that there is room for");
            to.copy_from_slice(from);
        }
        Ok(())
    }

    /// Allocates the blocks below `blocks` that there are not.
    fn make_room(&mut self, blocks: usize) -> Result<()> {
        let bytes = self.shape.block_bytes();
        while self.blocks.len() < blocks {
            let block = bytemuck::try_zeroed_slice_box(bytes / size_of::<Line>());
            self.blocks.push(block.map_err(|()| Error::KvMemory { bytes })?);
        }
        Ok(())
    }

    /// What a block holds of a head.
    pub fn head(&self, block: u32, layer: usize, head: usize) -> HeadChunk<'_> {
        let lines = self.shape.chunk_lines();
        let at = (layer * self.shape.heads + head) * lines;
        HeadChunk::of(&self.blocks[block as usize][at..][..lines], &self.shape)
    }

    /// The chunks of all heads of a layer, one after another.
    pub fn layer_mut(&mut self, block: u32, layer: usize) -> &mut [Line] {
        let lines = self.shape.heads * self.shape.chunk_lines();
        &mut self.blocks[block as usize][layer * lines..][..lines]
    }

    /// [`crate::backend::Backend::read_block`].
    pub fn read_block(&self, block: u32) -> Vec<u8> {
        let mut canonical = vec![0; self.shape.block_bytes()];
        let chunks: &[u8] = cast_slice(&self.blocks[block as usize]);
        for_each_element(&self.shape, |outside, inside, len| {
            copy_little_endian(&chunks[inside..][..len], &mut canonical[outside..][..len]);
        });
        canonical
    }

    /// [`crate::backend::Backend::write_block`].
    ///
    /// # Errors
    /// [`Error::BlockLength`], or [`Error::KvMemory`] if there was no room for the block yet.
    pub fn write_block(&mut self, block: u32, canonical: &[u8]) -> Result<()> {
        let expected = self.shape.block_bytes();
        if canonical.len() != expected {
            return Err(Error::BlockLength { expected, found: canonical.len() });
        }
        self.make_room(block as usize + 1)?;
        let chunks: &mut [u8] = cast_slice_mut(&mut self.blocks[block as usize]);
        for_each_element(&self.shape, |outside, inside, len| {
            copy_little_endian(&canonical[outside..][..len], &mut chunks[inside..][..len]);
        });
        Ok(())
    }
}

/// Calls `each(outside, inside, len)` for every value and scale of a block: where it begins in the
/// order that all backends have outside and in a block here, and its bytes.
fn for_each_element(shape: &KvShape, mut each: impl FnMut(usize, usize, usize)) {
    let &KvShape { layers, heads, dim, format } = shape;
    let (size, scale) = (value_bytes(format), shape.scale_bytes());
    let chunk = shape.chunk_lines() * size_of::<Line>();
    let values_at = dim * BLOCK * size;
    let mut outside = 0;
    for layer in 0..layers {
        let chunk_at = |head: usize| (layer * heads + head) * chunk;
        for values in [false, true] {
            for position in 0..BLOCK {
                for head in 0..heads {
                    for d in 0..dim {
                        let inside = match values {
                            false => (key_row(d, dim) * BLOCK + position) * size,
                            true => values_at + (position * dim + d) * size,
                        };
                        each(outside, chunk_at(head) + inside, size);
                        outside += size;
                    }
                }
            }
        }
        for scales_at in [2 * values_at, 2 * values_at + BLOCK * scale] {
            for position in 0..if scale == 0 { 0 } else { BLOCK } {
                for head in 0..heads {
                    each(outside, chunk_at(head) + scales_at + position * scale, scale);
                    outside += scale;
                }
            }
        }
    }
}

/// Copies a number between this machine's order of bytes and little-endian.
fn copy_little_endian(from: &[u8], to: &mut [u8]) {
    to.copy_from_slice(from);
    if cfg!(target_endian = "big") {
        to.reverse();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(dim: usize, format: KvFormat) -> KvShape {
        KvShape { layers: 3, heads: 2, dim, format }
    }

    #[test]
    fn key_rows_are_a_permutation_lane_by_lane() {
        for dim in [2, 16, 20, 96, 100, 128] {
            let mut seen = Vec::new();
            for lane in 0..DOT_LANES {
                seen.extend((lane..dim).step_by(DOT_LANES).map(|d| key_row(d, dim)));
            }
            assert_eq!(seen, (0..dim).collect::<Vec<_>>(), "{dim}");
        }
    }

    #[test]
    fn bytes_are_those_of_the_blocks() {
        for (format, position) in [
            (KvFormat::F32, 2 * 3 * 2 * 20 * 4),
            (KvFormat::F16, 2 * 3 * 2 * 20 * 2),
            (KvFormat::Int8, 2 * 3 * 2 * (20 + 4)),
        ] {
            let mut cache = KvCache::new(shape(20, format));
            assert_eq!((cache.shape().position_bytes(), cache.bytes()), (position, 0));
            cache.apply(Prepared { copy: None, blocks: 2 }).unwrap();
            cache.apply(Prepared { copy: None, blocks: 1 }).unwrap();
            assert_eq!(cache.bytes(), 2 * 64 * position as u64);
            let allocated: usize = cache.blocks.iter().map(|block| size_of_val(&**block)).sum();
            assert_eq!(cache.bytes(), allocated as u64);
        }
    }

    #[test]
    fn a_block_comes_back_as_it_was_written() {
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
            let shape = shape(20, format);
            let mut cache = KvCache::new(shape);
            let bytes: Vec<u8> = (0..shape.block_bytes()).map(|i| (i * 31 % 251) as u8).collect();
            cache.write_block(1, &bytes).unwrap();
            assert_eq!(cache.read_block(1), bytes);
            assert!(cache.read_block(0).iter().all(|&byte| byte == 0));
            // A copy on write.
            cache.apply(Prepared { copy: Some((1, 2)), blocks: 3 }).unwrap();
            assert_eq!(cache.read_block(2), bytes);
            let error = cache.write_block(0, &bytes[1..]).unwrap_err();
            assert!(matches!(error, Error::BlockLength { .. }));
        }
    }

    #[test]
    fn elements_are_where_the_layout_says() {
        let shape = shape(20, KvFormat::Int8);
        let mut cache = KvCache::new(shape);
        let mut bytes = vec![0; shape.block_bytes()];
        let layer = shape.block_bytes() / 3;
        // Layer 1, position 5, head 1, dimension 17: of the keys and of the values, and the scales.
        bytes[layer + (5 * 2 + 1) * 20 + 17] = 7;
        bytes[layer + (64 + 5) * 2 * 20 + 20 + 17] = 9;
        let scales = layer + 2 * 64 * 2 * 20;
        bytes[scales + (5 * 2 + 1) * 4..][..4].copy_from_slice(&0.5f32.to_le_bytes());
        bytes[scales + (64 * 2 + 5 * 2 + 1) * 4..][..4].copy_from_slice(&0.25f32.to_le_bytes());
        cache.write_block(0, &bytes).unwrap();
        let HeadChunk::Int8(keys, values, key_scales, value_scales) = cache.head(0, 1, 1) else {
            panic!("int8");
        };
        assert_eq!((keys[key_row(17, 20) * 64 + 5], values[5 * 20 + 17]), (7, 9));
        assert_eq!((key_scales[5], value_scales[5]), (0.5, 0.25));
        assert_eq!(keys.iter().chain(values).filter(|&&code| code != 0).count(), 2);
    }
}
