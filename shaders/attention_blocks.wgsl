// attention_blocks: what each block of the KV cache gives to one token's queries, apart (decode).
//   of a block: m = max s, w = exp(s − m), l = Σ w, o = Σ w·v;  s = q·k/√D
// | # | name     | type            | shape                | notes                             |
// | 0 | pass     | uniform         | Pass                 | start: the token's position       |
// | 1 | query    | read f32        | [H, D]               | RoPE applied                      |
// | 2 | keys     | read vec4<u32>  | shared/kv_layout     | this layer's cache                |
// | 3 | values   | read u32        | shared/kv_layout     |                                   |
// | 4 | scales   | read f32        | shared/kv_layout     | f32 and f16: unused               |
// | 5 | table    | read u32        | [S/64]               | the sequence's blocks             |
// | 6 | partials | read_write f32  | [S/64, H, D + 2]     | o, m, l                           |
// Workgroup: one block for up to SLOTS·QUERIES query heads of a KV head; grid (G·TILES, S/64, 1).
// Blocks of other shards are left to those. Requires D ≤ 256.
// Twin: cpu-ref/src/attention.rs, as attention.wgsl.
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
@group(0) @binding(6) var<storage, read_write> partials: array<f32>;

fn store_row(row: u32, lane: u32, most: f32, total: f32, o: vec4<f32>) {
    let at = row * (DIM + 2u);
    for (var i = 0u; i < LANE_DIMS; i++) {
        let d = lane_dim(lane, i);
        if d < DIM {
            partials[at + d] = o[i];
        }
    }
    if lane == 0u {
        partials[at + DIM] = most;
        partials[at + DIM + 1u] = total;
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let n_rows = HEADS / KV_HEADS;
    let kv_head = wg.x % KV_HEADS;
    let first = wg.x / KV_HEADS * SLOTS * QUERIES;
    let index = wg.y;
    let positions = pass_.start + 1u;
    let most = min(arrayLength(&table), arrayLength(&partials) / (HEADS * (DIM + 2u)));
    if first >= n_rows || index * BLOCK >= positions || index >= most {
        return;
    }
    let block = table[index] - BLOCK_BASE;
    if block >= min(SHARD_BLOCKS, blocks_there_are()) {
        return;
    }
    load_queries(lid, kv_head, first, n_rows);
    let lane = lid % 64u;
    let row = first + lid / 64u * QUERIES;
    let seen = vec4(min(positions - index * BLOCK, BLOCK));
    let part = attend_block(lid, kv_head, block, seen);
    for (var i = 0u; i < QUERIES; i++) {
        if row + i < n_rows {
            let at = index * HEADS + kv_head * n_rows + row + i;
            let o = vec4(part.o0[i], part.o1[i], part.o2[i], part.o3[i]);
            store_row(at, lane, part.max[i], part.total[i], o);
        }
    }
}
