//! What a browser tells of its GPU beyond what wgpu passes on.

use super::device::{AdapterDescription, AdapterKind};

/// `GPUAdapterInfo` (<https://www.w3.org/TR/webgpu/#gpuadapterinfo>): any of it may be empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Info {
    pub vendor: String,
    pub architecture: String,
    pub device: String,
    pub description: String,
}

/// PCI numbers of vendors, which have other names in browsers.
const VENDORS: &[(&str, u32)] = &[
    ("amd", 0x1002),
    ("apple", 0x106b),
    ("arm", 0x13b5),
    ("intel", 0x8086),
    ("nvidia", 0x10de),
    ("qualcomm", 0x5143),
];

/// Words of software rasterisers, in small letters.
const SOFTWARE: &[&str] = &["swiftshader", "llvmpipe", "basic render", "warp"];

impl Info {
    /// Adds this to what wgpu says.
    pub fn complete(&self, adapter: &mut AdapterDescription) {
        let all = [&self.vendor, &self.architecture, &self.device, &self.description];
        let words: Vec<&str> =
            all.into_iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
        if words.is_empty() {
            return;
        }
        adapter.name = words.join(" ");
        let vendor = VENDORS.iter().find(|(name, _)| *name == self.vendor);
        adapter.vendor = vendor.map_or(adapter.vendor, |(_, number)| *number);
        let name = adapter.name.to_lowercase();
        if SOFTWARE.iter().any(|word| name.contains(word)) {
            adapter.kind = AdapterKind::Software;
        }
    }
}

/// The browser's own description of the adapter that it gives to whoever asks for none in particular.
#[cfg(target_family = "wasm")]
pub(super) async fn info() -> Option<Info> {
    use js_sys::{Function, Promise, Reflect, global};
    use wasm_bindgen::{JsCast, JsValue};
    use wasm_bindgen_futures::JsFuture;

    let get = |of: &JsValue, name: &str| Reflect::get(of, &name.into()).ok();
    let gpu = get(&get(&global(), "navigator")?, "gpu")?;
    let request: Function = get(&gpu, "requestAdapter")?.dyn_into().ok()?;
    let adapter: Promise = request.call0(&gpu).ok()?.dyn_into().ok()?;
    let info = get(&JsFuture::from(adapter).await.ok()?, "info")?;
    let word = |name| get(&info, name).and_then(|word| word.as_string()).unwrap_or_default();
    Some(Info {
        vendor: word("vendor"),
        architecture: word("architecture"),
        device: word("device"),
        description: word("description"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completed([vendor, architecture, device, description]: [&str; 4]) -> AdapterDescription {
        let mut adapter = AdapterDescription {
            index: 0,
            name: "as wgpu says".to_owned(),
            kind: AdapterKind::Other,
            api: "browser-webgpu".to_owned(),
            driver: String::new(),
            vendor: 0,
            pci: String::new(),
        };
        let [vendor, architecture, device, description] =
            [vendor, architecture, device, description].map(str::to_owned);
        Info { vendor, architecture, device, description }.complete(&mut adapter);
        adapter
    }

    #[test]
    fn what_browsers_say_becomes_a_name_a_vendor_and_a_kind() {
        for (info, name, vendor, kind) in [
            (["", "", "", ""], "as wgpu says", 0, AdapterKind::Other),
            (["apple", "metal-3", "", ""], "apple metal-3", 0x106b, AdapterKind::Other),
            (["nvidia", "ampere", "", ""], "nvidia ampere", 0x10de, AdapterKind::Other),
            (["", "", "", "an unknown GPU"], "an unknown GPU", 0, AdapterKind::Other),
            (
                ["google", "swiftshader", "0xc0de", "SwiftShader"],
                "google swiftshader 0xc0de SwiftShader",
                0,
                AdapterKind::Software,
            ),
            (["", "", "", "llvmpipe (LLVM 15)"], "llvmpipe (LLVM 15)", 0, AdapterKind::Software),
        ] {
            let found = completed(info);
            assert_eq!((found.name.as_str(), found.vendor, found.kind), (name, vendor, kind));
        }
    }
}
