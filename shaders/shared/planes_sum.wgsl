// One slice of a row's bit-serial sum: xor, and, popcount, add; the powers of two are shifts after
// the loop. UNROLL pieces of the row are loaded before the first is used.
// Expects: w: array<vec4<u32>> in layout planes, fn unit(i) -> vec4<u32> (the token's bit planes, 4
// units a chunk), override KC, S, UNROLL.
fn planes_low(piece: vec4<u32>, c: u32) -> vec4<u32> {
    return countOneBits(vec4(piece.x) & (unit(c << 2u) ^ vec4(piece.z)))
        + countOneBits(vec4(piece.y) & (unit((c << 2u) + 2u) ^ vec4(piece.w)));
}

fn planes_high(piece: vec4<u32>, c: u32) -> vec4<u32> {
    return countOneBits(vec4(piece.x) & (unit((c << 2u) + 1u) ^ vec4(piece.z)))
        + countOneBits(vec4(piece.y) & (unit((c << 2u) + 3u) ^ vec4(piece.w)));
}

// `first` is the row's first piece in `w`.
fn planes_sum(first: u32, slice: u32) -> i32 {
    var low = vec4<u32>(0u);
    var high = vec4<u32>(0u);
    var c = slice;
    if UNROLL == 4u {
        for (; c + 3u * S < KC; c += 4u * S) {
            let c1 = c + S;
            let c2 = c + 2u * S;
            let c3 = c + 3u * S;
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * c1];
            let p2 = w[first + 32u * c2];
            let p3 = w[first + 32u * c3];
            low += planes_low(p0, c) + planes_low(p1, c1) + planes_low(p2, c2) + planes_low(p3, c3);
            high += planes_high(p0, c) + planes_high(p1, c1) + planes_high(p2, c2) + planes_high(p3, c3);
        }
    }
    if UNROLL >= 2u {
        for (; c + S < KC; c += 2u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            low += planes_low(p0, c) + planes_low(p1, c + S);
            high += planes_high(p0, c) + planes_high(p1, c + S);
        }
    }
    for (; c < KC; c += S) {
        let piece = w[first + 32u * c];
        low += planes_low(piece, c);
        high += planes_high(piece, c);
    }
    let l = low << vec4(0u, 1u, 2u, 3u);
    let h = high << vec4(4u, 5u, 6u, 7u);
    return i32(l.x + l.y + l.z + l.w + h.x + h.y + h.z) - i32(h.w);
}
