// A linear layer's decode step in one dispatch: RMSNorm and absmax quantisation of the token by every
// workgroup for itself, in the order of rmsnorm.wgsl and quantize_absmax.wgsl, then a tile of 32
// rows. PLANES = 1 multiplies as gemv_planes.wgsl does (xor, and, popcount, add), 0 as gemv_i2.wgsl
// (packed dot).
// Expects: reduce_tree with WG = 256, w: array<vec4<u32>> [tiles, KC, 32], x: array<f32> [K],
// norm: array<f32> [K] (NORM = 0: unused), rows: array<vec2<u32>> [32·tiles] of (offset, scale).
override K: u32 = 64u;
override KC: u32 = 1u;
override UNITS: u32 = 4u; // 4·KC
override EPS: f32 = 1e-5;
override NORM: u32 = 1u;
override PLANES: u32 = 1u;

const SLICES: u32 = 8u;

// The token's codes as the GEMV reads them: 16 words a chunk.
var<workgroup> codes: array<vec4<u32>, UNITS>;
var<workgroup> partial: array<i32, 256>;

// What multiplies the row's scale, and what the variant subtracts from its sums.
struct Token {
    act_scale: f32,
    code_sum: i32,
}

fn normed(k: u32, r: f32) -> f32 {
    if NORM == 1u {
        return norm[k] * (x[k] * r);
    }
    return x[k];
}

fn code(k: u32, r: f32, inv_act_scale: f32) -> i32 {
    if k >= K {
        return 0;
    }
    return i32(clamp(round(normed(k, r) * inv_act_scale), -128.0, 127.0));
}

// Norm and quantisation; every lane must call.
fn quantize(lid: u32) -> Token {
    var r = 1.0;
    if NORM == 1u {
        var squares = 0.0;
        for (var k = lid; k < K; k += WG) {
            squares += x[k] * x[k];
        }
        r = 1.0 / sqrt(reduce_sum_f32(lid, squares) / f32(K) + EPS);
    }
    var max_bits = 0u;
    for (var k = lid; k < K; k += WG) {
        max_bits = max(max_bits, bitcast<u32>(normed(k, r)) & 0x7fffffffu);
    }
    // 0x3727c5ac is 1e-5.
    let absmax = bitcast<f32>(max(reduce_max_u32(lid, max_bits), 0x3727c5acu));
    let inv_act_scale = 127.0 / absmax;
    var sum = 0;
    // Four words of four codes each.
    for (var unit = lid; unit < UNITS; unit += WG) {
        var words = vec4<u32>(0u);
        for (var i = 0u; i < 4u; i++) {
            var bytes = 0u;
            for (var b = 0u; b < 4u; b++) {
                let q = code(16u * unit + 4u * i + b, r, inv_act_scale);
                sum += q;
                bytes |= (u32(q + 128) & 0xffu) << (8u * b);
            }
            words[i] = bytes;
        }
        codes[unit] = words;
    }
    workgroupBarrier();
    if PLANES == 1u {
        // Bytes q + 128 of 32 columns → eight bit planes, in place; −128 flips the top bit.
        for (var group = lid; group < 2u * KC; group += WG) {
            let bytes = array<vec4<u32>, 2>(codes[2u * group], codes[2u * group + 1u]);
            var low = vec4<u32>(0u);
            var high = vec4<u32>(0u);
            for (var i = 0u; i < 32u; i++) {
                let q = vec4((bytes[i >> 4u][(i >> 2u) & 3u] >> (8u * (i & 3u))) ^ 0x80u);
                low |= ((q >> vec4(0u, 1u, 2u, 3u)) & vec4(1u)) << vec4(i);
                high |= ((q >> vec4(4u, 5u, 6u, 7u)) & vec4(1u)) << vec4(i);
            }
            codes[2u * group] = low;
            codes[2u * group + 1u] = high;
        }
    }
    // Its barriers publish the codes.
    return Token(absmax / 127.0, reduce_sum_i32(lid, sum));
}

fn planes_sum(tile: u32, row: u32, slice: u32) -> i32 {
    var low = vec4<u32>(0u);
    var high = vec4<u32>(0u);
    for (var c = slice; c < KC; c += SLICES) {
        let piece = w[(tile * KC + c) * 32u + row];
        let at = c << 2u;
        let z0 = vec4(piece.x);
        let z1 = vec4(piece.y);
        let s0 = vec4(piece.z);
        let s1 = vec4(piece.w);
        low += countOneBits(z0 & (codes[at] ^ s0)) + countOneBits(z1 & (codes[at + 2u] ^ s1));
        high += countOneBits(z0 & (codes[at + 1u] ^ s0)) + countOneBits(z1 & (codes[at + 3u] ^ s1));
    }
    let l = low << vec4(0u, 1u, 2u, 3u);
    let h = high << vec4(4u, 5u, 6u, 7u);
    return i32(l.x + l.y + l.z + l.w + h.x + h.y + h.z) - i32(h.w);
}

fn dot16(weights: vec4<u32>, q: vec4<u32>) -> u32 {
    return dot4U8Packed(weights.x, q.x) + dot4U8Packed(weights.y, q.y)
        + dot4U8Packed(weights.z, q.z) + dot4U8Packed(weights.w, q.w);
}

fn i2_sum(tile: u32, row: u32, slice: u32) -> i32 {
    var a0 = 0u;
    var a1 = 0u;
    var a2 = 0u;
    var a3 = 0u;
    for (var c = slice; c < KC; c += SLICES) {
        let piece = w[(tile * KC + c) * 32u + row];
        a0 += dot16(piece & vec4(0x03030303u), codes[4u * c]);
        a1 += dot16(piece & vec4(0x0c0c0c0cu), codes[4u * c + 1u]);
        a2 += dot16(piece & vec4(0x30303030u), codes[4u * c + 2u]);
        a3 += dot16(piece & vec4(0xc0c0c0c0u), codes[4u * c + 3u]);
    }
    return i32(a0 + (a1 >> 2u) + (a2 >> 4u) + (a3 >> 6u));
}

// The results of a tile's rows, in the lanes below 32; every lane must call.
fn tile_rows(tile: u32, lid: u32, token: Token) -> f32 {
    let row = lid & 31u;
    let slice = lid >> 5u;
    if PLANES == 1u {
        partial[lid] = planes_sum(tile, row, slice);
    } else {
        partial[lid] = i2_sum(tile, row, slice);
    }
    workgroupBarrier();
    var y = 0.0;
    if lid < 32u {
        var sum = 0;
        for (var s = 0u; s < SLICES; s++) {
            sum += partial[s * 32u + lid];
        }
        let constant = rows[tile * 32u + lid];
        sum += bitcast<i32>(constant.x);
        if PLANES == 0u {
            sum -= token.code_sum;
        }
        y = f32(sum) * (bitcast<f32>(constant.y) * token.act_scale);
    }
    workgroupBarrier();
    return y;
}
