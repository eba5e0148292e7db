//! How IQ1 fits a sub-block: all ways to split its sorted elements into three levels, then the codebook.
//!
//! Levels 0, 1 and 2 stand for -1, 0 and 1, plus 0.125 in one shift and minus 0.125 in the other. With
//! the elements sorted, two cuts say which level each has, and sums up to the cuts give the score of
//! every pair (llama.cpp, quantize_row_iq1_s_impl and quantize_row_iq1_m_impl).

use std::sync::LazyLock;

use super::iq_codebook::Codebook;
use super::iq_grids;
use super::iq1_s::SHIFT;

pub(super) static BOOK: LazyLock<Codebook<8, 3>> = LazyLock::new(|| Codebook::new(&iq_grids::IQ1, 3));

/// What the levels stand for, shifted up and shifted down.
pub(super) const UP: [f32; 3] = [-1.0 + SHIFT, SHIFT, 1.0 + SHIFT];
pub(super) const DOWN: [f32; 3] = [-1.0 - SHIFT, -SHIFT, 1.0 - SHIFT];

/// Second cuts that are scored together.
pub(super) const CHUNK: usize = 4;

/// The indices of a sub-block in the order of its elements, equal ones in the order of indices.
#[inline(always)]
pub(super) fn sorted<const N: usize>(x: &[f32; N]) -> [usize; N] {
    let mut keys = [0u64; N];
    for i in 0..N {
        // Both zeros are equal, hence the addition; the integers then sort as the floats do.
        let bits = (x[i] + 0.0).to_bits();
        let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        keys[i] = u64::from(ordered) << 32 | i as u64;
    }
    keys.sort_unstable();
    keys.map(|key| key as u32 as usize % N)
}

/// The best way to split a sub-block.
pub(super) struct Split {
    pub scale: f32,
    /// Elements before it, in the order of their values, have level 0.
    pub first: usize,
    /// Elements from it on have level 2.
    pub second: usize,
    /// Which of the variants won.
    pub variant: usize,
}

/// Scores all pairs of cuts in each of `VARIANTS` shifts, first cut by first cut, and takes the first
/// of the best; none if no sum of squares is positive.
///
/// `sums(first, second)` gives sum w q x and sum w q q for the second cuts `second..second + CHUNK`,
/// whatever it likes for those beyond `len`.
#[inline(always)]
pub(super) fn best_split<const VARIANTS: usize>(
    len: usize,
    sums: impl Fn(usize, usize) -> [([f32; CHUNK], [f32; CHUNK]); VARIANTS],
) -> Option<Split> {
    let mut best = None;
    let mut best_score = -f32::MAX;
    let wins = |qx: f32, qq: f32, score: f32| {
        let (counts, better) = (qq > 0.0, qx * qx > score * qq);
        counts & better
    };
    for first in 0..=len {
        for chunk in (first..=len).step_by(CHUNK) {
            let sums = sums(first, chunk);
            // Until one wins the score to beat is the same for all.
            let mut any = false;
            for (qx, qq) in &sums {
                for c in 0..CHUNK {
                    any |= wins(qx[c], qq[c], best_score);
                }
            }
            if !any {
                continue;
            }
            for second in chunk..=len.min(chunk + CHUNK - 1) {
                for (variant, (qx, qq)) in sums.iter().enumerate() {
                    let (qx, qq) = (qx[second - chunk], qq[second - chunk]);
                    if wins(qx, qq, best_score) {
                        let scale = qx / qq;
                        best_score = scale * qx;
                        best = Some(Split { scale, first, second, variant });
                    }
                }
            }
        }
    }
    best
}

/// The level of each element of a split sub-block, and its scale made positive: the sign goes into the
/// levels. The variant must then be mirrored too, which is what the returned flag says.
#[inline(always)]
pub(super) fn assign_levels<const N: usize>(split: &Split, order: &[usize; N]) -> ([u8; N], f32, bool) {
    let mirrored = split.scale < 0.0;
    let mut levels = [0; N];
    for (rank, &i) in order.iter().enumerate() {
        let level = u8::from(rank >= split.first) + u8::from(rank >= split.second);
        levels[i] = if mirrored { 2 - level } else { level };
    }
    (levels, if mirrored { -split.scale } else { split.scale }, mirrored)
}

/// Gives each group of 8 its codebook point, and the scale again if a group was moved.
#[inline(always)]
pub(super) fn choose_points<const N: usize, const GROUPS: usize>(
    x: &[f32; N],
    weights: &[f32; N],
    levels: &[u8; N],
    values: [&[f32; 3]; GROUPS],
    scale: f32,
) -> ([u16; GROUPS], f32) {
    let book = &*BOOK;
    let (x, weights) = (x.as_chunks::<8>().0, weights.as_chunks::<8>().0);
    let levels = levels.as_chunks::<8>().0;
    let choices: [_; GROUPS] = std::array::from_fn(|g| {
        book.choose(Codebook::<8, 3>::code(&levels[g]), &x[g], &weights[g], scale, values[g])
    });
    let points = choices.map(|choice| choice.point);
    if choices.iter().all(|choice| choice.exact) {
        return (points, scale);
    }
    let (mut sum_qx, mut sum_qq) = (0.0, 0.0);
    for g in 0..GROUPS {
        for (i, level) in book.point(points[g]).iter().enumerate() {
            let q = values[g][usize::from(*level)];
            sum_qx += weights[g][i] * q * x[g][i];
            sum_qq += weights[g][i] * q * q;
        }
    }
    (points, if sum_qx > 0.0 && sum_qq > 0.0 { sum_qx / sum_qq } else { scale })
}
