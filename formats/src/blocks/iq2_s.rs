//! IQ2_S: 256 elements in 82 bytes, 16 sub-blocks of 16, `x = d * (0.5 + sc) * 0.25 * (+-q)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..34 | `qs` | low 8 bits of the point of each group of 8 |
//! | 34..66 | `signs` | one byte per group, bit i set where element i is negative |
//! | 66..74 | `qh` | upper two bits of the points of groups 4i..4i + 4 in byte i, lowest first |
//! | 74..82 | `scales` | sc of sub-block 2i in the low nibble of byte i, of 2i + 1 in the high |
//!
//! The digits 0, 1 and 2 of a point stand for 8, 25 and 43.

use super::half::read_f16;
use super::iq_grids::{self, write_signed};
use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

static Q: [[i8; 8]; 1024] = iq_grids::levels(&iq_grids::IQ2_S, [8, 25, 43]);

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ2_S;

impl Block<82, SUPERBLOCK> for IQ2_S {
    const DTYPE: GgmlType = GgmlType::IQ2_S;

    #[inline(always)]
    fn dequantize(block: &[u8; 82], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 32] = field(block, 2);
        let signs: &[u8; 32] = field(block, 34);
        let qh: &[u8; 8] = field(block, 66);
        let scales: &[u8; 8] = field(block, 74);
        for (g, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let high = (qh[g / 4] >> (2 * (g % 4))) & 3;
            let sc = (scales[g / 4] >> (4 * (g / 2 % 2))) & 15;
            let scale = d * (0.5 + f32::from(sc)) * 0.25;
            let point = u16::from_le_bytes([qs[g], high]);
            write_signed(out, scale, &Q[usize::from(point)], signs[g]);
        }
    }
}
