//! What TQ1_0 and TQ2_0 share: 256 elements that are -d, 0 or d, with d the largest magnitude.

use super::half::f32_to_f16;
use super::k_quants::SUPERBLOCK;
use super::nibbles::{finite_inverse, largest};

/// The f16 bits of d, and 0, 1 or 2 for an element near -d, 0 or d.
#[inline(always)]
pub(super) fn ternarize(x: &[f32; SUPERBLOCK]) -> (u16, [u8; SUPERBLOCK]) {
    let d = largest(x);
    // The reference casts infinite and NaN quotients to a long whose low half is 0, which means 0.
    let id = finite_inverse(d);
    let q = x.map(|x| {
        let x = x * id;
        1 + u8::from(x >= 0.5) - u8::from(x <= -0.5)
    });
    (f32_to_f16(d), q)
}
