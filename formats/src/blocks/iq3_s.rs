//! IQ3_S: 256 elements in 110 bytes, 8 sub-blocks of 32, `x = d * (1 + 2 * sc) * (+-q)`.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..66 | `qs` | low 8 bits of the point of each group of 4 |
//! | 66..74 | `qh` | bit 8 of the points of sub-block i in byte i, group k in bit k |
//! | 74..106 | `signs` | bit i of byte k set where element 8k + i is negative |
//! | 106..110 | `scales` | sc of sub-block 2i in the low nibble of byte i, of 2i + 1 in the high |
//!
//! The digit l of a point stands for 2l + 1.

use super::half::read_f16;
use super::iq_grids::{self, write_signed};
use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

static Q: [[i8; 4]; 512] = iq_grids::levels(&iq_grids::IQ3_S, [1, 3, 5, 7, 9, 11, 13, 15]);

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ3_S;

impl Block<110, SUPERBLOCK> for IQ3_S {
    const DTYPE: GgmlType = GgmlType::IQ3_S;

    #[inline(always)]
    fn dequantize(block: &[u8; 110], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 64] = field(block, 2);
        let qh: &[u8; 8] = field(block, 66);
        let signs: &[u8; 32] = field(block, 74);
        let scales: &[u8; 4] = field(block, 106);
        for (s, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let sc = (scales[s / 2] >> (4 * (s % 2))) & 15;
            let scale = d * f32::from(1 + 2 * sc);
            for (k, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                let point = u16::from_le_bytes([qs[8 * s + k], (qh[s] >> k) & 1]);
                let signs = signs[4 * s + k / 2] >> (4 * (k % 2));
                write_signed(out, scale, &Q[usize::from(point)], signs);
            }
        }
    }
}
