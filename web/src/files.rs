//! The files of a model, as JavaScript hands them over, and checksums of them.

use std::io;
use std::sync::Arc;

use js_sys::Error;
use send_wrapper::SendWrapper;
use sha2::Digest;
use sterna::format::ReadAt;
use wasm_bindgen::prelude::*;

#[wasm_bindgen]
extern "C" {
    /// A file that JavaScript reads: one in the browser's storage, one of the user's, or a URL.
    pub type Reader;

    /// Length in bytes.
    #[wasm_bindgen(method, getter)]
    fn size(this: &Reader) -> f64;

    /// Fills the buffer with the bytes from `offset` on, or throws.
    #[wasm_bindgen(method, catch)]
    fn read(this: &Reader, offset: f64, buffer: &mut [u8]) -> Result<(), JsValue>;
}

/// A [`Reader`] where the library asks for what may be shared: it stays on the thread it came to.
struct Shared(SendWrapper<Reader>);

impl ReadAt for Shared {
    fn len_bytes(&self) -> io::Result<u64> {
        let size = self.0.size();
        // Numbers of JavaScript count exactly as far as this.
        const MAX: f64 = 9_007_199_254_740_991.0;
        match size >= 0.0 && size <= MAX && size.fract() == 0.0 {
            true => Ok(size as u64),
            false => Err(io::Error::other(format!("expected a length in bytes, found {size}"))),
        }
    }

    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read(offset as f64, buffer).map_err(|error| {
            let message = error.dyn_ref::<Error>().map(|error| String::from(error.message()));
            io::Error::other(message.unwrap_or_else(|| format!("{error:?}")))
        })
    }
}

/// Files by name.
#[wasm_bindgen]
#[derive(Default)]
pub struct Files {
    pub(crate) files: Vec<(String, Arc<dyn ReadAt>)>,
}

#[wasm_bindgen]
impl Files {
    /// None yet.
    #[wasm_bindgen(constructor)]
    pub fn new() -> Self {
        Self::default()
    }

    /// A file with `size` and `read(offset, buffer)`, which is read while the model is loaded.
    pub fn add(&mut self, name: String, reader: Reader) {
        self.files.push((name, Arc::new(Shared(SendWrapper::new(reader)))));
    }
}

/// SHA-256 of what comes piece by piece; the browser's own takes all at once.
#[wasm_bindgen]
#[derive(Default)]
pub struct Sha256 {
    hasher: sha2::Sha256,
}

#[wasm_bindgen]
impl Sha256 {
    /// Of nothing yet.
    #[wasm_bindgen(constructor)]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
    }

    /// The digest in hexadecimal; it begins anew.
    pub fn hex(&mut self) -> String {
        let digest = self.hasher.finalize_reset();
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
