// attention: causal grouped-query attention over the KV cache, online softmax.
//   out[m,h] = softmax(q[m,h]·K[..=start+m, h/(H/G)]ᵀ / √D) · V
// | # | name   | type           | shape            | notes                 |
// | 0 | pass   | uniform        | Pass             | n_tokens, start       |
// | 1 | query  | read f32       | [M, H, D]        | RoPE applied          |
// | 2 | keys   | read f32       | [capacity, G, D] | this layer's cache    |
// | 3 | values | read f32       | [capacity, G, D] |                       |
// | 4 | out    | read_write f32 | [M, H, D]        |                       |
// Workgroup: WG lanes for one token and query head; grid (H, M, 1). Keys are taken WG at a time:
// each lane scores one key, then each lane sums the values of dimensions lid and lid + WG.
// Requires D ≤ 2·WG and D ≤ 256.
// Twin: cpu-ref/src/attention.rs. Bound: f32 sums over D and S, exp to 3 + 2|x| ULP.
#import pass
#import reduce_tree
#import ordered

override WG: u32 = 128u;
override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 2u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> query: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<f32>;
@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

var<workgroup> q: array<f32, 256>;
var<workgroup> weights: array<f32, 256>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let head = wg.x;
    let m = wg.y;
    let group = head / (HEADS / KV_HEADS);
    let from_ = (m * HEADS + head) * DIM;
    for (var d = lid; d < DIM; d += WG) {
        q[d] = query[from_ + d];
    }
    workgroupBarrier();
    let inv_sqrt_dim = inverseSqrt(f32(DIM));
    let positions = pass_.start + m + 1u;
    let stride = KV_HEADS * DIM;
    let lowest = -3.4028234e38;
    var running_max = lowest;
    var total = 0.0;
    var sum_low = 0.0;
    var sum_high = 0.0;
    for (var block = 0u; block < positions; block += WG) {
        let position = block + lid;
        var score = lowest;
        if position < positions {
            let at = position * stride + group * DIM;
            var dot_ = 0.0;
            for (var d = 0u; d < DIM; d++) {
                dot_ += q[d] * keys[at + d];
            }
            score = dot_ * inv_sqrt_dim;
        }
        let block_max = unordered(reduce_max_u32(lid, ordered(score)));
        let new_max = max(running_max, block_max);
        let weight = select(0.0, exp(score - new_max), position < positions);
        weights[lid] = weight;
        // The reduction's barriers also publish `weights`.
        let block_total = reduce_sum_f32(lid, weight);
        let decay = exp(running_max - new_max);
        total = total * decay + block_total;
        sum_low *= decay;
        sum_high *= decay;
        let n_keys = min(WG, positions - block);
        for (var i = 0u; i < n_keys; i++) {
            let at = (block + i) * stride + group * DIM + lid;
            if lid < DIM {
                sum_low += weights[i] * values[at];
            }
            if lid + WG < DIM {
                sum_high += weights[i] * values[at + WG];
            }
        }
        running_max = new_max;
        workgroupBarrier();
    }
    if lid < DIM {
        out[from_ + lid] = sum_low / total;
    }
    if lid + WG < DIM {
        out[from_ + lid + WG] = sum_high / total;
    }
}
