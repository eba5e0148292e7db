//! IQ2_XS: 256 elements in 74 bytes, 16 sub-blocks of 16, `x = d * (0.5 + sc) * 0.25 * (+-q)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..66 | `qs` | one u16 per group of 8: point in bits 0..9, signs in bits 9..16 (`iq_grids::even_signs`) |
//! | 66..74 | `scales` | sc of sub-block 2i in the low nibble of byte i, of 2i + 1 in the high |
//!
//! The digits 0, 1 and 2 of a point stand for 8, 25 and 43.

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
const ZERO_GROUP: f32 = 1e-15;

/// IQ2_S searches the same way.
pub(super) const SEARCH: Search = Search { reach: 9, step: 0.1, refit: Refit::Moved };

static BOOK: LazyLock<Codebook<8, 3>> = LazyLock::new(|| Codebook::new(&iq_grids::IQ2_XS, 2));

pub(super) static Q: [[i8; 8]; 512] = iq_grids::levels(&iq_grids::IQ2_XS, [8, 25, 43]);

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

impl Quantize<74, SUPERBLOCK> for IQ2_XS {
    fn quantize(x: &[f32; SUPERBLOCK], importance: Option<Importance<'_, SUPERBLOCK>>, block: &mut [u8; 74]) {
        let importance = importance.expect("the type table says that importance is required");
        *block = [0; 74];
        let mean_square = sum_squares(x) / SUPERBLOCK as f32;
        let mut scales = [0.0; 16];
        for (s, x) in x.as_chunks::<16>().0.iter().enumerate() {
            let weights = weigh(x, part(&importance, s), mean_square);
            let (magnitudes, signs) = split_even_signs::<16, 2>(x, &weights);
            let max = largest(&magnitudes);
            if max < ZERO_GROUP {
                continue;
            }
            let Fit::<2> { scale, points, negated } =
                fit(&BOOK, &SEARCH, &magnitudes, &weights, max, max / 5.0);
            scales[s] = scale;
            for k in 0..2 {
                let signs = if negated { !signs[k] } else { signs[k] };
                let group = points[k] | u16::from(signs) << 9;
                block[2 + 2 * (2 * s + k)..][..2].copy_from_slice(&group.to_le_bytes());
            }
        }
        let max_scale = largest(&scales);
        if max_scale == 0.0 {
            *block = [0; 74];
            return;
        }
        let d = max_scale / 31.0;
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        for (s, scale) in scales.into_iter().enumerate() {
            block[66 + s / 2] |= round_scale(1.0 / d, scale, 15) << (4 * (s % 2));
        }
    }
}
