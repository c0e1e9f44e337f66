// A linear layer's decode step in one dispatch: RMSNorm and absmax quantisation of the token by every
// workgroup for itself, in the order of rmsnorm.wgsl and quantize_absmax.wgsl, then rows of a tile as
// the GEMV of the encoding multiplies them.
// Expects: gemv_shape, planes_sum, i2_sum, signed_sum, half_pairs, half_sum, w: array<vec4<u32>>
// [tiles, KC, 32], x: array<f32> [K], norm: array<f32> [K] (NORM = 0: unused), rows: array<vec2<u32>>
// [32·tiles] of (offset, scale); ENCODING 2 and 3 have no offsets.
override K: u32 = 64u;
override UNITS: u32 = 4u;     // 16 bytes each: 4·KC, of f16 pairs 8·KC
override EPS: f32 = 1e-5;
override NORM: u32 = 1u;
override ENCODING: u32 = 1u;  // as in quantize_absmax.wgsl
override SCRATCH: u32 = 256u; // the larger of LANES and NORM_LANES

// The sum of squares is that of as many lanes as rmsnorm.wgsl has, whatever LANES is.
const NORM_LANES: u32 = 256u;

// The token's codes as the GEMV reads them.
var<workgroup> codes: array<vec4<u32>, UNITS>;
// Of reductions, then the sums of the slices.
var<workgroup> scratch: array<u32, SCRATCH>;

// What multiplies the row's scale, and code_sum of quantize_absmax.wgsl.
struct Token {
    act_scale: f32,
    code_sum: i32,
}

fn unit(i: u32) -> vec4<u32> {
    return codes[i];
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

// As reduce_tree.wgsl, of NORM_LANES numbers; every lane must call.
fn sum_of_squares(lid: u32) -> f32 {
    for (var lane = lid; lane < NORM_LANES; lane += LANES) {
        var squares = 0.0;
        for (var k = lane; k < K; k += NORM_LANES) {
            squares += x[k] * x[k];
        }
        scratch[lane] = bitcast<u32>(squares);
    }
    workgroupBarrier();
    for (var step = NORM_LANES / 2u; step > 0u; step /= 2u) {
        for (var lane = lid; lane < step; lane += LANES) {
            let sum = bitcast<f32>(scratch[lane]) + bitcast<f32>(scratch[lane + step]);
            scratch[lane] = bitcast<u32>(sum);
        }
        workgroupBarrier();
    }
    let result = bitcast<f32>(scratch[0]);
    workgroupBarrier();
    return result;
}

fn max_of_lanes(lid: u32, value: u32) -> u32 {
    scratch[lid] = value;
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        if lid < step {
            scratch[lid] = max(scratch[lid], scratch[lid + step]);
        }
        workgroupBarrier();
    }
    let result = scratch[0];
    workgroupBarrier();
    return result;
}

fn sum_of_lanes(lid: u32, value: i32) -> i32 {
    scratch[lid] = bitcast<u32>(value);
    workgroupBarrier();
    for (var step = LANES / 2u; step > 0u; step /= 2u) {
        if lid < step {
            // Two's complement: the unsigned sum has the bits of the signed one.
            scratch[lid] = scratch[lid] + scratch[lid + step];
        }
        workgroupBarrier();
    }
    let result = bitcast<i32>(scratch[0]);
    workgroupBarrier();
    return result;
}

// Norm and quantisation; every lane must call.
fn quantize(lid: u32) -> Token {
    var r = 1.0;
    if NORM == 1u {
        r = 1.0 / sqrt(sum_of_squares(lid) / f32(K) + EPS);
    }
    var max_bits = 0u;
    for (var k = lid; k < K; k += LANES) {
        max_bits = max(max_bits, bitcast<u32>(normed(k, r)) & 0x7fffffffu);
    }
    // 0x3727c5ac is 1e-5.
    let absmax = bitcast<f32>(max(max_of_lanes(lid, max_bits), 0x3727c5acu));
    let inv_act_scale = 127.0 / absmax;
    var sum = 0;
    for (var at = lid; at < UNITS; at += LANES) {
        var words = vec4<u32>(0u);
        for (var i = 0u; i < 4u; i++) {
            let word = 4u * at + i;
            if ENCODING == 3u {
                let k = half_k(word);
                let pair = vec2(code(k, r, inv_act_scale), code(k + 2u, r, inv_act_scale));
                sum += (pair.x + pair.y) * half_weight(word);
                words[i] = pack2x16float(vec2<f32>(pair));
            } else {
                let bias = select(128, 0, ENCODING == 2u);
                var bytes = 0u;
                for (var b = 0u; b < 4u; b++) {
                    let q = code(4u * word + b, r, inv_act_scale);
                    sum += q;
                    bytes |= (u32(q + bias) & 0xffu) << (8u * b);
                }
                words[i] = bytes;
            }
        }
        codes[at] = words;
    }
    workgroupBarrier();
    if ENCODING == 1u {
        // Bytes q + 128 of 32 columns → eight bit planes, in place; −128 flips the top bit.
        for (var group = lid; group < 2u * KC; group += LANES) {
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
    return Token(absmax / 127.0, sum_of_lanes(lid, sum));
}

// The results of a tile's rows in the lanes below ROWS, `row` being the lane's row in the tile; every
// lane must call.
fn tile_rows(tile: u32, row: u32, lid: u32, token: Token) -> f32 {
    let first = tile * KC * 32u + row;
    let slice = lid / ROWS;
    if ENCODING == 0u {
        scratch[lid] = bitcast<u32>(i2_sum(first, slice));
    } else if ENCODING == 1u {
        scratch[lid] = bitcast<u32>(planes_sum(first, slice));
    } else if ENCODING == 2u {
        scratch[lid] = bitcast<u32>(signed_sum(first, slice));
    } else {
        scratch[lid] = bitcast<u32>(half_sum(first, slice));
    }
    workgroupBarrier();
    var y = 0.0;
    if lid < ROWS {
        var sum = 0;
        for (var s = 0u; s < S; s++) {
            sum += bitcast<i32>(scratch[s * ROWS + lid]);
        }
        let constant = rows[tile * 32u + row];
        if ENCODING < 2u {
            sum += bitcast<i32>(constant.x);
        }
        if ENCODING != 1u {
            sum -= token.code_sum;
        }
        y = f32(sum) * (bitcast<f32>(constant.y) * token.act_scale);
    }
    workgroupBarrier();
    return y;
}
