//! The KV cache of the CPU backends: keys and values of every position, one buffer pair a layer.

mod blocks;

pub use blocks::{BLOCK, Blocks, Prepared, SequenceId};
pub use cpu_ref::kv::KvFormat;

/// Keys and values of all layers, f32, `[capacity, G·D]` a layer; keys have RoPE applied.
#[derive(Debug)]
pub struct KvCache {
    kv_size: usize,
    capacity: usize,
    layers: Vec<Layer>,
}

#[derive(Debug)]
struct Layer {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KvCache {
    /// A cache of `capacity` positions for `n_layers` layers of `kv_size = G·D` values.
    pub fn new(n_layers: usize, capacity: usize, kv_size: usize) -> Self {
        let layer =
            || Layer { keys: vec![0.0; capacity * kv_size], values: vec![0.0; capacity * kv_size] };
        Self { kv_size, capacity, layers: (0..n_layers).map(|_| layer()).collect() }
    }

    /// Bytes that [`KvCache::new`] allocates.
    pub fn len_bytes(n_layers: usize, capacity: usize, kv_size: usize) -> usize {
        2 * n_layers * capacity * kv_size * size_of::<f32>()
    }

    /// Positions there is room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The slots `(keys, values)` of one position, `[G·D]` each.
    pub fn slot(&mut self, layer: usize, position: usize) -> (&mut [f32], &mut [f32]) {
        let range = position * self.kv_size..(position + 1) * self.kv_size;
        let layer = &mut self.layers[layer];
        (&mut layer.keys[range.clone()], &mut layer.values[range])
    }

    /// `(keys, values)` of positions `0..positions`, `[positions, G·D]` each.
    pub fn prefix(&self, layer: usize, positions: usize) -> (&[f32], &[f32]) {
        let layer = &self.layers[layer];
        let len = positions * self.kv_size;
        (&layer.keys[..len], &layer.values[..len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_rows_of_the_prefix() {
        let mut cache = KvCache::new(2, 3, 2);
        let (key, value) = cache.slot(1, 1);
        key.copy_from_slice(&[1.0, 2.0]);
        value.copy_from_slice(&[3.0, 4.0]);
        let (keys, values) = cache.prefix(1, 2);
        assert_eq!(keys, [0.0, 0.0, 1.0, 2.0]);
        assert_eq!(values, [0.0, 0.0, 3.0, 4.0]);
        assert_eq!(cache.prefix(0, 3).0, [0.0; 6]);
        assert_eq!(KvCache::len_bytes(2, 3, 2), 2 * 2 * 3 * 2 * 4);
    }
}
