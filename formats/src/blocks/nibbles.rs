//! The 32-element layout that Q4_0, Q4_1, Q5_0 and Q5_1 share: 16 bytes of nibbles, 32 high bits.
//!
//! Byte `j` holds element `j` in its low nibble and element `j + 16` in its high nibble. The 5-bit
//! types keep bit 4 of element `i` in bit `i` of a little-endian u32.

/// The 4-bit numbers of a block.
#[inline(always)]
pub(super) fn unpack4(qs: &[u8; 16]) -> [u8; 32] {
    let mut q = [0; 32];
    for j in 0..16 {
        q[j] = qs[j] & 0x0f;
    }
    for j in 0..16 {
        q[j + 16] = qs[j] >> 4;
    }
    q
}

/// The 5-bit numbers of a block.
#[inline(always)]
pub(super) fn unpack5(qh: [u8; 4], qs: &[u8; 16]) -> [u8; 32] {
    let high = u32::from_le_bytes(qh);
    let mut q = unpack4(qs);
    for j in 0..32 {
        q[j] |= (((high >> j) & 1) << 4) as u8;
    }
    q
}

/// Inverse of [`unpack4`].
#[inline(always)]
pub(super) fn pack4(q: &[u8; 32]) -> [u8; 16] {
    let mut qs = [0; 16];
    for j in 0..16 {
        qs[j] = (q[j] & 0x0f) | (q[j + 16] << 4);
    }
    qs
}

/// Inverse of [`unpack5`]: the high bits, then the nibbles.
#[inline(always)]
pub(super) fn pack5(q: &[u8; 32]) -> ([u8; 4], [u8; 16]) {
    let mut high = 0u32;
    for j in 0..32 {
        high |= u32::from((q[j] >> 4) & 1) << j;
    }
    (high.to_le_bytes(), pack4(q))
}

/// The largest magnitude.
#[inline(always)]
pub(super) fn largest<const N: usize>(x: &[f32; N]) -> f32 {
    let mut lanes = [0.0; 8];
    for x in x.as_chunks::<8>().0 {
        for l in 0..8 {
            lanes[l] = if lanes[l] < x[l].abs() { x[l].abs() } else { lanes[l] };
        }
    }
    fold(lanes, |a, b| if a < b { b } else { a })
}

/// The element of largest magnitude, with its sign; the first of several, 0 if none compares.
#[inline(always)]
pub(super) fn extreme(x: &[f32; 32]) -> f32 {
    let (min, max) = bounds(x);
    if -min < max {
        max.max(0.0)
    } else if max < -min {
        min.min(0.0)
    } else if max == 0.0 {
        0.0
    } else {
        first(x, |x| x.abs() == max)
    }
}

/// Smallest and largest element; the first of several, which matters for the sign of a zero.
#[inline(always)]
pub(super) fn min_max(x: &[f32; 32]) -> (f32, f32) {
    let (min, max) = bounds(x);
    let with_sign = |v: f32| if v == 0.0 { first(x, |x| x == 0.0) } else { v };
    (with_sign(min), with_sign(max))
}

/// Smallest and largest element; zeros of either sign are the same.
#[inline(always)]
fn bounds(x: &[f32; 32]) -> (f32, f32) {
    let (mut mins, mut maxs) = ([f32::MAX; 8], [-f32::MAX; 8]);
    for x in x.as_chunks::<8>().0 {
        for l in 0..8 {
            mins[l] = if x[l] < mins[l] { x[l] } else { mins[l] };
            maxs[l] = if x[l] > maxs[l] { x[l] } else { maxs[l] };
        }
    }
    let min = fold(mins, |a, b| if b < a { b } else { a });
    let max = fold(maxs, |a, b| if b > a { b } else { a });
    (min, max)
}

/// Eight lanes to one by halves: three steps in place of seven that wait for each other.
#[inline(always)]
fn fold(lanes: [f32; 8], pick: impl Fn(f32, f32) -> f32) -> f32 {
    let four: [f32; 4] = std::array::from_fn(|l| pick(lanes[l], lanes[l + 4]));
    let two = [pick(four[0], four[2]), pick(four[1], four[3])];
    pick(two[0], two[1])
}

/// The first element with a property, or 0.
#[inline(always)]
fn first(x: &[f32; 32], property: impl Fn(f32) -> bool) -> f32 {
    x.iter().copied().find(|x| property(*x)).unwrap_or(0.0)
}

/// `1 / d`, or 0 for a block without spread.
#[inline(always)]
pub(super) fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// As [`inverse`], but 0 also where the inverse is infinite: for codes that an infinity leaves at 0.
#[inline(always)]
pub(super) fn finite_inverse(d: f32) -> f32 {
    let inverse = inverse(d);
    if inverse.is_infinite() { 0.0 } else { inverse }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_the_inverse_of_unpacking() {
        let q: [u8; 32] = std::array::from_fn(|i| (i * 7 % 32) as u8);
        let (qh, qs) = pack5(&q);
        assert_eq!(unpack5(qh, &qs), q);
        assert_eq!(unpack4(&pack4(&q)), q.map(|q| q & 0x0f));
    }

    #[test]
    fn the_first_of_equal_elements_decides_the_sign() {
        let mut x = [0.5; 32];
        (x[20], x[9]) = (2.0, -2.0);
        assert_eq!(extreme(&x), -2.0);
        (x[3], x[7]) = (-0.0, 0.0);
        (x[20], x[9]) = (1.0, 1.0);
        assert_eq!(min_max(&x).0.to_bits(), (-0.0f32).to_bits());
        // Of zeros alone the extreme is +0: no element exceeds the zero that the search starts from.
        assert_eq!(extreme(&[-0.0; 32]).to_bits(), 0);
    }
}
