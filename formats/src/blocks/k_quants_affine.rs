//! The search of Q2_K, Q4_K and Q5_K: `x = (d * sc) * q - (dmin * m)` with 0 <= q, sc, m.
//!
//! Each sub-block is fitted by itself, the scales and mins of a superblock are rounded to a common
//! factor each, and q is chosen again for the rounded ones (llama.cpp, quantize_row_q4_K_ref without
//! importance and quantize_row_q4_K_impl with it).

#![expect(
    clippy::needless_bitwise_bool,
    reason = "a lazy operator is a branch, and branches do not vectorize"
)]

use super::half::{f16_to_f32, f32_to_f16};
use super::k_quants::{
    LANES, Lanes, SUPERBLOCK, error_weights, level, of_superblock, select, side_by_side, sums,
};
use super::rounding::nearest_int;

/// What distinguishes the types.
pub(super) struct Plan {
    /// Largest q.
    pub q_max: u8,
    /// Largest sc and m.
    pub scale_max: u8,
    /// Without importance; with it all types try [`WITH_IMPORTANCE`].
    pub candidates: Candidates,
    /// Without importance.
    pub weight: Weight,
    /// With importance, of [`error_weights`].
    pub spread: f32,
}

/// The scales that are tried for a sub-block: `(first + step * i + q_max) / (max - min)`, i in 0..=last.
pub(super) struct Candidates {
    pub first: f32,
    pub step: f32,
    pub last: u8,
}

const WITH_IMPORTANCE: Candidates = Candidates { first: -0.9, step: 0.05, last: 36 };

/// How much an error in x counts where there is no importance.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Weight {
    /// `(rms of the sub-block + |x|)` times the squared error.
    RmsPlusMagnitude,
    /// `|x|` times the absolute error (scale and min are fitted to the squared one all the same).
    Magnitude,
}

/// The best `x = scale * q - min` of every sub-block, with `q = level(inverse * (x - offset))`.
pub(super) struct Fits {
    scale: [f32; LANES],
    min: [f32; LANES],
    inverse: [f32; LANES],
    offset: [f32; LANES],
    /// With importance, the sum of the weights of each sub-block.
    weight: Option<[f32; LANES]>,
}

/// Fits the sub-blocks of superblocks, `N` elements each.
#[inline(always)]
pub(super) fn fit_affine<const N: usize>(
    x: &[[f32; SUPERBLOCK]],
    importance: Option<&[[f32; SUPERBLOCK]]>,
    plan: &Plan,
) -> Fits {
    let lanes = side_by_side::<N>(x);
    if let Some(importance) = importance {
        let weights = error_weights(x, importance, plan.spread);
        let fits = fit_sub_blocks(&lanes, &weights, plan.q_max, &WITH_IMPORTANCE, false);
        Fits { weight: Some(sums(&weights)), ..fits }
    } else {
        let weights = magnitude_weights(&lanes, plan.weight);
        let absolute = plan.weight == Weight::Magnitude;
        fit_sub_blocks(&lanes, &weights, plan.q_max, &plan.candidates, absolute)
    }
}

