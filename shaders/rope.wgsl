// rope: Q, K, V sums → scaled; RoPE on Q and K.
//   (a, b) = (y[i], y[i+D/2]) → (a·cos − b·sin, b·cos + a·sin),  angles of position start + m
// | # | name         | type           | shape            | notes                             |
// | 0 | pass         | uniform        | Pass             | n_tokens, start                   |
// | 1 | acc          | read i32       | [M, N_PAD]       | rows: Q heads, K heads, V heads   |
// | 2 | weight_scale | read f32       | [N_PAD]          | N = (H + 2G)·D                    |
// | 3 | act_scale    | read f32       | [M]              |                                   |
// | 4 | angles       | read vec2<f32> | [S, D/2]         | (cos, sin)                        |
// | 5 | query        | read_write f32 | [M, H, D]        |                                   |
// | 6 | keys         | read_write f32 | [M, G, D]        | for kv_store                      |
// | 7 | values       | read_write f32 | [M, G, D]        |                                   |
// Workgroup: WG lanes, one pair each; grid (ceil((H+2G)·D/2 / WG), M, 1).
// Twin: cpu-ref/src/rope.rs. Bound: 4 ULP of |a| + |b| (two products, one sum, two scalings).
#import pass
#import bitlinear

override WG: u32 = 64u;
override N_PAD: u32 = 32u;
override HEADS: u32 = 1u;
override KV_HEADS: u32 = 1u;
override DIM: u32 = 2u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> acc: array<i32>;
@group(0) @binding(2) var<storage, read> weight_scale: array<f32>;
@group(0) @binding(3) var<storage, read> act_scale: array<f32>;
@group(0) @binding(4) var<storage, read> angles: array<vec2<f32>>;
@group(0) @binding(5) var<storage, read_write> query: array<f32>;
@group(0) @binding(6) var<storage, read_write> keys: array<f32>;
@group(0) @binding(7) var<storage, read_write> values: array<f32>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let m = wg.y;
    let half = DIM / 2u;
    let pair = wg.x * WG + lid;
    let head = pair / half;
    let i = pair % half;
    if m >= pass_.n_tokens || head >= HEADS + 2u * KV_HEADS {
        return;
    }
    let a = bitlinear(m, head * DIM + i);
    let b = bitlinear(m, head * DIM + half + i);
    let angle = angles[(pass_.start + m) * half + i];
    let low = a * angle.x - b * angle.y;
    let high = b * angle.x + a * angle.y;
    if head < HEADS {
        let at = (m * HEADS + head) * DIM + i;
        query[at] = low;
        query[at + half] = high;
    } else if head < HEADS + KV_HEADS {
        let at = (m * KV_HEADS + head - HEADS) * DIM + i;
        keys[at] = low;
        keys[at + half] = high;
    } else {
        let at = (m * KV_HEADS + head - HEADS - KV_HEADS) * DIM + i;
        values[at] = a;
        values[at + half] = b;
    }
}
