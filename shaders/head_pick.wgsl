// head_pick: the greedy token of the best of each block of rows.
//   tokens[token_out] = the row with the largest logit, the lowest of equals; 0xffffffff if one is NaN
//   counts[token_out] = Σ candidates
//   seen: the token's bit is set
// | # | name   | type            | shape    | notes                 |
// | 0 | pass   | uniform         | Pass     | token_out             |
// | 1 | best   | read vec4<u32>  | [BLOCKS] | of head_rerank.wgsl   |
// | 2 | tokens | read_write u32  | [any]    | at token_out          |
// | 3 | counts | read_write u32  | [any]    | at token_out          |
// | 4 | seen   | read_write u32  | [⌈V/32⌉] | one lane sets one bit |
// Workgroup: WG lanes; grid (1, 1, 1).
// Twin: cpu-ref/src/head_int8.rs. Exact.
#import pass
#import ordered
#import reduce_tree
#import best

override WG: u32 = 256u;
override BLOCKS: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> best: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> seen: array<u32>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lid: u32) {
    var mine = NONE;
    var candidates = 0u;
    for (var block = lid; block < BLOCKS; block += WG) {
        let found = best[block];
        candidates += found.z;
        let other = Best(found.x, found.y);
        if is_better(other, mine) {
            mine = other;
        }
    }
    let total = reduce_sum_i32(lid, i32(candidates));
    let winner = reduce_best(lid, mine);
    if lid == 0u {
        counts[pass_.token_out] = u32(total);
        tokens[pass_.token_out] = select(winner.index, 0xffffffffu, winner.bits == NAN_ORDERED);
        let word = winner.index >> 5u;
        if winner.bits != NAN_ORDERED && word < arrayLength(&seen) {
            seen[word] |= 1u << (winner.index & 31u);
        }
    }
}
