// One slice of a row's sum Σ (w+1)·q plus Σ q·(4, 16 or 64), in f32 but exact, for GPUs without a
// packed dot. Two bits of a weight dropped into the mantissa of an f16 1.0 are 1 + (w+1)/4, /16 or
// /64, by their place: three sums, whose terms are multiples of 1/4, 1/16 and 1/64. Up to 124 chunks
// a slice the third stays below 2^24 of those. UNROLL pieces of the row are loaded before the first
// is used.
// Expects: w: array<vec4<u32>> in layout i2, fn unit(i) -> vec4<u32> (the token's codes as
// half_pairs.wgsl has them, 8 units a chunk), override KC, S, UNROLL.
fn half_fma(weights: u32, mask: u32, codes_: u32, sum: f32) -> f32 {
    let weight = unpack2x16float((weights & mask) | 0x3c003c00u);
    let q = unpack2x16float(codes_);
    return fma(weight.x, q.x, fma(weight.y, q.y, sum));
}

fn half_add_word(sums: vec3<f32>, v: u32, at: u32) -> vec3<f32> {
    let q0 = unit(at);
    let q1 = unit(at + 1u);
    let down = v >> 6u;
    let up = v << 6u;
    var quarter = half_fma(v, 0x03000300u, q0.x, sums.x);
    quarter = half_fma(down, 0x03000300u, q0.w, quarter);
    quarter = half_fma(up, 0x03000300u, q1.z, quarter);
    var sixteenth = half_fma(v, 0x00c000c0u, q0.y, sums.y);
    sixteenth = half_fma(down, 0x00c000c0u, q1.x, sixteenth);
    sixteenth = half_fma(up, 0x00c000c0u, q1.w, sixteenth);
    var small = half_fma(v, 0x00300030u, q0.z, sums.z);
    small = half_fma(down, 0x00300030u, q1.y, small);
    return vec3(quarter, sixteenth, small);
}

fn half_add(sums: vec3<f32>, piece: vec4<u32>, c: u32) -> vec3<f32> {
    let first = half_add_word(half_add_word(sums, piece.x, 8u * c), piece.y, 8u * c + 2u);
    return half_add_word(half_add_word(first, piece.z, 8u * c + 4u), piece.w, 8u * c + 6u);
}

// `first` is the row's first piece in `w`.
fn half_sum(first: u32, slice: u32) -> i32 {
    var sums = vec3<f32>(0.0);
    var c = slice;
    if UNROLL == 4u {
        for (; c + 3u * S < KC; c += 4u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            let p2 = w[first + 32u * (c + 2u * S)];
            let p3 = w[first + 32u * (c + 3u * S)];
            sums = half_add(sums, p0, c);
            sums = half_add(sums, p1, c + S);
            sums = half_add(sums, p2, c + 2u * S);
            sums = half_add(sums, p3, c + 3u * S);
        }
    }
    if UNROLL >= 2u {
        for (; c + S < KC; c += 2u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            sums = half_add(sums, p0, c);
            sums = half_add(sums, p1, c + S);
        }
    }
    for (; c < KC; c += S) {
        sums = half_add(sums, w[first + 32u * c], c);
    }
    return i32(sums.x * 4.0) + i32(sums.y * 16.0) + i32(sums.z * 64.0);
}
