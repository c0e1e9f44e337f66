//! Kernel sources: embedded WGSL, `#import` of shared snippets, and reflection with naga.

use std::fmt::Write as _;

/// One WGSL kernel of `shaders/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// File name without `.wgsl`.
    pub name: &'static str,
    source: &'static str,
}

macro_rules! kernels {
    ($($constant:ident = $name:literal,)*) => {
        $(#[doc = concat!("`shaders/", $name, ".wgsl`.")]
        pub const $constant: Kernel = Kernel {
            name: $name,
            source: include_str!(concat!("../../../shaders/", $name, ".wgsl")),
        };)*
        /// Every kernel, in the order of the index in `shaders/README.md`.
        pub const KERNELS: &[Kernel] = &[$($constant),*];
    };
}

kernels! {
    EMBEDDING = "embedding",
    GROUP_EMBEDDING = "group_embedding",
    RMSNORM = "rmsnorm",
    HADAMARD = "hadamard",
    QUANTIZE_ABSMAX = "quantize_absmax",
    QUANTIZE_ABSMAX_GROUPS = "quantize_absmax_groups",
    GEMV_PLANES = "gemv_planes",
    GEMV_I2 = "gemv_i2",
    GEMV_I2_SIGNED = "gemv_i2_signed",
    GEMV_I2_HALF = "gemv_i2_half",
    GEMM_PLANES = "gemm_planes",
    GEMM_I2 = "gemm_i2",
    GEMM_PLANES_FEW = "gemm_planes_few",
    GEMM_I2_FEW = "gemm_i2_few",
    GEMM_I2_COOP8 = "gemm_i2_coop8",
    GEMM_I2_COOP16 = "gemm_i2_coop16",
    GROUP_GEMV = "group_gemv",
    GROUP_GEMV_INT8 = "group_gemv_int8",
    FUSED_QKV = "fused_qkv",
    FUSED_GATED = "fused_gated",
    FUSED_RESIDUAL = "fused_residual",
    HEAD_NORM = "head_norm",
    ROPE = "rope",
    KV_STORE = "kv_store",
    ATTENTION = "attention",
    ATTENTION_TILE = "attention_tile",
    ATTENTION_BLOCKS = "attention_blocks",
    ATTENTION_MERGE = "attention_merge",
    GATED_ACTIVATION = "gated_activation",
    RESIDUAL_ADD = "residual_add",
    LM_HEAD = "lm_head",
    HEAD_INPUT = "head_input",
    HEAD_INT8 = "head_int8",
    HEAD_RERANK = "head_rerank",
    HEAD_PICK = "head_pick",
    ARGMAX = "argmax",
    SAMPLE_BLOCKS = "sample_blocks",
    SAMPLE_WEIGHTS = "sample_weights",
    SAMPLE = "sample",
}

/// The kernels that run without bounds checks, bounds on loops and zeroed workgroup memory. Each
/// writes workgroup memory before it reads it, leaves every loop, divides by no zero, and touches no
/// word of a binding past what its typed function in `kernels.rs` says, whatever its uniform and its
/// inputs hold; `Gpu::op` compares that with the buffers.
pub const UNCHECKED: &[Kernel] = &[
    GEMV_PLANES,
    GEMV_I2,
    GEMV_I2_SIGNED,
    GEMV_I2_HALF,
    GEMM_PLANES,
    GEMM_I2,
    GEMM_PLANES_FEW,
    GEMM_I2_FEW,
    GEMM_I2_COOP8,
    GEMM_I2_COOP16,
    FUSED_QKV,
    FUSED_GATED,
    FUSED_RESIDUAL,
    ATTENTION,
    ATTENTION_TILE,
    ATTENTION_BLOCKS,
    ATTENTION_MERGE,
];

/// The kernels that need cooperative matrices: see [`Cooperative`](super::Cooperative). No other needs
/// an optional feature.
pub const COOPERATIVE: &[Kernel] = &[GEMM_I2_COOP8, GEMM_I2_COOP16];

