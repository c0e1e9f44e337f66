// quantize_absmax_groups: activations → int8 codes, one scale for each group of a token.
//   absmax = max(max_{k in g} |x[m,k]|, 1e-5);  q = clamp(round_half_even(x · 127/absmax), −128, 127)
//   act_scale[m, g] = absmax / 127
// | # | name      | type           | shape       | notes                                       |
// | 0 | pass      | uniform        | Pass        | n_tokens                                    |
// | 1 | x         | read f32       | [M, K]      |                                             |
// | 2 | codes     | read_write u32 | [M, K/4]    | bit planes: word 8c + j of the token holds  |
// |   |           |                |             | bit j of q[32c..][..32]                     |
// | 3 | act_scale | read_write f32 | [M, GROUPS] |                                             |
// Workgroup: WG lanes, one group of a token; grid (GROUPS, M, 1). Requires GROUP ≤ 256.
// Twin: cpu-ref/src/group_gemv.rs, `quantize_absmax_groups`. The division 127/absmax is allowed
// 2.5 ULP, so a value within that of a tie may differ by one code; with an exact division all codes
// are equal.
#import pass
#import reduce_tree

override WG: u32 = 64u;
override K: u32 = 64u;
override GROUP: u32 = 64u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> codes: array<u32>;
@group(0) @binding(3) var<storage, read_write> act_scale: array<f32>;

var<workgroup> group_codes: array<u32, 256>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    let from_ = m * K + wg.x * GROUP;
    // |x| as bits orders like the number, with NaN above infinity: NaN reaches the scale.
    var max_bits = 0u;
    for (var i = lid; i < GROUP; i += WG) {
        max_bits = max(max_bits, bitcast<u32>(x[from_ + i]) & 0x7fffffffu);
    }
    // 0x3727c5ac is 1e-5.
    let absmax = bitcast<f32>(max(reduce_max_u32(lid, max_bits), 0x3727c5acu));
    let inv_act_scale = 127.0 / absmax;
    for (var i = lid; i < GROUP; i += WG) {
        let q = i32(clamp(round(x[from_ + i] * inv_act_scale), -128.0, 127.0));
        group_codes[i] = bitcast<u32>(q);
    }
    workgroupBarrier();
    if m >= pass_.n_tokens {
        return;
    }
    for (var word = lid; word < GROUP / 4u; word += WG) {
        var plane = 0u;
        for (var i = 0u; i < 32u; i++) {
            let q = group_codes[32u * (word / 8u) + i];
            plane |= ((q >> (word % 8u)) & 1u) << i;
        }
        codes[from_ / 4u + word] = plane;
    }
    if lid == 0u {
        act_scale[m * (K / GROUP) + wg.x] = absmax / 127.0;
    }
}
