//! The plan that is likely to be fastest on an adapter that was not measured.

use super::super::device::{AdapterDescription, AdapterKind};
use super::super::kernels::{GemmPlan, GemvPlan, Variant};
use super::GemmPlans;

/// A class of adapters and its plan; the first that matches decides.
struct Class {
    matches: fn(&AdapterDescription) -> bool,
    variant: Variant,
    /// Whether a dispatch costs more than that every workgroup quantises the token for itself.
    fused: bool,
}

const AMD: u32 = 0x1002;
const APPLE: u32 = 0x106b;
const INTEL: u32 = 0x8086;

const CLASSES: &[Class] = &[
    // LLVM takes a packed dot apart, one lane after another. A few cores quantise for hundreds of
    // workgroups one after another: a fused step of BitNet b1.58 2B4T takes llvmpipe 2 to 3 times as
    // long as a split one.
    Class {
        matches: |adapter| adapter.kind == AdapterKind::Software,
        variant: Variant::BitSerial,
        fused: false,
    },
    // Apple's GPUs have no packed dot (MSL multiplies four chars one by one), and a popcount takes them
    // four cycles; f32 products are what they are made for.
    Class {
        matches: |adapter| adapter.api == "metal" || adapter.vendor == APPLE,
        variant: Variant::HalfMagic,
        fused: true,
    },
    // GCN and the first RDNA have no v_dot4.
    Class {
        matches: |adapter| adapter.vendor == AMD && is_one_of(adapter, AMD_WITHOUT_DOT),
        variant: Variant::BitSerial,
        fused: true,
    },
    // Intel's dp4a came with Xe.
    Class {
        matches: |adapter| adapter.vendor == INTEL && is_one_of(adapter, INTEL_WITHOUT_DOT),
        variant: Variant::BitSerial,
        fused: true,
    },
    // NVIDIA since Pascal, AMD since RDNA 2, Intel since Xe, Mali since Valhall, recent Adrenos.
    Class { matches: |_| true, variant: Variant::PackedDot, fused: true },
];

/// Parts of names, as Mesa, as the vendor's drivers and as browsers write them.
#[rustfmt::skip]
const AMD_WITHOUT_DOT: &[&str] = &[
    "TAHITI", "PITCAIRN", "VERDE", "OLAND", "HAINAN", "BONAIRE", "HAWAII", "KAVERI", "KABINI",
    "TONGA", "ICELAND", "CARRIZO", "FIJI", "STONEY", "POLARIS", "VEGA10", "RAVEN", "RENOIR",
    "NAVI10", "R7 ", "R9 ", "RX 4", "RX 550 ", "RX 560", "RX 570", "RX 580", "RX 590", "RX 5600",
    "RX 5700", "Vega 3", "Vega 6", "Vega 8", "Vega 1", "RX Vega", "amd gcn-", "amd rdna-1",
];
#[rustfmt::skip]
const INTEL_WITHOUT_DOT: &[&str] = &[
    "HD Graphics 4", "HD Graphics 5", "HD Graphics 6", "HD Graphics P", "Iris(R) Plus",
    "Iris Plus", "Iris(R) Pro", "Iris Pro", "(ICL", "(SKL", "(KBL", "(CFL", "(CML", "(BDW", "(GLK",
    "(BXT", "(JSL", "(EHL", "intel gen-7", "intel gen-8", "intel gen-9", "intel gen-11",
];

fn is_one_of(adapter: &AdapterDescription, names: &[&str]) -> bool {
    names.iter().any(|name| adapter.name.contains(name))
}

/// The plan that is likely to be fastest, for a step that has a fused kernel.
pub(super) fn plan(adapter: &AdapterDescription) -> GemvPlan {
    let class = CLASSES.iter().find(|class| (class.matches)(adapter));
    let Class { variant, fused, .. } = class.expect("the last class takes every adapter");
    GemvPlan { fused: *fused, ..GemvPlan::from(*variant) }
}

/// The tiles that are likely to be fastest. Cooperative matrices have to win a race first: some are no
/// faster, and wgpu calls them experimental.
pub(super) fn gemms(adapter: &AdapterDescription) -> GemmPlans {
    let plan = match adapter.kind {
        // It takes seconds to compile a tile.
        AdapterKind::Software if adapter.name.to_lowercase().contains("swiftshader") => {
            GemmPlan::FEW
        }
        // The fewer workgroups the fewer loads; a few cores need no more of them.
        AdapterKind::Software => GemmPlan::tile(128, 64),
        _ => GemmPlan::default(),
    };
    GemmPlans { planes: plan, i2: plan }
}

/// Every variant, the likely fastest first.
pub(super) fn order(adapter: &AdapterDescription) -> Vec<Variant> {
    let first = plan(adapter).variant;
    [first].into_iter().chain(Variant::ALL.into_iter().filter(|&other| other != first)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_vendor_and_name() {
        use Variant::{BitSerial, HalfMagic, PackedDot};
        for (name, vendor, api, variant) in [
            ("NVIDIA GeForce RTX 4090", 0x10de, "vulkan", PackedDot),
            ("NVIDIA H200", 0x10de, "vulkan", PackedDot),
            ("AMD Radeon RX 7900 XTX (RADV NAVI31)", AMD, "vulkan", PackedDot),
            ("AMD Radeon Graphics (RADV PHOENIX)", AMD, "vulkan", PackedDot),
            ("AMD Radeon RX 5500 XT (RADV NAVI14)", AMD, "vulkan", PackedDot),
            ("AMD Radeon RX 5700 XT (RADV NAVI10)", AMD, "vulkan", BitSerial),
            ("AMD Radeon RX 580 Series (RADV POLARIS10)", AMD, "vulkan", BitSerial),
            ("AMD Radeon(TM) Vega 8 Graphics", AMD, "vulkan", BitSerial),
            ("AMD Radeon VII (RADV VEGA20)", AMD, "vulkan", PackedDot),
            ("Radeon RX 580 Series", AMD, "dx12", BitSerial),
            ("Intel(R) Iris(R) Xe Graphics (TGL GT2)", INTEL, "vulkan", PackedDot),
            ("Intel(R) Arc(TM) A770 Graphics (DG2)", INTEL, "vulkan", PackedDot),
            ("Intel(R) UHD Graphics 770 (ADL-S GT1)", INTEL, "vulkan", PackedDot),
            ("Intel(R) UHD Graphics 630 (CFL GT2)", INTEL, "vulkan", BitSerial),
            ("Intel(R) HD Graphics 520", INTEL, "dx12", BitSerial),
            ("Apple M4 Pro", 0, "metal", HalfMagic),
            ("apple metal-3", APPLE, "browser-webgpu", HalfMagic),
            ("amd gcn-5", AMD, "browser-webgpu", BitSerial),
            ("amd rdna-3", AMD, "browser-webgpu", PackedDot),
            ("intel gen-9", INTEL, "browser-webgpu", BitSerial),
            ("intel gen-12lp", INTEL, "browser-webgpu", PackedDot),
            ("something new", 0x4711, "vulkan", PackedDot),
        ] {
            let adapter = AdapterDescription {
                index: 0,
                name: name.to_owned(),
                kind: AdapterKind::Other,
                api: api.to_owned(),
                driver: String::new(),
                vendor,
                pci: String::new(),
            };
            assert_eq!(plan(&adapter), GemvPlan::from(variant), "{name}");
            let software = AdapterDescription { kind: AdapterKind::Software, ..adapter };
            assert_eq!(plan(&software), GemvPlan { fused: false, ..GemvPlan::from(BitSerial) });
            assert_eq!(order(&software).len(), Variant::ALL.len());
        }
    }
}
