//! How IQ2 and IQ3 fit a sub-block: signs apart, then a scale and a codebook point for every group.
//!
//! Levels l stand for the magnitudes 2l + 1. Each candidate scale rounds the sub-block to codebook
//! points; the points with the largest `(sum w x q)^2 / sum w q^2` win, the scale being their least
//! squares solution (llama.cpp, quantize_row_iq2_xs_impl and its siblings).

use std::array;

use super::Importance;
use super::iq_codebook::{Choice, Codebook, Costs};
use super::k_quants::SUPERBLOCK;
use super::rounding::nearest_int;

/// What differs between the types.
pub(super) struct Search {
    /// Candidates are `(2 * LEVELS - 1 + step * i) / range` for i in -reach..=reach.
    pub reach: i8,
    pub step: f32,
    pub refit: Refit,
}

/// Which groups choose their point again once the scale is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refit {
    Every,
    /// Those whose point is not what they rounded to.
    Moved,
    /// All of them if one of them moved, or if no candidate won.
    EveryIfOneMoved,
}

/// A fitted sub-block.
pub(super) struct Fit<const GROUPS: usize> {
    /// Not negative.
    pub scale: f32,
    pub points: [u16; GROUPS],
    /// The least squares scale was negative: all signs are the other way round.
    pub negated: bool,
}

/// Candidates that a search has at most.
const CANDIDATES: usize = 32;

/// The importance of each element, weighed by its own magnitude and the mean square of the superblock.
#[inline(always)]
pub(super) fn weigh<const N: usize>(x: &[f32; N], importance: &[f32; N], mean_square: f32) -> [f32; N] {
    array::from_fn(|i| importance[i] * (mean_square + x[i] * x[i]).sqrt())
}

/// The part of an importance that belongs to sub-block `s`.
#[inline(always)]
pub(super) fn part<'a, const SUB: usize>(
    importance: &Importance<'a, SUPERBLOCK>,
    s: usize,
) -> &'a [f32; SUB] {
    &importance.weights.as_chunks().0[s]
}

/// Sum of x^2, in f32 from left to right.
#[inline(always)]
pub(super) fn sum_squares<const N: usize>(x: &[f32; N]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x)
}

/// Magnitudes, and a sign byte for every 8 elements with bit i set where element i is negative.
#[inline(always)]
pub(super) fn split_signs<const N: usize, const BYTES: usize>(x: &[f32; N]) -> ([f32; N], [u8; BYTES]) {
    let negative = |x: f32| x < 0.0;
    let magnitudes = x.map(|x| if negative(x) { -x } else { x });
    let signs = array::from_fn(|k| (0..8).fold(0, |s, i| s | u8::from(negative(x[8 * k + i])) << i));
    (magnitudes, signs)
}

/// As [`split_signs`], with the sign of the least important element of every 8 flipped where the number
/// of negative ones is odd; its magnitude is then negative.
#[inline(always)]
pub(super) fn split_even_signs<const N: usize, const BYTES: usize>(
    x: &[f32; N],
    weights: &[f32; N],
) -> ([f32; N], [u8; BYTES]) {
    let (mut magnitudes, mut signs) = split_signs::<N, BYTES>(x);
    for (k, signs) in signs.iter_mut().enumerate() {
        if signs.count_ones() % 2 == 1 {
            let loss = |i: usize| weights[i] * x[i] * x[i];
            let mut least = 8 * k;
            for i in 8 * k + 1..8 * k + 8 {
                least = if loss(i) < loss(least) { i } else { least };
            }
            magnitudes[least] = -magnitudes[least];
            *signs ^= 1 << (least % 8);
        }
    }
    (magnitudes, signs)
}

/// The largest of some numbers.
#[inline(always)]
pub(super) fn largest<const N: usize>(x: &[f32; N]) -> f32 {
    x.iter().fold(x[0], |max, &x| if max > x { max } else { x })
}

/// The number in `0..=max` for a sub-block scale in units of `1 / inverse`, levels being 2l + 1.
#[inline(always)]
pub(super) fn round_scale(inverse: f32, scale: f32, max: i32) -> u8 {
    nearest_int(0.5 * (inverse * scale - 1.0)).clamp(0, max) as u8
}

