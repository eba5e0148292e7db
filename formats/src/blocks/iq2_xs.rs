//! IQ2_XS: 256 elements in 74 bytes, 16 sub-blocks of 16, `x = d * (0.5 + sc) * 0.25 * (+-q)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..66 | `qs` | one u16 per group of 8: point in bits 0..9, signs in bits 9..16 (`iq_grids::even_signs`) |
//! | 66..74 | `scales` | sc of sub-block 2i in the low nibble of byte i, of 2i + 1 in the high |
//!
//! The digits 0, 1 and 2 of a point stand for 8, 25 and 43.

use super::half::read_f16;
use super::iq_grids::{self, even_signs, write_signed};
use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

static Q: [[i8; 8]; 512] = iq_grids::levels(&iq_grids::IQ2_XS, [8, 25, 43]);

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ2_XS;

impl Block<74, SUPERBLOCK> for IQ2_XS {
    const DTYPE: GgmlType = GgmlType::IQ2_XS;

    #[inline(always)]
    fn dequantize(block: &[u8; 74], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 64] = field(block, 2);
        let scales: &[u8; 8] = field(block, 66);
        for (g, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let group = u16::from_le_bytes(*field(qs, 2 * g));
            let sc = (scales[g / 4] >> (4 * (g / 2 % 2))) & 15;
            let scale = d * (0.5 + f32::from(sc)) * 0.25;
            write_signed(out, scale, &Q[usize::from(group & 511)], even_signs((group >> 9) as u8));
        }
    }
}
