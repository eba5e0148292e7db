//! Bytes of a GGUF file to its description. Nothing is allocated for a count before the count has been
//! compared with the bytes that are left.

use super::layout::{align_up, tensor_bytes};
use super::value::ARRAY_ID;
use super::{Array, Header, Metadata, TensorInfo, Value, check};
use crate::bytes::Cursor;
use crate::dtype::GgmlType;
use crate::error::{Error, Kind, Place, Result};
use crate::limits::{self, MAX_METADATA_BYTES};

/// Least bytes of a key: length, one character, type, one byte of value.
const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;
/// Least bytes of a tensor description: length, one character, number of dimensions, type, offset.
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 4 + 8;

/// Reads and checks everything before the data, and that the data is there.
pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let cursor = &mut Cursor::new(bytes);
    let version = version(cursor).map_err(|e| e.at(Place::Header))?;
    let n_tensors =
        cursor.count("tensors", MIN_TENSOR_BYTES, limits::MAX_TENSORS).map_err(|e| e.at(Place::Header))?;
    let n_entries = cursor
        .count("metadata keys", MIN_ENTRY_BYTES, limits::MAX_METADATA_KEYS)
        .map_err(|e| e.at(Place::Header))?;

    let mut metadata = Metadata::new();
    for _ in 0..n_entries {
        entry(cursor, &mut metadata)?;
        let (found, limit) = (cursor.offset(), limits::MAX_METADATA_SECTION);
        if found > limit {
            return Err(cursor.error(Kind::TooLong { what: "metadata", found, limit }).at(Place::Header));
        }
    }
    let alignment = check::metadata(&metadata)?;

    let tensors = (0..n_tensors).map(|_| tensor(cursor)).collect::<Result<Vec<_>>>()?;
    let index = check::tensors(&tensors, alignment)?;
    let data_start = align_up(cursor.offset(), alignment)
        .ok_or_else(|| Error::new(Kind::SizeOverflow { what: "tensor offsets" }))?;
    check::data(&tensors, data_start, bytes.len() as u64)?;
    Ok(Header { version, alignment, metadata, tensors, index, data_start })
}

fn version(cursor: &mut Cursor) -> Result<u32> {
    let magic = cursor.array("magic")?;
    if magic != *super::MAGIC {
        return Err(Error::new(Kind::NotGguf { found: magic }).offset(0));
    }
    let offset = cursor.offset();
    let version = cursor.u32("version")?;
    match version {
        2 | 3 => Ok(version),
        // The magic reads the same in both byte orders; a small version number does not.
        found if found != 0 && found.trailing_zeros() >= 16 => {
            Err(Error::new(Kind::BigEndian).offset(offset))
        }
        found => Err(Error::new(Kind::UnsupportedVersion { found }).offset(offset)),
    }
}

fn entry(cursor: &mut Cursor, metadata: &mut Metadata) -> Result<()> {
    let offset = cursor.offset();
    let key = cursor.string("key", MAX_METADATA_BYTES).map_err(|e| e.at(Place::Header))?;
    let locate = |e: Error| e.at(Place::Key(key.to_owned())).offset(offset);
    let value = value(cursor).map_err(locate)?;
    check::entry(key, &value).map_err(locate)?;
    if metadata.insert(key, value).is_some() {
        return Err(locate(Error::new(Kind::DuplicateKey)));
    }
    Ok(())
}

fn value(cursor: &mut Cursor) -> Result<Value> {
    let offset = cursor.offset();
    let what = "value";
    Ok(match cursor.u32("value type")? {
        0 => Value::U8(u8::from_le_bytes(cursor.array(what)?)),
        1 => Value::I8(i8::from_le_bytes(cursor.array(what)?)),
        2 => Value::U16(u16::from_le_bytes(cursor.array(what)?)),
        3 => Value::I16(i16::from_le_bytes(cursor.array(what)?)),
        4 => Value::U32(u32::from_le_bytes(cursor.array(what)?)),
        5 => Value::I32(i32::from_le_bytes(cursor.array(what)?)),
        6 => Value::F32(f32::from_le_bytes(cursor.array(what)?)),
        7 => Value::Bool(cursor.array::<1>(what)? != [0]),
        8 => Value::String(cursor.string("string", MAX_METADATA_BYTES)?.to_owned()),
        ARRAY_ID => Value::Array(array(cursor)?),
        10 => Value::U64(u64::from_le_bytes(cursor.array(what)?)),
        11 => Value::I64(i64::from_le_bytes(cursor.array(what)?)),
        12 => Value::F64(f64::from_le_bytes(cursor.array(what)?)),
        found => return Err(Error::new(Kind::UnknownValueType { found }).offset(offset)),
    })
}

