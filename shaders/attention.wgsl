// attention: causal grouped-query attention over the KV cache, block after block.
//   out[m,h] = softmax(q[m,h]·K[..=start+m, h/(H/G)]ᵀ / √D) · V
// | # | name      | type            | shape            | notes                                    |
// | 0 | pass      | uniform         | Pass             | n_tokens, start; first_block, end_block  |
// | 1 | query     | read f32        | [M, H, D]        | RoPE applied                             |
// | 2 | keys      | read vec4<u32>  | shared/kv_layout | this layer's cache                       |
// | 3 | values    | read u32        | shared/kv_layout |                                          |
// | 4 | scales    | read f32        | shared/kv_layout | f32 and f16: unused                      |
// | 5 | table     | read u32        | [S/64]           | the sequence's blocks                    |
// | 6 | state_in  | read f32        | [M, H, D + 2]    | PARTS = 0: unused                        |
// | 7 | out       | read_write f32  | [M, H, D]        |                                          |
// | 8 | state_out | read_write f32  | [M, H, D + 2]    | PARTS = 0: unused                        |
// Workgroup: SLOTS·QUERIES rows of a KV head, a row being one of its query heads of a token, in the
// order of tokens; grid (G, ceil(M·H/G / (SLOTS·QUERIES)), 1). Requires D ≤ 256.
// Where the cache has shards (PARTS = 1), a dispatch takes blocks first_block..end_block, which lie in
// one; sums, maximum and total go from one to the next through state, and the last writes out.
// Twin: cpu-ref/src/attention.rs, same order of sums and same exp. Bound: what fused products and an
// inexact division change; equal bits where products and sums are rounded apart.
#import pass
#import ordered
#import exp
#import kv_layout
#import attend_block

override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 2u;
override PARTS: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> query: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> values: array<u32>;
@group(0) @binding(4) var<storage, read> scales: array<f32>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read> state_in: array<f32>;
@group(0) @binding(7) var<storage, read_write> out: array<f32>;
@group(0) @binding(8) var<storage, read_write> state_out: array<f32>;

struct Row {
    max: f32,
    total: f32,
    o: vec4<f32>,
}

fn load_row(row: u32, lane: u32) -> Row {
    let at = row * (DIM + 2u);
    var o = vec4(0.0);
    for (var i = 0u; i < LANE_DIMS; i++) {
        let d = lane_dim(lane, i);
        if d < DIM {
            o[i] = state_in[at + d];
        }
    }
    return Row(state_in[at + DIM], state_in[at + DIM + 1u], o);
}

fn store_row(row: u32, lane: u32, result: Row, is_last: bool) {
    for (var i = 0u; i < LANE_DIMS; i++) {
        let d = lane_dim(lane, i);
        if d < DIM {
            if is_last {
                out[row * DIM + d] = result.o[i] / result.total;
            } else {
                state_out[row * (DIM + 2u) + d] = result.o[i];
            }
        }
    }
    if !is_last && lane == 0u {
        state_out[row * (DIM + 2u) + DIM] = result.max;
        state_out[row * (DIM + 2u) + DIM + 1u] = result.total;
    }
}

fn start_row(row: u32, n_rows: u32, kv_head: u32, lane: u32) -> Row {
    if PARTS == 1u && pass_.first_block > 0u && row < n_rows {
        return load_row(head_row(row, kv_head), lane);
    }
    return Row(LOWEST, 0.0, vec4(0.0));
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let ratio = HEADS / KV_HEADS;
    let n_rows = pass_.n_tokens * ratio;
    let kv_head = wg.x;
    let first = wg.y * SLOTS * QUERIES;
    if first >= n_rows {
        return;
    }
    load_queries(lid, kv_head, first, n_rows);
    let lane = lid % 64u;
    let row = first + lid / 64u * QUERIES;
    let rows = min(vec4(row) + min(vec4(0u, 1u, 2u, 3u), vec4(QUERIES - 1u)), vec4(n_rows - 1u));
    // Positions that each row sees.
    let ends = vec4(pass_.start + 1u) + rows / ratio;
    let last_row = min(first + SLOTS * QUERIES, n_rows) - 1u;
    var end_block = (pass_.start + last_row / ratio) / BLOCK + 1u;
    var first_block = 0u;
    var is_last = true;
    if PARTS == 1u {
        first_block = pass_.first_block;
        is_last = pass_.end_block * BLOCK >= pass_.start + pass_.n_tokens;
        end_block = min(end_block, pass_.end_block);
    }
    let r0 = start_row(row, n_rows, kv_head, lane);
    var most = vec4(r0.max, LOWEST, LOWEST, LOWEST);
    var total = vec4(r0.total, 0.0, 0.0, 0.0);
    var o0 = vec4(r0.o.x, 0.0, 0.0, 0.0);
    var o1 = vec4(r0.o.y, 0.0, 0.0, 0.0);
    var o2 = vec4(r0.o.z, 0.0, 0.0, 0.0);
    var o3 = vec4(r0.o.w, 0.0, 0.0, 0.0);
    for (var i = 1u; i < QUERIES; i++) {
        let r = start_row(row + i, n_rows, kv_head, lane);
        most[i] = r.max;
        total[i] = r.total;
        o0[i] = r.o.x;
        o1[i] = r.o.y;
        o2[i] = r.o.z;
        o3[i] = r.o.w;
    }
    for (var index = first_block; index < end_block; index++) {
        let block = table[index] - BLOCK_BASE;
        let seen = min(max(ends, vec4(index * BLOCK)) - vec4(index * BLOCK), vec4(BLOCK));
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
            let result = Row(most[i], total[i], vec4(o0[i], o1[i], o2[i], o3[i]));
            store_row(head_row(row + i, kv_head), lane, result, is_last);
        }
    }
}
