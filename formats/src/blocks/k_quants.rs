//! What the K-quants share: superblocks of 256 elements, cut into sub-blocks with scales of their own.
//!
//! Searches over a sub-block sum its elements one after another, as the reference does, so that no
//! bit depends on the machine. What runs in parallel are the sub-blocks of a few superblocks: they are
//! the lanes of `[f32; LANES]` arrays, every branch on data is a select between lanes, and the compiler
//! turns the loops over lanes into vector instructions. `k_quants_affine` and `k_quants_symmetric`
//! hold the searches.

use super::rounding::nearest_int;

/// Elements of a superblock.
pub(super) const SUPERBLOCK: usize = 256;

/// Sub-blocks that are searched at once: a few vectors of any machine, so that one computes while
/// another waits for its sum. With fewer the compiler unrolls the loops over lanes before it looks
/// for vectors, and then finds few.
pub(super) const LANES: usize = 32;

/// Sub-blocks of `N` elements side by side: `[l][s]` is element l of sub-block s.
pub(super) type Lanes<const N: usize> = [[f32; LANES]; N];

/// The sub-blocks of up to `LANES * N / 256` superblocks, side by side; zeros where there is none.
#[inline(always)]
pub(super) fn side_by_side<const N: usize>(x: &[[f32; SUPERBLOCK]]) -> Lanes<N> {
    let mut lanes = [[0.0; LANES]; N];
    let (subs, _) = x.as_flattened().as_chunks::<N>();
    for (s, sub) in subs.iter().enumerate().take(LANES) {
        for l in 0..N {
            lanes[l][s] = sub[l];
        }
    }
    lanes
}

/// What belongs to superblock b of those side by side, one value for each of its `S` sub-blocks.
#[inline(always)]
pub(super) fn of_superblock<const S: usize>(lanes: &[f32; LANES], b: usize) -> &[f32; S] {
    &lanes.as_chunks().0[b]
}

/// The weight of an error in x: `importance * sqrt(spread * mean of x^2 over the superblock + x^2)`.
#[inline(always)]
pub(super) fn error_weights<const N: usize>(
    x: &[[f32; SUPERBLOCK]],
    importance: &[[f32; SUPERBLOCK]],
    spread: f32,
) -> Lanes<N> {
    // A superblock is summed from left to right, but next to the others.
    let mut sum_squares = [0.0; LANES];
    for l in 0..SUPERBLOCK {
        for (sum, x) in sum_squares.iter_mut().zip(x) {
            *sum += x[l] * x[l];
        }
    }
    let subs = SUPERBLOCK / N;
    let mut mean_squares = [0.0; LANES];
    for s in 0..LANES {
        mean_squares[s] = spread * sum_squares[s / subs] / SUPERBLOCK as f32;
    }
    let x = side_by_side::<N>(x);
    let mut weights = side_by_side::<N>(importance);
    for l in 0..N {
        for s in 0..LANES {
            weights[l][s] *= (mean_squares[s] + x[l][s] * x[l][s]).sqrt();
        }
    }
    weights
}

/// The sum of the elements of every sub-block.
#[inline(always)]
pub(super) fn sums<const N: usize>(x: &Lanes<N>) -> [f32; LANES] {
    let mut sums = [0.0; LANES];
    for x in x {
        for s in 0..LANES {
            sums[s] += x[s];
        }
    }
    sums
}

/// `a` if the condition holds, else `b`. Computed with masks, because compilers make branches of
/// `if`s that follow each other, and those keep a loop from being vectorized.
#[inline(always)]
pub(super) fn select(condition: bool, a: f32, b: f32) -> f32 {
    let mask = u32::from(condition).wrapping_neg();
    f32::from_bits((a.to_bits() & mask) | (b.to_bits() & !mask))
}

/// `x` rounded to a whole number and limited to `low..=high`.
#[inline(always)]
pub(super) fn level(x: f32, low: i32, high: i32) -> f32 {
    nearest_int(x).max(low).min(high) as f32
}

/// The 2-bit numbers of Q2_K and Q3_K: half h (128 elements) has bytes 32h..32h + 32; byte l of a
/// half holds elements l, 32 + l, 64 + l and 96 + l, from the lowest bits up.
#[inline(always)]
pub(super) fn pack2(q: &[u8; SUPERBLOCK]) -> [u8; 64] {
    let mut qs = [0; 64];
    for half in 0..2 {
        for l in 0..32 {
            let q = |quarter: usize| q[128 * half + 32 * quarter + l] & 3;
            qs[32 * half + l] = q(0) | (q(1) << 2) | (q(2) << 4) | (q(3) << 6);
        }
    }
    qs
}

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

/// Inverse of [`unpack_scales`] for numbers below 64; larger ones spill into others as they do in the
/// reference.
#[inline(always)]
pub(super) fn pack_scales(sc: &[u8; 8], m: &[u8; 8]) -> [u8; 12] {
    let mut scales = [0; 12];
    for i in 0..4 {
        scales[i] = sc[i] | ((sc[i + 4] >> 4) << 6);
        scales[i + 4] = m[i] | ((m[i + 4] >> 4) << 6);
        scales[i + 8] = (sc[i + 4] & 0x0f) | ((m[i + 4] & 0x0f) << 4);
    }
    scales
}

/// Sub-blocks and importances that searches are tested on: Gaussian of every scale, with offsets,
/// outliers, zeros and equal elements; importances of which many are zero.
#[cfg(test)]
pub(super) fn samples<const N: usize>() -> impl Iterator<Item = (Lanes<N>, Lanes<N>)> {
    let mut state = 1u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..200).map(move |_| {
        let (mut x, mut importance) = ([[0.0; LANES]; N], [[0.0; LANES]; N]);
        for s in 0..LANES {
            let kind = (8.0 * uniform()) as u8;
            let scale = 10f32.powf(24.0 * uniform() - 16.0);
            let offset = if kind == 1 { 3.0 * uniform() - 1.5 } else { 0.0 };
            for l in 0..N {
                let gaussian = (0..12).map(|_| uniform()).sum::<f32>() - 6.0;
                let shape = match kind {
                    2 => gaussian.round(),
                    3 if uniform() < 0.9 => 0.0,
                    4 => gaussian * if uniform() < 0.05 { 1000.0 } else { 1.0 },
                    5 => 1.0,
                    6 => gaussian.abs() + 0.1,
                    7 => -gaussian.abs() - 0.1,
                    _ => gaussian,
                };
                x[l][s] = (shape + offset) * scale;
                importance[l][s] = if uniform() < 0.4 { 0.0 } else { gaussian * gaussian };
            }
        }
        (x, importance)
    })
}
