//! A learned factor per output column: the magnitude of DoRA, the vectors of IA3.
//!
//! The forward pass has no op here: the factor is folded into the rows of the weight ([`quant_linear`](super::quant_linear)),
//! or multiplied in by what reads the output next ([`rope`](super::rope), [`swiglu`](super::swiglu)).
//! The backward pass works on the output that the linear wrote.

use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::rows::row;
use crate::cpu::scratch::with_scratch;
use crate::cuda::spans::{self, Chunks};
use crate::cuda::{Arg, Cuda, Grid, Scratch, Source};
use crate::error::{Error, Result, check};
use crate::tensor::{View, ViewMut};

const BACKWARD: &str = "row_scale_backward";

/// The output y of a linear with factors, as the backward pass finds it.
#[derive(Debug, Clone, Copy)]
pub enum Output<'a> {
    /// y itself, (T, N).
    Kept(View<'a>),
    /// y = sum - to, both (T, N): the residual stream before and after y was added. Nobody has to keep y then, and it is
    /// the y that the rest of the model has seen, rounded as the sum is.
    Added {
        /// What y was added to.
        to: View<'a>,
        /// What came out.
        sum: View<'a>,
    },
}

impl<'a> Output<'a> {
    /// The matrix that y is read from, and the one to subtract from it.
    fn parts(self) -> (View<'a>, Option<View<'a>>) {
        match self {
            Output::Kept(y) => (y, None),
            Output::Added { to, sum } => (sum, Some(to)),
        }
    }
}

