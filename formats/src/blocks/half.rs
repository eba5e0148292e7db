//! F16 and BF16 <-> f32 as integer selects that vectorize; equal to ggml's conversions for all inputs.
//!
//! The `half` crate picks its conversion at run time, once per call, which would sit in the middle of
//! every dequantization loop and keep it from being vectorized.

/// IEEE binary16 -> f32, exact; a signalling NaN comes out quiet.
#[inline(always)]
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    const EXPONENT_SHIFT: u32 = (127 - 15) << 23;
    let sign = u32::from(bits & 0x8000) << 16;
    let magnitude = u32::from(bits & 0x7fff);

    let finite = (magnitude << 13) + EXPONENT_SHIFT;
    let infinite = if magnitude >= 0x7c00 { EXPONENT_SHIFT } else { 0 };
    let quiet = if magnitude > 0x7c00 { 1 << 22 } else { 0 };
    // A subnormal is its mantissa in units of 2^-24. The product is a normal f32: no slow path.
    let subnormal = (magnitude as i32 as f32 * (1.0 / 16_777_216.0)).to_bits();

    let normal = (finite + infinite) | quiet;
    f32::from_bits(sign | if magnitude < 0x0400 { subnormal } else { normal })
}

/// bfloat16 -> f32: the upper half of the bits.
#[inline(always)]
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The binary16 field at byte `at` of a block, as f32.
#[inline(always)]
pub(super) fn read_f16<const BYTES: usize>(block: &[u8; BYTES], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// f32 -> IEEE binary16, to nearest, ties to even; too large becomes infinite, NaN becomes 0x7e00.
#[inline(always)]
pub(crate) fn f32_to_f16(x: f32) -> u16 {
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    /// Halfway between 65504 and 65536, which rounds to the (infinite) even neighbour.
    const OVERFLOW: u32 = 0x477f_f000;
    const INFINITY: u32 = 0x7f80_0000;
    let sign = (x.to_bits() >> 16) & 0x8000;
    let magnitude = x.to_bits() & 0x7fff_ffff;

    // One unit in the last place of 0.5 is 2^-24, the unit of the subnormals: the addition rounds.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let tie_to_even = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0x0fff + tie_to_even) >> 13;

    let finite = if magnitude < SMALLEST_NORMAL { subnormal } else { normal };
    let bounded = if magnitude >= OVERFLOW { 0x7c00 } else { finite };
    (sign | if magnitude > INFINITY { 0x7e00 } else { bounded }) as u16
}

/// f32 -> the nearest binary16, as f32: the two conversions in one, which vectorizes without 16-bit lanes.
#[inline(always)]
pub(crate) fn round_to_f16(x: f32) -> f32 {
    const SMALLEST_NORMAL: u32 = (127 - 14) << 23;
    const TOO_LARGE: u32 = (127 + 16) << 23;
    const INFINITY: u32 = 0x7f80_0000;
    let sign = x.to_bits() & 0x8000_0000;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    let tie_to_even = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_add(0x0fff + tie_to_even) & !0x1fff;
    let subnormal = ((f32::from_bits(magnitude) + 0.5) - 0.5).to_bits();
    let finite = if magnitude < SMALLEST_NORMAL { subnormal } else { normal };
    let bounded = if finite >= TOO_LARGE { INFINITY } else { finite };
    f32::from_bits(sign | if magnitude > INFINITY { magnitude | 1 << 22 } else { bounded })
}

/// f32 -> bfloat16, to nearest, ties to even; NaN stays NaN and becomes quiet.
#[inline(always)]
pub(crate) fn f32_to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let tie_to_even = (bits >> 16) & 1;
    let rounded = bits.wrapping_add(0x7fff + tie_to_even) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_agrees_with_the_half_crate_and_survives_the_round_trip() {
        for bits in 0..=u16::MAX {
            let x = f16_to_f32(bits);
            assert_eq!(x.to_bits(), half::f16::from_bits(bits).to_f32().to_bits(), "{bits:#06x}");
            let back = if x.is_nan() { (bits & 0x8000) | 0x7e00 } else { bits };
            assert_eq!(f32_to_f16(x), back, "{bits:#06x}");
        }
    }

    #[test]
    fn rounding_to_f16_and_bf16_agrees_with_the_half_crate() {
        // A stride that is coprime to 2^32 visits all exponents and mantissa ends; plus the ties.
        let strided = (0..1u32 << 21).map(|i| i.wrapping_mul(2_654_435_761));
        let ties = (0..=u16::MAX).flat_map(|h| {
            let f16_tie = (f16_to_f32(h).to_bits()).wrapping_add(0x1000);
            let bf16_tie = u32::from(h) << 16 | 0x8000;
            [f16_tie - 1, f16_tie, f16_tie + 1, bf16_tie - 1, bf16_tie, bf16_tie + 1]
        });
        for x in strided.chain(ties).map(f32::from_bits) {
            let bf16 = half::bf16::from_f32(x).to_bits();
            assert_eq!(f32_to_bf16(x), bf16, "{:#010x}", x.to_bits());
            let f16 = if x.is_nan() {
                (x.to_bits() >> 16) as u16 & 0x8000 | 0x7e00
            } else {
                half::f16::from_f32(x).to_bits()
            };
            assert_eq!(f32_to_f16(x), f16, "{:#010x}", x.to_bits());
            if x.is_nan() {
                assert!(round_to_f16(x).is_nan());
            } else {
                assert_eq!(round_to_f16(x).to_bits(), f16_to_f32(f16).to_bits(), "{:#010x}", x.to_bits());
            }
        }
    }
}
