//! F32, F16 and BF16: a "block" is one little-endian element.
//!
//! F16 and BF16 are written rounded to nearest, ties to even; F16 overflows to infinity.

use super::half::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use super::{Block, Importance, Quantize};
use crate::dtype::GgmlType;

/// IEEE binary32.
pub(super) struct F32;
/// IEEE binary16.
pub(super) struct F16;
/// The upper half of a binary32.
pub(super) struct BF16;

impl Block<4, 1> for F32 {
    const DTYPE: GgmlType = GgmlType::F32;

    #[inline(always)]
    fn dequantize(block: &[u8; 4], out: &mut [f32; 1]) {
        out[0] = f32::from_le_bytes(*block);
    }
}

impl Quantize<4, 1> for F32 {
    #[inline(always)]
    fn quantize(x: &[f32; 1], _: Option<Importance<'_, 1>>, block: &mut [u8; 4]) {
        *block = x[0].to_le_bytes();
    }
}

impl Block<2, 1> for F16 {
    const DTYPE: GgmlType = GgmlType::F16;

    #[inline(always)]
    fn dequantize(block: &[u8; 2], out: &mut [f32; 1]) {
        out[0] = f16_to_f32(u16::from_le_bytes(*block));
    }
}

impl Quantize<2, 1> for F16 {
    #[inline(always)]
    fn quantize(x: &[f32; 1], _: Option<Importance<'_, 1>>, block: &mut [u8; 2]) {
        *block = f32_to_f16(x[0]).to_le_bytes();
    }
}

impl Block<2, 1> for BF16 {
    const DTYPE: GgmlType = GgmlType::BF16;

    #[inline(always)]
    fn dequantize(block: &[u8; 2], out: &mut [f32; 1]) {
        out[0] = bf16_to_f32(u16::from_le_bytes(*block));
    }
}

impl Quantize<2, 1> for BF16 {
    #[inline(always)]
    fn quantize(x: &[f32; 1], _: Option<Importance<'_, 1>>, block: &mut [u8; 2]) {
        *block = f32_to_bf16(x[0]).to_le_bytes();
    }
}
