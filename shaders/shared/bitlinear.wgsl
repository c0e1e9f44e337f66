// BitLinear result of one row: the exact i32 sum scaled back to a real number.
// Expects: acc, weight_scale, act_scale, override N_PAD (rows of acc, a multiple of 32).
fn bitlinear(m: u32, n: u32) -> f32 {
    return f32(acc[m * N_PAD + n]) * (weight_scale[n] * act_scale[m]);
}
