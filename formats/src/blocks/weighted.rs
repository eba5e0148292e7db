//! How Q4_0, Q4_1, Q5_0 and Q5_1 are quantized with importance: scales are searched, not computed.
//!
//! Each candidate scale gives integers; for those, the scale (and min) that minimizes the weighted
//! squared error follows; the candidate with the smallest error wins. Candidates sit side by side in
//! the lanes of vectors, so that every sum still runs over the elements in the order of the reference
//! (llama.cpp, make_qx_quants and make_qkx3_quants).

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
/// sets the range of the next candidate and is subtracted there: lanes behind an improvement are
/// therefore computed again.
#[inline(always)]
pub(super) fn fit_affine<const MAX: u8>(
    x: &[f32; LEN],
    importance: Importance<'_, LEN>,
) -> (f32, f32, [u8; LEN]) {
    const LANES: usize = 8;
    const CANDIDATES: usize = 37;

    let (min, max) = min_max(x);
    let mut min = if min > 0.0 { 0.0 } else { min };
    if max <= min {
        return (0.0, min, [0; LEN]);
    }
    let weights = error_weights(x, importance);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for l in 1..LEN {
        sum_w += weights[l];
        sum_x += weights[l] * x[l];
    }
    let quantized =
        |inv_scale: f32, min: f32, x: f32| nearest_int(inv_scale * (x - min)).clamp(0, i32::from(MAX)) as f32;

    // What the integers are computed from: the inverse scale, and the min at that time.
    let mut best = (f32::from(MAX) / (max - min), min);
    let mut scale = 1.0 / best.0;
    let mut best_error = 0.0;
    for l in 0..LEN {
        let diff = scale * quantized(best.0, min, x[l]) + min - x[l];
        best_error += weights[l] * (diff * diff);
    }

    let mut first = 0;
    while first < CANDIDATES {
        let mut inv_scales = [0.0; LANES];
        for c in 0..LANES {
            inv_scales[c] = (-0.9 + 0.05 * (first + c) as f32 + f32::from(MAX)) / (max - min);
        }
        let (mut sums_q, mut sums_qq, mut sums_qx) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for l in 0..LEN {
            for c in 0..LANES {
                let q = quantized(inv_scales[c], min, x[l]);
                let wq = weights[l] * q;
                sums_q[c] += wq;
                sums_qq[c] += wq * q;
                sums_qx[c] += wq * x[l];
            }
        }
        let (mut determinants, mut scales, mut mins) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for c in 0..LANES {
            determinants[c] = sum_w * sums_qq[c] - sums_q[c] * sums_q[c];
            let free_scale = (sum_w * sums_qx[c] - sum_x * sums_q[c]) / determinants[c];
            let free_min = (sums_qq[c] * sum_x - sums_q[c] * sums_qx[c]) / determinants[c];
            scales[c] = if free_min > 0.0 { sums_qx[c] / sums_qq[c] } else { free_scale };
            mins[c] = if free_min > 0.0 { 0.0 } else { free_min };
        }
        let mut errors = [0.0; LANES];
        for l in 0..LEN {
            for c in 0..LANES {
                let diff = scales[c] * quantized(inv_scales[c], min, x[l]) + mins[c] - x[l];
                errors[c] += weights[l] * (diff * diff);
            }
        }

        let mut next = first + LANES;
        for c in 0..LANES.min(CANDIDATES - first) {
            if determinants[c] > 0.0 && errors[c] < best_error {
                best = (inv_scales[c], min);
                (scale, min, best_error) = (scales[c], mins[c], errors[c]);
                next = first + c + 1;
                break;
            }
        }
        first = next;
    }
    (scale, min, x.map(|x| quantized(best.0, best.1, x) as u8))
}
