// A workgroup's tile of a GEMM, R rows × T tokens, on cooperative matrices: a subgroup has 4·SIZE rows
// of 2·SIZE tokens in eight matrices of f32 sums. 32 columns at a time, the weights and codes are
// unpacked to f16 in workgroup memory, once for the tile.
// Expects: pass_, w, x, acc as in gemm_i2; const SIZE; alias Weights, Codes, Sums: the cooperative
// matrices of SIZE × SIZE with roles A and B, f16, and C, f32.
override KC: u32 = 1u;         // chunks of 64 columns
override N_PAD: u32 = 32u;     // words from one token's rows to the next's
override TILE_BASE: u32 = 0u;  // first tile of this shard
override ROWS: u32 = 32u;      // rows of this shard
override MAX_TOKENS: u32 = 1u; // tokens that x and acc have room for
override SUBGROUP: u32 = 32u;  // lanes that hold a part of the tile together
override SUBS_R: u32 = 1u;     // R / 4·SIZE
override LANES: u32 = 32u;     // SUBGROUP·SUBS_R·(T / 2·SIZE)
override R: u32 = 64u;
override T: u32 = 32u;
override W_HALVES: u32 = 2560u; // STRIDE·R
override X_HALVES: u32 = 1280u; // STRIDE·T
override SCRATCH: u32 = 256u;   // SIZE² for each SUBGROUP lanes

const STRIDE: u32 = 40u; // 32 columns, and 8 that spread rows over banks

var<workgroup> rows: array<f16, W_HALVES>;    // [R, STRIDE]
var<workgroup> tokens: array<f16, X_HALVES>;  // [T, STRIDE]
var<workgroup> scratch: array<f32, SCRATCH>;  // [SUBGROUP lanes, SIZE tokens, SIZE rows]

// Four bytes, each less `bias` − 1024: 0x6400 | byte is 1024 + byte as f16.
fn halves(word: u32, bias: f32) -> vec4<f16> {
    let even = unpack2x16float((word & 0x00ff00ffu) | 0x64006400u);
    let odd = unpack2x16float(((word >> 8u) & 0x00ff00ffu) | 0x64006400u);
    return vec4<f16>(vec4(even.x, odd.x, even.y, odd.y) - vec4(bias));
}

fn put_row(at: u32, four: vec4<f16>) {
    rows[at] = four.x;
    rows[at + 1u] = four.y;
    rows[at + 2u] = four.z;
    rows[at + 3u] = four.w;
}

fn put_token(at: u32, four: vec4<f16>) {
    tokens[at] = four.x;
    tokens[at + 1u] = four.y;
    tokens[at + 2u] = four.z;
    tokens[at + 3u] = four.w;
}

// Unpacks 32 columns: two fields of the codes, two units of the tokens. Rows and tokens past the last
// repeat it and are not stored.
fn stage(first_row: u32, first_token: u32, last: u32, step: u32, lid: u32) {
    let chunk = step / 2u;
    for (var i = lid; i < 2u * R; i += LANES) {
        let row = min(first_row + i / 2u, ROWS - 1u);
        let field = 2u * (step % 2u) + i % 2u;
        let piece = w[((row / 32u) * KC + chunk) * 32u + row % 32u] >> vec4(2u * field);
        let codes = piece & vec4(0x03030303u);
        let to = (i / 2u) * STRIDE + 16u * (i % 2u);
        put_row(to, halves(codes.x, 1025.0));
        put_row(to + 4u, halves(codes.y, 1025.0));
        put_row(to + 8u, halves(codes.z, 1025.0));
        put_row(to + 12u, halves(codes.w, 1025.0));
    }
    for (var i = lid; i < 2u * T; i += LANES) {
        let token = min(first_token + i / 2u, last);
        let q = x[token * 4u * KC + 2u * step + i % 2u];
        let to = (i / 2u) * STRIDE + 16u * (i % 2u);
        put_token(to, halves(q.x, 1152.0));
        put_token(to + 4u, halves(q.y, 1152.0));
        put_token(to + 8u, halves(q.z, 1152.0));
        put_token(to + 12u, halves(q.w, 1152.0));
    }
}

