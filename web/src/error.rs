//! Errors as JavaScript sees them: an `Error` with a `code`.

use js_sys::{Error, Reflect};
use wasm_bindgen::JsValue;

/// The error of a lost device, as `sterna` words it.
const LOST: &str = "the device was lost";

/// An `Error` whose `code` is the name of the library's variant; `DeviceLost` for a GPU that is gone.
pub(crate) fn to_js(error: sterna::Error) -> JsValue {
    let variant = format!("{error:?}");
    let variant = variant.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
    let code = match &error {
        sterna::Error::Gpu { problem, .. } if problem.starts_with(LOST) => "DeviceLost",
        _ => variant,
    };
    with_code(code, &error.to_string())
}

/// An `Error` with a code.
pub(crate) fn with_code(code: &str, message: &str) -> JsValue {
    let error = Error::new(message);
    // An error object takes any property.
    let _ = Reflect::set(&error, &"code".into(), &code.into());
    error.into()
}
