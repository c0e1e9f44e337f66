// quantize_absmax: activations → int8 codes, one scale and one sum a token.
//   absmax = max(max_k |x[m,k]|, 1e-5);  q = clamp(round_half_even(x · 127/absmax), −128, 127)
//   act_scale[m] = absmax / 127;  code_sum[m] = Σ_k q
// The codes are written as the GEMV variant reads them, K padded with 0 to whole chunks of 64:
//   ENCODING = 0: byte k of the token is q + 128 (unsigned), natural order
//   ENCODING = 1: bit planes; word 16c + 8h + j of the token holds bit j of q[64c + 32h ..][..32]
//   ENCODING = 2: byte k of the token is q (signed), natural order
//   ENCODING = 3: pairs of f16, 32 words a chunk; shared/half_pairs.wgsl, and so is code_sum
// | # | name      | type           | shape        | notes                                      |
// | 0 | pass      | uniform        | Pass         | n_tokens                                   |
// | 1 | x         | read f32       | [M, K]       |                                            |
// | 2 | codes     | read_write u32 | [M, 16·KC]   | KC = ceil(K/64) chunks; f16 pairs: 32·KC   |
// | 3 | act_scale | read_write f32 | [M]          |                                            |
// | 4 | code_sum  | read_write i32 | [M]          |                                            |
// Workgroup: WG lanes, one token; grid (1, M, 1).
// Twin: cpu-ref/src/quantize_absmax.rs. The division 127/absmax is allowed 2.5 ULP, so a value
// within that of a tie may differ by one code; with an exact division all codes are equal.
#import pass
#import reduce_tree
#import half_pairs

override WG: u32 = 256u;
override K: u32 = 64u;
override KC: u32 = 1u;
override ENCODING: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> codes: array<u32>;
@group(0) @binding(3) var<storage, read_write> act_scale: array<f32>;
@group(0) @binding(4) var<storage, read_write> code_sum: array<i32>;

fn code(m: u32, k: u32, inv_act_scale: f32) -> i32 {
    if k >= K {
        return 0;
    }
    return i32(clamp(round(x[m * K + k] * inv_act_scale), -128.0, 127.0));
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    // |x| as bits orders like the number, with NaN above infinity: NaN reaches the scale.
    var max_bits = 0u;
    for (var k = lid; k < K; k += WG) {
        max_bits = max(max_bits, bitcast<u32>(x[m * K + k]) & 0x7fffffffu);
    }
    // 0x3727c5ac is 1e-5.
    let absmax_bits = max(reduce_max_u32(lid, max_bits), 0x3727c5acu);
    let absmax = bitcast<f32>(absmax_bits);
    let inv_act_scale = 127.0 / absmax;
    var sum = 0;
    if ENCODING == 1u {
        for (var group = lid; group < 2u * KC; group += WG) {
            var low = vec4<u32>(0u);
            var high = vec4<u32>(0u);
            for (var i = 0u; i < 32u; i++) {
                let q = code(m, 32u * group + i, inv_act_scale);
                sum += q;
                let bits = vec4<u32>(bitcast<u32>(q));
                low |= ((bits >> vec4(0u, 1u, 2u, 3u)) & vec4(1u)) << vec4(i);
                high |= ((bits >> vec4(4u, 5u, 6u, 7u)) & vec4(1u)) << vec4(i);
            }
            let at = m * 16u * KC + 8u * group;
            for (var j = 0u; j < 4u; j++) {
                codes[at + j] = low[j];
                codes[at + 4u + j] = high[j];
            }
        }
    } else if ENCODING == 3u {
        for (var word = lid; word < 32u * KC; word += WG) {
            let k = half_k(word);
            let pair = vec2(code(m, k, inv_act_scale), code(m, k + 2u, inv_act_scale));
            sum += (pair.x + pair.y) * half_weight(word);
            codes[m * 32u * KC + word] = pack2x16float(vec2<f32>(pair));
        }
    } else {
        let bias = select(128, 0, ENCODING == 2u);
        for (var word = lid; word < 16u * KC; word += WG) {
            var bytes = 0u;
            for (var b = 0u; b < 4u; b++) {
                let q = code(m, 4u * word + b, inv_act_scale);
                sum += q;
                bytes |= (u32(q + bias) & 0xffu) << (8u * b);
            }
            codes[m * 16u * KC + word] = bytes;
        }
    }
    let total = reduce_sum_i32(lid, sum);
    if lid == 0u {
        act_scale[m] = absmax / 127.0;
        code_sum[m] = total;
    }
}
