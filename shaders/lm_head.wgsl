// lm_head: normalised hidden state → logits, full-precision or int8 table.
//   logits[m, ROW_BASE + r] = Σ_k table[r, k]·x[m, k]
// | # | name   | type           | shape           | notes                                   |
// | 0 | pass   | uniform        | Pass            | n_logit_rows                            |
// | 1 | x      | read f32       | [M, K]          | rmsnorm of the wanted tokens            |
// | 2 | table  | read vec4<u32> | [ROWS, UNITS]   | a shard; shared/dense, shared/codes     |
// | 3 | scale  | read f32       | [ROWS, K/GROUP] | only of codes (FORMAT = 3)              |
// | 4 | min    | read f32       | [ROWS, K/GROUP] | only if HAS_MIN = 1                     |
// | 5 | logits | read_write f32 | [M, V]          |                                         |
// Workgroup: 32 lanes a row, 8 rows; TOKENS (1, 4 or 8) logit rows, for which the table is read once;
// grid (ceil(ROWS/8), ceil(logit rows/TOKENS), 1), once per shard.
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
override TOKENS: u32 = 1u;

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

// The lane's sum for logit row m after one more unit of a row of the table.
fn add(before: f32, words: vec4<u32>, m: u32, row: u32, unit: u32) -> f32 {
    if FORMAT != 3u {
        return add_unit(before, words, m, unit);
    }
    var sum = before;
    let scale_min = unit_scale(row, unit);
    for (var i = 0u; i < 4u; i++) {
        let values = code_values(words[i], scale_min);
        let k = 16u * unit + 4u * i;
        sum += values.x * x_at(m, k) + values.y * x_at(m, k + 1u);
        sum += values.z * x_at(m, k + 2u) + values.w * x_at(m, k + 3u);
    }
    return sum;
}

fn add_rows(before: vec4<f32>, words: vec4<u32>, m: vec4<u32>, row: u32, unit: u32) -> vec4<f32> {
    return vec4(
        add(before.x, words, m.x, row, unit),
        add(before.y, words, m.y, row, unit),
        add(before.z, words, m.z, row, unit),
        add(before.w, words, m.w, row, unit),
    );
}

// Adds the lanes of a logit row up and stores it, if it is one; every lane must call.
fn finish(lid: u32, m: u32, row: u32, sum: f32) {
    let logit = sum_of_lanes(lid, sum);
    if (lid & 31u) == 0u && row < ROWS && m < pass_.n_logit_rows {
        logits[m * V + ROW_BASE + row] = logit;
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = wg.x * 8u + (lid >> 5u);
    let first = wg.y * TOKENS;
    // Of logit rows that are not there, the last one is computed and not stored.
    let last = vec4(pass_.n_logit_rows - 1u);
    let m = min(vec4(first) + vec4(0u, 1u, 2u, 3u), last);
    let m_second = min(vec4(first) + vec4(4u, 5u, 6u, 7u), last);
    var sums = vec4(0.0);
    var sums_second = vec4(0.0);
    if row < ROWS {
        for (var unit = lid & 31u; unit < UNITS; unit += 32u) {
            let words = table[row * UNITS + unit];
            if TOKENS == 1u {
                sums.x = add(sums.x, words, m.x, row, unit);
            } else {
                sums = add_rows(sums, words, m, row, unit);
            }
            if TOKENS > 4u {
                sums_second = add_rows(sums_second, words, m_second, row, unit);
            }
        }
    }
    finish(lid, first, row, sums.x);
    if TOKENS > 1u {
        finish(lid, first + 1u, row, sums.y);
        finish(lid, first + 2u, row, sums.z);
        finish(lid, first + 3u, row, sums.w);
    }
    if TOKENS > 4u {
        finish(lid, first + 4u, row, sums_second.x);
        finish(lid, first + 5u, row, sums_second.y);
        finish(lid, first + 6u, row, sums_second.z);
        finish(lid, first + 7u, row, sums_second.w);
    }
}
