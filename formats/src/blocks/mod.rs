//! Block codecs: bytes of one row <-> f32, bit-identical to llama.cpp's reference on x86-64.

use crate::dtype::GgmlType;

/// Dequantizes whole blocks: `bytes` holds `out.len() / block_len` blocks of `dtype`.
///
/// Always inlined, so that a caller compiled for AVX2 or AVX-512 gets the codec vectorized for it.
///
/// # Panics
/// The lengths do not belong together; callers take both from [`GgmlType::row_bytes`].
#[inline(always)]
#[allow(
    clippy::inline_always,
    reason = "inlining is what carries the caller's target features into the loop"
)]
pub fn dequantize_row(dtype: GgmlType, bytes: &[u8], out: &mut [f32]) {
    let _ = (dtype, bytes, out);
    unreachable!("placeholder until the codecs land")
}

/// Quantizes one row; `bytes` receives `row.len() / block_len` blocks.
///
/// # Panics
/// The lengths do not belong together; callers take both from [`GgmlType::row_bytes`].
pub fn quantize_row(dtype: GgmlType, row: &[f32], bytes: &mut [u8]) {
    let _ = (dtype, row, bytes);
    unreachable!("placeholder until the codecs land")
}
