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

/// The element of largest magnitude, with its sign; the first of several, 0 if none compares.
#[inline(always)]
pub(super) fn extreme(x: &[f32; 32]) -> f32 {
    let (mut largest, mut value) = (0.0, 0.0);
    for &v in x {
        if largest < v.abs() {
            largest = v.abs();
            value = v;
        }
    }
    value
}

/// Smallest and largest element.
#[inline(always)]
pub(super) fn min_max(x: &[f32; 32]) -> (f32, f32) {
    let (mut min, mut max) = (f32::MAX, -f32::MAX);
    for &v in x {
        min = if v < min { v } else { min };
        max = if v > max { v } else { max };
    }
    (min, max)
}

/// `1 / d`, or 0 for a block without spread.
#[inline(always)]
pub(super) fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}
