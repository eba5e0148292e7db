//! Q1_0: 128 elements in 18 bytes, `x = d` or `-d`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | mean magnitude, f16 |
//! | 2..18 | `qs` | bit j % 8 of byte j / 8 is 1 where element j is not negative |

use super::half::{f32_to_f16, read_f16};
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q1_0;

impl Block<18, 128> for Q1_0 {
    const DTYPE: GgmlType = GgmlType::Q1_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 18], out: &mut [f32; 128]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 16] = field(block, 2);
        for (out, byte) in out.as_chunks_mut::<8>().0.iter_mut().zip(qs) {
            for (bit, out) in out.iter_mut().enumerate() {
                *out = if (byte >> bit) & 1 == 1 { d } else { -d };
            }
        }
    }
}

impl Quantize<18, 128> for Q1_0 {
    #[inline(always)]
    fn quantize(x: &[f32; 128], _: Option<Importance<'_, 128>>, block: &mut [u8; 18]) {
        // One running sum: another order would round to another scale.
        let sum = x.iter().fold(0.0, |sum, x| sum + x.abs());
        block[0..2].copy_from_slice(&f32_to_f16(sum / 128.0).to_le_bytes());
        for (x, byte) in x.as_chunks::<8>().0.iter().zip(&mut block[2..]) {
            *byte = (0..8).map(|bit| u8::from(x[bit] >= 0.0) << bit).sum();
        }
    }
}
