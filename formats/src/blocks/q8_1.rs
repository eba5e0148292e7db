//! Q8_1: 32 elements in 36 bytes, `x = d * q` with q in -127..=127. ggml uses it for activations.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, f16 |
//! | 2..4 | `s` | d times the sum of all q, f16; follows from the rest |
//! | 4..36 | `qs` | q of element j as i8 |
//!
//! ggml neither dequantizes nor writes it to files; the product is that of Q8_0.

use super::half::read_f16;
use super::{Block, field};
use crate::dtype::GgmlType;

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct Q8_1;

impl Block<36, 32> for Q8_1 {
    const DTYPE: GgmlType = GgmlType::Q8_1;

    #[inline(always)]
    fn dequantize(block: &[u8; 36], out: &mut [f32; 32]) {
        let d = read_f16(block, 0);
        let qs: &[u8; 32] = field(block, 4);
        for j in 0..32 {
            out[j] = f32::from(qs[j] as i8) * d;
        }
    }
}
