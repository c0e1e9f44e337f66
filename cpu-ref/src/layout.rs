//! The packed layouts, each defined by a slow `get(words, n, k)`.
//!
//! `i2` and `planes` store a ternary matrix `[N,K]` in tiles of 32 rows × 64 columns. A tile row's
//! share of a chunk is one *piece* of 16 bytes (four little-endian u32 words):
//!
//! ```text
//! words[tile = n/32][chunk = k/64][row = n%32][4]
//! ```
//!
//! so that 32 GPU lanes, one per row, read 512 contiguous bytes, and a 128-bit SIMD register holds
//! one row's piece. N is padded to a multiple of 32 and K to a multiple of 64 with weight 0.
//! Storage is 2 bits a weight in either layout. `base3` takes 1.6, with the words of a tile in another
//! order. `signs` stores a binary matrix {−1, +1} in the same
//! way at 1 bit a weight: its chunks are 128 columns. Scales of groups of inputs lie apart, in
//! `group_scales`. `int8_rows` has the same tiles of int8 codes, each with what belongs to its rows, and
//! `split_rows` the same codes in six bits and two.

/// Rows of a tile.
pub const TILE_ROWS: usize = 32;
/// Columns (k) of a chunk.
pub const CHUNK_K: usize = 64;
/// u32 words of a piece: one row's share of a chunk.
pub const PIECE_WORDS: usize = 4;

/// Chunks along K: `ceil(K/64)`.
pub fn k_chunks(k: usize) -> usize {
    k.div_ceil(CHUNK_K)
}

/// Words of a packed `[N,K]` matrix.
pub fn len_words(n: usize, k: usize) -> usize {
    n.div_ceil(TILE_ROWS) * k_chunks(k) * TILE_ROWS * PIECE_WORDS
}

/// Index of the first word of the piece that holds row `n`, chunk `chunk`.
pub fn piece_index(chunks: usize, n: usize, chunk: usize) -> usize {
    ((n / TILE_ROWS * chunks + chunk) * TILE_ROWS + n % TILE_ROWS) * PIECE_WORDS
}

/// The 2-bit code layout: bits `2j+1..2j` of byte `b` of a piece hold `w + 1` of
/// `k = 64·chunk + 16·j + b`; code 3 never occurs.
pub mod i2 {
    use super::{CHUNK_K, piece_index};

    /// Weight `w[n,k]` of a matrix with `chunks = k_chunks(K)`; `None` for the code 3.
    pub fn get(words: &[u32], chunks: usize, n: usize, k: usize) -> Option<i8> {
        let (chunk, within) = (k / CHUNK_K, k % CHUNK_K);
        let (field, byte) = (within / 16, within % 16);
        let word = words[piece_index(chunks, n, chunk) + byte / 4];
        let code = word >> (8 * (byte % 4) + 2 * field) & 3;
        [Some(-1), Some(0), Some(1), None][code as usize]
    }
}

/// The layout by columns, for inputs most of which are 0: stripes of 256 rows, and of each stripe a
/// cache line a column,
///
/// ```text
/// words[stripe = n/256][k][16]
/// ```
///
/// Bits `2f+1..2f` of byte `16·l + 4·r + e` of a line hold `w + 1` of row
/// `256·stripe + 64·r + 16·f + 4·l + e`. N is padded to whole stripes with rows of 0.
pub mod columns {
    /// Rows of a stripe.
    pub const STRIPE_ROWS: usize = 256;
    /// u32 words of a stripe's share of a column.
    pub const LINE_WORDS: usize = 16;

    /// Words of a packed `[N,K]` matrix.
    pub fn len_words(n: usize, k: usize) -> usize {
        n.div_ceil(STRIPE_ROWS) * k * LINE_WORDS
    }

    /// Where a row of a stripe is in a line: its byte, and which field of that.
    pub fn place(row: usize) -> (usize, usize) {
        let (r, field, l, e) = (row / 64, row / 16 % 4, row / 4 % 4, row % 4);
        (16 * l + 4 * r + e, field)
    }

