//! GGML's element types: how rows of weights are packed into blocks.
//!
//! A row of K elements is K / block consecutive blocks, and rows follow each other; only the
//! bitnet.cpp type I2_S keeps something (its one scale) after the last row. Sources: `ggml-common.h`
//! of llama.cpp, `ggml-bitnet-mad.cpp` of bitnet.cpp, and PrismML's fork for `PQ2_0`, `PTQ1_0` and
//! the wide `Q2_0`.

mod float;
mod ternary;

pub use float::FloatType;
pub use ternary::{BadCode, I2S_TAIL_BYTES, TernaryType, i2s_scale, i2s_tail};

/// An element type that this version reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// IEEE single.
    F32,
    /// IEEE half.
    F16,
    /// bfloat16.
    Bf16,
    /// 4-bit codes, a scale for 32.
    Q4_0,
    /// 8-bit codes, a scale for 32.
    Q8_0,
    /// 4-bit codes, scale and minimum for 32, themselves quantised for 256.
    Q4K,
    /// 6-bit codes, a scale for 16, itself quantised for 256.
    Q6K,
    /// Ternary, base 3, a scale for 256.
    Tq1_0,
    /// Ternary, 2-bit codes, a scale for 256.
    Tq2_0,
    /// bitnet.cpp: ternary, 2-bit codes, a scale for the tensor.
    I2S,
    /// Binary, a scale for 128.
    Q1_0,
    /// 2-bit codes, a scale for 64: upstream's meaning of type 42.
    Q2_0,
    /// 2-bit codes, a scale for 128: the meaning of type 42 in PrismML's fork, with the blocks of
    /// [`GgmlType::Pq2_0`].
    Q2_0G128,
    /// PrismML: 2-bit codes, a scale for 128.
    Pq2_0,
    /// PrismML: ternary, base 3, a scale for 128.
    Ptq1_0,
}

/// The type number that upstream and PrismML's fork use for different blocks.
pub(super) const CLASHING_Q2_0: u32 = 42;

impl GgmlType {
    /// Every type.
    pub const ALL: [Self; 15] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q8_0,
        Self::Q4K,
        Self::Q6K,
        Self::Tq1_0,
        Self::Tq2_0,
        Self::I2S,
        Self::Q1_0,
        Self::Q2_0,
        Self::Q2_0G128,
        Self::Pq2_0,
        Self::Ptq1_0,
    ];

    /// Number in the file, name, elements a block, bytes a block.
    fn row_of_table(self) -> (u32, &'static str, usize, usize) {
        match self {
            Self::F32 => (0, "F32", 1, 4),
            Self::F16 => (1, "F16", 1, 2),
            Self::Q4_0 => (2, "Q4_0", 32, 18),
            Self::Q8_0 => (8, "Q8_0", 32, 34),
            Self::Q4K => (12, "Q4_K", 256, 144),
            Self::Q6K => (14, "Q6_K", 256, 210),
            Self::Bf16 => (30, "BF16", 1, 2),
            Self::Tq1_0 => (34, "TQ1_0", 256, 54),
            Self::Tq2_0 => (35, "TQ2_0", 256, 66),
            // Rows of whole blocks are what decoding asks for; the size follows from four a byte.
            Self::I2S => (36, "I2_S", 4, 1),
            Self::Q1_0 => (41, "Q1_0", 128, 18),
            Self::Q2_0 => (CLASHING_Q2_0, "Q2_0", 64, 18),
            Self::Q2_0G128 => (CLASHING_Q2_0, "Q2_0_G128", 128, 34),
            Self::Pq2_0 => (142, "PQ2_0", 128, 34),
            Self::Ptq1_0 => (143, "PTQ1_0", 128, 28),
        }
    }

    /// The type of that number; for 42, which has two meanings, upstream's.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.id() == id)
    }

    /// The type of that name, as [`TensorInfo::dtype`](super::TensorInfo) spells it.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.name() == name)
    }

    /// The number in a GGUF file.
    pub fn id(self) -> u32 {
        self.row_of_table().0
    }

    /// As GGML spells it; the wide Q2_0 is `Q2_0_G128`.
    pub fn name(self) -> &'static str {
        self.row_of_table().1
    }

    /// Bytes of a row of `k` elements; `None` if that is no whole number of blocks, or too many.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        let (_, _, elements, bytes) = self.row_of_table();
        if k.is_multiple_of(elements) { (k / elements).checked_mul(bytes) } else { None }
    }

    /// Bytes of a tensor of that row-major shape; `None` if its rows are not whole blocks, or if
    /// they are too many to count.
    pub fn len_bytes(self, shape: &[usize]) -> Option<u64> {
        let (k, outer) = shape.split_last().map_or((1, &[][..]), |(&k, outer)| (k, outer));
        let row = self.row_bytes(k)? as u64;
        let rows = outer.iter().try_fold(row, |len, &n| len.checked_mul(n as u64))?;
        let tail = if self == Self::I2S { I2S_TAIL_BYTES as u64 } else { 0 };
        rows.checked_add(tail)
    }

    /// The rows' decoder if the weights are ternary or binary. I2_S has two layouts, which no file
    /// tells apart; this is the common one, [`TernaryType::I2S`].
    pub fn ternary(self) -> Option<TernaryType> {
        Some(match self {
            Self::Tq1_0 => TernaryType::Tq1_0,
            Self::Tq2_0 => TernaryType::Tq2_0,
            Self::I2S => TernaryType::I2S,
            Self::Q1_0 => TernaryType::Q1_0,
            Self::Q2_0 => TernaryType::Q2_0,
            Self::Q2_0G128 | Self::Pq2_0 => TernaryType::Pq2_0,
            Self::Ptq1_0 => TernaryType::Ptq1_0,
            Self::F32
            | Self::F16
            | Self::Bf16
            | Self::Q4_0
            | Self::Q8_0
            | Self::Q4K
            | Self::Q6K => {
                return None;
            }
        })
    }

    /// The rows' decoder if the weights are floats, quantised or not.
    pub fn float(self) -> Option<FloatType> {
        Some(match self {
            Self::F32 => FloatType::F32,
            Self::F16 => FloatType::F16,
            Self::Bf16 => FloatType::Bf16,
            Self::Q4_0 => FloatType::Q4_0,
            Self::Q8_0 => FloatType::Q8_0,
            Self::Q4K => FloatType::Q4K,
            Self::Q6K => FloatType::Q6K,
            _ => return None,
        })
    }
}

