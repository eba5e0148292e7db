//! IQ1_M: 256 elements in 56 bytes, 16 sub-blocks of 16, `x = d * (1 + 2 * sc) * (q +- 0.125)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..32 | `qs` | low 8 bits of the point of each group of 8 |
//! | 32..48 | `qh` | one byte per sub-block, a nibble per group: upper 3 bits of the point, then a bit that is set where 0.125 is subtracted |
//! | 48..56 | `scales` | four u16: sc of sub-block 4i + j in bits 3j..3j + 3 of word i, and in bits 12..16 a quarter of `d` (f16), the lowest first |
//!
//! The digits 0, 1 and 2 of a point stand for -1, 0 and 1.

use super::half::f16_to_f32;
use super::iq1_s::{Q, SHIFT};
use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ1_M;

impl Block<56, SUPERBLOCK> for IQ1_M {
    const DTYPE: GgmlType = GgmlType::IQ1_M;

    #[inline(always)]
    fn dequantize(block: &[u8; 56], out: &mut [f32; SUPERBLOCK]) {
        let qs: &[u8; 32] = field(block, 0);
        let qh: &[u8; 16] = field(block, 32);
        let scales = [48, 50, 52, 54].map(|at| u16::from_le_bytes(*field(block, at)));
        let d = (0..4).fold(0, |d, i| d | (scales[i] >> 12) << (4 * i));
        let d = f16_to_f32(d);
        for (s, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let sc = (scales[s / 4] >> (3 * (s % 4))) & 7;
            let scale = d * f32::from(2 * sc + 1);
            for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let nibble = qh[s] >> (4 * k);
                let point = u16::from_le_bytes([qs[2 * s + k], nibble & 7]);
                let shift = if nibble & 8 == 0 { SHIFT } else { -SHIFT };
                for (out, q) in out.iter_mut().zip(Q[usize::from(point)]) {
                    *out = scale * (f32::from(q) + shift);
                }
            }
        }
    }
}
