// One slice of a row's sum Σ (w+1)·q by packed dot products of signed bytes. Three fields of a byte are
// masked in place; the top one, which would be a sign, moves down to the third's place. Their sums
// are shifted: every term of a sum is a multiple of the shift. UNROLL pieces of the row are loaded
// before the first is used.
// Expects: w: array<vec4<u32>> in layout i2, fn unit(i) -> vec4<u32> (the token's q, 4 units a
// chunk), override KC, S, UNROLL.
fn signed_dot16(weights: vec4<u32>, q: vec4<u32>, sum: i32) -> i32 {
    return dot4I8Packed(weights.w, q.w) + (dot4I8Packed(weights.z, q.z)
        + (dot4I8Packed(weights.y, q.y) + (dot4I8Packed(weights.x, q.x) + sum)));
}

fn signed_add(sums: vec3<i32>, piece: vec4<u32>, c: u32) -> vec3<i32> {
    let third = signed_dot16(piece & vec4(0x30303030u), unit(4u * c + 2u), sums.z);
    let top = (piece >> vec4(2u)) & vec4(0x30303030u);
    return vec3(
        signed_dot16(piece & vec4(0x03030303u), unit(4u * c), sums.x),
        signed_dot16(piece & vec4(0x0c0c0c0cu), unit(4u * c + 1u), sums.y),
        signed_dot16(top, unit(4u * c + 3u), third),
    );
}

// `first` is the row's first piece in `w`.
fn signed_sum(first: u32, slice: u32) -> i32 {
    var sums = vec3<i32>(0);
    var c = slice;
    if UNROLL == 4u {
        for (; c + 3u * S < KC; c += 4u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            let p2 = w[first + 32u * (c + 2u * S)];
            let p3 = w[first + 32u * (c + 3u * S)];
            sums = signed_add(sums, p0, c);
            sums = signed_add(sums, p1, c + S);
            sums = signed_add(sums, p2, c + 2u * S);
            sums = signed_add(sums, p3, c + 3u * S);
        }
    }
    if UNROLL >= 2u {
        for (; c + S < KC; c += 2u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            sums = signed_add(sums, p0, c);
            sums = signed_add(sums, p1, c + S);
        }
    }
    for (; c < KC; c += S) {
        sums = signed_add(sums, w[first + 32u * c], c);
    }
    return sums.x + (sums.y >> 2u) + (sums.z >> 4u);
}
