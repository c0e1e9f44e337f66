// Where a layer's KV cache holds what, by blocks of 64 positions, lowest bits first:
//   keys   [blocks, G, KEY_UNITS, 64] units of 16 bytes: 4 f32, 8 f16 or 16 int8 of a position
//   values [blocks, G, 64, VALUE_WORDS] words: 1 f32, 2 f16 or 4 int8
//   scales [blocks, G, 2, 64] f32: of the keys, then of the values; int8 only
// Dimensions past D are 0. A binding may hold a part of the blocks, a shard.
// Expects: override KV_HEADS, DIM.
override KV: u32 = 0u;                     // 0 f32, 1 f16, 2 int8
override KEY_UNITS: u32 = 1u;              // ceil(D / (4 << KV))
override VALUE_WORDS: u32 = 4u;            // ceil(D / (1 << KV)), at the next multiple of 4
override BLOCK_BASE: u32 = 0u;             // the shard's first block,
override SHARD_BLOCKS: u32 = 0xffffffffu;  // and how many it may have
const BLOCK: u32 = 64u;

// First unit of a head's keys at a slot of a block; the next units are 64 on.
fn key_at(block: u32, kv_head: u32, slot: u32) -> u32 {
    return (block * KV_HEADS + kv_head) * KEY_UNITS * BLOCK + slot;
}

fn value_at(block: u32, kv_head: u32, slot: u32) -> u32 {
    return ((block * KV_HEADS + kv_head) * BLOCK + slot) * VALUE_WORDS;
}

fn scale_at(block: u32, kv_head: u32, is_value: u32, slot: u32) -> u32 {
    return ((block * KV_HEADS + kv_head) * 2u + is_value) * BLOCK + slot;
}