    /// Weight `w[n,k]` of a matrix with `columns` = K; `None` for the code 3.
    pub fn get(words: &[u32], columns: usize, n: usize, k: usize) -> Option<i8> {
        let (byte, field) = place(n % STRIPE_ROWS);
        let line = (n / STRIPE_ROWS * columns + k) * LINE_WORDS;
        let byte = words[line + byte / 4].to_le_bytes()[byte % 4];
        match byte >> (2 * field) & 3 {
            3 => None,
            code => Some(code as i8 - 1),
        }
    }
}

/// The layout by rows, for products of which few outputs are wanted: each row by itself, a cache line for
/// 256 columns,
///
/// ```text
/// words[n][line = k/256][16]
/// ```
///
/// Bits `2f+1..2f` of byte `b` of a line hold `w + 1` of column `256·line + 64·f + b`. K is padded to whole
/// lines with weights of 0.
pub mod rows {
    /// Columns of a line.
    pub const LINE_K: usize = 256;
    /// u32 words of a line.
    pub const LINE_WORDS: usize = 16;

    /// Words of a packed `[N,K]` matrix.
    pub fn len_words(n: usize, k: usize) -> usize {
        n * k.div_ceil(LINE_K) * LINE_WORDS
    }

    /// Weight `w[n,k]` of a matrix with `columns` = K; `None` for the code 3.
    pub fn get(words: &[u32], columns: usize, n: usize, k: usize) -> Option<i8> {
        let line = (n * columns.div_ceil(LINE_K) + k / LINE_K) * LINE_WORDS;
        let (field, byte) = (k % LINE_K / 64, k % 64);
        match words[line + byte / 4].to_le_bytes()[byte % 4] >> (2 * field) & 3 {
            3 => None,
            code => Some(code as i8 - 1),
        }
    }
}

/// The bit-plane layout: words 0 and 1 of a piece are the non-zero plane of k 0–31 and 32–63 of
/// the chunk, words 2 and 3 the sign plane (1 for −1). The sign plane is a subset of the other.
pub mod planes {
    use super::{CHUNK_K, piece_index};

    /// Weight `w[n,k]` of a matrix with `chunks = k_chunks(K)`; `None` for a sign without a
    /// non-zero bit.
    pub fn get(words: &[u32], chunks: usize, n: usize, k: usize) -> Option<i8> {
        let (chunk, within) = (k / CHUNK_K, k % CHUNK_K);
        let (half, bit) = (within / 32, within % 32);
        let piece = piece_index(chunks, n, chunk);
        let nonzero = words[piece + half] >> bit & 1;
        let negative = words[piece + 2 + half] >> bit & 1;
        match (nonzero, negative) {
            (0, 0) => Some(0),
            (1, 0) => Some(1),
            (1, 1) => Some(-1),
            _ => None,
        }
    }
}

/// Five trits a byte, 1.6 bits a weight, for the memory of a CPU.
///
/// ```text
/// words[tile = n/32][piece][word 0..4][row = n%32]
/// ```
///
/// A piece is 16 bytes of each of the tile's rows, here with the rows next to each other word by word, so
/// that a lane of a SIMD register is a row. Five chunks of 64 columns make a group of four pieces:
///
/// - digits 0 to 3 of byte `b` of piece `p` hold `w + 1` of `k = 320·group + 64·p + 16·digit + b`;
/// - digit 4 holds that of `k = 320·group + 256 + 16·p + b`, a column of the fifth chunk.
///
/// The chunks that are left after the last whole group have a piece each, whose digit 4 is that of
/// weight 0 and stands for no column.
///
/// The code is made for a processor that looks up 64 bytes at once. A byte is `64·t + i`:
///
/// ```text
/// c = min(i / 21, 2)    o = i − 21·c    kept = 21, 21, 22 for c = 0, 1, 2
/// t < 3: r = o                 digit 4 = t
/// t = 3: r = kept + o / 3      digit 4 = o % 3
/// digits 0 to 3 = r % 3, r / 3 % 3, r / 9, c
/// ```
///
/// So the low six bits alone name the first four digits of 64 of their 81 combinations (27 `r` for each
/// `c`), and the top two bits are digit 4; what is left, 17·3 words, is escaped by `t = 3`, and of those
/// the low six bits still tell digit 3.
pub mod base3 {
    use super::{CHUNK_K, PIECE_WORDS, TILE_ROWS};

