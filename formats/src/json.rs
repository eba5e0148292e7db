//! JSON files with a size cap and errors that name the file, and objects in which no key may appear twice.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};

use crate::error::{Error, Kind, Result};
use crate::limits::MAX_JSON_BYTES;

/// Reads a JSON file.
///
/// # Errors
/// The file cannot be read, is far too long, or is not JSON of this type; or an object in it has a key
/// twice.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let read = || -> Result<T> {
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(Error::new(Kind::NotAFile));
        }
        let mut bytes = Vec::new();
        file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_JSON_BYTES {
            let found = bytes.len() as u64;
            return Err(Error::new(Kind::TooLong { what: "JSON file", found, limit: MAX_JSON_BYTES }));
        }
        serde_json::from_slice::<Unique>(&bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    read().map_err(|e| e.in_file(path))
}

/// Any JSON in which no object has a key twice; what it says is not kept.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Unique;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any value")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Unique, A::Error> {
                UniqueEntries::<Unique>::collect(map).map(|_| Unique)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Unique, A::Error> {
                while list.next_element::<Unique>()?.is_some() {}
                Ok(Unique)
            }

            fn visit_bool<E>(self, _: bool) -> Result<Unique, E> {
                Ok(Unique)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Unique, E> {
                Ok(Unique)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Unique, E> {
                Ok(Unique)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Unique, E> {
                Ok(Unique)
            }

            fn visit_str<E>(self, _: &str) -> Result<Unique, E> {
                Ok(Unique)
            }

            fn visit_unit<E>(self) -> Result<Unique, E> {
                Ok(Unique)
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// The entries of a JSON object in file order; a repeated key is an error, where serde's maps would
/// keep the last value in silence.
#[derive(Debug)]
pub(crate) struct UniqueEntries<T>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> UniqueEntries<T> {
    fn collect<A: MapAccess<'de>>(mut map: A) -> Result<Self, A::Error> {
        let mut seen = HashSet::new();
        let mut entries = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, T>()? {
            if !seen.insert(key.clone()) {
                return Err(de::Error::custom(format_args!("key `{key}` appears twice")));
            }
            entries.push((key, value));
        }
        Ok(UniqueEntries(entries))
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueEntries<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = UniqueEntries<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                UniqueEntries::collect(map)
            }
        }

        deserializer.deserialize_map(Entries(PhantomData))
    }
}
