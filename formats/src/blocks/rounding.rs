//! Float -> integer the way the reference's machine does it, outside the range of the integer too.
//!
//! The reference relies on C casts whose result C leaves open for infinities and NaN; x86-64 gives
//! the smallest i32. They occur for finite weights: a subnormal scale has an infinite inverse.

/// A C cast to an 8-bit integer of `x` in 0..2^22, without the slow path of `as`; 0 if infinite.
#[inline(always)]
pub(super) fn truncate_small(x: f32) -> u8 {
    const MAGIC: f32 = 8_388_608.0;
    let shifted = x + MAGIC;
    let rounded_up = shifted - MAGIC > x;
    (shifted.to_bits() as u8).wrapping_sub(u8::from(rounded_up))
}

/// A C cast of `x` to int: towards zero; `i32::MIN` if out of range or NaN.
#[inline(always)]
pub(super) fn truncate(x: f32) -> i32 {
    if x.abs() < 2_147_483_648.0 { x as i32 } else { i32::MIN }
}

/// C's `roundf`, then a cast to int: to nearest, halves away from zero.
#[inline(always)]
pub(super) fn round_half_away(x: f32) -> i32 {
    let towards_zero = truncate(x);
    let rest = x - towards_zero as f32;
    let step = i32::from(rest >= 0.5) - i32::from(rest <= -0.5);
    // From 2^23 on every float is whole.
    if x.abs() < 8_388_608.0 { towards_zero + step } else { towards_zero }
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
    fn casts_follow_the_machine_outside_the_range() {
        assert_eq!(truncate(-3.99), -3);
        for x in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 2_147_483_648.0] {
            assert_eq!(truncate(x), i32::MIN);
            assert_eq!(round_half_away(x), i32::MIN);
        }
    }

    #[test]
    fn small_numbers_are_truncated_like_any() {
        for i in 0..=63 * 1024 {
            let x = i as f32 / 1024.0;
            for x in [x.next_down().max(0.0), x, x.next_up()] {
                assert_eq!(i32::from(truncate_small(x)), truncate(x), "{x}");
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
                assert_eq!(round_half_away(x), x.round() as i32, "{x}");
                assert_eq!(nearest_int(x), x.round_ties_even() as i32, "{x}");
            }
        }
        assert_eq!(round_half_away(0.49999997), 0);
        assert_eq!(round_half_away(8_388_609.0), 8_388_609);
    }

    #[test]
    fn nearest_int_of_anything_returns() {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30] {
            let _ = nearest_int(x);
        }
    }
}
