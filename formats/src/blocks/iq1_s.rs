//! IQ1_S: 256 elements in 50 bytes, 8 sub-blocks of 32, `x = d * (1 + 2 * sc) * (q +- 0.125)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..34 | `qs` | low 8 bits of the point of each group of 8 |
//! | 34..50 | `qh` | one u16 per sub-block: bits 3k..3k + 3 the upper bits of the point of group k, bits 12..15 the scale sc, bit 15 set where 0.125 is subtracted |
//!
//! The digits 0, 1 and 2 of a point stand for -1, 0 and 1.

use super::half::read_f16;
use super::iq_grids;
use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

/// What is added to -1, 0 or 1, or subtracted.
pub(super) const SHIFT: f32 = 0.125;

pub(super) static Q: [[i8; 8]; 2048] = iq_grids::levels(&iq_grids::IQ1, [-1, 0, 1]);

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ1_S;

impl Block<50, SUPERBLOCK> for IQ1_S {
    const DTYPE: GgmlType = GgmlType::IQ1_S;

    #[inline(always)]
    fn dequantize(block: &[u8; 50], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 32] = field(block, 2);
        for (s, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let qh = u16::from_le_bytes(*field(block, 34 + 2 * s));
            let scale = d * f32::from(2 * ((qh >> 12) & 7) + 1);
            let shift = if qh >> 15 == 1 { -SHIFT } else { SHIFT };
            for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let point = usize::from(qs[4 * s + k]) | usize::from((qh >> (3 * k)) & 7) << 8;
                for (out, q) in out.iter_mut().zip(Q[point]) {
                    *out = scale * (f32::from(q) + shift);
                }
            }
        }
    }
}
