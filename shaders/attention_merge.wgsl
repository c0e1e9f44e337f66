// attention_merge: the blocks' parts of one token's attention, merged in their order (decode).
//   M' = max(M, m);  a = exp(M − M'), b = exp(m − M');  L = L·a + l·b;  O = O·a + o·b;  out = O/L
// | # | name     | type           | shape             | notes                       |
// | 0 | pass     | uniform        | Pass              | start: the token's position |
// | 1 | partials | read f32       | [S/64, H, D + 2]  | o, m, l                     |
// | 2 | out      | read_write f32 | [H, D]            |                             |
// Workgroup: WG lanes for one query head; grid (H, 1, 1). WG blocks at a time: the maxima up to each
// need no rounding, so lanes find a and b of a block each; then each lane merges dimensions lid,
// lid + WG. Requires D ≤ 2·WG.
// Twin: cpu-ref/src/attention.rs, as attention.wgsl.
#import pass
#import ordered
#import exp

override WG: u32 = 128u;
override HEADS: u32 = 1u;
override DIM: u32 = 2u;

@group(0) @binding(0) var<uniform> pass_: Pass;
@group(0) @binding(1) var<storage, read> partials: array<f32>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

var<workgroup> maxima: array<u32, WG>;
// a, b, l.
var<workgroup> factors: array<vec3<f32>, WG>;

@compute @workgroup_size(WG)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_index) lid: u32) {
    let head = wg.x;
    let stride = HEADS * (DIM + 2u);
    let blocks = min(pass_.start / 64u + 1u, arrayLength(&partials) / stride);
    let head_at = head * (DIM + 2u);
    var most = ordered(-3.4028234e38);
    var total = 0.0;
    var low = 0.0;
    var high = 0.0;
    for (var first = 0u; first < blocks; first += WG) {
        let count = min(WG, blocks - first);
        let at = first * stride + head_at;
        var m = 0.0;
        if lid < count {
            m = partials[at + lid * stride + DIM];
            maxima[lid] = ordered(m);
        }
        workgroupBarrier();
        var before = most;
        for (var i = 0u; i < min(lid, count); i++) {
            before = max(before, maxima[i]);
        }
        if lid < count {
            let after = max(before, maxima[lid]);
            let new_max = unordered(after);
            let l = partials[at + lid * stride + DIM + 1u];
            factors[lid] = vec3(exp_f32(unordered(before) - new_max), exp_f32(m - new_max), l);
        }
        workgroupBarrier();
        for (var i = 0u; i < count; i++) {
            let f = factors[i];
            most = max(most, maxima[i]);
            total = total * f.x + f.z * f.y;
            if lid < DIM {
                low = low * f.x + partials[at + i * stride + lid] * f.y;
            }
            if lid + WG < DIM {
                high = high * f.x + partials[at + i * stride + lid + WG] * f.y;
            }
        }
        workgroupBarrier();
    }
    if lid < DIM {
        out[head * DIM + lid] = low / total;
    }
    if lid + WG < DIM {
        out[head * DIM + lid + WG] = high / total;
    }
}
