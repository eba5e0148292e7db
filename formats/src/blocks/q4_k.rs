//! Q4_K: 256 elements in 144 bytes, 8 sub-blocks of 32, `x = (d * sc) * q - (dmin * m)`, q in 0..16.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..4 | `dmin` | scale of the sub-block mins, f16 |
//! | 4..16 | `scales` | 6-bit sc and m of each sub-block, packed as `k_quants::unpack_scales` reads them |
//! | 16..144 | `qs` | 4 runs of 32 bytes; run r has sub-block 2r in its low nibbles, 2r + 1 in its high |

use super::half::read_f16;
use super::k_quants::{LANES, SUPERBLOCK, pack_scales, unpack_scales};
use super::k_quants_affine::{Affine, Candidates, Plan, Weight, fit_affine};
use super::{Block, QuantizeRow, field};
use crate::dtype::GgmlType;

const PLAN: Plan = Plan {
    q_max: 15,
    scale_max: 63,
    candidates: Candidates { first: -1.0, step: 0.1, last: 20 },
    weight: Weight::RmsPlusMagnitude,
    spread: 2.0,
};

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q4_K;

impl Block<144, SUPERBLOCK> for Q4_K {
    const DTYPE: GgmlType = GgmlType::Q4_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 144], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let dmin = read_f16(block, 2);
        let (sc, m) = unpack_scales(field(block, 4));
        let qs: &[u8; 128] = field(block, 16);
        for run in 0..4 {
            let (d_lo, m_lo) = (d * f32::from(sc[2 * run]), dmin * f32::from(m[2 * run]));
            let (d_hi, m_hi) = (d * f32::from(sc[2 * run + 1]), dmin * f32::from(m[2 * run + 1]));
            for l in 0..32 {
                let q = qs[32 * run + l];
                out[64 * run + l] = d_lo * f32::from(q & 0x0f) - m_lo;
                out[64 * run + 32 + l] = d_hi * f32::from(q >> 4) - m_hi;
            }
        }
    }
}

impl QuantizeRow<144, SUPERBLOCK> for Q4_K {
    #[inline(always)]
    fn quantize_row(
        row: &[[f32; SUPERBLOCK]],
        importance: Option<&[[f32; SUPERBLOCK]]>,
        blocks: &mut [[u8; 144]],
    ) {
        for (i, x) in row.chunks(LANES / 8).enumerate() {
            let at = i * (LANES / 8)..i * (LANES / 8) + x.len();
            let fits = fit_affine::<32>(x, importance.map(|weights| &weights[at.clone()]), &PLAN);
            for (b, (x, block)) in x.iter().zip(&mut blocks[at]).enumerate() {
                let mut fit = Affine::<8>::round(&fits, b, &PLAN);
                if importance.is_none() {
                    (fit.sc, fit.m) = (fit.sc.map(|sc| sc.min(63)), fit.m.map(|m| m.min(63)));
                }
                let scales = pack_scales(&fit.sc, &fit.m);
                (fit.sc, fit.m) = unpack_scales(&scales);
                let q = fit.quantize::<32>(x);
                block[0..2].copy_from_slice(&fit.d.to_le_bytes());
                block[2..4].copy_from_slice(&fit.dmin.to_le_bytes());
                block[4..16].copy_from_slice(&scales);
                for run in 0..4 {
                    for l in 0..32 {
                        let (lo, hi) = (q[64 * run + l], q[64 * run + 32 + l]);
                        block[16 + 32 * run + l] = lo | (hi << 4);
                    }
                }
            }
        }
    }
}
