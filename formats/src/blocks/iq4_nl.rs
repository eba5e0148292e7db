//! IQ4_NL: 32 elements in 18 bytes, `x = d * VALUES[q]`, q in 0..16.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, f16 |
//! | 2..18 | `qs` | q of element j in the low nibble of byte j, of element j + 16 in the high nibble |

use super::half::read_f16;
use super::{Block, field};
use crate::dtype::GgmlType;

/// The values that the 4 bits of IQ4_NL and IQ4_XS stand for, denser around zero.
pub(super) const VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// `out = scale * VALUES[q]` for the 32 elements whose q are in 16 bytes.
#[inline(always)]
pub(super) fn write_values(out: &mut [f32; 32], scale: f32, qs: &[u8; 16]) {
    for j in 0..16 {
        out[j] = scale * VALUES[usize::from(qs[j] & 15)];
    }
    for j in 0..16 {
        out[16 + j] = scale * VALUES[usize::from(qs[j] >> 4)];
    }
}

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ4_NL;

impl Block<18, 32> for IQ4_NL {
    const DTYPE: GgmlType = GgmlType::IQ4_NL;

    #[inline(always)]
    fn dequantize(block: &[u8; 18], out: &mut [f32; 32]) {
        write_values(out, read_f16(block, 0), field(block, 2));
    }
}
