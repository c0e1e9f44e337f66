// fused_qkv: norm, quantise, Q, K and V matrices, RoPE, cache of one token (decode).
// | # | name   | type            | shape            | notes                                        |
// | 0 | pass   | uniform         | Pass             | start: the token's position; its block       |
// | 1 | w      | read vec4<u32>  | [tiles, KC, 32]  | rows in pair order, see below                |
// | 2 | x      | read f32        | [K]              |                                              |
// | 3 | norm   | read f32        | [K]              | NORM = 0: unused                             |
// | 4 | rows   | read vec2<u32>  | [32·tiles]       | offset and scale of each row                 |
// | 5 | angles | read vec2<f32>  | [S, D/2]         | (cos, sin)                                   |
// | 6 | query  | read_write f32  | [H, D]           |                                              |
// | 7 | keys   | read_write u32  | shared/kv_layout | this layer's cache; STAGED: [G, D] f32       |
// | 8 | values | read_write u32  | shared/kv_layout | the same                                     |
// Pair order: a tile has dimensions 16j..16j + 15 of a head, then the ones D/2 further on, so that
// RoPE's pairs meet in a workgroup. Requires D % 32 == 0. An int8 cache needs whole heads: its keys and
// values are staged for kv_store.
// Workgroup: lane = row, S slices of K, ROWS·S lanes; grid (tiles·32/ROWS, 1, 1). Requires 16·UNITS +
// 4·SCRATCH + 128 bytes of workgroup memory.
// Twin: cpu-ref/src/rope.rs after rmsnorm.rs, quantize_absmax.rs and gemv.rs. Exact sums given equal codes; the codes
// and the result have the bounds of their own kernels.
#import pass
#import gemv_shape
#import planes_sum
#import i2_sum
#import signed_sum
#import half_pairs
#import half_sum
#import fused_gemv
#import kv_layout
#import half_bits

override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 32u;
override STAGED: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> norm: array<f32>;
@group(0) @binding(4) var<storage, read> rows: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read> angles: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read_write> query: array<f32>;
@group(0) @binding(7) var<storage, read_write> keys: array<u32>;
@group(0) @binding(8) var<storage, read_write> values: array<u32>;

var<workgroup> pairs: array<f32, 32>;

fn store_key(at: u32, word: u32) {
    if at < arrayLength(&keys) {
        keys[at] = word;
    }
}

fn store_value(at: u32, word: u32) {
    if at < arrayLength(&values) {
        values[at] = word;
    }
}

// The word of dimension `d` of a head at the pass's position; f16: of d and d + 1.
fn store(is_value: bool, kv_head: u32, d: u32, word: u32) {
    if STAGED == 1u {
        if is_value {
            store_value(kv_head * DIM + d, word);
        } else {
            store_key(kv_head * DIM + d, word);
        }
        return;
    }
    let block = pass_.block - BLOCK_BASE;
    if block >= SHARD_BLOCKS {
        return;
    }
    let slot = pass_.start % BLOCK;
    let at = d >> KV;
    if is_value {
        store_value(value_at(block, kv_head, slot) + at, word);
    } else {
        store_key(4u * (key_at(block, kv_head, slot) + at / 4u * BLOCK) + at % 4u, word);
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = quantize(lid);
    // A workgroup's pairs: 16, or 8 and the other 8 of a tile.
    let n_pairs = ROWS / 2u;
    let first_pair = wg.x % (32u / ROWS) * n_pairs;
    let pair = first_pair + lid % n_pairs;
    let row = lid % ROWS / n_pairs * 16u + pair;
    let shard_tile = wg.x / (32u / ROWS);
    let y = tile_rows(shard_tile, row, lid, token);
    if lid < ROWS {
        pairs[lid] = y;
    }
    workgroupBarrier();
    let half = DIM / 2u;
    let tile = TILE_BASE + shard_tile;
    let head = tile / (DIM / 32u);
    let tile_dim = tile % (DIM / 32u) * 16u;
    let i = tile_dim + pair;
    let angle_at = pass_.start * half + i;
    let is_active = lid < n_pairs && head < HEADS + 2u * KV_HEADS && angle_at < arrayLength(&angles);
    let is_value = head >= HEADS + KV_HEADS;
    var low = 0.0;
    var high = 0.0;
    if is_active {
        low = pairs[lid];
        high = pairs[lid + n_pairs];
        if !is_value {
            let a = low;
            let b = high;
            let angle = angles[angle_at];
            low = a * angle.x - b * angle.y;
            high = b * angle.x + a * angle.y;
        }
    }
    if KV == 1u && STAGED == 0u {
        // Words of two neighbours: a lane's own pair was read by that lane alone.
        if is_active {
            pairs[lid] = low;
            pairs[lid + n_pairs] = high;
        }
        workgroupBarrier();
    }
    if !is_active {
        return;
    }
    if head < HEADS {
        let at = head * DIM + i;
        query[at] = low;
        query[at + half] = high;
        return;
    }
    let kv_head = select(head - HEADS, head - HEADS - KV_HEADS, is_value);
    if KV == 1u && STAGED == 0u {
        let is_high = lid >= n_pairs / 2u;
        let first = 2u * (lid % (n_pairs / 2u));
        let at = first + select(0u, n_pairs, is_high);
        let word = half_bits(pairs[at]) | (half_bits(pairs[at + 1u]) << 16u);
        store(is_value, kv_head, tile_dim + first_pair + first + select(0u, half, is_high), word);
    } else {
        store(is_value, kv_head, i, bitcast<u32>(low));
        store(is_value, kv_head, i + half, bitcast<u32>(high));
    }
}
