//! What the K-quants share: superblocks of 256 elements whose sub-block scales are quantized again.

use super::half::{f16_to_f32, f32_to_f16};
use super::rounding::nearest_int;

/// Elements of a superblock.
pub(super) const SUPERBLOCK: usize = 256;

/// The 6-bit scales and mins of the 8 sub-blocks of Q4_K and Q5_K, from their 12 bytes.
///
/// Sub-blocks 0..4 have their scale in the low 6 bits of bytes 0..4 and their min in those of bytes
/// 4..8. Sub-block 4 + i has its low nibbles in byte 8 + i (scale low, min high) and the upper two
/// bits in the upper two bits of bytes i (scale) and 4 + i (min).
#[inline(always)]
pub(super) fn unpack_scales(scales: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut sc, mut m) = ([0; 8], [0; 8]);
    for i in 0..4 {
        sc[i] = scales[i] & 63;
        m[i] = scales[i + 4] & 63;
        sc[i + 4] = (scales[i + 8] & 0x0f) | ((scales[i] >> 6) << 4);
        m[i + 4] = (scales[i + 8] >> 4) | ((scales[i + 4] >> 6) << 4);
    }
    (sc, m)
}

/// Inverse of [`unpack_scales`], for numbers below 64.
pub(super) fn pack_scales(sc: [u8; 8], m: [u8; 8]) -> [u8; 12] {
    let mut scales = [0; 12];
    for i in 0..4 {
        scales[i] = sc[i] | ((sc[i + 4] >> 4) << 6);
        scales[i + 4] = m[i] | ((m[i + 4] >> 4) << 6);
        scales[i + 8] = (sc[i + 4] & 0x0f) | ((m[i + 4] & 0x0f) << 4);
    }
    scales
}

/// The candidate scales of Q4_K or Q5_K: `(first + step * i + q_max) / (max - min)`, i in 0..=last.
pub(super) struct Search {
    pub q_max: u8,
    pub first: f32,
    pub step: f32,
    pub last: u8,
}

/// A superblock of Q4_K or Q5_K before its numbers are packed.
pub(super) struct Affine {
    /// f16 bits.
    pub d: u16,
    /// f16 bits.
    pub dmin: u16,
    pub scales: [u8; 12],
    pub q: [u8; SUPERBLOCK],
}

/// Quantizes a superblock as `x = (d * sc) * q - (dmin * m)`.
///
/// Each sub-block is fitted by itself, scales and mins are rounded to 6 bits of the largest of the
/// superblock, and q is chosen again for the rounded ones (llama.cpp, quantize_row_q4_K_ref).
pub(super) fn fit_affine(x: &[f32; SUPERBLOCK], search: &Search) -> Affine {
    let (subs, _) = x.as_chunks::<32>();
    let mut q = [0; SUPERBLOCK];
    let (mut scales, mut mins) = ([0.0; 8], [0.0; 8]);
    // Mins are subtracted, so neither is negative where it matters; a negative scale loses.
    let (mut max_scale, mut max_min) = (0.0, 0.0);
    for (s, (x, q)) in subs.iter().zip(q.as_chunks_mut::<32>().0).enumerate() {
        (scales[s], mins[s]) = fit_affine_sub(x, search, q);
        max_scale = if scales[s] > max_scale { scales[s] } else { max_scale };
        max_min = if mins[s] > max_min { mins[s] } else { max_min };
    }

    let inverse = |max: f32| if max > 0.0 { 63.0 / max } else { 0.0 };
    let (inv_scale, inv_min) = (inverse(max_scale), inverse(max_min));
    let sc = scales.map(|scale| (nearest_int(inv_scale * scale) as u8).min(63));
    let m = mins.map(|min| (nearest_int(inv_min * min) as u8).min(63));
    let (d, dmin) = (f32_to_f16(max_scale / 63.0), f32_to_f16(max_min / 63.0));

    for (s, (x, q)) in subs.iter().zip(q.as_chunks_mut::<32>().0).enumerate() {
        let scale = f16_to_f32(d) * f32::from(sc[s]);
        if scale == 0.0 {
            continue; // the numbers of the fit stay, though they are multiplied by zero
        }
        let min = f16_to_f32(dmin) * f32::from(m[s]);
        for l in 0..32 {
            q[l] = nearest_int((x[l] + min) / scale).clamp(0, search.q_max.into()) as u8;
        }
    }
    Affine { d, dmin, scales: pack_scales(sc, m), q }
}

