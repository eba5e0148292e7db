//! The form before GGUF:
//!
//! ```text
//! entries i32
//! entries x (name length i32, name, calls i32, values i32, values x f32)
//! [chunks i32, [length i32, name of the text]]
//! ```
//!
//! Importance is value / calls, or the value itself without calls.

use std::collections::BTreeMap;

use super::{Contents, check};
use crate::bytes::Cursor;
use crate::error::{Error, Kind, Place, Result};
use crate::limits;

/// Least bytes of an entry: three numbers, one value.
const MIN_ENTRY_BYTES: u64 = 4 + 4 + 4 + 4;

pub(super) fn read(bytes: &[u8]) -> Result<Contents> {
    let cursor = &mut Cursor::new(bytes);
    let n_entries = count(cursor, "entries", MIN_ENTRY_BYTES)?;
    let mut entries = BTreeMap::new();
    for _ in 0..n_entries {
        let name = string(cursor, "tensor name", limits::MAX_TENSOR_NAME)?;
        let locate = |e: Error| e.at(Place::Tensor(name.clone()));
        let values = values(cursor).map_err(locate)?;
        if entries.insert(name.clone(), values).is_some() {
            return Err(locate(cursor.error(Kind::DuplicateTensor)));
        }
    }
    let mut contents = Contents { entries, ..Contents::default() };
    if cursor.left() > 0 {
        contents.chunk_count = cursor.u32("number of chunks")?.cast_signed().max(0) as u32;
    }
    if cursor.left() > 0 {
        let dataset = string(cursor, "name of the text", limits::MAX_METADATA_BYTES)?;
        contents.datasets.extend(Some(dataset).filter(|name| !name.is_empty()));
    }
    let (end, len) = (cursor.offset(), bytes.len() as u64);
    if end < len {
        return Err(Error::new(Kind::TrailingData { end, len }).offset(end));
    }
    Ok(contents)
}

fn values(cursor: &mut Cursor) -> Result<Vec<f32>> {
    let calls = cursor.u32("number of calls")?.cast_signed();
    let len = count(cursor, "values", 4)?;
    if len == 0 {
        return Err(cursor.error(Kind::UnevenImportance { values: 0, experts: 1 }));
    }
    let bytes = cursor.take(4 * len as u64, "values")?;
    let mut values: Vec<f32> = bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
    check("sum", &values).map_err(Error::new)?;
    if calls > 0 {
        for x in &mut values {
            *x /= calls as f32;
        }
    }
    Ok(values)
}

/// A number of things, each at least `min_bytes` long; a negative one is far too large.
fn count(cursor: &mut Cursor, what: &'static str, min_bytes: u64) -> Result<usize> {
    let offset = cursor.offset();
    let found = u64::from(cursor.u32(what)?);
    let limit = cursor.left() / min_bytes;
    if found > limit {
        return Err(Error::new(Kind::TooMany { what, found, limit }).offset(offset));
    }
    Ok(found as usize)
}

fn string(cursor: &mut Cursor, what: &'static str, limit: u64) -> Result<String> {
    let offset = cursor.offset();
    let found = u64::from(cursor.u32(what)?);
    if found > limit {
        return Err(Error::new(Kind::TooLong { what, found, limit }).offset(offset));
    }
    let bytes = cursor.take(found, what)?;
    // Some writers counted a closing zero.
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    String::from_utf8(bytes.to_vec()).map_err(|_| Error::new(Kind::NotUtf8 { what }).offset(offset))
}
