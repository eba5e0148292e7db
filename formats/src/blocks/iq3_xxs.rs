//! IQ3_XXS: 256 elements in 98 bytes, 8 sub-blocks of 32, `x = d * (0.5 + sc) * 0.5 * (+-q)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..66 | `qs` | the point of each group of 4 |
//! | 66..98 | `scales_and_signs` | one u32 per sub-block: bits 7k..7k + 7 the signs of elements 8k..8k + 8 (`iq_grids::even_signs`), bits 28..32 the scale sc |
//!
//! The digits 0..8 of a point stand for 4, 12, 20, 28, 36, 44, 52 and 62.

use super::half::read_f16;
use super::iq_grids::{self, even_signs, write_signed};
use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

static Q: [[i8; 4]; 256] = iq_grids::levels(&iq_grids::IQ3_XXS, [4, 12, 20, 28, 36, 44, 52, 62]);

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ3_XXS;

impl Block<98, SUPERBLOCK> for IQ3_XXS {
    const DTYPE: GgmlType = GgmlType::IQ3_XXS;

    #[inline(always)]
    fn dequantize(block: &[u8; 98], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 64] = field(block, 2);
        for (s, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let signs_and_scale = u32::from_le_bytes(*field(block, 66 + 4 * s));
            let scale = d * (0.5 + (signs_and_scale >> 28) as f32) * 0.5;
            for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let signs = even_signs((signs_and_scale >> (7 * k)) as u8 & 127);
                let points = &qs[8 * s + 2 * k..][..2];
                write_signed(&mut out[..4], scale, &Q[usize::from(points[0])], signs);
                write_signed(&mut out[4..], scale, &Q[usize::from(points[1])], signs >> 4);
            }
        }
    }
}
