// gemv_planes: ternary matrix × int8 vector (decode), addition-only.
//   acc[n] = Σ_k w[n,k]·q[k],   w ∈ {−1,0,+1}, q ∈ [−128,127]
// Bit-serial: with Z the non-zero plane, S the sign plane and X_j bit j of q,
//   Σ w·q = Σ_j c_j · popcount(Z & (X_j ^ S)) + negatives,   c_j = 2^j, c_7 = −128,
// because −q = ¬q + 1. The loop is xor, and, popcount, add; the powers of two are shifts after it.
// | # | name   | type           | shape             | notes                                    |
// | 0 | pass   | uniform        | Pass              | unused: one token                        |
// | 1 | w      | read vec4<u32> | [tiles, KC, 32]   | Z0 Z1 S0 S1; layout/planes.rs            |
// | 2 | x      | read vec4<u32> | [4·KC]            | bit planes of quantize_absmax            |
// | 3 | offset | read i32       | [32·tiles]        | negatives: number of −1 in each row      |
// | 4 | acc    | read_write i32 | [N_PAD]           | rows 32·TILE_BASE..                      |
// Workgroup: lane = row, S slices of K, ROWS·S lanes; grid (tiles·32/ROWS, 1, 1).
// Twin: cpu-ref/src/gemv.rs. Exact.
#import pass
#import gemv_shape
#import planes_sum

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<i32, LANES>;

fn unit(i: u32) -> vec4<u32> {
    return x[i];
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = wg.x * ROWS + lid % ROWS;
    let first = (row >> 5u) * KC * 32u + (row & 31u);
    slices[lid] = planes_sum(first, lid / ROWS);
    workgroupBarrier();
    if lid < ROWS {
        var sum = 0;
        for (var s = 0u; s < S; s++) {
            sum += slices[s * ROWS + lid];
        }
        acc[TILE_BASE * 32u + row] = sum + offset[row];
    }
}
