//! Q3_K: 256 elements in 110 bytes, 16 sub-blocks of 16, `x = (d * (sc - 32)) * (q - 4)`, q in 0..8.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..32 | `hmask` | bit t of byte l is bit 2 of q of element 32t + l |
//! | 32..96 | `qs` | low 2 bits; half h (128 elements) has bytes 32h..32h + 32; element l of quarter t of the half is at bit 2t of byte l |
//! | 96..108 | `scales` | 6-bit sc: low nibbles of 0..8 and 8..16 in the low and high nibbles of bytes 0..8, upper two bits of sub-block s at bit 2 (s / 4) of byte 8 + s % 4 |
//! | 108..110 | `d` | scale of the sub-block scales, f16 |

use super::half::{f32_to_f16, read_f16};
use super::k_quants::{LANES, SUPERBLOCK, error_weights, level, of_superblock, pack2, side_by_side, sums};
use super::k_quants_symmetric::{SUBS, ZERO_GROUP, extreme_scale, fit_by_moves, fit_by_trials, trial};
use super::rounding::nearest_int;
use super::{Block, QuantizeRow, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q3_K;

/// The scales of the sub-blocks, in -32..32.
#[inline(always)]
fn unpack_scales(scales: &[u8; 12]) -> [i8; SUBS] {
    let mut sc = [0; SUBS];
    for s in 0..SUBS {
        let low = (scales[s % 8] >> (4 * (s / 8))) & 0x0f;
        let high = (scales[8 + s % 4] >> (2 * (s / 4))) & 3;
        sc[s] = (low | (high << 4)) as i8 - 32;
    }
    sc
}

/// Inverse of [`unpack_scales`].
#[inline(always)]
fn pack_scales(sc: &[i8; SUBS]) -> [u8; 12] {
    let mut scales = [0; 12];
    for s in 0..SUBS {
        let sc = (sc[s] + 32) as u8;
        scales[s % 8] |= (sc & 0x0f) << (4 * (s / 8));
        scales[8 + s % 4] |= (sc >> 4) << (2 * (s / 4));
    }
    scales
}

impl Block<110, SUPERBLOCK> for Q3_K {
    const DTYPE: GgmlType = GgmlType::Q3_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 110], out: &mut [f32; SUPERBLOCK]) {
        let hmask: &[u8; 32] = field(block, 0);
        let qs: &[u8; 64] = field(block, 32);
        let sc = unpack_scales(field(block, 96));
        let d = read_f16(block, 108);
        for part in 0..4 {
            let (half, at) = (part / 2, 16 * (part % 2));
            let mut scale = [0.0; 4];
            for quarter in 0..4 {
                scale[quarter] = d * f32::from(sc[8 * half + 2 * quarter + part % 2]);
            }
            for l in at..at + 16 {
                for quarter in 0..4 {
                    let low = (qs[32 * half + l] >> (2 * quarter)) & 3;
                    let high = (hmask[l] >> (4 * half + quarter)) & 1;
                    let q = i32::from(low | (high << 2)) - 4;
                    out[128 * half + 32 * quarter + l] = scale[quarter] * q as f32;
                }
            }
        }
    }
}

impl QuantizeRow<110, SUPERBLOCK> for Q3_K {
    #[inline(always)]
    fn quantize_row(
        row: &[[f32; SUPERBLOCK]],
        importance: Option<&[[f32; SUPERBLOCK]]>,
        blocks: &mut [[u8; 110]],
    ) {
        for (i, x) in row.chunks(LANES / SUBS).enumerate() {
            let at = i * (LANES / SUBS)..i * (LANES / SUBS) + x.len();
            let lanes = side_by_side(x);
            let (fits, weights) = if let Some(importance) = importance {
                let weights = error_weights(x, &importance[at.clone()], 2.0);
                (fit_by_trials(&lanes, &weights, 4), Some(sums(&weights)))
            } else {
                (fit_by_moves(&lanes, 4), None)
            };
            for (b, (x, block)) in x.iter().zip(&mut blocks[at]).enumerate() {
                let (d, sc) = if let Some(weights) = &weights {
                    common_factor(fits.scales(b), of_superblock(weights, b))
                } else {
                    extreme_factor(fits.scales(b))
                };
                let d = f32_to_f16(d);
                let q = fits.quantize(b, x, d, &sc, 4);
                for l in 0..32 {
                    let mut high = 0;
                    for t in 0..8 {
                        high |= (q[32 * t + l] >> 2) << t;
                    }
                    block[l] = high;
                }
                block[32..96].copy_from_slice(&pack2(&q));
                block[96..108].copy_from_slice(&pack_scales(&sc));
                block[108..110].copy_from_slice(&d.to_le_bytes());
            }
        }
    }
}

/// Of a superblock: d, and the scales of its sub-blocks in units of d.
type Factor = (f32, [i8; SUBS]);

/// Rounds the scales to multiples in -32..32 of the d that makes the one of largest magnitude -32.
#[inline(always)]
fn extreme_factor(scales: &[f32; SUBS]) -> Factor {
    let (extreme, _) = extreme_scale(scales);
    if extreme == 0.0 {
        // Zero bytes, which stand for -32.
        return (0.0, [-32; SUBS]);
    }
    let inverse = -32.0 / extreme;
    let mut sc = [0; SUBS];
    for s in 0..SUBS {
        sc[s] = (nearest_int(inverse * scales[s]) as i8).clamp(-32, 31);
    }
    (1.0 / inverse, sc)
}

/// Rounds the scales to multiples in -32..32 of a d that minimizes the weighted squared error: scales
/// are fitted like elements, all candidates side by side.
#[inline(always)]
fn common_factor(scales: &[f32; SUBS], weights: &[f32; SUBS]) -> Factor {
    let (extreme, largest) = extreme_scale(scales);
    if largest < ZERO_GROUP {
        return (0.0, [-32; SUBS]);
    }
    let mut inverse = [0.0; LANES];
    for (i, inverse) in (0i8..).zip(&mut inverse) {
        // 0, then -9..=9 without 0.
        let step = if i == 0 { 0 } else { i - 10 + i8::from(i > 9) };
        *inverse = -(32.0 + 0.1 * f32::from(step)) / extreme;
    }
    let (sum_qx, sum_qq) = trial(&scales.map(|x| [x; LANES]), &weights.map(|w| [w; LANES]), &inverse, 32);
    let mut best = 0;
    let mut d = if sum_qq[0] == 0.0 { 0.0 } else { sum_qx[0] / sum_qq[0] };
    let mut score = d * sum_qx[0];
    for i in 1..19 {
        if sum_qq[i] > 0.0 && sum_qx[i] * sum_qx[i] > score * sum_qq[i] {
            best = i;
            d = sum_qx[i] / sum_qq[i];
            score = d * sum_qx[i];
        }
    }
    let mut sc = [0; SUBS];
    for s in 0..SUBS {
        sc[s] = level(inverse[best] * scales[s], -32, 31) as i8;
    }
    (d, sc)
}
