//! IQ1_M: 256 elements in 56 bytes, 16 sub-blocks of 16, `x = d * (1 + 2 * sc) * (q +- 0.125)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..32 | `qs` | low 8 bits of the point of each group of 8 |
//! | 32..48 | `qh` | one byte per sub-block, a nibble per group: upper 3 bits of the point, then a bit that is set where 0.125 is subtracted |
//! | 48..56 | `scales` | four u16: sc of sub-block 4i + j in bits 3j..3j + 3 of word i, and in bits 12..16 a quarter of `d` (f16), the lowest first |
//!
//! The digits 0, 1 and 2 of a point stand for -1, 0 and 1.

use super::half::{f16_to_f32, f32_to_f16};
use super::iq_search::{largest, part, round_scale, sum_squares, weigh};
use super::iq1_s::{Q, SHIFT};
use super::iq1_search::{
    BOOK, CHUNK, DOWN, Split, Sums, UP, assign_levels, best_split, choose_points, sorted,
};
use super::k_quants::SUPERBLOCK;
use super::{Block, Importance, Quantize, field};

/// Below this a sub-block counts as all zero.
const ZERO_GROUP: f32 = 1e-7;

/// d is stored larger than least squares asks for.
const D_FACTOR: f32 = 1.1125;
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ1_M;

impl Block<56, SUPERBLOCK> for IQ1_M {
    const DTYPE: GgmlType = GgmlType::IQ1_M;

    #[inline(always)]
    fn dequantize(block: &[u8; 56], out: &mut [f32; SUPERBLOCK]) {
        let qs: &[u8; 32] = field(block, 0);
        let qh: &[u8; 16] = field(block, 32);
        let scales = [48, 50, 52, 54].map(|at| u16::from_le_bytes(*field(block, at)));
        let d = (0..4).fold(0, |d, i| d | (scales[i] >> 12) << (4 * i));
        let d = f16_to_f32(d);
        for (s, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let sc = (scales[s / 4] >> (3 * (s % 4))) & 7;
            let scale = d * f32::from(2 * sc + 1);
            for (k, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                let nibble = qh[s] >> (4 * k);
                let point = u16::from_le_bytes([qs[2 * s + k], nibble & 7]);
                let shift = if nibble & 8 == 0 { SHIFT } else { -SHIFT };
                for (out, q) in out.iter_mut().zip(Q[usize::from(point)]) {
                    *out = scale * (f32::from(q) + shift);
                }
            }
        }
    }
}

