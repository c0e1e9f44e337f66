// argmax: greedy token of each row of logits.
//   token[token_out + m] = the lowest n with logits[m, n] = max_n logits[m, n]; 0xffffffff if one is NaN
// | # | name   | type           | shape  | notes             |
// | 0 | pass   | uniform        | Pass   | token_out         |
// | 1 | logits | read f32       | [M, V] |                   |
// | 2 | token  | read_write u32 | [any]  | from token_out, one a row |
// Workgroup: WG lanes; grid (1, logit rows, 1).
// Twin: cpu-ref/src/argmax.rs. Exact.
#import pass
#import ordered
#import best

override WG: u32 = 256u;
override V: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> token: array<u32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let from_ = wg.y * V;
    var mine = NONE;
    for (var n = lid; n < V; n += WG) {
        let candidate = Best(ordered(logits[from_ + n]), n);
        if is_better(candidate, mine) {
            mine = candidate;
        }
    }
    let best = reduce_best(lid, mine);
    if lid == 0u {
        token[pass_.token_out + wg.y] = select(best.index, 0xffffffffu, best.bits == NAN_ORDERED);
    }
}
