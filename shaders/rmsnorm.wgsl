// rmsnorm: root-mean-square normalisation, one token a workgroup.
//   y[m, k] = w[k] · (x[m0+m, k] · r),   r = 1/√(mean_k(x²) + EPS)
// | # | name | type           | shape  | notes                                               |
// | 0 | pass | uniform        | Pass   | n_tokens, or the logit rows if LOGIT_ROWS = 1       |
// | 1 | x    | read f32       | [M, K] |                                                     |
// | 2 | w    | read f32       | [K]    |                                                     |
// | 3 | y    | read_write f32 | [M, K] | m0 = first_logit_row if LOGIT_ROWS = 1, else 0      |
// Workgroup: WG lanes reduce one row; grid (1, rows, 1).
// Twin: cpu-ref/src/rmsnorm.rs. WG is the 256 lanes of its sum. Bound: a few ULP from
// square root and division, which WGSL does not round exactly; equal bits where the device does.
#import pass
#import reduce_tree
#import rms

override WG: u32 = 256u;
override K: u32 = 64u;
override LOGIT_ROWS: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let rows = select(pass_.n_tokens, pass_.n_logit_rows, LOGIT_ROWS == 1u);
    let m0 = select(0u, pass_.first_logit_row, LOGIT_ROWS == 1u);
    let m = wg.y;
    let from_ = (m0 + m) * K;
    let r = inv_rms(lid, from_);
    if m < rows {
        for (var k = lid; k < K; k += WG) {
            y[m * K + k] = w[k] * (x[from_ + k] * r);
        }
    }
}
