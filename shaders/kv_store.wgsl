// kv_store: keys and values of new tokens → the KV cache, in its format.
//   f32: as they are;  f16: shared/half_bits;  int8: as quantize_absmax, one scale a head
// | # | name       | type           | shape                   | notes                          |
// | 0 | pass       | uniform        | Pass                    | n_tokens, start                |
// | 1 | new_keys   | read f32       | [M, G, D]               | RoPE applied                   |
// | 2 | new_values | read f32       | [M, G, D]               |                                |
// | 3 | table      | read u32       | [S/64]                  | the sequence's blocks          |
// | 4 | keys       | read_write u32 | shared/kv_layout        | this layer's                   |
// | 5 | values     | read_write u32 | shared/kv_layout        |                                |
// | 6 | scales     | read_write f32 | shared/kv_layout        | f32 and f16: unused            |
// Workgroup: WG lanes, one head of a token; grid (G, M, 1). Tokens of other shards are left out.
// Twin: cpu-ref/src/kv.rs. f32 and f16 are exact; int8 has the bound of quantize_absmax.
#import pass
#import reduce_tree
#import kv_layout
#import half_bits

override WG: u32 = 64u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 2u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> new_keys: array<f32>;
@group(0) @binding(2) var<storage, read> new_values: array<f32>;
@group(0) @binding(3) var<storage, read> table: array<u32>;
@group(0) @binding(4) var<storage, read_write> keys: array<u32>;
@group(0) @binding(5) var<storage, read_write> values: array<u32>;
@group(0) @binding(6) var<storage, read_write> scales: array<f32>;

fn element(is_value: bool, row: u32, d: u32) -> f32 {
    if d >= DIM {
        return 0.0;
    }
    if is_value {
        return new_values[row + d];
    }
    return new_keys[row + d];
}

// Largest magnitude of a head; every lane must call.
fn absmax(lid: u32, is_value: bool, row: u32) -> f32 {
    var max_bits = 0u;
    for (var d = lid; d < DIM; d += WG) {
        max_bits = max(max_bits, bitcast<u32>(element(is_value, row, d)) & 0x7fffffffu);
    }
    // 0x3727c5ac is 1e-5.
    return bitcast<f32>(max(reduce_max_u32(lid, max_bits), 0x3727c5acu));
}

// Word `word` of a head: 1 << KV dimensions.
fn packed(is_value: bool, row: u32, word: u32, inv_scale: f32) -> u32 {
    if KV == 0u {
        return bitcast<u32>(element(is_value, row, word));
    }
    if KV == 1u {
        let low = half_bits(element(is_value, row, 2u * word));
        return low | (half_bits(element(is_value, row, 2u * word + 1u)) << 16u);
    }
    var bytes = 0u;
    for (var b = 0u; b < 4u; b++) {
        let scaled = element(is_value, row, 4u * word + b) * inv_scale;
        let q = i32(clamp(round(scaled), -128.0, 127.0));
        bytes |= (u32(q) & 0xffu) << (8u * b);
    }
    return bytes;
}

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let kv_head = wg.x;
    let m = wg.y;
    let row = (m * KV_HEADS + kv_head) * DIM;
    var key_max = 1.0;
    var value_max = 1.0;
    if KV == 2u {
        key_max = absmax(lid, false, row);
        value_max = absmax(lid, true, row);
    }
    let position = pass_.start + m;
    let slot = position % BLOCK;
    let block = table[position / BLOCK] - BLOCK_BASE;
    if m >= pass_.n_tokens || block >= SHARD_BLOCKS {
        return;
    }
    let key = key_at(block, kv_head, slot);
    for (var word = lid; word < 4u * KEY_UNITS; word += WG) {
        let unit = key + word / 4u * BLOCK;
        keys[4u * unit + word % 4u] = packed(false, row, word, 127.0 / key_max);
    }
    let value = value_at(block, kv_head, slot);
    for (var word = lid; word < VALUE_WORDS; word += WG) {
        values[value + word] = packed(true, row, word, 127.0 / value_max);
    }
    if KV == 2u && lid == 0u {
        scales[scale_at(block, kv_head, 0u, slot)] = key_max / 127.0;
        scales[scale_at(block, kv_head, 1u, slot)] = value_max / 127.0;
    }
}
