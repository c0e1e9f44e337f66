// head_norm: Q, K, V sums → scaled, Q and K heads through RMSNorm.
//   y[m, h, i] = w[i] · (v[i] · r),  r = 1/√(mean_i(v²) + EPS),  v = row h·D + i;  V: y = v
// | # | name         | type           | shape      | notes                                  |
// | 0 | pass         | uniform        | Pass       | n_tokens                               |
// | 1 | acc          | read i32       | [M, N_PAD] | rows: Q heads, K heads, V heads        |
// | 2 | weight_scale | read f32       | [N_PAD]    |                                       |
// | 3 | act_scale    | read f32       | [M]        | of each run, see shared/bitlinear      |
// | 4 | query_norm   | read f32       | [D]        |                                        |
// | 5 | key_norm     | read f32       | [D]        |                                        |
// | 6 | y            | read_write f32 | [M, OUT]   | OUT = (H + 2G)·D, padded               |
// Workgroup: WG lanes, one element of a head each; grid (H + 2G, M, 1). Requires D ≤ WG.
// Twin: cpu-ref/src/rmsnorm.rs. WG is the 256 lanes of its sum. Bound: a few ULP from
// square root and division, which WGSL does not round exactly; equal bits where the device does.
#import pass
#import bitlinear
#import reduce_tree

override WG: u32 = 256u;
override N_PAD: u32 = 32u;
override OUT: u32 = 32u;
override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 2u;
override EPS: f32 = 1e-6;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> acc: array<i32>;
@group(0) @binding(2) var<storage, read> weight_scale: array<f32>;
@group(0) @binding(3) var<storage, read> act_scale: array<f32>;
@group(0) @binding(4) var<storage, read> query_norm: array<f32>;
@group(0) @binding(5) var<storage, read> key_norm: array<f32>;
@group(0) @binding(6) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let head = wg.x;
    let m = wg.y;
    let n = head * DIM + lid;
    var value = 0.0;
    if lid < DIM {
        value = bitlinear(m, n);
    }
    let r = 1.0 / sqrt(reduce_sum_f32(lid, value * value) / f32(DIM) + EPS);
    if lid >= DIM || m >= pass_.n_tokens {
        return;
    }
    if head < HEADS {
        value = query_norm[lid] * (value * r);
    } else if head < HEADS + KV_HEADS {
        value = key_norm[lid] * (value * r);
    }
    y[m * OUT + n] = value;
}
