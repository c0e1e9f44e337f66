// The factor of RMSNorm, in a fixed order.
// Expects: reduce_tree, x: array<f32>, override K. Every lane must call; every lane gets the result.
override EPS: f32 = 1e-5;

// 1/√(mean(x²) + EPS) of the K values from `from_` on.
fn inv_rms(lid: u32, from_: u32) -> f32 {
    var sum = 0.0;
    for (var k = lid; k < K; k += WG) {
        let value = x[from_ + k];
        sum += value * value;
    }
    return 1.0 / sqrt(reduce_sum_f32(lid, sum) / f32(K) + EPS);
}
