//! Whether two models hold the same weights.

use super::HALF_ROUNDING;
use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::format::float::f16_to_f32;
use crate::tensor_names::Naming;
use crate::weights::{Table, TernaryMatrix, WeightScale, WeightSource};

/// What [`compare`] found; all trits are equal.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Comparison {
    /// Trits compared.
    pub trits: u64,
    /// Matrices whose scales differ.
    pub other_scales: usize,
    /// The largest relative difference of a scale.
    pub largest_scale_difference: f32,
    /// Elements of embedding table, LM head and norms compared.
    pub floats: u64,
}

/// Compares every weight of two models: trits, floats of tables and norms must be equal, scales
/// within the rounding to an IEEE half. So must be everything else that enters the computation:
/// dimensions, activation, eps, rotary frequencies (within 10⁻⁶, which factors for them round).
///
/// # Errors
/// [`Error::Differs`] with the first difference, or as reading the models.
pub fn compare(
    expected: &dyn WeightSource,
    found: &dyn WeightSource,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Comparison> {
    let (a, b) = (expected.config(), found.config());
    same_computation(a, b)?;
    let (frequencies, others) = (expected.frequencies()?, found.frequencies()?);
    let factors = (frequencies.attention_factor, others.attention_factor);
    let pairs = frequencies.inv_freq.iter().zip(&others.inv_freq).map(|(&a, &b)| (a, b));
    if let Some((a, b)) = pairs.chain([factors]).find(|(a, b)| (a - b).abs() > 1e-6 * a.abs()) {
        return Err(differs("a rotary frequency", &a.to_string(), &b.to_string()));
    }
    let mut comparison = Comparison::default();
    let total = a.num_hidden_layers;
    comparison.table("the embedding table", &expected.embedding()?, &found.embedding()?)?;
    match (expected.lm_head()?, found.lm_head()?) {
        (None, None) => {}
        (Some(expected), Some(found)) => comparison.table("the LM head", &expected, &found)?,
        (expected, _) => {
            let words = |has: bool| if has { "its own" } else { "the embedding table" };
            let has = expected.is_some();
            return Err(differs("the LM head", words(has), words(!has)));
        }
    }
    comparison.floats("the last norm", &expected.final_norm()?, &found.final_norm()?)?;
    for layer in 0..total {
        progress(layer, total);
        let (expected, found) = (expected.layer(layer)?, found.layer(layer)?);
        let norms = expected.norms().zip(found.norms());
        for ((norm, expected), (_, found)) in norms {
            comparison.floats(&norm.weight(Naming::HuggingFace, layer), expected, found)?;
        }
        for ((linear, expected), (_, found)) in expected.linears().into_iter().zip(found.linears())
        {
            let name = linear.weight(Naming::HuggingFace, layer);
            comparison.matrix(&name, expected, found)?;
            match (&expected.input().norm, &found.input().norm) {
                (None, None) => {}
                (Some(expected), Some(found)) => {
                    comparison.floats(&linear.norm(Naming::HuggingFace, layer), expected, found)?;
                }
                _ => return Err(differs(&name, "the same norm inside", "another")),
            }
        }
    }
    progress(total, total);
    Ok(comparison)
}

/// Whether two configurations compute the same of the same weights.
fn same_computation(a: &ModelConfig, b: &ModelConfig) -> Result<()> {
    let numbers = |config: &ModelConfig| {
        [
            ("vocab_size", config.vocab_size),
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("num_hidden_layers", config.num_hidden_layers),
            ("num_attention_heads", config.num_attention_heads),
            ("num_key_value_heads", config.num_key_value_heads),
            ("head_dim", config.head_dim),
            ("max_position_embeddings", config.max_position_embeddings),
        ]
    };
    for ((what, a), (_, b)) in numbers(a).into_iter().zip(numbers(b)) {
        if a != b {
            return Err(differs(what, &a.to_string(), &b.to_string()));
        }
    }
    let eps = |config: &ModelConfig| (config.rms_norm_eps, config.linear_norm_eps);
    for (what, same) in [
        ("hidden_act", a.hidden_act == b.hidden_act),
        ("the activations' type", a.activations == b.activations),
        ("rms_norm_eps", eps(a) == eps(b)),
        ("the sub-norms", a.has_sub_norms() == b.has_sub_norms()),
        ("the norms of heads", a.has_head_norms() == b.has_head_norms()),
    ] {
        if !same {
            return Err(differs(what, "the same", "another"));
        }
    }
    Ok(())
}

impl Comparison {
    fn floats(&mut self, what: &str, expected: &[f32], found: &[f32]) -> Result<()> {
        if expected.len() != found.len() {
            let [expected, found] =
                [expected, found].map(|values| format!("{} values", values.len()));
            return Err(differs(what, &expected, &found));
        }
        // Equal as numbers: −0 may have become 0.
        if let Some(i) = (0..expected.len()).find(|&i| expected[i] != found[i]) {
            let what = format!("{what}, element {i}");
            return Err(differs(&what, &expected[i].to_string(), &found[i].to_string()));
        }
        self.floats += expected.len() as u64;
        Ok(())
    }

    fn table(&mut self, what: &str, expected: &Table, found: &Table) -> Result<()> {
        if expected.shape() != found.shape() {
            let [expected, found] = [expected, found].map(|table| table.shape().to_string());
            return Err(differs(what, &expected, &found));
        }
        let k = expected.shape().k();
        let (mut a, mut b) = (vec![0.0; k], vec![0.0; k]);
        for n in 0..expected.shape().n() {
            expected.row(n, &mut a)?;
            found.row(n, &mut b)?;
            self.floats(&format!("{what}, row {n}"), &a, &b)?;
        }
        Ok(())
    }

    fn matrix(
        &mut self,
        what: &str,
        expected: &TernaryMatrix,
        found: &TernaryMatrix,
    ) -> Result<()> {
        if expected.shape() != found.shape() {
            let [expected, found] = [expected, found].map(|matrix| matrix.shape().to_string());
            return Err(differs(what, &expected, &found));
        }
        let k = expected.shape().k();
        let mut rows = [vec![0; k], vec![0; k]];
        let mut scales = [expected, found].map(|matrix| vec![0; matrix.groups()]);
        let mut largest = 0.0f32;
        for n in 0..expected.shape().n() {
            expected.row_with_scales(n, &mut rows[0], &mut scales[0])?;
            found.row_with_scales(n, &mut rows[1], &mut scales[1])?;
            if let Some(i) = (0..k).find(|&i| rows[0][i] != rows[1][i]) {
                let what = format!("{what}, row {n}, column {i}");
                return Err(differs(&what, &rows[0][i].to_string(), &rows[1][i].to_string()));
            }
            // The smaller of the two kinds of groups is a part of the larger.
            let groups = scales[0].len().max(scales[1].len()).max(1);
            for g in 0..groups {
                let scale = |matrix: &TernaryMatrix, scales: &[u16]| match matrix.scale() {
                    WeightScale::Tensor(scale) => scale,
                    WeightScale::Groups { .. } => f16_to_f32(scales[g * scales.len() / groups]),
                };
                let (a, b) = (scale(expected, &scales[0]), scale(found, &scales[1]));
                let difference = if a == b { 0.0 } else { (a - b).abs() / a.abs() };
                if difference.is_nan() || difference > HALF_ROUNDING {
                    let what = format!("{what}, row {n}: the scale");
                    return Err(differs(&what, &a.to_string(), &b.to_string()));
                }
                largest = largest.max(difference);
            }
        }
        self.trits += expected.shape().len() as u64;
        self.other_scales += usize::from(largest > 0.0);
        self.largest_scale_difference = self.largest_scale_difference.max(largest);
        Ok(())
    }
}

fn differs(what: &str, expected: &str, found: &str) -> Error {
    let [what, expected, found] = [what, expected, found].map(str::to_owned);
    Error::Differs { what, expected, found }
}
