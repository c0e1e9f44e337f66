// attention: causal grouped-query attention of one token over a short KV cache, block after block.
//   out[h] = softmax(q[h]·K[..=start, h/(H/G)]ᵀ / √D) · V
// | # | name      | type            | shape            | notes                                    |
// | 0 | pass      | uniform         | Pass             | start: the token's position              |
// | 1 | query     | read f32        | [H, D]           | RoPE applied                             |
// | 2 | keys      | read vec4<u32>  | shared/kv_layout | this layer's cache                       |
// | 3 | values    | read u32        | shared/kv_layout |                                          |
// | 4 | scales    | read f32        | shared/kv_layout | f32 and f16: unused                      |
// | 5 | table     | read u32        | [S/64]           | the sequence's blocks                    |
// | 6 | out       | read_write f32  | [H, D]           |                                          |
// Workgroup: up to SLOTS·QUERIES query heads of a KV head; grid (G·TILES, 1, 1). Requires D ≤ 256.
// Twin: cpu-ref/src/attention.rs, same order of sums and same exp. Bound: what fused products and an
// inexact division change; equal bits where products and sums are rounded apart.
#import pass
#import ordered
#import exp
#import kv_layout
#import attend
#import attend_block

override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 2u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> query: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> values: array<u32>;
@group(0) @binding(4) var<storage, read> scales: array<f32>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;

fn store_row(row: u32, lane: u32, total: f32, o: vec4<f32>) {
    for (var i = 0u; i < LANE_DIMS; i++) {
        let d = lane_dim(lane, i);
        if d < DIM {
            out[row * DIM + d] = o[i] / total;
        }
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let n_rows = HEADS / KV_HEADS;
    let kv_head = wg.x % KV_HEADS;
    let first = wg.x / KV_HEADS * SLOTS * QUERIES;
    if first >= n_rows {
        return;
    }
    load_queries(lid, kv_head, first, n_rows);
    let lane = lid % 64u;
    let row = first + lid / 64u * QUERIES;
    let positions = pass_.start + 1u;
    let end_block = min(pass_.start / BLOCK + 1u, arrayLength(&table));
    var most = vec4(LOWEST);
    var total = vec4(0.0);
    var o0 = vec4(0.0);
    var o1 = vec4(0.0);
    var o2 = vec4(0.0);
    var o3 = vec4(0.0);
    for (var index = 0u; index < end_block; index++) {
        let block = min(table[index] - BLOCK_BASE, blocks_there_are() - 1u);
        let seen = vec4(min(positions - index * BLOCK, BLOCK));
        let part = attend_block(lid, kv_head, block, seen);
        let new_max = max4(most, part.max);
        let decay = exp4(most - new_max);
        let growth = exp4(part.max - new_max);
        total = total * decay + part.total * growth;
        o0 = o0 * decay + part.o0 * growth;
        if LANE_DIMS > 1u {
            o1 = o1 * decay + part.o1 * growth;
        }
        if LANE_DIMS > 2u {
            o2 = o2 * decay + part.o2 * growth;
        }
        if LANE_DIMS > 3u {
            o3 = o3 * decay + part.o3 * growth;
        }
        most = new_max;
    }
    for (var i = 0u; i < QUERIES; i++) {
        if row + i < n_rows {
            store_row(head_row(row + i, kv_head), lane, total[i], vec4(o0[i], o1[i], o2[i], o3[i]));
        }
    }
}
