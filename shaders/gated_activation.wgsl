// gated_activation: gate and up sums → scaled, act(gate)·up.
//   z[m, i] = act(y[m, i]) · y[m, F + i]
// | # | name         | type           | shape      | notes                                  |
// | 0 | pass         | uniform        | Pass       | n_tokens                               |
// | 1 | acc          | read i32       | [M, N_PAD] | rows: F of gate, then F of up          |
// | 2 | weight_scale | read f32       | [N_PAD]    |                                        |
// | 3 | act_scale    | read f32       | [M]        |                                        |
// | 4 | z            | read_write f32 | [M, F]     | f32: relu² overflows f16               |
// Workgroup: WG lanes, one element each; grid (ceil(F/WG), M, 1). ACT: 0 relu², 1 SiLU.
// Twin: cpu-ref/src/mlp.rs. Bound: 3 ULP for relu²; for SiLU a division's 2.5 ULP
// and what fused products change in exp. Equal bits where products and sums are rounded apart.
#import pass
#import bitlinear
#import exp

override WG: u32 = 64u;
override N_PAD: u32 = 32u;
override F: u32 = 16u;
override ACT: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> acc: array<i32>;
@group(0) @binding(2) var<storage, read> weight_scale: array<f32>;
@group(0) @binding(3) var<storage, read> act_scale: array<f32>;
@group(0) @binding(4) var<storage, read_write> z: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    let i = wg.x * WG + lid;
    if m >= pass_.n_tokens || i >= F {
        return;
    }
    let gate = bitlinear(m, i);
    let up = bitlinear(m, F + i);
    if ACT == 0u {
        // Not max(gate, 0): that may turn NaN into 0.
        let positive = select(gate, 0.0, gate < 0.0);
        z[m * F + i] = positive * positive * up;
    } else {
        z[m * F + i] = gate / (1.0 + exp_f32(-gate)) * up;
    }
}
