// How a workgroup of a tiled GEMM is laid out: R rows × T tokens, each lane 8 rows × 4 tokens that
// are LANES_R and LANES_T apart; and which 16 bytes of a chunk of 64 columns a lane loads.
// Expects: pass_.
override KC: u32 = 1u;         // chunks of 64 columns
override N_PAD: u32 = 32u;     // words from one token's rows to the next's
override TILE_BASE: u32 = 0u;  // first tile of this shard
override ROWS: u32 = 32u;      // rows of this shard
override MAX_TOKENS: u32 = 1u; // tokens that x and acc have room for
override LANES_R: u32 = 16u;
override LANES_T: u32 = 16u;
override LANES: u32 = 256u;    // LANES_R·LANES_T
override R: u32 = 128u;        // 8·LANES_R
override T: u32 = 64u;         // 4·LANES_T

struct Tile {
    row: u32,    // the first of the workgroup, of the shard
    token: u32,  // the first
    last: u32,   // token there is: those past it repeat it and are not stored
    lane_r: u32,
    lane_t: u32,
}

fn tile_of(wg: vec3<u32>, lid: u32) -> Tile {
    let last = min(pass_.n_tokens - 1u, MAX_TOKENS - 1u);
    return Tile(wg.x * R, wg.y * T, last, lid % LANES_R, lid / LANES_R);
}

struct Loads {
    piece: u32,      // of row lid, in w
    unit: u32,       // in x
    slot: u32,       // its place in workgroup memory
    other: u32,      // a second unit, where there are more units than lanes
    other_slot: u32,
}

fn loads_of(tile: Tile, lid: u32) -> Loads {
    // Rows past the last repeat it and are not stored.
    let row = min(tile.row + lid, ROWS - 1u);
    let token = lid / 4u;
    let other = token + LANES / 4u;
    let j = lid % 4u;
    return Loads(
        (row / 32u) * KC * 32u + row % 32u,
        min(tile.token + token, tile.last) * 4u * KC + j,
        j * (T + 1u) + token,
        min(tile.token + other, tile.last) * 4u * KC + j,
        j * (T + 1u) + other,
    );
}
