//! Looks for numbers that are not finite in packed data: elements of dense types, scales of block types.
//!
//! A block with such a scale poisons its whole row. The places follow from the byte maps of the codecs;
//! E4M3 scales of NVFP4 and integers have no such values. Source: ggml's check of row data, by fact.

use super::half::{bf16_to_f32, f16_to_f32};
use crate::dtype::GgmlType;

/// Bytes at which a block has an f16 scale.
fn half_scales(dtype: GgmlType) -> &'static [usize] {
    use GgmlType as T;
    match dtype {
        T::Q4_0
        | T::Q5_0
        | T::Q8_0
        | T::Q1_0
        | T::Q2_0
        | T::IQ4_NL
        | T::IQ4_XS
        | T::IQ1_S
        | T::IQ2_XXS
        | T::IQ2_XS
        | T::IQ2_S
        | T::IQ3_XXS
        | T::IQ3_S => &[0],
        T::Q4_1 | T::Q5_1 | T::Q8_1 | T::Q4_K | T::Q5_K => &[0, 2],
        T::Q2_K => &[80, 82],
        T::Q3_K => &[108],
        T::Q6_K => &[208],
        T::TQ1_0 => &[52],
        T::TQ2_0 => &[64],
        _ => &[],
    }
}

/// Whether every element (dense types) or scale (block types) of whole blocks is finite.
///
/// # Errors
/// The index of the first block that is not, and the value there.
pub fn check_scales(dtype: GgmlType, bytes: &[u8]) -> Result<(), (usize, f32)> {
    use GgmlType as T;
    let half = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    match dtype {
        T::F16 => find(bytes.as_chunks::<2>().0, |b| f16_to_f32(u16::from_le_bytes(*b))),
        T::BF16 => find(bytes.as_chunks::<2>().0, |b| bf16_to_f32(u16::from_le_bytes(*b))),
        T::F32 => find(bytes.as_chunks::<4>().0, |b| f32::from_le_bytes(*b)),
        T::F64 => find(bytes.as_chunks::<8>().0, |b| f64::from_le_bytes(*b) as f32),
        T::Q8_K => find(bytes.as_chunks::<292>().0, |b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        // The scale of all sixteen sub-blocks, in the high nibbles of four 16-bit words.
        T::IQ1_M => find(bytes.as_chunks::<56>().0, |b| {
            let word = |i: usize| half(b, 48 + 2 * i);
            let bits =
                (word(0) >> 12) | ((word(1) >> 8) & 0x00f0) | ((word(2) >> 4) & 0x0f00) | (word(3) & 0xf000);
            f16_to_f32(bits)
        }),
        // An exponent alone; 255 is NaN.
        T::MXFP4 => find(bytes.as_chunks::<17>().0, |b| if b[0] == 255 { f32::NAN } else { 0.0 }),
        _ => {
            let places = half_scales(dtype);
            if places.is_empty() {
                return Ok(());
            }
            for (index, block) in bytes.chunks_exact(dtype.block_bytes()).enumerate() {
                for &at in places {
                    let value = f16_to_f32(half(block, at));
                    if !value.is_finite() {
                        return Err((index, value));
                    }
                }
            }
            Ok(())
        }
    }
}

fn find<const N: usize>(blocks: &[[u8; N]], value: impl Fn(&[u8; N]) -> f32) -> Result<(), (usize, f32)> {
    match blocks.iter().position(|block| !value(block).is_finite()) {
        Some(index) => Err((index, value(&blocks[index]))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Offsets of all scales as in the byte maps, the infinity to put there, and how many of its bytes.
    #[test]
    fn an_infinite_scale_of_every_type_is_found_in_its_block() {
        for dtype in GgmlType::ALL {
            let size = dtype.block_bytes();
            let mut bytes = vec![0; 5 * size];
            assert_eq!(check_scales(dtype, &bytes), Ok(()), "{dtype}");
            let (at, infinity): (usize, &[u8]) = match dtype {
                GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 | GgmlType::NVFP4 => continue,
                GgmlType::F32 | GgmlType::Q8_K => (0, &[0, 0, 0x80, 0x7f]),
                GgmlType::F64 => (0, &[0, 0, 0, 0, 0, 0, 0xf0, 0x7f]),
                GgmlType::BF16 => (0, &[0x80, 0x7f]),
                GgmlType::F16 => (0, &[0, 0x7c]),
                GgmlType::MXFP4 => (0, &[255]),
                GgmlType::IQ1_M => (48, &[0, 0, 0, 0, 0, 0xc0, 0, 0x70]),
                other => (*half_scales(other).last().unwrap(), &[0, 0x7c]),
            };
            bytes[3 * size + at..][..infinity.len()].copy_from_slice(infinity);
            assert_eq!(check_scales(dtype, &bytes).unwrap_err().0, 3, "{dtype}");
        }
    }
}
