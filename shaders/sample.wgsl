// sample: draws the next token; logits never leave the device.
//   by rank (larger logit first, of equals the smaller id) keep top_k tokens, of those the fewest that
//   hold top_p of their mass, of those the ones that weigh min_p at least; the token is the first whose
//   cumulative mass exceeds u · kept mass: by rank after a cut by top_k or top_p, else by id.
//   Temperature 0 is top_k 1. 0xffffffff if a logit is NaN or +∞, or none is above −∞.
// | # | name      | type           | shape              | notes                                     |
// | 0 | pass      | uniform        | Pass               | token_out, uniform, temperature, top_k, top_p |
// | 1 | bits      | read u32       | [V]                | of sample_blocks                          |
// | 2 | block_max | read u32       | [⌈V/256⌉]          | of sample_blocks                          |
// | 3 | weights   | read f32       | [V]                | of sample_weights                         |
// | 4 | levels    | read u32       | [18 + 50·⌈V/1024⌉] | of sample_weights                         |
// | 5 | uniforms  | read f32       | [any]              | u of each draw, if UNIFORMS               |
// | 6 | seen      | read_write u32 | [logit rows, ⌈V/32⌉] | the token's bit is set, by one lane, in the last row |
// | 7 | token     | read_write u32 | [any]              | at token_out, one a draw                  |
// Workgroup: 256 lanes; grid (1, draws, 1), one draw unless UNIFORMS; the first draw sets the bit.
// Twin: cpu-ref/src/sample.rs. Exact but for the weights: counts and masses are integers
// (shared/mass.wgsl), so a token differs from the twin's only where u or a cut is as close to a
// boundary as the errors of weights, about 1e-6 of the mass.
//
// Every cut, and the draw by rank, is one search: the first token by rank at which a count or a mass
// reaches a target.
//   1. The levels of sample_weights say in which level that is, and what is ranked before it.
//   2. While the level has more than CAPACITY tokens, divide its range of bits by 16 and count again,
//      in chunks whose maximum reaches the range. If one value is left, its tokens rank by id.
//   3. List the tokens, and find what is ranked before each by comparing all pairs. If all tokens down
//      to the end of the level fit, the list has them all, and serves later searches.
// Bytes read for V = 128,256, beside 25 KB of levels. Without a cut: 8 KB, the bits and weights of a
// chunk, twice. With one: block_max (2 KB), and the bits (1 KB, twice) of each of the 501 blocks that
// reaches the level. With normal logits of deviation 3.5: top_k 40 lists 51 tokens of 49 blocks, 100 KB
// for all searches; top_p 0.95 keeps 4,915 tokens, so its search divides once and lists 222 tokens,
// 1.6 MB, and the draw reads 20 KB to 1.6 MB by how far down it is.
#import pass
#import mass
#import levels

const WG: u32 = 256u;
override V: u32 = 1u;
override UNIFORMS: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> bits: array<u32>;
@group(0) @binding(2) var<storage, read> block_max: array<u32>;
@group(0) @binding(3) var<storage, read> weights: array<f32>;
@group(0) @binding(4) var<storage, read> levels: array<u32>;
@group(0) @binding(5) var<storage, read> uniforms: array<f32>;
@group(0) @binding(6) var<storage, read_write> seen: array<u32>;
@group(0) @binding(7) var<storage, read_write> token: array<u32>;

const HEADER: u32 = 18u;
const RECORD: u32 = 50u;
const BLOCK: u32 = 256u;
// Lanes that go through a block together.
const BLOCK_LANES: u32 = 16u;
// Lanes of which one adds up what they hold.
const RUN: u32 = 16u;
const CAPACITY: u32 = 512u;
// −∞ and +∞, ordered.
const NEG_INFINITY: u32 = 0x007fffffu;
const INFINITY: u32 = 0xff800000u;

// Tokens with bits from `lo` to `hi`: what is ranked before them, and with them.
struct Span {
    lo: u32,
    hi: u32,
    before: Tally,
    through: Tally,
}

// A token, and what is ranked (or has an id) up to it.
struct Found {
    id: u32,
    bits: u32,
    through: Tally,
}

struct Goal {
    target_: vec2<u32>, // at least 1
    by_count: bool,
}

// Tallies of the levels: those of sample_weights, then those of the latest division.
var<workgroup> level_tally: array<Tally, 32>;
var<workgroup> run_tally: array<Tally, 16>;
// What one lane tells all.
var<workgroup> told_span: Span;
var<workgroup> told_found: Found;
// The span whose tokens are listed, and its tokens.
var<workgroup> listed: Span;
var<workgroup> list_bits: array<u32, 512>;
var<workgroup> list_id: array<u32, 512>;
var<workgroup> list_weight: array<f32, 512>;
// What is ranked before the lane's two tokens of the list.
var<private> ranked_before: array<Tally, 2>;

