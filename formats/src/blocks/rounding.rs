//! Float -> integer the way the reference's machine does it, without the slow path of `as`.
//!
//! The reference relies on C casts whose result C leaves open for infinities and NaN; x86-64 gives
//! the smallest integer. They occur for finite weights: a subnormal scale has an infinite inverse.

/// A C cast to an 8-bit integer of `x` in 0..2^22: towards zero; 0 if infinite.
#[inline(always)]
pub(super) fn truncate_small(x: f32) -> u8 {
    const MAGIC: f32 = 8_388_608.0;
    let shifted = x + MAGIC;
    let rounded_up = shifted - MAGIC > x;
    (shifted.to_bits() as u8).wrapping_sub(u8::from(rounded_up))
}

/// C's `roundf`, then a cast to an 8-bit integer, for |x| < 2^22: to nearest, halves away from zero.
#[inline(always)]
pub(super) fn round_half_away(x: f32) -> i8 {
    const MAGIC: f32 = 8_388_608.0;
    let magnitude = x.abs();
    // To nearest, halves to even; a half that went down is half a unit away.
    let shifted = magnitude + MAGIC;
    let went_down = magnitude - (shifted - MAGIC) == 0.5;
    let rounded = (shifted.to_bits() as u8).wrapping_add(u8::from(went_down)) as i8;
    let sign = -i8::from(x < 0.0);
    (rounded ^ sign).wrapping_sub(sign)
}

/// To nearest, halves to even, for |x| < 2^22; else whatever the low mantissa bits of `x + 1.5 * 2^23`
/// say, which is what the K-quants of the reference compute.
#[inline(always)]
pub(super) fn nearest_int(x: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    ((x + MAGIC).to_bits() & 0x007f_ffff) as i32 - 0x0040_0000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_numbers_are_truncated_like_any() {
        for i in 0..=63 * 1024 {
            let x = i as f32 / 1024.0;
            for x in [x.next_down().max(0.0), x, x.next_up()] {
                assert_eq!(truncate_small(x), x as u8, "{x}");
            }
        }
        assert_eq!(truncate_small(f32::INFINITY), 0);
        assert_eq!(truncate_small(f32::NEG_INFINITY), 0);
        assert_eq!(truncate_small(0.0 * f32::INFINITY), 0);
    }

    #[test]
    fn rounding_agrees_with_the_standard_library() {
        for i in -2000..2000 {
            for x in [i as f32 * 0.125, (i as f32 + 0.5).next_up(), (i as f32 + 0.5).next_down()] {
                assert_eq!(round_half_away(x), x.round() as i32 as i8, "{x}");
                assert_eq!(nearest_int(x), x.round_ties_even() as i32, "{x}");
            }
        }
        assert_eq!(round_half_away(0.49999997), 0);
        assert_eq!(round_half_away(-0.49999997), 0);
    }

    #[test]
    fn nearest_int_of_anything_returns() {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30] {
            let _ = nearest_int(x);
        }
    }
}
