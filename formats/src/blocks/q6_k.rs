//! Q6_K: 256 elements in 210 bytes, 16 sub-blocks of 16, `x = (d * sc) * (q - 32)`, q in 0..64.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..128 | `ql` | low 4 bits; half h (128 elements) has bytes 64h..64h + 64 |
//! | 128..192 | `qh` | high 2 bits; half h has bytes 32h..32h + 32 |
//! | 192..208 | `scales` | sc of each sub-block, i8 |
//! | 208..210 | `d` | scale of the sub-block scales, f16 |
//!
//! A half has four quarters of 32 elements. Element l of quarter t has its low bits in byte
//! `32 * (t % 2) + l` of `ql` (low nibble for t < 2, else high) and its high bits at bit 2t of byte l
//! of `qh`.

use super::half::{f32_to_f16, read_f16};
use super::k_quants::{LANES, Lanes, SUPERBLOCK, side_by_side};
use super::k_quants_symmetric::{SUBS, ZERO_GROUP, extreme_scale, fit_by_trials};
use super::rounding::nearest_int;
use super::{Block, QuantizeRow, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q6_K;

impl Block<210, SUPERBLOCK> for Q6_K {
    const DTYPE: GgmlType = GgmlType::Q6_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 210], out: &mut [f32; SUPERBLOCK]) {
        let ql: &[u8; 128] = field(block, 0);
        let qh: &[u8; 64] = field(block, 128);
        let scales: &[u8; 16] = field(block, 192);
        let d = read_f16(block, 208);
        for part in 0..4 {
            let (half, at) = (part / 2, 16 * (part % 2));
            let mut scale = [0.0; 4];
            for quarter in 0..4 {
                scale[quarter] = d * f32::from(scales[8 * half + 2 * quarter + part % 2] as i8);
            }
            for l in at..at + 16 {
                for quarter in 0..4 {
                    let low = ql[64 * half + 32 * (quarter % 2) + l] >> (4 * (quarter / 2));
                    let high = qh[32 * half + l] >> (2 * quarter);
                    let q = (low & 0x0f) | ((high & 3) << 4);
                    out[128 * half + 32 * quarter + l] = scale[quarter] * (i32::from(q) - 32) as f32;
                }
            }
        }
    }
}

impl QuantizeRow<210, SUPERBLOCK> for Q6_K {
    #[inline(always)]
    fn quantize_row(
        row: &[[f32; SUPERBLOCK]],
        importance: Option<&[[f32; SUPERBLOCK]]>,
        blocks: &mut [[u8; 210]],
    ) {
        for (i, x) in row.chunks(LANES / SUBS).enumerate() {
            let at = i * (LANES / SUBS)..i * (LANES / SUBS) + x.len();
            let lanes = side_by_side(x);
            let fits = if let Some(importance) = importance {
                fit_by_trials(&lanes, &side_by_side(&importance[at.clone()]), 32)
            } else {
                fit_by_trials(&lanes, &squares(&lanes), 32)
            };
            for (b, (x, block)) in x.iter().zip(&mut blocks[at]).enumerate() {
                let (extreme, largest) = extreme_scale(fits.scales(b));
                if largest < ZERO_GROUP {
                    *block = [0; 210];
                    continue;
                }
                let inverse = -128.0 / extreme;
                let d = f32_to_f16(1.0 / inverse);
                let mut scales = [0; SUBS];
                for (sc, scale) in scales.iter_mut().zip(fits.scales(b)) {
                    *sc = nearest_int(inverse * scale).min(127) as i8;
                }
                let q = fits.quantize(b, x, d, &scales, 32);
                for half in 0..2 {
                    for l in 0..32 {
                        let at = |quarter: usize| q[128 * half + 32 * quarter + l];
                        block[64 * half + l] = (at(0) & 0x0f) | (at(2) << 4);
                        block[64 * half + 32 + l] = (at(1) & 0x0f) | (at(3) << 4);
                        block[128 + 32 * half + l] =
                            (at(0) >> 4) | (at(1) >> 4 << 2) | (at(2) >> 4 << 4) | (at(3) >> 4 << 6);
                    }
                }
                block[192..208].copy_from_slice(&scales.map(|sc| sc as u8));
                block[208..210].copy_from_slice(&d.to_le_bytes());
            }
        }
    }
}

/// Without importance an error counts by x^2.
#[inline(always)]
fn squares(x: &Lanes<SUBS>) -> Lanes<SUBS> {
    let mut squares = *x;
    for x in squares.as_flattened_mut() {
        *x *= *x;
    }
    squares
}