// Stores the sums in the scratch, whose first row and token these are.
fn store(row: u32, token: u32, last: u32, lid: u32) {
    workgroupBarrier();
    for (var i = lid % SUBGROUP; i < SIZE * SIZE; i += SUBGROUP) {
        let n = row + i % SIZE;
        let m = token + i / SIZE;
        if n < ROWS && m <= last {
            let sum = scratch[(lid / SUBGROUP) * SIZE * SIZE + i];
            acc[m * N_PAD + TILE_BASE * 32u + n] = i32(sum);
        }
    }
    workgroupBarrier();
}

fn multiply_tile(wg: vec3<u32>, lid: u32) {
    let last = min(pass_.n_tokens - 1u, MAX_TOKENS - 1u);
    let sub = lid / SUBGROUP;
    let sub_row = (sub % SUBS_R) * 4u * SIZE;
    let sub_token = (sub / SUBS_R) * 2u * SIZE;
    let mine = sub * SIZE * SIZE;
    for (var i = lid; i < SCRATCH; i += LANES) {
        scratch[i] = 0.0;
    }
    workgroupBarrier();
    // sums_rt: the r-th SIZE rows, the t-th SIZE tokens.
    var sums_00 = coopLoad<Sums>(&scratch[mine], SIZE);
    var sums_10 = sums_00;
    var sums_20 = sums_00;
    var sums_30 = sums_00;
    var sums_01 = sums_00;
    var sums_11 = sums_00;
    var sums_21 = sums_00;
    var sums_31 = sums_00;
    for (var step = 0u; step < 2u * KC; step++) {
        stage(wg.x * R, wg.y * T, last, step, lid);
        workgroupBarrier();
        for (var k = 0u; k < 32u; k += SIZE) {
            let row = sub_row * STRIDE + k;
            let token = sub_token * STRIDE + k;
            let q0 = coopLoad<Codes>(&tokens[token], STRIDE);
            let q1 = coopLoad<Codes>(&tokens[token + SIZE * STRIDE], STRIDE);
            let w0 = coopLoadT<Weights>(&rows[row], STRIDE);
            let w1 = coopLoadT<Weights>(&rows[row + SIZE * STRIDE], STRIDE);
            let w2 = coopLoadT<Weights>(&rows[row + 2u * SIZE * STRIDE], STRIDE);
            let w3 = coopLoadT<Weights>(&rows[row + 3u * SIZE * STRIDE], STRIDE);
            sums_00 = coopMultiplyAdd(w0, q0, sums_00);
            sums_10 = coopMultiplyAdd(w1, q0, sums_10);
            sums_20 = coopMultiplyAdd(w2, q0, sums_20);
            sums_30 = coopMultiplyAdd(w3, q0, sums_30);
            sums_01 = coopMultiplyAdd(w0, q1, sums_01);
            sums_11 = coopMultiplyAdd(w1, q1, sums_11);
            sums_21 = coopMultiplyAdd(w2, q1, sums_21);
            sums_31 = coopMultiplyAdd(w3, q1, sums_31);
        }
        workgroupBarrier();
    }
    let row = wg.x * R + sub_row;
    let token = wg.y * T + sub_token;
    coopStore(sums_00, &scratch[mine], SIZE);
    store(row, token, last, lid);
    coopStore(sums_10, &scratch[mine], SIZE);
    store(row + SIZE, token, last, lid);
    coopStore(sums_20, &scratch[mine], SIZE);
    store(row + 2u * SIZE, token, last, lid);
    coopStore(sums_30, &scratch[mine], SIZE);
    store(row + 3u * SIZE, token, last, lid);
    coopStore(sums_01, &scratch[mine], SIZE);
    store(row, token + SIZE, last, lid);
    coopStore(sums_11, &scratch[mine], SIZE);
    store(row + SIZE, token + SIZE, last, lid);
    coopStore(sums_21, &scratch[mine], SIZE);
    store(row + 2u * SIZE, token + SIZE, last, lid);
    coopStore(sums_31, &scratch[mine], SIZE);
    store(row + 3u * SIZE, token + SIZE, last, lid);
}
