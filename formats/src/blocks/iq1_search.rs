//! How IQ1 fits a sub-block: all ways to split its sorted elements into three levels, then the codebook.
//!
//! Levels 0, 1 and 2 stand for -1, 0 and 1, plus 0.125 in one shift and minus 0.125 in the other. With
//! the elements sorted, two cuts say which level each has, and sums up to the cuts give the score of
//! every pair (llama.cpp, quantize_row_iq1_s_impl and quantize_row_iq1_m_impl).

use std::sync::LazyLock;

use super::iq_codebook::{Choice, Codebook, Costs};
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

/// Sum w q x and sum w q q of `CHUNK` second cuts in each of `VARIANTS` shifts.
#[derive(Clone, Copy)]
pub(super) struct Sums<const VARIANTS: usize> {
    pub qx: [[f32; CHUNK]; VARIANTS],
    pub qq: [[f32; CHUNK]; VARIANTS],
}

/// Chunks of a first cut that splits 32 elements, all first cuts together.
const CHUNKS: usize = 160;

/// Scores all pairs of cuts in each of `VARIANTS` shifts, first cut by first cut, and takes the first
/// of the best; none if no sum of squares is positive.
///
/// `sums(first, second)` gives those of the second cuts from `second`, the last one again beyond `len`.
/// `weight` is the sum of all weights.
#[inline(always)]
pub(super) fn best_split<const VARIANTS: usize>(
    len: usize,
    weight: f32,
    sums: impl Fn(usize, usize) -> Sums<VARIANTS>,
) -> Option<Split> {
    let chunks =
        || (0..=len).flat_map(|first| (first..=len).step_by(CHUNK).map(move |second| (first, second)));

    // First the scores alone, without a branch: only pairs close to the largest can be the result.
    let mut scores = [[0.0; CHUNK]; CHUNKS];
    let mut largest = [0.0f32; CHUNK];
    let mut n = 0;
    for first in 0..=len {
        for second in (first..=len).step_by(CHUNK) {
            let Sums { qx, qq } = sums(first, second);
            let best = &mut scores[n];
            for variant in 0..VARIANTS {
                for c in 0..CHUNK {
                    let (qx, qq) = (qx[variant][c], qq[variant][c]);
                    let score = if qq > 0.0 { qx * qx / qq } else { 0.0 };
                    best[c] = if score > best[c] { score } else { best[c] };
                }
            }
            for c in 0..CHUNK {
                largest[c] = if best[c] > largest[c] { best[c] } else { largest[c] };
            }
            n += 1;
        }
    }
    let largest = largest.into_iter().fold(0.0, f32::max);
    // Where squares could overflow or lose digits, every pair is looked at.
    let ordinary = |x: f32| (1e-30..1e30).contains(&x);
    let exact = ordinary(largest) && ordinary(weight) && ordinary(largest * weight);
    let threshold = if exact { largest * 0.9999 } else { f32::NEG_INFINITY };

    let mut best = None;
    let mut best_score = -f32::MAX;
    for ((first, start), scores) in chunks().zip(&scores) {
        if scores.iter().all(|score| *score < threshold) {
            continue;
        }
        let Sums { qx, qq } = sums(first, start);
        for second in start..=len.min(start + CHUNK - 1) {
            for variant in 0..VARIANTS {
                let (qx, qq) = (qx[variant][second - start], qq[variant][second - start]);
                if qq > 0.0 && qx * qx > best_score * qq {
                    let scale = qx / qq;
                    best_score = scale * qx;
                    best = Some(Split { scale, first, second, variant });
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
    let mut costs = Costs::new();
    let mut choices = [Choice::default(); GROUPS];
    for (g, choice) in choices.iter_mut().enumerate() {
        *choice =
            book.choose(&mut costs, Codebook::<8, 3>::code(&levels[g]), &x[g], &weights[g], scale, values[g]);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_split_is_the_one_that_a_scan_of_all_pairs_ends_with() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / (1 << 24) as f32
        };
        // Scores close together, as scores near the best are; ordinary sums, and some beyond the range.
        for unit in [1.0, 1e-3, 1e-16, 1e15, 1e19] {
            for spread in [0.0, 1e-6, 1e-3, 1.0] {
                let table: Vec<(f32, f32)> = (0..33 * 33 * 2)
                    .map(|_| (unit * (1.0 + spread * random()), unit * (1.0 + spread * random())))
                    .collect();
                let at = |first: usize, second: usize, v: usize| table[(first * 33 + second) * 2 + v];
                let found = best_split::<2>(32, unit, |first, second| {
                    let mut sums = Sums { qx: [[0.0; CHUNK]; 2], qq: [[0.0; CHUNK]; 2] };
                    for v in 0..2 {
                        for c in 0..CHUNK {
                            (sums.qx[v][c], sums.qq[v][c]) = at(first, (second + c).min(32), v);
                        }
                    }
                    sums
                });
                let (mut best, mut best_score) = (None, -f32::MAX);
                for first in 0..=32 {
                    for second in first..=32 {
                        for v in 0..2 {
                            let (qx, qq) = at(first, second, v);
                            if qq > 0.0 && qx * qx > best_score * qq {
                                best_score = qx / qq * qx;
                                best = Some((first, second, v));
                            }
                        }
                    }
                }
                assert_eq!(found.map(|s| (s.first, s.second, s.variant)), best, "{unit} {spread}");
            }
        }
    }

    #[test]
    fn equal_elements_stay_in_the_order_of_their_indices() {
        assert_eq!(
            sorted(&[0.0, -1.0, -0.0, 2.0, -1.0, 0.0, f32::NEG_INFINITY, 1.0]),
            [6, 1, 4, 0, 2, 5, 7, 3]
        );
    }
}
