// head_pick: the greedy token of the best of each block of rows, for each logit row m.
//   tokens[token_out + m] = the row with the largest logit, the lowest of equals; 0xffffffff if one is NaN
//   counts[token_out + m] = Σ candidates
//   seen: the token's bit is set, in row m
// | # | name   | type            | shape                | notes                          |
// | 0 | pass   | uniform         | Pass                 | token_out                      |
// | 1 | best   | read vec4<u32>  | [logit rows, BLOCKS] | of head_rerank.wgsl            |
// | 2 | tokens | read_write u32  | [any]                | from token_out, one a row      |
// | 3 | counts | read_write u32  | [any]                | from token_out, one a row      |
// | 4 | seen   | read_write u32  | [logit rows, SEEN]   | one lane sets one bit of a row |
// Workgroup: WG lanes; grid (1, logit rows, 1).
// Twin: cpu-ref/src/head_int8.rs. Exact.
#import pass
#import ordered
#import reduce_tree
#import best

override WG: u32 = 256u;
override BLOCKS: u32 = 1u;
override SEEN: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> best: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> tokens: array<u32>;
@group(0) @binding(3) var<storage, read_write> counts: array<u32>;
@group(0) @binding(4) var<storage, read_write> seen: array<u32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let at = pass_.token_out + wg.y;
    var mine = NONE;
    var candidates = 0u;
    for (var block = lid; block < BLOCKS; block += WG) {
        let found = best[wg.y * BLOCKS + block];
        candidates += found.z;
        let other = Best(found.x, found.y);
        if is_better(other, mine) {
            mine = other;
        }
    }
    let total = reduce_sum_i32(lid, i32(candidates));
    let winner = reduce_best(lid, mine);
    if lid == 0u {
        counts[at] = u32(total);
        tokens[at] = select(winner.index, 0xffffffffu, winner.bits == NAN_ORDERED);
        let word = winner.index >> 5u;
        if winner.bits != NAN_ORDERED && word < SEEN {
            seen[wg.y * SEEN + word] |= 1u << (winner.index & 31u);
        }
    }
}
