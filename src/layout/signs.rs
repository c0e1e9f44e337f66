//! The binary layout; `cpu_ref::layout::signs` is its definition.

use cpu_ref::layout::PIECE_WORDS;
use cpu_ref::layout::signs::CHUNK_K;

/// Columns a word covers.
const WORD_K: usize = 32;

/// Bit `b` of word `i` is set where `trits[32·i + b]` is −1.
pub(super) fn pack_piece(trits: &[i8; CHUNK_K]) -> [u32; PIECE_WORDS] {
    let mut piece = [0; PIECE_WORDS];
    for (word, group) in piece.iter_mut().zip(trits.chunks_exact(WORD_K)) {
        for (bit, &trit) in group.iter().enumerate() {
            *word |= u32::from(trit < 0) << bit;
        }
    }
    piece
}

/// The inverse of [`pack_piece`].
pub(super) fn unpack_piece(piece: [u32; PIECE_WORDS]) -> [i8; CHUNK_K] {
    std::array::from_fn(|k| 1 - 2 * (piece[k / WORD_K] >> (k % WORD_K) & 1) as i8)
}