#[inline(always)]
fn magnitude_weights<const N: usize>(x: &Lanes<N>, weight: Weight) -> Lanes<N> {
    let mut rms = [0.0; LANES];
    if weight == Weight::RmsPlusMagnitude {
        for x in x {
            for s in 0..LANES {
                rms[s] += x[s] * x[s];
            }
        }
        for s in 0..LANES {
            rms[s] = (rms[s] / N as f32).sqrt();
        }
    }
    let mut weights = [[0.0; LANES]; N];
    for l in 0..N {
        for s in 0..LANES {
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
fn fit_sub_blocks<const N: usize>(
    x: &Lanes<N>,
    weights: &Lanes<N>,
    q_max: u8,
    candidates: &Candidates,
    absolute: bool,
) -> Fits {
    let (mut min, mut max) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = ([0.0; LANES], [0.0; LANES]);
    for l in 0..N {
        for s in 0..LANES {
            min[s] = select(x[l][s] < min[s], x[l][s], min[s]);
            max[s] = select(x[l][s] > max[s], x[l][s], max[s]);
            sum_w[s] += weights[l][s];
            sum_x[s] += weights[l][s] * x[l][s];
        }
    }
    let (mut inverse, mut scale) = ([0.0; LANES], [0.0; LANES]);
    for s in 0..LANES {
        min[s] = select(min[s] > 0.0, 0.0, min[s]);
        inverse[s] = f32::from(q_max) / (max[s] - min[s]);
        scale[s] = 1.0 / inverse[s];
    }
    let lowest = min;
    let mut offset = min;

    let mut q = [[0.0; LANES]; N];
    for l in 0..N {
        for s in 0..LANES {
            q[l][s] = level(inverse[s] * (x[l][s] - min[s]), 0, q_max.into());
        }
    }
    let mut best_error = errors(x, weights, &q, &scale, &min, absolute);

    for i in 0..=candidates.last {
        let numerator = candidates.first + candidates.step * f32::from(i) + f32::from(q_max);
        let mut candidate = [0.0; LANES];
        for s in 0..LANES {
            candidate[s] = numerator / (max[s] - min[s]);
        }
        let (mut sum_q, mut sum_qq, mut sum_qx) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for l in 0..N {
            for s in 0..LANES {
                let level = level(candidate[s] * (x[l][s] - min[s]), 0, q_max.into());
                q[l][s] = level;
                let wq = weights[l][s] * level;
                sum_q[s] += wq;
                sum_qq[s] += wq * level;
                sum_qx[s] += wq * x[l][s];
            }
        }
        let (mut determinant, mut this_scale, mut this_min) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        for s in 0..LANES {
            determinant[s] = sum_w[s] * sum_qq[s] - sum_q[s] * sum_q[s];
            let free_scale = (sum_w[s] * sum_qx[s] - sum_x[s] * sum_q[s]) / determinant[s];
            let free_min = (sum_qq[s] * sum_x[s] - sum_q[s] * sum_qx[s]) / determinant[s];
            let bound_scale = sum_qx[s] / sum_qq[s];
            this_scale[s] = select(free_min > 0.0, bound_scale, free_scale);
            this_min[s] = select(free_min > 0.0, 0.0, free_min);
        }
        let this_error = errors(x, weights, &q, &this_scale, &this_min, absolute);
        for s in 0..LANES {
            let better = (determinant[s] > 0.0) & (this_error[s] < best_error[s]);
            best_error[s] = select(better, this_error[s], best_error[s]);
            inverse[s] = select(better, candidate[s], inverse[s]);
            offset[s] = select(better, min[s], offset[s]);
            scale[s] = select(better, this_scale[s], scale[s]);
            min[s] = select(better, this_min[s], min[s]);
        }
    }

    for s in 0..LANES {
        let flat = max[s] == lowest[s];
        scale[s] = select(flat, 0.0, scale[s]);
        inverse[s] = select(flat, 0.0, inverse[s]);
        offset[s] = select(flat, 0.0, offset[s]);
        min[s] = -select(flat, lowest[s], min[s]);
    }
    Fits { scale, min, inverse, offset, weight: None }
}

/// The weighted sum of `(scale * q + min - x)^2`, or of its magnitude, over every sub-block.
#[inline(always)]
fn errors<const N: usize>(
    x: &Lanes<N>,
    weights: &Lanes<N>,
    q: &Lanes<N>,
    scale: &[f32; LANES],
    min: &[f32; LANES],
    absolute: bool,
) -> [f32; LANES] {
    let mut errors = [0.0; LANES];
    for l in 0..N {
        for s in 0..LANES {
            let diff = scale[s] * q[l][s] + min[s] - x[l][s];
            errors[s] += weights[l][s] * if absolute { diff.abs() } else { diff * diff };
        }
    }
    errors
}

/// A superblock with rounded scales and mins.
pub(super) struct Affine<const S: usize> {
    /// f16 bits.
    pub d: u16,
    /// f16 bits.
    pub dmin: u16,
    /// Scales in units of d; above the largest where a fit came out negative and wrapped.
    pub sc: [u8; S],
    /// Mins in units of dmin.
    pub m: [u8; S],
    q_max: i32,
    inverse: [f32; S],
    offset: [f32; S],
}

impl<const S: usize> Affine<S> {
    /// Rounds the scales and mins of superblock b.
    #[inline(always)]
    pub(super) fn round(fits: &Fits, b: usize, plan: &Plan) -> Affine<S> {
        let (scale, min) = (of_superblock(&fits.scale, b), of_superblock(&fits.min, b));
        let ((d, sc), (dmin, m)) = if let Some(weight) = &fits.weight {
            let weight = of_superblock(weight, b);
            (common_factor(scale, weight, plan.scale_max), common_factor(min, weight, plan.scale_max))
        } else {
            (largest_factor(scale, plan.scale_max), largest_factor(min, plan.scale_max))
        };
        Affine {
            d: f32_to_f16(d),
            dmin: f32_to_f16(dmin),
            sc,
            m,
            q_max: plan.q_max.into(),
            inverse: *of_superblock(&fits.inverse, b),
            offset: *of_superblock(&fits.offset, b),
        }
    }

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
                let (inverse, offset) = (self.inverse[s], self.offset[s]);
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

#[cfg(test)]
mod tests {
    use super::super::k_quants::samples;
    use super::*;

    /// The definition: one sub-block, one element after another.
    fn fit_one(x: &[f32], weights: &[f32], q_max: u8, candidates: &Candidates, absolute: bool) -> [f32; 4] {
        let (mut min, mut max) = (x[0], x[0]);
        for &x in x {
            min = if x < min { x } else { min };
            max = if x > max { x } else { max };
        }
        min = if min > 0.0 { 0.0 } else { min };
        if max == min {
            return [0.0, -min, 0.0, 0.0];
        }
        let sum = |term: &dyn Fn(usize) -> f32| (0..x.len()).fold(0.0, |sum, l| sum + term(l));
        let quantized = |inverse: f32, min: f32| -> Vec<f32> {
            x.iter().map(|x| nearest_int(inverse * (x - min)).clamp(0, q_max.into()) as f32).collect()
        };
        let error = |q: &[f32], scale: f32, min: f32| {
            sum(&|l| {
                let diff = scale * q[l] + min - x[l];
                weights[l] * if absolute { diff.abs() } else { diff * diff }
            })
        };
        let (sum_w, sum_x) = (sum(&|l| weights[l]), sum(&|l| weights[l] * x[l]));
        let (mut inverse, mut offset) = (f32::from(q_max) / (max - min), min);
        let mut scale = 1.0 / inverse;
        let mut best_error = error(&quantized(inverse, min), scale, min);
        for i in 0..=candidates.last {
            let candidate =
                (candidates.first + candidates.step * f32::from(i) + f32::from(q_max)) / (max - min);
            let q = quantized(candidate, min);
            let sum_q = sum(&|l| weights[l] * q[l]);
            let sum_qq = sum(&|l| weights[l] * q[l] * q[l]);
            let sum_qx = sum(&|l| weights[l] * q[l] * x[l]);
            let determinant = sum_w * sum_qq - sum_q * sum_q;
            if determinant > 0.0 {
                let mut this_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
                let mut this_min = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
                if this_min > 0.0 {
                    (this_scale, this_min) = (sum_qx / sum_qq, 0.0);
                }
                let this_error = error(&q, this_scale, this_min);
                if this_error < best_error {
                    (inverse, offset, best_error) = (candidate, min, this_error);
                    (scale, min) = (this_scale, this_min);
                }
            }
        }
        [scale, -min, inverse, offset]
    }

    #[test]
    fn lanes_fit_as_one_sub_block_alone() {
        let squared = Candidates { first: -1.0, step: 0.1, last: 20 };
        for (x, importance) in samples::<32>() {
            for (weights, q_max, candidates, absolute) in [
                (magnitude_weights(&x, Weight::RmsPlusMagnitude), 15, &squared, false),
                (magnitude_weights(&x, Weight::Magnitude), 3, &squared, true),
                (importance, 31, &WITH_IMPORTANCE, false),
            ] {
                let fits = fit_sub_blocks(&x, &weights, q_max, candidates, absolute);
                for s in 0..LANES {
                    let lane = |lanes: &Lanes<32>| lanes.map(|lanes| lanes[s]);
                    let expected = fit_one(&lane(&x), &lane(&weights), q_max, candidates, absolute);
                    let found = [fits.scale[s], fits.min[s], fits.inverse[s], fits.offset[s]];
                    assert_eq!(found.map(f32::to_bits), expected.map(f32::to_bits), "{:?}", lane(&x));
                }
            }
        }
    }
}
