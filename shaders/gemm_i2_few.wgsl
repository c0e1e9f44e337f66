// gemm_i2_few: ternary matrix × a few int8 vectors, packed dot product; see gemv_i2.
//   acc[m, n] = Σ_k w[n,k]·q[m,k]
// Each weight piece is loaded and masked once for TOKENS tokens: for batches too small for the tiles
// of gemm_i2.
// | # | name     | type           | shape             | notes                                  |
// | 0 | pass     | uniform        | Pass              | n_tokens                               |
// | 1 | w        | read vec4<u32> | [tiles, KC, 32]   | codes w+1; layout/i2.rs                |
// | 2 | x        | read vec4<u32> | [M, 4·KC]         | q+128 as bytes, natural order          |
// | 3 | offset   | read i32       | [32·tiles]        | −128·Σ(w+1) of each row                |
// | 4 | code_sum | read i32       | [M]               | Σ q                                    |
// | 5 | acc      | read_write i32 | [M, N_PAD]        | rows 32·TILE_BASE..                    |
// Workgroup: lane = row, S slices of K, 32·S lanes; grid (tiles, ceil(M/TOKENS), 1). S is 8.
// Twin: cpu-ref/src/gemm.rs. Exact for K ≤ 131,072, as gemv_i2.
#import pass
#import gemm_few

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read> code_sum: array<i32>;
@group(0) @binding(5) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<vec4<u32>, 256>;

fn dot16(codes: vec4<u32>, q: vec4<u32>, sum: u32) -> u32 {
    return dot4U8Packed(codes.w, q.w) + (dot4U8Packed(codes.z, q.z)
        + (dot4U8Packed(codes.y, q.y) + (dot4U8Packed(codes.x, q.x) + sum)));
}

// Component t of a field's sums: token t.
struct Sums {
    f0: vec4<u32>,
    f1: vec4<u32>,
    f2: vec4<u32>,
    f3: vec4<u32>,
}

fn field(codes: vec4<u32>, at: vec4<u32>, sums: vec4<u32>) -> vec4<u32> {
    return vec4(
        dot16(codes, x[at.x], sums.x),
        dot16(codes, x[at.y], sums.y),
        dot16(codes, x[at.z], sums.z),
        dot16(codes, x[at.w], sums.w),
    );
}

// `at`: the first unit of the chunk, of each of four tokens.
fn add(sums: Sums, piece: vec4<u32>, at: vec4<u32>) -> Sums {
    return Sums(
        field(piece & vec4(0x03030303u), at, sums.f0),
        field(piece & vec4(0x0c0c0c0cu), at + vec4(1u), sums.f1),
        field(piece & vec4(0x30303030u), at + vec4(2u), sums.f2),
        field(piece & vec4(0xc0c0c0c0u), at + vec4(3u), sums.f3),
    );
}

fn finish(sums: Sums) -> vec4<u32> {
    return sums.f0 + (sums.f1 >> vec4(2u)) + (sums.f2 >> vec4(4u)) + (sums.f3 >> vec4(6u));
}

// Adds up the slices of four tokens and stores them.
fn store(tile: u32, lid: u32, four: vec4<u32>, sums: vec4<u32>) {
    slices[lid] = sums;
    workgroupBarrier();
    if lid < 32u {
        var sum = vec4<u32>(0u);
        for (var s = 0u; s < S; s++) {
            sum += slices[s * 32u + lid];
        }
        let row = tile * 32u + lid;
        for (var t = 0u; t < 4u; t++) {
            if four[t] <= last_token() {
                acc[four[t] * N_PAD + TILE_BASE * 32u + row] =
                    i32(sum[t]) + offset[row] - code_sum[four[t]];
            }
        }
    }
}

@compute @workgroup_size(32u * S)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = lid & 31u;
    let slice = lid >> 5u;
    let four = TOKENS * wg.y + vec4(0u, 1u, 2u, 3u);
    let others = four + vec4(4u);
    var a = Sums();
    var b = Sums();
    for (var c = slice; c < KC; c += S) {
        let piece = w[(wg.x * KC + c) * 32u + row];
        a = add(a, piece, unit_of(four, c));
        if TOKENS > 4u {
            b = add(b, piece, unit_of(others, c));
        }
    }
    store(wg.x, lid, four, finish(a));
    if TOKENS > 4u {
        workgroupBarrier();
        store(wg.x, lid, others, finish(b));
    }
}
