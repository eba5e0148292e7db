//! Root-mean-square normalization of every token.
//!
//! The weight belongs to the frozen base model, so the backward pass has no `dweight`.

use rayon::prelude::*;

use crate::cpu::rows::{row, rows_per_task};
use crate::cpu::{by_isa, math};
use crate::cuda::spans::Chunks;
use crate::cuda::{Arg, Cuda, Grid, Scratch, Source};
use crate::error::{Result, check};
use crate::ops::row_scale::{Output, add_partials_cuda, row_scale_backward};
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "rms_norm_forward";
const BACKWARD: &str = "rms_norm_backward";
const SCALED: &str = "rms_norm_backward_scaled";

/// Scales every token to a root mean square of one, then every channel by its weight.
///
/// y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps).
///
/// Shapes: `y`, `x` (T, C); `rstd` (1, T), saved for backward; `weight` (1, C).
/// Accumulates: nothing, `y` and `rstd` are overwritten.
/// Precision: f32, sums in 32 partial sums; within 2e-6 of f64, relative.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: Zhang and Sennrich, arXiv 1910.07467, equation 4; `LlamaRMSNorm` of transformers for eps.
pub fn rms_norm_forward(y: ViewMut, rstd: ViewMut, x: View, weight: View, eps: f32) -> Result<()> {
    check(FORWARD, "rows of y", x.rows, y.rows)?;
    check(FORWARD, "columns of y", x.cols, y.cols)?;
    check_saved(FORWARD, rstd.as_view(), x, weight)?;
    if let Some(cuda) = y.cuda() {
        return forward_cuda(&cuda, &y, &rstd, x, weight, eps);
    }
    forward_fast(y, rstd, x, weight, eps)
}

/// The gradient of [`rms_norm_forward`] by its input, added to the gradient of the residual stream.
///
/// dx += rstd * (weight * dy - x * rstd^2 * mean(weight * dy * x)).
///
/// Shapes: `dx`, `dy`, `x` (T, C); `rstd` (1, T); `weight` (1, C).
/// Accumulates: `dx` is added to.
/// Precision: f32, sums in 32 partial sums; within 2e-6 of f64, relative to the largest term.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: derived from the formula above.
pub fn rms_norm_backward(dx: ViewMut, dy: View, x: View, rstd: View, weight: View) -> Result<()> {
    check(BACKWARD, "rows of dx", x.rows, dx.rows)?;
    check(BACKWARD, "columns of dx", x.cols, dx.cols)?;
    check(BACKWARD, "rows of dy", x.rows, dy.rows)?;
    check(BACKWARD, "columns of dy", x.cols, dy.cols)?;
    check_saved(BACKWARD, rstd, x, weight)?;
    if let Some(cuda) = dx.cuda() {
        return backward_cuda(&cuda, &dx, dy, x, rstd, weight);
    }
    backward_fast(dx, dy, x, rstd, weight)
}

/// [`rms_norm_backward`], and the gradients of the factors of the linear whose output was added to the stream and made x
/// of it, without another pass over dx and x: an output projection with magnitudes (DoRA).
///
/// dx as [`rms_norm_backward`]; then dscale_n += sum_t dx_tn (x_tn - to_tn) / scale_n, as [`row_scale_backward`], a factor
/// of 0 included.
///
/// Shapes: as [`rms_norm_backward`]; `to` (T, C), the stream before; `dscale`, `scale` (1, C).
/// Accumulates: `dx` and `dscale` are added to.
/// Precision: as the two ops, and their bits.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: the two ops.
pub fn rms_norm_backward_scaled(
    mut dx: ViewMut,
    dscale: ViewMut,
    dy: View,
    x: View,
    to: View,
    rstd: View,
    weight: View,
    scale: View,
) -> Result<()> {
    for (rows, columns, operand) in [
        ("rows of dx", "columns of dx", dx.as_view()),
        ("rows of dy", "columns of dy", dy),
        ("rows of to", "columns of to", to),
    ] {
        check(SCALED, rows, x.rows, operand.rows)?;
        check(SCALED, columns, x.cols, operand.cols)?;
    }
    check_saved(SCALED, rstd, x, weight)?;
    for (rows, columns, operand) in [
        ("rows of dscale", "columns of dscale", dscale.as_view()),
        ("rows of scale", "columns of scale", scale),
    ] {
        check(SCALED, rows, 1, operand.rows)?;
        check(SCALED, columns, x.cols, operand.cols)?;
    }
    if let Some(cuda) = dx.cuda()
        && scaled_cuda(&cuda, &dx, &dscale, [dy, x, to], rstd, weight, scale)?
    {
        return Ok(());
    }
    rms_norm_backward(dx.reborrow(), dy, x, rstd, weight)?;
    row_scale_backward(dscale, dx.as_view(), Output::Added { to, sum: x }, scale)
}

