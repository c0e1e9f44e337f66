// fused_residual: norm, quantise, matrix, residual of one token (decode).
//   out[n] = hidden[n] + Σ_k W[n, k]·quantize(rmsnorm(x))[k]
// | # | name   | type            | shape           | notes                                         |
// | 0 | pass   | uniform         | Pass            | unused: one token                             |
// | 1 | w      | read vec4<u32>  | [tiles, KC, 32] | layout planes (PLANES = 1) or i2              |
// | 2 | x      | read f32        | [K]             |                                               |
// | 3 | norm   | read f32        | [K]             | NORM = 0: unused                              |
// | 4 | rows   | read vec2<u32>  | [32·tiles]      | offset and scale of each row                  |
// | 5 | hidden | read f32        | [N]             |                                               |
// | 6 | out    | read_write f32  | [N]             | another buffer than hidden                    |
// Workgroup: lane = row, 8 slices of K; grid (tiles, 1, 1). Requires 64·KC + 2048 bytes of workgroup
// memory.
// Twin: cpu-ref/src/residual.rs after rmsnorm.rs, quantize_absmax.rs and gemv.rs. Exact sums given equal codes; the
// codes and the result have the bounds of their own kernels.
#import pass
#import reduce_tree
#import fused_gemv

override WG: u32 = 256u;
override N: u32 = 32u;
override TILE_BASE: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<f32>;
@group(0) @binding(3) var<storage, read> norm: array<f32>;
@group(0) @binding(4) var<storage, read> rows: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read> hidden: array<f32>;
@group(0) @binding(6) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let token = quantize(lid);
    let y = tile_rows(wg.x, lid, token);
    let n = (TILE_BASE + wg.x) * 32u + lid;
    if lid < 32u && n < N {
        out[n] = hidden[n] + y;
    }
}