fn reaches(tally: Tally, goal: Goal) -> bool {
    return !mass_less(select(tally.mass, vec2(tally.count, 0u), goal.by_count), goal.target_);
}

// What lanes before this one hold: in each run of 16 lanes, then by run, to need few barriers.
fn tally_before(lid: u32, own: Tally) -> Tally {
    lane_tally[lid] = own;
    workgroupBarrier();
    if lid < RUN {
        var sum = NO_TALLY;
        for (var i = lid * RUN; i < (lid + 1u) * RUN; i += 1u) {
            let next = tally_add(sum, lane_tally[i]);
            lane_tally[i] = sum;
            sum = next;
        }
        run_tally[lid] = sum;
    }
    workgroupBarrier();
    var before = lane_tally[lid];
    for (var run = 0u; run < lid / RUN; run += 1u) {
        before = tally_add(before, run_tally[run]);
    }
    return before;
}

// Adds the levels of every chunk; all lanes get the sum. Nothing is listed yet.
fn all_levels(lid: u32) -> Tally {
    var own = NO_TALLY;
    for (var chunk = lid / LEVELS; chunk < (V + CHUNK - 1u) / CHUNK; chunk += WG / LEVELS) {
        let at = HEADER + chunk * RECORD + 3u * (lid % LEVELS);
        own = tally_add(own, Tally(levels[at], vec2(levels[at + 1u], levels[at + 2u])));
    }
    let level = sum_lanes(lid, own, LEVELS);
    if lid < LEVELS {
        level_tally[lid] = level;
    }
    workgroupBarrier();
    if lid == 0u {
        var total = NO_TALLY;
        for (var j = 0u; j < LEVELS; j += 1u) {
            total = tally_add(total, level_tally[j]);
        }
        told_span = Span(0u, 0u, NO_TALLY, total);
        listed = Span(0u, 0u, NO_TALLY, NO_TALLY);
    }
    return workgroupUniformLoad(&told_span).through;
}

// The level of `outer` in which the goal is reached, by `thresholds` and the tallies from `first` on.
fn reached_level(lid: u32, outer: Span, goal: Goal, first: u32) -> Span {
    workgroupBarrier();
    if lid == 0u {
        var level = 0u;
        var before = outer.before;
        var through = tally_add(before, level_tally[first]);
        while level < LEVELS - 1u && !reaches(through, goal) {
            level += 1u;
            before = through;
            through = tally_add(through, level_tally[first + level]);
        }
        var lo = outer.lo;
        if level < LEVELS - 1u {
            lo = max(lo, thresholds[level + 1u]);
        }
        let hi = select(thresholds[level] - 1u, outer.hi, level == 0u);
        told_span = Span(lo, hi, before, through);
    }
    return workgroupUniformLoad(&told_span);
}

fn largest_of(block: u32) -> u32 {
    if block * BLOCK >= V {
        return 0u;
    }
    return block_max[block];
}

struct Token {
    bits: u32,
    weight: f32,
    counts: bool,
}

fn token_at(id: u32, span: Span) -> Token {
    if id >= V {
        return Token(0u, 0.0, false);
    }
    let value = bits[id];
    if value < span.lo || value > span.hi {
        return Token(value, 0.0, false);
    }
    return Token(value, weights[id], true);
}

// Divides a span of many tokens by its bits.
fn narrower(lid: u32, span: Span, goal: Goal) -> Span {
    let width = span.hi - span.lo;
    let significant = 32u - countLeadingZeros(width);
    let shift = select(0u, significant - 4u, significant > 4u);
    if lid < LEVELS {
        let down = lid << shift;
        thresholds[lid] = select(span.lo, span.hi + 1u - down, down <= width);
    }
    workgroupBarrier();
    var own = NO_TALLY;
    for (var chunk = 0u; chunk < (V + CHUNK - 1u) / CHUNK; chunk += 1u) {
        let block = 4u * chunk;
        let largest = max(
            max(largest_of(block), largest_of(block + 1u)),
            max(largest_of(block + 2u), largest_of(block + 3u)),
        );
        // Of the same value in all lanes, so that all reach the barriers.
        if largest < span.lo {
            continue;
        }
        // All loads before the first barrier.
        let id = chunk * CHUNK + lid;
        var four = array<Token, 4>(
            token_at(id, span),
            token_at(id + WG, span),
            token_at(id + 2u * WG, span),
            token_at(id + 3u * WG, span),
        );
        for (var part = 0u; part < 4u; part += 1u) {
            own = add_round(lid, four[part].counts, four[part].bits, four[part].weight, own);
        }
    }
    let level = sum_lanes(lid, own, LEVELS);
    if lid < LEVELS {
        level_tally[LEVELS + lid] = level;
    }
    return reached_level(lid, span, goal, LEVELS);
}

