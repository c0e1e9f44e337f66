//! The typed key–value pairs of a GGUF header.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::error::{Error, Result};
use crate::format::{quoted, shortened};

/// A value as the file types it.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Unsigned, 8 bits.
    U8(u8),
    /// Signed, 8 bits.
    I8(i8),
    /// Unsigned, 16 bits.
    U16(u16),
    /// Signed, 16 bits.
    I16(i16),
    /// Unsigned, 32 bits.
    U32(u32),
    /// Signed, 32 bits.
    I32(i32),
    /// Unsigned, 64 bits.
    U64(u64),
    /// Signed, 64 bits.
    I64(i64),
    /// IEEE single.
    F32(f32),
    /// IEEE double.
    F64(f64),
    /// True or false.
    Bool(bool),
    /// Text.
    String(String),
    /// Several values of one type.
    Array(Array),
}

/// Several values of one type; arrays do not nest.
#[derive(Debug, Clone, PartialEq)]
pub enum Array {
    /// Unsigned, 8 bits.
    U8(Vec<u8>),
    /// Signed, 8 bits.
    I8(Vec<i8>),
    /// Unsigned, 16 bits.
    U16(Vec<u16>),
    /// Signed, 16 bits.
    I16(Vec<i16>),
    /// Unsigned, 32 bits.
    U32(Vec<u32>),
    /// Signed, 32 bits.
    I32(Vec<i32>),
    /// Unsigned, 64 bits.
    U64(Vec<u64>),
    /// Signed, 64 bits.
    I64(Vec<i64>),
    /// IEEE single.
    F32(Vec<f32>),
    /// IEEE double.
    F64(Vec<f64>),
    /// True or false.
    Bool(Vec<bool>),
    /// Text.
    String(Strings),
}

/// Many strings, one behind the other: what an array of strings takes in memory is what it takes
/// in the file, however short they are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Strings {
    text: String,
    /// Where each string ends in `text`.
    ends: Vec<usize>,
}

impl Strings {
    /// No strings, with room for `count` of together `len_bytes`.
    pub(super) fn with_capacity(count: usize, len_bytes: usize) -> Self {
        Self { text: String::with_capacity(len_bytes), ends: Vec::with_capacity(count) }
    }

    /// Adds a string at the end.
    pub fn push(&mut self, string: &str) {
        self.text.push_str(string);
        self.ends.push(self.text.len());
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// String `i`; `None` if there are not that many.
    pub fn get(&self, i: usize) -> Option<&str> {
        let end = *self.ends.get(i)?;
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        Some(&self.text[start..end])
    }

    /// All, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|i| self.get(i).expect("i is below the length"))
    }
}

impl<'a> FromIterator<&'a str> for Strings {
    fn from_iter<I: IntoIterator<Item = &'a str>>(strings: I) -> Self {
        let mut all = Self::default();
        strings.into_iter().for_each(|string| all.push(string));
        all
    }
}

impl Value {
    /// The number if it is an integer of any type.
    fn integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(value) => value.into(),
            Self::I8(value) => value.into(),
            Self::U16(value) => value.into(),
            Self::I16(value) => value.into(),
            Self::U32(value) => value.into(),
            Self::I32(value) => value.into(),
            Self::U64(value) => value.into(),
            Self::I64(value) => value.into(),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) | Self::Array(_) => {
                return None;
            }
        })
    }

    /// The value as a message shows it: type and value, on one line, of bounded length.
    fn shown(&self) -> String {
        match self {
            Self::F32(value) => format!("the float {value:?}"),
            Self::F64(value) => format!("the float {value:?}"),
            Self::Bool(value) => format!("{value}"),
            Self::String(value) => format!("the string {}", quoted(value)),
            Self::Array(array) => array.shown(),
            integer => integer.integer().map_or_else(String::new, |value| value.to_string()),
        }
    }
}

