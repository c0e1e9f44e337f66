// The best of a workgroup of WG lanes (a power of two, at most 256): the largest value as ordered
// bits (shared/ordered), the lowest index of equals.
// Expects: override WG.
struct Best {
    bits: u32,
    index: u32,
}

// Worse than any value.
const NONE = Best(0u, 0xffffffffu);

var<workgroup> best_bits: array<u32, 256>;
var<workgroup> best_index: array<u32, 256>;

fn is_better(a: Best, b: Best) -> bool {
    return a.bits > b.bits || (a.bits == b.bits && a.index < b.index);
}

// Every lane must call; the result is the first lane's.
fn reduce_best(lid: u32, best: Best) -> Best {
    var mine = best;
    best_bits[lid] = mine.bits;
    best_index[lid] = mine.index;
    workgroupBarrier();
    for (var step = WG / 2u; step > 0u; step /= 2u) {
        if lid < step {
            let other = Best(best_bits[lid + step], best_index[lid + step]);
            if is_better(other, mine) {
                mine = other;
                best_bits[lid] = mine.bits;
                best_index[lid] = mine.index;
            }
        }
        workgroupBarrier();
    }
    return mine;
}
