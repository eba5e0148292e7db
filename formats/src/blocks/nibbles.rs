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

/// The `N` bytes of a block from byte `at`.
#[inline(always)]
pub(super) fn field<const N: usize, const BYTES: usize>(block: &[u8; BYTES], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("the byte map of the block holds this field")
}
