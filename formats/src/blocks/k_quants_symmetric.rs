//! The searches of Q3_K and Q6_K: `x = (d * sc) * (q - zero)`, sc of either sign.
//!
//! Each sub-block is fitted by itself, the scales of a superblock are rounded to a common factor, and
//! q is chosen again for the rounded ones (llama.cpp, quantize_row_q6_K_ref and _q3_K_ref).

use super::half::f16_to_f32;
use super::k_quants::{SUPERBLOCK, SubBlocks, level};
use super::rounding::nearest_int;

/// Below this a group counts as all zero.
pub(super) const ZERO_GROUP: f32 = 1e-15;

/// Sub-blocks of a superblock, and elements of a sub-block.
pub(super) const SUBS: usize = 16;

/// The best `x = scale * q` of every group.
pub(super) struct Fit<const S: usize, const N: usize> {
    pub scale: [f32; S],
    pub levels: Levels<S, N>,
}

/// The numbers that go with the scales of a fit, for groups that keep them.
pub(super) enum Levels<const S: usize, const N: usize> {
    /// `q = level(inverse * x)`, or the lowest for a zero group, whose inverse is NaN.
    Inverse([f32; S]),
    /// As they are.
    Each(SubBlocks<S, N>),
}

/// The element of largest magnitude of every group, the first of equal ones.
#[inline(always)]
fn extremes<const S: usize, const N: usize>(x: &SubBlocks<S, N>) -> ([f32; S], [f32; S]) {
    let (mut largest, mut extreme) = ([0.0; S], [0.0; S]);
    for l in 0..N {
        for s in 0..S {
            let larger = x[l][s].abs() > largest[s];
            largest[s] = if larger { x[l][s].abs() } else { largest[s] };
            extreme[s] = if larger { x[l][s] } else { extreme[s] };
        }
    }
    (largest, extreme)
}

/// Fits `x = scale * q` with q in -zero..zero to every group.
///
/// Tries 19 scales around `-zero / extreme`; for the q of each, the scale is the weighted least
/// squares solution (llama.cpp, make_qx_quants with rmse_type 1).
#[inline(always)]
pub(super) fn fit_by_trials<const S: usize, const N: usize>(
    x: &SubBlocks<S, N>,
    weights: &SubBlocks<S, N>,
    zero: i32,
) -> Fit<S, N> {
    let (largest, extreme) = extremes(x);
    let mut wx = [[0.0; S]; N];
    for l in 0..N {
        for s in 0..S {
            wx[l][s] = weights[l][s] * x[l][s];
        }
    }
    let sums = |inverse: &[f32; S]| {
        let (mut sum_qx, mut sum_qq) = ([0.0; S], [0.0; S]);
        for l in 0..N {
            for s in 0..S {
                let q = level(inverse[s] * x[l][s], -zero, zero - 1);
                sum_qx[s] += wx[l][s] * q;
                sum_qq[s] += weights[l][s] * q * q;
            }
        }
        (sum_qx, sum_qq)
    };

    let (mut inverse, mut scale, mut best) = ([0.0; S], [0.0; S], [0.0; S]);
    for s in 0..S {
        inverse[s] = -(zero as f32) / extreme[s];
    }
    let (sum_qx, sum_qq) = sums(&inverse);
    for s in 0..S {
        scale[s] = if sum_qq[s] == 0.0 { 0.0 } else { sum_qx[s] / sum_qq[s] };
        best[s] = scale[s] * sum_qx[s];
    }
    for i in (-9..=9).filter(|i| *i != 0) {
        let numerator = -(zero as f32 + 0.1 * i as f32);
        let mut candidate = [0.0; S];
        for s in 0..S {
            candidate[s] = numerator / extreme[s];
        }
        let (sum_qx, sum_qq) = sums(&candidate);
        for s in 0..S {
            let better = (sum_qq[s] > 0.0) & (sum_qx[s] * sum_qx[s] > best[s] * sum_qq[s]);
            let this_scale = sum_qx[s] / sum_qq[s];
            inverse[s] = if better { candidate[s] } else { inverse[s] };
            scale[s] = if better { this_scale } else { scale[s] };
            best[s] = if better { this_scale * sum_qx[s] } else { best[s] };
        }
    }
    for s in 0..S {
        let zero_group = largest[s] < ZERO_GROUP;
        scale[s] = if zero_group { 0.0 } else { scale[s] };
        inverse[s] = if zero_group { f32::NAN } else { inverse[s] };
    }
    Fit { scale, levels: Levels::Inverse(inverse) }
}

