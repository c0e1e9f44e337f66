//! Session files: a header, the tokens, their keys and values, and a checksum; see `docs/context.md`.
//!
//! All numbers are little-endian:
//!
//! ```text
//!  0  8  "STERNAKV"                    48  4  layers
//!  8  4  version: 1                    52  4  key/value heads G
//! 12  4  format: 0 f32, 1 f16, 2 int8  56  4  values a head D
//! 16 32  identity of the model         60  4  tokens T
//!                                      64  4  positions S: T, or T − 1
//! 68  4·T  token ids
//! then for each 64 positions, or what is left of them (s), for each layer:
//!     keys [s, G, D], values [s, G, D]; for int8 f32 scales of keys [s, G], of values [s, G]
//! last 32  SHA-256 of everything before
//! ```

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use cpu_ref::kv::f16_value;
use sha2::{Digest, Sha256};

use super::Identity;
use crate::error::{Error, Result};
use crate::kv_cache::{BLOCK, KvFormat, KvShape, value_bytes};

const MAGIC: &[u8; 8] = b"STERNAKV";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 68;
const CHECKSUM_BYTES: usize = 32;

/// What a file says of itself before its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The model.
    pub identity: Identity,
    /// Its keys and values.
    pub shape: KvShape,
    /// Positions whose keys and values follow.
    pub positions: usize,
    /// Tokens: as many, or one more.
    pub tokens: usize,
}

/// What a file must fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The loaded model.
    pub identity: Identity,
    /// Its keys and values, in the format that blocks are wanted in.
    pub shape: KvShape,
    /// Positions that a session may have.
    pub capacity: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
}

/// Writes a file, which gets its name when it is complete. `block(i)` is the session's block `i` in
/// the order of [`crate::backend::Backend::read_block`].
///
/// # Errors
/// [`Error::Io`], or what `block` returns.
pub fn write(
    path: &Path,
    header: &Header,
    tokens: &[u32],
    mut block: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let io_error = |source| Error::Io { path: path.to_owned(), source };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // A rename would replace a device such as /dev/null.
    if std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        return Err(io_error(io::Error::other("not a regular file")));
    }
    let mut file = tempfile::Builder::new()
        .prefix(".sterna-session-")
        .tempfile_in(parent)
        .map_err(|source| Error::Io { path: parent.to_owned(), source })?;
    let mut out = BufWriter::with_capacity(1 << 20, file.as_file_mut());
    let mut hash = Sha256::new();
    let mut put = |bytes: &[u8]| {
        hash.update(bytes);
        out.write_all(bytes).map_err(io_error)
    };
    put(&header.to_bytes())?;
    for token in tokens {
        put(&token.to_le_bytes())?;
    }
    for (index, positions) in blocks(header.positions).enumerate() {
        let bytes = block(index)?;
        let mut at = 0;
        for (whole, part) in sections(header.shape, positions) {
            put(&bytes[at..at + part])?;
            at += whole;
        }
    }
    let checksum = hash.finalize();
    out.write_all(&checksum).and_then(|()| out.flush()).map_err(io_error)?;
    drop(out);
    file.persist(path).map_err(|error| io_error(error.error))?;
    Ok(())
}

/// Positions of each block of a session.
fn blocks(positions: usize) -> impl Iterator<Item = usize> {
    (0..positions).step_by(BLOCK).map(move |first| BLOCK.min(positions - first))
}

/// Bytes of each part of a block, and of its first `positions`: keys, values and scales of each layer.
fn sections(shape: KvShape, positions: usize) -> impl Iterator<Item = (usize, usize)> {
    let values = shape.heads * shape.dim * value_bytes(shape.format);
    let scales = if shape.format == KvFormat::Int8 { 4 * shape.heads } else { 0 };
    let layer = [values, values, scales, scales].map(|len| (BLOCK * len, positions * len));
    (0..shape.layers).flat_map(move |_| layer)
}

const FORMATS: [(KvFormat, &str); 3] =
    [(KvFormat::F32, "f32"), (KvFormat::F16, "f16"), (KvFormat::Int8, "int8")];

/// As `--kv` takes it.
pub fn format_name(format: KvFormat) -> &'static str {
    let (_, name) = FORMATS.into_iter().find(|named| named.0 == format).expect("all are listed");
    name
}

