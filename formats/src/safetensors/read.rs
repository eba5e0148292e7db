//! Bytes of a safetensors file to its description.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Dtype, Entry, check};
use crate::bytes::Cursor;
use crate::error::{Error, Kind, Place, Result};
use crate::json::UniqueEntries;
use crate::limits::MAX_SAFETENSORS_HEADER;

/// Everything before the data, checked.
pub(crate) struct Header {
    pub tensors: BTreeMap<String, Entry>,
    pub metadata: BTreeMap<String, String>,
    pub data_start: usize,
}

/// A value of the header's object.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// Reads and checks the header, and that its tensors are exactly the data.
pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let cursor = &mut Cursor::new(bytes);
    let text =
        cursor.string("safetensors header", MAX_SAFETENSORS_HEADER).map_err(|e| e.at(Place::Header))?;
    let data_start = cursor.offset() as usize;
    let (tensors, metadata) = parse(text).map_err(|e| e.at(Place::Header))?;
    check::tensors(&tensors, bytes.len() - data_start)?;
    Ok(Header { tensors: tensors.into_iter().collect(), metadata, data_start })
}

type Parsed = (Vec<(String, Entry)>, BTreeMap<String, String>);

/// The tensors by offset, and the metadata.
fn parse(text: &str) -> Result<Parsed> {
    let UniqueEntries(entries) =
        serde_json::from_str::<UniqueEntries<Box<serde_json::value::RawValue>>>(text)?;
    let mut tensors = Vec::with_capacity(entries.len());
    let mut metadata = BTreeMap::new();
    for (name, raw) in entries {
        if name == "__metadata__" {
            let UniqueEntries(pairs) = serde_json::from_str::<UniqueEntries<String>>(raw.get())
                .map_err(|e| Error::from(e).at(Place::Key(name)))?;
            metadata = pairs.into_iter().collect();
            continue;
        }
        let info: Info = serde_json::from_str(raw.get())
            .map_err(|e| Error::new(Kind::Json(e)).at(Place::Tensor(name.clone())))?;
        let (begin, end) = info.data_offsets;
        tensors.push((name, Entry { dtype: info.dtype, shape: info.shape, begin, end }));
    }
    tensors.sort_by_key(|(_, entry)| (entry.begin, entry.end));
    Ok((tensors, metadata))
}
