// residual_add: matrix sums → scaled, added to the residual stream.
//   out[m, n] = hidden[m, n] + y[m, n]
// | # | name         | type           | shape      | notes                                  |
// | 0 | pass         | uniform        | Pass       | n_tokens                               |
// | 1 | hidden       | read f32       | [M, N]     |                                        |
// | 2 | acc          | read i32       | [M, N_PAD] |                                        |
// | 3 | weight_scale | read f32       | [N_PAD]    |                                        |
// | 4 | act_scale    | read f32       | [M]        |                                        |
// | 5 | out          | read_write f32 | [M, N]     | another buffer than hidden             |
// Workgroup: WG lanes, one element each; grid (ceil(N/WG), M, 1).
// Twin: cpu-ref/src/residual.rs. Bound: 2 ULP of |hidden| + |y|.
#import pass
#import bitlinear

override WG: u32 = 64u;
override N: u32 = 32u;
override N_PAD: u32 = 32u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> hidden: array<f32>;
@group(0) @binding(2) var<storage, read> acc: array<i32>;
@group(0) @binding(3) var<storage, read> weight_scale: array<f32>;
@group(0) @binding(4) var<storage, read> act_scale: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    let n = wg.x * WG + lid;
    if m >= pass_.n_tokens || n >= N {
        return;
    }
    out[m * N + n] = hidden[m * N + n] + bitlinear(m, n);
}