impl Header {
    fn to_bytes(self) -> Vec<u8> {
        let format = FORMATS.iter().position(|named| named.0 == self.shape.format);
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((format.expect("all are listed") as u32).to_le_bytes());
        bytes.extend(self.identity.0);
        let KvShape { layers, heads, dim, .. } = self.shape;
        for number in [layers, heads, dim, self.tokens, self.positions] {
            bytes.extend((number as u32).to_le_bytes());
        }
        bytes
    }

    /// Bytes of the whole file; `None` if no file is that long.
    fn file_bytes(&self) -> Option<u64> {
        let kv = self.positions.checked_mul(self.shape.position_bytes())?;
        let len = self.tokens.checked_mul(4)?.checked_add(kv)?;
        Some(len.checked_add(HEADER_BYTES + CHECKSUM_BYTES)? as u64)
    }
}

/// A file that is read from its beginning to its end. Nothing of it is to be trusted before
/// [`Reader::finish`] has compared the checksum.
pub struct Reader<R> {
    path: PathBuf,
    file: R,
    hash: Sha256,
    header: Header,
    expected: Expected,
    /// Positions not read yet.
    left: usize,
}

impl Reader<BufReader<File>> {
    /// Opens a file and checks its header.
    ///
    /// # Errors
    /// As [`Reader::new`], or [`Error::Io`].
    pub fn open(path: &Path, expected: &Expected) -> Result<Self> {
        let io_error = |source| Error::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io_error)?;
        let metadata = file.metadata().map_err(io_error)?;
        if !metadata.is_file() {
            return Err(io_error(io::Error::other("not a regular file")));
        }
        let file = BufReader::with_capacity(1 << 20, file);
        Self::new(path, file, metadata.len(), expected)
    }
}

