// head_int8: int8 table × 16-bit input → approximate logits, and bounds of the exact ones (decode).
//   S_hi[n] = Σ_k q[n,k]·hi[k],  S_lo[n] = Σ_k q[n,k]·lo[k]
//   logits[n] = scale[n] · (x_scale · (256·S_hi + S_lo))
//   |logits[n] − exact| ≤ margin = error[n]·bound + norm[n]·rest
// because w·x = s·q·x_scale·v + (w − s·q)·x_scale·v + w·(x − x_scale·v) for a row w, with
// error ≥ ‖w − s·q‖₂, norm ≥ ‖w‖₂, bound ≥ ‖x_scale·v‖₂ and ‖x − x_scale·v‖₂ ≤ ½√K·x_scale. GAMMA in
// `rest` is (K + K/256 + 64)·2⁻²³ of norm·bound: K roundings, whatever their order and mode, of the
// exact head's sum with K/256 for products of errors; 64 for the few roundings of the terms above,
// of x's norm and of this kernel, whose terms are at most 4·norm·bound each as K ≤ 32768.
// | # | name   | type           | shape                   | notes                                     |
// | 0 | pass   | uniform        | Pass                    | penalty                                   |
// | 1 | table  | read vec4<u32> | [tiles, CHUNKS + 1, 32] | a shard; cpu-ref/src/layout.rs, int8_rows |
// | 2 | token  | read vec4<u32> | [2·CHUNKS + 1]          | of head_input.wgsl                        |
// | 3 | seen   | read u32       | [ceil(V/32)]            | shared/penalty                            |
// | 4 | logits | read_write f32 | [V]                     | without penalty                           |
// | 5 | bounds | read_write u32 | [33·TILES]              | ordered bits, with penalty: the upper     |
// |   |        |                |                         | bound of each row of all TILES tiles,     |
// |   |        |                |                         | then the largest lower bound of each tile |
// Rows without a finite margin have the largest upper bound and the smallest lower bound there are.
// Workgroup: lane = row of a tile, 8 slices of K, so that 32 lanes read 512 contiguous bytes and a
// row's sum needs no tree; grid (tiles, 1, 1), once per shard.
// Twin: cpu-ref/src/head_int8.rs. Sums exact for K ≤ 131,072 (127·128·K < 2³¹); logits equal where
// products and sums are rounded to nearest, for 256·S_hi is exact; bounds are bounds.
#import pass
#import ordered
#import penalty

override CHUNKS: u32 = 160u;
override TILE_BASE: u32 = 0u;
override TILES: u32 = 1u;
override V: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> table: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> token: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> seen: array<u32>;
@group(0) @binding(4) var<storage, read_write> logits: array<f32>;
@group(0) @binding(5) var<storage, read_write> bounds: array<u32>;

const SLICES: u32 = 8u;

var<workgroup> hi_slices: array<i32, 256>;
var<workgroup> lo_slices: array<i32, 256>;
var<workgroup> lowers: array<u32, 32>;

// From the accumulator on, so that each product is added by the instruction that makes it.
fn add_dot16(acc: i32, q: vec4<u32>, x: vec4<u32>) -> i32 {
    return acc + dot4I8Packed(q.x, x.x) + dot4I8Packed(q.y, x.y)
        + dot4I8Packed(q.z, x.z) + dot4I8Packed(q.w, x.w);
}

struct Bounds {
    lower: u32,
    upper: u32,
}

// What the exact logit of row n, with its penalty, lies between, as ordered bits.
fn bounds_of(n: u32, logit: f32, row: vec4<f32>, x: vec4<f32>) -> Bounds {
    // 0x71800000 is 2¹⁰⁰: below it no sum of the exact head overflows, and nothing here. NaN and
    // infinity are above.
    if (bitcast<u32>(row.z * x.y) & 0x7fffffffu) > 0x71800000u {
        return Bounds(0u, NAN_ORDERED);
    }
    // 2⁻²⁰ more than what a few roundings can take away.
    let margin = (row.y * x.y + row.z * x.z) * 1.000001;
    let lower = penalised(n, logit - margin);
    let upper = penalised(n, logit + margin);
    return Bounds(ordered(lower - abs(lower) * 1e-6), ordered(upper + abs(upper) * 1e-6));
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let lane = lid & 31u;
    let slice = lid >> 5u;
    let from_ = wg.x * (CHUNKS + 1u) * 32u + lane;
    var hi = 0;
    var lo = 0;
    // CHUNKS is a multiple of SLICES.
    for (var i = 0u; i < CHUNKS / SLICES; i++) {
        let chunk = i * SLICES + slice;
        let q = table[from_ + chunk * 32u];
        hi = add_dot16(hi, q, token[chunk]);
        lo = add_dot16(lo, q, token[CHUNKS + chunk]);
    }
    hi_slices[lid] = hi;
    lo_slices[lid] = lo;
    workgroupBarrier();
    if lid < 32u {
        for (var s = 1u; s < SLICES; s++) {
            hi += hi_slices[s * 32u + lid];
            lo += lo_slices[s * 32u + lid];
        }
        let row = bitcast<vec4<f32>>(table[from_ + CHUNKS * 32u]);
        let x = bitcast<vec4<f32>>(token[2u * CHUNKS]);
        let logit = row.x * (x.x * (256.0 * f32(hi) + f32(lo)));
        let n = (TILE_BASE + wg.x) * 32u + lid;
        lowers[lid] = 0u;
        if n < V {
            let found = bounds_of(n, logit, row, x);
            logits[n] = logit;
            bounds[n] = found.upper;
            lowers[lid] = found.lower;
        }
    }
    workgroupBarrier();
    for (var step = 16u; step > 0u; step /= 2u) {
        if lid < step {
            lowers[lid] = max(lowers[lid], lowers[lid + step]);
        }
        workgroupBarrier();
    }
    if lid == 0u {
        bounds[TILES * 32u + TILE_BASE + wg.x] = lowers[0];
    }
}
