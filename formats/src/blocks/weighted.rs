//! How Q4_0, Q4_1, Q5_0 and Q5_1 are quantized with importance: scales are searched, not computed.
//!
//! Each candidate scale gives integers; for those, the scale (and min) that minimizes the weighted
//! squared error follows; the candidate with the smallest error wins (llama.cpp, make_qx_quants and
//! make_qkx3_quants). Every sum runs over the elements in the order of the reference. Where candidates do
//! not depend on each other, they sit side by side in the lanes of vectors; else the terms of the sums do.

use super::Importance;
use super::nibbles::{extreme, min_max};
use super::rounding::nearest_int;

/// Elements of a block.
const LEN: usize = 32;

/// `importance * sqrt(mean of x^2 over the row + x^2)`, the weight of each element's squared error.
#[inline(always)]
fn error_weights(x: &[f32; LEN], importance: Importance<'_, LEN>) -> [f32; LEN] {
    let mut weights = *importance.weights;
    for l in 0..LEN {
        weights[l] *= (importance.row_mean_square + x[l] * x[l]).sqrt();
    }
    weights
}

/// Fits `x = scale * (q - HALF)` with q in 0..2 HALF; returns scale and q.
///
/// Tries `-(HALF + i / 10) / extreme` as inverse scales, i in -9..=9.
#[inline(always)]
pub(super) fn fit_symmetric<const HALF: u8>(
    x: &[f32; LEN],
    importance: Importance<'_, LEN>,
) -> (f32, [u8; LEN]) {
    /// Below this a block counts as all zero.
    const ZERO_GROUP: f32 = 1e-15;
    /// In the order in which they are compared; the rest fills the last vector.
    const STEPS: [i8; 24] = [0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0, 0, 0];
    const CANDIDATES: usize = 19;

    let extreme = extreme(x);
    if extreme.abs() < ZERO_GROUP {
        return (0.0, [0; LEN]);
    }
    let weights = error_weights(x, importance);
    let half = i32::from(HALF);
    let quantized = |inv_scale: f32, x: f32| nearest_int(inv_scale * x).clamp(-half, half - 1);

    let inv_scales = STEPS.map(|i| -(f32::from(HALF) + 0.1 * f32::from(i)) / extreme);
    let (mut sums_qx, mut sums_qq) = ([0.0; STEPS.len()], [0.0; STEPS.len()]);
    for l in 0..LEN {
        let wx = weights[l] * x[l];
        for c in 0..STEPS.len() {
            let q = quantized(inv_scales[c], x[l]) as f32;
            sums_qx[c] += wx * q;
            sums_qq[c] += weights[l] * q * q;
        }
    }

    let mut inv_scale = inv_scales[0];
    let mut scale = if sums_qq[0] == 0.0 { 0.0 } else { sums_qx[0] / sums_qq[0] };
    let mut best_score = scale * sums_qx[0];
    for c in 1..CANDIDATES {
        let (sum_qx, sum_qq) = (sums_qx[c], sums_qq[c]);
        if sum_qq > 0.0 && sum_qx * sum_qx > best_score * sum_qq {
            inv_scale = inv_scales[c];
            scale = sum_qx / sum_qq;
            best_score = scale * sum_qx;
        }
    }
    (scale, x.map(|x| (quantized(inv_scale, x) + half) as u8))
}

/// Fits `x = scale * q + min` with q in 0..=MAX and min <= 0; returns scale, min and q.
///
/// Tries `(MAX - 0.9 + i / 20) / (max - min)` as inverse scales, i in 0..=36. The best min found so far
/// sets the range of the next candidate and is subtracted there, so candidates depend on each other.
#[inline(always)]
pub(super) fn fit_affine<const MAX: u8>(
    x: &[f32; LEN],
    importance: Importance<'_, LEN>,
) -> (f32, f32, [u8; LEN]) {
    let (min, max) = min_max(x);
    let mut min = if min > 0.0 { 0.0 } else { min };
    if max <= min {
        return (0.0, min, [0; LEN]);
    }
    let weights = error_weights(x, importance);
    let (mut sum_w, mut sum_x) = (0.0, 0.0);
    for l in 0..LEN {
        sum_w += weights[l];
        sum_x += weights[l] * x[l];
    }

    let inv_scale = f32::from(MAX) / (max - min);
    let mut scale = 1.0 / inv_scale;
    let mut q = quantized::<MAX>(x, inv_scale, min);
    let mut best_error = weighted_error(x, &weights, &q, scale, min);
    for i in 0u8..=36 {
        let inv_scale = (-0.9 + 0.05 * f32::from(i) + f32::from(MAX)) / (max - min);
        let candidate = quantized::<MAX>(x, inv_scale, min);
        let (mut wq, mut wqq, mut wqx) = ([0.0; LEN], [0.0; LEN], [0.0; LEN]);
        for l in 0..LEN {
            wq[l] = weights[l] * candidate[l];
            wqq[l] = wq[l] * candidate[l];
            wqx[l] = wq[l] * x[l];
        }
        let (mut sum_q, mut sum_qq, mut sum_qx) = (0.0, 0.0, 0.0);
        for l in 0..LEN {
            sum_q += wq[l];
            sum_qq += wqq[l];
            sum_qx += wqx[l];
        }
        let determinant = sum_w * sum_qq - sum_q * sum_q;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
            let mut this_min = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
            if this_min > 0.0 {
                this_min = 0.0;
                this_scale = sum_qx / sum_qq;
            }
            let error = weighted_error(x, &weights, &candidate, this_scale, this_min);
            if error < best_error {
                (q, best_error) = (candidate, error);
                (scale, min) = (this_scale, this_min);
            }
        }
    }
    (scale, min, q.map(|q| q as u8))
}

/// The integers of a scale and a min, as floats.
#[inline(always)]
fn quantized<const MAX: u8>(x: &[f32; LEN], inv_scale: f32, min: f32) -> [f32; LEN] {
    let mut q = [0.0; LEN];
    for l in 0..LEN {
        q[l] = nearest_int(inv_scale * (x[l] - min)).clamp(0, i32::from(MAX)) as f32;
    }
    q
}

/// The sum of `w (scale * q + min - x)^2`.
#[inline(always)]
fn weighted_error(x: &[f32; LEN], weights: &[f32; LEN], q: &[f32; LEN], scale: f32, min: f32) -> f32 {
    let mut errors = [0.0; LEN];
    for l in 0..LEN {
        let diff = scale * q[l] + min - x[l];
        errors[l] = weights[l] * (diff * diff);
    }
    let mut sum = 0.0;
    for error in errors {
        sum += error;
    }
    sum
}
