// Reductions over a workgroup of WG lanes (a power of two, at most 256), in a fixed order.
// Expects: override WG. Every lane must call; every lane gets the result.
var<workgroup> reduce_scratch: array<u32, 256>;

fn reduce_sum_f32(lid: u32, value: f32) -> f32 {
    reduce_scratch[lid] = bitcast<u32>(value);
    workgroupBarrier();
    for (var step = WG / 2u; step > 0u; step /= 2u) {
        if lid < step {
            let sum = bitcast<f32>(reduce_scratch[lid]) + bitcast<f32>(reduce_scratch[lid + step]);
            reduce_scratch[lid] = bitcast<u32>(sum);
        }
        workgroupBarrier();
    }
    let result = bitcast<f32>(reduce_scratch[0]);
    workgroupBarrier();
    return result;
}

fn reduce_max_u32(lid: u32, value: u32) -> u32 {
    reduce_scratch[lid] = value;
    workgroupBarrier();
    for (var step = WG / 2u; step > 0u; step /= 2u) {
        if lid < step {
            reduce_scratch[lid] = max(reduce_scratch[lid], reduce_scratch[lid + step]);
        }
        workgroupBarrier();
    }
    let result = reduce_scratch[0];
    workgroupBarrier();
    return result;
}

fn reduce_sum_i32(lid: u32, value: i32) -> i32 {
    reduce_scratch[lid] = bitcast<u32>(value);
    workgroupBarrier();
    for (var step = WG / 2u; step > 0u; step /= 2u) {
        if lid < step {
            // Two's complement: the unsigned sum has the bits of the signed one.
            reduce_scratch[lid] = reduce_scratch[lid] + reduce_scratch[lid + step];
        }
        workgroupBarrier();
    }
    let result = bitcast<i32>(reduce_scratch[0]);
    workgroupBarrier();
    return result;
}
