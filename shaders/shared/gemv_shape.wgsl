// How a workgroup of a GEMV is laid out: lane = row, S slices of K; a slice takes chunks S apart.
override KC: u32 = 1u;        // chunks of 64 columns
override S: u32 = 8u;
override ROWS: u32 = 32u;     // a workgroup's rows: a tile (32) or half of one (16)
override LANES: u32 = 256u;   // ROWS·S
override UNROLL: u32 = 1u;    // pieces of 16 bytes that a lane has in flight: 1, 2 or 4
override TILE_BASE: u32 = 0u; // first tile of this shard
