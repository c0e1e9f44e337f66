//! `gated_activation`: the gated MLP between its gate/up and down matrices.

use crate::exp::exp;

/// The activation function of the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(x, 0)²`: BitNet b1.58 2B4T. Overflows f16; keep f32.
    Relu2,
    /// `x / (1 + e^−x)`: Llama-shaped models.
    Silu,
}

impl Activation {
    /// The function's value at `x`.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Self::Relu2 => {
                // `max` would turn NaN into 0.
                let positive = if x < 0.0 { 0.0 } else { x };
                positive * positive
            }
            Self::Silu => x / (1.0 + exp(-x)),
        }
    }
}

/// `z[i] = act(gate[i]) · up[i]`.
pub fn gated_activation(gate: &[f32], up: &[f32], activation: Activation) -> Vec<f32> {
    assert_eq!(gate.len(), up.len());
    gate.iter().zip(up).map(|(&g, &u)| activation.apply(g) * u).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relu2_and_silu() {
        let (gate, up) = ([-2.0, 0.0, 3.0], [5.0, 5.0, -2.0]);
        assert_eq!(gated_activation(&gate, &up, Activation::Relu2), [0.0, 0.0, -18.0]);
        let silu = gated_activation(&gate, &up, Activation::Silu);
        assert!((silu[0] + 10.0 * 0.119_202_92).abs() < 1e-5);
        assert_eq!(silu[1], 0.0);
        assert!(Activation::Relu2.apply(f32::NAN).is_nan());
    }
}
