//! IQ4_NL: 32 elements in 18 bytes, `x = d * VALUES[q]`, q in 0..16.
//!
//! | bytes | field | content |
//! |---|---|---|
//! | 0..2 | `d` | scale, f16 |
//! | 2..18 | `qs` | q of element j in the low nibble of byte j, of element j + 16 in the high nibble |

use std::array;

use super::half::{f32_to_f16, read_f16};
use super::iq_search::{sum_squares, weigh};
use super::{Block, Importance, Quantize, field};
use crate::dtype::GgmlType;

/// The values that the 4 bits of IQ4_NL and IQ4_XS stand for, denser around zero.
pub(super) const VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// `out = scale * VALUES[q]` for the 32 elements whose q are in 16 bytes.
#[inline(always)]
pub(super) fn write_values(out: &mut [f32; 32], scale: f32, qs: &[u8; 16]) {
    for j in 0..16 {
        out[j] = scale * VALUES[usize::from(qs[j] & 15)];
    }
    for j in 0..16 {
        out[16 + j] = scale * VALUES[usize::from(qs[j] >> 4)];
    }
}

#[allow(non_camel_case_types, reason = "ggml's name")]
pub(super) struct IQ4_NL;

impl Block<18, 32> for IQ4_NL {
    const DTYPE: GgmlType = GgmlType::IQ4_NL;

    #[inline(always)]
    fn dequantize(block: &[u8; 18], out: &mut [f32; 32]) {
        write_values(out, read_f16(block, 0), field(block, 2));
    }
}

impl Quantize<18, 32> for IQ4_NL {
    fn quantize(x: &[f32; 32], importance: Option<Importance<'_, 32>>, block: &mut [u8; 18]) {
        let weights = match importance {
            Some(importance) => weigh(x, importance.weights, sum_squares(x) * (2.0 / 32.0)),
            None => x.map(|x| x * x),
        };
        let d = fit_values(x, &weights);
        block[0..2].copy_from_slice(&f32_to_f16(d).to_le_bytes());
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        block[2..18].copy_from_slice(&nearest_values(x, inverse));
    }
}

/// Below this a sub-block counts as all zero.
const ZERO_GROUP: f32 = 1e-15;

/// Where a number belongs, by the low bits of `floor(2 x)`: all boundaries are whole or halves.
const SLOTS: usize = 512;

/// The number of the value next to each slot, the upper one where it is halfway.
static NEAREST: [u8; SLOTS] = {
    let mut nearest = [0; SLOTS];
    let mut twice = -(SLOTS as i32) / 2;
    while twice < SLOTS as i32 / 2 {
        let mut q = 0;
        while q < 15 && twice as f32 >= VALUES[q as usize] + VALUES[q as usize + 1] {
            q += 1;
        }
        nearest[twice.rem_euclid(SLOTS as i32) as usize] = q;
        twice += 1;
    }
    nearest
};

/// The slot of a number; NaN has that of the largest, as in the reference.
#[inline(always)]
fn slot(x: f32) -> u32 {
    const MAGIC: f32 = 12_582_912.0;
    let x = if x < VALUES[15] { x } else { VALUES[15] };
    let x = if x > VALUES[0] { x } else { VALUES[0] };
    let twice = x + x;
    let shifted = twice + MAGIC;
    let rounded_up = shifted - MAGIC > twice;
    shifted.to_bits().wrapping_sub(u32::from(rounded_up)) % SLOTS as u32
}

/// The q of 32 elements in 16 bytes, `VALUES[q]` being next to `x * inverse`.
#[inline(always)]
pub(super) fn nearest_values(x: &[f32; 32], inverse: f32) -> [u8; 16] {
    let slots = x.map(|x| slot(inverse * x));
    let q = |i: usize| NEAREST[slots[i] as usize % SLOTS];
    array::from_fn(|j| q(j) | q(j + 16) << 4)
}

/// The scale d of `x = d * VALUES[q]` for one sub-block; 0 if it is zero.
///
/// Tries the scales that take the extreme element to -127, and to numbers around it; for the q of each,
/// d is the weighted least squares solution (llama.cpp, quantize_row_iq4_nl_impl).
#[inline(always)]
pub(super) fn fit_values(x: &[f32; 32], weights: &[f32; 32]) -> f32 {
    let (mut largest, mut extreme) = (0.0, 0.0);
    for &x in x {
        if x.abs() > largest {
            (largest, extreme) = (x.abs(), x);
        }
    }
    if largest < ZERO_GROUP {
        return 0.0;
    }
    // All 16 candidates side by side; each sum goes over the elements in order.
    let inverses: [f32; 16] = array::from_fn(|c| match c {
        0 => 1.0 / (-extreme / VALUES[0]),
        _ => (c as f32 - 8.0 + VALUES[0]) / extreme,
    });
    let (mut sum_qx, mut sum_qq) = ([0.0; 16], [0.0; 16]);
    for (&x, &w) in x.iter().zip(weights) {
        let slots = inverses.map(|inverse| slot(inverse * x));
        let values = slots.map(|slot| VALUES[usize::from(NEAREST[slot as usize % SLOTS]) % 16]);
        for c in 0..16 {
            let wq = w * values[c];
            sum_qx[c] += wq * x;
            sum_qq[c] += wq * values[c];
        }
    }
    let mut d = if sum_qq[0] > 0.0 { sum_qx[0] / sum_qq[0] } else { 0.0 };
    let mut best_score = d * sum_qx[0];
    for (qx, qq) in sum_qx.into_iter().zip(sum_qq).skip(1) {
        if qq > 0.0 && qx * qx > best_score * qq {
            d = qx / qq;
            best_score = d * qx;
        }
    }
    d
}
