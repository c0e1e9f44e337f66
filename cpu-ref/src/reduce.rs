//! Sums in a fixed order that lanes, SIMD registers and GPU workgroups can all follow.
//!
//! A float sum depends on its order, and a last-bit difference can move an int8 activation code by
//! one step. The order is therefore part of the specification: value `i` goes to lane `i mod L` in
//! increasing `i`, then the upper half of the lanes is added to the lower half until one is left.
//! Products and sums are rounded separately (no fused multiply-add).

/// Lanes of the sum in `rmsnorm`.
pub const NORM_LANES: usize = 256;
/// Lanes of the dot product of a query and a key.
pub const DOT_LANES: usize = 16;
/// Lanes of the sum over groups in `group_gemv` with int8 activations.
pub const GROUP_LANES: usize = 8;
/// Keys that attention takes at a time, and lanes of the sum of their weights.
pub const KEY_LANES: usize = 64;

/// The sum of `values` over `L` lanes; `L` is a power of two.
pub fn lane_sum<const L: usize>(values: impl IntoIterator<Item = f32>) -> f32 {
    const { assert!(L.is_power_of_two()) };
    let mut lanes = [0.0f32; L];
    for (i, value) in values.into_iter().enumerate() {
        lanes[i % L] += value;
    }
    tree_sum(lanes)
}

/// Adds the upper half of the lanes to the lower half until one is left.
#[inline(always)]
pub fn tree_sum<const L: usize>(mut lanes: [f32; L]) -> f32 {
    let mut step = L / 2;
    while step > 0 {
        for lane in 0..step {
            lanes[lane] += lanes[lane + step];
        }
        step /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_counted_once() {
        for len in [0, 1, 15, 16, 17, 1000] {
            let values = (0..len).map(|i| i as f32);
            let expected = (0..len).sum::<usize>() as f32;
            assert_eq!(lane_sum::<16>(values.clone()), expected);
            assert_eq!(lane_sum::<256>(values), expected);
        }
    }

    #[test]
    fn the_order_is_lanes_then_tree() {
        // 1e8 + 1 is 1e8 in f32: lanes 0 and 2 meet first, so 1 survives in lane 1 + 3.
        assert_eq!(lane_sum::<4>([1e8, 1.0, -1e8, 0.0]), 1.0);
        assert_eq!(lane_sum::<4>([1e8, -1e8, 1.0, 0.0]), 0.0);
    }
}
