//! Q8_K: 256 elements in 292 bytes, `x = d * q` with q an i8. ggml uses it for activations.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..4 | `d` | scale, f32 |
//! | 4..260 | `qs` | q of element j as i8 |
//! | 260..292 | `bsums` | sums of q over runs of 16, i16; follow from the rest |
//!
//! ggml does not write it to files.

use super::k_quants::SUPERBLOCK;
use super::{Block, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q8_K;

impl Block<292, SUPERBLOCK> for Q8_K {
    const DTYPE: GgmlType = GgmlType::Q8_K;

    #[inline(always)]
    fn dequantize(block: &[u8; 292], out: &mut [f32; SUPERBLOCK]) {
        let d = f32::from_le_bytes(*field(block, 0));
        let qs: &[u8; SUPERBLOCK] = field(block, 4);
        for j in 0..SUPERBLOCK {
            out[j] = d * f32::from(qs[j] as i8);
        }
    }
}
