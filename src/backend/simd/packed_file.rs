//! Packed weights in a file of the user's cache, so that a second load maps them and computes nothing.
//!
//! ```text
//! magic [8], version u32, sections u32        little-endian
//! key [32]                                    what the weights were made from, and how
//! SHA-256 of all of the above and the table [32]
//! table: SHA-256 of each section [sections][32]
//! sections, each on a multiple of 64 bytes    f32 and u32 in the machine's byte order
//! ```
//!
//! What the sections are, and how long, follows from the model; a file has exactly that length. The
//! header is checked whenever a file is opened, the hashes of the sections on request only: reading all of
//! them takes as long as the load that the file saves. Any contents are safe to multiply with, and
//! nobody but the user writes there; wrong bits are as likely as in the model's own file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::format::Bytes;

const MAGIC: [u8; 8] = *b"STERNApw";

/// To be raised with any change of a layout or of what the sections are.
const VERSION: u32 = 2;

/// Sections start on a cache line, as the kernels want packed words.
const ALIGNMENT: usize = 64;

const HASH_BYTES: usize = 32;
const HEADER_BYTES: usize = MAGIC.len() + 4 + 4 + 2 * HASH_BYTES;

/// What packed weights were made from, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key([u8; HASH_BYTES]);

impl Key {
    /// Of the parts that make a difference, in order.
    pub(super) fn of(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        let machine = if cfg!(target_endian = "little") { "little" } else { "big" };
        for part in [env!("CARGO_PKG_VERSION").as_bytes(), machine.as_bytes()].iter().chain(parts) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().into())
    }
}

/// Where the weights of the model called `label` are kept, packed as `how` says: what is packed again is
/// written over what it replaces.
pub(super) fn path(directory: &Path, label: &str, how: &str) -> PathBuf {
    let absolute = std::path::absolute(label).unwrap_or_else(|_| label.into());
    let Key(hash) = Key::of(&[absolute.as_os_str().as_encoded_bytes(), how.as_bytes()]);
    let name: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    directory.join("packed").join(name + ".weights")
}

/// The sections of the file, mapped; `check` reads all of them. `None` if there is no file; else the reason
/// why it is of no use.
pub(super) fn read(
    path: &Path,
    key: &Key,
    lens: &[usize],
    check: bool,
) -> Result<Option<Vec<Bytes>>, String> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    };
    let hashes = read_header(&file, key, lens)?;
    let (offsets, end) = offsets(lens);
    let found = file.metadata().map_err(|error| error.to_string())?.len();
    if found != end as u64 {
        return Err(format!("expected {end} bytes, found {found}"));
    }
    let map = |(&offset, &len)| Bytes::map(&file, offset as u64, len);
    let sections: io::Result<Vec<_>> = offsets.iter().zip(lens).map(map).collect();
    let sections = sections.map_err(|error| error.to_string())?;
    let is_whole = |(section, hash): (&Bytes, &[u8; HASH_BYTES])| {
        let found: [u8; HASH_BYTES] = Sha256::digest(&section[..]).into();
        found == *hash
    };
    if check && let Some(at) = sections.par_iter().zip(&hashes).position_first(|s| !is_whole(s)) {
        return Err(format!("section {at} is damaged"));
    }
    Ok(Some(sections))
}

/// The hashes of the sections, from a header that is as expected.
fn read_header(
    mut file: &File,
    key: &Key,
    lens: &[usize],
) -> Result<Vec<[u8; HASH_BYTES]>, String> {
    let mut bytes = vec![0; HEADER_BYTES + lens.len() * HASH_BYTES];
    file.read_exact(&mut bytes).map_err(|error| error.to_string())?;
    let (header, table) = bytes.split_at(HEADER_BYTES);
    let expected = header_start(key, lens.len());
    let (start, hash) = header.split_at(expected.len());
    let parts = [
        ("magic number", 0..8),
        ("version", 8..12),
        ("number of sections", 12..16),
        ("key", 16..48),
    ];
    if let Some((name, _)) =
        parts.into_iter().find(|(_, at)| start[at.clone()] != expected[at.clone()])
    {
        return Err(match name {
            "key" => "made from other files, or otherwise".to_owned(),
            _ => format!("its {name} is another"),
        });
    }
    if header_hash(start, table)[..] != *hash {
        return Err("its header is damaged".to_owned());
    }
    Ok(table.as_chunks().0.to_vec())
}

