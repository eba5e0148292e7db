//! The searches of Q3_K and Q6_K: `x = (d * sc) * q`, q and sc of either sign.
//!
//! Each sub-block is fitted by itself, the scales of a superblock are rounded to a common factor, and
//! q is chosen again for the rounded ones (llama.cpp, quantize_row_q6_K_ref and quantize_row_q3_K_ref).

#![expect(
    clippy::needless_bitwise_bool,
    reason = "a lazy operator is a branch, and branches do not vectorize"
)]

use super::half::f16_to_f32;
use super::k_quants::{LANES, Lanes, SUPERBLOCK, level, of_superblock, select};
use super::rounding::nearest_int;

/// Below this a group counts as all zero.
pub(super) const ZERO_GROUP: f32 = 1e-15;

/// Sub-blocks of a superblock, and elements of a sub-block.
pub(super) const SUBS: usize = 16;

/// The best `x = scale * q` of every group of `N`, with q in -half..half.
pub(super) struct Fits<const N: usize> {
    pub scale: [f32; LANES],
    pub q: Lanes<N>,
}

/// The element of largest magnitude of every group, the first of equal ones, and that magnitude.
#[inline(always)]
fn extremes<const N: usize>(x: &Lanes<N>) -> ([f32; LANES], [f32; LANES]) {
    let (mut extreme, mut largest) = ([0.0; LANES], [0.0; LANES]);
    for l in 0..N {
        for s in 0..LANES {
            let larger = x[l][s].abs() > largest[s];
            largest[s] = select(larger, x[l][s].abs(), largest[s]);
            extreme[s] = select(larger, x[l][s], extreme[s]);
        }
    }
    (extreme, largest)
}

/// Fits every group by trying 19 scales around `-half / extreme`; for the q of each, the scale is the
/// weighted least squares solution (llama.cpp, make_qx_quants with rmse_type 1).
#[inline(always)]
pub(super) fn fit_by_trials<const N: usize>(x: &Lanes<N>, weights: &Lanes<N>, half: i32) -> Fits<N> {
    let (extreme, largest) = extremes(x);
    let (mut inverse, mut scale, mut best) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for s in 0..LANES {
        inverse[s] = -(half as f32) / extreme[s];
    }
    let (sum_qx, sum_qq) = trial(x, weights, &inverse, half);
    for s in 0..LANES {
        scale[s] = select(sum_qq[s] == 0.0, 0.0, sum_qx[s] / sum_qq[s]);
        best[s] = scale[s] * sum_qx[s];
    }
    for i in (-9..=9).filter(|i| *i != 0) {
        let numerator = -(half as f32 + 0.1 * i as f32);
        let mut candidate = [0.0; LANES];
        for s in 0..LANES {
            candidate[s] = numerator / extreme[s];
        }
        let (sum_qx, sum_qq) = trial(x, weights, &candidate, half);
        for s in 0..LANES {
            let better = (sum_qq[s] > 0.0) & (sum_qx[s] * sum_qx[s] > best[s] * sum_qq[s]);
            let this_scale = sum_qx[s] / sum_qq[s];
            inverse[s] = select(better, candidate[s], inverse[s]);
            scale[s] = select(better, this_scale, scale[s]);
            best[s] = select(better, this_scale * sum_qx[s], best[s]);
        }
    }
    let mut q = [[0.0; LANES]; N];
    for l in 0..N {
        for s in 0..LANES {
            q[l][s] = level(inverse[s] * x[l][s], -half, half - 1);
        }
    }
    without_zero_groups(Fits { scale, q }, &largest, half)
}

/// Weighted sums of `q * x` and `q * q` over every group, for q of these inverse scales.
#[inline(always)]
pub(super) fn trial<const N: usize>(
    x: &Lanes<N>,
    weights: &Lanes<N>,
    inverse: &[f32; LANES],
    half: i32,
) -> ([f32; LANES], [f32; LANES]) {
    let (mut sum_qx, mut sum_qq) = ([0.0; LANES], [0.0; LANES]);
    for l in 0..N {
        for s in 0..LANES {
            let q = level(inverse[s] * x[l][s], -half, half - 1);
            sum_qx[s] += weights[l][s] * x[l][s] * q;
            sum_qq[s] += weights[l][s] * q * q;
        }
    }
    (sum_qx, sum_qq)
}

