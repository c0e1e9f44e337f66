// Activation codes as pairs of f16 (exact: integers up to 128), in the order in which half_sum.wgsl
// decodes weights: 32 words a chunk, 8 for each 32-bit word of 16 weights. The bytes and fields of a
// pair's weights are (1, 0) (0, 3) (0, 2) (1, 3) (1, 2) (1, 1) (0, 1) (0, 0) and the same two bytes on.

// The column of a pair's first code; its second is two columns on.
fn half_k(word: u32) -> u32 {
    let pair = word % 8u;
    // By pair, lowest bits first: the byte (1 bit) and the field (2 bits) above.
    let byte = (0x39u >> pair) & 1u;
    let field = (0x16ecu >> (2u * pair)) & 3u;
    return word / 32u * 64u + 16u * field + word / 8u % 4u * 4u + byte;
}

// What a code of this pair adds to the token's sum, in codes: 1 for w = (w+1) − 1, and 4, 16 or 64 for
// the 1 of a weight's 1 + (w+1)/4, /16 or /64.
fn half_weight(word: u32) -> i32 {
    return 1 + (4 << (((0x4924u >> (2u * (word % 8u))) & 3u) * 2u));
}
