//! The safetensors header: 8 bytes of length, JSON, then the elements without gaps.
//!
//! Parsed here rather than by the `safetensors` crate (which the tests hold this parser against),
//! because an error should say which tensor is wrong and by how much, and because a tensor of an
//! unknown type must not make the others unreadable. Format: <https://github.com/huggingface/safetensors>.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::{TensorInfo, quoted};
use crate::error::{self, Error};

/// Bytes before the JSON.
pub(super) const LENGTH_BYTES: usize = 8;

/// The longest header that is read, as in the original implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most axes of a tensor; keeps a hostile shape out of the messages.
const MAX_AXES: usize = 16;

/// How long the JSON is, from the file's first eight bytes and its length.
pub(super) fn header_len(
    file: &str,
    start: [u8; LENGTH_BYTES],
    file_len: u64,
) -> error::Result<usize> {
    let len = u64::from_le_bytes(start);
    let room = file_len.saturating_sub(LENGTH_BYTES as u64);
    if len > room {
        return Err(invalid(
            file,
            format!("a header of {len} bytes in a file of {file_len} bytes"),
        ));
    }
    if len > MAX_HEADER_BYTES {
        let problem = format!("a header of {len} bytes; at most {MAX_HEADER_BYTES} are read");
        return Err(invalid(file, problem));
    }
    Ok(len as usize)
}

/// The tensors that the JSON lists, in the order of their elements; checked to fill the rest of
/// the file exactly.
pub(super) fn parse(
    file: &str,
    json: &[u8],
    file_len: u64,
    shard: usize,
) -> error::Result<Vec<TensorInfo>> {
    let header: UniqueMap<Entry> = serde_json::from_slice(json)
        .map_err(|source| Error::Json { file: file.to_owned(), source })?;
    let mut tensors: Vec<(String, Tensor)> = header
        .0
        .into_iter()
        .filter_map(|(name, entry)| match entry {
            Entry::Tensor(tensor) => Some((name, tensor)),
            Entry::Metadata => None,
        })
        .collect();
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);

    let data_start = (LENGTH_BYTES + json.len()) as u64;
    let data_len = file_len.saturating_sub(data_start);
    let mut expected_begin = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for (name, Tensor { dtype, shape, data_offsets: (begin, end) }) in tensors {
        let problem =
            |what: fmt::Arguments<'_>| invalid(file, format!("tensor {}: {what}", quoted(&name)));
        if shape.len() > MAX_AXES {
            return Err(problem(format_args!("{} axes; at most {MAX_AXES}", shape.len())));
        }
        if end < begin {
            return Err(problem(format_args!("offsets {begin} to {end} run backwards")));
        }
        if end > data_len {
            return Err(problem(format_args!(
                "offsets {begin} to {end} in a file with {data_len} bytes of elements"
            )));
        }
        // Matters where addresses have 32 bits.
        if isize::try_from(end - begin).is_err() {
            return Err(problem(format_args!("{} bytes; too large for this system", end - begin)));
        }
        if begin != expected_begin {
            let what = if begin < expected_begin { "overlap" } else { "gap" };
            return Err(problem(format_args!(
                "{what}: expected to begin at {expected_begin}, found {begin}"
            )));
        }
        expected_begin = end;
        if let Some(bits) = element_bits(&dtype) {
            let len = shape.iter().try_fold(bits, |len, &n| len.checked_mul(n as u64));
            if len != (end - begin).checked_mul(8) {
                return Err(problem(format_args!(
                    "shape {shape:?} of {dtype} does not take the {} bytes at {begin} to {end}",
                    end - begin
                )));
            }
        }
        let (offset, len_bytes) = (data_start + begin, end - begin);
        infos.push(TensorInfo { name, dtype, shape, len_bytes, offset, shard });
    }
    if expected_begin != data_len {
        return Err(invalid(
            file,
            format!("the tensors end at byte {expected_begin} of {data_len} bytes of elements"),
        ));
    }
    Ok(infos)
}

/// Bits an element; `None` for a name that this version does not know.
fn element_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ"
        | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

fn invalid(file: &str, problem: String) -> Error {
    Error::Safetensors { file: file.to_owned(), problem }
}

/// A header value: `__metadata__`, or a tensor.
enum Entry {
    Metadata,
    Tensor(Tensor),
}

#[derive(Deserialize)]
struct Tensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// A JSON object whose keys may not repeat: serde's maps would keep the last value silently.
pub(super) struct UniqueMap<V>(pub(super) Vec<(String, V)>);

/// A value whose form may depend on its key.
pub(super) trait MapValue: Sized {
    fn next<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> Result<Self, A::Error>;
}

impl MapValue for Entry {
    fn next<'de, A: MapAccess<'de>>(key: &str, map: &mut A) -> Result<Self, A::Error> {
        if key == "__metadata__" {
            map.next_value::<IgnoredAny>()?;
            Ok(Self::Metadata)
        } else {
            map.next_value().map(Self::Tensor)
        }
    }
}

impl MapValue for String {
    fn next<'de, A: MapAccess<'de>>(_: &str, map: &mut A) -> Result<Self, A::Error> {
        map.next_value()
    }
}

impl<'de, V: MapValue> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys<V>(PhantomData<V>);
        impl<'de, V: MapValue> Visitor<'de> for Keys<V> {
            type Value = UniqueMap<V>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut entries = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "key {} appears twice",
                            quoted(&key)
                        )));
                    }
                    let value = V::next(&key, &mut map)?;
                    entries.push((key, value));
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(Keys(PhantomData))
    }
}
