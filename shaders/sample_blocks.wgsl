// sample_blocks: the last row of logits, penalised, as bits that order like it.
//   l' = seen[n] ? (l > 0 ? l / penalty : l · penalty) : l;   bits[n] = ordered(l')
//   block_max[b] = max of bits over the block's 256 tokens; 0xffffffff if one is NaN
// | # | name      | type           | shape     | notes                          |
// | 0 | pass      | uniform        | Pass      | n_logit_rows, penalty          |
// | 1 | logits    | read f32       | [M, V]    |                                |
// | 2 | seen      | read u32       | [M, ⌈V/32⌉] | bit n%32 of word n/32: token n |
// | 3 | bits      | read_write u32 | [V]       |                                |
// | 4 | block_max | read_write u32 | [⌈V/256⌉] |                                |
// Workgroup: one token a lane; grid (⌈V/256⌉, 1, 1).
// Twin: cpu-ref/src/sample.rs. Exact where a division is; WGSL allows it 2.5 ULP.
#import pass
#import ordered
#import penalty
#import reduce_tree

const WG: u32 = 256u;
override V: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read> seen: array<u32>;
@group(0) @binding(3) var<storage, read_write> bits: array<u32>;
@group(0) @binding(4) var<storage, read_write> block_max: array<u32>;

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let id = group.x * WG + lid;
    var value = 0u;
    if id < V {
        let row = pass_.n_logit_rows - 1u;
        let logit = logits[row * V + id];
        let is_nan = ordered(logit) == NAN_ORDERED;
        value = select(ordered(penalised(row * ((V + 31u) / 32u), id, logit)), NAN_ORDERED, is_nan);
        bits[id] = value;
    }
    let largest = reduce_max_u32(lid, value);
    if lid == 0u {
        block_max[group.x] = largest;
    }
}
