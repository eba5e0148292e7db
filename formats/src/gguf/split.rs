//! Models in several GGUF files: their names, the three keys that number them, and how they become one.
//!
//! `NAME-00001-of-00003.gguf` and so on; the first has the metadata of the model, every one has
//! `split.no` (u16, from 0), `split.count` (u16) and `split.tensors.count` (i32, of all files). Source:
//! llama.cpp's gguf-split tool and model loader, by fact.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::layout::{DEFAULT_ALIGNMENT, align_up, tensor_bytes};
use super::{GgufFile, Metadata, TensorDecl, Value};
use crate::error::{Error, Kind, Place, Result};
use crate::file::Bytes;

const NO: &str = "split.no";
const COUNT: &str = "split.count";
const TENSORS: &str = "split.tensors.count";

/// What a file says of its place in a split model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    no: Option<u64>,
    count: Option<u64>,
    tensors: Option<u64>,
}

impl Part {
    pub(super) fn read(metadata: &Metadata) -> Result<Part> {
        Ok(Part { no: metadata.u64(NO)?, count: metadata.u64(COUNT)?, tensors: metadata.u64(TENSORS)? })
    }

    /// The number of files, if there are several.
    fn several(self) -> Option<u64> {
        self.count.filter(|&count| count > 1)
    }
}

fn at(key: &str, kind: Kind) -> Error {
    Error::new(kind).at(Place::Key(key.to_owned()))
}

/// Refuses metadata that belong to one of several files.
pub(super) fn refuse(metadata: &Metadata) -> Result<()> {
    let part = Part::read(metadata)?;
    match part.several() {
        None => Ok(()),
        Some(count) => {
            Err(at(COUNT, Kind::SplitFile { number: part.no.unwrap_or(0).saturating_add(1), count }))
        }
    }
}

/// Without the keys of a split.
pub fn remove_keys(metadata: &mut Metadata) {
    for key in [NO, COUNT, TENSORS] {
        metadata.remove(key);
    }
}

/// The name of file `no` (from 0) of `count`, for a model that is `path` (`NAME.gguf`) as a single file.
pub fn part_path(path: &Path, no: usize, count: usize) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".gguf").unwrap_or(&name);
    path.with_file_name(format!("{name}-{:05}-of-{count:05}.gguf", no + 1))
}

/// The files of the model that `path` is, or is the first file of, by its name alone.
pub fn part_paths(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let counted = name.strip_suffix(".gguf").and_then(|name| name.rsplit_once("-00001-of-"));
    let digits = counted.filter(|(_, count)| count.len() == 5 && count.bytes().all(|b| b.is_ascii_digit()));
    match digits.and_then(|(stem, count)| Some((stem, count.parse().ok().filter(|&n: &usize| n > 0)?))) {
        Some((stem, count)) => {
            let whole = path.with_file_name(format!("{stem}.gguf"));
            (0..count).map(|no| part_path(&whole, no, count)).collect()
        }
        None => vec![path.to_owned()],
    }
}

