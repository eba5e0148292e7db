//! The addition of a branch to the residual stream.
//!
//! Its backward pass is the one place where gradients of activations meet, hence `+=`.

use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::rows::{pieces, rows_per_task};
use crate::cuda::{Arg, Cuda, Source, spans};
use crate::error::{Result, check};
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "residual_forward";
const BACKWARD: &str = "residual_backward";

/// Adds a branch to the stream.
///
/// y = x + branch.
///
/// Shapes: all (T, C).
/// Accumulates: nothing, `y` is overwritten.
/// Precision: one rounding in f32.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: He et al., arXiv 1512.03385, equation 1.
pub fn residual_forward(y: ViewMut, x: View, branch: View) -> Result<()> {
    check(FORWARD, "rows of y", x.rows, y.rows)?;
    check(FORWARD, "columns of y", x.cols, y.cols)?;
    check(FORWARD, "rows of branch", x.rows, branch.rows)?;
    check(FORWARD, "columns of branch", x.cols, branch.cols)?;
    if let Some(cuda) = y.cuda() {
        return add_cuda(FORWARD, &cuda, &y, x, branch);
    }
    forward_fast(y, x, branch)
}

/// Adds the gradient that arrives through one path to the gradient of the stream.
///
/// dx += dy. (The branch's gradient is dy itself, so it needs no op.)
///
/// Shapes: both (T, C).
/// Accumulates: `dx` is added to.
/// Precision: one rounding in f32.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: derived from the formula above.
pub fn residual_backward(dx: ViewMut, dy: View) -> Result<()> {
    check(BACKWARD, "rows of dx", dy.rows, dx.rows)?;
    check(BACKWARD, "columns of dx", dy.cols, dx.cols)?;
    if let Some(cuda) = dx.cuda() {
        return add_cuda(BACKWARD, &cuda, &dx, dx.as_view(), dy);
    }
    backward_fast(dx, dy)
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("residual.cu", include_str!("residual.cu"));

/// y = x + branch; y may be x.
fn add_cuda(op: &'static str, cuda: &Cuda, y: &ViewMut, x: View, branch: View) -> Result<()> {
    let (rows, cols, strides) = spans::flat(x.rows, x.cols, [y.stride, x.stride, branch.stride]);
    let grid = spans::grid(op, rows, cols, 2)?;
    let args = [
        Arg::Ptr(y.bf16(op)?),
        Arg::size(strides[0]),
        Arg::Ptr(x.bf16(op)?),
        Arg::size(strides[1]),
        Arg::Ptr(branch.bf16(op)?),
        Arg::size(strides[2]),
        Arg::size(rows),
        Arg::size(cols),
    ];
    cuda.launch(&SOURCE, "residual_add", grid, &args)
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn forward_naive(y: &mut [f64], x: &[f64], branch: &[f64]) {
    for i in 0..y.len() {
        y[i] = x[i] + branch[i];
    }
}

fn forward_fast(y: ViewMut, x: View, branch: View) -> Result<()> {
    let (cols, strides) = (x.cols, [y.stride, x.stride, branch.stride]);
    let (y, x, branch) = (y.cpu(FORWARD)?, x.cpu(FORWARD)?, branch.cpu(FORWARD)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [y_stride, x_stride, branch_stride] = walk.strides;
    y.par_chunks_mut(y_stride).enumerate().with_min_len(rows_per_task(walk.cols)).for_each(|(i, y)| {
        let n = y.len().min(walk.cols);
        forward_piece(&mut y[..n], &x[i * x_stride..][..n], &branch[i * branch_stride..][..n]);
    });
    Ok(())
}

by_isa! {
    fn forward_piece(y: &mut [f32], x: &[f32], branch: &[f32]) {
        for ((y, x), branch) in y.iter_mut().zip(x).zip(branch) {
            *y = x + branch;
        }
    }
}

#[cfg(test)]
fn backward_naive(dx: &mut [f64], dy: &[f64]) {
    for i in 0..dx.len() {
        // y = x + branch
        dx[i] += dy[i];
    }
}

fn backward_fast(dx: ViewMut, dy: View) -> Result<()> {
    let (cols, strides) = (dy.cols, [dx.stride, dy.stride]);
    let (dx, dy) = (dx.cpu(BACKWARD)?, dy.cpu(BACKWARD)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [dx_stride, dy_stride] = walk.strides;
    dx.par_chunks_mut(dx_stride).enumerate().with_min_len(rows_per_task(walk.cols)).for_each(|(i, dx)| {
        let n = dx.len().min(walk.cols);
        backward_piece(&mut dx[..n], &dy[i * dy_stride..][..n]);
    });
    Ok(())
}

by_isa! {
    fn backward_piece(dx: &mut [f32], dy: &[f32]) {
        for (dx, dy) in dx.iter_mut().zip(dy) {
            *dx += dy;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::Bf16;
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, check_fast, check_gradient, inner, tolerance};

    #[test]
    fn the_fast_versions_equal_the_naive_ones() {
        // One rounding: half a unit in the last place.
        let rounding = tolerance(6e-8, 0.0);
        for (rows, cols) in [(1, 1), (1, 127), (7, 129), (129, 7), (33, 576), (3, 8192), (0, 8)] {
            let [x, branch] = [1, 2].map(|seed| Mat::random(seed, rows, cols, 1.0));
            let (mut y, mut dx) = (vec![0.0; rows * cols], x.f64());
            forward_naive(&mut y, &x.f64(), &branch.f64());
            backward_naive(&mut dx, &branch.f64());
            let what = format!("residual {rows} x {cols}");
            check_fast(&what, [(Out::Set(rows, cols), &y)], [&x, &branch], rounding, |[y], [x, branch]| {
                residual_forward(y, x, branch)
            });
            check_fast(&what, [(Out::Add(&x), &dx)], [&branch], rounding, |[dx], [dy]| {
                residual_backward(dx, dy)
            });
        }
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let [x, branch, dy] = [1, 2, 3].map(|seed| Mat::random(seed, 1, 9, 1.0).f64());
        let mut dx = vec![0.0; 9];
        backward_naive(&mut dx, &dy);
        let loss = |x: &[f64], branch: &[f64]| {
            let mut y = vec![0.0; 9];
            forward_naive(&mut y, x, branch);
            inner(&y, &dy)
        };
        check_gradient("dx", &x, &dx, |x| loss(x, &branch));
        check_gradient("dbranch", &branch, &dy, |branch| loss(&x, branch));
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let mat = |rows, cols| Mat::random(1, rows, cols, 1.0);
        let error = residual_forward(mat(2, 4).view_mut(), mat(2, 4).view(), mat(2, 3).view()).unwrap_err();
        assert_eq!(error.to_string(), "residual_forward: columns of branch is 3, expected 4");
        let error = residual_backward(mat(1, 4).view_mut(), mat(2, 4).view()).unwrap_err();
        assert_eq!(error.to_string(), "residual_backward: rows of dx is 1, expected 2");
    }

    #[test]
    fn the_cuda_twins_equal_the_naive_versions() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES {
            let [x, branch] = [1, 2].map(|seed| Mat::random(seed, rows, cols, 1.0).rounded());
            let (mut y, mut dx) = (vec![0.0; rows * cols], x.f64());
            forward_naive(&mut y, &x.f64(), &branch.f64());
            backward_naive(&mut dx, &branch.f64());
            let (what, exact) = (format!("residual {rows} x {cols}"), tolerance(0.0, 0.0));
            let (outputs, inputs) = ([(Out::Set(rows, cols), Bf16, &y[..])], [(&x, Bf16), (&branch, Bf16)]);
            check_cuda(&device, &what, outputs, inputs, exact, |[y], [x, branch]| {
                residual_forward(y, x, branch)
            });
            let outputs = [(Out::Add(&x), Bf16, &dx[..])];
            check_cuda(&device, &what, outputs, [(&branch, Bf16)], exact, |[dx], [dy]| {
                residual_backward(dx, dy)
            });
        }
    }
}
