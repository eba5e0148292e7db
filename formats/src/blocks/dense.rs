//! F32, F16, BF16, F64 and integers: a "block" is one little-endian element.
//!
//! F16 and BF16 are written rounded to nearest, ties to even; F16 overflows to infinity. F64 and the
//! integers are read only, each as the nearest f32 (ggml itself never converts them).

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

macro_rules! read_only {
    ($($name:ident: $number:ty, $bytes:literal, $about:literal;)*) => {$(
        #[doc = $about]
        pub(super) struct $name;

        impl Block<$bytes, 1> for $name {
            const DTYPE: GgmlType = GgmlType::$name;

            #[inline(always)]
            fn dequantize(block: &[u8; $bytes], out: &mut [f32; 1]) {
                out[0] = <$number>::from_le_bytes(*block) as f32;
            }
        }
    )*};
}
read_only! {
    F64: f64, 8, "IEEE binary64.";
    I8: i8, 1, "Signed, 8 bits.";
    I16: i16, 2, "Signed, 16 bits.";
    I32: i32, 4, "Signed, 32 bits.";
    I64: i64, 8, "Signed, 64 bits.";
}