/// Opens the other files of the split model that `first` is the first of; a single file stays as it is.
pub(super) fn join(first: GgufFile) -> Result<GgufFile> {
    let part = Part::read(first.metadata())?;
    let Some(count) = part.several() else { return Ok(first) };
    let path = first.path().to_owned();
    let number = part.no.map_or(1, |no| no.saturating_add(1));
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.strip_suffix(&format!("-00001-of-{count:05}.gguf")).filter(|_| number == 1);
    let Some(stem) = stem else {
        return Err(at(COUNT, Kind::SplitFile { number, count }).in_file(&path));
    };
    let whole = path.with_file_name(format!("{stem}.gguf"));

    let mut joined = first;
    for no in 1..count {
        let next = part_path(&whole, no as usize, count as usize);
        let shard = next.file_name().unwrap_or_default().to_string_lossy();
        if !next.exists() {
            return Err(at(COUNT, Kind::MissingShard { shard: shard.as_ref().into() }).in_file(&path));
        }
        let file = GgufFile::single(&next, Bytes::map(&next)?)?;
        let found = Part::read(file.metadata())?;
        for (key, expected, found) in [
            (NO, Some(no), found.no),
            (COUNT, Some(count), found.count),
            (TENSORS, part.tensors, found.tensors),
        ] {
            match (expected, found) {
                (Some(expected), Some(found)) if expected != found => {
                    return Err(at(key, Kind::WrongPart { expected, found }).in_file(&next));
                }
                (Some(_), None) => return Err(at(key, Kind::MissingKey).in_file(&next)),
                _ => {}
            }
        }
        let index = joined.parts.len();
        for mut tensor in file.header.tensors {
            tensor.file = index;
            if let Some(&first) = joined.header.index.get(&tensor.name) {
                let first = joined.parts[joined.header.tensors[first].file].path.file_name();
                let first = first.unwrap_or_default().to_string_lossy().as_ref().into();
                let kind = Kind::TensorInTwoShards { first, second: shard.as_ref().into() };
                return Err(Error::new(kind).at(Place::Tensor(tensor.name)).in_file(&path));
            }
            joined.header.index.insert(tensor.name.clone(), joined.header.tensors.len());
            joined.header.tensors.push(tensor);
        }
        joined.parts.extend(file.parts);
    }
    let found = joined.header.tensors.len() as u64;
    if let Some(expected) = part.tensors
        && expected != found
    {
        return Err(at(TENSORS, Kind::WrongTensorCount { expected, found }).in_file(&path));
    }
    remove_keys(&mut joined.header.metadata);
    Ok(joined)
}

/// How a model is cut into files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitLimit {
    /// Bytes of tensor data in a file; a larger tensor gets a file of its own.
    Bytes(u64),
    /// Tensors in a file.
    Tensors(usize),
}

impl SplitLimit {
    /// The tensors of each file; at least one file, and at least one tensor in each but an only one.
    ///
    /// # Errors
    /// The size of a tensor overflows, or a row is not a whole number of blocks.
    pub fn plan(self, tensors: &[TensorDecl]) -> Result<Vec<Range<usize>>> {
        let (mut plan, mut start, mut bytes) = (Vec::new(), 0, 0_u64);
        for (i, tensor) in tensors.iter().enumerate() {
            let size = tensor_bytes(tensor.dtype, &tensor.shape)
                .and_then(|size| {
                    align_up(size, DEFAULT_ALIGNMENT)
                        .ok_or_else(|| Error::new(Kind::SizeOverflow { what: "tensor bytes" }))
                })
                .map_err(|e| e.at(Place::Tensor(tensor.name.clone())))?;
            let is_full = match self {
                SplitLimit::Bytes(limit) => bytes.saturating_add(size) > limit,
                SplitLimit::Tensors(limit) => i - start >= limit.max(1),
            };
            if is_full && i > start {
                plan.push(start..i);
                (start, bytes) = (i, 0);
            }
            bytes = bytes.saturating_add(size);
        }
        plan.push(start..tensors.len());
        Ok(plan)
    }
}

/// The metadata of file `no`: the model's in the first, and the keys of the split.
pub(super) fn metadata(model: &Metadata, no: usize, count: usize, tensors: usize) -> Result<Metadata> {
    let mut metadata = if no == 0 { model.clone() } else { Metadata::new() };
    remove_keys(&mut metadata);
    let limit = u64::from(u16::MAX);
    let too_many = Kind::TooMany { what: "files of a split model", found: count as u64, limit };
    let count = u16::try_from(count).map_err(|_| at(COUNT, too_many))?;
    metadata.insert(NO, Value::U16(no as u16));
    // A file holds less tensors than 2^31 (see `limits`).
    metadata.insert(TENSORS, Value::I32(tensors as i32));
    metadata.insert(COUNT, Value::U16(count));
    Ok(metadata)
}
