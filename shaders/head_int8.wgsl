// head_int8: int8 table × 16-bit inputs → approximate logits, and bounds of the exact ones (decode).
//   S_hi[n] = Σ_k q[n,k]·hi[k],  S_lo[n] = Σ_k q[n,k]·lo[k]
//   logits[n] = scale[n] · (x_scale · (256·S_hi + S_lo))
//   |logits[n] − exact| ≤ margin = error[n]·bound + norm[n]·rest
// because w·x = s·q·x_scale·v + (w − s·q)·x_scale·v + w·(x − x_scale·v) for a row w, with
// error ≥ ‖w − s·q‖₂, norm ≥ ‖w‖₂, bound ≥ ‖x_scale·v‖₂ and ‖x − x_scale·v‖₂ ≤ ½√K·x_scale. GAMMA in
// `rest` is (K + K/256 + 64)·2⁻²³ of norm·bound: K roundings, whatever their order and mode, of the
// exact head's sum with K/256 for products of errors; 64 for the few roundings of the terms above,
// of x's norm and of this kernel, whose terms are at most 4·norm·bound each as K ≤ 32768.
// | # | name   | type           | shape                   | notes                                     |
// | 0 | pass   | uniform        | Pass                    | n_logit_rows, penalty                     |
// | 1 | table  | read vec4<u32> | [tiles, CHUNKS + 1, 32] | a shard; cpu-ref/src/layout.rs, int8_rows |
// | 2 | token  | read vec4<u32> | [logit rows, 2·CHUNKS + 1] | of head_input.wgsl                     |
// | 3 | seen   | read u32       | [logit rows, ceil(V/32)]   | shared/penalty                         |
// | 4 | logits | read_write f32 | [logit rows, V]            | without penalty                        |
// | 5 | bounds | read_write u32 | [logit rows, 33·TILES]     | ordered bits, with penalty: the upper  |
// |   |        |                |                         | bound of each row of all TILES tiles,     |
// |   |        |                |                         | then the largest lower bound of each tile |
// Rows of the table without a finite margin have the largest upper bound and the smallest lower bound
// there are.
// Workgroup: lane = row of a tile, 8 slices of K, so that 32 lanes read 512 contiguous bytes and a
// row's sum needs no tree; TOKENS (1, 4 or 8) logit rows, for which the table is read once; then 32
// lanes finish each of them. Grid (tiles, ceil(logit rows/TOKENS), 1), once per shard.
// Requires PARTS = 256·TOKENS. Twin: cpu-ref/src/head_int8.rs. Sums exact for K ≤ 131,072
// (127·128·K < 2³¹); logits equal where products and sums are rounded to nearest, for 256·S_hi is exact;
// bounds are bounds.
#import pass
#import ordered
#import penalty

override CHUNKS: u32 = 160u;
override TILE_BASE: u32 = 0u;
override TILES: u32 = 1u;
override V: u32 = 1u;
override TOKENS: u32 = 1u;
override PARTS: u32 = 256u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> token: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> seen: array<u32>;
@group(0) @binding(4) var<storage, read_write> logits: array<f32>;
@group(0) @binding(5) var<storage, read_write> bounds: array<u32>;

const SLICES: u32 = 8u;

// Sums of slices, of hi and then of lo.
var<workgroup> parts: array<i32, PARTS>; // [TOKENS, SLICES, 32]
var<workgroup> lowers: array<u32, 256>;

// From the accumulator on, so that each product is added by the instruction that makes it.
fn add_dot16(acc: i32, q: vec4<u32>, x: vec4<u32>) -> i32 {
    return acc + dot4I8Packed(q.x, x.x) + dot4I8Packed(q.y, x.y)
        + dot4I8Packed(q.z, x.z) + dot4I8Packed(q.w, x.w);
}

// The same for four logit rows, whose inputs are at `at`.
fn add_rows(acc: vec4<i32>, q: vec4<u32>, at: vec4<u32>) -> vec4<i32> {
    return vec4(
        add_dot16(acc.x, q, token[at.x]),
        add_dot16(acc.y, q, token[at.y]),
        add_dot16(acc.z, q, token[at.z]),
        add_dot16(acc.w, q, token[at.w]),
    );
}

