//! A session file: header, tokens, blocks, checksum.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use sterna::kv_cache::{KvFormat, KvShape};
use sterna::session::Identity;
use sterna::session::snapshot::{Expected, Reader};

fuzz_target!(|data: &[u8]| {
    // Of every model and format, as far as the header goes.
    let Some(&[format, identity]) = data.first_chunk() else { return };
    let format = [KvFormat::F32, KvFormat::F16, KvFormat::Int8][usize::from(format) % 3];
    let shape = KvShape { layers: 1, heads: 1, dim: 2, format };
    let identity = Identity([identity; 32]);
    let expected = Expected { identity, shape, capacity: 1 << 20, vocab_size: 300 };
    let file = &data[2..];
    // Tokens and a block at a time, once read and once converted.
    sterna_fuzz::bounded(file.len(), 4, || {
        let mut reader = Reader::new(Path::new("fuzz"), file, file.len() as u64, &expected)?;
        reader.tokens()?;
        for _ in 0..reader.header().positions.div_ceil(64) {
            reader.block()?;
        }
        reader.finish()
    });
});
