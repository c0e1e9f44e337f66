// Result of a linear layer's row: f32, or an exact i32 sum scaled back to a real number. Matrices
// whose inputs were quantised apart are runs of rows: each starts at a tile of its own and has its
// own activation scales.
// Expects: acc, weight_scale, act_scale, override N_PAD (rows of acc, a multiple of 32).
override FLOAT_RUNS: u32 = 0u;     // bit r: run r holds f32, its weight_scale and act_scale are unused
override RUN_1: u32 = 0xffffffffu; // first row of the second run, and how many rows of padding are
override RUN_1_PAD: u32 = 0u;      // before it
override RUN_2: u32 = 0xffffffffu; // the same for the third
override RUN_2_PAD: u32 = 0u;
override ACT_STRIDE: u32 = 0u;     // from one run's act_scale[M] to the next

// Order of a single run's rows: 0 as they are, 1 pairs of RoPE in tiles of 16 + 16 (ORDER_SIZE = D),
// 2 tiles of gate and up in turn (ORDER_SIZE = F).
override ORDER: u32 = 0u;
override ORDER_SIZE: u32 = 32u;

fn packed_row(n: u32) -> u32 {
    if ORDER == 1u {
        let half = ORDER_SIZE / 2u;
        let i = n % ORDER_SIZE;
        let j = i % half;
        return n - i + (j / 16u) * 32u + j % 16u + (i / half) * 16u;
    }
    if ORDER == 2u {
        let i = n % ORDER_SIZE;
        return (i / 32u) * 64u + i % 32u + (n / ORDER_SIZE) * 32u;
    }
    return n;
}

fn bitlinear(m: u32, n: u32) -> f32 {
    var run = 0u;
    var row = packed_row(n);
    if n >= RUN_2 {
        run = 2u;
        row += RUN_2_PAD;
    } else if n >= RUN_1 {
        run = 1u;
        row += RUN_1_PAD;
    }
    let sum = acc[m * N_PAD + row];
    if ((FLOAT_RUNS >> run) & 1u) == 1u {
        return bitcast<f32>(sum);
    }
    return f32(sum) * (weight_scale[row] * act_scale[run * ACT_STRIDE + m]);
}
