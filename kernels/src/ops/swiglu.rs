//! The gated activation of the feed-forward block.
//!
//! The backward pass recomputes the sigmoid: cheaper than to store it.

use rayon::prelude::*;

use crate::cpu::rows::{pieces, rows_per_task};
use crate::cpu::{by_isa, math};
use crate::cuda::spans::{self, Chunks};
use crate::cuda::{Arg, Cuda, Scratch, Source};
use crate::error::{Result, check};
use crate::ops::row_scale::{Output, add_partials_cuda, row_scale_backward};
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "swiglu_forward";
const BACKWARD: &str = "swiglu_backward";
const SCALED: &str = "swiglu_backward_scaled";

/// Multiplies `up` by the SiLU of `gate`.
///
/// y = silu(gate) * up, silu(g) = g * sigmoid(g).
///
/// Shapes: all (T, C).
/// Accumulates: nothing, `y` is overwritten.
/// Precision: f32; within 1e-6 of f64, relative.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: Shazeer, arXiv 2002.05202, equation 6 (the elementwise part, beta = 1).
pub fn swiglu_forward(y: ViewMut, gate: View, up: View) -> Result<()> {
    check(FORWARD, "rows of y", gate.rows, y.rows)?;
    check(FORWARD, "columns of y", gate.cols, y.cols)?;
    check(FORWARD, "rows of up", gate.rows, up.rows)?;
    check(FORWARD, "columns of up", gate.cols, up.cols)?;
    if let Some(cuda) = y.cuda() {
        return forward_cuda(FORWARD, &cuda, &y, gate, up);
    }
    forward_fast(y, gate, up)
}

/// The gradients of [`swiglu_forward`].
///
/// dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s, s = sigmoid(gate).
///
/// Shapes: all (T, C).
/// Accumulates: nothing, `dgate` and `dup` are overwritten.
/// Precision: f32; within 2e-6 of f64, relative to the largest term.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: derived from the formula above.
pub fn swiglu_backward(dgate: ViewMut, dup: ViewMut, dy: View, gate: View, up: View) -> Result<()> {
    check_gradients(BACKWARD, [&dgate, &dup], [dy, gate, up])?;
    if let Some(cuda) = dy.cuda() {
        return backward_cuda(BACKWARD, cuda, [&dgate, &dup], [dy, gate, up]);
    }
    backward_fast(dgate, dup, dy, gate, up)
}

/// [`swiglu_backward`], and the gradients of the factors of both inputs' columns, without another pass over them:
/// where gate and up come from linears with magnitudes (DoRA).
///
/// dgate, dup as [`swiglu_backward`]; dscales\[0\]_n += sum_t dgate_tn gate_tn / scales\[0\]_n, dscales\[1\]_n += sum_t
/// dup_tn up_tn / scales\[1\]_n, as [`row_scale_backward`], a factor of 0 included.
///
/// Shapes: `dgate`, `dup`, `dy`, `gate`, `up` (T, C); `dscales`, `scales` (1, C) each.
/// Accumulates: `dscales` are added to; `dgate` and `dup` are overwritten.
/// Precision: as the two ops; on CUDA the sums are of gradients before they are rounded to bf16.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: the two ops.
pub fn swiglu_backward_scaled(
    mut dgate: ViewMut,
    mut dup: ViewMut,
    dscales: [ViewMut; 2],
    dy: View,
    gate: View,
    up: View,
    scales: [View; 2],
) -> Result<()> {
    check_gradients(SCALED, [&dgate, &dup], [dy, gate, up])?;
    for (dscale, scale) in dscales.iter().zip(scales) {
        check(SCALED, "rows of dscales", 1, dscale.rows)?;
        check(SCALED, "columns of dscales", gate.cols, dscale.cols)?;
        check(SCALED, "rows of scales", 1, scale.rows)?;
        check(SCALED, "columns of scales", gate.cols, scale.cols)?;
    }
    if let Some(cuda) = dy.cuda() {
        let (gradients, kernel) = ([&dgate, &dup], "swiglu_backward_columns");
        return scaled_cuda(SCALED, kernel, cuda, gradients, dscales.each_ref(), [dy, gate, up], scales);
    }
    backward_fast(dgate.reborrow(), dup.reborrow(), dy, gate, up)?;
    let [dgate_scale, dup_scale] = dscales;
    row_scale_backward(dgate_scale, dgate.as_view(), Output::Kept(gate), scales[0])?;
    row_scale_backward(dup_scale, dup.as_view(), Output::Kept(up), scales[1])
}

