// A row of a dense table times x, by 32 lanes: lane l adds units l, l + 32 … in turn, then the upper
// half of the lanes is added to the lower one until one is left. Whoever needs a logit's own bits
// takes them from here.
// Expects: dense with FORMAT below 3, fn x_at(m, k) -> f32 (0 past K), 256 lanes.
var<workgroup> partial: array<f32, 256>;

// The lane's sum after one more unit.
fn add_unit(before: f32, words: vec4<u32>, m: u32, unit: u32) -> f32 {
    var sum = before;
    if FORMAT == 2u {
        for (var i = 0u; i < 4u; i++) {
            sum += bitcast<f32>(words[i]) * x_at(m, 4u * unit + i);
        }
    } else {
        for (var i = 0u; i < 4u; i++) {
            let pair = half_pair(words[i]);
            let k = 8u * unit + 2u * i;
            sum += pair.x * x_at(m, k) + pair.y * x_at(m, k + 1u);
        }
    }
    return sum;
}

// The sum of each 32 lanes, in the first of them; every lane must call.
fn sum_of_lanes(lid: u32, sum: f32) -> f32 {
    partial[lid] = sum;
    workgroupBarrier();
    for (var step = 16u; step > 0u; step /= 2u) {
        if (lid & 31u) < step {
            partial[lid] += partial[lid + step];
        }
        workgroupBarrier();
    }
    return partial[lid];
}
