//! TQ1_0: 256 elements in 54 bytes, `x = d * (q - 1)` with q in 0..3, five q to a byte.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..32 | `qs` | byte m: elements m, m + 32, ..., m + 128 |
//! | 32..48 | `qs` | byte m: elements 160 + m, 160 + m + 16, ..., 160 + m + 64 |
//! | 48..52 | `qh` | byte m: elements 240 + m, 240 + m + 4, ..., 240 + m + 12, and a zero |
//! | 52..54 | `d` | largest magnitude, f16 |
//!
//! A byte is the fraction `0.q0 q1 q2 q3 q4` to base 3 in units of 1/256, rounded up: multiplied by 3,
//! the next q is what overflows.

use super::half::read_f16;
use super::k_quants::SUPERBLOCK;
use super::ternary::ternarize;
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

const POWERS: [u8; 5] = [1, 3, 9, 27, 81];

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct TQ1_0;

impl Block<54, SUPERBLOCK> for TQ1_0 {
    const DTYPE: GgmlType = GgmlType::TQ1_0;

    #[inline(always)]
    fn dequantize(block: &[u8; 54], out: &mut [f32; SUPERBLOCK]) {
        let d = read_f16(block, 52);
        for n in 0..5 {
            let run = out[32 * n..].first_chunk_mut().expect("160 elements in 5 runs of 32");
            unpack::<32>(field(block, 0), POWERS[n], d, run);
        }
        for n in 0..5 {
            let run = out[160 + 16 * n..].first_chunk_mut().expect("80 elements in 5 runs of 16");
            unpack::<16>(field(block, 32), POWERS[n], d, run);
        }
        for n in 0..4 {
            let run = out[240 + 4 * n..].first_chunk_mut().expect("16 elements in 4 runs of 4");
            unpack::<4>(field(block, 48), POWERS[n], d, run);
        }
    }
}

/// The elements of `bytes` whose q is the digit that `power` brings to the front.
#[inline(always)]
fn unpack<const N: usize>(bytes: &[u8; N], power: u8, d: f32, out: &mut [f32; N]) {
    for m in 0..N {
        let q = (u16::from(bytes[m].wrapping_mul(power)) * 3) >> 8;
        out[m] = (i32::from(q) - 1) as f32 * d;
    }
}

impl Quantize<54, SUPERBLOCK> for TQ1_0 {
    #[inline(always)]
    fn quantize(x: &[f32; SUPERBLOCK], _: Option<Importance<'_, SUPERBLOCK>>, block: &mut [u8; 54]) {
        let (d, q) = ternarize(x);
        for m in 0..32 {
            block[m] = pack([q[m], q[m + 32], q[m + 64], q[m + 96], q[m + 128]]);
        }
        for m in 0..16 {
            let at = 160 + m;
            block[32 + m] = pack([q[at], q[at + 16], q[at + 32], q[at + 48], q[at + 64]]);
        }
        for m in 0..4 {
            let at = 240 + m;
            block[48 + m] = pack([q[at], q[at + 4], q[at + 8], q[at + 12], 0]);
        }
        block[52..54].copy_from_slice(&d.to_le_bytes());
    }
}

/// Five digits to base 3 as a fraction of 256, rounded up.
#[inline(always)]
fn pack(q: [u8; 5]) -> u8 {
    let number = q.into_iter().fold(0u8, |number, q| 3 * number + q);
    (u16::from(number) * 256).div_ceil(243) as u8
}
