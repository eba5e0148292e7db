//! What the K-quants share: superblocks of 256 elements, cut into sub-blocks with scales of their own.
//!
//! Searches over a sub-block sum its elements one after another, as the reference does, so that no
//! bit depends on the machine. What runs in parallel are the sub-blocks: they are the lanes of
//! `[f32; S]` arrays, every branch on data is a select between lanes, and the compiler turns the
//! loops over lanes into vector instructions. [`k_quants_affine`](super::k_quants_affine) and
//! [`k_quants_symmetric`](super::k_quants_symmetric) hold the searches.

use super::Importance;
use super::rounding::nearest_int;

/// Elements of a superblock.
pub(super) const SUPERBLOCK: usize = 256;

/// `S` sub-blocks of `N` elements side by side: `[l][s]` is element l of sub-block s.
pub(super) type SubBlocks<const S: usize, const N: usize> = [[f32; S]; N];

/// The sub-blocks of a superblock, side by side.
#[inline(always)]
pub(super) fn side_by_side<const S: usize, const N: usize>(x: &[f32; SUPERBLOCK]) -> SubBlocks<S, N> {
    const { assert!(S * N == SUPERBLOCK) };
    let mut lanes = [[0.0; S]; N];
    for l in 0..N {
        for s in 0..S {
            lanes[l][s] = x[N * s + l];
        }
    }
    lanes
}

/// The weight of an error in x: `importance * sqrt(spread * mean of x^2 + x^2)`.
#[inline(always)]
pub(super) fn error_weights<const S: usize, const N: usize>(
    x: &[f32; SUPERBLOCK],
    importance: Importance<'_, SUPERBLOCK>,
    spread: f32,
) -> SubBlocks<S, N> {
    let sum = x.iter().fold(0.0, |sum, x| sum + x * x);
    let spread = spread * sum / SUPERBLOCK as f32;
    let x = side_by_side::<S, N>(x);
    let mut weights = side_by_side(importance.weights);
    for l in 0..N {
        for s in 0..S {
            weights[l][s] *= (spread + x[l][s] * x[l][s]).sqrt();
        }
    }
    weights
}

/// The sum of the elements of every sub-block.
#[inline(always)]
pub(super) fn sums<const S: usize, const N: usize>(x: &SubBlocks<S, N>) -> [f32; S] {
    let mut sums = [0.0; S];
    for x in x {
        for s in 0..S {
            sums[s] += x[s];
        }
    }
    sums
}

/// `x` rounded to a whole number and limited to `low..=high`.
#[inline(always)]
pub(super) fn level(x: f32, low: i32, high: i32) -> f32 {
    let q = nearest_int(x);
    let q = if q < low { low } else { q };
    (if q > high { high } else { q }) as f32
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
