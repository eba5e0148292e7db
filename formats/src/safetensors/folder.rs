//! Writes the weights of a checkpoint folder tensor by tensor: one file, or shards of a given size and their
//! index. Nothing but the tensor at hand is in memory.
//!
//! Space for the header is left free at the start of a file and filled when its tensors are known. Data of
//! a multiple of 8 bytes goes out at once; the few tensors of another length wait for the end of
//! their file, widest type first, so that every tensor lies at a multiple of its element size.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::shards::{INDEX, SINGLE};
use super::{Entry, TensorView, check};
use crate::error::{Error, Kind, Place, Result};
use crate::file::{AtomicFile, write_atomic};
use crate::limits::MAX_SAFETENSORS_HEADER;

/// Bytes of a shard where nothing else is asked for, as in transformers.
pub const SHARD_BYTES: u64 = 5_000_000_000;

/// Bytes of a tensor's description beside its name, at most: type, shape and offsets as numbers.
const DESCRIPTION: u64 = 160;

/// `{"__metadata__":{"format":"pt"}}`, rounded up.
const METADATA: u64 = 64;

/// Bytes of a header that describes tensors of these names.
pub fn header_bytes<'a>(names: impl IntoIterator<Item = &'a str>) -> u64 {
    let tensors: u64 = names.into_iter().map(|name| name.len() as u64 + DESCRIPTION).sum();
    (tensors + METADATA).min(MAX_SAFETENSORS_HEADER).next_multiple_of(8)
}

/// The weight files of a folder that is being written.
#[derive(Debug)]
pub struct FolderWriter {
    dir: PathBuf,
    shard_bytes: u64,
    header_bytes: u64,
    shard: Option<Shard>,
    /// Finished shards under their preliminary names, with their tensors.
    finished: Vec<(PathBuf, Vec<String>)>,
    seen: std::collections::BTreeSet<String>,
    total: u64,
}

/// A file that is being written.
#[derive(Debug)]
struct Shard {
    file: AtomicFile,
    entries: Vec<(String, Entry)>,
    /// Bytes of the header so far.
    described: u64,
    /// Bytes of data, with those that wait.
    len: u64,
    waiting: Vec<TensorView>,
}

impl FolderWriter {
    /// Starts to write into the folder `dir`, which exists and holds no weights.
    ///
    /// `header_bytes`: what is left free for the header, see [`header_bytes`]; where that is too
    /// little, a new shard begins.
    pub fn create(dir: &Path, shard_bytes: u64, header_bytes: u64) -> FolderWriter {
        FolderWriter {
            dir: dir.to_owned(),
            shard_bytes,
            header_bytes: header_bytes.next_multiple_of(8).max(METADATA + DESCRIPTION),
            shard: None,
            finished: Vec::new(),
            seen: std::collections::BTreeSet::new(),
            total: 0,
        }
    }

    /// Bytes of data written so far.
    pub fn total_bytes(&self) -> u64 {
        self.total
    }

    /// Appends a tensor.
    ///
    /// # Errors
    /// The name was written before or is reserved, the shape does not fit the data, or the disk is full.
    pub fn write(&mut self, tensor: &TensorView) -> Result<()> {
        let at = |e: Error| e.at(Place::Tensor(tensor.name.clone()));
        if tensor.name == "__metadata__" || !self.seen.insert(tensor.name.clone()) {
            return Err(at(Error::new(Kind::DuplicateTensor)));
        }
        let (len, description) = (tensor.bytes.len() as u64, tensor.name.len() as u64 + DESCRIPTION);
        if let Some(shard) = &self.shard
            && (shard.len + len > self.shard_bytes || shard.described + description > self.header_bytes)
        {
            self.close()?;
        }
        if self.shard.is_none() {
            self.shard = Some(Shard::create(&self.preliminary(), self.header_bytes)?);
        }
        let shard = self.shard.as_mut().expect("just created");
        shard.described += description;
        shard.len += len;
        self.total += len;
        if len.is_multiple_of(8) {
            shard.append(tensor)
        } else {
            shard.waiting.push(tensor.clone());
            Ok(())
        }
    }

    fn preliminary(&self) -> PathBuf {
        self.dir.join(format!("shard-{}.safetensors", self.finished.len() + 1))
    }

    fn close(&mut self) -> Result<()> {
        if let Some(shard) = self.shard.take() {
            let path = shard.file.path().to_owned();
            self.finished.push((path, shard.finish(self.header_bytes)?));
        }
        Ok(())
    }

    /// Gives the files their names and writes the index, if there are several.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn finish(mut self) -> Result<()> {
        if self.shard.is_none() && self.finished.is_empty() {
            self.shard = Some(Shard::create(&self.preliminary(), self.header_bytes)?);
        }
        self.close()?;
        let count = self.finished.len();
        let mut weight_map = BTreeMap::new();
        for (i, (path, names)) in self.finished.into_iter().enumerate() {
            let name = match count {
                1 => SINGLE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            let target = self.dir.join(&name);
            std::fs::rename(&path, &target).map_err(|e| Error::from(e).in_file(&target))?;
            weight_map.extend(names.into_iter().map(|tensor| (tensor, name.clone())));
        }
        if count > 1 {
            let index = json!({"metadata": {"total_size": self.total}, "weight_map": weight_map});
            let mut text = serde_json::to_vec_pretty(&index)?;
            text.push(b'\n');
            write_atomic(&self.dir.join(INDEX), &text)?;
        }
        Ok(())
    }
}

impl Shard {
    fn create(path: &Path, header_bytes: u64) -> Result<Shard> {
        let mut file = AtomicFile::create(path)?;
        file.write(&header_bytes.to_le_bytes())?;
        let blanks = [b' '; 4096];
        let mut left = header_bytes as usize;
        while left > 0 {
            let len = left.min(blanks.len());
            file.write(&blanks[..len])?;
            left -= len;
        }
        Ok(Shard { file, entries: Vec::new(), described: METADATA, len: 0, waiting: Vec::new() })
    }

    fn append(&mut self, tensor: &TensorView) -> Result<()> {
        let begin = self.entries.last().map_or(0, |(_, entry)| entry.end);
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        let entry = Entry { dtype, shape, begin, end: begin + tensor.bytes.len() };
        self.entries.push((tensor.name.clone(), entry));
        self.file.write(&tensor.bytes)
    }

    /// Writes what waits and the header; gives the names of the tensors.
    fn finish(mut self, header_bytes: u64) -> Result<Vec<String>> {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then(a.name.cmp(&b.name)));
        for tensor in &waiting {
            self.append(tensor)?;
        }
        check::tensors(&self.entries, self.len as usize)?;
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        for (name, entry) in &self.entries {
            let offsets = [entry.begin, entry.end];
            let info = json!({"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets});
            header.insert(name.clone(), info);
        }
        let header = Value::Object(header).to_string();
        if header.len() as u64 > header_bytes {
            // Only names that JSON has to escape can be longer than was planned.
            let (found, limit) = (header.len() as u64, header_bytes);
            return Err(Error::new(Kind::TooLong { what: "safetensors header", found, limit }));
        }
        self.file.rewrite(8, header.as_bytes())?;
        self.file.commit()?;
        Ok(self.entries.into_iter().map(|(name, _)| name).collect())
    }
}
