//! The mirror of `load`: a GGUF written again with some of its matrices replaced (folders: `save_folder`).
//!
//! Everything else is copied byte for byte, so that a residual base or a merged model differs from its
//! base in nothing but what was trained. GGUF rows of q and k go back into the file's order.

use std::path::Path;

use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::split::SplitLimit;
use qpeft_formats::gguf::{GgufFile, GgufWriter, Metadata, TensorDecl, TensorInfo, names};
use qpeft_formats::{GgmlType, blocks};
use qpeft_kernels::cpu::quantize::quantize_rows;

use super::base::Base;
use super::config::Config;
use super::decoder::Decoder;
use super::layer::Slot;
use super::linear::{BaseWeight, Linear};
use crate::error::{Error, Result};

/// A matrix in the layout of its base file.
#[derive(Debug)]
pub struct Replacement {
    /// Its type in the new file.
    pub dtype: GgmlType,
    /// Packed rows, in the order of the file.
    pub bytes: Bytes,
}

/// Packs f32 rows (Hugging Face order) as the file wants them. The rows are without the factor that a file
/// may keep beside a tensor ([`BaseWeight::factor`]).
///
/// # Errors
/// A value is not finite, values cannot be written in the type, or the row length does not divide into blocks.
pub fn pack_rows(
    values: &[f32],
    cols: usize,
    dtype: GgmlType,
    heads: Option<usize>,
    name: &str,
) -> Result<Replacement> {
    const ROWS: usize = 16;
    dtype.require_quantizer(false)?;
    let row_bytes = dtype.row_bytes(cols)?;
    refuse_not_finite(values, cols, 0, name)?;
    use rayon::prelude::*;
    let mut bytes = vec![0; values.len() / cols * row_bytes];
    bytes
        .par_chunks_mut(ROWS * row_bytes)
        .zip(values.par_chunks(ROWS * cols))
        .for_each(|(bytes, rows)| quantize_rows(dtype, rows, cols, None, bytes));
    Ok(Replacement { dtype, bytes: file_order(Bytes::from(bytes), row_bytes, heads)? })
}

/// Refuses rows (from `first_row` on) with a value that is not finite.
///
/// # Errors
/// There is one; the message has its row and column.
pub fn refuse_not_finite(values: &[f32], cols: usize, first_row: usize, name: &str) -> Result<()> {
    match blocks::check_finite(values) {
        Ok(()) => Ok(()),
        Err(index) => Err(not_finite(name, first_row + index / cols, index % cols, values[index])),
    }
}

/// An element that cannot be stored.
pub fn not_finite(name: &str, row: usize, col: usize, value: f32) -> Error {
    Error::refused(format!(
        "tensor `{name}`: row {row}, column {col} is {value}; only finite weights can be stored"
    ))
}

/// A packed weight (Hugging Face row order) as the file wants it; its factor is in the file already.
///
/// # Errors
/// The weight has no ggml type.
pub fn repack(weight: &BaseWeight, heads: Option<usize>) -> Result<Replacement> {
    let (dtype, bytes) = weight.ggml().ok_or_else(|| {
        Error::refused(format!("a {} weight cannot be written to this file", weight.type_name()))
    })?;
    let row_bytes = dtype.row_bytes(weight.cols())?;
    Ok(Replacement { dtype, bytes: file_order(bytes.clone(), row_bytes, heads)? })
}

/// Rows in Hugging Face order to the order of the file.
fn file_order(bytes: Bytes, row_bytes: usize, heads: Option<usize>) -> Result<Bytes> {
    let Some(heads) = heads else { return Ok(bytes) };
    let mut permuted = vec![0; bytes.len()];
    names::rows_to_gguf(&mut permuted, &bytes, row_bytes, heads, bytes.len() / row_bytes / heads)?;
    Ok(Bytes::from(permuted))
}

/// The slot and layer of a linear's weight, by its Hugging Face name.
pub fn slot_of(name: &str) -> Option<(usize, Slot)> {
    let rest = name.strip_prefix("model.layers.")?;
    let (layer, module) = rest.split_once('.')?;
    let module = module.strip_suffix(".weight")?;
    let slot = Slot::ALL.into_iter().find(|slot| slot.module() == module)?;
    Some((layer.parse().ok()?, slot))
}

/// The linear whose weight has this Hugging Face name, and its slot.
pub fn linear_of<'d>(decoder: &'d Decoder, name: &str) -> Option<(&'d Linear, Slot)> {
    let (layer, slot) = slot_of(name)?;
    Some((&decoder.layers.get(layer)?.linears[slot as usize], slot))
}

/// Heads whose rows the base's file permutes in this tensor.
pub fn permuted_heads(base: &Base, config: &Config, name: &str) -> Option<usize> {
    match base {
        Base::Gguf(_) => slot_of(name).and_then(|(_, slot)| slot.permuted_heads(config)),
        Base::Folder(_) => None,
        Base::Quantized { base, .. } => permuted_heads(base, config, name),
    }
}

/// Writes a GGUF like `file`: tensor types from `dtype_of`, bytes from `replace` or, where that gives
/// `None`, from the file itself. Both get the tensor's Hugging Face name, or `None` if it has none. With
/// `split` in several files.
///
/// # Errors
/// The output cannot be written, a type is not supported, or `replace` fails. Nothing is left at `path`.
pub fn write_gguf(
    file: &GgufFile,
    path: &Path,
    metadata: &Metadata,
    split: Option<SplitLimit>,
    dtype_of: impl Fn(Option<&str>, &TensorInfo) -> Result<GgmlType>,
    mut replace: impl FnMut(Option<&str>, &TensorInfo) -> Result<Option<Replacement>>,
) -> Result<()> {
    let hf_names: Vec<Option<String>> = file.tensors().iter().map(|t| names::hf_tensor(&t.name)).collect();
    let declared = file
        .tensors()
        .iter()
        .zip(&hf_names)
        .map(|(info, hf)| {
            Ok(TensorDecl {
                name: info.name.clone(),
                shape: info.shape.clone(),
                dtype: dtype_of(hf.as_deref(), info)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let mut writer = match split {
        Some(limit) => GgufWriter::create_split(path, metadata, &declared, limit)?,
        None => GgufWriter::create(path, metadata, &declared)?,
    };
    for ((info, hf), declared) in file.tensors().iter().zip(&hf_names).zip(&declared) {
        match replace(hf.as_deref(), info)? {
            Some(replacement) => {
                assert_eq!(replacement.dtype, declared.dtype, "`{}` was declared as another type", info.name);
                writer.write(&info.name, &replacement.bytes)?;
            }
            None => writer.write(&info.name, &file.bytes(info))?,
        }
    }
    Ok(writer.finish()?)
}
