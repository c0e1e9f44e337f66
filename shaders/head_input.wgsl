// head_input: the int8 head's input: norm of the wanted tokens, and their values in 16 bits.
//   y[k] = norm[k] · (x[k] · r) as in rmsnorm.wgsl, or x[k] if NORM = 0
//   scale = the smallest power of two with max_k |y[k]| ≤ 32512·scale
//   v[k] = round_half_even(y[k] / scale) = 256·hi[k] + lo[k],   hi ∈ [−127,127], lo ∈ [−128,127]
//   bound ≥ ‖y‖₂, ‖scale·v‖₂;   rest = ½√K·scale + GAMMA·bound, see head_int8.wgsl
// | # | name  | type           | shape                     | notes                             |
// | 0 | pass  | uniform        | Pass                      | first_logit_row                   |
// | 1 | x     | read f32       | [M, K]                    | NORM = 0: of the logit rows only  |
// | 2 | norm  | read f32       | [K]                       | NORM = 0: unused                  |
// | 3 | y     | read_write f32 | [logit rows, K]           |                                   |
// | 4 | token | read_write u32 | [logit rows, 8·CHUNKS + 4]| bytes of hi, of lo, padded with 0; then scale, bound, rest, 0 |
// Workgroup: WG lanes; grid (1, logit rows, 1).
// A power of two makes quotient, rounding and remainder exact: equal codes on every device. Zeros
// below 2⁻¹⁰⁰; scale is NaN if a value is not finite. Outside of 2⁻⁴⁰ to 2⁴⁰ bound is infinite:
// squares might not stay in range.
// Twin: cpu-ref/src/head_int8.rs. Codes and scale equal for equal y; bound and rest are bounds.
#import pass
#import reduce_tree
#import rms

override WG: u32 = 256u;
override K: u32 = 64u;
override CHUNKS: u32 = 8u;
override NORM: u32 = 1u;
override HALF_SQRT_K: f32 = 4.0;
override GAMMA: f32 = 1e-4;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> norm: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
@group(0) @binding(4) var<storage, read_write> token: array<u32>;

fn value_at(from_: u32, k: u32, r: f32) -> f32 {
    if NORM == 1u {
        return norm[k] * (x[from_ + k] * r);
    }
    return x[from_ + k];
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let y_from = wg.y * K;
    let token_from = wg.y * (8u * CHUNKS + 4u);
    var m = wg.y;
    var r = 1.0;
    if NORM == 1u {
        m += pass_.first_logit_row;
        r = inv_rms(lid, m * K);
    }
    let from_ = m * K;
    // |y| as bits orders like the number, with NaN above infinity.
    var max_bits = 0u;
    var squares = 0.0;
    for (var k = lid; k < K; k += WG) {
        let value = value_at(from_, k, r);
        y[y_from + k] = value;
        max_bits = max(max_bits, bitcast<u32>(value) & 0x7fffffffu);
        squares += value * value;
    }
    let absmax = reduce_max_u32(lid, max_bits);
    let sum = reduce_sum_f32(lid, squares);
    // Exponents, biased by 127, of scale and of 1/scale; 32512 is 2¹⁴ · (1 + 0x7e0000/2²³).
    let exponent = (absmax >> 23u) - select(14u, 13u, (absmax & 0x7fffffu) > 0x7e0000u);
    let is_finite = absmax < 0x7f800000u;
    let has_codes = is_finite && absmax >= 0x0d800000u;
    var scale_bits = 0u;
    var inv_scale = 0.0;
    if has_codes {
        scale_bits = exponent << 23u;
        inv_scale = bitcast<f32>((254u - exponent) << 23u);
    }
    for (var word = lid; word < 4u * CHUNKS; word += WG) {
        var hi = 0u;
        var lo = 0u;
        for (var b = 0u; b < 4u; b++) {
            let k = 4u * word + b;
            if k < K && has_codes {
                let v = i32(clamp(round(value_at(from_, k, r) * inv_scale), -32512.0, 32512.0));
                let high = (v + 128) >> 8u;
                hi |= (bitcast<u32>(high) & 0xffu) << (8u * b);
                lo |= (bitcast<u32>(v - 256 * high) & 0xffu) << (8u * b);
            }
        }
        token[token_from + word] = hi;
        token[token_from + 4u * CHUNKS + word] = lo;
    }
    if lid == 0u {
        let half_step = bitcast<f32>(scale_bits) * HALF_SQRT_K;
        let bound = sqrt(sum) * (1.0 + GAMMA) + half_step;
        let in_range = absmax >= 0x2b800000u && absmax <= 0x53800000u;
        let rest = token_from + 8u * CHUNKS;
        token[rest] = select(0x7fc00000u, scale_bits, is_finite);
        token[rest + 1u] = select(0x7f800000u, bitcast<u32>(bound), in_range);
        token[rest + 2u] = bitcast<u32>(half_step + GAMMA * bound);
        token[rest + 3u] = 0u;
    }
}
