// gemm_planes_few: ternary matrix × a few int8 vectors, addition-only; see gemv_planes.
//   acc[m, n] = Σ_k w[n,k]·q[m,k]
// Each weight piece is loaded once for TOKENS tokens: for batches too small for the tiles of
// gemm_planes.
// | # | name   | type           | shape             | notes                                    |
// | 0 | pass   | uniform        | Pass              | n_tokens                                 |
// | 1 | w      | read vec4<u32> | [tiles, KC, 32]   | Z0 Z1 S0 S1; layout/planes.rs            |
// | 2 | x      | read vec4<u32> | [M, 4·KC]         | bit planes of quantize_absmax            |
// | 3 | offset | read i32       | [32·tiles]        | negatives: number of −1 in each row      |
// | 4 | acc    | read_write i32 | [M, N_PAD]        | rows 32·TILE_BASE..                      |
// Workgroup: lane = row, S slices of K, 32·S lanes; grid (tiles, ceil(M/TOKENS), 1). S is 8.
// Twin: cpu-ref/src/gemm.rs. Exact.
#import pass
#import gemm_few

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<vec4<i32>, 256>;

// Bit counts of planes 0–3 and 4–7 of four tokens.
struct Counts {
    low0: vec4<u32>,
    low1: vec4<u32>,
    low2: vec4<u32>,
    low3: vec4<u32>,
    high0: vec4<u32>,
    high1: vec4<u32>,
    high2: vec4<u32>,
    high3: vec4<u32>,
}

// Four planes of one token's chunk, whose units are x[at] and x[at + 2].
fn count(piece: vec4<u32>, at: u32, sum: vec4<u32>) -> vec4<u32> {
    return countOneBits(vec4(piece.y) & (x[at + 2u] ^ vec4(piece.w)))
        + (countOneBits(vec4(piece.x) & (x[at] ^ vec4(piece.z))) + sum);
}

// `at`: the first unit of the chunk, of each of four tokens.
fn add(sums: Counts, piece: vec4<u32>, at: vec4<u32>) -> Counts {
    return Counts(
        count(piece, at.x, sums.low0),
        count(piece, at.y, sums.low1),
        count(piece, at.z, sums.low2),
        count(piece, at.w, sums.low3),
        count(piece, at.x + 1u, sums.high0),
        count(piece, at.y + 1u, sums.high1),
        count(piece, at.z + 1u, sums.high2),
        count(piece, at.w + 1u, sums.high3),
    );
}

fn weigh(low: vec4<u32>, high: vec4<u32>) -> i32 {
    let l = low << vec4(0u, 1u, 2u, 3u);
    let h = high << vec4(4u, 5u, 6u, 7u);
    return i32(l.x + l.y + l.z + l.w + h.x + h.y + h.z) - i32(h.w);
}

// Adds up the slices of four tokens and stores them.
fn store(tile: u32, lid: u32, four: vec4<u32>, c: Counts) {
    slices[lid] = vec4(
        weigh(c.low0, c.high0),
        weigh(c.low1, c.high1),
        weigh(c.low2, c.high2),
        weigh(c.low3, c.high3),
    );
    workgroupBarrier();
    if lid < 32u {
        var sum = vec4<i32>(0);
        for (var s = 0u; s < S; s++) {
            sum += slices[(s << 5u) + lid];
        }
        let row = (tile << 5u) + lid;
        sum += vec4(offset[row]);
        for (var t = 0u; t < 4u; t++) {
            if four[t] <= last_token() {
                acc[four[t] * N_PAD + (TILE_BASE << 5u) + row] = sum[t];
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
    var a = Counts();
    var b = Counts();
    for (var c = slice; c < KC; c += S) {
        let piece = w[(wg.x * KC + c) * 32u + row];
        a = add(a, piece, unit_of(four, c));
        if TOKENS > 4u {
            b = add(b, piece, unit_of(others, c));
        }
    }
    store(wg.x, lid, four, a);
    if TOKENS > 4u {
        workgroupBarrier();
        store(wg.x, lid, others, b);
    }
}
