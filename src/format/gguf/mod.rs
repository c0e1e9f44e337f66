//! The GGUF container: key–value pairs, descriptions of tensors, then their bytes.
//!
//! Versions 2 and 3, little-endian. Every length and count is held against the bytes that are left
//! before anything of that size is allocated; what a header takes in memory is about what it takes
//! in the file. Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! A tensor of a type that this version does not read is no error here: its
//! [`TensorInfo::dtype`](super::TensorInfo) names the type, and its length is all bytes up to the
//! next tensor. The model may do without it.

mod metadata;
mod write;

use std::collections::HashSet;
use std::fmt;

pub use metadata::{Array, FromValue, Metadata, Strings, Value};
pub use write::{TensorPlan, Writer};

use super::ggml::{self, CLASHING_Q2_0, GgmlType};
use super::{TensorInfo, quoted};
use crate::error::{Error, Result};

/// What a GGUF file begins with.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";

/// The longest header that is read; those of real models take some MB.
pub(super) const MAX_HEADER_BYTES: u64 = 1 << 28;

/// Most keys and most tensors: bounds what a header of tiny entries takes in memory. Real models
/// have tens of keys and hundreds of tensors.
const MAX_ENTRIES: u64 = 1 << 16;

/// Most axes of a tensor, as in GGML.
const MAX_AXES: u32 = 4;

const ALIGNMENT_KEY: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;

/// Numbers of the value types.
mod value_type {
    pub(super) const U8: u32 = 0;
    pub(super) const I8: u32 = 1;
    pub(super) const U16: u32 = 2;
    pub(super) const I16: u32 = 3;
    pub(super) const U32: u32 = 4;
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const BOOL: u32 = 7;
    pub(super) const STRING: u32 = 8;
    pub(super) const ARRAY: u32 = 9;
    pub(super) const U64: u32 = 10;
    pub(super) const I64: u32 = 11;
    pub(super) const F64: u32 = 12;
}

/// A parsed header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    /// In the order of the file.
    pub(super) tensors: Vec<TensorInfo>,
}

/// Parses the header of a file of `file_len` bytes that begins with `bytes`; `None` if the header goes
/// on after these. Of the whole file or its first [`MAX_HEADER_BYTES`] it does not.
pub(super) fn parse(
    file: &str,
    bytes: &[u8],
    file_len: u64,
    shard: usize,
) -> Result<Option<Header>> {
    let mut reader = Reader { file, bytes, at: 0, file_len, is_cut: false };
    match header(&mut reader, shard) {
        Err(_) if reader.is_cut => Ok(None),
        parsed => parsed.map(Some),
    }
}

fn header(reader: &mut Reader<'_>, shard: usize) -> Result<Header> {
    let file = reader.file;
    let (tensor_count, key_count) = reader.counts()?;
    let mut metadata = Metadata::new(file);
    for _ in 0..key_count {
        let key = reader.string(&"a key")?;
        let value = reader.value(key)?;
        if !metadata.insert(key, value) {
            return Err(reader.invalid(format_args!("key {} appears twice", quoted(key))));
        }
    }
    let mut stored = Vec::new();
    let mut names = HashSet::new();
    for _ in 0..tensor_count {
        let tensor = reader.tensor()?;
        if !names.insert(tensor.name) {
            return Err(
                reader.invalid(format_args!("tensor {} appears twice", quoted(tensor.name)))
            );
        }
        stored.push(tensor);
    }
    drop(names);
    let alignment = alignment(&metadata)?;
    let tensors = Places::new(reader, &stored, alignment)?.tensors(shard)?;
    Ok(Header { metadata, tensors })
}

/// To what multiple of bytes tensors are padded.
fn alignment(metadata: &Metadata) -> Result<u64> {
    let alignment = metadata.get::<u32>(ALIGNMENT_KEY)?.map_or(DEFAULT_ALIGNMENT, u64::from);
    if alignment.is_power_of_two() {
        return Ok(alignment);
    }
    Err(Error::Metadata {
        file: metadata.file().to_owned(),
        key: ALIGNMENT_KEY.to_owned(),
        expected: "a power of two",
        found: alignment.to_string(),
    })
}

/// A tensor's description as it stands in the file.
struct Stored<'a> {
    name: &'a str,
    /// Row-major.
    shape: Vec<usize>,
    type_id: u32,
    /// In the data section.
    offset: u64,
}

/// The bytes of a header that are not yet read.
struct Reader<'a> {
    file: &'a str,
    bytes: &'a [u8],
    at: usize,
    file_len: u64,
    /// Whether something was asked for that follows `bytes`.
    is_cut: bool,
}

