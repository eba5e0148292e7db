//! IQ2_XXS: 256 elements in 66 bytes, 8 sub-blocks of 32, `x = d * (0.5 + sc) * 0.25 * (+-q)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..66 | `qs` | 8 bytes per sub-block, as below |
//!
//! Bytes 0..4 of a sub-block number the points of its four groups of 8 elements. Bytes 4..8 are a u32:
//! bits 7k..7k + 7 the signs of group k (`iq_grids::even_signs`), bits 28..32 the scale sc. The digits
//! 0, 1 and 2 of a point stand for 8, 25 and 43.

use super::half::read_f16;
use super::iq_grids::{self, even_signs, write_signed};
use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

static Q: [[i8; 8]; 256] = iq_grids::levels(&iq_grids::IQ2_XXS, [8, 25, 43]);

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ2_XXS;

impl Block<66, SUPERBLOCK> for IQ2_XXS {
    const DTYPE: GgmlType = GgmlType::IQ2_XXS;

    #[inline(always)]
    fn dequantize(block: &[u8; 66], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 64] = field(block, 2);
        for (sub, out) in qs.as_chunks::<8>().0.iter().zip(out.as_chunks_mut::<32>().0) {
            let signs_and_scale = u32::from_le_bytes(*field(sub, 4));
            let scale = d * (0.5 + (signs_and_scale >> 28) as f32) * 0.25;
            for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let signs = even_signs((signs_and_scale >> (7 * k)) as u8 & 127);
                write_signed(out, scale, &Q[usize::from(sub[k])], signs);
            }
        }
    }
}
