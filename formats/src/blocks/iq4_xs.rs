//! IQ4_XS: 256 elements in 136 bytes, 8 sub-blocks of 32, `x = d * (sc - 32) * VALUES[q]`, q in 0..16.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..4 | `scales_h` | u16, bits 2i..2i + 2 the upper two bits of sc of sub-block i |
//! | 4..8 | `scales_l` | lower four bits of sc of sub-block 2i in the low nibble of byte i, of 2i + 1 in the high |
//! | 8..136 | `qs` | 16 bytes per sub-block, laid out as IQ4_NL's |

use super::half::read_f16;
use super::iq4_nl::write_values;
use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ4_XS;

impl Block<136, SUPERBLOCK> for IQ4_XS {
    const DTYPE: GgmlType = GgmlType::IQ4_XS;

    #[inline(always)]
    fn dequantize(block: &[u8; 136], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 0);
        let scales_h = u16::from_le_bytes(*field(block, 2));
        let scales_l: &[u8; 4] = field(block, 4);
        for (s, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = (scales_l[s / 2] >> (4 * (s % 2))) & 15;
            let high = (scales_h >> (2 * s)) as u8 & 3;
            let scale = d * (i32::from(low | (high << 4)) - 32) as f32;
            write_values(out, scale, field(block, 8 + 16 * s));
        }
    }
}