/// The snippets of `shaders/shared/`.
const SNIPPETS: &[(&str, &str)] = &[
    ("attend", include_str!("../../../shaders/shared/attend.wgsl")),
    ("attend_block", include_str!("../../../shaders/shared/attend_block.wgsl")),
    ("best", include_str!("../../../shaders/shared/best.wgsl")),
    ("bitlinear", include_str!("../../../shaders/shared/bitlinear.wgsl")),
    ("codes", include_str!("../../../shaders/shared/codes.wgsl")),
    ("dense", include_str!("../../../shaders/shared/dense.wgsl")),
    ("dense_dot", include_str!("../../../shaders/shared/dense_dot.wgsl")),
    ("fused_gemv", include_str!("../../../shaders/shared/fused_gemv.wgsl")),
    ("exp", include_str!("../../../shaders/shared/exp.wgsl")),
    ("levels", include_str!("../../../shaders/shared/levels.wgsl")),
    ("mass", include_str!("../../../shaders/shared/mass.wgsl")),
    ("gemm_coop", include_str!("../../../shaders/shared/gemm_coop.wgsl")),
    ("gemm_few", include_str!("../../../shaders/shared/gemm_few.wgsl")),
    ("gemm_tile", include_str!("../../../shaders/shared/gemm_tile.wgsl")),
    ("gemv_shape", include_str!("../../../shaders/shared/gemv_shape.wgsl")),
    ("half_bits", include_str!("../../../shaders/shared/half_bits.wgsl")),
    ("half_pairs", include_str!("../../../shaders/shared/half_pairs.wgsl")),
    ("half_sum", include_str!("../../../shaders/shared/half_sum.wgsl")),
    ("i2_sum", include_str!("../../../shaders/shared/i2_sum.wgsl")),
    ("kv_layout", include_str!("../../../shaders/shared/kv_layout.wgsl")),
    ("planes_sum", include_str!("../../../shaders/shared/planes_sum.wgsl")),
    ("ordered", include_str!("../../../shaders/shared/ordered.wgsl")),
    ("pass", include_str!("../../../shaders/shared/pass.wgsl")),
    ("penalty", include_str!("../../../shaders/shared/penalty.wgsl")),
    ("reduce_tree", include_str!("../../../shaders/shared/reduce_tree.wgsl")),
    ("rms", include_str!("../../../shaders/shared/rms.wgsl")),
    ("signed_sum", include_str!("../../../shaders/shared/signed_sum.wgsl")),
];

impl Kernel {
    /// The complete WGSL: every `#import NAME` line replaced by that snippet.
    ///
    /// # Panics
    /// If a kernel imports a snippet that does not exist; the shader tests load every kernel.
    pub fn wgsl(self) -> String {
        let mut text = String::with_capacity(self.source.len() * 2);
        for line in self.source.lines() {
            let Some(name) = line.strip_prefix("#import ") else {
                writeln!(text, "{line}").expect("a String takes every write");
                continue;
            };
            let snippet = SNIPPETS.iter().find(|(snippet, _)| *snippet == name);
            let (_, snippet) = snippet.expect("every import names a file of shaders/shared");
            text.push_str(snippet);
        }
        text
    }

    /// The kernel as naga parses it.
    ///
    /// # Panics
    /// If the embedded source is not WGSL; the shader tests parse every kernel.
    pub fn module(self) -> naga::Module {
        naga::front::wgsl::parse_str(&self.wgsl()).expect("the embedded kernels are valid WGSL")
    }

    /// The bindings of group 0, by binding number: reflected from the shader, so that the host
    /// cannot disagree with it.
    pub fn bindings(self) -> Vec<Binding> {
        let module = self.module();
        let mut bindings: Vec<_> = module
            .global_variables
            .iter()
            .filter_map(|(_, variable)| {
                let access = match variable.space {
                    naga::AddressSpace::Uniform => Access::Uniform,
                    naga::AddressSpace::Storage { access }
                        if access.contains(naga::StorageAccess::STORE) =>
                    {
                        Access::Write
                    }
                    naga::AddressSpace::Storage { .. } => Access::Read,
                    _ => return None,
                };
                let number = variable.binding.as_ref()?.binding;
                let name = variable.name.clone().unwrap_or_default();
                Some(Binding { number, name, access })
            })
            .collect();
        bindings.sort_by_key(|binding| binding.number);
        bindings
    }
}

/// One binding of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// `@binding(N)`.
    pub number: u32,
    /// The variable's name.
    pub name: String,
    /// How the kernel uses the buffer.
    pub access: Access,
}

/// How a kernel uses a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// `var<uniform>`.
    Uniform,
    /// `var<storage, read>`.
    Read,
    /// `var<storage, read_write>`; the kernels only write it.
    Write,
}
