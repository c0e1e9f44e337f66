// What a block of the KV cache gives to rows of queries, by itself: see cpu-ref/src/attention.rs.
// A row is a query head of a token. SLOTS sets of 64 lanes take QUERIES rows each; a lane scores one
// key for all rows of its set, which so share its load, and then adds up the values of up to four
// dimensions. The sets of a workgroup go through the same block at the same time.
// No loop but over dimensions and positions: llvmpipe ends a lane's loops after 65,535 iterations of
// all together.
// Expects: pass_, query, keys, values, scales, override HEADS, KV_HEADS, DIM; ordered, exp_f32,
// kv_layout, attend.
override SLOTS: u32 = 1u;
override LANES: u32 = 64u;     // 64·SLOTS
override QUERIES: u32 = 4u;    // rows of a set, 1 to 4
override STEPS: u32 = 1u;      // ceil(D/16)
override Q_UNITS: u32 = 16u;   // SLOTS·QUERIES·4·STEPS
override LANE_DIMS: u32 = 4u;  // dimensions of a lane, below

// Queries of the rows, zero past D.
var<workgroup> q: array<vec4<f32>, Q_UNITS>;
// One number a row of the set and lane, as bits.
var<workgroup> of_lanes: array<vec4<u32>, LANES>;

struct Sixteen {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}

// Of each row of the set: the largest score, the sum of the weights, and weighted values in the
// dimensions of the lane.
struct Attended {
    max: vec4<f32>,
    total: vec4<f32>,
    o0: vec4<f32>,
    o1: vec4<f32>,
    o2: vec4<f32>,
    o3: vec4<f32>,
}

// The dimension of component i of a lane's values.
fn lane_dim(lane: u32, i: u32) -> u32 {
    if KV == 0u {
        return lane + 64u * i;
    }
    if KV == 1u {
        return 2u * lane + i % 2u + 128u * (i / 2u);
    }
    return 4u * lane + i;
}

// Queries of the rows from `first` on; past the last row, that one again.
fn load_queries(lid: u32, kv_head: u32, first: u32, n_rows: u32) {
    for (var unit = lid; unit < Q_UNITS; unit += LANES) {
        let row = min(first + unit / (4u * STEPS), n_rows - 1u);
        let d = 4u * (unit % (4u * STEPS));
        let at = head_row(row, kv_head) * DIM + d;
        var four = vec4(0.0);
        for (var i = 0u; i < 4u; i++) {
            if d + i < DIM {
                four[i] = query[at + i];
            }
        }
        q[unit] = four;
    }
    workgroupBarrier();
}

fn key_unit(at: u32, unit: u32) -> vec4<u32> {
    if DIM % 16u != 0u && unit >= KEY_UNITS {
        return vec4(0u);
    }
    return keys[at + unit * BLOCK];
}

// Dimensions 16·step..16·step + 15 of the key at `at`.
fn key16(at: u32, step: u32) -> Sixteen {
    if KV == 0u {
        return Sixteen(
            bitcast<vec4<f32>>(key_unit(at, 4u * step)),
            bitcast<vec4<f32>>(key_unit(at, 4u * step + 1u)),
            bitcast<vec4<f32>>(key_unit(at, 4u * step + 2u)),
            bitcast<vec4<f32>>(key_unit(at, 4u * step + 3u)),
        );
    }
    if KV == 1u {
        let low = key_unit(at, 2u * step);
        let high = key_unit(at, 2u * step + 1u);
        return Sixteen(halves4(low.xy), halves4(low.zw), halves4(high.xy), halves4(high.zw));
    }
    let unit = key_unit(at, step);
    return Sixteen(bytes4(unit.x), bytes4(unit.y), bytes4(unit.z), bytes4(unit.w));
}

fn dot_step(sums: Sixteen, key: Sixteen, at: u32) -> Sixteen {
    return Sixteen(
        sums.a + q[at] * key.a,
        sums.b + q[at + 1u] * key.b,
        sums.c + q[at + 2u] * key.c,
        sums.d + q[at + 3u] * key.d,
    );
}

