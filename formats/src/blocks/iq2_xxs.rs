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

use std::sync::LazyLock;

use super::half::{f32_to_f16, read_f16};
use super::iq_codebook::Codebook;
use super::iq_grids::{self, even_signs, write_signed};
use super::iq_search::{
    Fit, Refit, Search, fit, largest, part, round_scale, split_even_signs, sum_squares, weigh,
};
use super::k_quants::SUPERBLOCK;
use super::rounding::nearest_int;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

/// Below this a sub-block counts as all zero.
const ZERO_GROUP: f32 = 1e-15;

const SEARCH: Search = Search { reach: 6, step: 0.1, refit: Refit::Every };

static BOOK: LazyLock<Codebook<8, 3>> = LazyLock::new(|| Codebook::new(&iq_grids::IQ2_XXS, 2));

pub(super) static Q: [[i8; 8]; 256] = iq_grids::levels(&iq_grids::IQ2_XXS, [8, 25, 43]);

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

impl Quantize<66, SUPERBLOCK> for IQ2_XXS {
    fn quantize(x: &[f32; SUPERBLOCK], importance: Option<Importance<'_, SUPERBLOCK>>, block: &mut [u8; 66]) {
        let importance = importance.expect("the type table says that importance is required");
        *block = [0; 66];
        let mean_square = sum_squares(x) / SUPERBLOCK as f32;
        let mut scales = [0.0; 8];
        let (_, qs) = block.split_at_mut(2);
        let qs = qs.as_chunks_mut::<8>().0;
        for (s, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let weights = weigh(x, part(&importance, s), mean_square);
            let (magnitudes, signs) = split_even_signs::<32, 4>(x, &weights);
            if largest(&magnitudes) < ZERO_GROUP {
                continue;
            }
            let scale = fit_levels(&magnitudes, &weights);
            let range = scale * 3.0;
            if range <= 0.0 {
                continue;
            }
            let Fit::<4> { scale, points, negated } =
                fit(&BOOK, &SEARCH, &magnitudes, &weights, range, scale);
            scales[s] = scale;
            let mut packed = 0;
            for k in 0..4 {
                qs[s][k] = points[k] as u8;
                let signs = if negated { !signs[k] } else { signs[k] };
                packed |= u32::from(signs & 127) << (7 * k);
            }
            qs[s][4..].copy_from_slice(&packed.to_le_bytes());
        }
        let max_scale = largest(&scales);
        if max_scale == 0.0 {
            *block = [0; 66];
            return;
        }
        let d = max_scale / 31.0;
        for (qs, scale) in qs.iter_mut().zip(scales) {
            qs[7] |= round_scale(1.0 / d, scale, 15) << 4;
        }
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
    }
}

/// Levels 0..=4 of a sub-block that is not zero, `x = scale * level`; returns the scale.
///
/// Takes the best of nine scales, then moves single elements as long as that helps (llama.cpp,
/// make_qp_quants). Levels are kept as u8 there, so that the level of a negative number wraps around.
fn fit_levels(x: &[f32; 32], weights: &[f32; 32]) -> f32 {
    const MAX: i32 = 4;
    let max = x.iter().fold(0.0, |max, &x| if max > x { max } else { x });
    let error = |scale: f32, level: &dyn Fn(f32) -> f32| {
        x.iter().zip(weights).fold(0.0, |sum, (x, w)| {
            let diff = x - scale * level(*x);
            sum + w * diff * diff
        })
    };
    let mut inverse = MAX as f32 / max;
    let mut least = error(1.0 / inverse, &|x| f32::from(nearest_int(inverse * x) as u8));
    for i in (-4i8..=4).filter(|i| *i != 0) {
        let this_inverse = (0.1 * f32::from(i) + MAX as f32) / max;
        let this = error(1.0 / this_inverse, &|x| nearest_int(this_inverse * x).min(MAX) as f32);
        if this < least {
            (least, inverse) = (this, this_inverse);
        }
    }

    let mut levels = [0; 32];
    let (mut sum_lx, mut sum_ll) = (0.0, 0.0);
    for i in 0..32 {
        let level = nearest_int(inverse * x[i]).min(MAX);
        levels[i] = level as u8;
        sum_lx += weights[i] * x[i] * level as f32;
        sum_ll += weights[i] * level as f32 * level as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for i in 0..32 {
            let (x, w, level) = (x[i], weights[i], f32::from(levels[i]));
            let (lx, ll) = (sum_lx - w * x * level, sum_ll - w * level * level);
            if !(lx > 0.0 && ll > 0.0) {
                continue;
            }
            let new = nearest_int(x * ll / lx).min(MAX);
            if new == i32::from(levels[i]) {
                continue;
            }
            let (lx, ll) = (lx + w * x * new as f32, ll + w * new as f32 * new as f32);
            if lx * lx * sum_ll > sum_lx * sum_lx * ll {
                levels[i] = new as u8;
                (sum_lx, sum_ll) = (lx, ll);
                changed = true;
            }
        }
        if !changed {
            break;
        }
    }
    if sum_ll > 0.0 { sum_lx / sum_ll } else { 0.0 }
}
