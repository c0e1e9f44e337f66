// head_rerank: exact logits of the rows that may be the greedy token; the best of each 256 rows.
//   candidates = { n : upper[n] ≥ max lower },   best = argmax penalised(Σ_k table[n,k]·x[k])
// The exact best row is a candidate: its upper bound is no less than its logit, which no row's lower
// bound exceeds. So are all rows that equal it.
// | # | name    | type                 | shape          | notes                                     |
// | 0 | pass    | uniform              | Pass           | penalty                                   |
// | 1 | x       | read f32             | [logit rows, K]          | y of head_input.wgsl            |
// | 2 | bounds  | read u32             | [logit rows, 33·TILES]   | of head_int8.wgsl               |
// | 3 | seen    | read u32             | [logit rows, ceil(V/32)] | shared/penalty                  |
// | 4 | table_0 | read vec4<u32>       | [rows, UNITS]  | rows from ROW_BASE; shared/dense, no codes|
// | 5 | table_1 | read vec4<u32>       | [rows, UNITS]  | rows from ROW_BASE + ROW_1, if below ROWS |
// | 6 | table_2 | read vec4<u32>       | [rows, UNITS]  | rows from ROW_BASE + ROW_2, if below ROWS |
// | 7 | best    | read_write vec4<u32> | [logit rows, BLOCKS] | from BLOCK_BASE: bits of the best   |
// |   |         |                      |                | logit, ordered; its row, candidates, 0    |
// Workgroup: 256 rows; their candidates in turn as in lm_head.wgsl, 32 lanes each;
// grid (ceil(ROWS/256), logit rows, 1), once for every three shards.
// Twin: cpu-ref/src/head_int8.rs. A logit has the bits of lm_head.wgsl where the device rounds the
// same text alike.
#import pass
#import ordered
#import penalty
#import reduce_tree
#import best
#import dense
#import dense_dot

override WG: u32 = 256u;
override K: u32 = 64u;
override UNITS: u32 = 8u;
override FORMAT: u32 = 0u;
override TILES: u32 = 1u;
override ROW_BASE: u32 = 0u;
override ROWS: u32 = 1u;
override ROW_1: u32 = 0xffffffffu;
override ROW_2: u32 = 0xffffffffu;
override BLOCK_BASE: u32 = 0u;
override BLOCKS: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> bounds: array<u32>;
@group(0) @binding(3) var<storage, read> seen: array<u32>;
@group(0) @binding(4) var<storage, read> table_0: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> table_1: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read> table_2: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read_write> best: array<vec4<u32>>;

var<workgroup> is_candidate: array<u32, 256>;
// The same in bits, 32 rows a word.
var<workgroup> masks: array<u32, 8>;
// The rows that are, in order, and how many.
var<workgroup> candidates: array<u32, 256>;
var<workgroup> count: u32;

fn x_at(m: u32, k: u32) -> f32 {
    if k < K {
        return x[m * K + k];
    }
    return 0.0;
}

fn unit_at(row: u32, unit: u32) -> vec4<u32> {
    if row >= ROW_2 {
        return table_2[(row - ROW_2) * UNITS + unit];
    }
    if row >= ROW_1 {
        return table_1[(row - ROW_1) * UNITS + unit];
    }
    return table_0[row * UNITS + unit];
}

// Lists the candidates of the workgroup's rows for logit row m; every lane must call and gets how many
// there are.
fn list_candidates(lid: u32, m: u32, row: u32) -> u32 {
    let from_ = m * 33u * TILES;
    var lower = 0u;
    for (var tile = lid; tile < TILES; tile += WG) {
        lower = max(lower, bounds[from_ + 32u * TILES + tile]);
    }
    let least = reduce_max_u32(lid, lower);
    let lane = lid & 31u;
    let group = lid >> 5u;
    var mine = 0u;
    if row < ROWS {
        mine = select(0u, 1u, bounds[from_ + ROW_BASE + row] >= least);
    }
    is_candidate[lid] = mine;
    workgroupBarrier();
    if lane == 0u {
        var mask = 0u;
        for (var i = 0u; i < 32u; i++) {
            mask |= is_candidate[lid + i] << i;
        }
        masks[group] = mask;
    }
    workgroupBarrier();
    var at = countOneBits(masks[group] & ((1u << lane) - 1u));
    for (var g = 0u; g < group; g++) {
        at += countOneBits(masks[g]);
    }
    if mine == 1u {
        candidates[at] = row;
    }
    if lid == WG - 1u {
        count = at + mine;
    }
    return workgroupUniformLoad(&count);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    let found = list_candidates(lid, m, wg.x * WG + lid);
    var mine = NONE;
    for (var first = 0u; first < found; first += 8u) {
        let at = first + (lid >> 5u);
        var row = 0u;
        var sum = 0.0;
        if at < found {
            row = candidates[at];
            for (var unit = lid & 31u; unit < UNITS; unit += 32u) {
                sum = add_unit(sum, unit_at(row, unit), m, unit);
            }
        }
        let logit = sum_of_lanes(lid, sum);
        if at < found && (lid & 31u) == 0u {
            let n = ROW_BASE + row;
            let exact = Best(ordered(penalised(m * TILES, n, logit)), n);
            if is_better(exact, mine) {
                mine = exact;
            }
        }
    }
    let block = reduce_best(lid, mine);
    if lid == 0u {
        best[m * BLOCKS + BLOCK_BASE + wg.x] = vec4(block.bits, block.index, found, 0u);
    }
}
