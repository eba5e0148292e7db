//! Q5_1: 32 elements in 24 bytes, `x = d * q + m` with q in 0..32.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, f16 |
//! | 2..4 | `m` | smallest element, f16 (with importance a number near it, at most 0) |
//! | 4..8 | `qh` | bit 4 of q of element j in bit j |
//! | 8..24 | `qs` | low bits of element j in the low nibble of byte j, of element j + 16 in the high nibble |

use super::half::{f32_to_f16, read_f16};
use super::nibbles::{inverse, min_max, pack5, unpack5};
use super::rounding::truncate_small;
use super::weighted::fit_affine;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q5_1;

impl Block<24, 32> for Q5_1 {
    const DTYPE: GgmlType = GgmlType::Q5_1;

    #[inline(always)]
    fn dequantize(block: &[u8; 24], out: &mut [f32; 32]) {
        let d = read_f16(block, 0);
        let m = read_f16(block, 2);
        let q = unpack5(*field(block, 4), field(block, 8));
        for j in 0..32 {
            out[j] = f32::from(q[j]) * d + m;
        }
    }
}

impl Quantize<24, 32> for Q5_1 {
    #[inline(always)]
    fn quantize(x: &[f32; 32], importance: Option<Importance<'_, 32>>, block: &mut [u8; 24]) {
        let (d, min, q) = if let Some(importance) = importance {
            fit_affine::<31>(x, importance)
        } else {
            let (min, max) = min_max(x);
            let d = (max - min) / 31.0;
            let id = inverse(d);
            (d, min, x.map(|x| truncate_small((x - min) * id + 0.5)))
        };
        let (qh, qs) = pack5(&q);
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        block[2..4].copy_from_slice(&f32_to_f16(min).to_le_bytes());
        block[4..8].copy_from_slice(&qh);
        block[8..24].copy_from_slice(&qs);
    }
}
