// The repetition penalty: what was seen becomes less likely, whatever the sign of its logit.
// Monotone in the logit, so it maps bounds to bounds.
// Expects: pass_, seen: array<u32> [logit rows, ceil(V/32)], token n in bit n % 32 of word n / 32 of a
// row, which starts at word `from_`.
fn penalised(from_: u32, n: u32, logit: f32) -> f32 {
    let penalty = pass_.penalty;
    if penalty == 1.0 || ((seen[from_ + (n >> 5u)] >> (n & 31u)) & 1u) == 0u {
        return logit;
    }
    return select(logit * penalty, logit / penalty, logit > 0.0);
}
