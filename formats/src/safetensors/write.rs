//! Tensors to the bytes of a safetensors file, atomically. Same tensors, same bytes: the order is that
//! of the reference implementation (widest type first, then by name) and metadata is sorted.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::{Dtype, Entry, check};
use crate::error::{Error, Kind, Place, Result};
use crate::file::AtomicFile;
use crate::limits::MAX_SAFETENSORS_HEADER;

/// A tensor to write: name, type, shape (slowest dimension first), little-endian data.
pub type TensorRef<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

/// Writes a safetensors file.
///
/// # Errors
/// A name appears twice or is reserved, a shape does not fit its data, or the file cannot be written.
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorRef<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut sorted: Vec<_> = tensors.to_vec();
    sorted.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let header = describe(&sorted, metadata).map_err(|e| e.in_file(path))?;
    let mut file = AtomicFile::create(path)?;
    file.write(&(header.len() as u64).to_le_bytes())?;
    file.write(header.as_bytes())?;
    for (_, _, _, bytes) in sorted {
        file.write(bytes)?;
    }
    file.commit()
}

/// Writes a safetensors file of F32 tensors: name, shape, elements.
///
/// # Errors
/// See [`write_safetensors`].
pub fn write_safetensors_f32<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let tensors: Vec<(&str, &[usize], Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, shape, data)| (name, shape, data.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let refs: Vec<TensorRef<'_>> =
        tensors.iter().map(|(name, shape, bytes)| (*name, Dtype::F32, *shape, bytes.as_slice())).collect();
    write_safetensors(path, &refs, metadata)
}

/// The header of tensors that are there.
fn describe(sorted: &[TensorRef<'_>], metadata: &BTreeMap<String, String>) -> Result<String> {
    let mut entries = Vec::with_capacity(sorted.len());
    let mut begin = 0;
    for (name, dtype, shape, bytes) in sorted {
        let end = begin + bytes.len();
        entries.push(((*name).to_owned(), Entry { dtype: *dtype, shape: shape.to_vec(), begin, end }));
        begin = end;
    }
    describe_entries(&entries, metadata)
}

/// The header, padded with spaces to a multiple of 8 bytes, so that the data is aligned.
pub(super) fn describe_entries(
    entries: &[(String, Entry)],
    metadata: &BTreeMap<String, String>,
) -> Result<String> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".to_owned(), json!(metadata));
    }
    for (name, entry) in entries {
        let offsets = [entry.begin, entry.end];
        let info = json!({"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets});
        if name == "__metadata__" || header.insert(name.clone(), info).is_some() {
            return Err(Error::new(Kind::DuplicateTensor).at(Place::Tensor(name.clone())));
        }
    }
    check::tensors(entries, entries.last().map_or(0, |(_, entry)| entry.end))?;
    let mut header = Value::Object(header).to_string();
    let padded = header.len().next_multiple_of(8);
    header.extend(std::iter::repeat_n(' ', padded - header.len()));
    if header.len() as u64 > MAX_SAFETENSORS_HEADER {
        let (found, limit) = (header.len() as u64, MAX_SAFETENSORS_HEADER);
        return Err(Error::new(Kind::TooLong { what: "safetensors header", found, limit }));
    }
    Ok(header)
}