/// Fits every group, with weights x^2, by starting from the scale `-half / extreme` and moving single
/// q, up to five times each, while that brings the least squares solution closer to x (llama.cpp,
/// make_q3_quants).
#[inline(always)]
pub(super) fn fit_by_moves<const N: usize>(x: &Lanes<N>, half: i32) -> Fits<N> {
    let (extreme, largest) = extremes(x);
    let mut inverse = [0.0; LANES];
    for s in 0..LANES {
        inverse[s] = -(half as f32) / extreme[s];
    }
    let mut q = [[0.0; LANES]; N];
    let (mut sum_qx, mut sum_qq) = ([0.0; LANES], [0.0; LANES]);
    for l in 0..N {
        for s in 0..LANES {
            let w = x[l][s] * x[l][s];
            q[l][s] = level(inverse[s] * x[l][s], -half, half - 1);
            sum_qx[s] += w * x[l][s] * q[l][s];
            sum_qq[s] += w * q[l][s] * q[l][s];
        }
    }
    for _ in 0..5 {
        let mut moves = [0u32; LANES];
        for l in 0..N {
            for s in 0..LANES {
                let (x, old) = (x[l][s], q[l][s]);
                let w = x * x;
                let qx = sum_qx[s] - w * x * old;
                let qq = sum_qq[s] - w * old * old;
                let new = level(x * qq / qx, -half, half - 1);
                let new_qx = qx + w * x * new;
                let new_qq = qq + w * new * new;
                let closer = new_qx * new_qx * sum_qq[s] > sum_qx[s] * sum_qx[s] * new_qq;
                let moved = (qx > 0.0) & (new != old) & (new_qq > 0.0) & closer;
                q[l][s] = select(moved, new, old);
                sum_qx[s] = select(moved, new_qx, sum_qx[s]);
                sum_qq[s] = select(moved, new_qq, sum_qq[s]);
                moves[s] |= u32::from(moved);
            }
        }
        // A group in which nothing moved would not move in another round either.
        if moves == [0; LANES] {
            break;
        }
    }
    let mut scale = [0.0; LANES];
    for s in 0..LANES {
        scale[s] = select(sum_qq[s] > 0.0, sum_qx[s] / sum_qq[s], 0.0);
    }
    without_zero_groups(Fits { scale, q }, &largest, half)
}

/// Groups of zeros get scale 0 and, as in the reference, the lowest q.
#[inline(always)]
fn without_zero_groups<const N: usize>(mut fits: Fits<N>, largest: &[f32; LANES], half: i32) -> Fits<N> {
    for s in 0..LANES {
        fits.scale[s] = select(largest[s] < ZERO_GROUP, 0.0, fits.scale[s]);
    }
    for l in 0..N {
        for s in 0..LANES {
            fits.q[l][s] = select(largest[s] < ZERO_GROUP, -half as f32, fits.q[l][s]);
        }
    }
    fits
}

impl Fits<SUBS> {
    /// The scales of superblock b.
    #[inline(always)]
    pub(super) fn scales(&self, b: usize) -> &[f32; SUBS] {
        of_superblock(&self.scale, b)
    }

    /// `q + half` of superblock b, which is x, for the scales `d * sc` as they were rounded.
    #[inline(always)]
    pub(super) fn quantize(
        &self,
        b: usize,
        x: &[f32; SUPERBLOCK],
        d: u16,
        sc: &[i8; SUBS],
        half: i32,
    ) -> [u8; SUPERBLOCK] {
        let d = f16_to_f32(d);
        let mut q = [0; SUPERBLOCK];
        let (x, _) = x.as_chunks::<SUBS>();
        let (out, _) = q.as_chunks_mut::<SUBS>();
        for s in 0..SUBS {
            let scale = d * f32::from(sc[s]);
            if scale == 0.0 {
                // Multiplied by zero, the numbers of the fit stay.
                for l in 0..SUBS {
                    out[s][l] = (self.q[l][SUBS * b + s] as i32 + half) as u8;
                }
            } else {
                for l in 0..SUBS {
                    out[s][l] = (nearest_int(x[s][l] / scale).max(-half).min(half - 1) + half) as u8;
                }
            }
        }
        q
    }
}

