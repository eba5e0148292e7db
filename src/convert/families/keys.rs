//! One setting of `config.json` and its GGUF key, read in both directions.

use qpeft_formats::gguf::{Metadata, Value as GgufValue};
use serde_json::{Map, Value};

use super::{Dims, Family};
use crate::convert::settings::Settings;
use crate::error::{Error, Result};

/// A GGUF key (without the architecture) and where its value comes from.
#[derive(Debug, Clone, Copy)]
pub enum Key {
    /// An integer; several names in `config.json` are one setting.
    Size(&'static str, &'static [&'static str], Absent),
    /// A float.
    Float(&'static str, &'static str, Absent),
    /// `attention.key_length` and `attention.value_length`.
    HeadDim(Absent),
    /// What the rotary embedding needs; see [`super::rope`].
    Rope,
    /// `rope.dimension_count`: channels of a head that are rotated.
    RopeDims,
    /// `vocab_size`.
    VocabSize,
    /// `general.file_type`, which the writer of the file sets.
    FileType,
}

/// What a setting is where `config.json` does not have it (transformers' defaults).
#[derive(Debug, Clone, Copy)]
pub enum Absent {
    /// The setting must be there.
    Refused,
    /// This number; an explicit `null` is refused.
    Is(f64),
    /// The value of another GGUF key.
    Like(&'static str),
    /// The hidden size by the number of heads.
    PerHead,
    /// Four times the hidden size.
    FourHidden,
    /// 0, which in turn is written as `null`.
    Zero,
    /// The GGUF key is left out.
    Left,
}

/// A setting for which a GGUF architecture knows one value only.
#[derive(Debug, Clone, Copy)]
pub enum Fixed {
    /// Texts that mean the same; the first is written.
    Text(&'static str, &'static [&'static str]),
    /// A boolean.
    Flag(&'static str, bool),
}

impl Absent {
    /// The value where the setting is absent: none if the key is left out.
    fn value(self, family: &Family, config: &Settings, name: &str, so_far: &Metadata) -> Result<Option<f64>> {
        let earlier = |key: &str| -> Result<f64> { Ok(so_far.require_u32(&family.key(key))?.into()) };
        Ok(Some(match self {
            // The getter has the error for a missing key.
            Absent::Refused => config.require_number(name)?,
            Absent::Is(_) if config.is_null(name) => {
                return Err(config.wrong(name, "number", &Value::Null));
            }
            Absent::Is(value) => value,
            Absent::Like(key) => earlier(key)?,
            Absent::PerHead => {
                let heads = earlier("attention.head_count")?;
                if heads == 0.0 { 0.0 } else { (earlier("embedding_length")? / heads).floor() }
            }
            Absent::FourHidden => 4.0 * earlier("embedding_length")?,
            Absent::Zero => 0.0,
            Absent::Left => return Ok(None),
        }))
    }
}

impl Key {
    /// Adds the GGUF key of a setting; those of the rotary embedding are added elsewhere.
    ///
    /// # Errors
    /// The setting is missing, mistyped or too large.
    pub fn put(&self, family: &Family, config: &Settings, out: &mut Metadata) -> Result<()> {
        let size = |names: &[&str], absent: Absent, out: &Metadata| -> Result<Option<u32>> {
            for name in names {
                if let Some(size) = config.size(name)? {
                    return Ok(Some(size));
                }
            }
            let Some(value) = absent.value(family, config, names[0], out)? else { return Ok(None) };
            if value > f64::from(u32::MAX) {
                return Err(config.refuse(names[0], &format!("would be {value}, which is too large")));
            }
            Ok(Some(value as u32))
        };
        match *self {
            Key::Size(gguf, names, absent) => {
                if let Some(value) = size(names, absent, out)? {
                    out.insert(family.key(gguf), GgufValue::U32(value));
                }
            }
            Key::Float(gguf, name, absent) => {
                let value = match config.number(name)? {
                    Some(value) => Some(value),
                    None => absent.value(family, config, name, out)?,
                };
                if let Some(value) = value {
                    out.insert(family.key(gguf), GgufValue::F32(value as f32));
                }
            }
            Key::HeadDim(absent) => {
                if let Some(value) = size(&["head_dim"], absent, out)? {
                    out.insert(family.key("attention.key_length"), GgufValue::U32(value));
                    out.insert(family.key("attention.value_length"), GgufValue::U32(value));
                }
            }
            Key::VocabSize => {
                let value = config.require_size("vocab_size")?;
                out.insert(family.key("vocab_size"), GgufValue::U32(value));
            }
            Key::FileType => {
                out.insert("general.file_type", GgufValue::U32(0));
            }
            Key::Rope | Key::RopeDims => {}
        }
        Ok(())
    }

    /// Adds the setting of a GGUF key.
    ///
    /// # Errors
    /// The key is mistyped, or missing where transformers has no default that equals llama.cpp's.
    pub fn take(
        &self,
        family: &Family,
        metadata: &Metadata,
        dims: &Dims,
        out: &mut Map<String, Value>,
    ) -> Result<()> {
        match *self {
            Key::Size(gguf, names, absent) => {
                let value = match (metadata.u32(&family.key(gguf))?, absent) {
                    (Some(value), _) => value,
                    (None, Absent::Like(other)) => metadata.require_u32(&family.key(other))?,
                    (None, Absent::Left | Absent::Zero) => return Ok(()),
                    (None, _) => metadata.require_u32(&family.key(gguf))?,
                };
                let default = match absent {
                    Absent::Zero => value == 0,
                    Absent::FourHidden => u64::from(value) == 4 * dims.hidden,
                    _ => false,
                };
                for name in names {
                    let value = if default { Value::Null } else { Value::from(value) };
                    out.insert((*name).to_owned(), value);
                }
            }
            Key::Float(gguf, name, absent) => match (metadata.f32(&family.key(gguf))?, absent) {
                (Some(value), _) => {
                    out.insert(name.to_owned(), decimal(value));
                }
                (None, Absent::Left) => {}
                (None, _) => {
                    metadata.require_f32(&family.key(gguf))?;
                }
            },
            Key::HeadDim(_) => {
                out.insert("head_dim".to_owned(), Value::from(dims.head_dim));
            }
            Key::Rope | Key::RopeDims | Key::VocabSize | Key::FileType => {}
        }
        Ok(())
    }
}

impl Fixed {
    /// Refuses another value.
    ///
    /// # Errors
    /// The setting has one, or another type.
    pub fn check(&self, family: &Family, config: &Settings) -> Result<()> {
        let refuse = |key: &str, found: &str, supported: &str| {
            let arch = family.arch;
            let what = format!(
                "`{found}` has no place in a GGUF of architecture `{arch}`; supported: `{supported}`"
            );
            Err(config.refuse(key, &what))
        };
        match *self {
            Fixed::Text(key, values) => match config.text(key)? {
                Some(found) if !values.contains(&found) => refuse(key, found, values[0]),
                _ => Ok(()),
            },
            Fixed::Flag(key, value) => match config.flag(key)? {
                Some(found) if found != value => refuse(key, &found.to_string(), &value.to_string()),
                _ => Ok(()),
            },
        }
    }

    /// Writes the value.
    pub fn write(&self, out: &mut Map<String, Value>) {
        match *self {
            Fixed::Text(key, values) => out.insert(key.to_owned(), Value::from(values[0])),
            Fixed::Flag(key, value) => out.insert(key.to_owned(), Value::from(value)),
        };
    }
}

/// The shortest decimal number that is this f32: 1e-5, where its f64 would be 9.999999747378752e-6.
pub fn decimal(value: f32) -> Value {
    let shortest: f64 = value.to_string().parse().unwrap_or_else(|_| f64::from(value));
    Value::from(shortest)
}

/// The setting of every GGUF key of a family is refused where it is not finite.
///
/// # Errors
/// A float is not.
pub fn check_finite(metadata: &Metadata, place: &str) -> Result<()> {
    for (key, value) in metadata.iter() {
        if let GgufValue::F32(x) = value
            && !x.is_finite()
        {
            return Err(Error::refused(format!("`{place}`: key `{key}`: is {x}, expected a finite number")));
        }
    }
    Ok(())
}
