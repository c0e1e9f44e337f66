// A table in 16-byte units: 8 bf16 or f16, 4 f32, or 16 int8 codes (shared/codes), low bits first;
// rows padded with zeros to whole units.
// Expects: override FORMAT (0 bf16, 1 f16, 2 f32, 3 codes).
fn half_pair(word: u32) -> vec2<f32> {
    if FORMAT == 0u {
        return vec2(bitcast<f32>(word << 16u), bitcast<f32>(word & 0xffff0000u));
    }
    return unpack2x16float(word);
}
