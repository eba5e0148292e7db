//! The search of Q2_K, Q4_K and Q5_K: `x = (d * sc) * q - (dmin * m)` with 0 <= q, sc, m.
//!
//! Each sub-block is fitted by itself, the scales and mins of a superblock are rounded to a common
//! factor each, and q is chosen again for the rounded ones (llama.cpp, quantize_row_q4_K_ref without
//! importance and quantize_row_q4_K_impl with it).

use super::Importance;
use super::half::f16_to_f32;
use super::half::f32_to_f16;
use super::k_quants::{SUPERBLOCK, SubBlocks, error_weights, level, side_by_side, sums};
use super::rounding::nearest_int;

/// The candidate scales of a sub-block: `(first + step * i + q_max) / (max - min)`, i in 0..=last.
pub(super) struct Candidates {
    pub first: f32,
    pub step: f32,
    pub last: u8,
}

/// What a type searches without importance; with it all use [`WITH_IMPORTANCE`].
pub(super) struct Plan {
    /// Largest q.
    pub q_max: u8,
    /// Largest sc and m.
    pub scale_max: u8,
    pub candidates: Candidates,
    pub weight: Weight,
    /// Of [`error_weights`].
    pub spread: f32,
}

/// How much an error in x counts where there is no importance.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Weight {
    /// `(rms of the sub-block + |x|)` times the squared error.
    RmsPlusMagnitude,
    /// `|x|` times the absolute error (scale and min are fitted to the squared one all the same).
    Magnitude,
}

const WITH_IMPORTANCE: Candidates = Candidates { first: -0.9, step: 0.05, last: 36 };

/// A fitted superblock.
pub(super) struct Affine<const S: usize> {
    /// f16 bits.
    pub d: u16,
    /// f16 bits.
    pub dmin: u16,
    /// Scales in units of d; above `scale_max` where a fit came out negative and wrapped.
    pub sc: [u8; S],
    /// Mins in units of dmin.
    pub m: [u8; S],
    q_max: i32,
    fit: Fit<S>,
}

/// The best `x = scale * q - min` of every sub-block, where `q = level(inverse * (x - offset))`.
struct Fit<const S: usize> {
    scale: [f32; S],
    min: [f32; S],
    inverse: [f32; S],
    offset: [f32; S],
}

/// Fits a superblock of `S` sub-blocks of `N` elements.
#[inline(always)]
pub(super) fn fit_affine<const S: usize, const N: usize>(
    x: &[f32; SUPERBLOCK],
    importance: Option<Importance<'_, SUPERBLOCK>>,
    plan: &Plan,
) -> Affine<S> {
    let lanes = side_by_side::<S, N>(x);
    let q_max = i32::from(plan.q_max);
    if let Some(importance) = importance {
        let weights = error_weights(x, importance, plan.spread);
        let fit = fit_sub_blocks(&lanes, &weights, q_max, &WITH_IMPORTANCE, false);
        let sub_weights = sums(&weights);
        let (d, sc) = common_factor(&fit.scale, &sub_weights, plan.scale_max);
        let (dmin, m) = common_factor(&fit.min, &sub_weights, plan.scale_max);
        Affine { d: f32_to_f16(d), dmin: f32_to_f16(dmin), sc, m, q_max, fit }
    } else {
        let weights = magnitude_weights(&lanes, plan.weight);
        let absolute = plan.weight == Weight::Magnitude;
        let fit = fit_sub_blocks(&lanes, &weights, q_max, &plan.candidates, absolute);
        let (d, sc) = largest_factor(&fit.scale, plan.scale_max);
        let (dmin, m) = largest_factor(&fit.min, plan.scale_max);
        Affine { d: f32_to_f16(d), dmin: f32_to_f16(dmin), sc, m, q_max, fit }
    }
}

impl<const S: usize> Affine<S> {
    /// q for the scales and mins as they were rounded.
    #[inline(always)]
    pub(super) fn quantize<const N: usize>(&self, x: &[f32; SUPERBLOCK]) -> [u8; SUPERBLOCK] {
        let (d, dmin) = (f16_to_f32(self.d), f16_to_f32(self.dmin));
        let mut q = [0; SUPERBLOCK];
        let (x, _) = x.as_chunks::<N>();
        let (out, _) = q.as_chunks_mut::<N>();
        for s in 0..S {
            let scale = d * f32::from(self.sc[s]);
            if scale == 0.0 {
                // Multiplied by zero, the numbers of the fit stay.
                let (inverse, offset) = (self.fit.inverse[s], self.fit.offset[s]);
                for l in 0..N {
                    out[s][l] = level(inverse * (x[s][l] - offset), 0, self.q_max) as u8;
                }
            } else {
                let min = dmin * f32::from(self.m[s]);
                for l in 0..N {
                    out[s][l] = nearest_int((x[s][l] + min) / scale).clamp(0, self.q_max) as u8;
                }
            }
        }
        q
    }
}

