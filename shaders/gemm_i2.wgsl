// gemm_i2: ternary matrix × int8 matrix (prefill), packed dot product; see gemv_i2.
//   acc[m, n] = Σ_k w[n,k]·q[m,k]
// A workgroup goes through K in chunks of 64: it unpacks the codes of its rows into workgroup memory
// once, beside those of its tokens; each lane then multiplies 8 rows by 4 tokens out of registers.
// The next chunk is loaded while this one is multiplied.
// | # | name     | type           | shape             | notes                                  |
// | 0 | pass     | uniform        | Pass              | n_tokens                               |
// | 1 | w        | read vec4<u32> | [tiles, KC, 32]   | codes w+1; layout/i2.rs                |
// | 2 | x        | read vec4<u32> | [M, 4·KC]         | q+128 as bytes, natural order          |
// | 3 | offset   | read i32       | [32·tiles]        | −128·Σ(w+1) of each row                |
// | 4 | code_sum | read i32       | [M]               | Σ q                                    |
// | 5 | acc      | read_write i32 | [M, N_PAD]        | rows 32·TILE_BASE..                    |
// Workgroup: LANES_R·LANES_T lanes compute 8·LANES_R rows of 4·LANES_T tokens;
// grid (ceil(ROWS / 8·LANES_R), ceil(M / 4·LANES_T), 1).
// Requires LANES_T ≥ 8, LANES_R ≥ 8, M ≤ MAX_TOKENS.
// Twin: cpu-ref/src/gemm.rs. Exact for K ≤ 131,072, as gemv_i2.
#import pass
#import gemm_tile

override W_UNITS: u32 = 512u; // 32·LANES_R: four of 16 codes a row
override X_UNITS: u32 = 260u; // 16·LANES_T + 4: four a token, and one that spreads them over banks

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read> code_sum: array<i32>;
@group(0) @binding(5) var<storage, read_write> acc: array<i32>;

var<workgroup> rows: array<vec4<u32>, W_UNITS>;   // [4, R]
var<workgroup> tokens: array<vec4<u32>, X_UNITS>; // [4, T + 1]

fn dot16(codes: vec4<u32>, q: vec4<u32>, sum: u32) -> u32 {
    return dot4U8Packed(codes.w, q.w) + (dot4U8Packed(codes.z, q.z)
        + (dot4U8Packed(codes.y, q.y) + (dot4U8Packed(codes.x, q.x) + sum)));
}

// A row's 16 codes times those of four tokens.
fn times(at: u32, q0: vec4<u32>, q1: vec4<u32>, q2: vec4<u32>, q3: vec4<u32>, sums: vec4<u32>) -> vec4<u32> {
    let codes = rows[at];
    return vec4(
        dot16(codes, q0, sums.x),
        dot16(codes, q1, sums.y),
        dot16(codes, q2, sums.z),
        dot16(codes, q3, sums.w),
    );
}

// The four fields of a byte are 16 columns apart.
fn unpack(at: u32, piece: vec4<u32>) {
    rows[at] = piece & vec4(0x03030303u);
    rows[R + at] = (piece >> vec4(2u)) & vec4(0x03030303u);
    rows[2u * R + at] = (piece >> vec4(4u)) & vec4(0x03030303u);
    rows[3u * R + at] = (piece >> vec4(6u)) & vec4(0x03030303u);
}

fn store(tile: Tile, row: u32, sums: vec4<u32>) {
    if row >= ROWS {
        return;
    }
    let from_ = TILE_BASE * 32u + row;
    for (var t = 0u; t < 4u; t++) {
        let m = tile.token + tile.lane_t + LANES_T * t;
        if m <= tile.last {
            acc[m * N_PAD + from_] = i32(sums[t]) + offset[row] - code_sum[m];
        }
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let tile = tile_of(wg, lid);
    let mine = loads_of(tile, lid);
    // Component t of a_i: row i's sum for token t.
    var a0 = vec4<u32>(0u);
    var a1 = vec4<u32>(0u);
    var a2 = vec4<u32>(0u);
    var a3 = vec4<u32>(0u);
    var a4 = vec4<u32>(0u);
    var a5 = vec4<u32>(0u);
    var a6 = vec4<u32>(0u);
    var a7 = vec4<u32>(0u);
    var piece = w[mine.piece];
    var unit = x[mine.unit];
    var other = x[mine.other];
    for (var c = 0u; c < KC; c++) {
        if lid < R {
            unpack(lid, piece);
        }
        tokens[mine.slot] = unit;
        if 4u * T > LANES {
            tokens[mine.other_slot] = other;
        }
        workgroupBarrier();
        let next = min(c + 1u, KC - 1u);
        piece = w[mine.piece + 32u * next];
        unit = x[mine.unit + 4u * next];
        if 4u * T > LANES {
            other = x[mine.other + 4u * next];
        }
        for (var j = 0u; j < 4u; j++) {
            let from_ = j * (T + 1u) + tile.lane_t;
            let q0 = tokens[from_];
            let q1 = tokens[from_ + LANES_T];
            let q2 = tokens[from_ + 2u * LANES_T];
            let q3 = tokens[from_ + 3u * LANES_T];
            let row = j * R + tile.lane_r;
            a0 = times(row, q0, q1, q2, q3, a0);
            a1 = times(row + LANES_R, q0, q1, q2, q3, a1);
            a2 = times(row + 2u * LANES_R, q0, q1, q2, q3, a2);
            a3 = times(row + 3u * LANES_R, q0, q1, q2, q3, a3);
            a4 = times(row + 4u * LANES_R, q0, q1, q2, q3, a4);
            a5 = times(row + 5u * LANES_R, q0, q1, q2, q3, a5);
            a6 = times(row + 6u * LANES_R, q0, q1, q2, q3, a6);
            a7 = times(row + 7u * LANES_R, q0, q1, q2, q3, a7);
        }
        workgroupBarrier();
    }
    let row = tile.row + tile.lane_r;
    store(tile, row, a0);
    store(tile, row + LANES_R, a1);
    store(tile, row + 2u * LANES_R, a2);
    store(tile, row + 3u * LANES_R, a3);
    store(tile, row + 4u * LANES_R, a4);
    store(tile, row + 5u * LANES_R, a5);
    store(tile, row + 6u * LANES_R, a6);
    store(tile, row + 7u * LANES_R, a7);
}
