// Probability without rounding: tokens are counted and their weights summed in 64-bit integers (low
// word, high word), in units of 2^-44. Sums of f32 would depend on their order and lose what a
// quarter of a million unlikely tokens hold together; these give one answer in any order. The best
// token weighs 1; a weight below 2^-44 counts as none; 2^19 tokens cannot overflow.
struct Tally {
    count: u32,
    mass: vec2<u32>,
}

const NO_TALLY: Tally = Tally(0u, vec2(0u, 0u));

// Of a weight from 0 to 1: every operation is exact but the last, which drops what is below the unit.
fn mass_of(weight: f32) -> vec2<u32> {
    let scaled = weight * 4096.0;
    let whole = floor(scaled);
    return vec2(u32((scaled - whole) * 4294967296.0), u32(whole));
}

fn mass_add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2(low, a.y + b.y + select(0u, 1u, low < a.x));
}

fn mass_less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

// The 64 bits of a·b.
fn wide_product(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    let high = (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u);
    return vec2((other << 16u) | (low & 0xffffu), high);
}

// mass·share, share from 0 to below 1 in units of 2^-32, rounded down.
fn mass_share(mass: vec2<u32>, share: f32) -> vec2<u32> {
    let units = u32(min(share, 0.99999994) * 4294967296.0);
    let low = wide_product(mass.x, units);
    return mass_add(vec2(low.y, 0u), wide_product(mass.y, units));
}

fn tally_add(a: Tally, b: Tally) -> Tally {
    return Tally(a.count + b.count, mass_add(a.mass, b.mass));
}
