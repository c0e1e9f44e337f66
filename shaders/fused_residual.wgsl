// fused_residual: norm, quantise, matrix, residual of one token (decode).
//   out[n] = hidden[n] + Σ_k W[n, k]·quantize(rmsnorm(x))[k]
// | # | name   | type            | shape           | notes                                         |
// | 0 | pass   | uniform         | Pass            | unused: one token                             |
// | 1 | w      | read vec4<u32>  | [tiles, KC, 32] | layout planes or i2, as ENCODING is           |
// | 2 | x      | read f32        | [K]             |                                               |
// | 3 | norm   | read f32        | [K]             | NORM = 0: unused                              |
// | 4 | rows   | read vec2<u32>  | [32·tiles]      | offset and scale of each row                  |
// | 5 | hidden | read f32        | [N]             |                                               |
// | 6 | out    | read_write f32  | [N]             | another buffer than hidden                    |
// Workgroup: lane = row, S slices of K, ROWS·S lanes; grid (tiles·32/ROWS, 1, 1). Requires 16·UNITS +
// 4·SCRATCH bytes of workgroup memory.
// Twin: cpu-ref/src/residual.rs after rmsnorm.rs, quantize_absmax.rs and gemv.rs. Exact sums given equal codes; the
// codes and the result have the bounds of their own kernels.
#import pass
#import gemv_shape
#import planes_sum
#import i2_sum
#import signed_sum
#import half_pairs
#import half_sum
#import fused_gemv

override N: u32 = 32u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> norm: array<f32>;
@group(0) @binding(4) var<storage, read> rows: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read> hidden: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = quantize(lid);
    let row = wg.x * ROWS + lid % ROWS;
    let y = tile_rows(row >> 5u, row & 31u, lid, token);
    let n = TILE_BASE * 32u + row;
    if lid < ROWS && n < N {
        out[n] = hidden[n] + y;
    }
}
