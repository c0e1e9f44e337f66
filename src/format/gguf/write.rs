//! Writing GGUF files, tensor data piece by piece.

use std::collections::{HashSet, VecDeque};
use std::io::{self, Write};

use super::{ALIGNMENT_KEY, Array, DEFAULT_ALIGNMENT, MAGIC, MAX_AXES, Strings, Value, value_type};
use crate::format::ggml::GgmlType;
use crate::format::quoted;

const VERSION: u32 = 3;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorPlan {
    /// Its name.
    pub name: String,
    /// Its element type.
    pub ty: GgmlType,
    /// Row-major shape, last axis contiguous.
    pub shape: Vec<usize>,
}

/// Writes a GGUF file of version 3: the header at once, then the tensors' bytes in the order of
/// their plans, in pieces of any size. Nothing is kept but the header while it is made.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    /// Name and bytes still to come, of the tensors that are not complete.
    open: VecDeque<(String, u64)>,
    /// In the data section, after the last byte written.
    position: u64,
}

impl<W: Write> Writer<W> {
    /// Writes the header. `keys` are written in their order; tensors are aligned to 32 bytes.
    ///
    /// # Errors
    /// `InvalidInput` if a key or tensor appears twice, `general.alignment` is among the keys, or a
    /// shape is empty in some dimension, has more than four, or has rows that are not whole blocks
    /// of the type. Else if `out` cannot be written.
    pub fn new(mut out: W, keys: &[(&str, Value)], tensors: &[TensorPlan]) -> io::Result<Self> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((keys.len() as u64).to_le_bytes());
        let mut names = HashSet::new();
        for &(key, ref value) in keys {
            if key == ALIGNMENT_KEY || !names.insert(key) {
                return Err(invalid(format!("key {} cannot be written again", quoted(key))));
            }
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        names.clear();
        let mut open = VecDeque::with_capacity(tensors.len());
        let mut offset = 0u64;
        for TensorPlan { name, ty, shape } in tensors {
            let len = ty.len_bytes(shape).filter(|_| !shape.contains(&0));
            let axes = u32::try_from(shape.len()).ok().filter(|&axes| axes <= MAX_AXES);
            // Where the next one begins, which must be a number too.
            let end = len.and_then(|len| {
                offset.checked_add(len)?.checked_next_multiple_of(DEFAULT_ALIGNMENT)
            });
            let (Some(len), Some(axes), Some(end)) = (len, axes, end) else {
                let (name, ty) = (quoted(name), ty.name());
                return Err(invalid(format!("tensor {name}: no {ty} of shape {shape:?}")));
            };
            if !names.insert(name) {
                return Err(invalid(format!("tensor {} appears twice", quoted(name))));
            }
            put_string(&mut header, name);
            header.extend(axes.to_le_bytes());
            // The file has the fastest axis first.
            for &n in shape.iter().rev() {
                header.extend((n as u64).to_le_bytes());
            }
            header.extend(ty.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            open.push_back((name.clone(), len));
            offset = end;
        }
        header.resize(header.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
        out.write_all(&header)?;
        Ok(Self { out, open, position: 0 })
    }

    /// Writes the next bytes of the tensor whose turn it is, and the padding after its last.
    ///
    /// # Errors
    /// `InvalidInput` if all tensors are complete, or it has not that many bytes left. Else if they
    /// cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = bytes.len() as u64;
        let Some((name, left)) = self.open.front_mut() else {
            return Err(invalid(format!("{len} bytes after the last tensor")));
        };
        let Some(rest) = left.checked_sub(len) else {
            let name = quoted(name);
            return Err(invalid(format!("tensor {name}: {len} bytes where {left} are left")));
        };
        self.out.write_all(bytes)?;
        self.position += len;
        *left = rest;
        if rest == 0 {
            let padding = self.position.next_multiple_of(DEFAULT_ALIGNMENT) - self.position;
            self.out.write_all(&[0; DEFAULT_ALIGNMENT as usize][..padding as usize])?;
            self.position += padding;
            self.open.pop_front();
        }
        Ok(())
    }

    /// Ends the file and returns what it was written to, flushed.
    ///
    /// # Errors
    /// `InvalidInput` if a tensor is not complete; else if `out` cannot be flushed.
    pub fn finish(mut self) -> io::Result<W> {
        if let Some((name, left)) = self.open.front() {
            return Err(invalid(format!("tensor {}: {left} bytes are missing", quoted(name))));
        }
        self.out.flush()?;
        Ok(self.out)
    }
}

fn invalid(problem: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, problem)
}