#[inline(always)]
fn magnitude_weights<const S: usize, const N: usize>(x: &SubBlocks<S, N>, weight: Weight) -> SubBlocks<S, N> {
    let mut rms = [0.0; S];
    if weight == Weight::RmsPlusMagnitude {
        for x in x {
            for s in 0..S {
                rms[s] += x[s] * x[s];
            }
        }
        for s in 0..S {
            rms[s] = (rms[s] / N as f32).sqrt();
        }
    }
    let mut weights = [[0.0; S]; N];
    for l in 0..N {
        for s in 0..S {
            weights[l][s] = rms[s] + x[l][s].abs();
        }
    }
    weights
}

/// Fits `x = scale * q - min`, 0 <= min, to every sub-block.
///
/// Tries the candidate scales in turn; for the q of each, scale and min are the weighted least
/// squares solution. The best min found so far sets the range of the next candidate and is subtracted
/// there, so that candidates depend on each other (llama.cpp, make_qkx2_quants and make_qkx3_quants).
#[inline(always)]
fn fit_sub_blocks<const S: usize, const N: usize>(
    x: &SubBlocks<S, N>,
    weights: &SubBlocks<S, N>,
    q_max: i32,
    candidates: &Candidates,
    absolute: bool,
) -> Fit<S> {
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = ([0.0; S], [0.0; S]);
    for l in 0..N {
        for s in 0..S {
            min[s] = if x[l][s] < min[s] { x[l][s] } else { min[s] };
            max[s] = if x[l][s] > max[s] { x[l][s] } else { max[s] };
            sum_w[s] += weights[l][s];
            sum_x[s] += weights[l][s] * x[l][s];
        }
    }
    let (mut inverse, mut scale) = ([0.0; S], [0.0; S]);
    for s in 0..S {
        min[s] = if min[s] > 0.0 { 0.0 } else { min[s] };
        inverse[s] = q_max as f32 / (max[s] - min[s]);
        scale[s] = 1.0 / inverse[s];
    }
    let lowest = min;
    let mut offset = min;

    let mut q = [[0.0; S]; N];
    for l in 0..N {
        for s in 0..S {
            q[l][s] = level(inverse[s] * (x[l][s] - min[s]), 0, q_max);
        }
    }
    let mut best_error = errors(x, weights, &q, &scale, &min, absolute);

    for i in 0..=candidates.last {
        let numerator = candidates.first + candidates.step * f32::from(i) + q_max as f32;
        let mut candidate = [0.0; S];
        for s in 0..S {
            candidate[s] = numerator / (max[s] - min[s]);
        }
        let (mut sum_q, mut sum_qq, mut sum_qx) = ([0.0; S], [0.0; S], [0.0; S]);
        for l in 0..N {
            for s in 0..S {
                let level = level(candidate[s] * (x[l][s] - min[s]), 0, q_max);
                q[l][s] = level;
                let wq = weights[l][s] * level;
                sum_q[s] += wq;
                sum_qq[s] += wq * level;
                sum_qx[s] += wq * x[l][s];
            }
        }
        let (mut determinant, mut this_scale, mut this_min) = ([0.0; S], [0.0; S], [0.0; S]);
        for s in 0..S {
            determinant[s] = sum_w[s] * sum_qq[s] - sum_q[s] * sum_q[s];
            let free_scale = (sum_w[s] * sum_qx[s] - sum_x[s] * sum_q[s]) / determinant[s];
            let free_min = (sum_qq[s] * sum_x[s] - sum_q[s] * sum_qx[s]) / determinant[s];
            let bound_scale = sum_qx[s] / sum_qq[s];
            this_scale[s] = if free_min > 0.0 { bound_scale } else { free_scale };
            this_min[s] = if free_min > 0.0 { 0.0 } else { free_min };
        }
        let this_error = errors(x, weights, &q, &this_scale, &this_min, absolute);
        for s in 0..S {
            let better = (determinant[s] > 0.0) & (this_error[s] < best_error[s]);
            best_error[s] = if better { this_error[s] } else { best_error[s] };
            inverse[s] = if better { candidate[s] } else { inverse[s] };
            offset[s] = if better { min[s] } else { offset[s] };
            scale[s] = if better { this_scale[s] } else { scale[s] };
            min[s] = if better { this_min[s] } else { min[s] };
        }
    }

    for s in 0..S {
        let flat = max[s] == lowest[s];
        scale[s] = if flat { 0.0 } else { scale[s] };
        inverse[s] = if flat { 0.0 } else { inverse[s] };
        offset[s] = if flat { 0.0 } else { offset[s] };
        min[s] = -if flat { lowest[s] } else { min[s] };
    }
    Fit { scale, min, inverse, offset }
}