fn tree_of(sums: Sixteen) -> f32 {
    let four = (sums.a + sums.c) + (sums.b + sums.d);
    let two = four + four.zwxy;
    return two.x + two.y;
}

// query·key of each row of the set, over 16 lanes, then their tree.
fn dots(row_set: u32, at: u32) -> vec4<f32> {
    let row = 4u * STEPS;
    let first = row_set * QUERIES * row;
    let zero = zero4();
    var r0 = Sixteen(zero, zero, zero, zero);
    var r1 = r0;
    var r2 = r0;
    var r3 = r0;
    for (var step = 0u; step < STEPS; step++) {
        let key = key16(at, step);
        let unit = first + 4u * step;
        r0 = dot_step(r0, key, unit);
        if QUERIES > 1u {
            r1 = dot_step(r1, key, unit + row);
        }
        if QUERIES > 2u {
            r2 = dot_step(r2, key, unit + 2u * row);
        }
        if QUERIES > 3u {
            r3 = dot_step(r3, key, unit + 3u * row);
        }
    }
    return vec4(tree_of(r0), tree_of(r1), tree_of(r2), tree_of(r3));
}

fn max_step(lid: u32, step: u32) {
    if lid % 64u < step {
        of_lanes[lid] = max(of_lanes[lid], of_lanes[lid + step]);
    }
    workgroupBarrier();
}

// The maxima over a set; every lane must call.
fn max_of_set(lid: u32, value: vec4<u32>) -> vec4<u32> {
    of_lanes[lid] = value;
    workgroupBarrier();
    max_step(lid, 32u);
    max_step(lid, 16u);
    max_step(lid, 8u);
    max_step(lid, 4u);
    max_step(lid, 2u);
    max_step(lid, 1u);
    let result = of_lanes[lid - lid % 64u];
    workgroupBarrier();
    return result;
}

fn sum_step(lid: u32, step: u32) {
    if lid % 64u < step {
        let sum = bitcast<vec4<f32>>(of_lanes[lid]) + bitcast<vec4<f32>>(of_lanes[lid + step]);
        of_lanes[lid] = bitcast<vec4<u32>>(sum);
    }
    workgroupBarrier();
}

// The sums over a set; every lane must call.
fn sum_of_set(lid: u32, value: vec4<f32>) -> vec4<f32> {
    of_lanes[lid] = bitcast<vec4<u32>>(value);
    workgroupBarrier();
    sum_step(lid, 32u);
    sum_step(lid, 16u);
    sum_step(lid, 8u);
    sum_step(lid, 4u);
    sum_step(lid, 2u);
    sum_step(lid, 1u);
    let result = bitcast<vec4<f32>>(of_lanes[lid - lid % 64u]);
    workgroupBarrier();
    return result;
}

fn exp4(x: vec4<f32>) -> vec4<f32> {
    var e = vec4(exp_f32(x.x), 0.0, 0.0, 0.0);
    if QUERIES > 1u {
        e.y = exp_f32(x.y);
    }
    if QUERIES > 2u {
        e.z = exp_f32(x.z);
    }
    if QUERIES > 3u {
        e.w = exp_f32(x.w);
    }
    return e;
}

fn value_word(at: u32, word: u32) -> u32 {
    if word < VALUE_WORDS {
        return values[at + word];
    }
    return 0u;
}

// The values of a lane's dimensions at one position.
fn value4(at: u32, lane: u32) -> vec4<f32> {
    if KV == 0u {
        var words = vec4(value_word(at, lane), 0u, 0u, 0u);
        if LANE_DIMS > 1u {
            words.y = value_word(at, lane + 64u);
        }
        if LANE_DIMS > 2u {
            words.z = value_word(at, lane + 128u);
        }
        if LANE_DIMS > 3u {
            words.w = value_word(at, lane + 192u);
        }
        return bitcast<vec4<f32>>(words);
    }
    if KV == 1u {
        var words = vec2(value_word(at, lane), 0u);
        if LANE_DIMS > 2u {
            words.y = value_word(at, lane + 64u);
        }
        return halves4(words);
    }
    return bytes4(value_word(at, lane));
}

