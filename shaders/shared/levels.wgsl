// Tokens and their mass by level: how far below the best they are, by thresholds that fall.
// Expects: mass, const WG = 256. Every lane must call. No atomics: a lane adds up one level of every
// sixteenth of the tokens, then a tree adds the sixteenths. No loops either: a search goes through here
// thousands of times, and llvmpipe ends a lane's loops after 65,535 iterations of all together.
const LEVELS: u32 = 16u;
// Tokens a round of four: those of one workgroup of sample_weights.
const CHUNK: u32 = 1024u;

// Level j > 0 holds what is below thresholds[j] and not below thresholds[j + 1].
var<workgroup> thresholds: array<u32, 16>;
var<workgroup> round_level: array<u32, 256>;
var<workgroup> round_weight: array<f32, 256>;
// What lanes add up together.
var<workgroup> lane_tally: array<Tally, 256>;

fn level_of(bits: u32) -> u32 {
    var level = select(0u, 8u, bits < thresholds[8]);
    level += select(0u, 4u, bits < thresholds[level + 4u]);
    level += select(0u, 2u, bits < thresholds[level + 2u]);
    return level + select(0u, 1u, bits < thresholds[level + 1u]);
}

// The lane's tally with the tokens of its level added: one token of bits `bits` a lane, not counted
// if `counts` is false.
fn add_round(lid: u32, counts: bool, bits: u32, weight: f32, so_far: Tally) -> Tally {
    round_level[lid] = select(LEVELS, level_of(bits), counts);
    round_weight[lid] = weight;
    workgroupBarrier();
    let first = lid / LEVELS * LEVELS;
    var tally = add_four(first, lid % LEVELS, so_far);
    tally = add_four(first + 4u, lid % LEVELS, tally);
    tally = add_four(first + 8u, lid % LEVELS, tally);
    tally = add_four(first + 12u, lid % LEVELS, tally);
    workgroupBarrier();
    return tally;
}

fn add_four(first: u32, level: u32, so_far: Tally) -> Tally {
    var tally = add_one(first, level, so_far);
    tally = add_one(first + 1u, level, tally);
    tally = add_one(first + 2u, level, tally);
    return add_one(first + 3u, level, tally);
}

fn add_one(i: u32, level: u32, so_far: Tally) -> Tally {
    if round_level[i] == level {
        return tally_add(so_far, Tally(1u, mass_of(round_weight[i])));
    }
    return so_far;
}

// Lane l < `groups` gets the sum of lanes l, l + groups, …; `groups` is a power of two.
fn sum_lanes(lid: u32, tally: Tally, groups: u32) -> Tally {
    lane_tally[lid] = tally;
    workgroupBarrier();
    for (var step = WG / 2u; step >= groups; step /= 2u) {
        if lid < step {
            lane_tally[lid] = tally_add(lane_tally[lid], lane_tally[lid + step]);
        }
        workgroupBarrier();
    }
    let sum = lane_tally[lid % groups];
    workgroupBarrier();
    return sum;
}
