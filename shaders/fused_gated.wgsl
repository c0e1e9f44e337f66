// fused_gated: norm, quantise, gate and up matrices, activation of one token (decode).
//   z[i] = act(gate[i])·up[i],   gate and up = W·quantize(rmsnorm(x))
// | # | name | type            | shape             | notes                                         |
// | 0 | pass | uniform         | Pass              | unused: one token                             |
// | 1 | w    | read vec4<u32>  | [2·tiles, KC, 32] | tile 2t: rows 32t.. of gate; 2t + 1: of up    |
// | 2 | x    | read f32        | [K]               |                                               |
// | 3 | norm | read f32        | [K]               | NORM = 0: unused                              |
// | 4 | rows | read vec2<u32>  | [64·tiles]        | offset and scale of each row                  |
// | 5 | z    | read_write f32  | [F]               |                                               |
// Workgroup: lane = row, 8 slices of K; grid (tiles, 1, 1). ACT: 0 relu², 1 SiLU. Requires
// 64·KC + 2048 bytes of workgroup memory.
// Twin: cpu-ref/src/mlp.rs after rmsnorm.rs, quantize_absmax.rs and gemv.rs. Exact sums given equal
// codes; the codes and the result have the bounds of their own kernels.
#import pass
#import reduce_tree
#import fused_gemv
#import exp

override WG: u32 = 256u;
override F: u32 = 32u;
override ACT: u32 = 0u;
override TILE_BASE: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> norm: array<f32>;
@group(0) @binding(4) var<storage, read> rows: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> z: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = quantize(lid);
    let gate = tile_rows(2u * wg.x, lid, token);
    let up = tile_rows(2u * wg.x + 1u, lid, token);
    let i = (TILE_BASE / 2u + wg.x) * 32u + lid;
    if lid >= 32u || i >= F {
        return;
    }
    if ACT == 0u {
        // Not max(gate, 0): that may turn NaN into 0.
        let positive = select(gate, 0.0, gate < 0.0);
        z[i] = positive * positive * up;
    } else {
        z[i] = gate / (1.0 + exp_f32(-gate)) * up;
    }
}
