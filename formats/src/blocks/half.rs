//! F16 and BF16 <-> f32 as integer selects that vectorize; equal to ggml's conversions for all inputs.
//!
//! The `half` crate picks its conversion at run time, once per call, which would sit in the middle of
//! every dequantization loop and keep it from being vectorized.

/// IEEE binary16 -> f32, exact; a signalling NaN comes out quiet.
#[inline(always)]
pub(super) fn f16_to_f32(bits: u16) -> f32 {
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
pub(super) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The binary16 field at byte `at` of a block, as f32.
#[inline(always)]
pub(super) fn read_f16<const BYTES: usize>(block: &[u8; BYTES], at: usize) -> f32 {
    f16_to_f32(u16::from_le_bytes([block[at], block[at + 1]]))
}
