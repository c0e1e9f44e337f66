//! `prism.hadamard.*`: which weights of a GGUF file are stored rotated, and how.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::config::File;
use crate::error::{Error, Result};
use crate::format::gguf::{Metadata, Strings};
use crate::format::{TensorInfo, quoted, shortened};
use crate::weights::Rotation;

const PREFIX: &str = "prism.hadamard.";

/// The keys that version 1 has. `gdn_v_grouped` concerns a kind of layer that no architecture here
/// has.
const KEYS: [&str; 10] = [
    "version",
    "block_size",
    "transform",
    "axis",
    "sign_mode",
    "sign_widths",
    "sign_values",
    "weight_names",
    "inverse_weight_names",
    "gdn_v_grouped",
];

/// Largest block: a GPU's workgroup holds it at once.
const MAX_BLOCK: u64 = 4096;

/// The rotations of a model's weights.
#[derive(Debug)]
pub(super) struct Rotations {
    file: String,
    block: usize,
    /// By width; `None`: all signs are +1.
    signs: Option<BTreeMap<usize, Arc<Rotation>>>,
    /// Weights whose input is rotated.
    weights: BTreeSet<String>,
    /// Tables whose rows are rotated back.
    inverse: BTreeSet<String>,
}

impl Rotations {
    /// The rotations that a file declares; `None` if it declares none.
    ///
    /// # Errors
    /// If the declaration is incomplete, inconsistent or of another version: a rotated model that
    /// is run without its rotation writes fluent nonsense.
    pub(super) fn read(metadata: &Metadata) -> Result<Option<Self>> {
        let mut keys = metadata.iter().filter_map(|(key, _)| key.strip_prefix(PREFIX)).peekable();
        if keys.peek().is_none() {
            return Ok(None);
        }
        let file = File(metadata.file());
        let key = |name: &str| format!("{PREFIX}{name}");
        if let Some(other) = keys.find(|name| !KEYS.contains(name)) {
            let expected = "no such key in version 1 (a rotation that is left out makes nonsense)";
            return Err(file.error(&shortened(&key(other)), expected, "it"));
        }
        for (name, expected) in
            [("transform", "normalized-sylvester-walsh-hadamard"), ("axis", "input-last-dimension")]
        {
            let found: &str = metadata.require(&key(name))?;
            if found != expected {
                return Err(file.error(&key(name), format!("{expected:?}"), quoted(found)));
            }
        }
        let version: u64 = metadata.require(&key("version"))?;
        if version != 1 {
            return Err(file.error(&key("version"), "1", version.to_string()));
        }
        let block: u64 = metadata.require(&key("block_size"))?;
        if !block.is_power_of_two() || !(2..=MAX_BLOCK).contains(&block) {
            let expected = format!("a power of two from 2 to {MAX_BLOCK}");
            return Err(file.error(&key("block_size"), expected, block.to_string()));
        }
        let block = block as usize;
        let signs = match metadata.require(&key("sign_mode"))? {
            "identity" => None,
            "explicit" => Some(Self::signs(metadata, block)?),
            other => {
                let expected = "\"identity\" or \"explicit\"";
                return Err(file.error(&key("sign_mode"), expected, quoted(other)));
            }
        };
        let names = |name: &str| -> Result<BTreeSet<String>> {
            let list: Option<&Strings> = metadata.get(&key(name))?;
            let mut set = BTreeSet::new();
            for weight in list.into_iter().flat_map(|list| list.iter()) {
                if !set.insert(weight.to_owned()) {
                    let expected = "every name once";
                    return Err(file.error(&key(name), expected, quoted(weight)));
                }
            }
            Ok(set)
        };
        let (weights, inverse) = (names("weight_names")?, names("inverse_weight_names")?);
        if weights.is_empty() {
            return Err(file.error(&key("weight_names"), "the names of rotated weights", "none"));
        }
        Ok(Some(Self { file: metadata.file().to_owned(), block, signs, weights, inverse }))
    }