/// Fits one sub-block of magnitudes; `range` is the largest, or what the largest level should stand for.
///
/// `scale` is the scale if no candidate wins.
#[inline(always)]
pub(super) fn fit<const SUB: usize, const LANES: usize, const LEVELS: usize, const GROUPS: usize>(
    book: &Codebook<LANES, LEVELS>,
    search: &Search,
    x: &[f32; SUB],
    weights: &[f32; SUB],
    range: f32,
    mut scale: f32,
) -> Fit<GROUPS> {
    const { assert!(GROUPS * LANES == SUB) };
    let values: [f32; LEVELS] = array::from_fn(|l| (2 * l + 1) as f32);
    let roots = weights.map(f32::sqrt);
    let (x_groups, root_groups) = (x.as_chunks::<LANES>().0, roots.as_chunks::<LANES>().0);

    // Unused candidates repeat the last one.
    let inverses: [f32; CANDIDATES] = array::from_fn(|c| {
        let i = (c as i32 - i32::from(search.reach)).min(search.reach.into());
        ((2 * LEVELS - 1) as f32 + i as f32 * search.step) / range
    });
    let mut codes = [[0; CANDIDATES]; GROUPS];
    for (codes, x) in codes.iter_mut().zip(x_groups) {
        round_to_codes::<LANES, LEVELS, CANDIDATES>(x, &inverses, codes);
    }

    // The terms of both sums for every level of every element.
    let mut terms = [[(0.0, 0.0); 8]; SUB];
    for i in 0..SUB {
        let wx = weights[i] * x[i];
        for (term, q) in terms[i].iter_mut().zip(values) {
            *term = (wx * q, weights[i] * q * q);
        }
    }
    let sums = |choices: &[Choice; GROUPS]| {
        let (mut sum_qx, mut sum_qq) = (0.0, 0.0);
        for (terms, choice) in terms.as_chunks::<LANES>().0.iter().zip(choices) {
            for (terms, level) in terms.iter().zip(book.point(choice.point)) {
                let (qx, qq) = terms[usize::from(level % 8)];
                sum_qx += qx;
                sum_qq += qq;
            }
        }
        (sum_qx, sum_qq)
    };

    let mut costs = Costs::new();
    let mut best = [Choice { point: 0, exact: search.refit == Refit::Moved }; GROUPS];
    let mut best_score = 0.0;
    let mut last = None;
    for c in 0..=2 * search.reach as usize {
        let this_scale = 1.0 / inverses[c];
        let mut choices = [Choice::default(); GROUPS];
        for (g, choice) in choices.iter_mut().enumerate() {
            *choice = book.choose(
                &mut costs,
                codes[g][c] as usize,
                &x_groups[g],
                &root_groups[g],
                this_scale,
                &values,
            );
        }
        // The same choices again change nothing.
        if last == Some(choices) {
            continue;
        }
        last = Some(choices);
        let (sum_qx, sum_qq) = sums(&choices);
        if sum_qq > 0.0 && sum_qx * sum_qx > best_score * sum_qq {
            scale = sum_qx / sum_qq;
            best_score = scale * sum_qx;
            best = choices;
        }
    }

    let moved = best.iter().any(|choice| !choice.exact);
    if (moved || search.refit == Refit::Every) && scale > 0.0 {
        let inverse = 1.0 / scale;
        for (g, choice) in best.iter_mut().enumerate() {
            if search.refit == Refit::Moved && choice.exact {
                continue;
            }
            let mut code = [0];
            round_to_codes::<LANES, LEVELS, 1>(&x_groups[g], &[inverse], &mut code);
            *choice =
                book.choose(&mut costs, code[0] as usize, &x_groups[g], &root_groups[g], scale, &values);
        }
        let (sum_qx, sum_qq) = sums(&best);
        if sum_qq > 0.0 {
            scale = sum_qx / sum_qq;
        }
    }
    let negated = scale < 0.0;
    Fit { scale: if negated { -scale } else { scale }, points: best.map(|choice| choice.point), negated }
}

/// The codes of one group for each of `N` inverse scales.
#[inline(always)]
fn round_to_codes<const LANES: usize, const LEVELS: usize, const N: usize>(
    x: &[f32; LANES],
    inverses: &[f32; N],
    codes: &mut [i32; N],
) {
    *codes = [0; N];
    for &x in x.iter().rev() {
        for (code, inverse) in codes.iter_mut().zip(inverses) {
            let level = nearest_int(0.5 * (inverse * x - 1.0)).clamp(0, LEVELS as i32 - 1);
            *code = *code * LEVELS as i32 + level;
        }
    }
}
