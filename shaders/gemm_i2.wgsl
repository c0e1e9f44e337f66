// gemm_i2: ternary matrix × int8 matrix (prefill), packed dot product; see gemv_i2.
//   acc[m, n] = Σ_k w[n,k]·q[m,k]
// Each weight piece is loaded and masked once for 4 tokens.
// | # | name     | type           | shape             | notes                                  |
// | 0 | pass     | uniform        | Pass              | n_tokens                               |
// | 1 | w        | read vec4<u32> | [tiles, KC, 32]   | codes w+1; layout/i2.rs                |
// | 2 | x        | read vec4<u32> | [M, 4·KC]         | q+128 as bytes, natural order          |
// | 3 | offset   | read i32       | [32·tiles]        | −128·Σ(w+1) of each row                |
// | 4 | code_sum | read i32       | [M]               | Σ q                                    |
// | 5 | acc      | read_write i32 | [M, N_PAD]        | rows 32·TILE_BASE..                    |
// Workgroup: lane = row, S slices of K, 32·S lanes; grid (tiles, ceil(M/4), 1).
// Twin: cpu-ref/src/gemm.rs. Exact for K ≤ 131,072, as gemv_i2.
#import pass

override S: u32 = 8u;
override KC: u32 = 1u;
override N_PAD: u32 = 32u;
override TILE_BASE: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read> code_sum: array<i32>;
@group(0) @binding(5) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<vec4<u32>, 256>;

fn dot16(codes: vec4<u32>, q: vec4<u32>) -> u32 {
    return dot4U8Packed(codes.x, q.x) + dot4U8Packed(codes.y, q.y)
        + dot4U8Packed(codes.z, q.z) + dot4U8Packed(codes.w, q.w);
}

@compute @workgroup_size(32u * S)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = lid & 31u;
    let slice = lid >> 5u;
    // Tokens past the last repeat it and are not stored.
    let last = pass_.n_tokens - 1u;
    let m = vec4(4u * wg.y) + vec4(0u, 1u, 2u, 3u);
    let token = min(m, vec4(last)) * vec4(4u * KC);
    // Component t of a_j: field j's sum for token t.
    var a0 = vec4<u32>(0u);
    var a1 = vec4<u32>(0u);
    var a2 = vec4<u32>(0u);
    var a3 = vec4<u32>(0u);
    for (var c = slice; c < KC; c += S) {
        let piece = w[(wg.x * KC + c) * 32u + row];
        let at = token + vec4(4u * c);
        let f0 = piece & vec4(0x03030303u);
        a0 += vec4(dot16(f0, x[at.x]), dot16(f0, x[at.y]), dot16(f0, x[at.z]), dot16(f0, x[at.w]));
        let f1 = piece & vec4(0x0c0c0c0cu);
        a1 += vec4(
            dot16(f1, x[at.x + 1u]),
            dot16(f1, x[at.y + 1u]),
            dot16(f1, x[at.z + 1u]),
            dot16(f1, x[at.w + 1u]),
        );
        let f2 = piece & vec4(0x30303030u);
        a2 += vec4(
            dot16(f2, x[at.x + 2u]),
            dot16(f2, x[at.y + 2u]),
            dot16(f2, x[at.z + 2u]),
            dot16(f2, x[at.w + 2u]),
        );
        let f3 = piece & vec4(0xc0c0c0c0u);
        a3 += vec4(
            dot16(f3, x[at.x + 3u]),
            dot16(f3, x[at.y + 3u]),
            dot16(f3, x[at.z + 3u]),
            dot16(f3, x[at.w + 3u]),
        );
    }
    slices[lid] = a0 + (a1 >> vec4(2u)) + (a2 >> vec4(4u)) + (a3 >> vec4(6u));
    workgroupBarrier();
    if lid < 32u {
        var sum = vec4<u32>(0u);
        for (var s = 0u; s < S; s++) {
            sum += slices[s * 32u + lid];
        }
        let tile_row = wg.x * 32u + lid;
        for (var t = 0u; t < 4u; t++) {
            if m[t] <= last {
                acc[m[t] * N_PAD + TILE_BASE * 32u + tile_row] =
                    i32(sum[t]) + offset[tile_row] - code_sum[m[t]];
            }
        }
    }
}