/// The first scale of largest magnitude, and that magnitude.
#[inline(always)]
pub(super) fn extreme_scale(scales: &[f32; SUBS]) -> (f32, f32) {
    let (mut extreme, mut largest) = (0.0, 0.0);
    for &scale in scales {
        if scale.abs() > largest {
            (extreme, largest) = (scale, scale.abs());
        }
    }
    (extreme, largest)
}

#[cfg(test)]
mod tests {
    use super::super::k_quants::samples;
    use super::*;

    fn extreme(x: &[f32]) -> Option<f32> {
        let extreme =
            x.iter().fold(0.0, |extreme: f32, &x| if x.abs() > extreme.abs() { x } else { extreme });
        (extreme.abs() >= ZERO_GROUP).then_some(extreme)
    }

    fn rounded(x: f32, half: i32) -> f32 {
        nearest_int(x).clamp(-half, half - 1) as f32
    }

    /// The definition of [`fit_by_trials`]: one group, one element after another.
    fn trials_of_one(x: &[f32], weights: &[f32], half: i32) -> (f32, Vec<f32>) {
        let Some(extreme) = extreme(x) else { return (0.0, vec![-half as f32; x.len()]) };
        let mut best: Option<(f32, f32, Vec<f32>)> = None;
        for step in std::iter::once(0).chain(-9..=-1).chain(1..=9) {
            let inverse = -(half as f32 + 0.1 * step as f32) / extreme;
            let q: Vec<f32> = x.iter().map(|x| rounded(inverse * x, half)).collect();
            let (mut sum_qx, mut sum_qq) = (0.0, 0.0);
            for l in 0..x.len() {
                sum_qx += weights[l] * x[l] * q[l];
                sum_qq += weights[l] * q[l] * q[l];
            }
            if let Some((_, score, _)) = best
                && !(sum_qq > 0.0 && sum_qx * sum_qx > score * sum_qq)
            {
                continue;
            }
            let scale = if sum_qq == 0.0 { 0.0 } else { sum_qx / sum_qq };
            best = Some((scale, scale * sum_qx, q));
        }
        let (scale, _, q) = best.expect("the first is kept");
        (scale, q)
    }

    /// The definition of [`fit_by_moves`].
    fn moves_of_one(x: &[f32], half: i32) -> (f32, Vec<f32>) {
        let Some(extreme) = extreme(x) else { return (0.0, vec![-half as f32; x.len()]) };
        let mut q: Vec<f32> = x.iter().map(|x| rounded(-(half as f32) / extreme * x, half)).collect();
        let (mut sum_qx, mut sum_qq) = (0.0, 0.0);
        for l in 0..x.len() {
            let w = x[l] * x[l];
            sum_qx += w * x[l] * q[l];
            sum_qq += w * q[l] * q[l];
        }
        for _ in 0..5 {
            let before = q.clone();
            for l in 0..x.len() {
                let w = x[l] * x[l];
                let (mut qx, mut qq) = (sum_qx - w * x[l] * q[l], sum_qq - w * q[l] * q[l]);
                if qx > 0.0 {
                    let new = rounded(x[l] * qq / qx, half);
                    qx += w * x[l] * new;
                    qq += w * new * new;
                    if new != q[l] && qq > 0.0 && qx * qx * sum_qq > sum_qx * sum_qx * qq {
                        (q[l], sum_qx, sum_qq) = (new, qx, qq);
                    }
                }
            }
            if q == before {
                break;
            }
        }
        (if sum_qq > 0.0 { sum_qx / sum_qq } else { 0.0 }, q)
    }

    #[test]
    fn lanes_fit_as_one_group_alone() {
        for (x, importance) in samples::<16>() {
            for half in [4, 32] {
                let (trials, moves) = (fit_by_trials(&x, &importance, half), fit_by_moves(&x, half));
                for s in 0..LANES {
                    let lane = |lanes: &Lanes<16>| lanes.map(|lanes| lanes[s]);
                    let (x, weights) = (lane(&x), lane(&importance));
                    let (scale, q) = trials_of_one(&x, &weights, half);
                    assert_eq!(trials.scale[s].to_bits(), scale.to_bits(), "{x:?} {weights:?}");
                    assert_eq!(lane(&trials.q)[..], q, "{x:?} {weights:?}");
                    let (scale, q) = moves_of_one(&x, half);
                    assert_eq!(moves.scale[s].to_bits(), scale.to_bits(), "{x:?}");
                    assert_eq!(lane(&moves.q)[..], q, "{x:?}");
                }
            }
        }
    }
}
