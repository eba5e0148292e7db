//! The gated activation of the feed-forward block.
//!
//! The backward pass recomputes the sigmoid: cheaper than to store it.

pub mod low_rank;

use super::gated::{self, Activated, Gate};
use crate::cpu::math;
use crate::cuda::Source;
use crate::error::{Result, check};
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "swiglu_forward";
const BACKWARD: &str = "swiglu_backward";
const FORWARD_SCALED: &str = "swiglu_forward_scaled";
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
    gated::check_forward(FORWARD, &y, gate, up)?;
    if let Some(cuda) = y.cuda() {
        return gated::forward_cuda(FORWARD, &cuda, &y, gate, up);
    }
    gated::forward_fast::<Silu>(FORWARD, y, gate, up)
}

/// [`swiglu_forward`] of a gate and an up that have a factor per column yet to come: those of DoRA's rows.
///
/// y = silu(diag(factors\[0\]) gate) * diag(factors\[1\]) up.
///
/// Shapes: `y`, `gate`, `up` (T, C); `factors` (1, C) each.
/// Accumulates: nothing, `y` is overwritten.
/// Precision: as [`swiglu_forward`], of products in f32.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: see [`swiglu_forward`].
pub fn swiglu_forward_scaled(y: ViewMut, gate: View, up: View, factors: [View; 2]) -> Result<()> {
    gated::check_forward(FORWARD_SCALED, &y, gate, up)?;
    gated::check_factors(FORWARD_SCALED, factors, gate)?;
    if let Some(cuda) = y.cuda() {
        return gated::forward_scaled_cuda(FORWARD_SCALED, &cuda, &y, [gate, up], factors);
    }
    gated::forward_scaled_fast::<Silu>(FORWARD_SCALED, y, [gate, up], factors)
}

/// The gradients of [`swiglu_forward`], and on the way its result once more, for who did not keep it.
///
/// dgate = dy * up * s * (1 + gate * (1 - s)), dup = dy * gate * s, s = sigmoid(gate); y = gate * s * up, if asked for.
///
/// Shapes: all (T, C). On CUDA `dgate`, `dup` and `y` may lie where `gate`, `up` and `dy` do, with the same strides.
/// Accumulates: nothing, `dgate`, `dup` and `y` are overwritten.
/// Precision: f32; within 2e-6 of f64, relative to the largest term. `y` has the bits that [`swiglu_forward`] gives it.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: derived from the formula above.
pub fn swiglu_backward(
    dgate: ViewMut,
    dup: ViewMut,
    y: Option<ViewMut>,
    dy: View,
    gate: View,
    up: View,
) -> Result<()> {
    gated::check_gradients(BACKWARD, [&dgate, &dup], [dy, gate, up])?;
    check_output(BACKWARD, y.as_ref(), gate)?;
    if let Some(cuda) = dy.cuda() {
        let kernel = if y.is_none() { BACKWARD } else { "swiglu_backward_output" };
        return gated::backward_cuda(BACKWARD, kernel, cuda, [&dgate, &dup], y.as_ref(), [dy, gate, up]);
    }
    gated::backward_fast::<Silu>(BACKWARD, [dgate, dup], [dy, gate, up])?;
    y.map_or(Ok(()), |y| gated::forward_fast::<Silu>(BACKWARD, y, gate, up))
}

