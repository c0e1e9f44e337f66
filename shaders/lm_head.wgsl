// lm_head: normalised hidden state → logits, full-precision or int8 table.
//   logits[m, ROW_BASE + r] = Σ_k table[r, k]·x[m, k]
// | # | name   | type           | shape           | notes                                   |
// | 0 | pass   | uniform        | Pass            | n_logit_rows                            |
// | 1 | x      | read f32       | [M, K]          | rmsnorm of the wanted tokens            |
// | 2 | table  | read vec4<u32> | [ROWS, UNITS]   | a shard; shared/dense, shared/codes     |
// | 3 | scale  | read f32       | [ROWS, K/GROUP] | only of codes (FORMAT = 3)              |
// | 4 | min    | read f32       | [ROWS, K/GROUP] | only if HAS_MIN = 1                     |
// | 5 | logits | read_write f32 | [M, V]          |                                         |
// Workgroup: 32 lanes a row, 8 rows; grid (ceil(ROWS/8), logit rows, 1), once per shard.
// Twin: cpu-ref/src/lm_head.rs. Bound: K·2⁻²⁴ of Σ|table·x| from the f32 sum.
#import pass
#import dense
#import codes
#import dense_dot

override K: u32 = 64u;
override UNITS: u32 = 8u;
override ROW_BASE: u32 = 0u;
override ROWS: u32 = 1u;
override V: u32 = 1u;
override FORMAT: u32 = 0u;
override GROUP: u32 = 32u;
override HAS_MIN: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> scale: array<f32>;
@group(0) @binding(4) var<storage, read> min_: array<f32>;
@group(0) @binding(5) var<storage, read_write> logits: array<f32>;

// Columns past K are zero in the table; x is not read there.
fn x_at(m: u32, k: u32) -> f32 {
    if k < K {
        return x[m * K + k];
    }
    return 0.0;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    let lane = lid & 31u;
    let row = wg.x * 8u + (lid >> 5u);
    var sum = 0.0;
    if row < ROWS {
        for (var unit = lane; unit < UNITS; unit += 32u) {
            let words = table[row * UNITS + unit];
            if FORMAT == 3u {
                let scale_min = unit_scale(row, unit);
                for (var i = 0u; i < 4u; i++) {
                    let values = code_values(words[i], scale_min);
                    let k = 16u * unit + 4u * i;
                    sum += values.x * x_at(m, k) + values.y * x_at(m, k + 1u);
                    sum += values.z * x_at(m, k + 2u) + values.w * x_at(m, k + 3u);
                }
            } else {
                sum = add_unit(sum, words, m, unit);
            }
        }
    }
    let logit = sum_of_lanes(lid, sum);
    if lane == 0u && row < ROWS && m < pass_.n_logit_rows {
        logits[m * V + ROW_BASE + row] = logit;
    }
}