    /// Chunks of 64 columns in a group.
    pub const GROUP_CHUNKS: usize = 5;
    /// Pieces of a group.
    pub const GROUP_PIECES: usize = 4;

    /// Pieces of a row of `chunks` chunks.
    pub fn pieces(chunks: usize) -> usize {
        chunks / GROUP_CHUNKS * GROUP_PIECES + chunks % GROUP_CHUNKS
    }

    /// Words of a tile of rows of `chunks` chunks.
    pub fn tile_words(chunks: usize) -> usize {
        pieces(chunks) * TILE_ROWS * PIECE_WORDS
    }

    /// Index of word `word` of row `n`'s share of a piece.
    pub fn word_index(chunks: usize, n: usize, piece: usize, word: usize) -> usize {
        let (tile, row) = (n / TILE_ROWS, n % TILE_ROWS);
        tile * tile_words(chunks) + (piece * PIECE_WORDS + word) * TILE_ROWS + row
    }

    /// The five digits of a byte; `None` for the 13 that never occur.
    pub const fn digits(byte: u8) -> Option<[u8; 5]> {
        let (t, i) = (byte >> 6, byte & 63);
        let c = if i < 63 { i / 21 } else { 2 };
        let o = i - 21 * c;
        let kept = if c < 2 { 21 } else { 22 };
        let (r, last) = if t < 3 { (o, t) } else { (kept + o / 3, o % 3) };
        if r < 27 { Some([r % 3, r / 3 % 3, r / 9, c, last]) } else { None }
    }

    /// Weight `w[n,k]` of a matrix with `chunks = k_chunks(K)`; `None` for a byte that never occurs.
    pub fn get(words: &[u32], chunks: usize, n: usize, k: usize) -> Option<i8> {
        let (chunk, within) = (k / CHUNK_K, k % CHUNK_K);
        let (group, c) = (chunk / GROUP_CHUNKS, chunk % GROUP_CHUNKS);
        let (quarter, byte) = (within / 16, within % 16);
        let (p, digit) = if c < GROUP_PIECES { (c, quarter) } else { (quarter, 4) };
        let word = words[word_index(chunks, n, GROUP_PIECES * group + p, byte / 4)];
        Some(digits(word.to_le_bytes()[byte % 4])?[digit] as i8 - 1)
    }
}

/// The binary layout: bit `b` of word `i` of a piece is 1 for −1, 0 for +1, at
/// `k = 128·chunk + 32·i + b`. The padding is +1: activations past K must be 0.
pub mod signs {
    use super::{PIECE_WORDS, TILE_ROWS, piece_index};

    /// Columns (k) of a chunk.
    pub const CHUNK_K: usize = 128;

    /// Chunks along K: `ceil(K/128)`.
    pub fn k_chunks(k: usize) -> usize {
        k.div_ceil(CHUNK_K)
    }

    /// Words of a packed `[N,K]` matrix.
    pub fn len_words(n: usize, k: usize) -> usize {
        n.div_ceil(TILE_ROWS) * k_chunks(k) * TILE_ROWS * PIECE_WORDS
    }

    /// Weight `w[n,k]` of a matrix with `chunks = k_chunks(K)`.
    pub fn get(words: &[u32], chunks: usize, n: usize, k: usize) -> i8 {
        let (chunk, within) = (k / CHUNK_K, k % CHUNK_K);
        let word = words[piece_index(chunks, n, chunk) + within / 32];
        if word >> (within % 32) & 1 == 1 { -1 } else { 1 }
    }
}

/// Scales of groups of inputs, beside any of the layouts: IEEE half, two rows a word, the even row
/// in the low half:
///
/// ```text
/// words[tile = n/32][g][(n%32)/2]
/// ```
///
/// Rows of the padding have scale 0.
pub mod group_scales {
    use super::TILE_ROWS;