/// Fits `x = scale * q` with q in -zero..zero to every group, with weights x^2.
///
/// Starts from the scale `-zero / extreme` and moves single q, up to five times each, while that
/// brings the least squares solution closer to x (llama.cpp, make_q3_quants).
#[inline(always)]
pub(super) fn fit_by_moves<const S: usize, const N: usize>(x: &SubBlocks<S, N>, zero: i32) -> Fit<S, N> {
    let (largest, extreme) = extremes(x);
    let mut inverse = [0.0; S];
    for s in 0..S {
        inverse[s] = -(zero as f32) / extreme[s];
    }
    let mut q = [[0.0; S]; N];
    let (mut sum_qx, mut sum_qq) = ([0.0; S], [0.0; S]);
    for l in 0..N {
        for s in 0..S {
            q[l][s] = level(inverse[s] * x[l][s], -zero, zero - 1);
            let w = x[l][s] * x[l][s];
            sum_qx[s] += w * x[l][s] * q[l][s];
            sum_qq[s] += w * q[l][s] * q[l][s];
        }
    }
    for _ in 0..5 {
        let mut changed = [false; S];
        for l in 0..N {
            for s in 0..S {
                let (x, old) = (x[l][s], q[l][s]);
                let w = x * x;
                let qx = sum_qx[s] - w * x * old;
                let qq = sum_qq[s] - w * old * old;
                let new = level(x * qq / qx, -zero, zero - 1);
                let new_qx = qx + w * x * new;
                let new_qq = qq + w * new * new;
                let closer = new_qx * new_qx * sum_qq[s] > sum_qx[s] * sum_qx[s] * new_qq;
                let moved = (qx > 0.0) & (new != old) & (new_qq > 0.0) & closer;
                q[l][s] = if moved { new } else { old };
                sum_qx[s] = if moved { new_qx } else { sum_qx[s] };
                sum_qq[s] = if moved { new_qq } else { sum_qq[s] };
                changed[s] |= moved;
            }
        }
        if changed == [false; S] {
            break;
        }
    }
    let mut scale = [0.0; S];
    for s in 0..S {
        let zero_group = largest[s] < ZERO_GROUP;
        scale[s] = if zero_group | !(sum_qq[s] > 0.0) { 0.0 } else { sum_qx[s] / sum_qq[s] };
    }
    for l in 0..N {
        for s in 0..S {
            q[l][s] = if largest[s] < ZERO_GROUP { -zero as f32 } else { q[l][s] };
        }
    }
    Fit { scale, levels: Levels::Each(q) }
}

impl<const S: usize, const N: usize> Levels<S, N> {
    /// q of element l, which is x, of group s.
    #[inline(always)]
    pub(super) fn of(&self, s: usize, l: usize, x: f32, zero: i32) -> f32 {
        match self {
            Levels::Inverse(inverse) if inverse[s].is_nan() => -zero as f32,
            Levels::Inverse(inverse) => level(inverse[s] * x, -zero, zero - 1),
            Levels::Each(q) => q[l][s],
        }
    }
}

impl Fit<SUBS, SUBS> {
    /// `q` in 0..2 * zero of a superblock, for the scales `d * sc` as they were rounded.
    #[inline(always)]
    pub(super) fn quantize(
        &self,
        x: &[f32; SUPERBLOCK],
        d: u16,
        sc: &[i8; SUBS],
        zero: i32,
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
                    out[s][l] = (self.levels.of(s, l, x[s][l], zero) as i32 + zero) as u8;
                }
            } else {
                for l in 0..SUBS {
                    out[s][l] = (nearest_int(x[s][l] / scale).clamp(-zero, zero - 1) + zero) as u8;
                }
            }
        }
        q
    }
}
