// sample_weights: how probable every token is, and how much of that lies how far below the best.
//   weights[n] = exp((l'[n] − max l') / temperature); at temperature 0, 1 for the best and 0 for others
//   per chunk of 1024 tokens: tokens and mass of each of 16 levels, mass of what min_p keeps
// | # | name      | type           | shape                | notes                                    |
// | 0 | pass      | uniform        | Pass                 | temperature, min_p                       |
// | 1 | bits      | read u32       | [V]                  | of sample_blocks                         |
// | 2 | block_max | read u32       | [⌈V/256⌉]            | of sample_blocks                         |
// | 3 | weights   | read_write f32 | [V]                  | 0 to 1                                   |
// | 4 | levels    | read_write u32 | [18 + 50·⌈V/1024⌉]   | see below                                |
// levels: the largest bits, 15 thresholds, the smallest bits with a probability above 0, the smallest
// that min_p keeps; then for each chunk 16 × (count, mass low, mass high) and the mass that min_p keeps.
// Level j holds weights of e^−(j+1) to e^−j, the last one all below.
// Workgroup: 4 tokens a lane; grid (⌈V/1024⌉, 1, 1). Each reduces all of block_max.
// Twin: cpu-ref/src/sample.rs. A weight is within 2e-7 + 4.2e-7·|x| of exp(x): exp_f32 and a division
// of 2.5 ULP; sums are exact (shared/mass.wgsl).
#import pass
#import ordered
#import exp
#import reduce_tree
#import mass
#import levels

const WG: u32 = 256u;
override V: u32 = 1u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> bits: array<u32>;
@group(0) @binding(2) var<storage, read> block_max: array<u32>;
@group(0) @binding(3) var<storage, read_write> weights: array<f32>;
@group(0) @binding(4) var<storage, read_write> levels: array<u32>;

const HEADER: u32 = 18u;
const RECORD: u32 = 50u;
// The smallest finite value, ordered.
const LOWEST: u32 = 0x00800000u;
// e^x is above 0 in f64 down to here: these tokens count for top_k, as on the host.
const MIN_EXPONENT: f32 = -745.1332;

fn exponent(token_bits: u32, best: f32) -> f32 {
    let below = unordered(token_bits) - best;
    if below == 0.0 {
        return 0.0;
    }
    if pass_.temperature == 0.0 {
        return 2.0 * MIN_EXPONENT;
    }
    return below / pass_.temperature;
}

// The smallest bits from `lowest` on with a probability above 0 that is at least `min_p`.
fn first_bits(best_bits: u32, lowest: u32, min_p: f32) -> u32 {
    let best = unordered(best_bits);
    var low = lowest;
    var high = best_bits;
    while low < high {
        let middle = low + (high - low) / 2u;
        let x = exponent(middle, best);
        if x >= MIN_EXPONENT && exp_f32(x) >= min_p {
            high = middle;
        } else {
            low = middle + 1u;
        }
    }
    return high;
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    var largest = 0u;
    for (var block = lid; block < (V + 255u) / 256u; block += WG) {
        largest = max(largest, block_max[block]);
    }
    let best_bits = reduce_max_u32(lid, largest);
    // If that is NaN or infinite, what follows is of no use and no harm: sample gives no token.
    let best = unordered(best_bits);
    let least = first_bits(best_bits, LOWEST, 0.0);
    let kept_from = first_bits(best_bits, least, pass_.min_p);
    if lid < LEVELS {
        thresholds[lid] = ordered(best - f32(lid) * pass_.temperature);
        if group.x == 0u {
            levels[lid] = select(thresholds[lid], best_bits, lid == 0u);
        }
    }
    if group.x == 0u && lid == 0u {
        levels[LEVELS] = least;
        levels[LEVELS + 1u] = kept_from;
    }
    workgroupBarrier();
    var by_level = NO_TALLY;
    var kept = NO_TALLY;
    for (var part = 0u; part < 4u; part += 1u) {
        let id = group.x * CHUNK + part * WG + lid;
        var token_bits = 0u;
        var weight = 0.0;
        if id < V {
            token_bits = bits[id];
            if token_bits >= least {
                weight = exp_f32(exponent(token_bits, best));
            }
            weights[id] = weight;
        }
        let counts = id < V && token_bits >= least;
        by_level = add_round(lid, counts, token_bits, weight, by_level);
        if counts && token_bits >= kept_from {
            kept = tally_add(kept, Tally(1u, mass_of(weight)));
        }
    }
    let level = sum_lanes(lid, by_level, LEVELS);
    let all_kept = sum_lanes(lid, kept, 1u);
    let record = HEADER + group.x * RECORD;
    if lid < LEVELS {
        levels[record + 3u * lid] = level.count;
        levels[record + 3u * lid + 1u] = level.mass.x;
        levels[record + 3u * lid + 2u] = level.mass.y;
    }
    if lid == 0u {
        levels[record + 48u] = all_kept.mass.x;
        levels[record + 49u] = all_kept.mass.y;
    }
}