fn put_string(out: &mut Vec<u8>, string: &str) {
    out.extend((string.len() as u64).to_le_bytes());
    out.extend(string.as_bytes());
}

/// Type and value.
fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |ty: u32, bytes: &[u8]| {
        out.extend(ty.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U8(value) => put(value_type::U8, &value.to_le_bytes()),
        Value::I8(value) => put(value_type::I8, &value.to_le_bytes()),
        Value::U16(value) => put(value_type::U16, &value.to_le_bytes()),
        Value::I16(value) => put(value_type::I16, &value.to_le_bytes()),
        Value::U32(value) => put(value_type::U32, &value.to_le_bytes()),
        Value::I32(value) => put(value_type::I32, &value.to_le_bytes()),
        Value::U64(value) => put(value_type::U64, &value.to_le_bytes()),
        Value::I64(value) => put(value_type::I64, &value.to_le_bytes()),
        Value::F32(value) => put(value_type::F32, &value.to_le_bytes()),
        Value::F64(value) => put(value_type::F64, &value.to_le_bytes()),
        Value::Bool(value) => put(value_type::BOOL, &[u8::from(*value)]),
        Value::String(value) => {
            put(value_type::STRING, &[]);
            put_string(out, value);
        }
        Value::Array(array) => {
            put(value_type::ARRAY, &[]);
            put_array(out, array);
        }
    }
}

/// Element type, count and elements.
fn put_array(out: &mut Vec<u8>, array: &Array) {
    match array {
        Array::U8(values) => put_numbers(out, value_type::U8, values, |value| value.to_le_bytes()),
        Array::I8(values) => put_numbers(out, value_type::I8, values, |value| value.to_le_bytes()),
        Array::U16(values) => {
            put_numbers(out, value_type::U16, values, |value| value.to_le_bytes());
        }
        Array::I16(values) => {
            put_numbers(out, value_type::I16, values, |value| value.to_le_bytes());
        }
        Array::U32(values) => {
            put_numbers(out, value_type::U32, values, |value| value.to_le_bytes());
        }
        Array::I32(values) => {
            put_numbers(out, value_type::I32, values, |value| value.to_le_bytes());
        }
        Array::U64(values) => {
            put_numbers(out, value_type::U64, values, |value| value.to_le_bytes());
        }
        Array::I64(values) => {
            put_numbers(out, value_type::I64, values, |value| value.to_le_bytes());
        }
        Array::F32(values) => {
            put_numbers(out, value_type::F32, values, |value| value.to_le_bytes());
        }
        Array::F64(values) => {
            put_numbers(out, value_type::F64, values, |value| value.to_le_bytes());
        }
        Array::Bool(values) => {
            put_numbers(out, value_type::BOOL, values, |&value| [u8::from(value)]);
        }
        Array::String(values) => put_strings(out, values),
    }
}

fn put_numbers<T, const SIZE: usize>(
    out: &mut Vec<u8>,
    element_type: u32,
    values: &[T],
    to_le_bytes: impl Fn(&T) -> [u8; SIZE],
) {
    out.extend(element_type.to_le_bytes());
    out.extend((values.len() as u64).to_le_bytes());
    out.extend(values.iter().flat_map(to_le_bytes));
}

fn put_strings(out: &mut Vec<u8>, strings: &Strings) {
    out.extend(value_type::STRING.to_le_bytes());
    out.extend((strings.len() as u64).to_le_bytes());
    strings.iter().for_each(|string| put_string(out, string));
}
