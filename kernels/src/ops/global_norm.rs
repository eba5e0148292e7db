//! The norm of all gradients and the factor that clips it. No backward: nothing is differentiated through it.

use std::cell::Cell;

use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::rows::row;
use crate::cuda::{Arg, Cuda, Grid, Scratch, Source, spans};
use crate::error::{Result, check};
use crate::tensor::{Tensor, View, ViewMut};

const OP: &str = "global_norm";
const CLIP: &str = "global_norm_clip";

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
/// Precision: f64 throughout, in fixed blocks. On CUDA the result is rounded to f32, and this waits for the device; a
/// step that must not wait uses [`global_norm_clip`].
///
/// # Errors
/// No kernel for the device.
///
/// Source: the definition; one norm over all parameters as `torch.nn.utils.clip_grad_norm_`.
pub fn global_norm(x: View) -> Result<f64> {
    if let Some(cuda) = x.cuda() {
        let mut clip = Tensor::zeros(&crate::Device::Cuda(cuda.clone()), 1, 3)?;
        clip_cuda(cuda, &clip.view_mut(), x, f32::INFINITY)?;
        return Ok(f64::from(clip.read()?[0]));
    }
    norm_fast(x)
}

/// The norm, and what follows from it, where the optimizer reads it: nothing waits for a device.
///
/// clip = (norm, min(1, max_norm / (norm + 1e-6)), 1 if the norm is not finite, else 0).
///
/// Shapes: `clip` (1, 3); `x` any. An infinite `max_norm` clips nothing.
/// Accumulates: nothing, `clip` is overwritten.
/// Precision: as [`global_norm`], each number rounded to f32 once.
///
/// # Errors
/// Another shape of `clip`, or no kernel for the device.
///
/// Source: `torch.nn.utils.clip_grad_norm_`.
pub fn global_norm_clip(clip: ViewMut, x: View, max_norm: f32) -> Result<()> {
    check(CLIP, "rows of clip", 1, clip.rows)?;
    check(CLIP, "columns of clip", 3, clip.cols)?;
    if let Some(cuda) = x.cuda() {
        return clip_cuda(cuda, &clip, x, max_norm);
    }
    let norm = norm_fast(x)?;
    let unusable = if norm.is_finite() { 0.0 } else { 1.0 };
    clip.cpu(CLIP)?.copy_from_slice(&[norm as f32, clip_factor(norm, max_norm), unusable]);
    Ok(())
}

/// What the gradients are multiplied by so that their norm is at most `max_norm`.
///
/// min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`.
pub fn clip_factor(norm: f64, max_norm: f32) -> f32 {
    (max_norm as f64 / (norm + 1e-6)).min(1.0) as f32
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("global_norm.cu", include_str!("global_norm.cu"));

/// Blocks of the first stage; the kernels have the same number.
const CUDA_BLOCKS: usize = 512;

fn clip_cuda(cuda: &Cuda, clip: &ViewMut, x: View, max_norm: f32) -> Result<()> {
    let (rows, cols, [stride]) = spans::flat(x.rows, x.cols, [x.stride]);
    // A kernel does not divide by zero columns: nothing to add up.
    let (rows, cols) = if cols == 0 { (0, 1) } else { (rows, cols) };
    spans::grid(CLIP, rows, cols, 1)?;
    let partial = cuda.scratch(Scratch::Partials, CUDA_BLOCKS * size_of::<f64>())?;
    let args =
        [Arg::Ptr(partial), Arg::Ptr(x.f32(CLIP)?), Arg::size(stride), Arg::size(rows), Arg::size(cols)];
    cuda.launch(&SOURCE, "global_norm_partial", Grid::of(CUDA_BLOCKS, spans::THREADS), &args)?;
    let args = [Arg::Ptr(clip.f32(CLIP)?), Arg::Ptr(partial), Arg::F32(max_norm)];
    cuda.launch(&SOURCE, "global_norm_finish", Grid::of(1, spans::THREADS), &args)
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
    use crate::tensor::Dtype::F32;
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, assert_close, same_on_one_and_four_threads, seconds, tolerance};

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

    #[test]
    fn the_clip_is_the_norm_its_factor_and_whether_it_is_finite() {
        let clip = |values: Vec<f32>, max_norm| {
            let (x, mut clip) = (Mat::new(1, values.len(), values), Mat::poisoned(1, 3));
            global_norm_clip(clip.view_mut(), x.view(), max_norm).unwrap();
            clip.values()
        };
        assert_eq!(clip(vec![3.0, 4.0], 1.0), [5.0, clip_factor(5.0, 1.0), 0.0]);
        assert_eq!(clip(vec![3.0, 4.0], f32::INFINITY), [5.0, 1.0, 0.0]);
        assert_eq!(clip(vec![3.0, f32::NAN], 1.0)[2], 1.0);
    }

    #[test]
    fn the_cuda_twin_equals_the_naive_version() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES.into_iter().chain([(1, 1_000_003), (1, 1_000_000)]) {
            for std in [1.0, 1e18, 1e-18] {
                let x = Mat::random(1, rows, cols, std);
                let norm = norm_naive(&x.f64());
                let clip = [norm, clip_factor(norm, 0.25) as f64, 0.0];
                check_cuda(
                    &device,
                    &format!("global_norm_clip {rows} x {cols} of {std}"),
                    [(Out::Set(1, 3), F32, &clip)],
                    [(&x, F32)],
                    tolerance(1e-7, 0.0),
                    |[clip], [x]| global_norm_clip(clip, x, 0.25),
                );
            }
            for bad in [f32::NAN, f32::INFINITY] {
                let mut values = Mat::random(1, rows, cols, 1.0).values();
                let Some(last) = values.last_mut() else { continue };
                *last = bad;
                let mut x = Tensor::zeros(&device, rows, cols).unwrap();
                let mut clip = Tensor::zeros(&device, 1, 3).unwrap();
                x.write(&values).unwrap();
                global_norm_clip(clip.view_mut(), x.view(), 1.0).unwrap();
                assert_eq!(clip.read().unwrap()[2], 1.0);
            }
        }
    }
}
