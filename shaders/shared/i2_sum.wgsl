// One slice of a row's sum Σ (w+1)(q+128) by packed dot products of unsigned bytes. The four fields
// of a byte are masked in place and summed apart; their sums, not the fields, are shifted: every
// term of a sum is a multiple of the shift. UNROLL pieces of the row are loaded before the first is
// used.
// Expects: w: array<vec4<u32>> in layout i2, fn unit(i) -> vec4<u32> (the token's q+128, 4 units a
// chunk), override KC, S, UNROLL.
fn dot16(weights: vec4<u32>, q: vec4<u32>, sum: u32) -> u32 {
    return dot4U8Packed(weights.w, q.w) + (dot4U8Packed(weights.z, q.z)
        + (dot4U8Packed(weights.y, q.y) + (dot4U8Packed(weights.x, q.x) + sum)));
}

fn i2_add(sums: vec4<u32>, piece: vec4<u32>, c: u32) -> vec4<u32> {
    return vec4(
        dot16(piece & vec4(0x03030303u), unit(4u * c), sums.x),
        dot16(piece & vec4(0x0c0c0c0cu), unit(4u * c + 1u), sums.y),
        dot16(piece & vec4(0x30303030u), unit(4u * c + 2u), sums.z),
        dot16(piece & vec4(0xc0c0c0c0u), unit(4u * c + 3u), sums.w),
    );
}

// `first` is the row's first piece in `w`.
fn i2_sum(first: u32, slice: u32) -> i32 {
    var sums = vec4<u32>(0u);
    var c = slice;
    if UNROLL == 4u {
        for (; c + 3u * S < KC; c += 4u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            let p2 = w[first + 32u * (c + 2u * S)];
            let p3 = w[first + 32u * (c + 3u * S)];
            sums = i2_add(sums, p0, c);
            sums = i2_add(sums, p1, c + S);
            sums = i2_add(sums, p2, c + 2u * S);
            sums = i2_add(sums, p3, c + 3u * S);
        }
    }
    if UNROLL >= 2u {
        for (; c + S < KC; c += 2u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            sums = i2_add(sums, p0, c);
            sums = i2_add(sums, p1, c + S);
        }
    }
    for (; c < KC; c += S) {
        sums = i2_add(sums, w[first + 32u * c], c);
    }
    return i32(sums.x + (sums.y >> 2u) + (sums.z >> 4u) + (sums.w >> 6u));
}
