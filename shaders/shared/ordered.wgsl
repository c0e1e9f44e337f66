// f32 as u32 that orders the same way, so that integer maxima serve floats. −0 counts as +0; a NaN
// of either sign becomes the largest value, NAN_ORDERED.
const NAN_ORDERED: u32 = 0xffffffffu;

fn ordered(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return NAN_ORDERED;
    }
    if magnitude == 0u {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, (bits & 0x80000000u) != 0u);
}

fn unordered(bits: u32) -> f32 {
    return bitcast<f32>(select(~bits, bits & 0x7fffffffu, (bits & 0x80000000u) != 0u));
}
