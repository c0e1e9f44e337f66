// fused_gated: norm, quantise, gate and up matrices, activation of one token (decode).
//   z[i] = act(gate[i])·up[i],   gate and up = W·quantize(rmsnorm(x))
// | # | name | type            | shape             | notes                                         |
// | 0 | pass | uniform         | Pass              | unused: one token                             |
// | 1 | w    | read vec4<u32>  | [2·tiles, KC, 32] | tile 2t: rows 32t.. of gate; 2t + 1: of up    |
// | 2 | x    | read f32        | [K]               |                                               |
// | 3 | norm | read f32        | [K]               | NORM = 0: unused                              |
// | 4 | rows | read vec2<u32>  | [64·tiles]        | offset and scale of each row                  |
// | 5 | z    | read_write f32  | [F]               |                                               |
// Workgroup: lane = row, S slices of K, ROWS·S lanes; grid (tiles·32/ROWS, 1, 1). TILE_BASE is even.
// ACT: 0 relu², 1 SiLU. Requires 16·UNITS + 4·SCRATCH bytes of workgroup memory.
// Twin: cpu-ref/src/mlp.rs after rmsnorm.rs, quantize_absmax.rs and gemv.rs. Exact sums given equal
// codes; the codes and the result have the bounds of their own kernels.
#import pass
#import gemv_shape
#import planes_sum
#import i2_sum
#import signed_sum
#import half_pairs
#import half_sum
#import fused_gemv
#import exp

override F: u32 = 32u;
override ACT: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> norm: array<f32>;
@group(0) @binding(4) var<storage, read> rows: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> z: array<f32>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = quantize(lid);
    let row = wg.x * ROWS + lid % ROWS;
    let gate = tile_rows(2u * (row >> 5u), row & 31u, lid, token);
    let up = tile_rows(2u * (row >> 5u) + 1u, row & 31u, lid, token);
    let i = TILE_BASE * 16u + row;
    if lid >= ROWS || i >= F {
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
