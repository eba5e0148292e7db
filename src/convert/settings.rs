//! `config.json` and its neighbours, read with types: every error names the file, the key and what was found.
//!
//! A key with the value `null` counts as absent, as transformers has it.

use std::path::{Path, PathBuf};

use qpeft_formats::error::{Error, Kind, Place};
use serde_json::{Map, Value};

use crate::error::Result;

/// The keys of one JSON object of a file.
#[derive(Debug, Clone)]
pub struct Settings {
    path: PathBuf,
    /// Names of the objects around this one, each with its dot.
    prefix: String,
    map: Map<String, Value>,
}

/// What an integer setting may be at most: GGUF keeps sizes in 32 bits.
const LARGEST: u64 = u32::MAX as u64;

impl Settings {
    /// The settings of a file whose content is already parsed.
    ///
    /// # Errors
    /// The content is not an object.
    pub fn new(path: &Path, content: Value) -> Result<Settings> {
        match content {
            Value::Object(map) => Ok(Settings { path: path.to_owned(), prefix: String::new(), map }),
            other => Err(Error::new(Kind::WrongSetting { expected: "JSON object", found: kind(&other) })
                .in_file(path)
                .into()),
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// It cannot be read, or is not a JSON object.
    pub fn read(path: &Path) -> Result<Settings> {
        Settings::new(path, qpeft_formats::json::read_json(path)?)
    }

    /// As [`Settings::read`]; no settings where there is no file.
    ///
    /// # Errors
    /// The file is there and cannot be read, or is not a JSON object.
    pub fn read_if_there(path: &Path) -> Result<Settings> {
        if path.is_file() {
            return Settings::read(path);
        }
        Settings::new(path, Value::Object(Map::new()))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all keys, in the order of the file.
    pub fn keys(&self) -> impl Iterator<Item = &String> {
        self.map.keys()
    }

    /// Takes over the keys of an inner object, which win over those that are there.
    ///
    /// # Errors
    /// `key` is not an object.
    pub fn flatten(&mut self, key: &str) -> Result<()> {
        if let Some(inner) = self.object(key)? {
            self.map.extend(inner.map);
        }
        Ok(())
    }

    /// The value of a key, unless it is `null`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether a key is there with the value `null`.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// The error of a key whose value is not what was expected.
    pub fn wrong(&self, key: &str, expected: &'static str, found: &Value) -> crate::error::Error {
        self.error(key, Kind::WrongSetting { expected, found: kind(found) })
    }

    fn error(&self, key: &str, kind: Kind) -> crate::error::Error {
        Error::new(kind).at(Place::Key(format!("{}{key}", self.prefix))).in_file(&self.path).into()
    }

    /// A refusal that names the file and the key.
    pub fn refuse(&self, key: &str, what: &str) -> crate::error::Error {
        crate::error::Error::refused(format!("`{}`: key `{}{key}`: {what}", self.path.display(), self.prefix))
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.wrong(key, expected, value))
    }

    /// A size: an integer from 0 to 2^32 - 1.
    ///
    /// # Errors
    /// The value has another type or is out of range. This holds for all getters here.
    pub fn size(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "number from 0 to 4294967295", |value| {
            value.as_u64().filter(|&n| n <= LARGEST).map(|n| n as u32)
        })
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "finite number", |value| value.as_f64().filter(|x| (*x as f32).is_finite()))
    }

    /// A list of finite numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.typed(key, "list of finite numbers", |value| {
            let each = |x: &Value| x.as_f64().map(|x| x as f32).filter(|x| x.is_finite());
            value.as_array()?.iter().map(each).collect()
        })
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "string", value))
    }

    /// A boolean.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "boolean", Value::as_bool)
    }

    /// An inner object.
    pub fn object(&self, key: &str) -> Result<Option<Settings>> {
        let inner = self.typed(key, "object", |value| value.as_object().cloned())?;
        let prefix = format!("{}{key}.", self.prefix);
        Ok(inner.map(|map| Settings { path: self.path.clone(), prefix, map }))
    }

    /// A size that must be there.
    ///
    /// # Errors
    /// The key is missing, or as for [`Settings::size`].
    pub fn require_size(&self, key: &str) -> Result<u32> {
        self.size(key)?.ok_or_else(|| self.error(key, Kind::MissingKey))
    }

    /// A number that must be there.
    ///
    /// # Errors
    /// The key is missing, or as for [`Settings::number`].
    pub fn require_number(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.error(key, Kind::MissingKey))
    }
}

/// A value in a message: itself if short, its type otherwise.
fn kind(value: &Value) -> Box<str> {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()).into(),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.len() > 60 => "a long string".into(),
        other => format!("`{other}`").into(),
    }
}