// Of tokens `first` to `end` with bits in the span, the first by id at which the goal is reached.
fn find_by_id(lid: u32, first: u32, end: u32, span: Span, goal: Goal) -> Found {
    let share = (end - first + WG - 1u) / WG;
    let from_ = min(first + lid * share, end);
    let to = min(from_ + share, end);
    var own = NO_TALLY;
    for (var id = from_; id < to; id += 1u) {
        if bits[id] >= span.lo && bits[id] <= span.hi {
            own = tally_add(own, Tally(1u, mass_of(weights[id])));
        }
    }
    var so_far = tally_add(span.before, tally_before(lid, own));
    if !reaches(so_far, goal) && reaches(tally_add(so_far, own), goal) {
        var id = from_;
        for (; id < to; id += 1u) {
            if bits[id] >= span.lo && bits[id] <= span.hi {
                so_far = tally_add(so_far, Tally(1u, mass_of(weights[id])));
                if reaches(so_far, goal) {
                    break;
                }
            }
        }
        told_found = Found(id, bits[id], so_far);
    }
    return workgroupUniformLoad(&told_found);
}

// Goes through the lane's part of the span's tokens and returns how many they are; lists them from
// place `first` on if `lists`.
fn gather(lid: u32, span: Span, lists: bool, first: u32) -> u32 {
    var place = first;
    for (var block = lid / BLOCK_LANES; block < (V + BLOCK - 1u) / BLOCK; block += WG / BLOCK_LANES) {
        if block_max[block] < span.lo {
            continue;
        }
        let end = min((block + 1u) * BLOCK, V);
        for (var id = block * BLOCK + lid % BLOCK_LANES; id < end; id += BLOCK_LANES) {
            let value = bits[id];
            if value >= span.lo && value <= span.hi {
                if lists && place < CAPACITY {
                    list_bits[place] = value;
                    list_id[place] = id;
                    list_weight[place] = weights[id];
                }
                place += 1u;
            }
        }
    }
    return place - first;
}

// Lists the span's tokens, at most CAPACITY, and ranks them.
fn list(lid: u32, span: Span) {
    let own = gather(lid, span, false, 0u);
    let place = tally_before(lid, Tally(own, vec2(0u, 0u))).count;
    // No lane still reads an earlier list: all have passed a barrier since.
    gather(lid, span, true, place);
    if lid == 0u {
        listed = span;
    }
    workgroupBarrier();
    let len = span.through.count - span.before.count;
    for (var slot = 0u; slot < 2u; slot += 1u) {
        let mine = slot * WG + lid;
        var before = span.before;
        for (var i = 0u; mine < len && i < len; i += 1u) {
            let outranks = list_bits[i] > list_bits[mine]
                || (list_bits[i] == list_bits[mine] && list_id[i] < list_id[mine]);
            if outranks {
                before = tally_add(before, Tally(1u, mass_of(list_weight[i])));
            }
        }
        ranked_before[slot] = before;
    }
}

// The first token of the list, by rank, at which the goal is reached.
fn find_in_list(lid: u32, goal: Goal) -> Found {
    let len = listed.through.count - listed.before.count;
    for (var slot = 0u; slot < 2u; slot += 1u) {
        let mine = slot * WG + lid;
        if mine < len {
            let before = ranked_before[slot];
            let through = tally_add(before, Tally(1u, mass_of(list_weight[mine])));
            if !reaches(before, goal) && reaches(through, goal) {
                told_found = Found(list_id[mine], list_bits[mine], through);
            }
        }
    }
    return workgroupUniformLoad(&told_found);
}

// The first token by rank at which the goal is reached; all tokens together reach it.
fn find_by_rank(lid: u32, all: Span, goal: Goal) -> Found {
    let old = workgroupUniformLoad(&listed);
    if !reaches(old.through, goal) || reaches(old.before, goal) {
        if lid < LEVELS {
            thresholds[lid] = levels[lid];
        }
        var span = reached_level(lid, all, goal, 0u);
        if span.through.count <= CAPACITY {
            span.hi = all.hi;
            span.before = NO_TALLY;
        }
        while span.through.count - span.before.count > CAPACITY {
            if span.lo == span.hi {
                return find_by_id(lid, 0u, V, span, goal);
            }
            span = narrower(lid, span, goal);
        }
        list(lid, span);
    }
    return find_in_list(lid, goal);
}

