// One slice of a row's bit-serial sum: xor, and, popcount, add; the powers of two are shifts after
// the loop. A count is added to a running sum at once: GPUs have that as one instruction. UNROLL pieces of the row are loaded before the first is used.
// Expects: w: array<vec4<u32>> in layout planes, fn unit(i) -> vec4<u32> (the token's bit planes, 4
// units a chunk), override KC, S, UNROLL.
fn planes_low(sum: vec4<u32>, piece: vec4<u32>, c: u32) -> vec4<u32> {
    return countOneBits(vec4(piece.x) & (unit(c << 2u) ^ vec4(piece.z)))
        + (countOneBits(vec4(piece.y) & (unit((c << 2u) + 2u) ^ vec4(piece.w))) + sum);
}

fn planes_high(sum: vec4<u32>, piece: vec4<u32>, c: u32) -> vec4<u32> {
    return countOneBits(vec4(piece.x) & (unit((c << 2u) + 1u) ^ vec4(piece.z)))
        + (countOneBits(vec4(piece.y) & (unit((c << 2u) + 3u) ^ vec4(piece.w))) + sum);
}

// `first` is the row's first piece in `w`.
fn planes_sum(first: u32, slice: u32) -> i32 {
    var low = vec4<u32>(0u);
    var high = vec4<u32>(0u);
    var c = slice;
    if UNROLL == 4u {
        for (; c + 3u * S < KC; c += 4u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            let p2 = w[first + 32u * (c + 2u * S)];
            let p3 = w[first + 32u * (c + 3u * S)];
            low = planes_low(planes_low(low, p0, c), p1, c + S);
            low = planes_low(planes_low(low, p2, c + 2u * S), p3, c + 3u * S);
            high = planes_high(planes_high(high, p0, c), p1, c + S);
            high = planes_high(planes_high(high, p2, c + 2u * S), p3, c + 3u * S);
        }
    }
    if UNROLL >= 2u {
        for (; c + S < KC; c += 2u * S) {
            let p0 = w[first + 32u * c];
            let p1 = w[first + 32u * (c + S)];
            low = planes_low(planes_low(low, p0, c), p1, c + S);
            high = planes_high(planes_high(high, p0, c), p1, c + S);
        }
    }
    for (; c < KC; c += S) {
        let piece = w[first + 32u * c];
        low = planes_low(low, piece, c);
        high = planes_high(high, piece, c);
    }
    let l = low << vec4(0u, 1u, 2u, 3u);
    let h = high << vec4(4u, 5u, 6u, 7u);
    return i32(l.x + l.y + l.z + l.w + h.x + h.y + h.z) - i32(h.w);
}
