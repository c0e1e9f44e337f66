//! `config.json`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use sterna::config::ModelConfig;

fuzz_target!(|data: &[u8]| {
    // Two bytes of JSON are an element of up to 32 bytes, in a vector that may have just doubled.
    sterna_fuzz::bounded(data.len(), 64, || ModelConfig::parse("config.json", data));
});
