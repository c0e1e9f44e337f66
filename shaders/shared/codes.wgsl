// The codes of a dense table (FORMAT 3). A code's value is scale·code + min, with one scale and min
// for every GROUP codes (a multiple of 16).
// Expects: scale, min_ [ROWS, K/GROUP], override UNITS, GROUP, HAS_MIN (0: min is 0 everywhere, min_
// unused).

// Scale and min of a unit of codes.
fn unit_scale(row: u32, unit: u32) -> vec2<f32> {
    let at = row * (16u * UNITS / GROUP) + 16u * unit / GROUP;
    return vec2(scale[at], select(0.0, min_[at], HAS_MIN == 1u));
}

// The values of the four codes of a word.
fn code_values(word: u32, scale_min: vec2<f32>) -> vec4<f32> {
    let codes = (vec4<i32>(vec4(word << 24u, word << 16u, word << 8u, word))) >> vec4(24u);
    return vec4<f32>(codes) * scale_min.x + scale_min.y;
}
