//! IQ4_XS: 256 elements in 136 bytes, 8 sub-blocks of 32, `x = d * (sc - 32) * VALUES[q]`, q in 0..16.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale of the sub-block scales, f16 |
//! | 2..4 | `scales_h` | u16, bits 2i..2i + 2 the upper two bits of sc of sub-block i |
//! | 4..8 | `scales_l` | lower four bits of sc of sub-block 2i in the low nibble of byte i, of 2i + 1 in the high |
//! | 8..136 | `qs` | 16 bytes per sub-block, laid out as IQ4_NL's |

use super::half::{f32_to_f16, read_f16};
use super::iq_search::{part, sum_squares, weigh};
use super::iq4_nl::{fit_values, nearest_values, write_values};
use super::k_quants::SUPERBLOCK;
use super::rounding::nearest_int;
use super::{Block, Importance, Quantize, field};
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

impl Quantize<136, SUPERBLOCK> for IQ4_XS {
    fn quantize(
        x: &[f32; SUPERBLOCK],
        importance: Option<Importance<'_, SUPERBLOCK>>,
        block: &mut [u8; 136],
    ) {
        *block = [0; 136];
        let subs = x.as_chunks::<32>().0;
        let mean_square = sum_squares(x) * (2.0 / SUPERBLOCK as f32);
        let mut scales = [0.0; 8];
        let mut extreme = 0.0f32;
        for (s, x) in subs.iter().enumerate() {
            let weights = match &importance {
                Some(importance) => weigh(x, part(importance, s), mean_square),
                None => x.map(|x| x * x),
            };
            scales[s] = fit_values(x, &weights);
            if scales[s].abs() > extreme.abs() {
                extreme = scales[s];
            }
        }
        let inverse = |scale: f32| if scale == 0.0 { 0.0 } else { 1.0 / scale };
        let d = -extreme / 32.0;
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        let mut scales_h = 0;
        for (s, (x, scale)) in subs.iter().zip(scales).enumerate() {
            let sc = nearest_int(inverse(d) * scale).clamp(-32, 31);
            let qs = nearest_values(x, inverse(d * sc as f32));
            block[8 + 16 * s..][..16].copy_from_slice(&qs);
            let sc = (sc + 32) as u8;
            block[4 + s / 2] |= (sc & 15) << (4 * (s % 2));
            scales_h |= u16::from(sc >> 4) << (2 * s);
        }
        block[2..4].copy_from_slice(&scales_h.to_le_bytes());
    }
}
