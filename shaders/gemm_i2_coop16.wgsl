// gemm_i2_coop16: ternary matrix × int8 matrix (prefill), cooperative matrices of 16 × 16; see shared/gemm_coop.wgsl.
//   acc[m, n] = Σ_k w[n,k]·q[m,k]
// Trits and codes are exact in f16, and in f32 so is every product and, up to 2^24 = 128·131,072, every
// sum of them in any order: the integers of gemm_i2.
// | # | name     | type           | shape             | notes                                  |
// | 0 | pass     | uniform        | Pass              | n_tokens                               |
// | 1 | w        | read vec4<u32> | [tiles, KC, 32]   | codes w+1; layout/i2.rs                |
// | 2 | x        | read vec4<u32> | [M, 4·KC]         | q+128 as bytes, natural order          |
// | 3 | acc      | read_write i32 | [M, N_PAD]        | rows 32·TILE_BASE..                    |
// Workgroup: SUBGROUP lanes compute 64 rows of 32 tokens, LANES of them R rows of T tokens;
// grid (ceil(ROWS / R), ceil(M / T), 1).
// Requires M ≤ MAX_TOKENS, f16, and cooperative matrices f16 × f16 + f32 of 16 × 16 × 16 on subgroups of
// SUBGROUP lanes or of fewer that divide it, in the order of the lanes.
// Twin: cpu-ref/src/gemm.rs. Exact for K ≤ 131,072.
enable f16;
enable wgpu_cooperative_matrix;

#import pass
#import gemm_coop

const SIZE: u32 = 16u;
alias Weights = coop_mat16x16<f16, A>;
alias Codes = coop_mat16x16<f16, B>;
alias Sums = coop_mat16x16<f32, C>;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> acc: array<i32>;

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    multiply_tile(wg, lid);
}
