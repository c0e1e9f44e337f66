//! Safetensors: one file, or an index with two shards.
//!
//! The input is two lengths of 16 bits, an index of the first, a shard of the second, and another
//! shard; without an index, the rest is `model.safetensors`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna::format::ModelFiles;

fuzz_target!(|data: &[u8]| {
    let Some((lengths, rest)) = data.split_first_chunk::<4>() else {
        return;
    };
    let [a, b, c, d] = *lengths;
    let cut = |bytes: &'static str, len: [u8; 2], rest: &[u8]| {
        let (part, rest) = rest.split_at(usize::from(u16::from_le_bytes(len)).min(rest.len()));
        ((bytes.to_owned(), part.to_vec()), rest.to_vec())
    };
    let (index, rest) = cut("model.safetensors.index.json", [a, b], rest);
    let files = if index.1.is_empty() {
        vec![("model.safetensors".to_owned(), rest)]
    } else {
        let (first, rest) = cut("1.safetensors", [c, d], &rest);
        vec![index, first, ("2.safetensors".to_owned(), rest)]
    };
    // The two bytes of `0,` in JSON are eight of a shape, and the vector may have just doubled.
    let open = || ModelFiles::in_memory("fuzz", files);
    let Some(files) = sterna_fuzz::bounded(data.len(), 16, open) else {
        return;
    };
    for info in files.infos() {
        let len = usize::try_from(info.len_bytes).expect("inside the file");
        assert_eq!(files.slice(info, 0..len).expect("inside the file").len(), len);
    }
});
