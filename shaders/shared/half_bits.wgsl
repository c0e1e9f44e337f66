// The bits of the nearest IEEE half, in integers, as cpu-ref/src/kv.rs has them: pack2x16float may
// round otherwise. Ties to even; what rounds below the smallest normal half is a zero of its sign.
fn half_bits(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return sign | 0x7e00u;
    }
    let rounded = magnitude + 0x0fffu + ((magnitude >> 13u) & 1u);
    if rounded >= 0x47800000u {
        return sign | 0x7c00u;
    }
    if rounded < 0x38800000u {
        return sign;
    }
    return sign | ((rounded - 0x38000000u) >> 13u);
}
