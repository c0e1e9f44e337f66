// gemm_planes: ternary matrix × int8 matrix (prefill), addition-only; see gemv_planes.
//   acc[m, n] = Σ_k w[n,k]·q[m,k]
// Each weight piece is loaded once for 4 tokens.
// | # | name   | type           | shape             | notes                                    |
// | 0 | pass   | uniform        | Pass              | n_tokens                                 |
// | 1 | w      | read vec4<u32> | [tiles, KC, 32]   | Z0 Z1 S0 S1; layout/planes.rs            |
// | 2 | x      | read vec4<u32> | [M, 4·KC]         | bit planes of quantize_absmax            |
// | 3 | offset | read i32       | [32·tiles]        | negatives: number of −1 in each row      |
// | 4 | acc    | read_write i32 | [M, N_PAD]        | rows 32·TILE_BASE..                      |
// Workgroup: lane = row, S slices of K, 32·S lanes; grid (tiles, ceil(M/4), 1).
// Twin: cpu-ref/src/gemm.rs. Exact.
#import pass

override S: u32 = 8u;
override KC: u32 = 1u;
override N_PAD: u32 = 32u;
override TILE_BASE: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<vec4<i32>, 256>;

// Bit counts of planes 0–3 and 4–7 of one token's chunk at x[at].
fn count_low(piece: vec4<u32>, at: u32) -> vec4<u32> {
    return countOneBits(vec4(piece.x) & (x[at] ^ vec4(piece.z)))
        + countOneBits(vec4(piece.y) & (x[at + 2u] ^ vec4(piece.w)));
}

fn count_high(piece: vec4<u32>, at: u32) -> vec4<u32> {
    return countOneBits(vec4(piece.x) & (x[at + 1u] ^ vec4(piece.z)))
        + countOneBits(vec4(piece.y) & (x[at + 3u] ^ vec4(piece.w)));
}

fn weigh(low: vec4<u32>, high: vec4<u32>) -> i32 {
    let l = low << vec4(0u, 1u, 2u, 3u);
    let h = high << vec4(4u, 5u, 6u, 7u);
    return i32(l.x + l.y + l.z + l.w + h.x + h.y + h.z) - i32(h.w);
}

@compute @workgroup_size(32u * S)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = lid & 31u;
    let slice = lid >> 5u;
    // Tokens past the last repeat it and are not stored.
    let last = pass_.n_tokens - 1u;
    let m = vec4(wg.y << 2u) + vec4(0u, 1u, 2u, 3u);
    let token = min(m, vec4(last)) * vec4(4u * KC);
    var low0 = vec4<u32>(0u);
    var low1 = vec4<u32>(0u);
    var low2 = vec4<u32>(0u);
    var low3 = vec4<u32>(0u);
    var high0 = vec4<u32>(0u);
    var high1 = vec4<u32>(0u);
    var high2 = vec4<u32>(0u);
    var high3 = vec4<u32>(0u);
    for (var c = slice; c < KC; c += S) {
        let piece = w[(wg.x * KC + c) * 32u + row];
        let at = token + vec4(c << 2u);
        low0 += count_low(piece, at.x);
        high0 += count_high(piece, at.x);
        low1 += count_low(piece, at.y);
        high1 += count_high(piece, at.y);
        low2 += count_low(piece, at.z);
        high2 += count_high(piece, at.z);
        low3 += count_low(piece, at.w);
        high3 += count_high(piece, at.w);
    }
    slices[lid] =
        vec4(weigh(low0, high0), weigh(low1, high1), weigh(low2, high2), weigh(low3, high3));
    workgroupBarrier();
    if lid < 32u {
        var sum = vec4<i32>(0);
        for (var s = 0u; s < S; s++) {
            sum += slices[(s << 5u) + lid];
        }
        let tile_row = (wg.x << 5u) + lid;
        sum += vec4(offset[tile_row]);
        for (var t = 0u; t < 4u; t++) {
            if m[t] <= last {
                acc[m[t] * N_PAD + (TILE_BASE << 5u) + tile_row] = sum[t];
            }
        }
    }
}
