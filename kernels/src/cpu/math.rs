//! Elementary functions and sums that the compiler turns into vector code inside of `by_isa!` bodies.
//!
//! No branch, no table, no fused multiply-add: every instruction set gives the same bits.
#![expect(clippy::inline_always, reason = "inlining carries the target features of the caller into the body")]

/// Independent partial sums of a reduction: enough to hide the latency of an add on every processor.
const LANES: usize = 32;

/// 1.5 * 2^23 + 126: adding it rounds a small float to an integer; the low 8 bits of the sum are then the
/// exponent field of 2^(n - 1).
const ROUND: f32 = 12_582_912.0 + 126.0;
/// ln 2 in two parts; the first has 9 trailing zero bits, so that its product with an exponent is exact.
const LN_2_HIGH: f32 = 0.693_359_375;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Here the exponent field becomes 0, which stands for the factor 0, and 255, which stands for infinity.
const EXP_LOWEST: f32 = -87.6;
const EXP_HIGHEST: f32 = 89.4;

/// e^x within 2 units in the last place. Results below 2^-125.5 = 1.7e-38 are 0: subnormal numbers would
/// only make the sums slow. exp(-inf) = 0, exp(inf) = inf, NaN stays.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // Written as comparisons so that NaN falls through.
    let x = if x < EXP_LOWEST { EXP_LOWEST } else { x };
    let x = if x > EXP_HIGHEST { EXP_HIGHEST } else { x };
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (x - n * LN_2_HIGH) - n * LN_2_LOW;
    // Minimax polynomial of 2 (e^r - 1 - r) / r^2 on +-ln(2) / 2, relative error of e^r below 2^-28.
    let p = 2.762_907_9e-3;
    let p = p * r + 1.673_749_1e-2;
    let p = p * r + 8.333_678e-2;
    let p = p * r + 3.333_304_2e-1;
    let p = p * r + 9.999_998_8e-1;
    let p = p * (r * r) + (r + r) + 2.0;
    // p is 2 e^r and the factor 2^(n - 1), because 2^128 has no exponent field.
    p * f32::from_bits(rounded.to_bits() << 23)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Adds up partial sums in a fixed order.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// sum a_i b_i, in an order that depends on the length only.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += a * b;
    }
    total(lanes)
}

/// sum a_i b_i c_i, in an order that depends on the length only.
#[inline(always)]
pub fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let (c, c_rest) = c.as_chunks::<LANES>();
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i] * c[i];
        }
    }
    for (lane, ((a, b), c)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest).zip(c_rest)) {
        *lane += a * b * c;
    }
    total(lanes)
}

/// The largest element, -inf of none. NaN elements are passed over.
#[inline(always)]
pub fn max(x: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (x, rest) = x.as_chunks::<LANES>();
    for x in x {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], x[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, x);
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}

/// x_i := e^(x_i - shift); returns the sum, in an order that depends on the length only.
#[inline(always)]
pub fn exp_and_sum(x: &mut [f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (x, rest) = x.as_chunks_mut::<LANES>();
    for x in x {
        for i in 0..LANES {
            x[i] = exp(x[i] - shift);
            lanes[i] += x[i];
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *x = exp(*x - shift);
        *lane += *x;
    }
    total(lanes)
}

/// sum e^(x_i - shift), the same bits as [`exp_and_sum`].
#[inline(always)]
pub fn sum_of_exp(x: &[f32], shift: f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let (x, rest) = x.as_chunks::<LANES>();
    for x in x {
        for i in 0..LANES {
            lanes[i] += exp(x[i] - shift);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += exp(*x - shift);
    }
    total(lanes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::by_isa;

    by_isa! {
        fn exp_all(x: &mut [f32]) {
            for x in x.iter_mut() {
                *x = exp(*x);
            }
        }
    }

    /// Distance in units in the last place of the correctly rounded result.
    fn ulps(found: f32, expected: f64) -> f64 {
        let rounded = expected as f32;
        let ulp = f32::from_bits(rounded.to_bits() + 1) as f64 - rounded as f64;
        (found as f64 - expected).abs() / ulp
    }

    #[test]
    fn exp_is_within_two_ulps_over_its_whole_range() {
        let inputs: Vec<f32> = (0..2_000_000).map(|i| -86.98 + i as f32 * (175.7 / 2e6)).collect();
        let mut found = inputs.clone();
        exp_all(&mut found);
        let worst = inputs
            .iter()
            .zip(&found)
            .map(|(&x, &y)| (ulps(y, (x as f64).exp()), x))
            .fold((0.0, 0.0), |a, b| if b.0 > a.0 { b } else { a });
        assert!(worst.0 <= 2.0, "{} ulps at {}", worst.0, worst.1);
    }

    #[test]
    fn exp_of_the_special_values_is_exact() {
        let mut x = [0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY, -1e30, 1e30, 88.8, -87.1, f32::NAN];
        exp_all(&mut x);
        assert_eq!(x[..8], [1.0, 1.0, 0.0, f32::INFINITY, 0.0, f32::INFINITY, f32::INFINITY, 0.0]);
        assert!(x[8].is_nan());
    }

    #[test]
    fn sigmoid_saturates_without_nan() {
        assert_eq!(sigmoid(0.0), 0.5);
        assert_eq!(sigmoid(1e30), 1.0);
        assert_eq!(sigmoid(-1e30), 0.0);
        assert_eq!(sigmoid(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn sums_agree_with_a_plain_loop_at_every_length() {
        for n in [0, 1, 7, 31, 32, 33, 127, 129] {
            let a: Vec<f32> = (0..n).map(|i| (i % 5) as f32 - 2.0).collect();
            let b: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
            // Small integers: every order of summation is exact.
            assert_eq!(dot(&a, &b), a.iter().zip(&b).map(|(a, b)| a * b).sum::<f32>());
            assert_eq!(dot3(&a, &b, &b), a.iter().zip(&b).map(|(a, b)| a * b * b).sum::<f32>());
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            let mut e = a.clone();
            let sum = exp_and_sum(&mut e, 2.0);
            assert_eq!(sum, sum_of_exp(&a, 2.0));
            let expected: f64 = a.iter().map(|&a| (a as f64 - 2.0).exp()).sum();
            assert!((sum as f64 - expected).abs() <= 1e-5 * expected);
        }
    }
}