impl<'a> Reader<'a> {
    fn invalid(&self, problem: fmt::Arguments<'_>) -> Error {
        Error::Gguf { file: self.file.to_owned(), problem: problem.to_string() }
    }

    /// Bytes that may still be of the header, whether they are here or not.
    fn left(&self) -> u64 {
        self.file_len.min(MAX_HEADER_BYTES).saturating_sub(self.at as u64)
    }

    /// The next `len` bytes, which are those of `what`.
    fn take(&mut self, len: u64, what: &dyn fmt::Display) -> Result<&'a [u8]> {
        if len > self.left() {
            let at = self.at;
            if self.file_len > MAX_HEADER_BYTES {
                return Err(self.invalid(format_args!(
                    "{what} at byte {at} takes {len} bytes; at most {MAX_HEADER_BYTES} bytes of \
                     header are read"
                )));
            }
            return Err(self.invalid(format_args!(
                "{what} at byte {at} takes {len} bytes in a file of {} bytes",
                self.file_len
            )));
        }
        let start = self.at;
        // No more than the longest header.
        let end = start + len as usize;
        let Some(bytes) = self.bytes.get(start..end) else {
            self.is_cut = true;
            return Err(self.invalid(format_args!("{what} at byte {start} is not here")));
        };
        self.at = end;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, what: &dyn fmt::Display) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &dyn fmt::Display) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &dyn fmt::Display) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &dyn fmt::Display) -> Result<&'a str> {
        let len = self.u64(what)?;
        let at = self.at;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|error| {
            let at = at + error.valid_up_to();
            self.invalid(format_args!("{what} is not UTF-8 at byte {at}"))
        })
    }

    /// Magic, version, and how many tensors and keys there are.
    fn counts(&mut self) -> Result<(u64, u64)> {
        let magic: [u8; 4] = self.array(&"the magic number")?;
        if magic != MAGIC {
            let found = magic.escape_ascii();
            return Err(self.invalid(format_args!("expected the bytes GGUF, found {found}")));
        }
        let version = self.u32(&"the version")?;
        if !matches!(version, 2 | 3) {
            let found = match version.swap_bytes() {
                big @ 1..=0xffff => format!("version {big} in big-endian order"),
                _ => format!("version {version}"),
            };
            return Err(Error::GgufVersion { file: self.file.to_owned(), found });
        }
        let tensor_count = self.u64(&"the number of tensors")?;
        let key_count = self.u64(&"the number of keys")?;
        // The least that one takes: name length, axes, type and offset; key length, type and value.
        for (what, count, min_bytes) in [("tensors", tensor_count, 24), ("keys", key_count, 13)] {
            if count > self.left() / min_bytes {
                return Err(self
                    .invalid(format_args!("{count} {what} in a file of {} bytes", self.file_len)));
            }
            if count > MAX_ENTRIES {
                return Err(
                    self.invalid(format_args!("{count} {what}; at most {MAX_ENTRIES} are read"))
                );
            }
        }
        Ok((tensor_count, key_count))
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let what = Labelled("the value of", key);
        Ok(match self.u32(&what)? {
            value_type::U8 => Value::U8(u8::from_le_bytes(self.array(&what)?)),
            value_type::I8 => Value::I8(i8::from_le_bytes(self.array(&what)?)),
            value_type::U16 => Value::U16(u16::from_le_bytes(self.array(&what)?)),
            value_type::I16 => Value::I16(i16::from_le_bytes(self.array(&what)?)),
            value_type::U32 => Value::U32(u32::from_le_bytes(self.array(&what)?)),
            value_type::I32 => Value::I32(i32::from_le_bytes(self.array(&what)?)),
            value_type::U64 => Value::U64(u64::from_le_bytes(self.array(&what)?)),
            value_type::I64 => Value::I64(i64::from_le_bytes(self.array(&what)?)),
            value_type::F32 => Value::F32(f32::from_le_bytes(self.array(&what)?)),
            value_type::F64 => Value::F64(f64::from_le_bytes(self.array(&what)?)),
            value_type::BOOL => {
                let [byte] = self.array(&what)?;
                Value::Bool(self.boolean(byte, key)?)
            }
            value_type::STRING => Value::String(self.string(&what)?.to_owned()),
            value_type::ARRAY => Value::Array(self.values(key)?),
            found => return Err(self.value_type_error(key, found)),
        })
    }

    fn values(&mut self, key: &str) -> Result<Array> {
        let what = Labelled("the array of", key);
        let element = self.u32(&what)?;
        let count = self.u64(&what)?;
        Ok(match element {
            value_type::U8 => Array::U8(self.numbers(count, &what, u8::from_le_bytes)?),
            value_type::I8 => Array::I8(self.numbers(count, &what, i8::from_le_bytes)?),
            value_type::U16 => Array::U16(self.numbers(count, &what, u16::from_le_bytes)?),
            value_type::I16 => Array::I16(self.numbers(count, &what, i16::from_le_bytes)?),
            value_type::U32 => Array::U32(self.numbers(count, &what, u32::from_le_bytes)?),
            value_type::I32 => Array::I32(self.numbers(count, &what, i32::from_le_bytes)?),
            value_type::U64 => Array::U64(self.numbers(count, &what, u64::from_le_bytes)?),
            value_type::I64 => Array::I64(self.numbers(count, &what, i64::from_le_bytes)?),
            value_type::F32 => Array::F32(self.numbers(count, &what, f32::from_le_bytes)?),
            value_type::F64 => Array::F64(self.numbers(count, &what, f64::from_le_bytes)?),
            value_type::BOOL => {
                let bytes = self.take(count, &what)?;
                bytes.iter().try_for_each(|&byte| self.boolean(byte, key).map(drop))?;
                Array::Bool(bytes.iter().map(|&byte| byte == 1).collect())
            }
            value_type::STRING => Array::String(self.strings(count, &what)?),
            value_type::ARRAY => {
                return Err(self.invalid(format_args!(
                    "key {} is an array of arrays, which no model has",
                    quoted(key)
                )));
            }
            found => return Err(self.value_type_error(key, found)),
        })
    }

    fn numbers<T, const SIZE: usize>(
        &mut self,
        count: u64,
        what: &dyn fmt::Display,
        from_le_bytes: impl Fn([u8; SIZE]) -> T,
    ) -> Result<Vec<T>> {
        // What does not fit 64 bits does not fit the file either.
        let bytes = self.take(count.saturating_mul(SIZE as u64), what)?;
        Ok(bytes.as_chunks().0.iter().map(|&bytes| from_le_bytes(bytes)).collect())
    }

    /// Walks over the strings first, so that memory is taken once and for strings that are there.
    fn strings(&mut self, count: u64, what: &dyn fmt::Display) -> Result<Strings> {
        if count > self.left() / 8 {
            return Err(self.invalid(format_args!(
                "{what} has {count} strings in a file of {} bytes",
                self.file_len
            )));
        }
        let start = self.at;
        for _ in 0..count {
            let len = self.u64(what)?;
            self.take(len, what)?;
        }
        let count = count as usize;
        let mut strings = Strings::with_capacity(count, self.at - start - 8 * count);
        self.at = start;
        for _ in 0..count {
            strings.push(self.string(what)?);
        }
        Ok(strings)
    }

    fn boolean(&self, byte: u8, key: &str) -> Result<bool> {
        match byte {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.invalid(format_args!(
                "key {}: expected the byte 0 or 1 for a boolean, found {byte}",
                quoted(key)
            ))),
        }
    }

    fn value_type_error(&self, key: &str, found: u32) -> Error {
        self.invalid(format_args!(
            "key {}: expected a value type from 0 to 12, found {found}",
            quoted(key)
        ))
    }

    fn tensor(&mut self) -> Result<Stored<'a>> {
        let name = self.string(&"a tensor's name")?;
        let what = Labelled("the description of tensor", name);
        let axes = self.u32(&what)?;
        if axes > MAX_AXES {
            return Err(self.invalid(format_args!(
                "tensor {}: {axes} axes; at most {MAX_AXES}",
                quoted(name)
            )));
        }
        // The file has the fastest axis first.
        let mut shape = vec![0; axes as usize];
        for place in shape.iter_mut().rev() {
            let n = self.u64(&what)?;
            *place = usize::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| {
                self.invalid(format_args!("tensor {}: a dimension of {n}", quoted(name)))
            })?;
        }
        let type_id = self.u32(&what)?;
        let offset = self.u64(&what)?;
        Ok(Stored { name, shape, type_id, offset })
    }
}

