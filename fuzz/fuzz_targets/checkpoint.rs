//! A GGUF file as a model: configuration, shapes, scales and every weight of a layer.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna::Checkpoint;
use sterna::format::ModelFiles;
use sterna::weights::WeightSource;

/// Weights that a run decodes at most.
const MOST_WEIGHTS: usize = 1 << 16;

fuzz_target!(|data: &[u8]| {
    let files = [("model.gguf".to_owned(), data.to_vec())];
    let open = || Checkpoint::new(ModelFiles::in_memory("fuzz", files)?);
    let Some(checkpoint) = sterna_fuzz::bounded(data.len(), 4, open) else {
        return;
    };
    // A file that small may still describe large tables of nothing.
    let config = checkpoint.config();
    let tables = config.vocab_size.saturating_mul(config.hidden_size);
    if tables <= MOST_WEIGHTS {
        let _ = checkpoint.embedding();
        let _ = checkpoint.lm_head();
    }
    let _ = (checkpoint.final_norm(), checkpoint.frequencies(), checkpoint.memory());
    let Ok(layer) = checkpoint.layer(0) else {
        return;
    };
    for (_, matrix) in layer.linears() {
        let (n, k) = (matrix.shape().n(), matrix.shape().k());
        let (mut trits, mut scales) = (vec![0; k], vec![0; matrix.groups()]);
        for row in 0..n.min(MOST_WEIGHTS / k.max(1) + 1) {
            if matrix.row_with_scales(row, &mut trits, &mut scales).is_ok() {
                assert!(trits.iter().all(|trit| (-1..=1).contains(trit)));
            }
        }
    }
});
