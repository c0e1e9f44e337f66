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
// Workgroup: lane = row, S slices of K, 32·S lanes; grid (tiles, 1, 1).
// Twin: cpu-ref/src/gemv.rs. Exact: a dot is at most 4·128·255, so K ≤ 131,072 cannot overflow.
#import pass

override S: u32 = 8u;
override KC: u32 = 1u;
override TILE_BASE: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read> code_sum: array<i32>;
@group(0) @binding(5) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<u32, 256>;

fn dot16(codes: vec4<u32>, q: vec4<u32>) -> u32 {
    return dot4U8Packed(codes.x, q.x) + dot4U8Packed(codes.y, q.y)
        + dot4U8Packed(codes.z, q.z) + dot4U8Packed(codes.w, q.w);
}

@compute @workgroup_size(32u * S)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = lid & 31u;
    let slice = lid >> 5u;
    var a0 = 0u;
    var a1 = 0u;
    var a2 = 0u;
    var a3 = 0u;
    for (var c = slice; c < KC; c += S) {
        let piece = w[(wg.x * KC + c) * 32u + row];
        a0 += dot16(piece & vec4(0x03030303u), x[4u * c]);
        a1 += dot16(piece & vec4(0x0c0c0c0cu), x[4u * c + 1u]);
        a2 += dot16(piece & vec4(0x30303030u), x[4u * c + 2u]);
        a3 += dot16(piece & vec4(0xc0c0c0c0u), x[4u * c + 3u]);
    }
    slices[lid] = a0 + (a1 >> 2u) + (a2 >> 4u) + (a3 >> 6u);
    workgroupBarrier();
    if lid < 32u {
        var sum = 0u;
        for (var s = 0u; s < S; s++) {
            sum += slices[s * 32u + lid];
        }
        let tile_row = wg.x * 32u + lid;
        acc[TILE_BASE * 32u + tile_row] = i32(sum) + offset[tile_row] - code_sum[0];
    }
}