fn array(cursor: &mut Cursor) -> Result<Array> {
    let offset = cursor.offset();
    Ok(match cursor.u32("element type")? {
        0 => Array::U8(scalars(cursor, u8::from_le_bytes)?),
        1 => Array::I8(scalars(cursor, i8::from_le_bytes)?),
        2 => Array::U16(scalars(cursor, u16::from_le_bytes)?),
        3 => Array::I16(scalars(cursor, i16::from_le_bytes)?),
        4 => Array::U32(scalars(cursor, u32::from_le_bytes)?),
        5 => Array::I32(scalars(cursor, i32::from_le_bytes)?),
        6 => Array::F32(scalars(cursor, f32::from_le_bytes)?),
        7 => Array::Bool(scalars(cursor, |b: [u8; 1]| b != [0])?),
        8 => Array::String(strings(cursor)?),
        ARRAY_ID => return Err(Error::new(Kind::NestedArray).offset(offset)),
        10 => Array::U64(scalars(cursor, u64::from_le_bytes)?),
        11 => Array::I64(scalars(cursor, i64::from_le_bytes)?),
        12 => Array::F64(scalars(cursor, f64::from_le_bytes)?),
        found => return Err(Error::new(Kind::UnknownValueType { found }).offset(offset)),
    })
}

fn scalars<T, const N: usize>(cursor: &mut Cursor, from_le_bytes: fn([u8; N]) -> T) -> Result<Vec<T>> {
    let len = cursor.count("array elements", N as u64, MAX_METADATA_BYTES / N as u64)?;
    let bytes = cursor.take((len * N) as u64, "array")?;
    let (chunks, _) = bytes.as_chunks::<N>();
    Ok(chunks.iter().map(|&chunk| from_le_bytes(chunk)).collect())
}

fn strings(cursor: &mut Cursor) -> Result<Vec<String>> {
    let len = cursor.count("array elements", 8, MAX_METADATA_BYTES / 8)?;
    let mut strings = Vec::with_capacity(len.min(limits::MAX_RESERVED_STRINGS));
    for _ in 0..len {
        strings.push(cursor.string("string", MAX_METADATA_BYTES)?.to_owned());
    }
    Ok(strings)
}

fn tensor(cursor: &mut Cursor) -> Result<TensorInfo> {
    let start = cursor.offset();
    let name =
        cursor.string("tensor name", limits::MAX_TENSOR_NAME).map_err(|e| e.at(Place::Header))?.to_owned();
    let mut rest = || -> Result<(Vec<u64>, GgmlType, u64)> {
        let offset = cursor.offset();
        let dims = u64::from(cursor.u32("number of dimensions")?);
        if dims > limits::MAX_DIMS {
            return Err(Error::new(Kind::TooManyDims { found: dims, limit: limits::MAX_DIMS }).offset(offset));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for dim in 0..dims as usize {
            let offset = cursor.offset();
            let size = cursor.u64("dimension")?;
            let found = size.cast_signed();
            if found < 0 {
                return Err(Error::new(Kind::NegativeDim { dim, found }).offset(offset));
            }
            shape.push(size);
        }
        let offset = cursor.offset();
        let id = cursor.u32("tensor type")?;
        let ty = GgmlType::from_id(id)
            .ok_or_else(|| Error::new(Kind::UnknownTensorType { found: id }).offset(offset))?;
        Ok((shape, ty, cursor.u64("tensor offset")?))
    };
    let read =
        rest().and_then(|(shape, dtype, offset)| Ok((tensor_bytes(dtype, &shape)?, shape, dtype, offset)));
    match read {
        Ok((size, shape, dtype, offset)) => Ok(TensorInfo { name, shape, dtype, offset, size, file: 0 }),
        Err(e) => Err(e.at(Place::Tensor(name)).offset(start)),
    }
}
