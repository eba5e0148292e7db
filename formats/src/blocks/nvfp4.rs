//! NVFP4: 64 elements in 36 bytes, 4 sub-blocks of 16, `x = d * v` with v one of 16 numbers (see `fp4`).
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..4 | `d` | scale of each sub-block, UE4M3, doubled |
//! | 4..36 | `qs` | 8 bytes per sub-block; code of its element j in the low nibble of byte j, of j + 8 in the high |
//!
//! A model file multiplies the whole tensor by a further f32, in a tensor of its own that ends in
//! `.scale`; it is not part of the blocks.

use super::fp4::{nearest, value};
use super::nibbles::largest;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

pub(super) struct NVFP4;

impl Block<36, 64> for NVFP4 {
    const DTYPE: GgmlType = GgmlType::NVFP4;

    #[inline(always)]
    fn dequantize(block: &[u8; 36], out: &mut [f32; 64]) {
        let qs: &[u8; 32] = field(block, 4);
        for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let d = half_from_ue4m3(block[sub]);
            for j in 0..8 {
                out[j] = f32::from(value(qs[8 * sub + j] & 0x0f)) * d;
            }
            for j in 0..8 {
                out[j + 8] = f32::from(value(qs[8 * sub + j] >> 4)) * d;
            }
        }
    }
}

impl Quantize<36, 64> for NVFP4 {
    #[inline(always)]
    fn quantize(x: &[f32; 64], _: Option<Importance<'_, 64>>, block: &mut [u8; 36]) {
        for (sub, x) in x.as_chunks::<16>().0.iter().enumerate() {
            // The largest number of the format is 6.
            let d = to_ue4m3(largest(x) / 6.0);
            let codes = nearest(x, half_from_ue4m3(d));
            block[sub] = d;
            for j in 0..8 {
                block[4 + 8 * sub + j] = codes[j] | (codes[j + 8] << 4);
            }
        }
    }
}

/// Half of an unsigned E4M3 number (bias 7); 0x7f would be NaN and is 0. The top bit is not looked at.
#[inline(always)]
fn half_from_ue4m3(bits: u8) -> f32 {
    let magnitude = u32::from(bits & 0x7f);
    let subnormal = magnitude as f32 * (1.0 / 1024.0);
    let normal = f32::from_bits((magnitude << 20) + ((127 - 7 - 1) << 23));
    let number = if magnitude < 8 { subnormal } else { normal };
    if bits == 0x7f { 0.0 } else { number }
}

/// To unsigned E4M3 like the reference: halves up, and everything from 248 on is the largest number, 448.
#[inline(always)]
fn to_ue4m3(x: f32) -> u8 {
    const LARGEST: u32 = 0x7e;
    const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
    if x < SMALLEST_NORMAL {
        return ((x * 512.0 + 0.5) as u8).min(7);
    }
    // Rounding may carry into the exponent.
    let rounded = ((x.to_bits() >> 19) + 1) >> 1;
    let number = rounded - ((127 - 7) << 3);
    (if number >= 15 << 3 { LARGEST } else { number }) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_survive_the_round_trip() {
        for bits in (0..15 << 3).chain([0x7e]) {
            assert_eq!(to_ue4m3(2.0 * half_from_ue4m3(bits)), bits);
        }
        assert_eq!(half_from_ue4m3(0x7f), 0.0);
        assert_eq!(half_from_ue4m3(0xff), 240.0);
        assert_eq!(half_from_ue4m3(0x80), 0.0);
        assert_eq!([to_ue4m3(247.9), to_ue4m3(248.0), to_ue4m3(f32::MAX)], [0x77, 0x7e, 0x7e]);
        // The largest subnormal is 7/512: the numbers up to the smallest normal, 8/512, become it.
        assert_eq!([to_ue4m3(7.99 / 512.0), to_ue4m3(8.0 / 512.0), to_ue4m3(0.49 / 512.0)], [7, 8, 0]);
    }
}
