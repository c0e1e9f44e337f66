// embedding: token ids → residual stream.
//   out[m, k] = table[tokens[token_in + m], k]   for the tokens whose row is in this shard of the table
// | # | name   | type            | shape                  | notes                              |
// | 0 | pass   | uniform         | Pass                   | n_tokens                           |
// | 1 | tokens | read u32        | [token_in + M]         | below V, or no row is written      |
// | 2 | table  | read vec4<u32>  | [ROWS, UNITS]          | rows ROW_BASE.. ; shared/dense     |
// | 3 | scale  | read f32        | [ROWS, K/GROUP]        | only of codes (FORMAT = 3)         |
// | 4 | min    | read f32        | [ROWS, K/GROUP]        | only if HAS_MIN = 1                |
// | 5 | out    | read_write f32  | [M, K]                 |                                    |
// Workgroup: WG lanes, one unit of 16 bytes each; grid (ceil(UNITS/WG), M, 1), once per shard.
// Twin: cpu-ref/src/embedding.rs. Exact, but for the fused product
// that scale·code + min may become.
#import pass
#import dense
#import codes

override WG: u32 = 64u;
override K: u32 = 64u;
override UNITS: u32 = 8u;
override ROW_BASE: u32 = 0u;
override ROWS: u32 = 1u;
override FORMAT: u32 = 0u;
override GROUP: u32 = 32u;
override HAS_MIN: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> scale: array<f32>;
@group(0) @binding(4) var<storage, read> min_: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<f32>;

fn store_value(m: u32, k: u32, value: f32) {
    if k < K {
        out[m * K + k] = value;
    }
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    let unit = wg.x * WG + lid;
    if m >= pass_.n_tokens || unit >= UNITS {
        return;
    }
    // Rows of other shards wrap around to a large number.
    let row = tokens[pass_.token_in + m] - ROW_BASE;
    if row >= ROWS {
        return;
    }
    let words = table[row * UNITS + unit];
    if FORMAT == 3u {
        let scale_min = unit_scale(row, unit);
        for (var i = 0u; i < 4u; i++) {
            let values = code_values(words[i], scale_min);
            for (var j = 0u; j < 4u; j++) {
                store_value(m, 16u * unit + 4u * i + j, values[j]);
            }
        }
    } else if FORMAT == 2u {
        for (var i = 0u; i < 4u; i++) {
            store_value(m, 4u * unit + i, bitcast<f32>(words[i]));
        }
    } else {
        for (var i = 0u; i < 4u; i++) {
            let pair = half_pair(words[i]);
            store_value(m, 8u * unit + 2u * i, pair.x);
            store_value(m, 8u * unit + 2u * i + 1u, pair.y);
        }
    }
}