impl Array {
    /// How many values.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::I8(values) => values.len(),
            Self::U16(values) => values.len(),
            Self::I16(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::I32(values) => values.len(),
            Self::U64(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::Bool(values) => values.len(),
            Self::String(values) => values.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shown(&self) -> String {
        let kind = match self {
            Self::F32(_) | Self::F64(_) => "floats",
            Self::Bool(_) => "booleans",
            Self::String(_) => "strings",
            _ => "integers",
        };
        format!("an array of {} {kind}", self.len())
    }

    /// The values if they are integers of any type that all fit `T`.
    fn integers<T: TryFrom<i128>>(&self) -> Option<Vec<T>> {
        fn cast<V: Copy + Into<i128>, T: TryFrom<i128>>(values: &[V]) -> Option<Vec<T>> {
            values.iter().map(|&value| T::try_from(value.into()).ok()).collect()
        }
        match self {
            Self::U8(values) => cast(values),
            Self::I8(values) => cast(values),
            Self::U16(values) => cast(values),
            Self::I16(values) => cast(values),
            Self::U32(values) => cast(values),
            Self::I32(values) => cast(values),
            Self::U64(values) => cast(values),
            Self::I64(values) => cast(values),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) => None,
        }
    }
}

/// A type that [`Metadata::get`] gives.
pub trait FromValue<'a>: Sized {
    /// What a message says was expected.
    const EXPECTED: &'static str;

    /// `None` if the value is of another type or does not fit.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! integers {
    ($($ty:ty: $one:literal, $many:literal;)*) => {$(
        /// From an integer of any type: writers differ.
        impl FromValue<'_> for $ty {
            const EXPECTED: &'static str = $one;

            fn from_value(value: &Value) -> Option<Self> {
                value.integer()?.try_into().ok()
            }
        }

        /// From an array of integers of any type.
        impl FromValue<'_> for Vec<$ty> {
            const EXPECTED: &'static str = $many;

            fn from_value(value: &Value) -> Option<Self> {
                match value {
                    Value::Array(array) => array.integers(),
                    _ => None,
                }
            }
        }
    )*};
}

integers! {
    u32: "an integer from 0 to 4294967295", "an array of integers from 0 to 4294967295";
    i32: "an integer of 32 bits", "an array of integers of 32 bits";
    u64: "an integer from 0", "an array of integers from 0";
    usize: "an integer from 0", "an array of integers from 0";
}

impl FromValue<'_> for f64 {
    const EXPECTED: &'static str = "a float";

    fn from_value(value: &Value) -> Option<Self> {
        match *value {
            Value::F32(value) => Some(value.into()),
            Value::F64(value) => Some(value),
            _ => None,
        }
    }
}

/// A double is rounded.
impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = "a float";

    fn from_value(value: &Value) -> Option<Self> {
        match *value {
            Value::F32(value) => Some(value),
            Value::F64(value) => Some(value as f32),
            _ => None,
        }
    }
}

/// Doubles are rounded.
impl FromValue<'_> for Vec<f32> {
    const EXPECTED: &'static str = "an array of floats";

    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Array(Array::F32(values)) => Some(values.clone()),
            Value::Array(Array::F64(values)) => {
                Some(values.iter().map(|&value| value as f32).collect())
            }
            _ => None,
        }
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "true or false";

    fn from_value(value: &Value) -> Option<Self> {
        match *value {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string";

    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::String(value) => Some(value),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a Strings {
    const EXPECTED: &'static str = "an array of strings";

    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::Array(Array::String(values)) => Some(values),
            _ => None,
        }
    }
}

/// The key–value pairs of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    file: String,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(super) fn new(file: &str) -> Self {
        Self { file: file.to_owned(), values: BTreeMap::new() }
    }

    /// False if the key is already there.
    pub(super) fn insert(&mut self, key: &str, value: Value) -> bool {
        match self.values.entry(key.to_owned()) {
            Entry::Vacant(place) => {
                place.insert(value);
                true
            }
            Entry::Occupied(_) => false,
        }
    }

    /// The file it is from, for messages.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// All pairs, by key in alphabetical order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether there is a value of that key.
    pub fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// The value of a key; `None` if the file has none.
    ///
    /// # Errors
    /// If it is of another type, or an integer that does not fit.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else {
            return Ok(None);
        };
        let found = || self.error(key, T::EXPECTED, value.shown());
        T::from_value(value).map(Some).ok_or_else(found)
    }

    /// The value of a key that the file must have.
    ///
    /// # Errors
    /// If it has none, or as [`Metadata::get`].
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| self.error(key, T::EXPECTED, "nothing".to_owned()))
    }

    fn error(&self, key: &str, expected: &'static str, found: String) -> Error {
        // A key may begin with an architecture's name, which is from the file.
        let key = shortened(key).escape_debug().to_string();
        Error::Metadata { file: self.file.clone(), key, expected, found }
    }
}
