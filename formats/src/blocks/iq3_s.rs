//! IQ3_S: 256 elements in 110 bytes, 8 sub-blocks of 32, `x = d * (1 + 2 * sc) * (+-q)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..66 | `qs` | low 8 bits of the point of each group of 4 |
//! | 66..74 | `qh` | bit 8 of the points of sub-block i in byte i, group k in bit k |
//! | 74..106 | `signs` | bit i of byte k set where element 8k + i is negative |
//! | 106..110 | `scales` | sc of sub-block 2i in the low nibble of byte i, of 2i + 1 in the high |
//!
//! The digit l of a point stands for 2l + 1.

use std::sync::LazyLock;

use super::half::{f32_to_f16, read_f16};
use super::iq_codebook::Codebook;
use super::iq_grids::{self, write_signed};
use super::iq_search::{
    Fit, Refit, Search, fit, largest, part, round_scale, split_signs, sum_squares, weigh,
};
use super::k_quants::SUPERBLOCK;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

/// d is stored a little larger than the largest sub-block scale asks for.
const D_FACTOR: f32 = 1.033;

const SEARCH: Search = Search { reach: 9, step: 0.2, refit: Refit::EveryIfOneMoved };

static BOOK: LazyLock<Codebook<4, 8>> = LazyLock::new(|| Codebook::new(&iq_grids::IQ3_S, 3));

pub(super) static Q: [[i8; 4]; 512] = iq_grids::levels(&iq_grids::IQ3_S, [1, 3, 5, 7, 9, 11, 13, 15]);

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ3_S;

impl Block<110, SUPERBLOCK> for IQ3_S {
    const DTYPE: GgmlType = GgmlType::IQ3_S;

    #[inline(always)]
    fn dequantize(block: &[u8; 110], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 64] = field(block, 2);
        let qh: &[u8; 8] = field(block, 66);
        let signs: &[u8; 32] = field(block, 74);
        let scales: &[u8; 4] = field(block, 106);
        for (s, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let sc = (scales[s / 2] >> (4 * (s % 2))) & 15;
            let scale = d * f32::from(1 + 2 * sc);
            for (k, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let point = u16::from_le_bytes([qs[8 * s + k], (qh[s] >> k) & 1]);
                let signs = signs[4 * s + k / 2] >> (4 * (k % 2));
                write_signed(out, scale, &Q[usize::from(point)], signs);
            }
        }
    }
}

impl Quantize<110, SUPERBLOCK> for IQ3_S {
    fn quantize(
        x: &[f32; SUPERBLOCK],
        importance: Option<Importance<'_, SUPERBLOCK>>,
        block: &mut [u8; 110],
    ) {
        *block = [0; 110];
        let mean_square = 2.0 * sum_squares(x) / SUPERBLOCK as f32;
        let mut scales = [0.0; 8];
        // The reference leaves no room in `qs` and `signs` for a sub-block of zeros, and so moves up
        // those that follow; only `qh` and `scales` stay in place.
        let mut written = 0;
        for (s, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let weights = match &importance {
                Some(importance) => weigh(x, part(importance, s), mean_square),
                None => x.map(|x| x * x),
            };
            let (magnitudes, signs) = split_signs::<32, 4>(x);
            let max = largest(&magnitudes);
            if max == 0.0 {
                continue;
            }
            let Fit::<8> { scale, points, negated } =
                fit(&BOOK, &SEARCH, &magnitudes, &weights, max, max / 15.0);
            scales[s] = scale;
            for (k, point) in points.into_iter().enumerate() {
                let [low, high] = point.to_le_bytes();
                block[2 + 8 * written + k] = low;
                block[66 + s] |= high << k;
            }
            let signs = signs.map(|signs| if negated { !signs } else { signs });
            block[74 + 4 * written..][..4].copy_from_slice(&signs);
            written += 1;
        }
        let max_scale = largest(&scales);
        if max_scale == 0.0 {
            return;
        }
        let d = max_scale / 31.0;
        block[0..2].copy_from_slice(&f32_to_f16(d * D_FACTOR).to_le_bytes());
        for (s, scale) in scales.into_iter().enumerate() {
            block[106 + s / 2] |= round_scale(1.0 / d, scale, 15) << (4 * (s % 2));
        }
    }
}
