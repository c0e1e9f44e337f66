//! The integration tests that need no GPU: one binary, one module an area.

mod account;
mod backends;
mod built_in;
mod checkpoint;
#[cfg(feature = "cli")]
mod cli;
#[cfg(feature = "cli")]
mod convert;
// The names of sysfs hold colons, which Windows has no files with.
#[cfg(all(feature = "energy", unix))]
mod energy;
mod format_vectors;
mod formats;
#[path = "../common/formats.rs"]
mod formats_common;
mod generate;
mod ggml;
mod gguf;
#[path = "../common/golden.rs"]
mod golden;
#[cfg(feature = "cli")]
mod hub;
#[cfg(feature = "cli")]
mod hub_server;
#[cfg(feature = "cli")]
mod keep_packed;
mod kv_cache;
#[cfg(feature = "cli")]
mod measure;
mod model;
#[path = "../common/prefill.rs"]
#[allow(dead_code, reason = "what a GPU may be off by is for other tests")]
mod prefill;
mod readers;
mod refusals;
mod session;
mod shaders;
mod simd;
mod speculate;
mod util;
