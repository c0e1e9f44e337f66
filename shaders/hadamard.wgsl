// hadamard: the blockwise rotation of weights that are stored in a rotated basis.
//   BACK = 0: y = H(s∘x);  BACK = 1: y = s∘H(x);  H = ±1/√BLOCK, symmetric, on each block
// | # | name  | type           | shape  | notes                                           |
// | 0 | pass  | uniform        | Pass   | n_tokens, or the logit rows if LOGIT_ROWS = 1   |
// | 1 | x     | read f32       | [M, K] |                                                 |
// | 2 | signs | read f32       | [K]    | ±1                                              |
// | 3 | y     | read_write f32 | [M, K] |                                                 |
// Workgroup: WG lanes, one block of a token; grid (K/BLOCK, rows, 1). Requires BLOCK ≤ 4096, a
// power of two that divides K.
// Twin: cpu-ref/src/hadamard.rs, same order of sums; only additions and one product a value, so
// equal bits.
#import pass

override WG: u32 = 256u;
override K: u32 = 64u;
override BLOCK: u32 = 64u;
override FACTOR: f32 = 0.125;
override BACK: u32 = 0u;
override LOGIT_ROWS: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> signs: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;

var<workgroup> block: array<f32, 4096>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let rows = select(pass_.n_tokens, pass_.n_logit_rows, LOGIT_ROWS == 1u);
    let m = wg.y;
    let first = wg.x * BLOCK;
    for (var i = lid; i < BLOCK; i += WG) {
        let value = x[m * K + first + i];
        block[i] = select(value * signs[first + i], value, BACK == 1u);
    }
    workgroupBarrier();
    for (var step = 1u; step < BLOCK; step *= 2u) {
        for (var pair = lid; pair < BLOCK / 2u; pair += WG) {
            // The pair's number with a 0 put in at the bit of `step`.
            let low = pair & (step - 1u);
            let i = 2u * (pair - low) + low;
            let a = block[i];
            let b = block[i + step];
            block[i] = a + b;
            block[i + step] = a - b;
        }
        workgroupBarrier();
    }
    if m >= rows {
        return;
    }
    for (var i = lid; i < BLOCK; i += WG) {
        let value = block[i] * FACTOR;
        y[m * K + first + i] = select(value, value * signs[first + i], BACK == 1u);
    }
}
