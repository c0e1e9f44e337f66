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

fn bitlinear(m: u32, n: u32) -> f32 {
    var run = 0u;
    var row = n;
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