fn check_saved(op: &'static str, rstd: View, x: View, weight: View) -> Result<()> {
    check(op, "rows of rstd", 1, rstd.rows)?;
    check(op, "columns of rstd (tokens)", x.rows, rstd.cols)?;
    check(op, "rows of weight", 1, weight.rows)?;
    check(op, "columns of weight", x.cols, weight.cols)
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("rms_norm.cu", include_str!("rms_norm.cu"));

/// The kernels for rows of one size; that of the columns' sums has its own number of threads.
#[derive(Debug)]
struct Kernels {
    threads: usize,
    forward: &'static str,
    backward: &'static str,
    columns: (&'static str, usize),
}

/// The suffix of a kernel is the largest number of columns that it keeps in registers.
fn kernels(cols: usize) -> Kernels {
    macro_rules! kernels {
        ($threads:literal, $suffix:literal, $columns:literal) => {
            Kernels {
                threads: $threads,
                forward: concat!("rms_norm_forward_", $suffix),
                backward: concat!("rms_norm_backward_", $suffix),
                columns: (concat!("rms_norm_backward_columns_", $suffix), $columns),
            }
        };
    }
    match cols {
        0..=1024 => kernels!(128, "1024", 128),
        1025..=2048 => kernels!(256, "2048", 256),
        2049..=4096 => kernels!(256, "4096", 512),
        4097..=8192 => kernels!(512, "8192", 1024),
        _ => kernels!(512, "any", 0),
    }
}

fn forward_cuda(cuda: &Cuda, y: &ViewMut, rstd: &ViewMut, x: View, weight: View, eps: f32) -> Result<()> {
    let op = FORWARD;
    let kernels = kernels(x.cols);
    let args = [
        Arg::Ptr(y.bf16(op)?),
        Arg::size(y.stride),
        Arg::Ptr(rstd.f32(op)?),
        Arg::Ptr(x.bf16(op)?),
        Arg::size(x.stride),
        Arg::Ptr(weight.f32(op)?),
        Arg::size(x.cols),
        Arg::F32(eps),
    ];
    cuda.launch(&SOURCE, kernels.forward, Grid::of(x.rows, kernels.threads), &args)
}

fn backward_cuda(cuda: &Cuda, dx: &ViewMut, dy: View, x: View, rstd: View, weight: View) -> Result<()> {
    let op = BACKWARD;
    if x.cols == 0 {
        return Ok(());
    }
    let kernels = kernels(x.cols);
    let args = [
        Arg::Ptr(dx.bf16(op)?),
        Arg::size(dx.stride),
        Arg::Ptr(dy.bf16(op)?),
        Arg::size(dy.stride),
        Arg::Ptr(x.bf16(op)?),
        Arg::size(x.stride),
        Arg::Ptr(rstd.f32(op)?),
        Arg::Ptr(weight.f32(op)?),
        Arg::size(x.cols),
    ];
    cuda.launch(&SOURCE, kernels.backward, Grid::of(x.rows, kernels.threads), &args)
}

/// Columns of the longest rows that a block keeps in registers.
const LONGEST: usize = 8192;

/// False: the rows are not aligned or too long, and nothing was done.
fn scaled_cuda(
    cuda: &Cuda,
    dx: &ViewMut,
    dscale: &ViewMut,
    [dy, x, to]: [View; 3],
    rstd: View,
    weight: View,
    scale: View,
) -> Result<bool> {
    let (op, rows, cols) = (SCALED, x.rows, x.cols);
    let aligned = |ptr: u64, stride: usize| ptr.is_multiple_of(16) && stride.is_multiple_of(8);
    let mut wide = cols.is_multiple_of(8) && (1..=LONGEST).contains(&cols) && rows > 0;
    for view in [dx.as_view(), dy, x, to] {
        wide &= aligned(view.bf16(op)?, view.stride);
    }
    if !wide || !aligned(weight.f32(op)?, 0) {
        return Ok(false);
    }
    let chunks = Chunks::of_rows(rows, cols);
    let partial = cuda.scratch(Scratch::Partials, chunks.count * cols * size_of::<f32>())?;
    let args = [
        Arg::Ptr(dx.bf16(op)?),
        Arg::size(dx.stride),
        Arg::Ptr(partial),
        Arg::Ptr(dy.bf16(op)?),
        Arg::size(dy.stride),
        Arg::Ptr(x.bf16(op)?),
        Arg::size(x.stride),
        Arg::Ptr(to.bf16(op)?),
        Arg::size(to.stride),
        Arg::Ptr(rstd.f32(op)?),
        Arg::Ptr(weight.f32(op)?),
        Arg::size(rows),
        Arg::size(cols),
        Arg::size(chunks.rows),
    ];
    let (kernel, threads) = kernels(cols).columns;
    cuda.launch(&SOURCE, kernel, Grid::of(chunks.count, threads), &args)?;
    add_partials_cuda(op, cuda, dscale, partial, chunks, scale)?;
    Ok(true)
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn forward_naive(y: &mut [f64], rstd: &mut [f64], x: &[f64], weight: &[f64], eps: f64) {
    let channels = weight.len();
    for t in 0..rstd.len() {
        let x = &x[t * channels..][..channels];
        let mean_square = x.iter().map(|x| x * x).sum::<f64>() / channels as f64;
        rstd[t] = 1.0 / (mean_square + eps).sqrt();
        for c in 0..channels {
            y[t * channels + c] = x[c] * rstd[t] * weight[c];
        }
    }
}

fn forward_fast(y: ViewMut, rstd: ViewMut, x: View, weight: View, eps: f32) -> Result<()> {
    let (cols, y_stride, x_stride) = (x.cols, y.stride, x.stride);
    let (y, rstd) = (y.cpu(FORWARD)?, rstd.cpu(FORWARD)?);
    let (x, weight) = (x.cpu(FORWARD)?, weight.cpu(FORWARD)?);
    if cols == 0 {
        rstd.fill(1.0 / eps.sqrt());
        return Ok(());
    }
    y.par_chunks_mut(y_stride).zip(rstd).enumerate().with_min_len(rows_per_task(cols)).for_each(
        |(t, (y, rstd))| *rstd = forward_row(&mut y[..cols], row(x, t, cols, x_stride), weight, eps),
    );
    Ok(())
}

by_isa! {
    fn forward_row(y: &mut [f32], x: &[f32], weight: &[f32], eps: f32) -> f32 {
        let rstd = 1.0 / (math::dot(x, x) / x.len() as f32 + eps).sqrt();
        for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
            *y = x * rstd * weight;
        }
        rstd
    }
}

#[cfg(test)]
fn backward_naive(dx: &mut [f64], dy: &[f64], x: &[f64], rstd: &[f64], weight: &[f64]) {
    let channels = weight.len();
    for (t, rstd) in rstd.iter().enumerate() {
        let (dy, x) = (&dy[t * channels..][..channels], &x[t * channels..][..channels]);
        // y = x * rstd * weight, where rstd depends on every x: d rstd / d x_c = -rstd^3 x_c / C.
        let mean = (0..channels).map(|c| weight[c] * dy[c] * x[c]).sum::<f64>() / channels as f64;
        for c in 0..channels {
            dx[t * channels + c] += rstd * (weight[c] * dy[c] - x[c] * rstd * rstd * mean);
        }
    }
}

fn backward_fast(dx: ViewMut, dy: View, x: View, rstd: View, weight: View) -> Result<()> {
    let (cols, dx_stride, dy_stride, x_stride) = (x.cols, dx.stride, dy.stride, x.stride);
    let (dx, dy, x) = (dx.cpu(BACKWARD)?, dy.cpu(BACKWARD)?, x.cpu(BACKWARD)?);
    let (rstd, weight) = (rstd.cpu(BACKWARD)?, weight.cpu(BACKWARD)?);
    if cols == 0 {
        return Ok(());
    }
    dx.par_chunks_mut(dx_stride).zip(rstd).enumerate().with_min_len(rows_per_task(cols)).for_each(
        |(t, (dx, &rstd))| {
            let (dy, x) = (row(dy, t, cols, dy_stride), row(x, t, cols, x_stride));
            backward_row(&mut dx[..cols], dy, x, rstd, weight);
        },
    );
    Ok(())
}

by_isa! {
    fn backward_row(dx: &mut [f32], dy: &[f32], x: &[f32], rstd: f32, weight: &[f32]) {
        let mean = math::dot3(weight, dy, x) / x.len() as f32;
        let pull = rstd * rstd * mean;
        for (((dx, dy), x), weight) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
            *dx += rstd * (weight * dy - x * pull);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, assert_close, check_fast, check_gradient, golden, inner, tolerance};

    const EPS: f32 = 1e-5;
    const SHAPES: [(usize, usize); 6] = [(1, 1), (1, 127), (7, 129), (129, 7), (33, 576), (0, 8)];

    #[test]
    fn the_fast_forward_equals_the_naive_one() {
        for (tokens, channels) in SHAPES {
            for std in [1.0, 1e3, 1e-4] {
                let x = Mat::random(1, tokens, channels, std);
                let weight = Mat::random(2, 1, channels, 1.0);
                let (mut y, mut rstd) = (vec![0.0; tokens * channels], vec![0.0; tokens]);
                forward_naive(&mut y, &mut rstd, &x.f64(), &weight.f64(), EPS as f64);
                check_fast(
                    &format!("rms_norm_forward {tokens} x {channels}"),
                    [(Out::Set(tokens, channels), &y), (Out::Set(1, tokens), &rstd)],
                    [&x, &weight],
                    tolerance(2e-6, 1e-9),
                    |[y, rstd], [x, weight]| rms_norm_forward(y, rstd, x, weight, EPS),
                );
            }
        }
    }

    #[test]
    fn the_fast_backward_equals_the_naive_one_and_adds() {
        for (tokens, channels) in SHAPES {
            let [start, dy, x] = [1, 2, 3].map(|seed| Mat::random(seed, tokens, channels, 1.0));
            let weight = Mat::random(4, 1, channels, 1.0);
            let rstd = Mat::random(5, 1, tokens, 0.5);
            let mut dx = start.f64();
            backward_naive(&mut dx, &dy.f64(), &x.f64(), &rstd.f64(), &weight.f64());
            check_fast(
                &format!("rms_norm_backward {tokens} x {channels}"),
                [(Out::Add(&start), &dx)],
                [&dy, &x, &rstd, &weight],
                tolerance(2e-6, 2e-6),
                |[dx], [dy, x, rstd, weight]| rms_norm_backward(dx, dy, x, rstd, weight),
            );
        }
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let (tokens, channels) = (3, 7);
        let [x, dy] = [1, 2].map(|seed| Mat::random(seed, tokens, channels, 1.0).f64());
        let weight = Mat::random(3, 1, channels, 1.0).f64();
        let forward = |x: &[f64]| {
            let (mut y, mut rstd) = (vec![0.0; x.len()], vec![0.0; tokens]);
            forward_naive(&mut y, &mut rstd, x, &weight, 1e-5);
            (y, rstd)
        };
        let mut dx = vec![0.0; x.len()];
        backward_naive(&mut dx, &dy, &x, &forward(&x).1, &weight);
        check_gradient("rms_norm", &x, &dx, |x| inner(&forward(x).0, &dy));
    }

    #[test]
    fn forward_and_backward_equal_pytorch() {
        let golden = golden("rms_norm");
        let [x, weight, dy] = ["x", "weight", "dy"].map(|name| golden.mat(name));
        let mut y = Mat::poisoned(x.rows, x.cols);
        let mut rstd = Mat::poisoned(1, x.rows);
        let mut dx = Mat::new(x.rows, x.cols, vec![0.0; x.rows * x.cols]);
        rms_norm_forward(y.view_mut(), rstd.view_mut(), x.view(), weight.view(), 1e-5).unwrap();
        rms_norm_backward(dx.view_mut(), dy.view(), x.view(), rstd.view(), weight.view()).unwrap();
        assert_close("y", &y.values(), &golden.mat("y").values(), tolerance(1e-6, 1e-6));
        assert_close("dx", &dx.values(), &golden.mat("dx").values(), tolerance(2e-6, 2e-6));
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let mat = |rows, cols| Mat::random(1, rows, cols, 1.0);
        let (x, weight) = (mat(2, 4), mat(1, 4));
        let forward = |mut y: Mat, mut rstd: Mat, weight: &Mat| {
            rms_norm_forward(y.view_mut(), rstd.view_mut(), x.view(), weight.view(), EPS)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(forward(mat(3, 4), mat(1, 2), &weight), "rms_norm_forward: rows of y is 3, expected 2");
        assert_eq!(forward(mat(2, 5), mat(1, 2), &weight), "rms_norm_forward: columns of y is 5, expected 4");
        assert!(forward(mat(2, 4), mat(1, 3), &weight).contains("columns of rstd (tokens) is 3, expected 2"));
        assert!(forward(mat(2, 4), mat(1, 2), &mat(1, 3)).contains("columns of weight is 3, expected 4"));
        let mut dx = mat(2, 4);
        let error =
            rms_norm_backward(dx.view_mut(), mat(1, 4).view(), x.view(), mat(1, 2).view(), weight.view());
        assert_eq!(error.unwrap_err().to_string(), "rms_norm_backward: rows of dy is 1, expected 2");
    }

    /// What the two ops give, in f64.
    fn scaled_naive(
        start: &Mat,
        dstart: &Mat,
        [dy, x, to]: [&Mat; 3],
        [rstd, weight, scale]: [&Mat; 3],
    ) -> [Vec<f64>; 2] {
        let (mut dx, mut dscale, channels) = (start.f64(), dstart.f64(), x.cols);
        backward_naive(&mut dx, &dy.f64(), &x.f64(), &rstd.f64(), &weight.f64());
        let (x, to) = (x.f64(), to.f64());
        for (n, (dscale, scale)) in dscale.iter_mut().zip(scale.f64()).enumerate() {
            let products = (n..dx.len()).step_by(channels).map(|i| dx[i] * (x[i] - to[i]));
            *dscale += if scale == 0.0 { 0.0 } else { products.sum::<f64>() / scale };
        }
        [dx, dscale]
    }

    /// Random factors away from 0, where quotients of sums grow without bound, and 0 itself.
    fn factors(channels: usize) -> Mat {
        let values = Mat::random(8, 1, channels, 1.0).values();
        let away = |(i, x): (usize, f32)| if i % 5 == 2 { 0.0 } else { x + x.signum() * 0.5 };
        Mat::new(1, channels, values.into_iter().enumerate().map(away).collect())
    }

    #[test]
    fn the_gradients_of_the_factors_are_those_of_row_scale() {
        for (tokens, channels) in SHAPES {
            let [start, dy, x, to] = [1, 2, 3, 4].map(|seed| Mat::random(seed, tokens, channels, 1.0));
            let [weight, dstart] = [5, 6].map(|seed| Mat::random(seed, 1, channels, 1.0));
            let (rstd, scale) = (Mat::random(7, 1, tokens, 0.5), factors(channels));
            let [dx, dscale] = scaled_naive(&start, &dstart, [&dy, &x, &to], [&rstd, &weight, &scale]);
            check_fast(
                &format!("rms_norm_backward_scaled {tokens} x {channels}"),
                [(Out::Add(&start), &dx), (Out::Add(&dstart), &dscale)],
                [&dy, &x, &to, &rstd, &weight, &scale],
                tolerance(2e-6, 1e-5 * (tokens as f64).sqrt()),
                |[dx, dscale], [dy, x, to, rstd, weight, scale]| {
                    rms_norm_backward_scaled(dx, dscale, dy, x, to, rstd, weight, scale)
                },
            );
        }
    }

    #[test]
    fn the_cuda_gradients_of_the_factors_equal_the_naive_ones() {
        let Some(device) = cuda::device() else { return };
        for (tokens, channels) in
            cuda::SHAPES.into_iter().chain([(300, 1024), (70, 2056), (3, 8192), (5, 8200)])
        {
            let [start, dy, x, to] =
                [1, 2, 3, 4].map(|seed| Mat::random(seed, tokens, channels, 1.0).rounded());
            let [weight, dstart] = [5, 6].map(|seed| Mat::random(seed, 1, channels, 1.0));
            let (rstd, scale) = (Mat::random(7, 1, tokens, 0.5), factors(channels));
            let [dx, dscale] = scaled_naive(&start, &dstart, [&dy, &x, &to], [&rstd, &weight, &scale]);
            let (x64, to64) = (x.f64(), to.f64());
            let terms = |n: usize| {
                let rows = (n..dx.len()).step_by(channels);
                let sum: f64 = rows.map(|i| (dx[i] * (x64[i] - to64[i])).abs()).sum();
                if scale.f64()[n] == 0.0 { 0.0 } else { sum / scale.f64()[n].abs() }
            };
            let largest = (0..channels).map(terms).fold(0.0, f64::max);
            check_cuda(
                &device,
                &format!("rms_norm_backward_scaled {tokens} x {channels}"),
                [(Out::Add(&start), Bf16, &dx), (Out::Add(&dstart), F32, &dscale)],
                [(&dy, Bf16), (&x, Bf16), (&to, Bf16), (&rstd, F32), (&weight, F32), (&scale, F32)],
                // Where rows are not aligned the sums are of gradients that were rounded, each by at most 2^-8 of itself.
                tolerance(2e-6, largest / 256.0),
                |[dx, dscale], [dy, x, to, rstd, weight, scale]| {
                    rms_norm_backward_scaled(dx, dscale, dy, x, to, rstd, weight, scale)
                },
            );
        }
    }

    #[test]
    fn the_cuda_forwards_equal_the_naive_ones() {
        let Some(device) = cuda::device() else { return };
        for (tokens, channels) in cuda::SHAPES {
            for std in [1.0, 1e3, 1e-4] {
                let what = format!("rms_norm {tokens} x {channels} of {std}");
                let x = Mat::random(1, tokens, channels, std).rounded();
                let weight = Mat::random(3, 1, channels, 1.0);
                let (mut y, mut rstd) = (vec![0.0; tokens * channels], vec![0.0; tokens]);
                forward_naive(&mut y, &mut rstd, &x.f64(), &weight.f64(), EPS as f64);
                let set = || Out::Set(tokens, channels);
                check_cuda(
                    &device,
                    &what,
                    [(set(), Bf16, &y), (Out::Set(1, tokens), F32, &rstd)],
                    [(&x, Bf16), (&weight, F32)],
                    tolerance(2e-6, 0.0),
                    |[y, rstd], [x, weight]| rms_norm_forward(y, rstd, x, weight, EPS),
                );
            }
        }
    }

    #[test]
    fn the_cuda_backward_equals_the_naive_one_and_adds() {
        let Some(device) = cuda::device() else { return };
        for (tokens, channels) in cuda::SHAPES {
            let [start, dy, x] = [1, 2, 3].map(|seed| Mat::random(seed, tokens, channels, 1.0).rounded());
            let weight = Mat::random(4, 1, channels, 1.0);
            let rstd = Mat::random(5, 1, tokens, 0.5);
            let mut dx = start.f64();
            backward_naive(&mut dx, &dy.f64(), &x.f64(), &rstd.f64(), &weight.f64());
            check_cuda(
                &device,
                &format!("rms_norm_backward {tokens} x {channels}"),
                [(Out::Add(&start), Bf16, &dx)],
                [(&dy, Bf16), (&x, Bf16), (&rstd, F32), (&weight, F32)],
                tolerance(0.0, 0.0),
                |[dx], [dy, x, rstd, weight]| rms_norm_backward(dx, dy, x, rstd, weight),
            );
        }
    }
}