    /// Words of the scales of `[N,K]` with `groups = K/group`.
    pub fn len_words(n: usize, groups: usize) -> usize {
        n.div_ceil(TILE_ROWS) * groups * TILE_ROWS / 2
    }

    /// The bits of the half that scales group `g` of row `n`.
    pub fn get(words: &[u32], groups: usize, n: usize, g: usize) -> u16 {
        let row = n % TILE_ROWS;
        let word = words[(n / TILE_ROWS * groups + g) * (TILE_ROWS / 2) + row / 2];
        (word >> (16 * (row % 2))) as u16
    }
}

/// Rows of int8 codes with what belongs to each row, for the LM head: chunks are 16 columns, a piece
/// is the 16 bytes of one row's share, and the last piece of a row is `scale, error, norm, 0` in f32.
///
/// ```text
/// words[tile = n/32][chunk = k/16, then one more][row = n%32][4]
/// ```
///
/// K is padded with 0 to a multiple of 128, eight chunks, N to a multiple of 32 with rows of 0.
pub mod int8_rows {
    use super::{PIECE_WORDS, TILE_ROWS};

    /// Columns of a chunk.
    pub const CHUNK_K: usize = 16;

    /// Chunks along K, a multiple of 8.
    pub fn chunks(k: usize) -> usize {
        k.div_ceil(CHUNK_K).next_multiple_of(8)
    }

    /// Words of a tile.
    pub fn tile_words(k: usize) -> usize {
        (chunks(k) + 1) * TILE_ROWS * PIECE_WORDS
    }

    /// Index of the first word of the piece that holds row `n`, chunk `chunk`.
    pub fn piece_index(chunks: usize, n: usize, chunk: usize) -> usize {
        super::piece_index(chunks + 1, n, chunk)
    }

    /// Code `q[n,k]` of a table with `chunks = chunks(K)`.
    pub fn get(words: &[u32], chunks: usize, n: usize, k: usize) -> i8 {
        let (chunk, byte) = (k / CHUNK_K, k % CHUNK_K);
        let word = words[piece_index(chunks, n, chunk) + byte / 4];
        word.to_le_bytes()[byte % 4] as i8
    }

    /// `scale, error, norm` of row `n`.
    pub fn row(words: &[u32], chunks: usize, n: usize) -> [f32; 3] {
        let first = piece_index(chunks, n, chunks);
        std::array::from_fn(|i| f32::from_bits(words[first + i]))
    }
}

/// int8 codes in two parts, `q + 128 = 4·coarse + rest`, which lie apart: most of a head's use is for six
/// bits of each.
///
/// A piece of `rest` has bits `2j+1..2j` of byte `b` for `k = 64·group + 16·j + b`, as `i2` has. The coarse
/// parts of a row's group of 64 columns are three pieces: byte `b` of piece `p` holds that of
/// `k = 64·group + 16·p + b` in its low bits, and bits `2p+1..2p` of that of `k = 64·group + 48 + b` above.
/// Four rows' first pieces are a line of 64 bytes, then follow their second and their third ones.
///
/// ```text
/// coarse[tile = n/32][k/64][n%32/4][p][n%4][4]    and after a tile's last group what belongs to its
///                                                 rows: [n%32][scale, coarse error, norm, error] as f32
/// rest[tile = n/32][k/64][n%32][4]
/// ```
///
/// K is padded with codes of 0 to a whole group, and N with rows whose words are 0, and so their scale.
pub mod split_rows {
    use super::{PIECE_WORDS, TILE_ROWS};

    /// Columns of a group.
    pub const GROUP_K: usize = 64;

    /// Pieces of a group's coarse parts.
    pub const COARSE_PIECES: usize = 3;

    /// Rows of a line.
    pub const LINE_ROWS: usize = 4;

    /// Groups along K.
    pub fn groups(k: usize) -> usize {
        k.div_ceil(GROUP_K)
    }

    /// Words of a tile's coarse parts and row values.
    pub fn coarse_tile_words(k: usize) -> usize {
        (COARSE_PIECES * groups(k) + 1) * TILE_ROWS * PIECE_WORDS
    }

