// gemv_i2_signed: ternary matrix × int8 vector (decode), packed dot product of signed bytes.
//   acc[n] = Σ_k w[n,k]·q[k] = Σ_k (w+1)·q − Σ_k q
// As gemv_i2.wgsl, with the codes as they are: a row has no constant.
// | # | name     | type           | shape             | notes                                  |
// | 0 | pass     | uniform        | Pass              | unused: one token                      |
// | 1 | w        | read vec4<u32> | [tiles, KC, 32]   | codes w+1; layout/i2.rs                |
// | 2 | x        | read vec4<u32> | [4·KC]            | q as bytes, natural order              |
// | 3 | code_sum | read i32       | [1]               | Σ q                                    |
// | 4 | acc      | read_write i32 | [N_PAD]           | rows 32·TILE_BASE..                    |
// Workgroup: lane = row, S slices of K, ROWS·S lanes; grid (tiles·32/ROWS, 1, 1).
// Twin: cpu-ref/src/gemv.rs. Exact: a dot is at most 4·128·32, so K ≤ 131,072 cannot overflow.
#import pass
#import gemv_shape
#import signed_sum

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> code_sum: array<i32>;
@group(0) @binding(4) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<i32, LANES>;

fn unit(i: u32) -> vec4<u32> {
    return x[i];
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = wg.x * ROWS + lid % ROWS;
    let first = (row >> 5u) * KC * 32u + (row & 31u);
    slices[lid] = signed_sum(first, lid / ROWS);
    workgroupBarrier();
    if lid < ROWS {
        var sum = 0;
        for (var s = 0u; s < S; s++) {
            sum += slices[s * ROWS + lid];
        }
        acc[TILE_BASE * 32u + row] = sum - code_sum[0];
    }
}
