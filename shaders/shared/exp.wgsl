// e^x by products, sums and bit operations in the order of cpu-ref/src/exp.rs, so that backends
// agree; WGSL's own exp differs from driver to driver. Relative error below 2e-7 + 1.2e-7·|x|.
fn exp_f32(x_any: f32) -> f32 {
    if x_any < -87.0 {
        return 0.0;
    }
    let x = select(x_any, 88.0, x_any > 88.0);
    let t = x * 1.44269504;
    let n = floor(t + 0.5);
    let f = t - n;
    var p = 1.5252734e-5;
    p = p * f + 1.540353e-4;
    p = p * f + 1.3333558e-3;
    p = p * f + 9.618129e-3;
    p = p * f + 5.550411e-2;
    p = p * f + 2.402265e-1;
    p = p * f + 6.931472e-1;
    p = p * f + 1.0;
    return p * bitcast<f32>(u32(i32(n) + 127) << 23u);
}
