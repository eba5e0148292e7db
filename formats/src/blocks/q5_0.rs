//! Q5_0: 32 elements in 22 bytes, `x = d * (q - 16)` with q in 0..32.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, f16 |
//! | 2..6 | `qh` | bit 4 of q of element j in bit j |
//! | 6..22 | `qs` | low bits of element j in the low nibble of byte j, of element j + 16 in the high nibble |

use super::half::{f32_to_f16, read_f16};
use super::nibbles::{extreme, inverse, pack5, unpack5};
use super::rounding::truncate_small;
use super::weighted::fit_symmetric;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q5_0;

impl Block<22, 32> for Q5_0 {
    const DTYPE: GgmlType = GgmlType::Q5_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 22], out: &mut [f32; 32]) {
        let d = read_f16(block, 0);
        let q = unpack5(*field(block, 2), field(block, 6));
        for j in 0..32 {
            out[j] = (i32::from(q[j]) - 16) as f32 * d;
        }
    }
}

impl Quantize<22, 32> for Q5_0 {
    #[inline(always)]
    fn quantize(x: &[f32; 32], importance: Option<Importance<'_, 32>>, block: &mut [u8; 22]) {
        let (d, q) = if let Some(importance) = importance {
            fit_symmetric::<16>(x, importance)
        } else {
            let d = extreme(x) / -16.0;
            let id = inverse(d);
            (d, x.map(|x| truncate_small(x * id + 16.5).min(31)))
        };
        let (qh, qs) = pack5(&q);
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        block[2..6].copy_from_slice(&qh);
        block[6..22].copy_from_slice(&qs);
    }
}