/// Writes a file, whole or not at all.
pub(super) fn write(path: &Path, key: &Key, sections: &[&[u8]]) -> io::Result<()> {
    let parent = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(parent)?;
    let mut file = tempfile::Builder::new().prefix(".packed-").tempfile_in(parent)?;
    let hash = |section: &&[u8]| -> [u8; HASH_BYTES] { Sha256::digest(section).into() };
    let table: Vec<_> = sections.par_iter().map(hash).collect();
    let start = header_start(key, sections.len());
    file.write_all(&start)?;
    file.write_all(&header_hash(&start, table.as_flattened()))?;
    file.write_all(table.as_flattened())?;
    let lens: Vec<_> = sections.iter().map(|section| section.len()).collect();
    let mut written = HEADER_BYTES + table.as_flattened().len();
    for (section, offset) in sections.iter().zip(offsets(&lens).0) {
        file.write_all(&[0; ALIGNMENT][..offset - written])?;
        file.write_all(section)?;
        written = offset + section.len();
    }
    // A name must not stand for contents that a crash has lost.
    file.as_file().sync_data()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

fn header_start(key: &Key, sections: usize) -> Vec<u8> {
    let sections = u32::try_from(sections).expect("a few for each layer");
    [&MAGIC[..], &VERSION.to_le_bytes(), &sections.to_le_bytes(), &key.0].concat()
}

fn header_hash(start: &[u8], table: &[u8]) -> [u8; HASH_BYTES] {
    Sha256::new().chain_update(start).chain_update(table).finalize().into()
}

/// Where sections of these lengths begin, and where the last one ends.
fn offsets(lens: &[usize]) -> (Vec<usize>, usize) {
    let mut end = HEADER_BYTES + lens.len() * HASH_BYTES;
    let next = |len: &usize| {
        let offset = end.next_multiple_of(ALIGNMENT);
        end = offset + len;
        offset
    };
    (lens.iter().map(next).collect(), end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTIONS: [&[u8]; 4] = [&[1; 100], &[], &[2; 64], &[3; 7]];
    const LENS: [usize; 4] = [100, 0, 64, 7];

    #[test]
    fn what_is_written_is_mapped() {
        let directory = tempfile::tempdir().unwrap();
        let (path, key) = (path(directory.path(), "model", "how"), Key::of(&[b"a"]));
        assert!(read(&path, &key, &LENS, true).unwrap().is_none());
        // The second one replaces the first.
        write(&path, &Key::of(&[b"b"]), &SECTIONS[..1]).unwrap();
        write(&path, &key, &SECTIONS).unwrap();
        for check in [false, true] {
            let sections = read(&path, &key, &LENS, check).unwrap().unwrap();
            assert!(sections.iter().map(|section| &section[..]).eq(SECTIONS));
            let aligned =
                |bytes: &Bytes| bytes.is_empty() || bytes.as_ptr().addr().is_multiple_of(ALIGNMENT);
            assert!(sections.iter().all(aligned));
        }
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_expected_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let (path, key) = (path(directory.path(), "model", "how"), Key::of(&[b"a"]));
        write(&path, &key, &SECTIONS).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let reason = |key: &Key, lens: &[usize], check| read(&path, key, lens, check).err();
        let is =
            |found: Option<String>, expected: &str| assert_eq!(found.as_deref(), Some(expected));
        is(reason(&Key::of(&[b"b"]), &LENS, false), "made from other files, or otherwise");
        is(reason(&key, &LENS[..3], false), "its number of sections is another");
        is(reason(&key, &[100, 0, 64, 8], false), "expected 456 bytes, found 455");
        for (at, expected) in [
            (0, "its magic number is another"),
            (8, "its version is another"),
            (50, "its header is damaged"),
            (90, "its header is damaged"),
        ] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            is(reason(&key, &LENS, false), expected);
        }
        for len in [0, 79, 100, whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(reason(&key, &LENS, false).is_some(), "{len}");
        }
        // A bit of a section is seen by who asks for it.
        let mut bytes = whole.clone();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(reason(&key, &LENS, false).is_none());
        is(reason(&key, &LENS, true), "section 3 is damaged");
    }
}