    /// One vector of ±1 for each width, one after another in `sign_values`.
    fn signs(metadata: &Metadata, block: usize) -> Result<BTreeMap<usize, Arc<Rotation>>> {
        let file = File(metadata.file());
        let (widths, values) = (format!("{PREFIX}sign_widths"), format!("{PREFIX}sign_values"));
        let all_values: Vec<i32> = metadata.require(&values)?;
        let mut rest = all_values.as_slice();
        let mut signs = BTreeMap::new();
        for width in metadata.require::<Vec<usize>>(&widths)? {
            let Some((vector, after)) = rest.split_at_checked(width) else {
                let expected = "as many signs as sign_widths says";
                return Err(file.error(&values, expected, format!("{} signs", all_values.len())));
            };
            rest = after;
            if let Some(sign) = vector.iter().find(|sign| !matches!(sign, -1 | 1)) {
                return Err(file.error(&values, "signs of 1 and -1", sign.to_string()));
            }
            if width == 0 || !width.is_multiple_of(block) {
                let expected = format!("multiples of block_size = {block}");
                return Err(file.error(&widths, expected, width.to_string()));
            }
            let rotation = Rotation { block, signs: vector.iter().map(|&s| s as f32).collect() };
            if signs.insert(width, Arc::new(rotation)).is_some() {
                return Err(file.error(&widths, "every width once", width.to_string()));
            }
        }
        if !rest.is_empty() {
            let expected = "as many signs as sign_widths says";
            return Err(file.error(&values, expected, format!("{} signs", all_values.len())));
        }
        Ok(signs)
    }

    /// Checks that every weight the file lists is one that this model rotates: `linears` and its
    /// tables. A head that is the embedding table is rotated with it.
    ///
    /// # Errors
    /// [`Error::Config`] with the name that the model does not rotate.
    pub(super) fn check_names(
        &self,
        is_linear: impl Fn(&str) -> bool,
        embedding: &str,
        lm_head: Option<&str>,
    ) -> Result<()> {
        let file = File(&self.file);
        let tied = lm_head.is_none();
        for name in &self.weights {
            let known = is_linear(name)
                || lm_head == Some(name)
                || (tied && name == embedding && self.inverse.contains(name));
            if !known {
                let expected = "weights that this architecture rotates";
                return Err(file.error("prism.hadamard.weight_names", expected, quoted(name)));
            }
        }
        match self.inverse.iter().find(|name| *name != embedding) {
            None => Ok(()),
            Some(name) => {
                let key = "prism.hadamard.inverse_weight_names";
                Err(file.error(key, format!("{embedding} alone"), quoted(name)))
            }
        }
    }

    /// How the input of the matrix `info` is rotated.
    ///
    /// # Errors
    /// If there are no signs for its width, or the width is not whole blocks.
    pub(super) fn of_matrix(&self, info: &TensorInfo, k: usize) -> Result<Option<Arc<Rotation>>> {
        if self.weights.contains(&info.name) { self.of_width(info, k).map(Some) } else { Ok(None) }
    }

    /// How the rows of the table `info` are rotated.
    ///
    /// # Errors
    /// As [`Rotations::of_matrix`].
    pub(super) fn of_table(&self, info: &TensorInfo, k: usize) -> Result<Option<Arc<Rotation>>> {
        if self.inverse.contains(&info.name) || self.weights.contains(&info.name) {
            return self.of_width(info, k).map(Some);
        }
        Ok(None)
    }

    fn of_width(&self, info: &TensorInfo, k: usize) -> Result<Arc<Rotation>> {
        let error = |expected: &'static str| Error::TensorValue {
            file: self.file.clone(),
            tensor: info.name.clone(),
            expected,
            found: format!("{k} columns"),
        };
        match &self.signs {
            Some(signs) => {
                signs.get(&k).cloned().ok_or_else(|| error("a width in prism.hadamard.sign_widths"))
            }
            None if k.is_multiple_of(self.block) => {
                Ok(Arc::new(Rotation { block: self.block, signs: vec![1.0; k] }))
            }
            None => Err(error("a multiple of prism.hadamard.block_size")),
        }
    }
}
