//! A GGUF file: header, tensors, and the rows of every type.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna::format::gguf::{Array, Value};
use sterna::format::{ModelFiles, TensorInfo};

fuzz_target!(|data: &[u8]| {
    let bytes = data.to_vec();
    // Once for the file itself, which is copied; twice for what its header describes.
    let open = || ModelFiles::in_memory("fuzz", [("model.gguf".to_owned(), bytes)]);
    let Some(files) = sterna_fuzz::bounded(data.len(), 3, open) else {
        return;
    };
    for (key, value) in files.metadata().expect("of a GGUF file").iter() {
        check_value(key, value);
    }
    for info in files.infos() {
        decode(&files, info);
    }
});

fn check_value(key: &str, value: &Value) {
    if let Value::Array(Array::String(strings)) = value {
        assert_eq!(strings.iter().count(), strings.len(), "{key}");
        assert!(strings.get(strings.len()).is_none());
    }
}

/// The last row of a tensor, whose bytes all have to be there.
fn decode(files: &ModelFiles, info: &TensorInfo) {
    let len = usize::try_from(info.len_bytes).expect("inside the file");
    let bytes = files.slice(info, 0..len).expect("inside the file");
    let Ok(ty) = files.ggml_type(info) else {
        return;
    };
    let k = info.shape.last().copied().unwrap_or(1);
    let rows: usize = info.shape.iter().rev().skip(1).product();
    let row = |row_bytes: usize| &bytes[(rows - 1) * row_bytes..][..row_bytes];
    if let Some(float) = ty.float() {
        let row = row(float.row_bytes(k).expect("whole blocks"));
        float.decode_row(row, &mut vec![0.0; k]);
        if let Some(group) = float.group() {
            let (mut scale, mut min) = (vec![0.0; k / group], vec![0.0; k / group]);
            float.decode_codes(row, &mut vec![0; k], &mut scale, &mut min);
        }
    }
    // I2_S has whole bytes in the file, but perhaps not whole blocks.
    if let Some(ternary) = ty.ternary()
        && let Some(row_bytes) = ternary.row_bytes(k)
    {
        let (mut trits, mut scales) = (vec![0; k], vec![0; ternary.row_scales(k)]);
        if ternary.decode_row(row(row_bytes), &mut trits, &mut scales).is_ok() {
            assert!(trits.iter().all(|trit| (-1..=1).contains(trit)));
            // Encoding gives the trits back, if not every byte.
            let mut encoded = vec![0; row_bytes];
            ternary.encode_row(&trits, &scales, &mut encoded);
            let mut again = vec![0; k];
            ternary.decode_row(&encoded, &mut again, &mut scales).expect("just encoded");
            assert_eq!(trits, again);
        }
    }
}
