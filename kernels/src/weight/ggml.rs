//! Rows of ggml blocks: whole rows decode as one long row, tiles row by row.

use std::ops::Range;

use qpeft_formats::file::Bytes;
use qpeft_formats::{GgmlType, blocks};
use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::quantize::quantize_rows;
use crate::cpu::scratch::with_scratch;
use crate::error::Result;
use crate::weight::dequantize::ROWS_PER_TASK;

/// Some rows.
pub(super) fn rows(dtype: GgmlType, bytes: &[u8], cols: usize, rows: Range<usize>, out: &mut [f32]) {
    // Rows are whole blocks, so that any number of them decodes as one long row.
    let row_bytes = cols / dtype.block_len() * dtype.block_bytes();
    dequantize_blocks(dtype, &bytes[rows.start * row_bytes..rows.end * row_bytes], out);
}

/// Some columns of some rows; the columns are whole blocks.
pub(super) fn tile(
    dtype: GgmlType,
    bytes: &[u8],
    row_len: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    out: &mut [f32],
) {
    let (block_len, block_bytes) = (dtype.block_len(), dtype.block_bytes());
    let row_bytes = row_len / block_len * block_bytes;
    let part = cols.start / block_len * block_bytes..cols.end / block_len * block_bytes;
    let bytes = &bytes[rows.start * row_bytes..rows.end * row_bytes];
    dequantize_strided(dtype, bytes, row_bytes, part, out, cols.len());
}

/// Rows of `cols` values over `factor`, rounded to the type in parallel.
pub(super) fn quantize(dtype: GgmlType, cols: usize, values: &[f32], factor: f32) -> Result<Bytes> {
    dtype.require_quantizer(false)?;
    let row_bytes = dtype.row_bytes(cols)?;
    let mut packed = vec![0; values.len() / cols.max(1) * row_bytes];
    packed
        .par_chunks_mut((ROWS_PER_TASK * row_bytes).max(1))
        .zip(values.par_chunks((ROWS_PER_TASK * cols).max(1)))
        .for_each(|(packed, rows)| {
            with_scratch(rows.len(), |unscaled| {
                unscaled.iter_mut().zip(rows).for_each(|(unscaled, x)| *unscaled = x / factor);
                quantize_rows(dtype, unscaled, cols, None, packed);
            });
        });
    Ok(Bytes::from(packed))
}

by_isa! {
    /// Whole blocks of `dtype` as f32, on the calling thread.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn dequantize_blocks(dtype: GgmlType, bytes: &[u8], out: &mut [f32]) {
        blocks::dequantize_row(dtype, bytes, out);
    }
}

by_isa! {
    /// Bytes `part` of every row of `row_bytes`, each to `width` elements.
    fn dequantize_strided(
        dtype: GgmlType,
        bytes: &[u8],
        row_bytes: usize,
        part: Range<usize>,
        out: &mut [f32],
        width: usize,
    ) {
        for (row, out) in bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(width)) {
            blocks::dequantize_row(dtype, &row[part.start..part.end], out);
        }
    }
}
