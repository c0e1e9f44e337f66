// What every kernel of attention has: rows of queries, numbers out of the cache, maxima.
// A row is a query head of a token.
// Expects: pass_, override HEADS, KV_HEADS; ordered.
override INV_SQRT_DIM: f32 = 0.70710678;

const LOWEST: f32 = -3.4028234e38;

// A row among those of its KV head, as a row of [M, H].
fn head_row(row: u32, kv_head: u32) -> u32 {
    let ratio = HEADS / KV_HEADS;
    return row / ratio * HEADS + kv_head * ratio + row % ratio;
}

fn bytes4(word: u32) -> vec4<f32> {
    let high = vec4(word << 24u, word << 16u, word << 8u, word);
    return vec4<f32>(bitcast<vec4<i32>>(high) >> vec4(24u));
}

fn halves4(words: vec2<u32>) -> vec4<f32> {
    return vec4(unpack2x16float(words.x), unpack2x16float(words.y));
}

// Zeros, of which a compiler does not know that: where Mesa sees that a sum starts with a product, it adds
// the second product to the third first. No batch has 2³¹ tokens.
fn zero4() -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4(pass_.n_tokens >> 31u));
}

fn ordered4(value: vec4<f32>) -> vec4<u32> {
    return vec4(ordered(value.x), ordered(value.y), ordered(value.z), ordered(value.w));
}

fn unordered4(bits: vec4<u32>) -> vec4<f32> {
    return vec4(unordered(bits.x), unordered(bits.y), unordered(bits.z), unordered(bits.w));
}

// The larger of each; NaN if either is.
fn max4(a: vec4<f32>, b: vec4<f32>) -> vec4<f32> {
    return unordered4(max(ordered4(a), ordered4(b)));
}
