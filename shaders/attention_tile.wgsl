// attention_tile: causal grouped-query attention of many tokens over the KV cache (prefill).
//   out[m,h] = softmax(q[m,h]·K[..=start+m, h/(H/G)]ᵀ / √D) · V
// | # | name      | type            | shape            | notes                                    |
// | 0 | pass      | uniform         | Pass             | n_tokens, start; first_block, end_block  |
// | 1 | query     | read f32        | [M, H, D]        | RoPE applied                             |
// | 2 | keys      | read vec4<u32>  | shared/kv_layout | this layer's cache                       |
// | 3 | values    | read vec4<u32>  | shared/kv_layout |                                          |
// | 4 | scales    | read f32        | shared/kv_layout | f32 and f16: unused                      |
// | 5 | table     | read u32        | [S/64]           | the sequence's blocks                    |
// | 6 | state_in  | read f32        | [M, H, D + 2]    | PARTS = 0: unused                        |
// | 7 | out       | read_write f32  | [M, H, D]        |                                          |
// | 8 | state_out | read_write f32  | [M, H, D + 2]    | PARTS = 0: unused                        |
// Workgroup: ROWS rows of a KV head, a row being one of its query heads of a token, in the order of
// tokens; grid (G, ceil(M·H/G / ROWS), 1). Requires D ≤ 256.
// A block of 64 positions at a time, in three ways of sharing the work, a barrier after each:
//   scores   a lane has 4 rows × KEYS keys that are KEY_LANES apart: what it loads serves 4·KEYS products
//   weights  ROW_LANES lanes share a row: its keys of one remainder of ROW_LANES each, so that the sums
//            of the tree (cpu-ref/src/reduce.rs) are first a lane's own, then those of few lanes
//   values   a lane has LANE_ROWS rows × 4 dimensions
// Where the cache has shards (PARTS = 1), a dispatch takes blocks first_block..end_block, which lie in
// one; sums, maximum and total go from one to the next through state, and the last writes out.
// Twin: cpu-ref/src/attention.rs, same order of sums and same exp. Bound: what fused products and an
// inexact division change; equal bits where products and sums are rounded apart.
#import pass
#import ordered
#import exp
#import kv_layout
#import attend

override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 2u;
override PARTS: u32 = 0u;
override ROWS: u32 = 16u;
override KEYS: u32 = 4u;       // 1, 2 or 4
override KEY_LANES: u32 = 16u; // 64/KEYS
override ROW_LANES: u32 = 4u;  // 16/KEYS
override LANES: u32 = 64u;     // ROWS·ROW_LANES
override STEPS: u32 = 1u;      // ceil(D/16)
override Q_UNITS: u32 = 64u;   // ROWS·4·STEPS
override S_UNITS: u32 = 256u;  // 16·ROWS
override SHARES: u32 = 16u;    // LANES/4
override CHUNKS: u32 = 1u;     // ceil(D/4), at the next power of two
override LANE_ROWS: u32 = 1u;  // max(1, 4·CHUNKS/KEY_LANES), up to 4
override VALUE_UNITS: u32 = 1u; // VALUE_WORDS/4

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> query: array<f32>;
@group(0) @binding(2) var<storage, read> keys: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> values: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> scales: array<f32>;
@group(0) @binding(5) var<storage, read> table: array<u32>;
@group(0) @binding(6) var<storage, read> state_in: array<f32>;
@group(0) @binding(7) var<storage, read_write> out: array<f32>;
@group(0) @binding(8) var<storage, read_write> state_out: array<f32>;

// Queries of the rows, zero past D.
var<workgroup> q: array<vec4<f32>, Q_UNITS>;
// Scores [ROWS, ROW_LANES, KEYS], then weights [ROWS, 16] in the order of positions.
var<workgroup> scores: array<vec4<f32>, S_UNITS>;
// What each lane of a row finds: its largest score, ordered, and the sum of its weights.
var<workgroup> maxima: array<vec4<u32>, SHARES>;
var<workgroup> totals: array<vec4<f32>, SHARES>;

// One vector for each key of a lane, or for each row.
struct Four {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}

// Four keys each of four rows.
struct Products {
    r0: Four,
    r1: Four,
    r2: Four,
    r3: Four,
}

