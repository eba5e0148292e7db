//! What the K-quants share: superblocks of 256 elements whose sub-block scales are quantized again.

/// Elements of a superblock.
pub(super) const SUPERBLOCK: usize = 256;

/// The 6-bit scales and mins of the 8 sub-blocks of Q4_K and Q5_K, from their 12 bytes.
///
/// Sub-blocks 0..4 have their scale in the low 6 bits of bytes 0..4 and their min in those of bytes
/// 4..8. Sub-block 4 + i has its low nibbles in byte 8 + i (scale low, min high) and the upper two
/// bits in the upper two bits of bytes i (scale) and 4 + i (min).
#[inline(always)]
pub(super) fn unpack_scales(scales: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut sc, mut m) = ([0; 8], [0; 8]);
    for i in 0..4 {
        sc[i] = scales[i] & 63;
        m[i] = scales[i + 4] & 63;
        sc[i + 4] = (scales[i + 8] & 0x0f) | ((scales[i] >> 6) << 4);
        m[i + 4] = (scales[i + 8] >> 4) | ((scales[i + 4] >> 6) << 4);
    }
    (sc, m)
}