/// What a number outside [`GgmlType`] stands for, as far as it is known: a name for messages.
pub(super) fn other_type(id: u32) -> String {
    let name = match id {
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        37 => "I8_S",
        38 => TL1,
        39 => TL2,
        40 => NVFP4,
        CLASHING_Q2_0 => UNCLEAR_Q2_0,
        134 => "IQ1_BN",
        135 => "IQ2_BN",
        _ => return format!("type {id}"),
    };
    name.to_owned()
}

const TL1: &str = "TL1";
const TL2: &str = "TL2 or MXFP4";
const NVFP4: &str = "NVFP4 or an early Q1_0";
const UNCLEAR_Q2_0: &str = "Q2_0 of unknown group";

/// What would help against a tensor whose type, spelled `dtype`, is no [`GgmlType`].
pub(super) fn remedy(dtype: &str) -> &'static str {
    match dtype {
        TL1 | TL2 => {
            "a lookup-table layout that only its bitnet.cpp build can read; use the I2_S file, or \
             the Hugging Face checkpoint"
        }
        NVFP4 => "the number has two meanings; use a file with Q1_0 as type 41",
        UNCLEAR_Q2_0 => {
            "the bytes fit blocks of 64 and of 128 alike, or neither; use a PQ2_0 or TQ2_0 file"
        }
        _ => {
            "convert the model to one of the types it reads: I2_S, TQ1_0, TQ2_0, Q1_0, Q2_0, \
              PQ2_0 or PTQ1_0 for matrices; F32, F16, BF16, Q8_0, Q6_K, Q4_0 or Q4_K for embeddings"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_lead_back() {
        for ty in GgmlType::ALL {
            assert_eq!(GgmlType::from_name(ty.name()), Some(ty));
            let expected = if ty == GgmlType::Q2_0G128 { GgmlType::Q2_0 } else { ty };
            assert_eq!(GgmlType::from_id(ty.id()), Some(expected));
            assert!(ty.ternary().is_some() != ty.float().is_some());
            // A name for messages is not taken for a type.
            assert_eq!(GgmlType::from_name(&other_type(ty.id())), None);
        }
        assert_eq!(GgmlType::from_id(38), None);
    }

    #[test]
    fn lengths_are_whole_blocks_or_none() {
        assert_eq!(GgmlType::Tq2_0.len_bytes(&[3, 512]), Some(3 * 2 * 66));
        assert_eq!(GgmlType::Tq2_0.len_bytes(&[3, 500]), None);
        assert_eq!(GgmlType::I2S.len_bytes(&[3, 128]), Some(96 + 32));
        assert_eq!(GgmlType::I2S.len_bytes(&[3, 30]), None);
        assert_eq!(GgmlType::F32.len_bytes(&[]), Some(4));
        assert_eq!(GgmlType::Q8_0.len_bytes(&[]), None);
        assert_eq!(GgmlType::F32.len_bytes(&[usize::MAX, 4]), None);
        assert_eq!(GgmlType::F32.len_bytes(&[usize::MAX]), None);
        // Each decoder's blocks have the size of the type's.
        for ty in GgmlType::ALL {
            let k = 512;
            let decoder = match (ty.ternary(), ty.float()) {
                (Some(ternary), _) => ternary.row_bytes(k),
                (_, Some(float)) => float.row_bytes(k),
                (None, None) => None,
            };
            assert_eq!(ty.row_bytes(k), decoder, "{ty:?}");
        }
    }
}
