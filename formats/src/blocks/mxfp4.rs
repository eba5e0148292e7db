//! MXFP4: 32 elements in 17 bytes, `x = d * v` with v one of 16 numbers (see `fp4`).
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..1 | `e` | E8M0 exponent: d = 2^(e - 128), half of the scale of the OCP format, whose numbers v are halved |
//! | 1..17 | `qs` | code of element j in the low nibble of byte j, of element j + 16 in the high nibble |

use super::fp4::{nearest, value};
use super::nibbles::{largest, pack4, unpack4};
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

pub(super) struct MXFP4;

impl Block<17, 32> for MXFP4 {
    const DTYPE: GgmlType = GgmlType::MXFP4;

    #[inline(always)]
    fn dequantize(block: &[u8; 17], out: &mut [f32; 32]) {
        let d = half_power_of_two(block[0]);
        let codes = unpack4(field(block, 1));
        for j in 0..32 {
            out[j] = f32::from(value(codes[j])) * d;
        }
    }
}

impl Quantize<17, 32> for MXFP4 {
    #[inline(always)]
    fn quantize(x: &[f32; 32], _: Option<Importance<'_, 32>>, block: &mut [u8; 17]) {
        let largest = largest(x);
        // The largest number of the format is 6 = 1.5 * 2^2. Below 2^-125 the exponent wraps, like the
        // cast of the reference on its machine; all codes are 0 then.
        let e = if largest > 0.0 { (floor_log2(largest) - 2 + 127) as u8 } else { 0 };
        block[0] = e;
        block[1..17].copy_from_slice(&pack4(&nearest(x, half_power_of_two(e))));
    }
}

/// `2^(e - 128)`.
#[inline(always)]
fn half_power_of_two(e: u8) -> f32 {
    let e = u32::from(e);
    // The two smallest are subnormal.
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

/// C's `floor(log2(x))` in f32, for positive finite x: the logarithm of a number just below 2^k is
/// rounded to k, and the farther k is from 0, the more numbers that concerns.
///
/// `log2(2^k (1 - n 2^-24))` is `k - n 2^-24 / ln 2`, which becomes k if it is less than half the
/// distance of floats below k away: `n < 2^m ln 2`, with 2^(m - 23) that distance.
#[inline(always)]
fn floor_log2(x: f32) -> i32 {
    /// `2^32 ln 2`.
    const LN_2: u64 = 0xb172_17f7;
    // Subnormal numbers become normal ones, all of them.
    let bits = (if x < f32::MIN_POSITIVE { x * 16_777_216.0 } else { x }).to_bits();
    let moved = if x < f32::MIN_POSITIVE { 24 } else { 0 };
    let next_power = (bits >> 23) as i32 - 127 - moved + 1;
    // Numbers below a positive power of two have the finer spacing of the binade before.
    let binade = if next_power > 0 { next_power - 1 } else { -next_power };
    let m = 31 - binade.leading_zeros() as i32;
    let slack = if binade > 0 { (LN_2 >> (32 - m)) as u32 } else { 0 };
    ((bits + slack) >> 23) as i32 - 127 - moved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponents_are_powers_of_two() {
        for e in 0..=255 {
            assert_eq!(f64::from(half_power_of_two(e)), (f64::from(e) - 128.0).exp2());
        }
    }

    #[test]
    fn the_logarithm_is_rounded_before_it_is_floored() {
        for k in -148..128 {
            let power = (f64::from(k)).exp2();
            assert_eq!(floor_log2(power as f32), k);
            let mut x = (power as f32).next_down();
            for _ in 0..100 {
                // In f64 the logarithm is exact enough to know its f32.
                assert_eq!(floor_log2(x), (f64::from(x).log2() as f32).floor() as i32, "{x:e}");
                x = x.next_down().max(f32::from_bits(1));
            }
        }
        assert_eq!(floor_log2(f32::MAX), 128);
    }
}
