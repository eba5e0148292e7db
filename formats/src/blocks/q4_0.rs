//! Q4_0: 32 elements in 18 bytes, `x = d * (q - 8)` with q in 0..16.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, f16 |
//! | 2..18 | `qs` | q of element j in the low nibble of byte j, of element j + 16 in the high nibble |

use super::half::{f32_to_f16, read_f16};
use super::nibbles::{extreme, inverse, pack4, unpack4};
use super::rounding::truncate_small;
use super::weighted::fit_symmetric;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q4_0;

impl Block<18, 32> for Q4_0 {
    const DTYPE: GgmlType = GgmlType::Q4_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 18], out: &mut [f32; 32]) {
        let d = read_f16(block, 0);
        let q = unpack4(field(block, 2));
        for j in 0..32 {
            out[j] = (i32::from(q[j]) - 8) as f32 * d;
        }
    }
}

impl Quantize<18, 32> for Q4_0 {
    #[inline(always)]
    fn quantize(x: &[f32; 32], importance: Option<Importance<'_, 32>>, block: &mut [u8; 18]) {
        let (d, q) = if let Some(importance) = importance {
            fit_symmetric::<8>(x, importance)
        } else {
            let d = extreme(x) / -8.0;
            let id = inverse(d);
            (d, x.map(|x| truncate_small(x * id + 8.5).min(15)))
        };
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        block[2..18].copy_from_slice(&pack4(&q));
    }
}