fn add_value(sums: Attended, weight: vec4<f32>, value: vec4<f32>) -> Attended {
    var next = sums;
    next.o0 += weight * value.x;
    if LANE_DIMS > 1u {
        next.o1 += weight * value.y;
    }
    if LANE_DIMS > 2u {
        next.o2 += weight * value.z;
    }
    if LANE_DIMS > 3u {
        next.o3 += weight * value.w;
    }
    return next;
}

fn weights_at(i: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(of_lanes[i]);
}

// Blocks that every buffer has room for.
fn blocks_there_are() -> u32 {
    let key_units = KV_HEADS * KEY_UNITS * BLOCK;
    let value_words = KV_HEADS * BLOCK * VALUE_WORDS;
    var n = min(arrayLength(&keys) / key_units, arrayLength(&values) / value_words);
    if KV == 2u {
        n = min(n, arrayLength(&scales) / (KV_HEADS * 2u * BLOCK));
    }
    return n;
}

// A block of the shard, of which each row of the set sees the first `seen` positions; every lane must
// call.
fn attend_block(lid: u32, kv_head: u32, block: u32, seen: vec4<u32>) -> Attended {
    let lane = lid % 64u;
    let row_set = lid / 64u;
    let is_seen = vec4(lane) < seen;
    let dot = dots(row_set, key_at(block, kv_head, lane));
    var score = dot * INV_SQRT_DIM;
    var value_scale = 1.0;
    if KV == 2u {
        score *= scales[scale_at(block, kv_head, 0u, lane)];
        value_scale = scales[scale_at(block, kv_head, 1u, lane)];
    }
    score = select(vec4(LOWEST), score, is_seen);
    let lowest = ordered(LOWEST);
    let most = unordered4(max(max_of_set(lid, ordered4(score)), vec4(lowest)));
    let weight = select(vec4(0.0), exp4(score - most), is_seen);
    let zero = vec4(0.0);
    var sums = Attended(most, sum_of_set(lid, weight), zero, zero, zero, zero);
    of_lanes[lid] = bitcast<vec4<u32>>(select(zero, weight * value_scale, is_seen));
    workgroupBarrier();
    let all = min(min(seen.x, seen.y), min(seen.z, seen.w));
    let any = max(max(seen.x, seen.y), max(seen.z, seen.w));
    let weights = lid - lane;
    let at = value_at(block, kv_head, 0u);
    // Four positions a turn, as far as every row sees them.
    for (var i = 0u; i + 4u <= all; i += 4u) {
        let next = at + i * VALUE_WORDS;
        let v0 = value4(next, lane);
        let v1 = value4(next + VALUE_WORDS, lane);
        let v2 = value4(next + 2u * VALUE_WORDS, lane);
        let v3 = value4(next + 3u * VALUE_WORDS, lane);
        sums = add_value(sums, weights_at(weights + i), v0);
        sums = add_value(sums, weights_at(weights + i + 1u), v1);
        sums = add_value(sums, weights_at(weights + i + 2u), v2);
        sums = add_value(sums, weights_at(weights + i + 3u), v3);
    }
    for (var i = all - all % 4u; i < any; i++) {
        // What a row does not see leaves its sum alone, whatever it is.
        let next = add_value(sums, weights_at(weights + i), value4(at + i * VALUE_WORDS, lane));
        let sees = vec4(i) < seen;
        sums.o0 = select(sums.o0, next.o0, sees);
        sums.o1 = select(sums.o1, next.o1, sees);
        sums.o2 = select(sums.o2, next.o2, sees);
        sums.o3 = select(sums.o3, next.o3, sees);
    }
    workgroupBarrier();
    return sums;
}