/// The weighted sum of `(scale * q + min - x)^2`, or of its magnitude, over every sub-block.
#[inline(always)]
fn errors<const S: usize, const N: usize>(
    x: &SubBlocks<S, N>,
    weights: &SubBlocks<S, N>,
    q: &SubBlocks<S, N>,
    scale: &[f32; S],
    min: &[f32; S],
    absolute: bool,
) -> [f32; S] {
    let mut errors = [0.0; S];
    for l in 0..N {
        for s in 0..S {
            let diff = scale[s] * q[l][s] + min[s] - x[l][s];
            errors[s] += weights[l][s] * if absolute { diff.abs() } else { diff * diff };
        }
    }
    errors
}

/// Rounds non-negative numbers to multiples of `largest / most`; returns that factor and the multiples.
#[inline(always)]
fn largest_factor<const S: usize>(x: &[f32; S], most: u8) -> (f32, [u8; S]) {
    let mut largest = 0.0;
    for &x in x {
        largest = if x > largest { x } else { largest };
    }
    let inverse = if largest > 0.0 { f32::from(most) / largest } else { 0.0 };
    let mut multiples = [0; S];
    for s in 0..S {
        multiples[s] = nearest_int(inverse * x[s]) as u8;
    }
    (largest / f32::from(most), multiples)
}

/// Below this a group counts as all zero.
const ZERO_GROUP: f32 = 1e-15;

/// Rounds non-negative numbers to multiples of a factor that minimizes the weighted squared error.
///
/// Nine factors around `largest / most` are tried; then single multiples are moved while that helps
/// (llama.cpp, make_qp_quants). Multiples are bytes: a negative number wraps.
#[inline(always)]
fn common_factor<const S: usize>(x: &[f32; S], weights: &[f32; S], most: u8) -> (f32, [u8; S]) {
    let mut largest = 0.0;
    for &x in x {
        largest = if largest > x { largest } else { x };
    }
    if largest < ZERO_GROUP {
        return (0.0, [0; S]);
    }
    let most = i32::from(most);
    let mut inverse = most as f32 / largest;
    let mut best_error = 0.0;
    for s in 0..S {
        let diff = x[s] - 1.0 / inverse * f32::from(nearest_int(inverse * x[s]) as u8);
        best_error += weights[s] * diff * diff;
    }
    for i in (-4..=4).filter(|i| *i != 0) {
        let candidate = (0.1 * i as f32 + most as f32) / largest;
        let factor = 1.0 / candidate;
        let mut error = 0.0;
        for s in 0..S {
            let diff = x[s] - factor * nearest_int(candidate * x[s]).min(most) as f32;
            error += weights[s] * diff * diff;
        }
        if error < best_error {
            (best_error, inverse) = (error, candidate);
        }
    }

    let mut multiples = [0u8; S];
    let (mut sum_mx, mut sum_mm) = (0.0, 0.0);
    for s in 0..S {
        let m = nearest_int(inverse * x[s]).min(most);
        multiples[s] = m as u8;
        sum_mx += weights[s] * x[s] * m as f32;
        sum_mm += weights[s] * m as f32 * m as f32;
    }
    for _ in 0..5 {
        let mut changed = false;
        for s in 0..S {
            let (wx, old) = (weights[s] * x[s], f32::from(multiples[s]));
            let mut mx = sum_mx - wx * old;
            let mut mm = sum_mm - weights[s] * old * old;
            if mx > 0.0 && mm > 0.0 {
                let m = nearest_int(x[s] * mm / mx).min(most);
                if m != i32::from(multiples[s]) {
                    mx += wx * m as f32;
                    mm += weights[s] * m as f32 * m as f32;
                    if mx * mx * sum_mm > sum_mx * sum_mx * mm {
                        multiples[s] = m as u8;
                        (sum_mx, sum_mm) = (mx, mm);
                        changed = true;
                    }
                }
            }
        }
        if !changed {
            break;
        }
    }
    (if sum_mm > 0.0 { sum_mx / sum_mm } else { 0.0 }, multiples)
}