/// The gradients of [`swiglu_forward_scaled`], on the way its result once more, and the gradients of what the factors are
/// multiples of, without another pass over both: where gate and up come from linears with magnitudes (DoRA), and a factor
/// is the magnitude over a constant.
///
/// dgate, dup, y as [`swiglu_backward`] by the products with the factors, then dgate and dup by what they are products of;
/// dscales\[0\]_n += sum_t dgate_tn gate_tn / scales\[0\]_n, dscales\[1\]_n += sum_t dup_tn up_tn / scales\[1\]_n, as
/// [`row_scale_backward`](super::row_scale::row_scale_backward), a scale of 0 included.
///
/// Shapes: `dgate`, `dup`, `y`, `dy`, `gate`, `up` (T, C), places as there; `factors`, `dscales`, `scales` (1, C) each.
/// Accumulates: `dscales` are added to; `dgate`, `dup` and `y` are overwritten.
/// Precision: as the two ops; on CUDA the sums are of gradients before they are rounded to bf16.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: the two ops.
pub fn swiglu_backward_scaled(
    dgate: ViewMut,
    dup: ViewMut,
    y: Option<ViewMut>,
    dscales: [ViewMut; 2],
    dy: View,
    gate: View,
    up: View,
    factors: [View; 2],
    scales: [View; 2],
) -> Result<()> {
    gated::check_gradients(SCALED, [&dgate, &dup], [dy, gate, up])?;
    check_output(SCALED, y.as_ref(), gate)?;
    gated::check_factors(SCALED, factors, gate)?;
    gated::check_scales(SCALED, &dscales, scales, gate)?;
    if let Some(cuda) = dy.cuda() {
        let (gradients, inputs) = ([&dgate, &dup], [dy, gate, up]);
        let kernel = if y.is_none() { "swiglu_backward_columns" } else { "swiglu_backward_columns_output" };
        return gated::scaled_cuda(
            SCALED,
            kernel,
            cuda,
            gradients,
            y.as_ref(),
            dscales.each_ref(),
            inputs,
            factors,
            scales,
        );
    }
    gated::backward_scaled_fast::<Silu>(SCALED, [dgate, dup], dscales, [dy, gate, up], factors, scales)?;
    y.map_or(Ok(()), |y| gated::forward_scaled_fast::<Silu>(SCALED, y, [gate, up], factors))
}

