// gemv_planes: ternary matrix × int8 vector (decode), addition-only.
//   acc[n] = Σ_k w[n,k]·q[k],   w ∈ {−1,0,+1}, q ∈ [−128,127]
// Bit-serial: with Z the non-zero plane, S the sign plane and X_j bit j of q,
//   Σ w·q = Σ_j c_j · popcount(Z & (X_j ^ S)) + negatives,   c_j = 2^j, c_7 = −128,
// because −q = ¬q + 1. The loop is xor, and, popcount, add; the powers of two are shifts after it.
// | # | name   | type           | shape             | notes                                    |
// | 0 | pass   | uniform        | Pass              | unused: one token                        |
// | 1 | w      | read vec4<u32> | [tiles, KC, 32]   | Z0 Z1 S0 S1; layout/planes.rs            |
// | 2 | x      | read vec4<u32> | [4·KC]            | bit planes of quantize_absmax            |
// | 3 | offset | read i32       | [32·tiles]        | negatives: number of −1 in each row      |
// | 4 | acc    | read_write i32 | [N_PAD]           | rows 32·TILE_BASE..                      |
// Workgroup: lane = row, S slices of K, 32·S lanes; grid (tiles, 1, 1).
// Twin: cpu-ref/src/gemv.rs. Exact.
#import pass

override S: u32 = 8u;
override KC: u32 = 1u;
override TILE_BASE: u32 = 0u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> offset: array<i32>;
@group(0) @binding(4) var<storage, read_write> acc: array<i32>;

var<workgroup> slices: array<i32, 256>;

@compute @workgroup_size(32u * S)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let row = lid & 31u;
    let slice = lid >> 5u;
    var low = vec4<u32>(0u);
    var high = vec4<u32>(0u);
    for (var c = slice; c < KC; c += S) {
        let piece = w[(wg.x * KC + c) * 32u + row];
        let at = c << 2u;
        let z0 = vec4(piece.x);
        let z1 = vec4(piece.y);
        let s0 = vec4(piece.z);
        let s1 = vec4(piece.w);
        low += countOneBits(z0 & (x[at] ^ s0)) + countOneBits(z1 & (x[at + 2u] ^ s1));
        high += countOneBits(z0 & (x[at + 1u] ^ s0)) + countOneBits(z1 & (x[at + 3u] ^ s1));
    }
    let l = low << vec4(0u, 1u, 2u, 3u);
    let h = high << vec4(4u, 5u, 6u, 7u);
    slices[lid] = i32(l.x + l.y + l.z + l.w + h.x + h.y + h.z) - i32(h.w);
    workgroupBarrier();
    if lid < 32u {
        var sum = 0;
        for (var s = 0u; s < S; s++) {
            sum += slices[(s << 5u) + lid];
        }
        let tile_row = (wg.x << 5u) + lid;
        acc[(TILE_BASE << 5u) + tile_row] = sum + offset[tile_row];
    }
}