    /// Words of a tile's rests.
    pub fn rest_tile_words(k: usize) -> usize {
        groups(k) * TILE_ROWS * PIECE_WORDS
    }

    /// Index of the first word of piece `p` of row `n`'s coarse parts.
    pub fn coarse_piece(groups: usize, n: usize, group: usize, p: usize) -> usize {
        let (row, line) = (n % TILE_ROWS, n % TILE_ROWS / LINE_ROWS * COARSE_PIECES + p);
        let of_tile = (group * COARSE_PIECES * TILE_ROWS) + line * LINE_ROWS + row % LINE_ROWS;
        (n / TILE_ROWS * (COARSE_PIECES * groups + 1) * TILE_ROWS + of_tile) * PIECE_WORDS
    }

    /// Index of the first word of a row's values, in the coarse words.
    pub fn row_index(groups: usize, n: usize) -> usize {
        let pieces = COARSE_PIECES * groups;
        super::piece_index(pieces + 1, n, pieces)
    }

    fn byte(words: &[u32], piece: usize, byte: usize) -> u8 {
        words[piece + byte / 4].to_le_bytes()[byte % 4]
    }

    /// The coarse part of code `q[n,k]` of a table with `groups = groups(K)`.
    pub fn coarse(words: &[u32], groups: usize, n: usize, k: usize) -> u8 {
        let (group, field, b) = (k / GROUP_K, k % GROUP_K / 16, k % 16);
        let piece = |p| coarse_piece(groups, n, group, p);
        if field < COARSE_PIECES {
            return byte(words, piece(field), b) & 63;
        }
        (0..COARSE_PIECES).map(|p| byte(words, piece(p), b) >> 6 << (2 * p)).sum()
    }

    /// The rest of code `q[n,k]` of a table with `groups = groups(K)`.
    pub fn rest(words: &[u32], groups: usize, n: usize, k: usize) -> u8 {
        let (group, field, b) = (k / GROUP_K, k % GROUP_K / 16, k % 16);
        byte(words, super::piece_index(groups, n, group), b) >> (2 * field) & 3
    }

