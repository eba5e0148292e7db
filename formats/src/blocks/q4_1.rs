//! Q4_1: 32 elements in 20 bytes, `x = d * q + m` with q in 0..16.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, f16 |
//! | 2..4 | `m` | smallest element, f16 (with importance a number near it, at most 0) |
//! | 4..20 | `qs` | q of element j in the low nibble of byte j, of element j + 16 in the high nibble |

use super::half::{f32_to_f16, read_f16};
use super::nibbles::{inverse, min_max, pack4, unpack4};
use super::rounding::truncate_small;
use super::weighted::fit_affine;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q4_1;

impl Block<20, 32> for Q4_1 {
    const DTYPE: GgmlType = GgmlType::Q4_1;

    #[inline(always)]
    fn dequantize(block: &[u8; 20], out: &mut [f32; 32]) {
        let d = read_f16(block, 0);
        let m = read_f16(block, 2);
        let q = unpack4(field(block, 4));
        for j in 0..32 {
            out[j] = f32::from(q[j]) * d + m;
        }
    }
}

impl Quantize<20, 32> for Q4_1 {
    #[inline(always)]
    fn quantize(x: &[f32; 32], importance: Option<Importance<'_, 32>>, block: &mut [u8; 20]) {
        let (d, min, q) = if let Some(importance) = importance {
            fit_affine::<15>(x, importance)
        } else {
            let (min, max) = min_max(x);
            let d = (max - min) / 15.0;
            let id = inverse(d);
            (d, min, x.map(|x| truncate_small((x - min) * id + 0.5).min(15)))
        };
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        block[2..4].copy_from_slice(&f32_to_f16(min).to_le_bytes());
        block[4..20].copy_from_slice(&pack4(&q));
    }
}