impl<R: Read> Reader<R> {
    /// Checks the header of a file of `len` bytes.
    ///
    /// # Errors
    /// [`Error::Snapshot`], [`Error::SnapshotModel`], [`Error::SnapshotFormat`] or
    /// [`Error::ContextOverflow`]: the file is no session, or damaged, or not one that fits.
    pub fn new(path: &Path, mut file: R, len: u64, expected: &Expected) -> Result<Self> {
        let path = path.to_owned();
        let invalid = |problem: String| Error::Snapshot { path: path.clone(), problem };
        let mut bytes = [0; HEADER_BYTES];
        let least = HEADER_BYTES + CHECKSUM_BYTES;
        if len < least as u64 {
            return Err(invalid(format!("expected at least {least} bytes, found {len}")));
        }
        let io_error = |source| Error::Io { path: path.clone(), source };
        file.read_exact(&mut bytes).map_err(io_error)?;
        let number =
            |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("inside the header"));
        if bytes[..8] != *MAGIC {
            return Err(invalid("it does not begin with STERNAKV".to_owned()));
        }
        if number(8) != VERSION {
            let problem = format!("expected version {VERSION}, found {}", number(8));
            return Err(invalid(problem));
        }
        let Some(&(format, found)) = FORMATS.get(number(12) as usize) else {
            return Err(invalid(format!("expected KV format 0 to 2, found {}", number(12))));
        };
        let identity = Identity(*bytes[16..].first_chunk().expect("inside the header"));
        if identity != expected.identity {
            let (expected, found) = (expected.identity.to_string(), identity.to_string());
            return Err(Error::SnapshotModel { path, expected, found });
        }
        let [layers, heads, dim, tokens, positions] =
            [48, 52, 56, 60, 64].map(|at| number(at) as usize);
        let shape = KvShape { layers, heads, dim, format };
        if shape != (KvShape { format, ..expected.shape }) {
            let KvShape { layers: l, heads: g, dim: d, .. } = expected.shape;
            let problem = format!(
                "expected {l} layers of {g} heads of {d}, found {layers} of {heads} of {dim}"
            );
            return Err(invalid(problem));
        }
        let wanted = expected.shape.format;
        if format != wanted && (format, wanted) != (KvFormat::F16, KvFormat::F32) {
            return Err(Error::SnapshotFormat { path, expected: format_name(wanted), found });
        }
        if positions > tokens || tokens - positions > 1 {
            let problem = format!(
                "expected as many positions as tokens or one less, found {positions} of {tokens}"
            );
            return Err(invalid(problem));
        }
        if positions > expected.capacity {
            let (needed, capacity) = (positions, expected.capacity);
            return Err(Error::ContextOverflow { needed, capacity });
        }
        let header = Header { identity, shape, positions, tokens };
        let whole = header.file_bytes();
        if whole != Some(len) {
            let whole = whole.map_or("more".to_owned(), |len| len.to_string());
            return Err(invalid(format!("expected {whole} bytes, found {len}")));
        }
        let mut hash = Sha256::new();
        hash.update(bytes);
        Ok(Self { path, file, hash, header, expected: *expected, left: positions })
    }

    /// What the file says of itself.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The token ids, which come first.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Snapshot`] if one is outside the vocabulary.
    pub fn tokens(&mut self) -> Result<Vec<u32>> {
        let bytes = self.read(4 * self.header.tokens)?;
        let tokens: Vec<u32> =
            bytes.as_chunks::<4>().0.iter().map(|token| u32::from_le_bytes(*token)).collect();
        let vocab_size = self.expected.vocab_size;
        match tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => {
                let problem = format!("token {token} is outside the vocabulary of {vocab_size}");
                Err(Error::Snapshot { path: self.path.clone(), problem })
            }
            None => Ok(tokens),
        }
    }

    /// The next block, whole, in the order of [`crate::backend::Backend::write_block`] and the format
    /// that is wanted; positions that the session does not have are 0.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn block(&mut self) -> Result<Vec<u8>> {
        let positions = self.left.min(BLOCK);
        self.left -= positions;
        let mut block = Vec::with_capacity(self.expected.shape.block_bytes());
        let widen = self.header.shape.format != self.expected.shape.format;
        for (whole, part) in sections(self.header.shape, positions) {
            let bytes = self.read(part)?;
            let end = block.len() + if widen { 2 * whole } else { whole };
            if widen {
                let halves = bytes.as_chunks::<2>().0.iter();
                block.extend(halves.flat_map(|h| f16_value(u16::from_le_bytes(*h)).to_le_bytes()));
            } else {
                block.extend(bytes);
            }
            block.resize(end, 0);
        }
        Ok(block)
    }

    /// Compares the checksum, after everything has been read.
    ///
    /// # Errors
    /// [`Error::Snapshot`] if it differs: then what was read is worth nothing.
    pub fn finish(mut self) -> Result<()> {
        let found = std::mem::take(&mut self.hash).finalize();
        let checksum = self.read(CHECKSUM_BYTES)?;
        if *checksum != *found {
            let problem = "the checksum differs: the file is damaged".to_owned();
            return Err(Error::Snapshot { path: self.path, problem });
        }
        Ok(())
    }

    /// The next bytes, which the header has promised and the file's length allows.
    fn read(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        let io_error = |source| Error::Io { path: self.path.clone(), source };
        self.file.read_exact(&mut bytes).map_err(io_error)?;
        self.hash.update(&bytes);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: KvShape = KvShape { layers: 1, heads: 1, dim: 2, format: KvFormat::Int8 };

    fn expected() -> Expected {
        Expected { identity: Identity([0xab; 32]), shape: SHAPE, capacity: 100, vocab_size: 300 }
    }

    fn file(positions: usize, tokens: &[u32]) -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("session");
        let identity = expected().identity;
        let header = Header { identity, shape: SHAPE, positions, tokens: tokens.len() };
        let block =
            |index: usize| Ok((0..SHAPE.block_bytes()).map(|i| (i + 100 * index) as u8).collect());
        write(&path, &header, tokens, block).unwrap();
        std::fs::read(&path).unwrap()
    }

    fn read(bytes: &[u8], expected: &Expected) -> Result<(Vec<u32>, Vec<Vec<u8>>)> {
        let path = Path::new("s");
        let mut reader = Reader::new(path, bytes, bytes.len() as u64, expected)?;
        let tokens = reader.tokens()?;
        let blocks = reader.header().positions.div_ceil(BLOCK);
        let blocks = (0..blocks).map(|_| reader.block()).collect::<Result<_>>()?;
        reader.finish()?;
        Ok((tokens, blocks))
    }

    /// The example of `docs/context.md`.
    #[test]
    fn a_small_file_byte_by_byte() {
        let found = file(1, &[7, 258]);
        let head = b"STERNAKV\x01\0\0\0\x02\0\0\0";
        let numbers = b"\x01\0\0\0\x01\0\0\0\x02\0\0\0\x02\0\0\0\x01\0\0\0";
        let tokens = b"\x07\0\0\0\x02\x01\0\0";
        // Of 64 positions the first: keys at 0, values at 128, scales at 256 and 512.
        let kv = b"\x00\x01\x80\x81\x00\x01\x02\x03\x00\x01\x02\x03";
        let before = [&head[..], &[0xab; 32], numbers, tokens, kv].concat();
        assert_eq!(before.len(), 88);
        assert_eq!(found[..88], before);
        assert_eq!(found[88..], *Sha256::digest(&before));
        let page = include_str!("../../docs/context.md");
        for line in found
            .chunks(16)
            .map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "))
        {
            assert!(page.contains(&line), "docs/context.md lacks: {line}");
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let tokens: Vec<u32> = (0..70).collect();
        let (found, blocks) = read(&file(70, &tokens), &expected()).unwrap();
        assert_eq!((found, blocks.len()), (tokens, 2));
        let whole: Vec<u8> = (0..SHAPE.block_bytes()).map(|i| i as u8).collect();
        assert_eq!(blocks[0], whole);
        // Six positions of the second block; zeros after them.
        assert_eq!(blocks[1][..12], (100..112).collect::<Vec<u8>>());
        assert!(blocks[1][12..128].iter().all(|&byte| byte == 0));
        assert_eq!(blocks[1].len(), SHAPE.block_bytes());
    }

    #[test]
    fn halves_are_widened_and_nothing_else_is_converted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("session");
        let shape = KvShape { format: KvFormat::F16, ..SHAPE };
        let identity = expected().identity;
        let header = Header { identity, shape, positions: 1, tokens: 1 };
        write(&path, &header, &[1], |_| Ok([0x00, 0x3c].repeat(2 * 2 * 64))).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let f32_shape = KvShape { format: KvFormat::F32, ..SHAPE };
        let (_, blocks) = read(&bytes, &Expected { shape: f32_shape, ..expected() }).unwrap();
        let ones = 1f32.to_le_bytes().repeat(2);
        assert_eq!((&blocks[0][..8], blocks[0].len()), (&ones[..], f32_shape.block_bytes()));
        assert_eq!(blocks[0][128 * 4..][..8], ones);
        let error = read(&bytes, &expected()).unwrap_err();
        assert!(
            matches!(error, Error::SnapshotFormat { .. }) && error.to_string().contains("--kv f16")
        );
    }

    #[test]
    fn every_bit_and_every_length_counts() {
        let sound = file(1, &[7, 258]);
        for bit in 0..8 * sound.len() {
            let mut damaged = sound.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&damaged, &expected()).is_err(), "bit {bit}");
        }
        for len in 0..sound.len() {
            assert!(read(&sound[..len], &expected()).is_err(), "{len} bytes");
        }
        assert!(read(&[&sound[..], &[0]].concat(), &expected()).is_err());
        let other = Expected { identity: Identity([0; 32]), ..expected() };
        let error = read(&sound, &other).unwrap_err().to_string();
        assert!(error.contains("abababababababab") && error.contains("another model"), "{error}");
        let short = Expected { capacity: 0, ..expected() };
        assert!(matches!(read(&sound, &short), Err(Error::ContextOverflow { needed: 1, .. })));
        let small = Expected { vocab_size: 258, ..expected() };
        let error = read(&sound, &small).unwrap_err().to_string();
        assert!(error.contains("token 258") && error.contains("vocabulary of 258"), "{error}");
    }

    #[test]
    fn a_header_may_not_ask_for_more_than_the_file_has() {
        let mut huge = file(1, &[7, 258]);
        for (tokens, positions) in [(u32::MAX, u32::MAX), (u32::MAX, u32::MAX - 1), (3, 1), (1, 2)]
        {
            huge[60..64].copy_from_slice(&tokens.to_le_bytes());
            huge[64..68].copy_from_slice(&positions.to_le_bytes());
            let expected = Expected { capacity: usize::MAX, ..expected() };
            assert!(matches!(read(&huge, &expected), Err(Error::Snapshot { .. })));
        }
    }
}
