// fused_qkv: norm, quantise, Q, K and V matrices, RoPE, cache of one token (decode).
// | # | name   | type            | shape            | notes                                        |
// | 0 | pass   | uniform         | Pass             | start: the token's position                  |
// | 1 | w      | read vec4<u32>  | [tiles, KC, 32]  | rows in pair order, see below                |
// | 2 | x      | read f32        | [K]              |                                              |
// | 3 | norm   | read f32        | [K]              | NORM = 0: unused                             |
// | 4 | rows   | read vec2<u32>  | [32·tiles]       | offset and scale of each row                 |
// | 5 | angles | read vec2<f32>  | [CAPACITY, D/2]  | (cos, sin)                                   |
// | 6 | query  | read_write f32  | [H, D]           |                                              |
// | 7 | keys   | read_write f32  | [CAPACITY, G, D] | this layer's cache                           |
// | 8 | values | read_write f32  | [CAPACITY, G, D] |                                              |
// Pair order: a tile has dimensions 16j..16j + 15 of a head, then the ones D/2 further on, so that
// RoPE's pairs meet in a workgroup. Requires D % 32 == 0.
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

override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 32u;
override CAPACITY: u32 = 1u; // positions of the cache

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> norm: array<f32>;
@group(0) @binding(4) var<storage, read> rows: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read> angles: array<vec2<f32>>;
@group(0) @binding(6) var<storage, read_write> query: array<f32>;
@group(0) @binding(7) var<storage, read_write> keys: array<f32>;
@group(0) @binding(8) var<storage, read_write> values: array<f32>;

var<workgroup> pairs: array<f32, 32>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = quantize(lid);
    // A workgroup's pairs: 16, or 8 and the other 8 of a tile.
    let n_pairs = ROWS / 2u;
    let pair = wg.x % (32u / ROWS) * n_pairs + lid % n_pairs;
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
    if lid >= n_pairs || head >= HEADS + 2u * KV_HEADS || pass_.start >= CAPACITY {
        return;
    }
    let i = tile % (DIM / 32u) * 16u + pair;
    let a = pairs[lid];
    let b = pairs[lid + n_pairs];
    let angle = angles[pass_.start * half + i];
    let low = a * angle.x - b * angle.y;
    let high = b * angle.x + a * angle.y;
    if head < HEADS {
        let at = head * DIM + i;
        query[at] = low;
        query[at + half] = high;
    } else if head < HEADS + KV_HEADS {
        let at = (pass_.start * KV_HEADS + head - HEADS) * DIM + i;
        keys[at] = low;
        keys[at + half] = high;
    } else {
        let at = (pass_.start * KV_HEADS + head - HEADS - KV_HEADS) * DIM + i;
        values[at] = a;
        values[at + half] = b;
    }
}