    /// `scale, coarse error, norm, error` of row `n`, from the coarse words.
    pub fn row(words: &[u32], groups: usize, n: usize) -> [f32; 4] {
        let first = row_index(groups, n);
        std::array::from_fn(|i| f32::from_bits(words[first + i]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_in_two_parts() {
        // N = 40, K = 200, row 33, column 165.
        let groups = split_rows::groups(200);
        let mut coarse = vec![0; 2 * split_rows::coarse_tile_words(200)];
        let mut rest = vec![0; 2 * split_rows::rest_tile_words(200)];
        coarse[2469] = 0x2a << 8;
        rest[773] = 2 << 12;
        assert_eq!(split_rows::coarse(&coarse, groups, 33, 165), 0x2a);
        assert_eq!(split_rows::rest(&rest, groups, 33, 165), 2);
        // Column 48 + 5 of the same group has the top two bits of three bytes.
        for (piece, word) in [2437, 2453, 2469].into_iter().enumerate() {
            coarse[word] |= (piece as u32 + 1) << 14;
        }
        assert_eq!(split_rows::coarse(&coarse, groups, 33, 181), 0b11_10_01);
        assert_eq!(split_rows::coarse(&coarse, groups, 33, 165), 0x2a);
    }

    #[test]
    fn signs_are_one_bit_a_weight() {
        let mut words = vec![0; signs::len_words(33, 200)];
        assert_eq!(words.len(), 2 * 2 * 32 * 4);
        // Row 32, k = 128 + 37: tile 1, chunk 1, word 1, bit 5.
        words[piece_index(2, 32, 1) + 1] = 1 << 5;
        assert_eq!(signs::get(&words, 2, 32, 165), -1);
        assert_eq!(signs::get(&words, 2, 32, 164), 1);
        assert_eq!(signs::get(&words, 2, 31, 165), 1);
    }

    #[test]
    fn group_scales_pair_rows() {
        let mut words = vec![0; group_scales::len_words(40, 3)];
        assert_eq!(words.len(), 2 * 3 * 16);
        // Row 35 (tile 1, row 3), group 2: word 1 of its 16, high half.
        words[(3 + 2) * 16 + 1] = 0x3c00_0000;
        assert_eq!(group_scales::get(&words, 3, 35, 2), 0x3c00);
        assert_eq!(group_scales::get(&words, 3, 34, 2), 0);
    }

    /// Every word of five trits has one byte, but for 13 bytes without a word; the kernels rely on what
    /// the low six bits tell.
    #[test]
    fn base3_bytes_are_words() {
        let mut words = std::collections::BTreeSet::new();
        for byte in 0..=255 {
            let Some(digits) = base3::digits(byte) else { continue };
            assert!(digits.iter().all(|&digit| digit < 3), "{byte}");
            assert!(words.insert(digits), "{byte}");
            let plain = base3::digits(byte & 63).unwrap();
            assert_eq!(digits[3], plain[3], "{byte}");
            if byte < 192 {
                assert_eq!((&digits[..4], digits[4]), (&plain[..4], byte >> 6), "{byte}");
            }
        }
        assert_eq!(words.len(), 243);
        assert_eq!(base3::digits(255), None);
    }

    #[test]
    fn base3_places() {
        // Eight chunks: a group of four pieces, and three.
        assert_eq!((base3::pieces(8), base3::pieces(5), base3::pieces(4)), (7, 4, 4));
        let zero = (0..=255).find(|&byte| base3::digits(byte) == Some([1; 5])).unwrap();
        let one = (0..=255).find(|&byte| base3::digits(byte) == Some([1, 1, 2, 1, 1])).unwrap();
        let last = (0..=255).find(|&byte| base3::digits(byte) == Some([1, 1, 1, 1, 0])).unwrap();
        let mut words = vec![u32::from_le_bytes([zero; 4]); 2 * base3::tile_words(8)];
        // Row 33: tile 1, row 1. Piece 5 is chunk 6, piece 3 has the fourth quarter of chunk 4.
        words[(7 + 5) * 128 + 2 * 32 + 1] = u32::from_le_bytes([zero, one, zero, zero]);
        words[(7 + 3) * 128 + 1] = u32::from_le_bytes([zero, zero, zero, last]);
        for n in 0..64 {
            for k in 0..8 * 64 {
                let expected = match (n, k) {
                    (33, 425) => 1,  // 64·6 + 16·2 + 9
                    (33, 307) => -1, // 64·4 + 16·3 + 3
                    _ => 0,
                };
                assert_eq!(base3::get(&words, 8, n, k), Some(expected), "{n} {k}");
            }
        }
        words[0] = 255;
        assert_eq!(base3::get(&words, 8, 0, 0), None);
    }

    #[test]
    fn i2_places_fields_16_apart() {
        let mut words = vec![0x5555_5555; len_words(1, 64)];
        // Row 0, byte 5, field 2 ↔ k = 37: bits 12..13 of word 1; code 2 is +1.
        words[1] = words[1] & !(3 << 12) | 2 << 12;
        for k in 0..64 {
            assert_eq!(i2::get(&words, 1, 0, k), Some(i8::from(k == 37)), "{k}");
        }
        words[1] |= 3 << 12;
        assert_eq!(i2::get(&words, 1, 0, 37), None);
    }

    #[test]
    fn planes_keep_signs_in_the_upper_half() {
        let mut words = vec![0; len_words(33, 65)];
        assert_eq!(words.len(), 2 * 2 * 32 * 4);
        // Row 32 (tile 1, row 0), k = 64 + 33 would be past K; use k = 33 of chunk 0.
        let piece = piece_index(2, 32, 0);
        words[piece + 1] = 1 << 1;
        words[piece + 3] = 1 << 1;
        assert_eq!(planes::get(&words, 2, 32, 33), Some(-1));
        assert_eq!(planes::get(&words, 2, 32, 34), Some(0));
        words[piece + 1] = 0;
        assert_eq!(planes::get(&words, 2, 32, 33), None);
    }
}