/// Fits `x = scale * q - min`, 0 <= min, to one sub-block; writes q, returns scale and min.
///
/// Tries the candidate scales in turn; for the q of each, scale and min are the weighted least
/// squares solution with weights `rms(x) + |x|`. The best min found so far sets the range of the next
/// candidate and is subtracted there, so candidates depend on each other (llama.cpp, make_qkx2_quants).
fn fit_affine_sub(x: &[f32; 32], search: &Search, q: &mut [u8; 32]) -> (f32, f32) {
    let q_max = f32::from(search.q_max);
    let mut sum_squares = 0.0;
    for x in x {
        sum_squares += x * x;
    }
    let rms = (sum_squares / 32.0).sqrt();
    let weights = x.map(|x| rms + x.abs());

    let (mut min, mut max) = (x[0], x[0]);
    let mut sum_w = weights[0];
    let mut sum_x = sum_w * x[0];
    for l in 1..32 {
        min = if x[l] < min { x[l] } else { min };
        max = if x[l] > max { x[l] } else { max };
        sum_w += weights[l];
        sum_x += weights[l] * x[l];
    }
    min = if min > 0.0 { 0.0 } else { min };
    if max == min {
        *q = [0; 32];
        return (0.0, -min);
    }
    let quantized = |inv_scale: f32, min: f32| {
        x.map(|x| nearest_int(inv_scale * (x - min)).clamp(0, search.q_max.into()) as f32)
    };
    let error = |q: &[f32; 32], scale: f32, min: f32| {
        let mut error = 0.0;
        for l in 0..32 {
            let diff = scale * q[l] + min - x[l];
            error += weights[l] * (diff * diff);
        }
        error
    };

    let inv_scale = q_max / (max - min);
    let mut scale = 1.0 / inv_scale;
    let mut best = quantized(inv_scale, min);
    let mut best_error = error(&best, scale, min);
    for i in 0..=search.last {
        let inv_scale = (search.first + search.step * f32::from(i) + q_max) / (max - min);
        let candidate = quantized(inv_scale, min);
        let (mut sum_q, mut sum_qq, mut sum_qx) = (0.0, 0.0, 0.0);
        for l in 0..32 {
            let wq = weights[l] * candidate[l];
            sum_q += wq;
            sum_qq += wq * candidate[l];
            sum_qx += wq * x[l];
        }
        let determinant = sum_w * sum_qq - sum_q * sum_q;
        if determinant > 0.0 {
            let mut this_scale = (sum_w * sum_qx - sum_x * sum_q) / determinant;
            let mut this_min = (sum_qq * sum_x - sum_q * sum_qx) / determinant;
            if this_min > 0.0 {
                this_min = 0.0;
                this_scale = sum_qx / sum_qq;
            }
            let this_error = error(&candidate, this_scale, this_min);
            if this_error < best_error {
                (best, best_error) = (candidate, this_error);
                (scale, min) = (this_scale, this_min);
            }
        }
    }
    *q = best.map(|q| q as u8);
    (scale, -min)
}

/// A superblock of Q6_K before its numbers are packed.
pub(super) struct Symmetric {
    /// f16 bits.
    pub d: u16,
    pub scales: [i8; 16],
    pub q: [u8; SUPERBLOCK],
}

/// Below this a group counts as all zero.
const ZERO_GROUP: f32 = 1e-15;

/// Quantizes a superblock as `x = (d * sc) * (q - 32)` (llama.cpp, quantize_row_q6_K_ref).
pub(super) fn fit_symmetric(x: &[f32; SUPERBLOCK]) -> Symmetric {
    let (subs, _) = x.as_chunks::<16>();
    let mut q = [0; SUPERBLOCK];
    let mut fitted = [0.0; 16];
    let (mut max_scale, mut max_abs_scale) = (0.0, 0.0);
    for (s, (x, q)) in subs.iter().zip(q.as_chunks_mut::<16>().0).enumerate() {
        fitted[s] = fit_symmetric_sub(x, q);
        if fitted[s].abs() > max_abs_scale {
            (max_scale, max_abs_scale) = (fitted[s], fitted[s].abs());
        }
    }
    if max_abs_scale < ZERO_GROUP {
        return Symmetric { d: 0, scales: [0; 16], q: [0; SUPERBLOCK] };
    }

    let inv_scale = -128.0 / max_scale;
    let d = f32_to_f16(1.0 / inv_scale);
    let scales = fitted.map(|scale| nearest_int(inv_scale * scale).min(127) as i8);
    for (s, (x, q)) in subs.iter().zip(q.as_chunks_mut::<16>().0).enumerate() {
        let scale = f16_to_f32(d) * f32::from(scales[s]);
        if scale == 0.0 {
            continue; // the numbers of the fit stay, though they are multiplied by zero
        }
        for l in 0..16 {
            q[l] = (nearest_int(x[l] / scale).clamp(-32, 31) + 32) as u8;
        }
    }
    Symmetric { d, scales, q }
}

/// Fits `x = scale * (q - 32)` to one sub-block; writes q, returns the scale.
///
/// Tries 19 scales around `-32 / extreme`; for the q of each, the scale is the least squares
/// solution with weights x^2 (llama.cpp, make_qx_quants with rmse_type 1).
fn fit_symmetric_sub(x: &[f32; 16], q: &mut [u8; 16]) -> f32 {
    let (mut largest, mut extreme) = (0.0, 0.0);
    for &x in x {
        if x.abs() > largest {
            (largest, extreme) = (x.abs(), x);
        }
    }
    if largest < ZERO_GROUP {
        *q = [0; 16];
        return 0.0;
    }
    let weights = x.map(|x| x * x);
    let quantized = |inv_scale: f32| x.map(|x| nearest_int(inv_scale * x).clamp(-32, 31) as f32);
    let sums = |q: &[f32; 16]| {
        let (mut sum_qx, mut sum_qq) = (0.0, 0.0);
        for l in 0..16 {
            sum_qx += weights[l] * x[l] * q[l];
            sum_qq += weights[l] * q[l] * q[l];
        }
        (sum_qx, sum_qq)
    };

    let mut best = quantized(-32.0 / extreme);
    let (sum_qx, sum_qq) = sums(&best);
    let mut scale = if sum_qq == 0.0 { 0.0 } else { sum_qx / sum_qq };
    let mut best_score = scale * sum_qx;
    for i in (-9..=9).filter(|i| *i != 0) {
        let candidate = quantized(-(32.0 + 0.1 * i as f32) / extreme);
        let (sum_qx, sum_qq) = sums(&candidate);
        if sum_qq > 0.0 && sum_qx * sum_qx > best_score * sum_qq {
            best = candidate;
            scale = sum_qx / sum_qq;
            best_score = scale * sum_qx;
        }
    }
    *q = best.map(|q| (q as i32 + 32) as u8);
    scale
}
