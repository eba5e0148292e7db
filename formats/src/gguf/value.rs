//! Metadata of a GGUF file: typed values under string keys, in file order.

use indexmap::IndexMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Place, Result};

/// A metadata value; the variants are GGUF's thirteen types.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names are the format's own and say it all")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of one type. Arrays of arrays exist in the format's text, but no reader supports them.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the names are the format's own and say it all")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(Vec<String>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// The number of the array type; the others follow from the variants of [`Value`] and [`Array`].
pub(crate) const ARRAY_ID: u32 = 9;

impl Value {
    /// The number of the type in the file.
    pub(crate) fn type_id(&self) -> u32 {
        match self {
            Value::U8(_) => 0,
            Value::I8(_) => 1,
            Value::U16(_) => 2,
            Value::I16(_) => 3,
            Value::U32(_) => 4,
            Value::I32(_) => 5,
            Value::F32(_) => 6,
            Value::Bool(_) => 7,
            Value::String(_) => 8,
            Value::Array(_) => ARRAY_ID,
            Value::U64(_) => 10,
            Value::I64(_) => 11,
            Value::F64(_) => 12,
        }
    }

    /// The type in words: `u32`, `array of string`.
    pub fn type_name(&self) -> String {
        match self {
            Value::Array(array) => format!("array of {}", scalar_name(array.type_id())),
            scalar => scalar_name(scalar.type_id()).to_owned(),
        }
    }

    /// The value of an integer type.
    fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }
}

impl Array {
    /// The number of the element type in the file.
    pub(crate) fn type_id(&self) -> u32 {
        match self {
            Array::U8(_) => 0,
            Array::I8(_) => 1,
            Array::U16(_) => 2,
            Array::I16(_) => 3,
            Array::U32(_) => 4,
            Array::I32(_) => 5,
            Array::F32(_) => 6,
            Array::Bool(_) => 7,
            Array::String(_) => 8,
            Array::U64(_) => 10,
            Array::I64(_) => 11,
            Array::F64(_) => 12,
        }
    }

    /// Elements.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::String(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F64(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values of an integer type.
    fn as_integers(&self) -> Option<Vec<i128>> {
        fn wide<T: Copy + Into<i128>>(v: &[T]) -> Vec<i128> {
            v.iter().map(|&x| x.into()).collect()
        }
        Some(match self {
            Array::U8(v) => wide(v),
            Array::I8(v) => wide(v),
            Array::U16(v) => wide(v),
            Array::I16(v) => wide(v),
            Array::U32(v) => wide(v),
            Array::I32(v) => wide(v),
            Array::U64(v) => wide(v),
            Array::I64(v) => wide(v),
            _ => return None,
        })
    }
}

fn scalar_name(type_id: u32) -> &'static str {
    const NAMES: [&str; 13] =
        ["u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"];
    NAMES[type_id as usize]
}

/// Metadata keys and values in file order. Keys that nobody here knows stay where they are.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    entries: IndexMap<String, Value>,
    /// The file it was read from, for messages.
    origin: Option<PathBuf>,
}

impl PartialEq for Metadata {
    /// Same keys and values in the same order; where they came from does not count.
    fn eq(&self, other: &Metadata) -> bool {
        self.entries.len() == other.entries.len() && self.iter().eq(other.iter())
    }
}

impl Metadata {
    /// No keys.
    pub fn new() -> Metadata {
        Metadata::default()
    }

    pub(crate) fn set_origin(&mut self, path: &Path) {
        self.origin = Some(path.to_owned());
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// All keys and values, in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no keys.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Replaces the value where the key stands, or appends the key. Returns the value before.
    pub fn insert(&mut self, key: impl Into<String>, value: Value) -> Option<Value> {
        self.entries.insert(key.into(), value)
    }

    /// Takes a key out; the order of the others stays.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        self.entries.shift_remove(key)
    }

    fn error(&self, key: &str, kind: Kind) -> Error {
        let error = Error::new(kind).at(Place::Key(key.to_owned()));
        match &self.origin {
            Some(path) => error.in_file(path),
            None => error,
        }
    }