// What the slices of up to eight logit rows add up to: the lane's row of the table, and the logit row
// of its 32 lanes. Every lane must call.
fn sum_of_slices(lid: u32, first: vec4<i32>, second: vec4<i32>) -> i32 {
    workgroupBarrier();
    parts[lid] = first.x;
    if TOKENS > 1u {
        parts[256u + lid] = first.y;
        parts[512u + lid] = first.z;
        parts[768u + lid] = first.w;
    }
    if TOKENS > 4u {
        parts[1024u + lid] = second.x;
        parts[1280u + lid] = second.y;
        parts[1536u + lid] = second.z;
        parts[1792u + lid] = second.w;
    }
    workgroupBarrier();
    var sum = 0;
    let t = lid >> 5u;
    if t < TOKENS {
        for (var s = 0u; s < SLICES; s++) {
            sum += parts[256u * t + 32u * s + (lid & 31u)];
        }
    }
    return sum;
}

struct Bounds {
    lower: u32,
    upper: u32,
}

// What the exact logit of row n, with the penalty of logit row m, lies between, as ordered bits.
fn bounds_of(m: u32, n: u32, logit: f32, row: vec4<f32>, x: vec4<f32>) -> Bounds {
    // 0x71800000 is 2¹⁰⁰: below it no sum of the exact head overflows, and nothing here. NaN and
    // infinity are above.
    if (bitcast<u32>(row.z * x.y) & 0x7fffffffu) > 0x71800000u {
        return Bounds(0u, NAN_ORDERED);
    }
    // 2⁻²⁰ more than what a few roundings can take away.
    let margin = (row.y * x.y + row.z * x.z) * 1.000001;
    let lower = penalised(m * TILES, n, logit - margin);
    let upper = penalised(m * TILES, n, logit + margin);
    return Bounds(ordered(lower - abs(lower) * 1e-6), ordered(upper + abs(upper) * 1e-6));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid & 31u;
    let slice = lid >> 5u;
    let from_ = wg.x * (CHUNKS + 1u) * 32u + lane;
    // Of logit rows that are not there, the last one is computed and not stored.
    let last = pass_.n_logit_rows - 1u;
    let input = 2u * CHUNKS + 1u;
    let first_row = wg.y * TOKENS;
    let at = min(vec4(first_row) + vec4(0u, 1u, 2u, 3u), vec4(last)) * input;
    let at_second = min(vec4(first_row) + vec4(4u, 5u, 6u, 7u), vec4(last)) * input;
    var hi = vec4(0);
    var lo = vec4(0);
    var hi_second = vec4(0);
    var lo_second = vec4(0);
    // CHUNKS is a multiple of SLICES.
    for (var i = 0u; i < CHUNKS / SLICES; i++) {
        let chunk = i * SLICES + slice;
        let q = table[from_ + chunk * 32u];
        if TOKENS == 1u {
            hi.x = add_dot16(hi.x, q, token[at.x + chunk]);
            lo.x = add_dot16(lo.x, q, token[at.x + CHUNKS + chunk]);
        } else {
            hi = add_rows(hi, q, at + chunk);
            lo = add_rows(lo, q, at + (CHUNKS + chunk));
        }
        if TOKENS > 4u {
            hi_second = add_rows(hi_second, q, at_second + chunk);
            lo_second = add_rows(lo_second, q, at_second + (CHUNKS + chunk));
        }
    }
    let hi_sum = sum_of_slices(lid, hi, hi_second);
    let lo_sum = sum_of_slices(lid, lo, lo_second);
    // Each 32 lanes finish one logit row.
    let m = first_row + slice;
    let is_row = slice < TOKENS && m < pass_.n_logit_rows;
    let n = (TILE_BASE + wg.x) * 32u + lane;
    lowers[lid] = 0u;
    if is_row && n < V {
        let row = bitcast<vec4<f32>>(table[from_ + CHUNKS * 32u]);
        let x = bitcast<vec4<f32>>(token[m * input + 2u * CHUNKS]);
        let logit = row.x * (x.x * (256.0 * f32(hi_sum) + f32(lo_sum)));
        let found = bounds_of(m, n, logit, row, x);
        logits[m * V + n] = logit;
        bounds[m * 33u * TILES + n] = found.upper;
        lowers[lid] = found.lower;
    }
    workgroupBarrier();
    for (var step = 16u; step > 0u; step /= 2u) {
        if lane < step {
            lowers[lid] = max(lowers[lid], lowers[lid + step]);
        }
        workgroupBarrier();
    }
    if is_row && lane == 0u {
        bounds[m * 33u * TILES + TILES * 32u + TILE_BASE + wg.x] = lowers[lid];
    }
}
