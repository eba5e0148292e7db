//! The norm of all gradients and the factor that clips it. No backward: nothing is differentiated through it.

use std::cell::Cell;

use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::rows::row;
use crate::error::Result;
use crate::tensor::View;

const OP: &str = "global_norm";

/// Elements whose squares one task adds up: a part of the definition, so that the result is the same with any
/// number of threads.
const BLOCK: usize = 16_384;

thread_local! {
    static PARTIAL: Cell<Vec<f64>> = const { Cell::new(Vec::new()) };
}

/// The Euclidean norm of all elements.
///
/// norm = sqrt(sum x^2).
///
/// Shapes: `x` any; usually the flat buffer of all gradients.
/// Precision: f64 throughout, in fixed blocks. It is a host number because the CPU has it at once; a CUDA kernel
/// will leave it in a device scalar that the optimizer reads, so that no step waits for the device.
///
/// # Errors
/// No kernel for the device.
///
/// Source: the definition; one norm over all parameters as `torch.nn.utils.clip_grad_norm_`.
pub fn global_norm(x: View) -> Result<f64> {
    norm_fast(x)
}

/// What the gradients are multiplied by so that their norm is at most `max_norm`.
///
/// min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`.
pub fn clip_factor(norm: f64, max_norm: f32) -> f32 {
    (max_norm as f64 / (norm + 1e-6)).min(1.0) as f32
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn norm_naive(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn norm_fast(x: View) -> Result<f64> {
    let (rows, cols, stride) = (x.rows, x.cols, x.stride);
    let x = x.cpu(OP)?;
    let mut partial = PARTIAL.take();
    let mut total = 0.0;
    for i in 0..rows {
        row(x, i, cols, stride).par_chunks(BLOCK).map(sum_of_squares).collect_into_vec(&mut partial);
        total += partial.iter().sum::<f64>();
    }
    PARTIAL.set(partial);
    Ok(total.sqrt())
}

by_isa! {
    fn sum_of_squares(x: &[f32]) -> f64 {
        let mut lanes = [0.0_f64; 16];
        let (x, rest) = x.as_chunks::<16>();
        for x in x {
            for i in 0..16 {
                lanes[i] += x[i] as f64 * x[i] as f64;
            }
        }
        for (lane, &x) in lanes.iter_mut().zip(rest) {
            *lane += x as f64 * x as f64;
        }
        lanes.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Mat, assert_close, same_on_one_and_four_threads, seconds, tolerance};

    #[test]
    fn the_fast_version_equals_the_naive_one() {
        for (rows, cols) in [(1, 1), (1, 127), (7, 129), (129, 7), (1, 100_003), (0, 8), (3, 0)] {
            for std in [1.0, 1e18, 1e-20] {
                let x = Mat::random(1, rows, cols, std);
                let expected = norm_naive(&x.f64());
                for gap in [0, 3] {
                    let x = x.padded(gap);
                    let what = format!("global_norm {rows} x {cols} of {std}");
                    // Compared as bits: the two halves of the f64.
                    let halves = same_on_one_and_four_threads(&what, || {
                        let bits = global_norm(x.view()).unwrap().to_bits();
                        [bits as u32, (bits >> 32) as u32].map(f32::from_bits).to_vec()
                    });
                    let bits = (halves[1].to_bits() as u64) << 32 | halves[0].to_bits() as u64;
                    assert_close(&what, &[f64::from_bits(bits)], &[expected], tolerance(1e-12, 0.0));
                }
            }
        }
    }

    #[test]
    fn clipping_only_shrinks() {
        assert_eq!(clip_factor(0.5, 1.0), 1.0);
        assert_eq!(clip_factor(0.0, 1.0), 1.0);
        assert_eq!(clip_factor(4.0, 1.0), (1.0 / 4.000_001) as f32);
    }

    #[test]
    #[ignore = "prints a timing"]
    fn timing() {
        let x = Mat::random(1, 1, 5_000_000, 1.0);
        let time = seconds(|| assert!(global_norm(x.view()).unwrap() > 0.0));
        println!("global_norm: {:.1} GB/s", 20e6 / time / 1e9);
    }
}
