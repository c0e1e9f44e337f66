// gemm_planes: ternary matrix × int8 matrix (prefill), addition-only; see gemv_planes.
//   acc[m, n] = Σ_k w[n,k]·q[m,k]
// A workgroup goes through K in chunks of 64, whose bit planes it puts into workgroup memory; each lane
// then combines 8 rows with 4 tokens out of registers. Where bit j of q is 1 a weight counts if it is
// 1, else if it is −1: (Z & q) ^ S, as signs are among the non-zeros. The counts of the planes are
// doubled and added, beginning with the sign. The next chunk is loaded while this one is combined.
// | # | name   | type           | shape             | notes                                    |
// | 0 | pass   | uniform        | Pass              | n_tokens                                 |
// | 1 | w      | read vec4<u32> | [tiles, KC, 32]   | Z0 Z1 S0 S1; layout/planes.rs            |
// | 2 | x      | read vec4<u32> | [M, 4·KC]         | bit planes of quantize_absmax            |
// | 3 | offset | read i32       | [32·tiles]        | negatives: number of −1 in each row      |
// | 4 | acc    | read_write i32 | [M, N_PAD]        | rows 32·TILE_BASE..                      |
// Workgroup: LANES_R·LANES_T lanes compute 8·LANES_R rows of 4·LANES_T tokens;
// grid (ceil(ROWS / 8·LANES_R), ceil(M / 4·LANES_T), 1).
// Requires LANES_T ≥ 8, LANES_R ≥ 8, M ≤ MAX_TOKENS.
// Twin: cpu-ref/src/gemm.rs. Exact.
#import pass
#import gemm_tile

override X_UNITS: u32 = 260u; // 16·LANES_T + 4: four a token, and one that spreads them over banks

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read_write> acc: array<i32>;

var<workgroup> rows: array<vec4<u32>, R>;         // [R]: Z0 Z1 S0 S1
var<workgroup> tokens: array<vec4<u32>, X_UNITS>; // [4, T + 1]

// Four rows: a component each.
struct Rows {
    nonzero0: vec4<u32>,
    nonzero1: vec4<u32>,
    negative0: vec4<u32>,
    negative1: vec4<u32>,
}

fn rows_at(at: u32) -> Rows {
    let a = rows[at];
    let b = rows[at + LANES_R];
    let c = rows[at + 2u * LANES_R];
    let d = rows[at + 3u * LANES_R];
    return Rows(
        vec4(a.x, b.x, c.x, d.x),
        vec4(a.y, b.y, c.y, d.y),
        vec4(a.z, b.z, c.z, d.z),
        vec4(a.w, b.w, c.w, d.w),
    );
}

// One plane of both halves, counted on top of `sum`.
fn count(four: Rows, q0: u32, q1: u32, sum: vec4<u32>) -> vec4<u32> {
    let first = (vec4(q0) & four.nonzero0) ^ four.negative0;
    let second = (vec4(q1) & four.nonzero1) ^ four.negative1;
    return countOneBits(second) + (countOneBits(first) + sum);
}

// A token's planes: 0 to 3 and 4 to 7 of the first half, and of the second.
fn weigh(four: Rows, low0: vec4<u32>, high0: vec4<u32>, low1: vec4<u32>, high1: vec4<u32>) -> vec4<u32> {
    var sum = vec4<u32>(0u) - count(four, high0.w, high1.w, vec4<u32>(0u));
    sum = count(four, high0.z, high1.z, sum << vec4(1u));
    sum = count(four, high0.y, high1.y, sum << vec4(1u));
    sum = count(four, high0.x, high1.x, sum << vec4(1u));
    sum = count(four, low0.w, low1.w, sum << vec4(1u));
    sum = count(four, low0.z, low1.z, sum << vec4(1u));
    sum = count(four, low0.y, low1.y, sum << vec4(1u));
    return count(four, low0.x, low1.x, sum << vec4(1u));
}

// The sums of 8 rows for a token.
struct Sums {
    a: vec4<u32>,
    b: vec4<u32>,
}

fn add(sums: Sums, a: Rows, b: Rows, token: u32) -> Sums {
    let low0 = tokens[token];
    let high0 = tokens[token + T + 1u];
    let low1 = tokens[token + 2u * (T + 1u)];
    let high1 = tokens[token + 3u * (T + 1u)];
    return Sums(
        sums.a + weigh(a, low0, high0, low1, high1),
        sums.b + weigh(b, low0, high0, low1, high1),
    );
}

fn store(tile: Tile, t: u32, sums: Sums) {
    let m = tile.token + tile.lane_t + LANES_T * t;
    if m > tile.last {
        return;
    }
    for (var i = 0u; i < 4u; i++) {
        let row = tile.row + tile.lane_r + LANES_R * i;
        let to = m * N_PAD + (TILE_BASE << 5u);
        if row < ROWS {
            acc[to + row] = bitcast<i32>(sums.a[i]) + offset[row];
        }
        let other = row + 4u * LANES_R;
        if other < ROWS {
            acc[to + other] = bitcast<i32>(sums.b[i]) + offset[other];
        }
    }
}

@compute @workgroup_size(LANES)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let tile = tile_of(wg, lid);
    let mine = loads_of(tile, lid);
    var sums0 = Sums(vec4<u32>(0u), vec4<u32>(0u));
    var sums1 = Sums(vec4<u32>(0u), vec4<u32>(0u));
    var sums2 = Sums(vec4<u32>(0u), vec4<u32>(0u));
    var sums3 = Sums(vec4<u32>(0u), vec4<u32>(0u));
    var piece = w[mine.piece];
    var unit = x[mine.unit];
    var other = x[mine.other];
    for (var c = 0u; c < KC; c++) {
        if lid < R {
            rows[lid] = piece;
        }
        tokens[mine.slot] = unit;
        if 4u * T > LANES {
            tokens[mine.other_slot] = other;
        }
        workgroupBarrier();
        let next = min(c + 1u, KC - 1u);
        piece = w[mine.piece + 32u * next];
        unit = x[mine.unit + 4u * next];
        if 4u * T > LANES {
            other = x[mine.other + 4u * next];
        }
        let a = rows_at(tile.lane_r);
        let b = rows_at(tile.lane_r + 4u * LANES_R);
        sums0 = add(sums0, a, b, tile.lane_t);
        sums1 = add(sums1, a, b, tile.lane_t + LANES_T);
        sums2 = add(sums2, a, b, tile.lane_t + 2u * LANES_T);
        sums3 = add(sums3, a, b, tile.lane_t + 3u * LANES_T);
        workgroupBarrier();
    }
    store(tile, 0u, sums0);
    store(tile, 1u, sums1);
    store(tile, 2u, sums2);
    store(tile, 3u, sums3);
}