impl Quantize<56, SUPERBLOCK> for IQ1_M {
    fn quantize(x: &[f32; SUPERBLOCK], importance: Option<Importance<'_, SUPERBLOCK>>, block: &mut [u8; 56]) {
        *block = [0; 56];
        let mean_square = 2.0 * sum_squares(x) / SUPERBLOCK as f32;
        let subs = x.as_chunks::<16>().0;
        let mut weights = [[0.0; 16]; 16];
        let mut points = [[0; 2]; 16];
        let mut scales = [0.0; 16];
        // Bit k of a variant is set where group 1 - k is shifted down.
        let mut variants = [0; 16];
        for (s, x) in subs.iter().enumerate() {
            weights[s] = match &importance {
                Some(importance) => weigh(x, part(importance, s), mean_square),
                None => x.map(|x| x * x),
            };
            if largest(&x.map(f32::abs)) < ZERO_GROUP {
                continue;
            }
            let order = sorted(x);
            let Some(split) = split(x, &weights[s], &order) else { continue };
            let (levels, scale, mirrored) = assign_levels(&split, &order);
            variants[s] = if mirrored { 3 - split.variant } else { split.variant };
            let values = values(variants[s]);
            (points[s], scales[s]) = choose_points::<16, 2>(x, &weights[s], &levels, values, scale);
            block[2 * s] = points[s][0] as u8;
            block[2 * s + 1] = points[s][1] as u8;
            block[32 + s] = (points[s][0] >> 8 | points[s][1] >> 8 << 4) as u8;
        }
        let max_scale = largest(&scales);
        if max_scale == 0.0 {
            return;
        }

        let mut d = max_scale / 15.0;
        let inverse = 1.0 / d;
        let mut words = [0; 4];
        let (mut sum_qx, mut sum_qq) = (0.0, 0.0);
        for (s, x) in subs.iter().enumerate() {
            let sc = round_scale(inverse, scales[s], 7);
            words[s / 4] |= u16::from(sc) << (3 * (s % 4));
            block[32 + s] |= [0x00, 0x80, 0x08, 0x88][variants[s]];
            for (k, values) in values(variants[s]).into_iter().enumerate() {
                for (i, level) in BOOK.point(points[s][k]).iter().enumerate() {
                    let q = values[usize::from(*level)] * f32::from(2 * sc + 1);
                    let w = weights[s][8 * k + i];
                    sum_qx += w * q * x[8 * k + i];
                    sum_qq += w * q * q;
                }
            }
        }
        if sum_qq > 0.0 {
            d = sum_qx / sum_qq;
        }
        let d = f32_to_f16(d * D_FACTOR);
        for (i, word) in words.into_iter().enumerate() {
            let word = word | (d >> (4 * i) & 15) << 12;
            block[48 + 2 * i..][..2].copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// What the levels of both groups stand for in each variant.
#[inline(always)]
fn values(variant: usize) -> [&'static [f32; 3]; 2] {
    [if variant < 2 { &UP } else { &DOWN }, if variant.is_multiple_of(2) { &UP } else { &DOWN }]
}

/// Splits a sub-block; each of its two groups has a shift of its own, see [`values`].
#[inline(always)]
fn split(x: &[f32; 16], weights: &[f32; 16], order: &[usize; 16]) -> Option<Split> {
    // Sums over the elements of each group before each cut, of weight * x and of weight.
    let mut sum_x = [[0.0; 16 + CHUNK]; 2];
    let mut sum_w = [[0.0; 16 + CHUNK]; 2];
    for (rank, &i) in order.iter().enumerate() {
        for half in 0..2 {
            let (mut x_next, mut w_next) = (sum_x[half][rank], sum_w[half][rank]);
            if i / 8 == half {
                x_next += weights[i] * x[i];
                w_next += weights[i];
            }
            (sum_x[half][rank + 1], sum_w[half][rank + 1]) = (x_next, w_next);
        }
    }
    for half in 0..2 {
        let (all_x, all_w) = (sum_x[half][16], sum_w[half][16]);
        sum_x[half][16..].fill(all_x);
        sum_w[half][16..].fill(all_w);
    }
    best_split(16, sum_w[0][16] + sum_w[1][16], |first, second| {
        // Neighbouring levels differ by one, so a sum over three ranges is that of all elements at the
        // highest level less what each cut takes away. By group, then by shift.
        let mut qx = [[[0.0; CHUNK]; 2]; 2];
        let mut qq = [[[0.0; CHUNK]; 2]; 2];
        for half in 0..2 {
            let (x, w) = (&sum_x[half], &sum_w[half]);
            let to_x: &[f32; CHUNK] = x[second..].first_chunk().expect("the sums reach a chunk further");
            let to_w: &[f32; CHUNK] = w[second..].first_chunk().expect("the sums reach a chunk further");
            for (shift, q) in [UP, DOWN].into_iter().enumerate() {
                let all_x = x[16] * q[2];
                let low_w = w[16] * q[2] * q[2] + w[first] * (q[0] * q[0] - q[1] * q[1]);
                let step = q[1] * q[1] - q[2] * q[2];
                for c in 0..CHUNK {
                    qx[half][shift][c] = all_x - (x[first] + to_x[c]);
                    qq[half][shift][c] = low_w + to_w[c] * step;
                }
            }
        }
        let mut sums = Sums { qx: [[0.0; CHUNK]; 4], qq: [[0.0; CHUNK]; 4] };
        for variant in 0..4 {
            for c in 0..CHUNK {
                sums.qx[variant][c] = qx[0][variant / 2][c] + qx[1][variant % 2][c];
                sums.qq[variant][c] = qq[0][variant / 2][c] + qq[1][variant % 2][c];
            }
        }
        sums
    })
}
