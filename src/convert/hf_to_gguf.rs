//! A source to a GGUF file in one dense type or Q8_0, with the types that llama.cpp's converter takes.
//!
//! Streams: at any time a few thousand rows are in memory, packed on all cores.

use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::gguf::{GgufWriter, TensorDecl, Value};
use qpeft_formats::mixture::FileType;
use qpeft_kernels::cpu::quantize::quantize_rows;
use rayon::prelude::*;

use super::hf::stays_f32;
use super::source::Source;
use crate::error::{Error, Result};

/// The type of the matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutType {
    /// This type: F32, F16, BF16 or Q8_0.
    Type(GgmlType),
    /// BF16 or F16, as the first 16-bit matrix of the source has it; F16 if there is none.
    Auto,
}

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The type of most matrices.
    pub dtype: GgmlType,
    /// Tensors.
    pub tensors: usize,
    /// Their data, in bytes.
    pub bytes: u64,
    /// Matrices whose rows are no whole number of blocks, and that are F16 for it.
    pub fallbacks: Vec<String>,
}

/// Elements that are in memory at a time.
const CHUNK: usize = 1 << 22;

impl OutType {
    /// The type of most matrices of a source.
    pub fn resolve(self, tensors: &[TensorDecl]) -> GgmlType {
        match self {
            OutType::Type(dtype) => dtype,
            OutType::Auto => tensors
                .iter()
                .filter(|tensor| tensor.shape.len() >= 2)
                .map(|tensor| tensor.dtype)
                .find(|dtype| matches!(dtype, GgmlType::BF16 | GgmlType::F16))
                .unwrap_or(GgmlType::F16),
        }
    }
}

/// Writes `source` to `path`; `progress` gets tensors done and to do.
///
/// # Errors
/// A value does not fit the type, or the file cannot be written; nothing is left at `path` then.
pub fn write_gguf(
    source: &dyn Source,
    path: &Path,
    outtype: OutType,
    mut progress: impl FnMut(usize, usize),
) -> Result<Written> {
    let dtype = outtype.resolve(source.tensors());
    dtype.require_quantizer(false)?;
    let mut metadata = source.metadata().clone();
    if let Some(file_type) = FileType::from_name(dtype.name()).map(FileType::id) {
        metadata.insert("general.file_type", Value::U32(file_type));
    }
    let mut written = Written { dtype, tensors: source.tensors().len(), bytes: 0, fallbacks: Vec::new() };
    let mut declared = Vec::with_capacity(written.tensors);
    for tensor in source.tensors() {
        let dtype = if stays_f32(&tensor.name, tensor.shape.len()) {
            GgmlType::F32
        } else if tensor.row_len().is_multiple_of(dtype.block_len()) {
            dtype
        } else {
            written.fallbacks.push(tensor.name.clone());
            GgmlType::F16
        };
        written.bytes += dtype.row_bytes(tensor.row_len())? as u64 * tensor.n_rows() as u64;
        declared.push(TensorDecl { dtype, ..tensor.clone() });
    }
    let mut writer = GgufWriter::create(path, &metadata, &declared)?;
    for (index, decl) in declared.iter().enumerate() {
        progress(index, declared.len());
        write_tensor(source, index, decl, &mut writer)?;
    }
    writer.finish()?;
    progress(declared.len(), declared.len());
    Ok(written)
}

fn write_tensor(source: &dyn Source, index: usize, decl: &TensorDecl, writer: &mut GgufWriter) -> Result<()> {
    let tensor = &source.tensors()[index];
    if tensor.dtype == decl.dtype
        && let Some(bytes) = source.packed(index)
    {
        return Ok(writer.write(&decl.name, &bytes)?);
    }
    let (cols, rows) = (tensor.row_len(), tensor.n_rows());
    if cols == 0 {
        return Ok(());
    }
    let row_bytes = decl.dtype.row_bytes(cols)?;
    let chunk = (CHUNK / cols).clamp(1, rows.max(1));
    let part = chunk.div_ceil(4 * rayon::current_num_threads()).max(1);
    let (mut values, mut packed) = (vec![0.0; chunk * cols], vec![0; chunk * row_bytes]);
    for start in (0..rows).step_by(chunk) {
        let count = chunk.min(rows - start);
        let (values, packed) = (&mut values[..count * cols], &mut packed[..count * row_bytes]);
        values
            .par_chunks_mut(part * cols)
            .zip(packed.par_chunks_mut(part * row_bytes))
            .enumerate()
            .try_for_each(|(i, (values, packed))| {
                let first = start + i * part;
                source.rows(index, first..first + values.len() / cols, values)?;
                pack(decl, first, values, packed)
            })?;
        writer.write(&decl.name, packed)?;
    }
    Ok(())
}

/// Packs rows, the first of which has the number `first`.
fn pack(decl: &TensorDecl, first: usize, values: &[f32], packed: &mut [u8]) -> Result<()> {
    let cols = decl.shape[0] as usize;
    // What F16 would round to infinity.
    let limit = if decl.dtype == GgmlType::F16 { 65520.0 } else { f32::INFINITY };
    let fits = |x: &f32| match decl.dtype {
        GgmlType::F32 | GgmlType::BF16 => true,
        GgmlType::F16 => x.abs() < limit || !x.is_finite(),
        _ => x.is_finite(),
    };
    if let Some(at) = values.iter().position(|x| !fits(x)) {
        let (row, column) = (first + at / cols, at % cols);
        let message = format!(
            "tensor `{}`: row {row}, column {column} is {}, which {} cannot hold",
            decl.name, values[at], decl.dtype
        );
        return Err(
            Error::refused(message).with_hint("write BF16 (`--outtype bf16`), which has the range of F32")
        );
    }
    decl.dtype.row_bytes(cols)?;
    quantize_rows(decl.dtype, values, cols, None, packed);
    Ok(())
}
