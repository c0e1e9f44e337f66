//! The 2-bit code layout; `cpu_ref::layout::i2` is its definition.

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS};

/// Bytes of a piece; also the distance in k between two fields of a byte.
const PIECE_BYTES: usize = 16;

/// Bits `2j+1..2j` of byte `b` become `trits[16·j + b] + 1`.
pub(super) fn pack_piece(trits: &[i8; CHUNK_K]) -> [u32; PIECE_WORDS] {
    let mut bytes = [0u8; PIECE_BYTES];
    for (b, byte) in bytes.iter_mut().enumerate() {
        let code = |field: usize| (trits[PIECE_BYTES * field + b] + 1) as u8;
        *byte = code(0) | code(1) << 2 | code(2) << 4 | code(3) << 6;
    }
    let word = |i: usize| u32::from_le_bytes(std::array::from_fn(|b| bytes[4 * i + b]));
    std::array::from_fn(word)
}

/// The inverse of [`pack_piece`].
pub(super) fn unpack_piece(piece: [u32; PIECE_WORDS]) -> [i8; CHUNK_K] {
    let mut trits = [0; CHUNK_K];
    for (i, word) in piece.iter().enumerate() {
        for (b, byte) in word.to_le_bytes().into_iter().enumerate() {
            for field in 0..4 {
                trits[PIECE_BYTES * field + 4 * i + b] = (byte >> (2 * field) & 3) as i8 - 1;
            }
        }
    }
    trits
}
