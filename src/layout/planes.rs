//! The bit-plane layout; `cpu_ref::layout::planes` is its definition.

use cpu_ref::layout::{CHUNK_K, PIECE_WORDS, piece_index};

/// Columns a plane word covers.
const WORD_K: usize = 32;

/// Words 0 and 1: non-zero bits of both halves; words 2 and 3: sign bits.
pub(super) fn pack_piece(trits: &[i8; CHUNK_K]) -> [u32; PIECE_WORDS] {
    let mut piece = [0; PIECE_WORDS];
    for (half, group) in trits.chunks_exact(WORD_K).enumerate() {
        for (bit, &trit) in group.iter().enumerate() {
            piece[half] |= u32::from(trit != 0) << bit;
            piece[2 + half] |= u32::from(trit < 0) << bit;
        }
    }
    piece
}

/// The inverse of [`pack_piece`].
pub(super) fn unpack_piece(piece: [u32; PIECE_WORDS]) -> [i8; CHUNK_K] {
    std::array::from_fn(|k| {
        let (half, bit) = (k / WORD_K, k % WORD_K);
        let nonzero = (piece[half] >> bit & 1) as i8;
        let negative = (piece[2 + half] >> bit & 1) as i8;
        nonzero - 2 * negative
    })
}

/// Number of −1 weights in each row of a packed matrix, padding rows included: the constant that
/// the bit-serial GEMV adds (`−x = ¬x + 1`).
pub fn negatives(words: &[u32], chunks: usize) -> Vec<i32> {
    let rows = words.len() / (chunks * PIECE_WORDS);
    (0..rows)
        .map(|n| {
            let signs = (0..chunks).flat_map(|chunk| {
                let piece = piece_index(chunks, n, chunk);
                words[piece + 2..piece + PIECE_WORDS].iter()
            });
            signs.map(|word| word.count_ones()).sum::<u32>() as i32
        })
        .collect()
}