/// Like `gate`, if it is asked for.
fn check_output(op: &'static str, y: Option<&ViewMut>, gate: View) -> Result<()> {
    let Some(y) = y else { return Ok(()) };
    check(op, "rows of y", gate.rows, y.rows)?;
    check(op, "columns of y", gate.cols, y.cols)
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new(
    "swiglu.cu",
    concat!(
        "#line 1 \"gated.cuh\"\n",
        include_str!("gated.cuh"),
        "\n#line 1 \"swiglu.cu\"\n",
        include_str!("swiglu.cu"),
    ),
);

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn forward_naive(y: &mut [f64], gate: &[f64], up: &[f64]) {
    for i in 0..y.len() {
        y[i] = gate[i] / (1.0 + (-gate[i]).exp()) * up[i];
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

struct Silu;

impl Gate for Silu {
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "inlining carries the target features into it")]
    fn at(gate: f32) -> Activated {
        let s = math::sigmoid(gate);
        Activated { value: gate * s, slope: s * (1.0 + gate * (1.0 - s)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::row_scale::{Output, row_scale_backward};
    use crate::tensor::{Dtype, Tensor};
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
                |[dgate, dup], [dy, gate, up]| swiglu_backward(dgate, dup, None, dy, gate, up),
            );
            check_fast(
                &format!("{what} and its output"),
                [(Out::Set(rows, cols), &dgate), (Out::Set(rows, cols), &dup), (Out::Set(rows, cols), &y)],
                [&dy, &gate, &up],
                BACKWARD_TOLERANCE,
                |[dgate, dup, y], [dy, gate, up]| swiglu_backward(dgate, dup, Some(y), dy, gate, up),
            );
        }
    }

    #[test]
    fn saturated_gates_are_finite() {
        let gate = Mat::new(1, 4, vec![-1e30, -200.0, 200.0, 1e30]);
        let ones = Mat::new(1, 4, vec![1.0; 4]);
        let [mut y, mut dgate, mut dup] = [0; 3].map(|_| Mat::poisoned(1, 4));
        swiglu_forward(y.view_mut(), gate.view(), ones.view()).unwrap();
        swiglu_backward(dgate.view_mut(), dup.view_mut(), None, ones.view(), gate.view(), ones.view())
            .unwrap();
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
        swiglu_backward(dgate.view_mut(), dup.view_mut(), None, dy.view(), gate.view(), up.view()).unwrap();
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
        let error =
            swiglu_backward(dgate.view_mut(), dup.view_mut(), None, same.view(), same.view(), same.view())
                .unwrap_err();
        assert_eq!(error.to_string(), "swiglu_backward: columns of dup is 5, expected 4");
        let (mut dup, mut y, one) = (mat(2, 4), mat(3, 4), mat(1, 4));
        let (to, output, x) = ([&mut dgate, &mut dup].map(Mat::view_mut), Some(y.view_mut()), same.view());
        let [dgate, dup] = to;
        let error = swiglu_backward(dgate, dup, output, x, x, x).unwrap_err();
        assert_eq!(error.to_string(), "swiglu_backward: rows of y is 3, expected 2");
        let ([mut dgate, mut dup], mut y, mut sums) =
            ([0; 2].map(|_| mat(2, 4)), mat(2, 3), [0; 2].map(|_| mat(1, 4)));
        let [dgate, dup] = [&mut dgate, &mut dup].map(Mat::view_mut);
        let (output, sums) = (Some(y.view_mut()), sums.each_mut().map(Mat::view_mut));
        let error =
            swiglu_backward_scaled(dgate, dup, output, sums, x, x, x, [one.view(); 2], [one.view(); 2])
                .unwrap_err();
        assert_eq!(error.to_string(), "swiglu_backward_scaled: columns of y is 3, expected 4");
    }

    #[test]
    #[ignore = "prints a timing"]
    fn timing() {
        let (rows, cols) = (2048, 1536);
        let [gate, up] = [1, 2].map(|seed| Mat::random(seed, rows, cols, 1.0));
        let [mut y, mut dup] = [0; 2].map(|_| Mat::poisoned(rows, cols));
        let forward = seconds(|| swiglu_forward(y.view_mut(), gate.view(), up.view()).unwrap());
        let backward = seconds(|| {
            swiglu_backward(y.view_mut(), dup.view_mut(), None, up.view(), gate.view(), up.view()).unwrap();
        });
        let giga = (rows * cols) as f64 / 1e9;
        println!(
            "swiglu {rows} x {cols}: {:.2} Gelem/s forward, {:.2} backward",
            giga / forward,
            giga / backward
        );
    }

    /// `x` with its columns multiplied.
    fn scaled(x: &Mat, factors: &Mat) -> Mat {
        let (values, factors) = (x.values(), factors.values());
        Mat::new(
            x.rows,
            x.cols,
            values.iter().enumerate().map(|(i, x)| x * factors[i % factors.len()]).collect(),
        )
    }

    #[test]
    fn the_scaled_ops_are_those_of_products_and_of_row_scale() {
        for (rows, cols) in [(1, 1), (7, 129), (33, 576)] {
            let [gate, up, dy] = [1, 2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0));
            let [scale0, scale1, start0, start1, f0, f1] =
                [4, 5, 6, 7, 8, 9].map(|seed| Mat::random(seed, 1, cols, 1.0));
            let [mut dgate, mut dup, mut y] = [0; 3].map(|_| Mat::poisoned(rows, cols));
            let (x, z) = (scaled(&gate, &f0), scaled(&up, &f1));
            swiglu_forward(y.view_mut(), x.view(), z.view()).unwrap();
            swiglu_backward(dgate.view_mut(), dup.view_mut(), None, dy.view(), x.view(), z.view()).unwrap();
            let (dgate, dup) = (scaled(&dgate, &f0), scaled(&dup, &f1));
            let (mut d0, mut d1) = (start0.clone(), start1.clone());
            row_scale_backward(d0.view_mut(), dgate.view(), Output::Kept(gate.view()), scale0.view())
                .unwrap();
            row_scale_backward(d1.view_mut(), dup.view(), Output::Kept(up.view()), scale1.view()).unwrap();
            let exact = Tolerance { rel: 0.0, abs: 0.0 };
            let set = || Out::Set(rows, cols);
            let (dgate, dup, y, d0, d1) = (dgate.f64(), dup.f64(), y.f64(), d0.f64(), d1.f64());
            check_fast(
                "swiglu_forward_scaled",
                [(set(), &y)],
                [&gate, &up, &f0, &f1],
                exact,
                |[y], [gate, up, f0, f1]| swiglu_forward_scaled(y, gate, up, [f0, f1]),
            );
            let inputs = [&dy, &gate, &up, &f0, &f1, &scale0, &scale1];
            check_fast(
                "swiglu_backward_scaled",
                [(set(), &dgate), (set(), &dup), (Out::Add(&start0), &d0), (Out::Add(&start1), &d1)],
                inputs,
                exact,
                |[dgate, dup, d0, d1], [dy, gate, up, f0, f1, s0, s1]| {
                    swiglu_backward_scaled(dgate, dup, None, [d0, d1], dy, gate, up, [f0, f1], [s0, s1])
                },
            );
            check_fast(
                "swiglu_backward_scaled and its output",
                [
                    (set(), &dgate),
                    (set(), &dup),
                    (set(), &y),
                    (Out::Add(&start0), &d0),
                    (Out::Add(&start1), &d1),
                ],
                inputs,
                exact,
                |[dgate, dup, y, d0, d1], [dy, gate, up, f0, f1, s0, s1]| {
                    swiglu_backward_scaled(dgate, dup, Some(y), [d0, d1], dy, gate, up, [f0, f1], [s0, s1])
                },
            );
        }
    }

    #[test]
    fn the_cuda_twins_equal_the_naive_versions() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES {
            let gate = Mat::random(1, rows, cols, 4.0).rounded();
            let [up, dy] = [2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0).rounded());
            let gated = cuda::Gated {
                name: "swiglu",
                forward_naive,
                backward_naive,
                forward: swiglu_forward,
                forward_scaled: swiglu_forward_scaled,
                backward: |[dgate, dup], [dy, gate, up]| swiglu_backward(dgate, dup, None, dy, gate, up),
                scaled: |[dgate, dup], dscales, [dy, gate, up], factors, scales| {
                    swiglu_backward_scaled(dgate, dup, None, dscales, dy, gate, up, factors, scales)
                },
            };
            cuda::check_gated(&device, [&gate, &up, &dy], &gated);
        }
    }

    #[test]
    fn the_output_made_again_on_cuda_equals_the_naive_version() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES {
            let gate = Mat::random(1, rows, cols, 4.0).rounded();
            let [up, dy] = [2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0).rounded());
            let [mut y, mut dgate, mut dup] = [0; 3].map(|_| vec![0.0; rows * cols]);
            forward_naive(&mut y, &gate.f64(), &up.f64());
            backward_naive(&mut dgate, &mut dup, &dy.f64(), &gate.f64(), &up.f64());
            cuda::check_cuda(
                &device,
                &format!("swiglu {rows} x {cols} and its output"),
                [&dgate, &dup, &y].map(|expected| (Out::Set(rows, cols), Dtype::Bf16, expected.as_slice())),
                [&dy, &gate, &up].map(|input| (input, Dtype::Bf16)),
                Tolerance { rel: 0.0, abs: 0.0 },
                |[dgate, dup, y], [dy, gate, up]| swiglu_backward(dgate, dup, Some(y), dy, gate, up),
            );
        }
    }

    /// As a layer does it: y over dy, which has padding, and the gradients over gate and up.
    #[test]
    fn the_output_made_again_in_place_on_cuda_has_the_bits_of_the_forward_pass() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES {
            let put = |seed, width: usize| {
                let (mut tensor, _) = Tensor::with_padding(&device, rows, cols, &[width]).unwrap();
                tensor.write(&Mat::random(seed, rows, cols, 4.0).values()).unwrap();
                tensor
            };
            let ones = Mat::new(1, cols, vec![1.0; cols]);
            let run = |width: usize, scaled: bool, again: bool| {
                let (gate, up, dy, mut apart) = (put(1, 0), put(2, 0), put(3, width), put(4, width));
                let inputs = [dy.view(), gate.view(), up.view()];
                swiglu_forward(apart.view_mut(), gate.view(), up.view()).unwrap();
                let [mut dgate, mut dup, mut over] =
                    [&gate, &up, &dy].map(|input| input.in_place().expect("on a device"));
                let [[mut gate_sums, mut up_sums], scales] = [0; 2]
                    .map(|_| [0; 2].map(|_| Tensor::from_slice(&device, 1, cols, &ones.values()).unwrap()));
                let y = again.then(|| over.view_mut());
                let (to, up_to, [dy, gate, up]) = (dgate.view_mut(), dup.view_mut(), inputs);
                if scaled {
                    let sums = [gate_sums.view_mut(), up_sums.view_mut()];
                    let scales = scales.each_ref().map(Tensor::view);
                    swiglu_backward_scaled(to, up_to, y, sums, dy, gate, up, scales, scales).unwrap();
                } else {
                    swiglu_backward(to, up_to, y, dy, gate, up).unwrap();
                }
                let y = if again { &over } else { &apart };
                [&dgate, &dup, y, &gate_sums, &up_sums].map(|tensor| tensor.read().unwrap())
            };
            for (width, scaled) in [(0, false), (3, false), (0, true), (3, true)] {
                let same = run(width, scaled, false) == run(width, scaled, true);
                assert!(same, "swiglu {rows} x {cols}, padding {width}, scaled {scaled}: other bits");
            }
        }
    }
}
