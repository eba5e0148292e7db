//! safetensors: a JSON header and one block of tensor data; what Hugging Face checkpoints consist of.
//!
//! ```text
//! length of the header u64, little-endian
//! header  {"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets": [begin, end]}}
//! data    without gaps, in the order of the offsets, up to the end of the file
//! ```
//!
//! Shapes are row-major, slowest dimension first. Source: the README of `huggingface/safetensors`. The
//! checks are those of its crate, with the tensor's name and numbers in the message, and stricter: a
//! repeated name is an error, and so are unknown keys in a tensor's description.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};

mod check;
pub mod folder;
pub mod fp8;
mod read;
pub mod shards;
mod stream;
mod write;

use crate::error::{Error, Kind, Place, Result};
use crate::file::Bytes;
pub use ::safetensors::Dtype;
pub use folder::FolderWriter;
pub use shards::Checkpoint;
pub use stream::SafetensorsWriter;
pub use write::{TensorRef, write_safetensors, write_safetensors_f32};

/// Where a tensor's data lies and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Bytes from the start of the data.
    pub begin: usize,
    pub end: usize,
}

/// A tensor of an open file; the data stays mapped.
#[derive(Debug, Clone)]
pub struct TensorView {
    /// Its name: `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its size, slowest dimension first.
    pub shape: Vec<usize>,
    /// Its data, little-endian.
    pub bytes: Bytes,
}

impl TensorView {
    /// The elements as f32, exact for F32, F16, BF16 and FP8 (without its scale), rounded to nearest for F64.
    ///
    /// # Errors
    /// The elements are of another type.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        fn each<const N: usize>(bytes: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks::<N>().0.iter().map(|&chunk| f(chunk)).collect()
        }
        Ok(match self.dtype {
            Dtype::F32 => each(&self.bytes, f32::from_le_bytes),
            Dtype::F16 => each(&self.bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => each(&self.bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F64 => each(&self.bytes, |b| f64::from_le_bytes(b) as f32),
            other => {
                if let Some(table) = fp8::table(other) {
                    return Ok(self.bytes.iter().map(|&byte| table[usize::from(byte)]).collect());
                }
                let supported = "F32, F16, BF16, F64, F8_E4M3, F8_E5M2";
                let found = other.to_string().into();
                return Err(Error::new(Kind::UnsupportedDtype { found, supported })
                    .at(Place::Tensor(self.name.clone())));
            }
        })
    }
}

/// An open safetensors file: mapped and checked.
#[derive(Debug, Clone)]
pub struct SafetensorsFile {
    path: PathBuf,
    bytes: Bytes,
    data_start: usize,
    tensors: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl SafetensorsFile {
    /// Maps a file and checks everything but the numbers in its tensors.
    ///
    /// # Errors
    /// The file cannot be read or is damaged; see [`Kind`].
    pub fn open(path: &Path) -> Result<SafetensorsFile> {
        SafetensorsFile::from_bytes(path, Bytes::map(path)?)
    }

    /// As [`SafetensorsFile::open`], for bytes that are already there; `path` serves the messages.
    ///
    /// # Errors
    /// See [`SafetensorsFile::open`].
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<SafetensorsFile> {
        let header = read::header(&bytes).map_err(|e| e.in_file(path))?;
        Ok(SafetensorsFile {
            path: path.to_owned(),
            bytes,
            data_start: header.data_start,
            tensors: header.tensors,
            metadata: header.metadata,
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The free-form strings of `__metadata__`, sorted.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The tensor with this name.
    pub fn tensor(&self, name: &str) -> Option<TensorView> {
        let entry = self.tensors.get(name)?;
        Some(TensorView {
            name: name.to_owned(),
            dtype: entry.dtype,
            shape: entry.shape.clone(),
            bytes: self.bytes.slice(self.data_start + entry.begin..self.data_start + entry.end),
        })
    }

    /// The tensor with this name, which must be there.
    ///
    /// # Errors
    /// It is not.
    pub fn require(&self, name: &str) -> Result<TensorView> {
        self.tensor(name).ok_or_else(|| {
            Error::new(Kind::MissingTensor).at(Place::Tensor(name.to_owned())).in_file(&self.path)
        })
    }
}
