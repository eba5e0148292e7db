//! Q2_K: 256 elements in 84 bytes, 16 sub-blocks of 16, `x = (d * sc) * q - (dmin * m)`, q in 0..4.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..16 | `scales` | of each sub-block sc in the low nibble, m in the high |
//! | 16..80 | `qs` | half h (128 elements) has bytes 32h..32h + 32; element l of quarter t of the half is at bit 2t of byte l |
//! | 80..82 | `d` | scale of the sub-block scales, f16 |
//! | 82..84 | `dmin` | scale of the sub-block mins, f16 |

use super::half::read_f16;
use super::k_quants::{LANES, SUPERBLOCK, pack2};
use super::k_quants_affine::{Affine, Candidates, Plan, Weight, fit_affine};
use super::{Block, QuantizeRow, field};
use crate::dtype::GgmlType;

const PLAN: Plan = Plan {
    q_max: 3,
    scale_max: 15,
    candidates: Candidates { first: -0.5, step: 0.1, last: 15 },
    weight: Weight::Magnitude,
    spread: 1.0,
};

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q2_K;

impl Block<84, SUPERBLOCK> for Q2_K {
    const DTYPE: GgmlType = GgmlType::Q2_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 84], out: &mut [f32; SUPERBLOCK]) {
        let scales: &[u8; 16] = field(block, 0);
        let qs: &[u8; 64] = field(block, 16);
        let (d, dmin) = (read_f16(block, 80), read_f16(block, 82));
        for part in 0..4 {
            let (half, at) = (part / 2, 16 * (part % 2));
            let (mut scale, mut min) = ([0.0; 4], [0.0; 4]);
            for quarter in 0..4 {
                let sub = scales[8 * half + 2 * quarter + part % 2];
                (scale[quarter], min[quarter]) = (d * f32::from(sub & 0x0f), dmin * f32::from(sub >> 4));
            }
            for l in at..at + 16 {
                for quarter in 0..4 {
                    let q = (qs[32 * half + l] >> (2 * quarter)) & 3;
                    out[128 * half + 32 * quarter + l] = scale[quarter] * f32::from(q) - min[quarter];
                }
            }
        }
    }
}

impl QuantizeRow<84, SUPERBLOCK> for Q2_K {
    #[inline(always)]
    fn quantize_row(
        row: &[[f32; SUPERBLOCK]],
        importance: Option<&[[f32; SUPERBLOCK]]>,
        blocks: &mut [[u8; 84]],
    ) {
        for (i, x) in row.chunks(LANES / 16).enumerate() {
            let at = i * (LANES / 16)..i * (LANES / 16) + x.len();
            let fits = fit_affine::<16>(x, importance.map(|weights| &weights[at.clone()]), &PLAN);
            for (b, (x, block)) in x.iter().zip(&mut blocks[at]).enumerate() {
                let mut fit = Affine::<16>::round(&fits, b, &PLAN);
                for s in 0..16 {
                    // A wrapped sc spills into the nibble of m, and both are read back from the byte.
                    let sub = fit.sc[s] | (fit.m[s] << 4);
                    (fit.sc[s], fit.m[s]) = (sub & 0x0f, sub >> 4);
                    block[s] = sub;
                }
                block[16..80].copy_from_slice(&pack2(&fit.quantize::<16>(x)));
                block[80..82].copy_from_slice(&fit.d.to_le_bytes());
                block[82..84].copy_from_slice(&fit.dmin.to_le_bytes());
            }
        }
    }
}
