//! The GGUF form: per weight a tensor `<name>.in_sum2` (sums of squares, experts one after another) and
//! `<name>.counts` (how many vectors each expert saw), both F32. Importance is sum / count.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Contents, check};
use crate::dtype::GgmlType;
use crate::error::{Error, Kind, Place, Result};
use crate::file::Bytes;
use crate::gguf::{GgufFile, TensorInfo};

const SUMS: &str = ".in_sum2";
const COUNTS: &str = ".counts";

pub(super) fn read(path: &Path, bytes: Bytes) -> Result<Contents> {
    let file = GgufFile::from_bytes(path, bytes)?;
    let metadata = file.metadata();
    if let Some(found) = metadata.str("general.type")?
        && found != "imatrix"
    {
        let kind = Kind::NotImatrix { found: found.into() };
        return Err(Error::new(kind).at(Place::Key("general.type".to_owned())).in_file(path));
    }
    let mut entries = BTreeMap::new();
    for tensor in file.tensors() {
        let Some(name) = tensor.name.strip_suffix(SUMS) else {
            // Sums without counts are found from the other side.
            if let Some(name) = tensor.name.strip_suffix(COUNTS) {
                file.require(&format!("{name}{SUMS}"))?;
            }
            continue;
        };
        let counts = file.require(&format!("{name}{COUNTS}"))?;
        let (sums, counts) = (floats(&file, tensor)?, floats(&file, counts)?);
        let values = quotients(sums, &counts)
            .map_err(|kind| Error::new(kind).at(Place::Tensor(name.to_owned())).in_file(path))?;
        entries.insert(name.to_owned(), values);
    }
    metadata.require_u32("imatrix.chunk_size")?;
    let datasets = metadata.require_strings("imatrix.datasets")?.to_vec();
    Ok(Contents { entries, datasets, chunk_count: metadata.require_u32("imatrix.chunk_count")? })
}

/// The sums become the importance.
fn quotients(mut sums: Vec<f32>, counts: &[f32]) -> Result<Vec<f32>, Kind> {
    check("sum", &sums)?;
    check("count", counts)?;
    let (values, experts) = (sums.len() as u64, counts.len() as u64);
    if values == 0 || experts == 0 || !values.is_multiple_of(experts) {
        return Err(Kind::UnevenImportance { values, experts });
    }
    let row_len = sums.len() / counts.len();
    for (sums, count) in sums.chunks_exact_mut(row_len).zip(counts) {
        // Counts are whole numbers that were stored as floats.
        let count = count.round();
        for sum in sums {
            *sum = if count > 0.0 { *sum / count } else { 1.0 };
        }
    }
    Ok(sums)
}

fn floats(file: &GgufFile, tensor: &TensorInfo) -> Result<Vec<f32>> {
    if tensor.dtype != GgmlType::F32 {
        let kind = Kind::WrongTensorType { expected: "F32", found: tensor.dtype.name() };
        return Err(Error::new(kind).at(Place::Tensor(tensor.name.clone())).in_file(file.path()));
    }
    let bytes = file.bytes(tensor);
    Ok(bytes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)).collect())
}
