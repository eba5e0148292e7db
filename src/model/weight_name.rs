//! A weight type in a file of settings: by its name, for serde's `with`.

use qpeft_kernels::weight::WeightType;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};

/// The name, or null.
///
/// # Errors
/// The serializer's.
pub fn serialize<S: Serializer>(value: &Option<WeightType>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(weight_type) => to.serialize_str(weight_type.name()),
        None => to.serialize_none(),
    }
}

/// The type with that name.
///
/// # Errors
/// It is not a text, or names no type in which weights can be written.
pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<WeightType>, D::Error> {
    let name: Option<String> = Option::deserialize(from)?;
    name.map(|name| name.parse().map_err(D::Error::custom)).transpose()
}