// The draw after a cut by rank: the cuts in turn, then the draw. One call in a loop, since compilers
// put the whole search wherever it is called.
fn draw_by_rank(lid: u32, all: Span, top_k: u32, uniform_: f32) -> u32 {
    let min_p_bits = levels[LEVELS + 1u];
    var kept = Found(0u, all.lo, all.through);
    for (var stage = 0u; stage < 4u; stage += 1u) {
        var goal = Goal(vec2(top_k, 0u), true);
        var is_needed = top_k < all.through.count;
        if stage == 1u {
            let mass = mass_share(kept.through.mass, pass_.top_p);
            goal = Goal(vec2(max(mass.x, select(1u, 0u, mass.y > 0u)), mass.y), false);
            is_needed = pass_.top_p < 1.0;
        } else if stage == 2u {
            is_needed = min_p_bits > kept.bits;
            if is_needed {
                let above = Span(min_p_bits, all.hi, NO_TALLY, NO_TALLY);
                let own = gather(lid, above, false, 0u);
                let count = sum_lanes(lid, Tally(own, vec2(0u, 0u)), 1u).count;
                if lid == 0u {
                    told_span = Span(0u, 0u, NO_TALLY, Tally(count, vec2(0u, 0u)));
                }
                goal.target_ = vec2(workgroupUniformLoad(&told_span).through.count, 0u);
            }
        } else if stage == 3u {
            let mass = mass_share(kept.through.mass, uniform_);
            goal = Goal(mass_add(mass, vec2(1u, 0u)), false);
            is_needed = true;
        }
        if is_needed {
            kept = find_by_rank(lid, all, goal);
        }
    }
    return kept.id;
}

// The draw among all tokens that min_p keeps.
fn draw_by_id(lid: u32, all: Span, uniform_: f32) -> u32 {
    let chunks = (V + CHUNK - 1u) / CHUNK;
    let share = (chunks + WG - 1u) / WG;
    let from_ = min(lid * share, chunks);
    let to = min(from_ + share, chunks);
    var own = NO_TALLY;
    for (var chunk = from_; chunk < to; chunk += 1u) {
        own.mass = mass_add(own.mass, kept_mass(chunk));
    }
    var so_far = tally_before(lid, own);
    if lid == WG - 1u {
        told_span = Span(0u, 0u, NO_TALLY, tally_add(so_far, own));
    }
    let kept = workgroupUniformLoad(&told_span).through.mass;
    let goal = Goal(mass_add(mass_share(kept, uniform_), vec2(1u, 0u)), false);
    if !reaches(so_far, goal) && reaches(tally_add(so_far, own), goal) {
        var chunk = from_;
        for (; chunk < to; chunk += 1u) {
            let through = Tally(0u, mass_add(so_far.mass, kept_mass(chunk)));
            if reaches(through, goal) {
                break;
            }
            so_far = through;
        }
        told_found = Found(chunk, 0u, so_far);
    }
    let found = workgroupUniformLoad(&told_found);
    let first = found.id * CHUNK;
    let span = Span(levels[LEVELS + 1u], all.hi, found.through, all.through);
    return find_by_id(lid, first, min(first + CHUNK, V), span, goal).id;
}

fn kept_mass(chunk: u32) -> vec2<u32> {
    let at = HEADER + chunk * RECORD + 3u * LEVELS;
    return vec2(levels[at], levels[at + 1u]);
}

@compute @workgroup_size(WG)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lid: u32,
) {
    let best = levels[0];
    let draw = group.y;
    if best <= NEG_INFINITY || best >= INFINITY {
        if lid == 0u {
            token[pass_.token_out + draw] = 0xffffffffu;
        }
        return;
    }
    var uniform_ = pass_.uniform_;
    if UNIFORMS == 1u {
        uniform_ = uniforms[draw];
    }
    let total = all_levels(lid);
    let all = Span(levels[LEVELS], best, NO_TALLY, total);
    var top_k = select(pass_.top_k, total.count, pass_.top_k == 0u);
    if pass_.temperature == 0.0 {
        top_k = 1u;
    }
    var id = 0u;
    if top_k < total.count || pass_.top_p < 1.0 {
        id = draw_by_rank(lid, all, top_k, uniform_);
    } else {
        id = draw_by_id(lid, all, uniform_);
    }
    if lid == 0u {
        token[pass_.token_out + draw] = id;
        if draw == 0u {
            seen[(pass_.n_logit_rows - 1u) * ((V + 31u) / 32u) + id / 32u] |= 1u << (id % 32u);
        }
    }
}
