//! Products with matrices of five trits a byte (`cpu_ref::layout::base3`).
//!
//! Some chunks of a tile are unpacked into the layout I2, in a block that stays in the first-level
//! cache, and the level's own kernel multiplies those; for many tokens the unpacking hardly counts. A
//! level with a fast way to look bytes up multiplies few tokens without it.

use cpu_ref::layout::base3::{GROUP_CHUNKS, GROUP_PIECES, pieces};
use cpu_ref::layout::{PIECE_WORDS, TILE_ROWS};

use super::{Activations, CHUNK_WORDS, TOKENS_STEP};

/// 512 bytes: a chunk of I2, or a piece.
pub(super) type Chunk = [u32; CHUNK_WORDS];

/// Groups of chunks that are unpacked at a time: 20 KiB of I2.
const BLOCK_GROUPS: usize = 8;

/// `acc[tiles][M][32]` for whole tiles. `few` multiplies a tile with at most so many tokens; `unpack` overwrites chunks with what pieces say; `gemm_tile` multiplies a tile of I2.
#[inline(always)]
pub(super) fn gemm(
    words: &[u32],
    x: Activations<'_>,
    acc: &mut [i32],
    (most, few): (usize, impl Fn(&[Chunk], Activations<'_>, &mut [[i32; TILE_ROWS]])),
    unpack: impl Fn(&[Chunk], &mut [Chunk]),
    gemm_tile: impl Fn(&[Chunk], Activations<'_>, &mut [[i32; TILE_ROWS]]),
) {
    let tile_acc = x.n_tokens() * TILE_ROWS;
    let tiles = words.as_chunks::<CHUNK_WORDS>().0.chunks_exact(pieces(x.chunks).max(1));
    let tiles = tiles.zip(acc.chunks_exact_mut(tile_acc));
    if x.n_tokens() <= most {
        tiles.for_each(|(tile, acc)| few(tile, x, acc.as_chunks_mut().0));
        return;
    }
    let mut block = [[0; CHUNK_WORDS]; BLOCK_GROUPS * GROUP_CHUNKS];
    for (tile, acc) in tiles {
        let acc = acc.as_chunks_mut::<TILE_ROWS>().0;
        // Each product with a block has taken off the sum of all of a token's codes.
        let blocks = tile.chunks(BLOCK_GROUPS * GROUP_PIECES);
        for (m, acc) in acc.iter_mut().enumerate() {
            acc.fill(x.code_sum(m) * (blocks.len() as i32 - 1));
        }
        for (b, pieces) in blocks.enumerate() {
            let first = b * BLOCK_GROUPS * GROUP_CHUNKS;
            let n_chunks = (x.chunks - first).min(BLOCK_GROUPS * GROUP_CHUNKS);
            let chunks = &mut block[..n_chunks];
            unpack(pieces, chunks);
            for (t, acc) in acc.chunks_mut(TOKENS_STEP).enumerate() {
                let x = x.tokens(t * TOKENS_STEP, acc.len()).columns(first, n_chunks);
                let mut sums = [[0; TILE_ROWS]; TOKENS_STEP];
                let sums = &mut sums[..acc.len()];
                gemm_tile(chunks, x, sums);
                for (acc, sum) in acc.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
                    *acc += sum;
                }
            }
        }
    }
}

/// Unpacks pieces into chunks of I2, as the definition has it; compiled for each level's registers.
#[inline(always)]
pub(super) fn unpack_base3(pieces: &[Chunk], chunks: &mut [Chunk]) {
    for (pieces, chunks) in pieces.chunks(GROUP_PIECES).zip(chunks.chunks_mut(GROUP_CHUNKS)) {
        let (chunks, fifth) = chunks.split_at_mut(pieces.len());
        let mut last = [0u8; 4 * CHUNK_WORDS];
        for (p, (piece, chunk)) in pieces.iter().zip(chunks).enumerate() {
            let mut four = [0u8; 4 * CHUNK_WORDS];
            let bytes: &[u8; 4 * CHUNK_WORDS] = bytemuck::cast_ref(piece);
            for ((&byte, four), last) in bytes.iter().zip(&mut four).zip(&mut last) {
                let (digits, digit) = digits(byte);
                *four = digits;
                *last |= digit << (2 * p);
            }
            transpose(&four, chunk);
        }
        for fifth in fifth {
            transpose(&last, fifth);
        }
    }
}

/// Words by row, from rows by word.
#[inline(always)]
fn transpose(bytes: &[u8; 4 * CHUNK_WORDS], chunk: &mut Chunk) {
    let bytes: &[[u8; 4]] = bytes.as_chunks().0;
    for (row, piece) in chunk.as_chunks_mut::<PIECE_WORDS>().0.iter_mut().enumerate() {
        for (word, out) in piece.iter_mut().enumerate() {
            *out = u32::from_ne_bytes(bytes[word * TILE_ROWS + row]);
        }
    }
}

/// `cpu_ref::layout::base3::digits` without a table or a branch, which vectorises: the first four as a
/// byte of I2, and the last. Thirds are products with 43/128 and 86/256, exact for numbers so small.
#[inline(always)]
fn digits(byte: u8) -> (u8, u8) {
    let (t, i) = (u16::from(byte >> 6), u16::from(byte & 63));
    let c = u16::from(i >= 21) + u16::from(i >= 42);
    let o = i - 21 * c;
    let third = (o * 43) >> 7;
    let is_escape = t == 3;
    let r = if is_escape { 21 + u16::from(c == 2) + third } else { o };
    let last = if is_escape { o - 3 * third } else { t };
    let (third, ninth) = ((r * 86) >> 8, (r * 57) >> 9);
    let four = (r - 3 * third) | (third - 3 * ninth) << 2 | ninth << 4 | c << 6;
    (four as u8, last as u8)
}

/// No tokens are few where there is no kernel of its own.
pub(super) const FEW_BASE3: usize = 0;

/// See [`FEW_BASE3`].
pub(super) fn few_base3(_: &[Chunk], _: Activations<'_>, _: &mut [[i32; TILE_ROWS]]) {
    unreachable!("there is a token")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_definition() {
        for byte in 0..=255 {
            if let Some([a, b, c, d, last]) = cpu_ref::layout::base3::digits(byte) {
                assert_eq!(digits(byte), (a | b << 2 | c << 4 | d << 6, last), "{byte}");
            }
        }
    }
}
