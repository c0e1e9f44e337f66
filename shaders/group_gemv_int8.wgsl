// group_gemv_int8: binary or ternary matrix with a scale for each group of inputs × int8 vectors.
//   y[m, n] = Σ_g f32(Σ_{k in g} w[n, k]·q[m, k]) · (d[n, g] · act_scale[m, g])
// A group's sum is exact and bit-serial, by additions only (see gemv_planes; −q = ¬q + 1, so the
// number of −1 is added). TOKENS = 4 (prefill) loads a weight once for 4 tokens, 1 is the GEMV.
// | # | name      | type           | shape               | notes                                |
// | 0 | pass      | uniform        | Pass                | n_tokens                             |
// | 1 | w         | read vec4<u32> | [tiles, KC, 32]     | BINARY = 0: Z0 Z1 S0 S1, 64 columns  |
// |   |           |                |                     | (layout planes); 1: signs of 128     |
// | 2 | scales    | read u32       | [tiles, GROUPS, 16] | f16 of two rows a word               |
// | 3 | x         | read vec4<u32> | [M, K/16]           | bit planes of quantize_absmax_groups |
// | 4 | act_scale | read f32       | [M, GROUPS]         |                                      |
// | 5 | y         | read_write f32 | [M, STRIDE]         | rows ROW_BASE.., ROWS of them        |
// Workgroup: lane = row, group g goes to slice g mod 8; grid (tiles, ceil(M/TOKENS), 1).
// Requires K % GROUP == 0 and GROUP % 64 == 0.
// Twin: cpu-ref/src/group_gemv.rs, `group_dot_int8`; the slices are the lanes of its sum. Bound: a
// few ULP of Σ|d·act_scale·sum| where products and sums are fused; equal bits elsewhere.
#import pass

override S: u32 = 8u;
override K: u32 = 64u;
override GROUP: u32 = 64u;
override BINARY: u32 = 0u;
override TOKENS: u32 = 1u;
override ROW_BASE: u32 = 0u;
override ROWS: u32 = 32u;
override STRIDE: u32 = 32u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> act_scale: array<f32>;
@group(0) @binding(5) var<storage, read_write> y: array<f32>;

// Component t: the sum of token t.
var<workgroup> slices: array<vec4<f32>, 256>;

// Z0 Z1 S0 S1 of block b of group g, 64 columns.
fn piece_at(tile: u32, row: u32, g: u32, b: u32) -> vec4<u32> {
    let c = g * (GROUP / 64u) + b;
    if BINARY == 1u {
        let chunks = (K + 127u) / 128u;
        let pair = w[(tile * chunks + (c >> 1u)) * 32u + row];
        // Where chunks do not cross groups, b alone tells the half: a constant when unrolled.
        let half = (select(c, b, GROUP % 128u == 0u) & 1u) << 1u;
        return vec4(0xffffffffu, 0xffffffffu, pair[half], pair[half + 1u]);
    }
    return w[(tile * (K / 64u) + c) * 32u + row];
}

fn count(some: u32, negative: u32, planes: vec4<u32>) -> vec4<u32> {
    if BINARY == 1u {
        return countOneBits(planes ^ vec4(negative));
    }
    return countOneBits(vec4(some) & (planes ^ vec4(negative)));
}

// Bit counts of planes 0–3 and 4–7 of one token's block at x[at].
fn count_low(piece: vec4<u32>, at: u32) -> vec4<u32> {
    return count(piece.x, piece.z, x[at]) + count(piece.y, piece.w, x[at + 2u]);
}

fn count_high(piece: vec4<u32>, at: u32) -> vec4<u32> {
    return count(piece.x, piece.z, x[at + 1u]) + count(piece.y, piece.w, x[at + 3u]);
}

fn weigh(low: vec4<u32>, high: vec4<u32>) -> i32 {
    let l = low << vec4(0u, 1u, 2u, 3u);
    let h = high << vec4(4u, 5u, 6u, 7u);
    return i32(l.x + l.y + l.z + l.w + h.x + h.y + h.z) - i32(h.w);
}

// Σ w·q of group g, for each token.
fn group_sums(tile: u32, row: u32, g: u32, token: vec4<u32>) -> vec4<i32> {
    var low0 = vec4<u32>(0u);
    var low1 = vec4<u32>(0u);
    var low2 = vec4<u32>(0u);
    var low3 = vec4<u32>(0u);
    var high0 = vec4<u32>(0u);
    var high1 = vec4<u32>(0u);
    var high2 = vec4<u32>(0u);
    var high3 = vec4<u32>(0u);
    var negatives = 0u;
    for (var b = 0u; b < GROUP / 64u; b++) {
        let piece = piece_at(tile, row, g, b);
        let at = token + vec4((g * (GROUP / 64u) + b) << 2u);
        negatives += countOneBits(piece.z) + countOneBits(piece.w);
        low0 += count_low(piece, at.x);
        high0 += count_high(piece, at.x);
        if TOKENS > 1u {
            low1 += count_low(piece, at.y);
            high1 += count_high(piece, at.y);
            low2 += count_low(piece, at.z);
            high2 += count_high(piece, at.z);
            low3 += count_low(piece, at.w);
            high3 += count_high(piece, at.w);
        }
    }
    let sums = vec4(weigh(low0, high0), weigh(low1, high1), weigh(low2, high2), weigh(low3, high3));
    return sums + vec4(i32(negatives));
}

fn scale_of(tile: u32, row: u32, g: u32) -> f32 {
    let pair = unpack2x16float(scales[(tile * (K / GROUP) + g) * 16u + (row >> 1u)]);
    return select(pair.x, pair.y, (row & 1u) == 1u);
}

@compute @workgroup_size(32u * S)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = lid & 31u;
    let slice = lid >> 5u;
    let groups = K / GROUP;
    // Tokens past the last repeat it and are not stored.
    let last = pass_.n_tokens - 1u;
    let m = vec4(TOKENS * wg.y) + vec4(0u, 1u, 2u, 3u);
    let token = min(m, vec4(last));
    var sum = vec4(0.0);
    for (var g = slice; g < groups; g += S) {
        let exact = vec4<f32>(group_sums(wg.x, row, g, token * vec4(K / 16u)));
        let at = token * vec4(groups) + vec4(g);
        var act = vec4(act_scale[at.x]);
        if TOKENS > 1u {
            act = vec4(act.x, act_scale[at.y], act_scale[at.z], act_scale[at.w]);
        }
        sum += exact * (vec4(scale_of(wg.x, row, g)) * act);
    }
    slices[lid] = sum;
    workgroupBarrier();
    for (var step = S / 2u; step > 0u; step /= 2u) {
        if slice < step {
            slices[lid] += slices[lid + 32u * step];
        }
        workgroupBarrier();
    }
    let tile_row = wg.x * 32u + lid;
    if lid < 32u && tile_row < ROWS {
        for (var t = 0u; t < TOKENS; t++) {
            if m[t] <= last {
                y[m[t] * STRIDE + ROW_BASE + tile_row] = slices[lid][t];
            }
        }
    }
}
