//! A model as the tensors of a GGUF file, whatever it is stored in: what conversion and quantization read.

use std::ops::Range;

use qpeft_formats::GgmlType;
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{Metadata, TensorDecl};

use crate::error::Result;

/// A model that can be read tensor by tensor, with GGUF names, shapes, row order and metadata.
pub trait Source: Sync {
    /// Keys and values that a GGUF of this model has.
    fn metadata(&self) -> &Metadata;

    /// The tensors under their GGUF names, in the order in which they are written, each with the type in which it is stored, or
    /// that comes closest to it.
    fn tensors(&self) -> &[TensorDecl];

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
