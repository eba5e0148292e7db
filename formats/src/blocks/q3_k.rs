//! Q3_K: 256 elements in 110 bytes, 16 sub-blocks of 16, `x = (d * (sc - 32)) * (q - 4)`, q in 0..8.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..32 | `hmask` | bit t of byte l is bit 2 of q of element 32t + l |
//! | 32..96 | `qs` | low 2 bits; half h (128 elements) has bytes 32h..32h + 32; element l of quarter t of the half is at bit 2t of byte l |
//! | 96..108 | `scales` | 6-bit sc: low nibbles of 0..8 and 8..16 in the low and high nibbles of bytes 0..8, upper two bits of sub-block s at bit 2 (s / 4) of byte 8 + s % 4 |
//! | 108..110 | `d` | scale of the sub-block scales, f16 |

use super::half::{f32_to_f16, read_f16};
use super::k_quants::{LANES, Lanes, SUPERBLOCK, error_weights, pack2, side_by_side, sums};
use super::k_quants_symmetric::{Fits, SUBS, extreme_scale, fit_by_moves, fit_by_trials};
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
        for half in 0..2 {
            for quarter in 0..4 {
                for part in 0..2 {
                    let scale = d * f32::from(sc[8 * half + 2 * quarter + part]);
                    for l in 16 * part..16 * part + 16 {
                        let low = (qs[32 * half + l] >> (2 * quarter)) & 3;
                        let high = (hmask[l] >> (4 * half + quarter)) & 1;
                        let q = i32::from(low | (high << 2)) - 4;
                        out[128 * half + 32 * quarter + l] = scale * q as f32;
                    }
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
            let (fits, factors) = if let Some(importance) = importance {
                let weights = error_weights(x, &importance[at.clone()], 2.0);
                let fits = fit_by_trials(&lanes, &weights, 4);
                let factors = common_factors(&fits.scale, &sums(&weights));
                (fits, factors)
            } else {
                let fits = fit_by_moves(&lanes, 4);
                let factors = extreme_factors(&fits);
                (fits, factors)
            };
            for (b, (x, block)) in x.iter().zip(&mut blocks[at]).enumerate() {
                let (d, sc) = factors[b];
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
fn extreme_factors(fits: &Fits<SUBS>) -> [Factor; LANES / SUBS] {
    let mut factors = [(0.0, [0; SUBS]); LANES / SUBS];
    for (b, (d, sc)) in factors.iter_mut().enumerate() {
        let (extreme, _) = extreme_scale(fits.scales(b));
        if extreme == 0.0 {
            // Zero bytes, which stand for -32.
            *sc = [-32; SUBS];
            continue;
        }
        let inverse = -32.0 / extreme;
        for (sc, scale) in sc.iter_mut().zip(fits.scales(b)) {
            *sc = (nearest_int(inverse * scale) as i8).clamp(-32, 31);
        }
        *d = 1.0 / inverse;
    }
    factors
}

/// Rounds the scales to multiples in -32..32 of a d that minimizes the weighted squared error: scales
/// are fitted like elements, the superblocks being the groups.
#[inline(always)]
fn common_factors(scale: &[f32; LANES], weight: &[f32; LANES]) -> [Factor; LANES / SUBS] {
    let (mut scales, mut weights): (Lanes<SUBS>, Lanes<SUBS>) = ([[0.0; LANES]; SUBS], [[0.0; LANES]; SUBS]);
    for b in 0..LANES / SUBS {
        for s in 0..SUBS {
            scales[s][b] = scale[SUBS * b + s];
            weights[s][b] = weight[SUBS * b + s];
        }
    }
    let fits = fit_by_trials(&scales, &weights, 32);
    let mut factors = [(0.0, [0; SUBS]); LANES / SUBS];
    for (b, (d, sc)) in factors.iter_mut().enumerate() {
        *d = fits.scale[b];
        for s in 0..SUBS {
            sc[s] = fits.q[s][b] as i8;
        }
    }
    factors
}