    fn wrong_type(&self, key: &str, expected: &'static str, found: &Value) -> Error {
        self.error(key, Kind::WrongValueType { expected, found: found.type_name().into() })
    }

    fn missing(&self, key: &str) -> Error {
        self.error(key, Kind::MissingKey)
    }

    fn narrow<T: TryFrom<i128>>(&self, key: &str, expected: &'static str, value: i128) -> Result<T> {
        T::try_from(value)
            .map_err(|_| self.error(key, Kind::ValueOutOfRange { expected, found: value.to_string().into() }))
    }

    fn integer<T: TryFrom<i128>>(&self, key: &str, expected: &'static str) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wide = value.as_integer().ok_or_else(|| self.wrong_type(key, expected, value))?;
        self.narrow(key, expected, wide).map(Some)
    }

    fn integers<T: TryFrom<i128>>(
        &self,
        key: &str,
        expected: &'static str,
        element: &'static str,
    ) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wide = match value {
            Value::Array(array) => array.as_integers(),
            _ => None,
        };
        let wide = wide.ok_or_else(|| self.wrong_type(key, expected, value))?;
        wide.into_iter().map(|v| self.narrow(key, element, v)).collect::<Result<_>>().map(Some)
    }

    /// A string, if the key exists.
    ///
    /// # Errors
    /// The value has another type. This holds for all getters here; those of integers take any integer
    /// type and refuse a value that does not fit.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "string", other)),
        }
    }

    /// An unsigned 32-bit integer, if the key exists.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        self.integer(key, "u32")
    }

    /// An unsigned 32-bit integer, or the first of a list of them, if the key exists: a value of all
    /// layers, or of the first.
    pub fn first_u32(&self, key: &str) -> Result<Option<u32>> {
        match self.get(key) {
            Some(Value::Array(_)) => Ok(self.u32s(key)?.and_then(|list| list.first().copied())),
            _ => self.u32(key),
        }
    }

    /// An unsigned 64-bit integer, if the key exists.
    pub fn u64(&self, key: &str) -> Result<Option<u64>> {
        self.integer(key, "u64")
    }

    /// A float, if the key exists; a double is rounded.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(v)) => Ok(Some(*v)),
            Some(Value::F64(v)) => Ok(Some(*v as f32)),
            Some(other) => Err(self.wrong_type(key, "f32", other)),
        }
    }

    /// A boolean, if the key exists.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(v)) => Ok(Some(*v)),
            Some(other) => Err(self.wrong_type(key, "bool", other)),
        }
    }

    /// A list of strings, if the key exists.
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::String(v))) => Ok(Some(v)),
            Some(other) => Err(self.wrong_type(key, "array of string", other)),
        }
    }

    /// A list of floats, if the key exists; doubles are rounded.
    pub fn f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(Array::F32(v))) => Ok(Some(v.clone())),
            Some(Value::Array(Array::F64(v))) => Ok(Some(v.iter().map(|&x| x as f32).collect())),
            Some(other) => Err(self.wrong_type(key, "array of f32", other)),
        }
    }

    /// A list of signed 32-bit integers, if the key exists.
    pub fn i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.integers(key, "array of i32", "i32")
    }

    /// A list of unsigned 32-bit integers, if the key exists.
    pub fn u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.integers(key, "array of u32", "u32")
    }

    /// A string that must be there.
    ///
    /// # Errors
    /// The key is missing or has another type. This holds for all `require` getters.
    pub fn require_str(&self, key: &str) -> Result<&str> {
        self.str(key)?.ok_or_else(|| self.missing(key))
    }

    /// An unsigned 32-bit integer that must be there.
    pub fn require_u32(&self, key: &str) -> Result<u32> {
        self.u32(key)?.ok_or_else(|| self.missing(key))
    }

    /// A float that must be there.
    pub fn require_f32(&self, key: &str) -> Result<f32> {
        self.f32(key)?.ok_or_else(|| self.missing(key))
    }

    /// A list of strings that must be there.
    pub fn require_strings(&self, key: &str) -> Result<&[String]> {
        self.strings(key)?.ok_or_else(|| self.missing(key))
    }
}