/// The gradient of y = x diag(scale) by the factors, from the output y instead of the input x.
///
/// dscale_n += sum_t dy_tn * y_tn / scale_n. The input's gradient, dx = scale * dy, is the linear's.
///
/// The linear stores y and not x, so x_tn = y_tn / scale_n is recovered. A factor of exactly 0 has
/// erased x and leaves y = 0: its sum is 0 / 0, and such a channel adds nothing. The factor then stays
/// where it is until weight decay or another run moves it; a caller that must move it from 0 gives the
/// unscaled x as `y` and ones as `scale`, which is the exact gradient for any factor.
///
/// Shapes: `dscale`, `scale` (1, N); `dy`, `y` (T, N), y without bias, itself or as the difference of two streams.
/// Accumulates: `dscale` is added to.
/// Precision: products summed over 8 tokens in f32, over all in f64, one rounding; within 1e-6 of f64, relative
/// to sum |dy y / scale|; of an added y relative to sum |dy| (|sum| + |to|) / scale, for the rounding of the sum.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: derived from the formula above; DoRA, arXiv 2402.09353, section 4.3 (the norm is a constant).
pub fn row_scale_backward(dscale: ViewMut, dy: View, y: Output, scale: View) -> Result<()> {
    let (y, to) = y.parts();
    check(BACKWARD, "rows of dy", y.rows, dy.rows)?;
    check(BACKWARD, "columns of dy", y.cols, dy.cols)?;
    check(BACKWARD, "rows of scale", 1, scale.rows)?;
    check(BACKWARD, "columns of scale", y.cols, scale.cols)?;
    check(BACKWARD, "rows of dscale", 1, dscale.rows)?;
    check(BACKWARD, "columns of dscale", y.cols, dscale.cols)?;
    if let Some(to) = to {
        check(BACKWARD, "rows of what y was added to", y.rows, to.rows)?;
        check(BACKWARD, "columns of what y was added to", y.cols, to.cols)?;
    }
    if let Some(cuda) = dy.cuda() {
        return backward_cuda(cuda, &dscale, dy, y, to, scale);
    }
    backward_fast(dscale, dy, y, to, scale)
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("row_scale.cu", include_str!("row_scale.cu"));

fn backward_cuda(
    cuda: &Cuda,
    dscale: &ViewMut,
    dy: View,
    y: View,
    to: Option<View>,
    scale: View,
) -> Result<()> {
    // An added output is summed as the norm's backward pass does it on the way, so that it does not matter which does.
    let mut by_rows = to.is_some() && y.cols.is_multiple_of(8);
    for view in [Some(dy), Some(y), to].into_iter().flatten() {
        by_rows &= view.bf16(BACKWARD)?.is_multiple_of(16) && view.stride.is_multiple_of(8);
    }
    let (kernel, chunks) = if by_rows {
        ("row_scale_backward_rows", Chunks::of_rows(y.rows, y.cols))
    } else {
        ("row_scale_backward_partial", Chunks::of(y.rows, y.cols))
    };
    let partial = cuda.scratch(Scratch::Partials, chunks.count * y.cols * size_of::<f32>())?;
    let args = [
        Arg::Ptr(partial),
        Arg::Ptr(dy.bf16(BACKWARD)?),
        Arg::size(dy.stride),
        Arg::Ptr(y.bf16(BACKWARD)?),
        Arg::size(y.stride),
        Arg::Ptr(to.map_or(Ok(0), |to| to.bf16(BACKWARD))?),
        Arg::size(to.map_or(0, |to| to.stride)),
        Arg::size(y.rows),
        Arg::size(y.cols),
        Arg::size(chunks.rows),
    ];
    cuda.launch(&SOURCE, kernel, chunks.grid(), &args)?;
    add_partials_cuda(BACKWARD, cuda, dscale, partial, chunks, scale)
}

/// dscale += (the sum of the chunks' sums) / scale: the second half of a backward pass whose first half left the sums
/// of products at `partial`.
pub(super) fn add_partials_cuda(
    op: &'static str,
    cuda: &Cuda,
    dscale: &ViewMut,
    partial: u64,
    chunks: Chunks,
    scale: View,
) -> Result<()> {
    let args = [
        Arg::Ptr(dscale.f32(op)?),
        Arg::Ptr(partial),
        Arg::Ptr(scale.f32(op)?),
        Arg::size(chunks.count),
        Arg::size(scale.cols),
    ];
    let grid = Grid::of(scale.cols.div_ceil(32), spans::THREADS);
    cuda.launch(&SOURCE, "row_scale_backward_finish", grid, &args)
}

// ------------------------------------------------------------------------------------------ CPU

/// Channels whose sums one task keeps on its stack.
const CHANNELS: usize = 192;

/// Tokens whose products are added in f32, by one task. The sums of groups are added in f64 and in order, so that the
/// threads change no bit.
pub(super) const GROUP: usize = 8;

#[cfg(test)]
fn forward_naive(y: &mut [f64], x: &[f64], scale: &[f64]) {
    for (i, y) in y.iter_mut().enumerate() {
        *y = scale[i % scale.len()] * x[i];
    }
}

#[cfg(test)]
pub(super) fn backward_naive(dscale: &mut [f64], dy: &[f64], y: &[f64], scale: &[f64]) {
    let channels = scale.len();
    for n in 0..channels {
        if scale[n] != 0.0 {
            // y[t][n] = scale[n] * x[t][n]
            let sum: f64 = dy.iter().zip(y).skip(n).step_by(channels).map(|(dy, y)| dy * y).sum();
            dscale[n] += sum / scale[n];
        }
    }
}

fn backward_fast(dscale: ViewMut, dy: View, y: View, to: Option<View>, scale: View) -> Result<()> {
    let (tokens, cols, dy_stride, y_stride) = (y.rows, y.cols, dy.stride, y.stride);
    let (dscale, dy, y, scale) =
        (dscale.cpu(BACKWARD)?, dy.cpu(BACKWARD)?, y.cpu(BACKWARD)?, scale.cpu(BACKWARD)?);
    let to = to.map(|to| Ok::<_, Error>((to.cpu(BACKWARD)?, to.stride))).transpose()?;
    if cols == 0 {
        return Ok(());
    }
    with_scratch(tokens.div_ceil(GROUP) * cols, |sums| {
        sums.par_chunks_mut(cols).enumerate().for_each(|(group, sums)| {
            sums.fill(0.0);
            for t in group * GROUP..tokens.min((group + 1) * GROUP) {
                let (dy, y) = (row(dy, t, cols, dy_stride), row(y, t, cols, y_stride));
                match to {
                    None => add_products(sums, dy, y),
                    Some((to, stride)) => add_products_of_difference(sums, dy, y, row(to, t, cols, stride)),
                }
            }
        });
        add_group_sums(&mut dscale[..cols], sums, cols, scale);
    });
    Ok(())
}

/// dscale += (the sum of the groups' sums) / scale, nothing where a scale is 0: the second half of a backward pass whose
/// first half left the sums of each group in a row of `sums`, `stride` apart.
pub(super) fn add_group_sums(dscale: &mut [f32], sums: &[f32], stride: usize, scale: &[f32]) {
    dscale.par_chunks_mut(CHANNELS).enumerate().for_each(|(i, dscale)| {
        let start = i * CHANNELS;
        let mut totals = [0.0f64; CHANNELS];
        for group in sums.chunks(stride) {
            let sums = &group[start..][..dscale.len()];
            totals.iter_mut().zip(sums).for_each(|(total, sum)| *total += *sum as f64);
        }
        for ((dscale, total), &scale) in dscale.iter_mut().zip(totals).zip(&scale[start..]) {
            if scale != 0.0 {
                *dscale += (total / scale as f64) as f32;
            }
        }
    });
}

by_isa! {
    fn add_products(sums: &mut [f32], dy: &[f32], y: &[f32]) {
        for ((sum, &dy), &y) in sums.iter_mut().zip(dy).zip(y) {
            *sum += dy * y;
        }
    }
}

by_isa! {
    fn add_products_of_difference(sums: &mut [f32], dy: &[f32], y: &[f32], to: &[f32]) {
        for (((sum, &dy), &y), &to) in sums.iter_mut().zip(dy).zip(y).zip(to) {
            *sum += dy * (y - to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, check_fast, check_gradient, inner, tolerance};

    const SHAPES: [(usize, usize); 6] = [(1, 1), (1, 127), (7, 129), (129, 7), (33, 576), (0, 8)];

    #[test]
    fn the_fast_backward_equals_the_naive_one_and_adds() {
        for (tokens, channels) in SHAPES {
            let what = format!("row_scale {tokens} x {channels}");
            let [x, dy] = [1, 2].map(|seed| Mat::random(seed, tokens, channels, 1.0));
            let [scale, start] = [3, 4].map(|seed| Mat::random(seed, 1, channels, 1.0));
            let mut y = vec![0.0; tokens * channels];
            forward_naive(&mut y, &x.f64(), &scale.f64());
            // The op only sees y and scale: give both in f32, so that naive and fast divide the same numbers.
            let y = Mat::new(tokens, channels, y.iter().map(|&y| y as f32).collect());
            let mut dscale = start.f64();
            backward_naive(&mut dscale, &dy.f64(), &y.f64(), &scale.f64());
            check_fast(
                &what,
                [(Out::Add(&start), &dscale)],
                [&dy, &y, &scale],
                tolerance(2e-7, 2e-6),
                |[dscale], [dy, y, scale]| row_scale_backward(dscale, dy, Output::Kept(y), scale),
            );
            // The same y as what was added to a stream: subtracted exactly, for both are multiples of 2^-12.
            let coarse = |mat: &Mat| {
                let values = mat.values().iter().map(|x| (x * 4096.0).round() / 4096.0).collect();
                Mat::new(tokens, channels, values)
            };
            let (y, to) = (coarse(&y), coarse(&x));
            let sum = y.values().iter().zip(to.values()).map(|(y, to)| y + to).collect();
            let sum = Mat::new(tokens, channels, sum);
            let mut dscale = start.f64();
            backward_naive(&mut dscale, &dy.f64(), &y.f64(), &scale.f64());
            check_fast(
                &what,
                [(Out::Add(&start), &dscale)],
                [&dy, &to, &sum, &scale],
                tolerance(2e-7, 2e-6),
                |[dscale], [dy, to, sum, scale]| {
                    row_scale_backward(dscale, dy, Output::Added { to, sum }, scale)
                },
            );
        }
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let (tokens, channels) = (5, 7);
        let [x, dy] = [1, 2].map(|seed| Mat::random(seed, tokens, channels, 1.0).f64());
        let scale = Mat::random(3, 1, channels, 1.0).f64();
        let forward = |scale: &[f64]| {
            let mut y = vec![0.0; tokens * channels];
            forward_naive(&mut y, &x, scale);
            y
        };
        let mut dscale = vec![0.0; channels];
        backward_naive(&mut dscale, &dy, &forward(&scale), &scale);
        check_gradient("row_scale", &scale, &dscale, |scale| inner(&forward(scale), &dy));
    }

    #[test]
    fn a_factor_of_zero_adds_nothing_and_stays_finite() {
        let (dy, y) = (Mat::random(1, 3, 2, 1.0), Mat::new(3, 2, vec![0.0, 1.0, 0.0, 2.0, 0.0, 3.0]));
        for zero in [0.0, -0.0] {
            let mut dscale = Mat::new(1, 2, vec![5.0, 0.0]);
            let scale = Mat::new(1, 2, vec![zero, 2.0]);
            row_scale_backward(dscale.view_mut(), dy.view(), Output::Kept(y.view()), scale.view()).unwrap();
            assert_eq!(dscale.values()[0], 5.0);
            assert!(dscale.values()[1].is_finite());
        }
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let mat = |rows, cols| Mat::random(1, rows, cols, 1.0);
        let backward = |mut dscale: Mat, dy: Mat, scale: Mat| {
            row_scale_backward(dscale.view_mut(), dy.view(), Output::Kept(mat(2, 4).view()), scale.view())
                .unwrap_err()
                .to_string()
        };
        let (one, two) = (|| mat(1, 4), || mat(2, 4));
        assert_eq!(backward(one(), mat(3, 4), one()), "row_scale_backward: rows of dy is 3, expected 2");
        assert_eq!(backward(one(), mat(2, 3), one()), "row_scale_backward: columns of dy is 3, expected 4");
        assert_eq!(backward(one(), two(), two()), "row_scale_backward: rows of scale is 2, expected 1");
        assert_eq!(
            backward(one(), two(), mat(1, 3)),
            "row_scale_backward: columns of scale is 3, expected 4"
        );
        assert_eq!(backward(two(), two(), one()), "row_scale_backward: rows of dscale is 2, expected 1");
        assert_eq!(
            backward(mat(1, 3), two(), one()),
            "row_scale_backward: columns of dscale is 3, expected 4"
        );
    }

    #[test]
    fn the_cuda_backward_equals_the_naive_one() {
        let Some(device) = cuda::device() else { return };
        for (tokens, channels) in cuda::SHAPES {
            let what = format!("row_scale {tokens} x {channels}");
            let [x, dy] = [1, 2].map(|seed| Mat::random(seed, tokens, channels, 1.0).rounded());
            let start = Mat::random(4, 1, channels, 1.0);
            let mut scale = Mat::random(3, 1, channels, 1.0).values();
            // Away from 0, where the quotients of the sums grow without bound; and 0 itself.
            for x in &mut scale {
                *x += x.signum() * 0.5;
            }
            scale.iter_mut().skip(2).step_by(5).for_each(|x| *x = 0.0);
            let scale = Mat::new(1, channels, scale);
            let mut dscale = start.f64();
            backward_naive(&mut dscale, &dy.f64(), &x.f64(), &scale.f64());
            // Sums of a chunk in f32: some roundings of sums that grow with the root of the tokens.
            let close = tolerance(2e-6, 2e-6 * (tokens as f64).sqrt().max(1.0));
            let (outputs, inputs) =
                ([(Out::Add(&start), F32, &dscale[..])], [(&dy, Bf16), (&x, Bf16), (&scale, F32)]);
            check_cuda(&device, &what, outputs, inputs, close, |[dscale], [dy, y, scale]| {
                row_scale_backward(dscale, dy, Output::Kept(y), scale)
            });
            let to = Mat::random(5, tokens, channels, 1.0).rounded();
            let difference: Vec<f64> = x.f64().iter().zip(to.f64()).map(|(x, to)| x - to).collect();
            let mut dscale = start.f64();
            backward_naive(&mut dscale, &dy.f64(), &difference, &scale.f64());
            let outputs = [(Out::Add(&start), F32, &dscale[..])];
            let inputs = [(&dy, Bf16), (&to, Bf16), (&x, Bf16), (&scale, F32)];
            check_cuda(&device, &what, outputs, inputs, close, |[dscale], [dy, to, sum, scale]| {
                row_scale_backward(dscale, dy, Output::Added { to, sum }, scale)
            });
        }
    }
}
