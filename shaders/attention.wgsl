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
// Requires D ≤ 2·WG and D ≤ 256. WG is the 128 keys that the twin takes at a time.
// Twin: cpu-ref/src/attention.rs, same order of sums and same exp. Bound: what fused products and an
// inexact division change; equal bits where products and sums are rounded apart.
#import pass
#import reduce_tree
#import ordered
#import exp

override WG: u32 = 128u;
override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 2u;
override INV_SQRT_DIM: f32 = 0.70710678;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> query: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<f32>;
@group(0) @binding(3) var<storage, read> values: array<f32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

var<workgroup> q: array<f32, 256>;
var<workgroup> weights: array<f32, 256>;

// Dimensions d..d+3 of the key at keys[at..], zero past D.
fn key4(at: u32, d: u32) -> vec4<f32> {
    if d + 4u <= DIM {
        return vec4(keys[at + d], keys[at + d + 1u], keys[at + d + 2u], keys[at + d + 3u]);
    }
    var key = vec4(0.0);
    for (var i = 0u; d + i < DIM; i++) {
        key[i] = keys[at + d + i];
    }
    return key;
}

fn q4(d: u32) -> vec4<f32> {
    return vec4(q[d], q[d + 1u], q[d + 2u], q[d + 3u]);
}

// q·key over 16 lanes, then their tree.
fn dot_lanes(at: u32) -> f32 {
    var a0 = vec4(0.0);
    var a1 = vec4(0.0);
    var a2 = vec4(0.0);
    var a3 = vec4(0.0);
    for (var d = 0u; d < DIM; d += 16u) {
        a0 += q4(d) * key4(at, d);
        a1 += q4(d + 4u) * key4(at, d + 4u);
        a2 += q4(d + 8u) * key4(at, d + 8u);
        a3 += q4(d + 12u) * key4(at, d + 12u);
    }
    let b = (a0 + a2) + (a1 + a3);
    let c = b.xy + b.zw;
    return c.x + c.y;
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let head = wg.x;
    let m = wg.y;
    let group = head / (HEADS / KV_HEADS);
    let from_ = (m * HEADS + head) * DIM;
    for (var d = lid; d < 256u; d += WG) {
        q[d] = 0.0;
        if d < DIM {
            q[d] = query[from_ + d];
        }
    }
    workgroupBarrier();
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
            score = dot_lanes(position * stride + group * DIM) * INV_SQRT_DIM;
        }
        let block_max = unordered(reduce_max_u32(lid, ordered(score)));
        let new_max = max(running_max, block_max);
        let weight = select(0.0, exp_f32(score - new_max), position < positions);
        weights[lid] = weight;
        // The reduction's barriers also publish `weights`.
        let block_total = reduce_sum_f32(lid, weight);
        let decay = exp_f32(running_max - new_max);
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
