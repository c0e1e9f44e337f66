// group_embedding: token ids → residual stream, from a binary or ternary table with a scale for
// each group of a row.
//   out[m, k] = d[n, g] · w[n, k],  n = tokens[token_in + m]   for the tokens whose row is in this shard
// | # | name   | type           | shape               | notes                                  |
// | 0 | pass   | uniform        | Pass                | n_tokens                               |
// | 1 | tokens | read u32       | [token_in + M]      | below V, or no row is written          |
// | 2 | w      | read u32       | [tiles, KC, 32, 4]  | as in group_gemv                       |
// | 3 | scales | read u32       | [tiles, GROUPS, 16] | f16 of two rows a word                 |
// | 4 | out    | read_write f32 | [M, K]              |                                        |
// Workgroup: WG lanes, one element each; grid (ceil(K/WG), M, 1), once per shard.
// Twin: cpu-ref/src/embedding.rs, of the table's values. Exact.
#import pass

override WG: u32 = 64u;
override K: u32 = 64u;
override GROUP: u32 = 64u;
override BINARY: u32 = 0u;
override ROW_BASE: u32 = 0u;
override ROWS: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> w: array<u32>;
@group(0) @binding(3) var<storage, read> scales: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<f32>;

// Whether weight k of a row is not zero, and whether it is negative.
fn weight_bits(tile: u32, in_tile: u32, k: u32) -> vec2<u32> {
    let word = (k / 32u) % select(2u, 4u, BINARY == 1u);
    let bit = k % 32u;
    if BINARY == 1u {
        let chunks = (K + 127u) / 128u;
        let at = ((tile * chunks + k / 128u) * 32u + in_tile) * 4u;
        return vec2(1u, (w[at + word] >> bit) & 1u);
    }
    let at = ((tile * (K / 64u) + k / 64u) * 32u + in_tile) * 4u;
    return vec2((w[at + word] >> bit) & 1u, (w[at + 2u + word] >> bit) & 1u);
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    let k = wg.x * WG + lid;
    if m >= pass_.n_tokens || k >= K {
        return;
    }
    // Rows of other shards wrap around to a large number.
    let row = tokens[pass_.token_in + m] - ROW_BASE;
    if row >= ROWS {
        return;
    }
    let in_tile = row % 32u;
    let pair =
        unpack2x16float(scales[((row / 32u) * (K / GROUP) + k / GROUP) * 16u + in_tile / 2u]);
    let scale = select(pair.x, pair.y, in_tile % 2u == 1u);
    let bits = weight_bits(row / 32u, in_tile, k);
    out[m * K + k] = select(0.0, select(scale, -scale, bits.y == 1u), bits.x == 1u);
}
