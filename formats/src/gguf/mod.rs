//! GGUF: one file with metadata, tensor descriptions and tensor data, as llama.cpp reads it.
//!
//! ```text
//! "GGUF"  version u32  tensors i64  keys i64
//! keys     x (key string, type u32, [element type u32, count u64], value)
//! tensors  x (name string, dims u32, dims x i64, type u32, offset u64)
//! padding to `general.alignment` (32 if absent)
//! data     of each tensor, in order, each padded to the alignment
//! ```
//!
//! Little-endian; a string is a u64 length and UTF-8 bytes. Shapes start with the row length, so a
//! Linear weight of `out` rows and `in` columns has the shape `[in, out]`. Offsets count from the start
//! of the data. Versions 2 and 3 (which differ only in that 3 may be big-endian) are read, version 3 is
//! written. Source: `docs/gguf.md` of ggml, and the checks of llama.cpp's `gguf.cpp`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

mod check;
pub mod layout;
pub mod names;
mod read;
pub mod split;
pub mod value;
mod write;

use crate::dtype::GgmlType;
use crate::error::{Error, Kind, Place, Result};
use crate::file::{self, Bytes};
pub use value::{Array, Metadata, Value};
pub use write::{GgufWriter, TensorDecl};

const MAGIC: &[u8; 4] = b"GGUF";

/// Everything before the data, checked.
#[derive(Debug, Clone)]
struct Header {
    version: u32,
    alignment: u64,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    index: HashMap<String, usize>,
    data_start: u64,
}

/// One tensor as the file describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name: `blk.0.attn_q.weight`.
    pub name: String,
    /// Its size, row length first; at most four dimensions, none for a scalar.
    pub shape: Vec<u64>,
    /// The type of its elements.
    pub dtype: GgmlType,
    /// Bytes from the start of the data section.
    pub offset: u64,
    /// Bytes without padding.
    pub size: u64,
    /// Which file of a split model has it; 0 in a single file.
    pub file: usize,
}

impl TensorInfo {
    /// Elements in a row; 1 for a scalar.
    pub fn row_len(&self) -> usize {
        row_len(&self.shape)
    }

    /// Rows, over all further dimensions; 1 for a vector.
    pub fn n_rows(&self) -> usize {
        n_rows(&self.shape)
    }

    /// The same tensor, to be written.
    pub fn decl(&self) -> TensorDecl {
        TensorDecl { name: self.name.clone(), shape: self.shape.clone(), dtype: self.dtype }
    }
}

fn row_len(shape: &[u64]) -> usize {
    shape.first().map_or(1, |&len| len as usize)
}

fn n_rows(shape: &[u64]) -> usize {
    shape.iter().skip(1).product::<u64>() as usize
}

/// An open GGUF model: mapped, and checked from the first byte of the header to the end of the data. A
/// split model is opened by its first file and is one model from then on.
#[derive(Debug, Clone)]
pub struct GgufFile {
    /// The first has the metadata; of a single file the only one.
    parts: Vec<Part>,
    header: Header,
}

/// One file of the model.
#[derive(Debug, Clone)]
struct Part {
    path: PathBuf,
    bytes: Bytes,
    data_start: u64,
}

impl GgufFile {
    /// Maps a file, or all files of the split model whose first it is, and checks everything but the
    /// numbers in the tensors.
    ///
    /// # Errors
    /// The file cannot be read, is damaged, or uses what is not supported; see [`Kind`].
    pub fn open(path: &Path) -> Result<GgufFile> {
        let first = GgufFile::single(path, Bytes::map(path)?)?;
        split::join(first)
    }

    /// As [`GgufFile::open`], for bytes that are already there; `path` serves the messages.
    ///
    /// # Errors
    /// See [`GgufFile::open`]; bytes of a split model cannot be opened, because its other files are not
    /// there.
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<GgufFile> {
        let file = GgufFile::single(path, bytes)?;
        split::refuse(file.metadata()).map_err(|e| e.in_file(path))?;
        Ok(file)
    }

    /// One file, whatever it says about others.
    fn single(path: &Path, bytes: Bytes) -> Result<GgufFile> {
        let mut header = read::header(&bytes).map_err(|e| e.in_file(path))?;
        header.metadata.set_origin(path);
        let data_start = header.data_start;
        Ok(GgufFile { parts: vec![Part { path: path.to_owned(), bytes, data_start }], header })
    }

    /// The file, or the first of a split model.
    pub fn path(&self) -> &Path {
        &self.parts[0].path
    }

    /// Every file of the model, in order.
    pub fn paths(&self) -> impl ExactSizeIterator<Item = &Path> {
        self.parts.iter().map(|part| part.path.as_path())
    }

    /// 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// Bytes; each tensor's data starts at a multiple.
    pub fn alignment(&self) -> u64 {
        self.header.alignment
    }

    /// Keys and values; of a split model without those of the split.
    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// All tensors, in file order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.header.index.get(name).map(|&i| &self.header.tensors[i])
    }

    /// The tensor with this name, which must be there.
    ///
    /// # Errors
    /// It is not.
    pub fn require(&self, name: &str) -> Result<&TensorInfo> {
        self.tensor(name).ok_or_else(|| {
            Error::new(Kind::MissingTensor).at(Place::Tensor(name.to_owned())).in_file(self.path())
        })
    }

    /// The data of one of this model's tensors, mapped.
    ///
    /// # Panics
    /// `tensor` is not one of this model's.
    pub fn bytes(&self, tensor: &TensorInfo) -> Bytes {
        if tensor.size == 0 {
            return Bytes::from(Vec::new());
        }
        let part = &self.parts[tensor.file];
        let start = (part.data_start + tensor.offset) as usize;
        part.bytes.slice(start..start + tensor.size as usize)
    }

    /// The identity of the content of all files, one after another: `blake3:` and 64 hexadecimal digits.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        for path in self.paths() {
            file::update_hasher(&mut hasher, path)?;
        }
        Ok(format!("blake3:{}", hasher.finalize()))
    }
}
