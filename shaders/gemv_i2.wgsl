// gemv_i2: ternary matrix × int8 vector (decode), packed dot product.
//   acc[n] = Σ_k w[n,k]·q[k] = Σ_k (w+1)(q+128) − 128·Σ_k (w+1) − Σ_k q
// The four 2-bit fields of a byte are masked in place (03, 0c, 30, c0) and summed apart; their
// sums, not the fields, are shifted: every term of a sum is a multiple of the shift.
// | # | name     | type           | shape             | notes                                  |
// | 0 | pass     | uniform        | Pass              | unused: one token                      |
// | 1 | w        | read vec4<u32> | [tiles, KC, 32]   | codes w+1; layout/i2.rs                |
// | 2 | x        | read vec4<u32> | [4·KC]            | q+128 as bytes, natural order          |
// | 3 | offset   | read i32       | [32·tiles]        | −128·Σ(w+1) of each row                |
// | 4 | code_sum | read i32       | [1]               | Σ q                                    |
// | 5 | acc      | read_write i32 | [N_PAD]           | rows 32·TILE_BASE..                    |
// Workgroup: lane = row, S slices of K, ROWS·S lanes; grid (tiles·32/ROWS, 1, 1).
// Twin: cpu-ref/src/gemv.rs. Exact: a dot is at most 4·128·255, so K ≤ 131,072 cannot overflow.
#import pass
#import gemv_shape
#import i2_sum

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read> code_sum: array<i32>;
@group(0) @binding(5) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<i32, LANES>;

fn unit(i: u32) -> vec4<u32> {
    return x[i];
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = wg.x * ROWS + lid % ROWS;
    let first = (row >> 5u) * KC * 32u + (row & 31u);
    slices[lid] = i2_sum(first, lid / ROWS);
    workgroupBarrier();
    if lid < ROWS {
        var sum = 0;
        for (var s = 0u; s < S; s++) {
            sum += slices[s * ROWS + lid];
        }
        acc[TILE_BASE * 32u + row] = sum + offset[row] - code_sum[0];
    }
}