// Of a lane's rows: largest score, sum of weights, weighted values in the lane's four dimensions.
struct Attended {
    max: vec4<f32>,
    total: vec4<f32>,
    o: Four,
}

fn zero_four() -> Four {
    return Four(vec4(0.0), vec4(0.0), vec4(0.0), vec4(0.0));
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

// Dimensions 4·unit..4·unit + 3 of the key at `at`.
fn key4(at: u32, unit: u32) -> vec4<f32> {
    if KV == 0u {
        return bitcast<vec4<f32>>(key_unit(at, unit));
    }
    if KV == 1u {
        let words = key_unit(at, unit / 2u);
        return halves4(select(words.xy, words.zw, unit % 2u == 1u));
    }
    return bytes4(key_unit(at, unit / 4u)[unit % 4u]);
}

fn keys4(at: u32, unit: u32) -> Four {
    var four = zero_four();
    four.a = key4(at, unit);
    if KEYS > 1u {
        four.b = key4(at + KEY_LANES, unit);
    }
    if KEYS > 2u {
        four.c = key4(at + 2u * KEY_LANES, unit);
        four.d = key4(at + 3u * KEY_LANES, unit);
    }
    return four;
}

fn times(sums: Four, x: vec4<f32>, key: Four) -> Four {
    return Four(sums.a + x * key.a, sums.b + x * key.b, sums.c + x * key.c, sums.d + x * key.d);
}

// The four of a dot product's 16 sums that take dimensions 16·step + 4·part and the three after.
fn products(rows: u32, at: u32, part: u32) -> Products {
    let zero = Four(zero4(), zero4(), zero4(), zero4());
    var sums = Products(zero, zero, zero, zero);
    for (var step = 0u; step < STEPS; step++) {
        let unit = 4u * step + part;
        let key = keys4(at, unit);
        sums.r0 = times(sums.r0, q[rows + unit], key);
        sums.r1 = times(sums.r1, q[rows + 4u * STEPS + unit], key);
        sums.r2 = times(sums.r2, q[rows + 8u * STEPS + unit], key);
        sums.r3 = times(sums.r3, q[rows + 12u * STEPS + unit], key);
    }
    return sums;
}

fn plus(x: Four, y: Four) -> Four {
    return Four(x.a + y.a, x.b + y.b, x.c + y.c, x.d + y.d);
}

fn add(x: Products, y: Products) -> Products {
    return Products(plus(x.r0, y.r0), plus(x.r1, y.r1), plus(x.r2, y.r2), plus(x.r3, y.r3));
}

// The last two steps of a tree.
fn sum_of(x: vec4<f32>) -> f32 {
    let two = x + x.zwxy;
    return two.x + two.y;
}

// query·key of one row and each key.
fn dots(x: Four) -> vec4<f32> {
    return vec4(sum_of(x.a), sum_of(x.b), sum_of(x.c), sum_of(x.d));
}

// Scores of a row: its lane's keys are those of one remainder of ROW_LANES.
fn store_scores(row: u32, key: u32, dot: vec4<f32>, scale: vec4<f32>, seen: u32) {
    let at = (row * ROW_LANES + key % ROW_LANES) * KEYS;
    let score = dot * INV_SQRT_DIM * scale;
    for (var i = 0u; i < KEYS; i++) {
        let is_seen = key + KEY_LANES * i < seen;
        scores[at + i][key / ROW_LANES] = select(LOWEST, score[i], is_seen);
    }
}

// Each row's scores of a block.
fn score(lid: u32, kv_head: u32, block: u32, seen: vec4<u32>) {
    let key = lid % KEY_LANES;
    let row = lid / KEY_LANES * 4u;
    let at = key_at(block, kv_head, key);
    let rows = row * 4u * STEPS;
    var scale = vec4(1.0);
    if KV == 2u {
        for (var i = 0u; i < KEYS; i++) {
            scale[i] = scales[scale_at(block, kv_head, 0u, key + KEY_LANES * i)];
        }
    }
    let even = add(products(rows, at, 0u), products(rows, at, 2u));
    let all = add(even, add(products(rows, at, 1u), products(rows, at, 3u)));
    store_scores(row, key, dots(all.r0), scale, seen.x);
    store_scores(row + 1u, key, dots(all.r1), scale, seen.y);
    store_scores(row + 2u, key, dots(all.r2), scale, seen.z);
    store_scores(row + 3u, key, dots(all.r3), scale, seen.w);
    workgroupBarrier();
}

// The largest of a row's shares from `at` on, ordered.
fn max_of_row(row: u32) -> u32 {
    var most = vec4(0u);
    for (var i = 0u; i < ROW_LANES / 4u; i++) {
        most = max(most, maxima[row * (ROW_LANES / 4u) + i]);
    }
    return max(max(most.x, most.y), max(most.z, most.w));
}

// The tree over a row's lanes.
fn total_of_row(row: u32) -> f32 {
    let at = row * (ROW_LANES / 4u);
    if ROW_LANES == 4u {
        return sum_of(totals[at]);
    }
    if ROW_LANES == 8u {
        return sum_of(totals[at] + totals[at + 1u]);
    }
    return sum_of((totals[at] + totals[at + 2u]) + (totals[at + 1u] + totals[at + 3u]));
}

fn exp4(x: vec4<f32>) -> vec4<f32> {
    return vec4(exp_f32(x.x), exp_f32(x.y), exp_f32(x.z), exp_f32(x.w));
}

// Four weights, of scores from the same place of four rows of lanes: their keys are ROW_LANES apart.
fn weigh(row: u32, key: u32, score: vec4<f32>, most: f32, block_scales: u32, seen: u32) -> vec4<f32> {
    let keys = vec4(key) + vec4(0u, 1u, 2u, 3u) * ROW_LANES;
    let weight = select(vec4(0.0), exp4(score - most), keys < vec4(seen));
    for (var i = 0u; i < 4u; i++) {
        var scaled = weight[i];
        if KV == 2u {
            scaled *= scales[block_scales + keys[i]];
            // A position that is not seen may have any scale.
            scaled = select(0.0, scaled, keys[i] < seen);
        }
        scores[row * 16u + keys[i] / 4u][keys[i] % 4u] = scaled;
    }
    return weight;
}

// Each row's weights of a block.
fn weights(lid: u32, kv_head: u32, block: u32, seen: u32) {
    let row = lid / ROW_LANES;
    let key = lid % ROW_LANES;
    let at = lid * KEYS;
    var s = Four(scores[at], vec4(LOWEST), vec4(LOWEST), vec4(LOWEST));
    if KEYS > 1u {
        s.b = scores[at + 1u];
    }
    if KEYS > 2u {
        s.c = scores[at + 2u];
        s.d = scores[at + 3u];
    }
    let most4 = max(max(ordered4(s.a), ordered4(s.b)), max(ordered4(s.c), ordered4(s.d)));
    maxima[lid / 4u][lid % 4u] = max(max(most4.x, most4.y), max(most4.z, most4.w));
    workgroupBarrier();
    let most = unordered(max_of_row(row));
    let block_scales = scale_at(block, kv_head, 1u, 0u);
    let stride = 4u * ROW_LANES;
    var sum = weigh(row, key, s.a, most, block_scales, seen);
    if KEYS == 2u {
        sum += weigh(row, key + stride, s.b, most, block_scales, seen);
    }
    if KEYS == 4u {
        let b = weigh(row, key + stride, s.b, most, block_scales, seen);
        sum += weigh(row, key + 2u * stride, s.c, most, block_scales, seen);
        sum += b + weigh(row, key + 3u * stride, s.d, most, block_scales, seen);
    }
    totals[lid / 4u][lid % 4u] = sum_of(sum);
    workgroupBarrier();
}

// The lane's four dimensions at a position.
fn value4(at: u32, chunk: u32) -> vec4<f32> {
    if KV == 0u {
        return bitcast<vec4<f32>>(values[at]);
    }
    if KV == 1u {
        let words = values[at];
        return halves4(select(words.xy, words.zw, chunk % 2u == 1u));
    }
    return bytes4(values[at][chunk % 4u]);
}

fn four_positions(sum: vec4<f32>, at: u32, v: Four) -> vec4<f32> {
    let weight = scores[at];
    return (((sum + weight.x * v.a) + weight.y * v.b) + weight.z * v.c) + weight.w * v.d;
}

// What a row does not see leaves its sum alone, whatever it is.
fn position(sum: vec4<f32>, at: u32, i: u32, value: vec4<f32>, seen: u32) -> vec4<f32> {
    let weight = scores[at + i / 4u][i % 4u];
    return select(sum, sum + weight * value, i < seen);
}

// Weighted values of a block: rows from `row` on, of which each sees the first `seen` positions.
fn weigh_values(row: u32, kv_head: u32, block: u32, chunk: u32, seen: vec4<u32>) -> Four {
    var o = zero_four();
    // Past the last unit, that one again: such dimensions are not stored.
    let first = value_at(block, kv_head, 0u) / 4u + min(chunk >> KV, VALUE_UNITS - 1u);
    let at = row * 16u;
    let all = min(min(seen.x, seen.y), min(seen.z, seen.w));
    let any = max(max(seen.x, seen.y), max(seen.z, seen.w));
    // Four positions a turn, as far as every row sees them.
    for (var i = 0u; i + 4u <= all; i += 4u) {
        let next = first + i * VALUE_UNITS;
        let v = Four(
            value4(next, chunk),
            value4(next + VALUE_UNITS, chunk),
            value4(next + 2u * VALUE_UNITS, chunk),
            value4(next + 3u * VALUE_UNITS, chunk),
        );
        o.a = four_positions(o.a, at + i / 4u, v);
        if LANE_ROWS > 1u {
            o.b = four_positions(o.b, at + 16u + i / 4u, v);
        }
        if LANE_ROWS > 2u {
            o.c = four_positions(o.c, at + 32u + i / 4u, v);
            o.d = four_positions(o.d, at + 48u + i / 4u, v);
        }
    }
    for (var i = all - all % 4u; i < any; i++) {
        let value = value4(first + i * VALUE_UNITS, chunk);
        o.a = position(o.a, at, i, value, seen.x);
        if LANE_ROWS > 1u {
            o.b = position(o.b, at + 16u, i, value, seen.y);
        }
        if LANE_ROWS > 2u {
            o.c = position(o.c, at + 32u, i, value, seen.z);
            o.d = position(o.d, at + 48u, i, value, seen.w);
        }
    }
    return o;
}

// The block's part of a lane's rows, of which only LANE_ROWS differ.
fn of_rows(rows: vec4<u32>, o: Four) -> Attended {
    var part = Attended(vec4(0.0), vec4(0.0), o);
    for (var i = 0u; i < 4u; i++) {
        part.max[i] = unordered(max_of_row(rows[i]));
        part.total[i] = total_of_row(rows[i]);
    }
    return part;
}

fn merged(x: Attended, part: Attended) -> Attended {
    let most = max4(x.max, part.max);
    let decay = exp4(x.max - most);
    let growth = exp4(part.max - most);
    var o = x.o;
    o.a = o.a * decay.x + part.o.a * growth.x;
    o.b = o.b * decay.y + part.o.b * growth.y;
    o.c = o.c * decay.z + part.o.c * growth.z;
    o.d = o.d * decay.w + part.o.d * growth.w;
    return Attended(most, x.total * decay + part.total * growth, o);
}

fn load_row(row: u32, d: u32) -> vec4<f32> {
    var o = vec4(0.0);
    for (var i = 0u; i < 4u; i++) {
        if d + i < DIM {
            o[i] = state_in[row * (DIM + 2u) + d + i];
        }
    }
    return o;
}

fn store_row(row: u32, d: u32, most: f32, total: f32, o: vec4<f32>, is_last: bool) {
    for (var i = 0u; i < 4u; i++) {
        if d + i < DIM {
            if is_last {
                out[row * DIM + d + i] = o[i] / total;
            } else {
                state_out[row * (DIM + 2u) + d + i] = o[i];
            }
        }
    }
    if !is_last && d == 0u {
        state_out[row * (DIM + 2u) + DIM] = most;
        state_out[row * (DIM + 2u) + DIM + 1u] = total;
    }
}

// What the parts before have found.
fn load_state(rows: vec4<u32>, kv_head: u32, d: u32) -> Attended {
    let heads = vec4(
        head_row(rows.x, kv_head),
        head_row(rows.y, kv_head),
        head_row(rows.z, kv_head),
        head_row(rows.w, kv_head),
    );
    let o = Four(load_row(heads.x, d), load_row(heads.y, d), load_row(heads.z, d), load_row(heads.w, d));
    var state = Attended(vec4(0.0), vec4(0.0), o);
    for (var i = 0u; i < 4u; i++) {
        state.max[i] = state_in[heads[i] * (DIM + 2u) + DIM];
        state.total[i] = state_in[heads[i] * (DIM + 2u) + DIM + 1u];
    }
    return state;
}

// Tokens that every buffer has room for.
fn tokens_there_are() -> u32 {
    let row = HEADS * DIM;
    var n = min(pass_.n_tokens, min(arrayLength(&query), arrayLength(&out)) / row);
    if PARTS == 1u {
        n = min(n, min(arrayLength(&state_in), arrayLength(&state_out)) / (HEADS * (DIM + 2u)));
    }
    return n;
}

// Blocks that every buffer has room for.
fn blocks_there_are() -> u32 {
    let key_units = KV_HEADS * KEY_UNITS * BLOCK;
    let value_units = KV_HEADS * BLOCK * VALUE_UNITS;
    var n = min(arrayLength(&keys) / key_units, arrayLength(&values) / value_units);
    if KV == 2u {
        n = min(n, arrayLength(&scales) / (KV_HEADS * 2u * BLOCK));
    }
    return n;
}

// Positions of a block that rows with such ends see.
fn seen_of(ends: vec4<u32>, index: u32) -> vec4<u32> {
    return min(max(ends, vec4(index * BLOCK)) - vec4(index * BLOCK), vec4(BLOCK));
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let ratio = HEADS / KV_HEADS;
    let n_rows = tokens_there_are() * ratio;
    let kv_head = wg.x;
    let first = wg.y * ROWS;
    if first >= n_rows {
        return;
    }
    load_queries(lid, kv_head, first, n_rows);
    // Rows of the workgroup that a lane has of each of the three ways.
    let score_rows = vec4(lid / KEY_LANES * 4u) + vec4(0u, 1u, 2u, 3u);
    let weight_row = vec4(lid / ROW_LANES);
    let has_values = lid / CHUNKS * LANE_ROWS < ROWS;
    let value_row = min(lid / CHUNKS * LANE_ROWS, ROWS - LANE_ROWS);
    let value_rows = vec4(value_row) + min(vec4(0u, 1u, 2u, 3u), vec4(LANE_ROWS - 1u));
    let chunk = lid % CHUNKS;
    // Positions that each row sees.
    let see = vec4(pass_.start + 1u);
    let most_rows = vec4(n_rows - 1u);
    let score_ends = see + min(vec4(first) + score_rows, most_rows) / ratio;
    let weight_ends = see + min(vec4(first) + weight_row, most_rows) / ratio;
    let value_ends = see + min(vec4(first) + value_rows, most_rows) / ratio;
    let last_row = min(first + ROWS, n_rows) - 1u;
    var end_block = min((pass_.start + last_row / ratio) / BLOCK + 1u, arrayLength(&table));
    var first_block = 0u;
    var is_last = true;
    var state = Attended(vec4(LOWEST), vec4(0.0), zero_four());
    if PARTS == 1u {
        first_block = pass_.first_block;
        is_last = pass_.end_block * BLOCK >= pass_.start + pass_.n_tokens;
        end_block = min(end_block, pass_.end_block);
        if first_block > 0u {
            state = load_state(min(vec4(first) + value_rows, most_rows), kv_head, 4u * chunk);
        }
    }
    let last_block = blocks_there_are() - 1u;
    for (var index = first_block; index < end_block; index++) {
        let block = min(table[index] - BLOCK_BASE, last_block);
        score(lid, kv_head, block, seen_of(score_ends, index));
        weights(lid, kv_head, block, seen_of(weight_ends, index).x);
        let seen = seen_of(value_ends, index);
        let o = weigh_values(value_row, kv_head, block, chunk, seen);
        state = merged(state, of_rows(value_rows, o));
        workgroupBarrier();
    }
    if !has_values {
        return;
    }
    for (var i = 0u; i < LANE_ROWS; i++) {
        let row = first + value_row + i;
        if row < n_rows {
            var o = state.o.a;
            if i == 1u {
                o = state.o.b;
            }
            if i == 2u {
                o = state.o.c;
            }
            if i == 3u {
                o = state.o.d;
            }
            store_row(head_row(row, kv_head), 4u * chunk, state.max[i], state.total[i], o, is_last);
        }
    }
}
