//! Scales of groups of inputs; `cpu_ref::layout::group_scales` is their definition.

use cpu_ref::layout::TILE_ROWS;
use cpu_ref::layout::group_scales::len_words;

/// Packs the halves `scales[N, groups]`.
///
/// # Panics
/// If there is no group, or the length does not match.
pub fn pack(n: usize, groups: usize, scales: &[u16]) -> Vec<u32> {
    assert!(groups > 0 && scales.len() == n * groups, "scales are [N, groups]");
    let mut words = vec![0; len_words(n, groups)];
    for (row, scales) in scales.chunks_exact(groups).enumerate() {
        let tile = row / TILE_ROWS * groups * TILE_ROWS / 2;
        pack_row(row % TILE_ROWS, scales, &mut words[tile..]);
    }
    words
}

/// Writes the scales of one row into its tile, whose words are zero there.
pub(super) fn pack_row(in_tile: usize, scales: &[u16], tile: &mut [u32]) {
    for (&scale, pairs) in scales.iter().zip(tile.chunks_exact_mut(TILE_ROWS / 2)) {
        pairs[in_tile / 2] |= u32::from(scale) << (16 * (in_tile % 2));
    }
}
