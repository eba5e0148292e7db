//! Q8_0: 32 elements in 34 bytes, `x = d * q` with q in -127..=127.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, f16 |
//! | 2..34 | `qs` | q of element j as i8 |

use super::half::{f32_to_f16, read_f16};
use super::nibbles::{finite_inverse, largest};
use super::rounding::round_half_away;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q8_0;

impl Block<34, 32> for Q8_0 {
    const DTYPE: GgmlType = GgmlType::Q8_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 34], out: &mut [f32; 32]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 32] = field(block, 2);
        for j in 0..32 {
            out[j] = f32::from(qs[j] as i8) * d;
        }
    }
}

impl Quantize<34, 32> for Q8_0 {
    #[inline(always)]
    fn quantize(x: &[f32; 32], _: Option<Importance<'_, 32>>, block: &mut [u8; 34]) {
        let d = largest(x) / 127.0;
        // The reference casts infinite and NaN quotients to an int whose low byte is 0.
        let id = finite_inverse(d);
        let q = x.map(|x| round_half_away(x * id) as u8);
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        block[2..34].copy_from_slice(&q);
    }
}
