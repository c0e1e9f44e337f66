//! How much of a gated MLP is exactly zero: what a kernel may skip without changing a bit.
//!
//! `relu(gate)²·up` is zero wherever the gate is not positive. RMSNorm without a bias leaves zeros
//! zero, and quantisation adds those that are too small for a code. A row of `up_proj` whose gate is
//! closed and a column of `down_proj` whose code is zero add nothing to any sum.

use crate::backend::{Tap, Want};
use crate::config::{Activations, ModelConfig};
use crate::error::Result;
use crate::model::Transformer;
use crate::weights::WeightSource;

use cpu_ref::quantize_absmax::quantize_absmax;
use cpu_ref::rmsnorm::rmsnorm;

/// The zeros of one layer's MLP, over all tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerZeros {
    /// Gated activations: tokens × intermediate size.
    pub values: u64,
    /// Those that are exactly zero before the norm: rows of `up_proj` that need not be read.
    pub gated: u64,
    /// Inputs of `down_proj` that are zero after norm and quantisation; `None` where the model does
    /// not quantise them. Columns that need not be read.
    pub codes: Option<u64>,
}

impl LayerZeros {
    /// Share of the rows of `up_proj` that need not be read.
    pub fn gated_share(&self) -> f64 {
        share(self.gated, self.values)
    }

    /// Share of the columns of `down_proj` that need not be read.
    pub fn code_share(&self) -> f64 {
        share(self.codes.unwrap_or(self.gated), self.values)
    }

    fn plus(self, other: Self) -> Self {
        Self {
            values: self.values + other.values,
            gated: self.gated + other.gated,
            codes: self.codes.zip(other.codes).map(|(a, b)| a + b),
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// The zeros of every layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Sparsity {
    /// Tokens fed.
    pub tokens: usize,
    /// One a layer.
    pub layers: Vec<LayerZeros>,
}

impl Sparsity {
    /// Feeds tokens from position 0 and counts.
    ///
    /// # Errors
    /// If the tokens do not fit the model or its context, or a step fails.
    pub fn measure(
        model: &mut Transformer,
        source: &dyn WeightSource,
        tokens: &[u32],
    ) -> Result<Self> {
        let config = source.config().clone();
        let norms =
            (0..config.num_hidden_layers).map(|layer| Ok(source.layer(layer)?.ffn_sub_norm));
        let norms: Vec<_> = norms.collect::<Result<_>>()?;
        let has_codes = config.activations == Activations::Int8Token;
        let zero = LayerZeros { codes: has_codes.then_some(0), ..LayerZeros::default() };
        let mut layers = vec![zero; config.num_hidden_layers];
        model.reset();
        model.feed_tapped(tokens, Want::Nothing, &mut |tap, layer, values| {
            if tap == Tap::Gated {
                for gated in values.chunks_exact(config.intermediate_size) {
                    let zeros = zeros(gated, norms[layer].as_deref(), &config, has_codes);
                    layers[layer] = layers[layer].plus(zeros);
                }
            }
        })?;
        Ok(Self { tokens: tokens.len(), layers })
    }

    /// All layers together.
    pub fn total(&self) -> LayerZeros {
        let first = self.layers.first().map_or(LayerZeros::default(), |layer| LayerZeros {
            codes: layer.codes.map(|_| 0),
            ..LayerZeros::default()
        });
        self.layers.iter().fold(first, |sum, &layer| sum.plus(layer))
    }
}

/// The zeros of one token in one layer.
fn zeros(gated: &[f32], norm: Option<&[f32]>, config: &ModelConfig, has_codes: bool) -> LayerZeros {
    let codes = has_codes.then(|| {
        let normed = norm.map(|weight| rmsnorm(gated, weight, config.rms_norm_eps));
        let codes = quantize_absmax(normed.as_deref().unwrap_or(gated)).codes;
        codes.iter().filter(|&&code| code == 0).count() as u64
    });
    let zeros = gated.iter().filter(|&&value| value == 0.0).count() as u64;
    LayerZeros { values: gated.len() as u64, gated: zeros, codes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_values_become_zero_codes() {
        let config = crate::synthetic::bitnet_2b4t();
        let gated = [0.0, -0.0, 127.0, 0.4, 0.6, -3.0];
        let found = zeros(&gated, None, &config, true);
        assert_eq!(found, LayerZeros { values: 6, gated: 2, codes: Some(3) });
        assert_eq!(found.gated_share(), 2.0 / 6.0);
        assert_eq!(found.code_share(), 0.5);
        assert_eq!(zeros(&gated, None, &config, false).codes, None);
        // A norm keeps zeros, and may lift a small value.
        let norm = [1.0, 1.0, 1.0, 10.0, 1.0, 1.0];
        assert_eq!(zeros(&gated, Some(&norm), &config, true).codes, Some(2));
    }
}
