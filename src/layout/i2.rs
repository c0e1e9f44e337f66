//! The 2-bit code layout; `cpu_ref::layout::i2` is its definition.

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, piece_index};

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

/// `Σ_k (w[n,k] + 1)` of each row of a packed matrix, padding rows and columns included: what the
/// packed-dot GEMV has to take off for each unit of bias on the activations.
pub fn code_sums(words: &[u32], chunks: usize) -> Vec<i32> {
    let rows = words.len() / (chunks * PIECE_WORDS);
    // A code is 2·high + low.
    let sum = |word: u32| 2 * (word & 0xaaaa_aaaa).count_ones() + (word & 0x5555_5555).count_ones();
    (0..rows)
        .map(|n| {
            let pieces = (0..chunks).map(|chunk| piece_index(chunks, n, chunk));
            let words = pieces.flat_map(|piece| &words[piece..piece + PIECE_WORDS]);
            words.map(|&word| sum(word)).sum::<u32>() as i32
        })
        .collect()
}
