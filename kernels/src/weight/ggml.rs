//! Rows of ggml blocks: whole rows decode as one long row, tiles row by row.

use std::ops::Range;

use qpeft_formats::{GgmlType, blocks};

use crate::cpu::by_isa;

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
