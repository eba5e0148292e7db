//! TQ2_0: 256 elements in 66 bytes, `x = d * (q - 1)` with q in 0..4.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..64 | `qs` | half h (128 elements) has bytes 32h..32h + 32; element 32n + m of it at bit 2n of byte m |
//! | 64..66 | `d` | largest magnitude, f16 |
//!
//! As d is the largest magnitude, the quantizer never chooses q = 3.

use super::half::read_f16;
use super::k_quants::SUPERBLOCK;
use super::ternary::ternarize;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct TQ2_0;

impl Block<66, SUPERBLOCK> for TQ2_0 {
    const DTYPE: GgmlType = GgmlType::TQ2_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 66], out: &mut [f32; SUPERBLOCK]) {
        let qs: &[u8; 64] = field(block, 0);
        let d = read_f16(block, 64);
        for half in 0..2 {
            for n in 0..4 {
                for m in 0..32 {
                    let q = (qs[32 * half + m] >> (2 * n)) & 3;
                    out[128 * half + 32 * n + m] = (i32::from(q) - 1) as f32 * d;
                }
            }
        }
    }
}

impl Quantize<66, SUPERBLOCK> for TQ2_0 {
    #[inline(always)]
    fn quantize(x: &[f32; SUPERBLOCK], _: Option<Importance<'_, SUPERBLOCK>>, block: &mut [u8; 66]) {
        let (d, q) = ternarize(x);
        for half in 0..2 {
            for m in 0..32 {
                let q = |n: usize| q[128 * half + 32 * n + m];
                block[32 * half + m] = q(0) | (q(1) << 2) | (q(2) << 4) | (q(3) << 6);
            }
        }
        block[64..66].copy_from_slice(&d.to_le_bytes());
    }
}
