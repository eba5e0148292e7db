//! What holds for every safetensors file: the reader and the writer both pass through here.

use super::Entry;
use crate::error::{Error, Kind, Place, Result};
use crate::limits;

/// Checks the tensors of a file, in the order of their offsets, against `data_len` bytes of data.
pub(crate) fn tensors(tensors: &[(String, Entry)], data_len: usize) -> Result<()> {
    if tensors.len() as u64 > limits::MAX_TENSORS {
        let found = tensors.len() as u64;
        return Err(Error::new(Kind::TooMany { what: "tensors", found, limit: limits::MAX_TENSORS }));
    }
    let mut expected = 0;
    for (name, entry) in tensors {
        let at = |kind| Error::new(kind).at(Place::Tensor(name.clone()));
        if name.is_empty() {
            return Err(at(Kind::EmptyTensorName));
        }
        if entry.begin != expected {
            return Err(at(Kind::WrongOffset { expected: expected as u64, found: entry.begin as u64 }));
        }
        let size = tensor_bytes(entry).map_err(|e| e.at(Place::Tensor(name.clone())))?;
        if entry.end.checked_sub(entry.begin) != Some(size) {
            let found = entry.end.saturating_sub(entry.begin) as u64;
            return Err(at(Kind::WrongLength { expected: size as u64, found }));
        }
        if entry.end > data_len {
            return Err(at(Kind::PastEnd { end: entry.end as u64, len: data_len as u64 }));
        }
        expected = entry.end;
    }
    if expected != data_len {
        return Err(Error::new(Kind::TrailingData { end: expected as u64, len: data_len as u64 }));
    }
    Ok(())
}

/// Bytes of a tensor.
fn tensor_bytes(entry: &Entry) -> Result<usize> {
    let bits = entry
        .shape
        .iter()
        .try_fold(1_usize, |product, &dim| product.checked_mul(dim))
        .and_then(|elements| elements.checked_mul(entry.dtype.bitsize()))
        .ok_or_else(|| Error::new(Kind::SizeOverflow { what: "tensor bytes" }))?;
    if !bits.is_multiple_of(8) {
        // A type of 4 or 6 bits whose elements do not fill whole bytes.
        return Err(Error::new(Kind::PartialBlock {
            dtype: "sub-byte",
            block_len: if entry.dtype.bitsize() == 4 { 2 } else { 4 },
            row_len: (bits / entry.dtype.bitsize()) as u64,
        }));
    }
    Ok(bits / 8)
}
