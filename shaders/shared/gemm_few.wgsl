// How a workgroup of a GEMM of a few tokens is laid out: lane = row, S slices of K, TOKENS tokens a lane.
// Expects: pass_.
override S: u32 = 8u;
override KC: u32 = 1u;         // chunks of 64 columns
override N_PAD: u32 = 32u;     // words from one token's rows to the next's
override TILE_BASE: u32 = 0u;  // first tile of this shard
override TOKENS: u32 = 4u;     // 4 or 8
override MAX_TOKENS: u32 = 1u; // tokens that x and acc have room for

// Tokens past the last repeat it and are not stored.
fn last_token() -> u32 {
    return min(pass_.n_tokens - 1u, MAX_TOKENS - 1u);
}

// The first unit of a chunk, of each of four tokens.
fn unit_of(four: vec4<u32>, c: u32) -> vec4<u32> {
    return (min(four, vec4(last_token())) * vec4(KC) + vec4(c)) << vec4(2u);
}
