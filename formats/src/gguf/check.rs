//! What holds for every GGUF file: the reader and the writer both pass through here.

use std::collections::{HashMap, HashSet};

use super::layout::{DEFAULT_ALIGNMENT, Layout};
use super::{Metadata, TensorInfo, Value, split};
use crate::error::{Error, Kind, Place, Result};
use crate::limits;

/// Checks a key and its value.
pub(crate) fn entry(key: &str, value: &Value) -> Result<()> {
    let at = |kind| Err(Error::new(kind).at(Place::Key(key.to_owned())));
    let too_long = |what, found: usize| {
        (found as u64 > limits::MAX_METADATA_BYTES).then_some(Kind::TooLong {
            what,
            found: found as u64,
            limit: limits::MAX_METADATA_BYTES,
        })
    };
    if key.is_empty() {
        return at(Kind::EmptyKey);
    }
    if let Some(kind) = too_long("key", key.len()) {
        return at(kind);
    }
    match (key, value) {
        (ALIGNMENT, Value::U32(found)) => {
            let found = u64::from(*found);
            if !found.is_power_of_two() || found > limits::MAX_ALIGNMENT {
                return at(Kind::BadAlignment { found, limit: limits::MAX_ALIGNMENT });
            }
        }
        (ALIGNMENT, other) => {
            return at(Kind::WrongValueType { expected: "u32", found: other.type_name().into() });
        }
        (_, Value::String(s)) => {
            if let Some(kind) = too_long("string", s.len()) {
                return at(kind);
            }
        }
        _ => {}
    }
    Ok(())
}

const ALIGNMENT: &str = "general.alignment";

/// Checks what concerns the file as a whole and returns its alignment.
pub(crate) fn metadata(metadata: &Metadata) -> Result<u64> {
    for (key, value) in metadata.iter() {
        entry(key, value)?;
    }
    split::Part::read(metadata)?;
    Ok(metadata.u64(ALIGNMENT)?.unwrap_or(DEFAULT_ALIGNMENT))
}

/// Checks names, shapes, types and offsets; returns the position of every name.
pub(crate) fn tensors(tensors: &[TensorInfo], alignment: u64) -> Result<HashMap<String, usize>> {
    let mut index = HashMap::new();
    let mut layout = Layout::new(alignment);
    for (i, tensor) in tensors.iter().enumerate() {
        let at = |kind| Error::new(kind).at(Place::Tensor(tensor.name.clone()));
        if tensor.name.is_empty() {
            return Err(at(Kind::EmptyTensorName));
        }
        let name_len = tensor.name.len() as u64;
        if name_len > limits::MAX_TENSOR_NAME {
            let limit = limits::MAX_TENSOR_NAME;
            return Err(at(Kind::TooLong { what: "tensor name", found: name_len, limit }));
        }
        if index.insert(tensor.name.clone(), i).is_some() {
            return Err(at(Kind::DuplicateTensor));
        }
        let dims = tensor.shape.len() as u64;
        if dims > limits::MAX_DIMS {
            return Err(at(Kind::TooManyDims { found: dims, limit: limits::MAX_DIMS }));
        }
        let extent =
            layout.push(tensor.dtype, &tensor.shape).map_err(|e| e.at(Place::Tensor(tensor.name.clone())))?;
        if tensor.offset != extent.offset {
            return Err(at(Kind::WrongOffset { expected: extent.offset, found: tensor.offset }));
        }
        debug_assert_eq!(tensor.size, extent.size, "sizes come from the layout");
    }
    Ok(index)
}

/// Checks that no name appears twice.
pub(crate) fn names<'a>(names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(Error::new(Kind::DuplicateTensor).at(Place::Tensor(name.to_owned())));
        }
    }
    Ok(())
}

/// Checks that every tensor's data lies in a file of `len` bytes whose data section starts at `start`.
pub(crate) fn data(tensors: &[TensorInfo], start: u64, len: u64) -> Result<()> {
    for tensor in tensors.iter().filter(|t| t.size > 0) {
        let at = |kind| Error::new(kind).at(Place::Tensor(tensor.name.clone()));
        let end = start
            .checked_add(tensor.offset)
            .and_then(|offset| offset.checked_add(tensor.size))
            .ok_or_else(|| at(Kind::SizeOverflow { what: "tensor offsets" }))?;
        if end > len {
            return Err(at(Kind::PastEnd { end, len }));
        }
    }
    Ok(())
}
