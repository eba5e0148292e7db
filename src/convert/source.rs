//! A model as the tensors of a GGUF file, whatever it is stored in: what conversion and quantization read.

use std::ops::Range;

use qpeft_formats::GgmlType;
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::Metadata;

use crate::error::Result;

/// One tensor under its GGUF name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    /// `blk.0.attn_q.weight`.
    pub name: String,
    /// Its size, row length first.
    pub shape: Vec<u64>,
    /// The type in which it is stored, or that comes closest to it.
    pub dtype: GgmlType,
}

impl SourceTensor {
    /// Elements in a row; 1 for a scalar.
    pub fn row_len(&self) -> usize {
        self.shape.first().map_or(1, |&len| len as usize)
    }

    /// Rows, over all further dimensions; 1 for a vector.
    pub fn n_rows(&self) -> usize {
        self.shape.iter().skip(1).product::<u64>() as usize
    }
}

/// A model that can be read tensor by tensor, with GGUF names, shapes, row order and metadata.
pub trait Source: Sync {
    /// Keys and values that a GGUF of this model has.
    fn metadata(&self) -> &Metadata;

    /// The tensors, in the order in which they are written.
    fn tensors(&self) -> &[SourceTensor];

    /// The rows of a tensor as f32, one after another, on the calling thread.
    ///
    /// # Errors
    /// The data cannot be converted.
    fn rows(&self, tensor: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()>;

    /// Puts rows of a tensor into `out` in the type `dtype`, where the source packs them itself; otherwise says `false`,
    /// and whoever writes quantizes what [`Source::rows`] gives.
    ///
    /// # Errors
    /// The data cannot be converted.
    fn quantized(
        &self,
        tensor: usize,
        dtype: GgmlType,
        rows: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<bool> {
        let _ = (tensor, dtype, rows, out);
        Ok(false)
    }

    /// The tensor's data as a GGUF file has it, where it can be copied without conversion.
    fn packed(&self, tensor: usize) -> Option<Bytes>;
}
