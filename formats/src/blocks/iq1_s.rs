//! IQ1_S: 256 elements in 50 bytes, 8 sub-blocks of 32, `x = d * (1 + 2 * sc) * (q +- 0.125)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..34 | `qs` | low 8 bits of the point of each group of 8 |
//! | 34..50 | `qh` | one u16 per sub-block: bits 3k..3k + 3 the upper bits of the point of group k, bits 12..15 the scale sc, bit 15 set where 0.125 is subtracted |
//!
//! The digits 0, 1 and 2 of a point stand for -1, 0 and 1.

use super::half::{f32_to_f16, read_f16};
use super::iq_grids;
use super::iq_search::{largest, part, round_scale, sum_squares, weigh};
use super::iq1_search::{CHUNK, DOWN, Split, Sums, UP, assign_levels, best_split, choose_points, sorted};
use super::k_quants::SUPERBLOCK;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

/// What is added to -1, 0 or 1, or subtracted.
pub(super) const SHIFT: f32 = 0.125;

/// Below this a sub-block counts as all zero.
const ZERO_GROUP: f32 = 1e-12;

/// d is stored larger than the largest sub-block scale asks for.
const D_FACTOR: f32 = 1.125;

pub(super) static Q: [[i8; 8]; 2048] = iq_grids::levels(&iq_grids::IQ1, [-1, 0, 1]);

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ1_S;

impl Block<50, SUPERBLOCK> for IQ1_S {
    const DTYPE: GgmlType = GgmlType::IQ1_S;

    #[inline(always)]
    fn dequantize(block: &[u8; 50], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 32] = field(block, 2);
        for (s, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let qh = u16::from_le_bytes(*field(block, 34 + 2 * s));
            let scale = d * f32::from(2 * ((qh >> 12) & 7) + 1);
            let shift = if qh >> 15 == 1 { -SHIFT } else { SHIFT };
            for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let point = usize::from(qs[4 * s + k]) | usize::from((qh >> (3 * k)) & 7) << 8;
                for (out, q) in out.iter_mut().zip(Q[point]) {
                    *out = scale * (f32::from(q) + shift);
                }
            }
        }
    }
}

impl Quantize<50, SUPERBLOCK> for IQ1_S {
    fn quantize(x: &[f32; SUPERBLOCK], importance: Option<Importance<'_, SUPERBLOCK>>, block: &mut [u8; 50]) {
        let importance = importance.expect("the type table says that importance is required");
        *block = [0; 50];
        let mean_square = 2.0 * sum_squares(x) / SUPERBLOCK as f32;
        let mut scales = [0.0; 8];
        let mut qh = [0u16; 8];
        for (s, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let weights = weigh(x, part(&importance, s), mean_square);
            if largest(&x.map(f32::abs)) < ZERO_GROUP {
                continue;
            }
            let order = sorted(x);
            let Some(split) = split(x, &weights, &order) else { continue };
            let (levels, scale, mirrored) = assign_levels(&split, &order);
            let down = (split.variant == 1) != mirrored;
            let values = if down { &DOWN } else { &UP };
            let (points, scale) = choose_points::<32, 4>(x, &weights, &levels, [values; 4], scale);
            scales[s] = scale;
            for (k, point) in points.into_iter().enumerate() {
                block[2 + 4 * s + k] = point as u8;
                qh[s] |= (point >> 8) << (3 * k);
            }
            qh[s] |= u16::from(down) << 15;
        }
        let max_scale = largest(&scales);
        // Without a scale the reference forgets the shifts.
        if max_scale == 0.0 {
            for s in 0..8 {
                block[34 + 2 * s..][..2].copy_from_slice(&(qh[s] & 0x0fff).to_le_bytes());
            }
            return;
        }
        let d = max_scale / 15.0;
        block[0..2].copy_from_slice(&f32_to_f16(d * D_FACTOR).to_le_bytes());
        for s in 0..8 {
            let sc = u16::from(round_scale(1.0 / d, scales[s], 7));
            block[34 + 2 * s..][..2].copy_from_slice(&(qh[s] | sc << 12).to_le_bytes());
        }
    }
}

/// Splits a sub-block; variant 0 is shifted up, variant 1 down.
#[inline(always)]
fn split(x: &[f32; 32], weights: &[f32; 32], order: &[usize; 32]) -> Option<Split> {
    // Sums over the elements before each cut; the last one again where a chunk reaches further.
    let (mut sum_x, mut sum_w) = ([0.0; 32 + CHUNK], [0.0; 32 + CHUNK]);
    for (rank, &i) in order.iter().enumerate() {
        sum_x[rank + 1] = sum_x[rank] + weights[i] * x[i];
        sum_w[rank + 1] = sum_w[rank] + weights[i];
    }
    let (all_x, all_w) = (sum_x[32], sum_w[32]);
    sum_x[32..].fill(all_x);
    sum_w[32..].fill(all_w);
    best_split(32, all_w, |first, second| {
        let mut sums = Sums { qx: [[0.0; CHUNK]; 2], qq: [[0.0; CHUNK]; 2] };
        let to_x: &[f32; CHUNK] = sum_x[second..].first_chunk().expect("the sums reach a chunk further");
        let to_w: &[f32; CHUNK] = sum_w[second..].first_chunk().expect("the sums reach a chunk further");
        for (variant, q) in [UP, DOWN].into_iter().enumerate() {
            let (low_x, low_w) = (sum_x[first] * q[0], sum_w[first] * q[0] * q[0]);
            for c in 0..CHUNK {
                let (middle_x, high_x) = (to_x[c] - sum_x[first], all_x - to_x[c]);
                let (middle_w, high_w) = (to_w[c] - sum_w[first], all_w - to_w[c]);
                sums.qx[variant][c] = low_x + middle_x * q[1] + high_x * q[2];
                sums.qq[variant][c] = low_w + middle_w * q[1] * q[1] + high_w * q[2] * q[2];
            }
        }
        sums
    })
}
