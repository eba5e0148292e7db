//! IQ3_XXS: 256 elements in 98 bytes, 8 sub-blocks of 32, `x = d * (0.5 + sc) * 0.5 * (+-q)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..66 | `qs` | the point of each group of 4 |
//! | 66..98 | `scales_and_signs` | one u32 per sub-block: bits 7k..7k + 7 the signs of elements 8k..8k + 8 (`iq_grids::even_signs`), bits 28..32 the scale sc |
//!
//! The digits 0..8 of a point stand for 4, 12, 20, 28, 36, 44, 52 and 62.

use std::sync::LazyLock;

use super::half::{f32_to_f16, read_f16};
use super::iq_codebook::Codebook;
use super::iq_grids::{self, even_signs, write_signed};
use super::iq_search::{
    Fit, Refit, Search, fit, largest, part, round_scale, split_even_signs, sum_squares, weigh,
};
use super::k_quants::SUPERBLOCK;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

/// Below this a sub-block counts as all zero.
const ZERO_GROUP: f32 = 1e-8;

/// d is stored a little larger than the largest sub-block scale asks for.
const D_FACTOR: f32 = 1.0125;

const SEARCH: Search = Search { reach: 15, step: 0.2, refit: Refit::Moved };

static BOOK: LazyLock<Codebook<4, 8>> = LazyLock::new(|| Codebook::new(&iq_grids::IQ3_XXS, 2));

pub(super) static Q: [[i8; 4]; 256] = iq_grids::levels(&iq_grids::IQ3_XXS, [4, 12, 20, 28, 36, 44, 52, 62]);

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

impl Quantize<98, SUPERBLOCK> for IQ3_XXS {
    fn quantize(x: &[f32; SUPERBLOCK], importance: Option<Importance<'_, SUPERBLOCK>>, block: &mut [u8; 98]) {
        *block = [0; 98];
        let mean_square = 2.0 * sum_squares(x) / SUPERBLOCK as f32;
        let mut scales = [0.0; 8];
        for (s, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let weights = match &importance {
                Some(importance) => weigh(x, part(importance, s), mean_square),
                None => x.map(|x| x * x),
            };
            let (magnitudes, signs) = split_even_signs::<32, 4>(x, &weights);
            let max = largest(&magnitudes);
            if max < ZERO_GROUP {
                continue;
            }
            let Fit::<8> { scale, points, negated } =
                fit(&BOOK, &SEARCH, &magnitudes, &weights, max, max / 15.0);
            scales[s] = scale;
            block[2 + 8 * s..][..8].copy_from_slice(&points.map(|point| point as u8));
            let packed = signs
                .into_iter()
                .rev()
                .fold(0, |packed, signs| packed << 7 | u32::from(if negated { !signs } else { signs } & 127));
            block[66 + 4 * s..][..4].copy_from_slice(&packed.to_le_bytes());
        }
        let max_scale = largest(&scales);
        if max_scale == 0.0 {
            *block = [0; 98];
            return;
        }
        let d = max_scale / 31.0;
        block[0..2].copy_from_slice(&f32_to_f16(d * D_FACTOR).to_le_bytes());
        for (s, scale) in scales.into_iter().enumerate() {
            block[66 + 4 * s + 3] |= round_scale(1.0 / d, scale, 15) << 4;
        }
    }
}