/// A part of the file by its key or name, for messages.
struct Labelled<'a>(&'static str, &'a str);

impl fmt::Display for Labelled<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, quoted(self.1))
    }
}

/// Where tensors stand in the file.
struct Places<'r, 'a> {
    reader: &'r Reader<'a>,
    stored: &'r [Stored<'a>],
    alignment: u64,
    /// Where the data section begins in the file, and how long it is.
    data_start: u64,
    data_len: u64,
    /// Bytes from each tensor's offset to the next one's, or to the end of the file.
    room: Vec<u64>,
}

impl<'r, 'a> Places<'r, 'a> {
    fn new(reader: &'r Reader<'a>, stored: &'r [Stored<'a>], alignment: u64) -> Result<Self> {
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        let data_len = reader.file_len.saturating_sub(data_start);
        let mut order: Vec<usize> = (0..stored.len()).collect();
        order.sort_by_key(|&i| stored[i].offset);
        let mut room = vec![0; stored.len()];
        for (place, &i) in order.iter().enumerate() {
            let Stored { name, offset, .. } = stored[i];
            let name = quoted(name);
            if !offset.is_multiple_of(alignment) {
                return Err(reader.invalid(format_args!(
                    "tensor {name}: expected an offset that is a multiple of {alignment}, found \
                     {offset}"
                )));
            }
            if offset >= data_len {
                return Err(reader.invalid(format_args!(
                    "tensor {name}: offset {offset} in a file with {data_len} bytes of elements"
                )));
            }
            let next = order.get(place + 1).map(|&next| &stored[next]);
            let end = next.map_or(data_len, |next| next.offset.min(data_len));
            room[i] = end - offset;
            if let Some(next) = next
                && room[i] == 0
            {
                return Err(reader.invalid(format_args!(
                    "tensors {name} and {} both begin at {offset}",
                    quoted(next.name)
                )));
            }
        }
        Ok(Self { reader, stored, alignment, data_start, data_len, room })
    }

    fn tensors(&self, shard: usize) -> Result<Vec<TensorInfo>> {
        let q2_0 = self.agreed_q2_0();
        let mut infos = Vec::with_capacity(self.stored.len());
        for (i, tensor) in self.stored.iter().enumerate() {
            let ty = if tensor.type_id == CLASHING_Q2_0 {
                self.q2_0(i).or(q2_0.filter(|&ty| self.fits(i, ty)))
            } else {
                GgmlType::from_id(tensor.type_id)
            };
            let (dtype, len_bytes) = match ty {
                Some(ty) => (ty.name().to_owned(), self.len_bytes(i, ty)?),
                None => (ggml::other_type(tensor.type_id), self.room[i]),
            };
            // Matters where addresses have 32 bits.
            if isize::try_from(len_bytes).is_err() {
                return Err(self.reader.invalid(format_args!(
                    "tensor {}: {len_bytes} bytes; too large for this system",
                    quoted(tensor.name)
                )));
            }
            infos.push(TensorInfo {
                name: tensor.name.to_owned(),
                dtype,
                shape: tensor.shape.clone(),
                len_bytes,
                offset: self.data_start + tensor.offset,
                shard,
            });
        }
        Ok(infos)
    }

    /// The tensor's length, checked to end before the next one.
    fn len_bytes(&self, i: usize, ty: GgmlType) -> Result<u64> {
        let Stored { name, ref shape, offset, .. } = self.stored[i];
        let (name, ty_name, room) = (quoted(name), ty.name(), self.room[i]);
        let Some(len) = ty.len_bytes(shape) else {
            return Err(self.reader.invalid(format_args!(
                "tensor {name}: rows of shape {shape:?} are not whole blocks of {ty_name}"
            )));
        };
        if len > room {
            let what = if offset + room == self.data_len {
                "the end of the file"
            } else {
                "the next tensor"
            };
            return Err(self.reader.invalid(format_args!(
                "tensor {name}: shape {shape:?} of {ty_name} takes {len} bytes, but {what} is \
                 {room} bytes after its beginning"
            )));
        }
        Ok(len)
    }

    /// Which Q2_0 a tensor of type 42 is, from the bytes it takes; `None` if both fit or neither.
    fn q2_0(&self, i: usize) -> Option<GgmlType> {
        match [GgmlType::Q2_0, GgmlType::Q2_0G128].map(|ty| self.fits(i, ty)) {
            [true, false] => Some(GgmlType::Q2_0),
            [false, true] => Some(GgmlType::Q2_0G128),
            _ => None,
        }
    }

    /// Whether the tensor, padded, takes just the bytes to the next one.
    fn fits(&self, i: usize, ty: GgmlType) -> bool {
        let len = ty.len_bytes(&self.stored[i].shape);
        len.and_then(|len| self.room[i].checked_sub(len)).is_some_and(|rest| rest < self.alignment)
    }

    /// Which Q2_0 all tensors are whose bytes tell: small ones may be as long either way, but come
    /// from the same writer.
    fn agreed_q2_0(&self) -> Option<GgmlType> {
        let clashing = |&i: &usize| self.stored[i].type_id == CLASHING_Q2_0;
        let mut told = (0..self.stored.len()).filter(clashing).filter_map(|i| self.q2_0(i));
        let first = told.next()?;
        told.all(|ty| ty == first).then_some(first)
    }
}
