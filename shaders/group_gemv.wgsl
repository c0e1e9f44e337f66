// group_gemv: binary or ternary matrix with a scale for each group of inputs × f32 vectors.
//   y[m, n] = Σ_g d[n, g] · Σ_{k in g} w[n, k]·x[m, k]
// +x, −x and 0 are made of x's bits (flip the sign, mask all) and added; the scale is the only
// product. TOKENS = 4 (prefill) unpacks a weight once for 4 tokens, 1 is the GEMV.
// | # | name   | type           | shape               | notes                                   |
// | 0 | pass   | uniform        | Pass                | n_tokens, or logit rows: LOGIT_ROWS = 1 |
// | 1 | w      | read vec4<u32> | [tiles, KC, 32]     | BINARY = 0: Z0 Z1 S0 S1, 64 columns     |
// |   |        |                |                     | (layout planes); 1: signs of 128        |
// | 2 | scales | read u32       | [tiles, GROUPS, 16] | f16 of two rows a word                  |
// | 3 | x      | read vec4<u32> | [M, K/4]            | bits of f32                             |
// | 4 | y      | read_write f32 | [M, STRIDE]         | rows ROW_BASE.., ROWS of them           |
// Workgroup: lane = row, S slices of K, 32·S lanes; grid (tiles, ceil(M/TOKENS), 1).
// Requires K % GROUP == 0 and GROUP % 64 == 0.
// Twin: cpu-ref/src/group_gemv.rs. Bound: its `bound`, that of any order of f32 sums.
#import pass

override S: u32 = 8u;
override K: u32 = 64u;
override GROUP: u32 = 64u;
override BINARY: u32 = 0u;
override TOKENS: u32 = 1u;
override ROW_BASE: u32 = 0u;
override ROWS: u32 = 32u;
override STRIDE: u32 = 32u;
override LOGIT_ROWS: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

// Component t: the sum of token t.
var<workgroup> slices: array<vec4<f32>, 256>;

fn signed_x(at: u32, flip: vec4<u32>, keep: vec4<u32>) -> vec4<f32> {
    if BINARY == 1u {
        return bitcast<vec4<f32>>(x[at] ^ flip);
    }
    return bitcast<vec4<f32>>((x[at] ^ flip) & keep);
}

// Σ w·x of 64 columns, x[at..] of each token: `some` has the bits of non-zero weights, `negative`
// those of −1.
fn block_sums(some: vec2<u32>, negative: vec2<u32>, at: vec4<u32>) -> vec4<f32> {
    var t0 = vec4(0.0);
    var t1 = vec4(0.0);
    var t2 = vec4(0.0);
    var t3 = vec4(0.0);
    for (var i = 0u; i < 16u; i++) {
        // The next four weights' bits.
        let first = (i & 7u) << 2u;
        let s = negative[i >> 3u] >> first;
        let z = bitcast<i32>(some[i >> 3u] >> first);
        let flip = (vec4(s) << vec4(31u, 30u, 29u, 28u)) & vec4(0x80000000u);
        let keep = bitcast<vec4<u32>>(vec4(
            extractBits(z, 0u, 1u),
            extractBits(z, 1u, 1u),
            extractBits(z, 2u, 1u),
            extractBits(z, 3u, 1u),
        ));
        t0 += signed_x(at.x + i, flip, keep);
        if TOKENS > 1u {
            t1 += signed_x(at.y + i, flip, keep);
            t2 += signed_x(at.z + i, flip, keep);
            t3 += signed_x(at.w + i, flip, keep);
        }
    }
    return vec4(
        (t0.x + t0.y) + (t0.z + t0.w),
        (t1.x + t1.y) + (t1.z + t1.w),
        (t2.x + t2.y) + (t2.z + t2.w),
        (t3.x + t3.y) + (t3.z + t3.w),
    );
}

fn scale_of(tile: u32, row: u32, k: u32) -> f32 {
    let pair = unpack2x16float(scales[(tile * (K / GROUP) + k / GROUP) * 16u + (row >> 1u)]);
    return select(pair.x, pair.y, (row & 1u) == 1u);
}

@compute @workgroup_size(32u * S)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = lid & 31u;
    let slice = lid >> 5u;
    let tile = wg.x;
    // Tokens past the last repeat it and are not stored.
    let last = select(pass_.n_tokens, pass_.n_logit_rows, LOGIT_ROWS == 1u) - 1u;
    let m = vec4(TOKENS * wg.y) + vec4(0u, 1u, 2u, 3u);
    let token = min(m, vec4(last)) * vec4(K / 4u);
    var sum = vec4(0.0);
    if BINARY == 1u {
        let all = vec2(0xffffffffu);
        let chunks = (K + 127u) / 128u;
        for (var c = slice; c < chunks; c += S) {
            let piece = w[(tile * chunks + c) * 32u + row];
            let k = 128u * c;
            let at = token + vec4(32u * c);
            var part = block_sums(all, piece.xy, at);
            if GROUP % 128u != 0u {
                sum += part * scale_of(tile, row, k);
                // Such groups, and K, may end in the middle of a chunk.
                if k + 64u < K {
                    sum += block_sums(all, piece.zw, at + vec4(16u)) * scale_of(tile, row, k + 64u);
                }
            } else {
                part += block_sums(all, piece.zw, at + vec4(16u));
                sum += part * scale_of(tile, row, k);
            }
        }
    } else {
        for (var c = slice; c < K / 64u; c += S) {
            let piece = w[(tile * (K / 64u) + c) * 32u + row];
            let part = block_sums(piece.xy, piece.zw, token + vec4(16u * c));
            sum += part * scale_of(tile, row, 64u * c);
        }
    }
    slices[lid] = sum;
    workgroupBarrier();
    let tile_row = tile * 32u + lid;
    if lid < 32u && tile_row < ROWS {
        var total = vec4(0.0);
        for (var s = 0u; s < S; s++) {
            total += slices[s * 32u + lid];
        }
        for (var t = 0u; t < TOKENS; t++) {
            if m[t] <= last {
                y[m[t] * STRIDE + ROW_BASE + tile_row] = total[t];
            }
        }
    }
}
