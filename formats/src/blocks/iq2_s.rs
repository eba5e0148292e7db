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

use std::sync::LazyLock;

use super::half::{f32_to_f16, read_f16};
use super::iq_codebook::Codebook;
use super::iq_grids::{self, write_signed};
use super::iq_search::{Fit, fit, largest, part, round_scale, split_signs, sum_squares, weigh};
use super::iq2_xs::SEARCH;
use super::k_quants::SUPERBLOCK;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

/// Below this a sub-block counts as all zero.
const ZERO_GROUP: f32 = 1e-8;

/// d is stored a little smaller than the largest sub-block scale asks for.
const D_FACTOR: f32 = 0.9875;

static BOOK: LazyLock<Codebook<8, 3>> = LazyLock::new(|| Codebook::new(&iq_grids::IQ2_S, 1));

pub(super) static Q: [[i8; 8]; 1024] = iq_grids::levels(&iq_grids::IQ2_S, [8, 25, 43]);

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

impl Quantize<82, SUPERBLOCK> for IQ2_S {
    fn quantize(x: &[f32; SUPERBLOCK], importance: Option<Importance<'_, SUPERBLOCK>>, block: &mut [u8; 82]) {
        *block = [0; 82];
        let mean_square = 2.0 * sum_squares(x) / SUPERBLOCK as f32;
        let mut scales = [0.0; 16];
        for (s, x) in x.as_chunks::<16>().0.iter().enumerate() {
            let weights = match &importance {
                Some(importance) => weigh(x, part(importance, s), mean_square),
                None => x.map(|x| 0.25 * mean_square + x * x),
            };
            let (magnitudes, signs) = split_signs::<16, 2>(x);
            let max = largest(&magnitudes);
            if max < ZERO_GROUP {
                continue;
            }
            let Fit::<2> { scale, points, negated } =
                fit(&BOOK, &SEARCH, &magnitudes, &weights, max, max / 5.0);
            scales[s] = scale;
            for k in 0..2 {
                let g = 2 * s + k;
                let [low, high] = points[k].to_le_bytes();
                block[2 + g] = low;
                block[34 + g] = if negated { !signs[k] } else { signs[k] };
                block[66 + g / 4] |= high << (2 * (g % 4));
            }
        }
        let max_scale = largest(&scales);
        if max_scale == 0.0 {
            return;
        }
        let d = max_scale / 31.0;
        block[0..2].copy_from_slice(&f32_to_f16(d * D_FACTOR).to_le_bytes());
        for (s, scale) in scales.into_iter().enumerate() {
            block[74 + s / 2] |= round_scale(1.0 / d, scale, 15) << (4 * (s % 2));
        }
    }
}
