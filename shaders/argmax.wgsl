// argmax: greedy token of the last row of logits.
//   token[token_out] = the lowest n with logits[last, n] = max_n logits[last, n]; 0xffffffff if one is NaN
// | # | name   | type           | shape  | notes             |
// | 0 | pass   | uniform        | Pass   | n_logit_rows      |
// | 1 | logits | read f32       | [M, V] |                   |
// | 2 | token  | read_write u32 | [any]  | at token_out      |
// Workgroup: WG lanes; grid (1, 1, 1).
// Twin: cpu-ref/src/argmax.rs. Exact.
#import pass
#import ordered

override WG: u32 = 256u;
override V: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> logits: array<f32>;
@group(0) @binding(2) var<storage, read_write> token: array<u32>;

// Each lane's best (logit as ordered bits, index).
var<workgroup> best_bits: array<u32, 256>;
var<workgroup> best_index: array<u32, 256>;

@compute @workgroup_size(WG)
fn main(@builtin(local_invocation_index) lid: u32) {
    let from_ = (pass_.n_logit_rows - 1u) * V;
    var bits = 0u;
    var index = 0xffffffffu;
    for (var n = lid; n < V; n += WG) {
        let candidate = ordered(logits[from_ + n]);
        if candidate > bits {
            bits = candidate;
            index = n;
        }
    }
    best_bits[lid] = bits;
    best_index[lid] = index;
    workgroupBarrier();
    for (var step = WG / 2u; step > 0u; step /= 2u) {
        if lid < step {
            let other_bits = best_bits[lid + step];
            let other_index = best_index[lid + step];
            let better = other_bits > best_bits[lid]
                || (other_bits == best_bits[lid] && other_index < best_index[lid]);
            if better {
                best_bits[lid] = other_bits;
                best_index[lid] = other_index;
            }
        }
        workgroupBarrier();
    }
    if lid == 0u {
        token[pass_.token_out] = select(best_index[0], 0xffffffffu, best_bits[0] == NAN_ORDERED);
    }
}
