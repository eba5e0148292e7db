//! Q2_0: 64 elements in 18 bytes, `x = d * (q - 1)` with q in 0..4.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | largest magnitude, f16 |
//! | 2..18 | `qs` | q of element j at bit 2 (j % 4) of byte j / 4 |
//!
//! As d is the largest magnitude, the quantizer never chooses q = 3.

use super::half::{f32_to_f16, read_f16};
use super::nibbles::{inverse, largest};
use super::rounding::round_half_away;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q2_0;

impl Block<18, 64> for Q2_0 {
    const DTYPE: GgmlType = GgmlType::Q2_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 18], out: &mut [f32; 64]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 16] = field(block, 2);
        for (out, byte) in out.as_chunks_mut::<4>().0.iter_mut().zip(qs) {
            for (j, out) in out.iter_mut().enumerate() {
                *out = (i32::from((byte >> (2 * j)) & 3) - 1) as f32 * d;
            }
        }
    }
}

impl Quantize<18, 64> for Q2_0 {
    #[inline(always)]
    fn quantize(x: &[f32; 64], _: Option<Importance<'_, 64>>, block: &mut [u8; 18]) {
        let d = largest(x);
        let id = inverse(d);
        // The reference casts infinite and NaN quotients to the smallest int, which becomes q = 0.
        let (id, zero) = if id.is_infinite() { (0.0, 0) } else { (id, 1) };
        let q = x.map(|x| (round_half_away(x * id) + zero) as u8);
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        for (q, byte) in q.as_chunks::<4>().0.iter().zip(&mut block[2..]) {
            *byte = q[0] | (q[1] << 2) | (q[2] << 4) | (q[3] << 6);
        }
    }
}