/// All like `gate`: the gradients, then dy, gate, up.
pub(super) fn check_gradients(
    op: &'static str,
    [dgate, dup]: [&ViewMut; 2],
    [dy, gate, up]: [View; 3],
) -> Result<()> {
    let operands = [
        ("rows of dgate", "columns of dgate", dgate.as_view()),
        ("rows of dup", "columns of dup", dup.as_view()),
        ("rows of dy", "columns of dy", dy),
        ("rows of up", "columns of up", up),
    ];
    for (rows, columns, operand) in operands {
        check(op, rows, gate.rows, operand.rows)?;
        check(op, columns, gate.cols, operand.cols)?;
    }
    Ok(())
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("swiglu.cu", include_str!("swiglu.cu"));

/// The kernels have the names of the ops; geglu has its kernels in the same file.
pub(super) fn forward_cuda(op: &'static str, cuda: &Cuda, y: &ViewMut, gate: View, up: View) -> Result<()> {
    let (rows, cols, strides) = spans::flat(gate.rows, gate.cols, [y.stride, gate.stride, up.stride]);
    let grid = spans::grid(op, rows, cols, 2)?;
    let args = [
        Arg::Ptr(y.bf16(op)?),
        Arg::size(strides[0]),
        Arg::Ptr(gate.bf16(op)?),
        Arg::size(strides[1]),
        Arg::Ptr(up.bf16(op)?),
        Arg::size(strides[2]),
        Arg::size(rows),
        Arg::size(cols),
    ];
    cuda.launch(&SOURCE, op, grid, &args)
}

pub(super) fn backward_cuda(
    op: &'static str,
    cuda: &Cuda,
    [dgate, dup]: [&ViewMut; 2],
    [dy, gate, up]: [View; 3],
) -> Result<()> {
    let strides = [dgate.stride, dup.stride, dy.stride, gate.stride, up.stride];
    let (rows, cols, strides) = spans::flat(gate.rows, gate.cols, strides);
    let grid = spans::grid(op, rows, cols, 2)?;
    let args = [
        Arg::Ptr(dgate.bf16(op)?),
        Arg::size(strides[0]),
        Arg::Ptr(dup.bf16(op)?),
        Arg::size(strides[1]),
        Arg::Ptr(dy.bf16(op)?),
        Arg::size(strides[2]),
        Arg::Ptr(gate.bf16(op)?),
        Arg::size(strides[3]),
        Arg::Ptr(up.bf16(op)?),
        Arg::size(strides[4]),
        Arg::size(rows),
        Arg::size(cols),
    ];
    cuda.launch(&SOURCE, op, grid, &args)
}

pub(super) fn scaled_cuda(
    op: &'static str,
    kernel: &'static str,
    cuda: &Cuda,
    [dgate, dup]: [&ViewMut; 2],
    dscales: [&ViewMut; 2],
    [dy, gate, up]: [View; 3],
    scales: [View; 2],
) -> Result<()> {
    let chunks = Chunks::of(gate.rows, gate.cols);
    let bytes = chunks.count * gate.cols * size_of::<f32>();
    let partials = cuda.scratch(Scratch::Partials, 2 * bytes)?;
    let partials = [partials, partials + bytes as u64];
    let args = [
        Arg::Ptr(dgate.bf16(op)?),
        Arg::size(dgate.stride),
        Arg::Ptr(dup.bf16(op)?),
        Arg::size(dup.stride),
        Arg::Ptr(partials[0]),
        Arg::Ptr(partials[1]),
        Arg::Ptr(dy.bf16(op)?),
        Arg::size(dy.stride),
        Arg::Ptr(gate.bf16(op)?),
        Arg::size(gate.stride),
        Arg::Ptr(up.bf16(op)?),
        Arg::size(up.stride),
        Arg::size(gate.rows),
        Arg::size(gate.cols),
        Arg::size(chunks.rows),
    ];
    cuda.launch(&SOURCE, kernel, chunks.grid(), &args)?;
    for i in 0..2 {
        add_partials_cuda(op, cuda, dscales[i], partials[i], chunks, scales[i])?;
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn forward_naive(y: &mut [f64], gate: &[f64], up: &[f64]) {
    for i in 0..y.len() {
        y[i] = gate[i] / (1.0 + (-gate[i]).exp()) * up[i];
    }
}

fn forward_fast(y: ViewMut, gate: View, up: View) -> Result<()> {
    let (cols, strides) = (gate.cols, [y.stride, gate.stride, up.stride]);
    let (y, gate, up) = (y.cpu(FORWARD)?, gate.cpu(FORWARD)?, up.cpu(FORWARD)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [y_stride, gate_stride, up_stride] = walk.strides;
    y.par_chunks_mut(y_stride).enumerate().with_min_len(rows_per_task(walk.cols)).for_each(|(i, y)| {
        let n = y.len().min(walk.cols);
        forward_piece(&mut y[..n], &gate[i * gate_stride..][..n], &up[i * up_stride..][..n]);
    });
    Ok(())
}

by_isa! {
    fn forward_piece(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate * math::sigmoid(*gate) * up;
        }
    }
}

#[cfg(test)]
fn backward_naive(dgate: &mut [f64], dup: &mut [f64], dy: &[f64], gate: &[f64], up: &[f64]) {
    for i in 0..dy.len() {
        let s = 1.0 / (1.0 + (-gate[i]).exp());
        // y = gate * s * up, ds / dgate = s * (1 - s).
        dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
        dup[i] = dy[i] * gate[i] * s;
    }
}

fn backward_fast(dgate: ViewMut, dup: ViewMut, dy: View, gate: View, up: View) -> Result<()> {
    let (cols, strides) = (gate.cols, [dgate.stride, dup.stride, dy.stride, gate.stride, up.stride]);
    let (dgate, dup, dy) = (dgate.cpu(BACKWARD)?, dup.cpu(BACKWARD)?, dy.cpu(BACKWARD)?);
    let (gate, up) = (gate.cpu(BACKWARD)?, up.cpu(BACKWARD)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [dgate_stride, dup_stride, dy_stride, gate_stride, up_stride] = walk.strides;
    dgate
        .par_chunks_mut(dgate_stride)
        .zip(dup.par_chunks_mut(dup_stride))
        .enumerate()
        .with_min_len(rows_per_task(walk.cols))
        .for_each(|(i, (dgate, dup))| {
            let n = dgate.len().min(walk.cols);
            let dy = &dy[i * dy_stride..][..n];
            let (gate, up) = (&gate[i * gate_stride..][..n], &up[i * up_stride..][..n]);
            backward_piece(&mut dgate[..n], &mut dup[..n], dy, gate, up);
        });
    Ok(())
}

by_isa! {
    fn backward_piece(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
        let n = dgate.len();
        let (dup, dy, gate, up) = (&mut dup[..n], &dy[..n], &gate[..n], &up[..n]);
        for i in 0..n {
            let s = math::sigmoid(gate[i]);
            dgate[i] = dy[i] * up[i] * s * (1.0 + gate[i] * (1.0 - s));
            dup[i] = dy[i] * gate[i] * s;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::cuda;
    use crate::testing::{
        Mat, Out, Tolerance, assert_close, check_fast, check_gradient, golden, inner, seconds,
    };

    const SHAPES: [(usize, usize); 7] = [(1, 1), (1, 127), (7, 129), (129, 7), (33, 1536), (3, 8192), (0, 8)];
    const FORWARD_TOLERANCE: Tolerance = Tolerance { rel: 1e-6, abs: 1e-30 };
    // 1 + gate * (1 - s) cancels near its zero at -1.278.
    const BACKWARD_TOLERANCE: Tolerance = Tolerance { rel: 2e-6, abs: 2e-6 };

    #[test]
    fn the_fast_versions_equal_the_naive_ones() {
        for (rows, cols) in SHAPES {
            let n = rows * cols;
            let gate = Mat::random(1, rows, cols, 4.0);
            let [up, dy] = [2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0));
            let [mut y, mut dgate, mut dup] = [0; 3].map(|_| vec![0.0; n]);
            forward_naive(&mut y, &gate.f64(), &up.f64());
            backward_naive(&mut dgate, &mut dup, &dy.f64(), &gate.f64(), &up.f64());
            let what = format!("swiglu {rows} x {cols}");
            check_fast(
                &what,
                [(Out::Set(rows, cols), &y)],
                [&gate, &up],
                FORWARD_TOLERANCE,
                |[y], [gate, up]| swiglu_forward(y, gate, up),
            );
            check_fast(
                &what,
                [(Out::Set(rows, cols), &dgate), (Out::Set(rows, cols), &dup)],
                [&dy, &gate, &up],
                BACKWARD_TOLERANCE,
                |[dgate, dup], [dy, gate, up]| swiglu_backward(dgate, dup, dy, gate, up),
            );
        }
    }

    #[test]
    fn saturated_gates_are_finite() {
        let gate = Mat::new(1, 4, vec![-1e30, -200.0, 200.0, 1e30]);
        let ones = Mat::new(1, 4, vec![1.0; 4]);
        let [mut y, mut dgate, mut dup] = [0; 3].map(|_| Mat::poisoned(1, 4));
        swiglu_forward(y.view_mut(), gate.view(), ones.view()).unwrap();
        swiglu_backward(dgate.view_mut(), dup.view_mut(), ones.view(), gate.view(), ones.view()).unwrap();
        assert_eq!(y.values(), [0.0, 0.0, 200.0, 1e30]);
        assert_eq!(dgate.values(), [0.0, 0.0, 1.0, 1.0]);
        assert_eq!(dup.values(), [0.0, 0.0, 200.0, 1e30]);
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let n = 31;
        let [gate, up, dy] = [1, 2, 3].map(|seed| Mat::random(seed, 1, n, 2.0).f64());
        let [mut dgate, mut dup] = [0; 2].map(|_| vec![0.0; n]);
        backward_naive(&mut dgate, &mut dup, &dy, &gate, &up);
        let loss = |gate: &[f64], up: &[f64]| {
            let mut y = vec![0.0; n];
            forward_naive(&mut y, gate, up);
            inner(&y, &dy)
        };
        check_gradient("dgate", &gate, &dgate, |gate| loss(gate, &up));
        check_gradient("dup", &up, &dup, |up| loss(&gate, up));
    }

    #[test]
    fn forward_and_backward_equal_pytorch() {
        let golden = golden("swiglu");
        let [gate, up, dy] = ["gate", "up", "dy"].map(|name| golden.mat(name));
        let [mut y, mut dgate, mut dup] = [0; 3].map(|_| Mat::poisoned(gate.rows, gate.cols));
        swiglu_forward(y.view_mut(), gate.view(), up.view()).unwrap();
        swiglu_backward(dgate.view_mut(), dup.view_mut(), dy.view(), gate.view(), up.view()).unwrap();
        for (name, found) in [("y", y), ("dgate", dgate), ("dup", dup)] {
            assert_close(name, &found.values(), &golden.mat(name).values(), BACKWARD_TOLERANCE);
        }
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let mat = |rows, cols| Mat::random(1, rows, cols, 1.0);
        let error = swiglu_forward(mat(2, 3).view_mut(), mat(2, 4).view(), mat(2, 4).view()).unwrap_err();
        assert_eq!(error.to_string(), "swiglu_forward: columns of y is 3, expected 4");
        let error = swiglu_forward(mat(2, 4).view_mut(), mat(2, 4).view(), mat(3, 4).view()).unwrap_err();
        assert_eq!(error.to_string(), "swiglu_forward: rows of up is 3, expected 2");
        let (mut dgate, mut dup, same) = (mat(2, 4), mat(2, 5), mat(2, 4));
        let error = swiglu_backward(dgate.view_mut(), dup.view_mut(), same.view(), same.view(), same.view())
            .unwrap_err();
        assert_eq!(error.to_string(), "swiglu_backward: columns of dup is 5, expected 4");
    }

    #[test]
    #[ignore = "prints a timing"]
    fn timing() {
        let (rows, cols) = (2048, 1536);
        let [gate, up] = [1, 2].map(|seed| Mat::random(seed, rows, cols, 1.0));
        let [mut y, mut dup] = [0; 2].map(|_| Mat::poisoned(rows, cols));
        let forward = seconds(|| swiglu_forward(y.view_mut(), gate.view(), up.view()).unwrap());
        let backward = seconds(|| {
            swiglu_backward(y.view_mut(), dup.view_mut(), up.view(), gate.view(), up.view()).unwrap();
        });
        let giga = (rows * cols) as f64 / 1e9;
        println!(
            "swiglu {rows} x {cols}: {:.2} Gelem/s forward, {:.2} backward",
            giga / forward,
            giga / backward
        );
    }

    #[test]
    fn the_magnitudes_gradients_are_those_of_row_scale() {
        for (rows, cols) in [(1, 1), (7, 129), (33, 576)] {
            let [gate, up, dy] = [1, 2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0));
            let [scale0, scale1, start0, start1] = [4, 5, 6, 7].map(|seed| Mat::random(seed, 1, cols, 1.0));
            let [mut dgate, mut dup] = [0; 2].map(|_| Mat::poisoned(rows, cols));
            swiglu_backward(dgate.view_mut(), dup.view_mut(), dy.view(), gate.view(), up.view()).unwrap();
            let (mut d0, mut d1) = (start0.clone(), start1.clone());
            row_scale_backward(d0.view_mut(), dgate.view(), Output::Kept(gate.view()), scale0.view())
                .unwrap();
            row_scale_backward(d1.view_mut(), dup.view(), Output::Kept(up.view()), scale1.view()).unwrap();
            check_fast(
                "swiglu_backward_scaled",
                [
                    (Out::Set(rows, cols), &dgate.f64()),
                    (Out::Set(rows, cols), &dup.f64()),
                    (Out::Add(&start0), &d0.f64()),
                    (Out::Add(&start1), &d1.f64()),
                ],
                [&dy, &gate, &up, &scale0, &scale1],
                Tolerance { rel: 0.0, abs: 0.0 },
                |[dgate, dup, d0, d1], [dy, gate, up, scale0, scale1]| {
                    swiglu_backward_scaled(dgate, dup, [d0, d1], dy, gate, up, [scale0, scale1])
                },
            );
        }
    }

    #[test]
    fn the_cuda_twins_equal_the_naive_versions() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES {
            let n = rows * cols;
            let gate = Mat::random(1, rows, cols, 4.0).rounded();
            let [up, dy] = [2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0).rounded());
            let [mut y, mut dgate, mut dup] = [0; 3].map(|_| vec![0.0; n]);
            forward_naive(&mut y, &gate.f64(), &up.f64());
            backward_naive(&mut dgate, &mut dup, &dy.f64(), &gate.f64(), &up.f64());
            let gated = cuda::Gated {
                name: "swiglu",
                forward: swiglu_forward,
                backward: |[dgate, dup], [dy, gate, up]| swiglu_backward(dgate, dup, dy, gate, up),
                scaled: |[dgate, dup], dscales, [dy, gate, up], scales| {
                    swiglu_backward_scaled(dgate, dup, dscales, dy, gate, up, scales)
                },
            };
            cuda::check_gated(&device, [&gate, &up, &dy], [&y, &dgate, &dup], &gated);
        }
    }
}
