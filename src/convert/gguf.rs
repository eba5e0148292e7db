//! A GGUF, single or split, as a source of tensors.

use std::cell::RefCell;
use std::ops::Range;

use qpeft_formats::GgmlType;
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{GgufFile, Metadata, TensorDecl, TensorInfo};
use qpeft_kernels::weight::dequantize_blocks;

use super::source::Source;
use crate::error::{Error, Result};

/// An open GGUF. Rows are read through the file and not through its map, so that memory stays bounded.
#[derive(Debug)]
pub struct GgufSource {
    file: GgufFile,
    tensors: Vec<TensorDecl>,
}

impl GgufSource {
    /// All tensors of a file, in its order.
    pub fn new(file: GgufFile) -> GgufSource {
        GgufSource { tensors: file.tensors().iter().map(TensorInfo::decl).collect(), file }
    }

    /// The file.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }
}

impl Source for GgufSource {
    fn metadata(&self) -> &Metadata {
        self.file.metadata()
    }

    fn tensors(&self) -> &[TensorDecl] {
        &self.tensors
    }

    fn rows(&self, tensor: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        thread_local! {
            static PACKED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        let info = &self.file.tensors()[tensor];
        if matches!(info.dtype, GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64) {
            return Err(Error::refused(format!(
                "`{}`: tensor `{}`: {} are integers, which have no other type",
                self.file.path().display(),
                info.name,
                info.dtype
            )));
        }
        let row_bytes = info.dtype.row_bytes(info.row_len())?;
        PACKED.with_borrow_mut(|packed| {
            packed.resize(rows.len() * row_bytes, 0);
            read_packed(&self.file.bytes(info), rows.start * row_bytes, packed)?;
            dequantize_blocks(info.dtype, packed, out);
            Ok(())
        })
    }

    fn packed(&self, tensor: usize) -> Option<Bytes> {
        Some(self.file.bytes(&self.file.tensors()[tensor]))
    }
}

/// Bytes of a tensor from `start` on, through the file.
pub(super) fn read_packed(bytes: &Bytes, start: usize, out: &mut [u8]) -> Result<()> {
    bytes.read_at(start, out).map_err(|e| Error::refused(format!("cannot read the model: {e}")))
}
