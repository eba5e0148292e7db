//! The gated activation of Gemma's feed-forward block: GELU in its tanh form instead of SiLU.
//!
//! Its CUDA kernels are the second instance of the templates in `swiglu.cu`.

use super::gated::{self, Activated, Gate};
use crate::cpu::math;
use crate::error::Result;
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "geglu_forward";
const BACKWARD: &str = "geglu_backward";
const FORWARD_SCALED: &str = "geglu_forward_scaled";
const SCALED: &str = "geglu_backward_scaled";

/// Multiplies `up` by the GELU of `gate`, in its tanh form.
///
/// y = gelu(gate) * up, gelu(g) = 0.5 g (1 + tanh(z)), z = sqrt(2 / pi) (g + 0.044715 g^3).
///
/// Shapes: all (T, C).
/// Accumulates: nothing, `y` is overwritten.
/// Precision: f32, as g * sigmoid(2 z); within 1e-6 of f64, relative, and 1e-7 |up| where gelu vanishes.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: Shazeer, arXiv 2002.05202, equation 6 (GEGLU); `gelu_pytorch_tanh` of transformers for the form.
pub fn geglu_forward(y: ViewMut, gate: View, up: View) -> Result<()> {
    gated::check_forward(FORWARD, &y, gate, up)?;
    if let Some(cuda) = y.cuda() {
        return gated::forward_cuda(FORWARD, &cuda, &y, gate, up);
    }
    gated::forward_fast::<Gelu>(FORWARD, y, gate, up)
}

/// [`geglu_forward`] of a gate and an up that have a factor per column yet to come; see
/// [`swiglu_forward_scaled`](super::swiglu::swiglu_forward_scaled).
///
/// Shapes: `y`, `gate`, `up` (T, C); `factors` (1, C) each.
/// Accumulates: nothing, `y` is overwritten.
/// Precision: as [`geglu_forward`], of products in f32.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: see [`geglu_forward`].
pub fn geglu_forward_scaled(y: ViewMut, gate: View, up: View, factors: [View; 2]) -> Result<()> {
    gated::check_forward(FORWARD_SCALED, &y, gate, up)?;
    gated::check_factors(FORWARD_SCALED, factors, gate)?;
    if let Some(cuda) = y.cuda() {
        return gated::forward_scaled_cuda(FORWARD_SCALED, &cuda, &y, [gate, up], factors);
    }
    gated::forward_scaled_fast::<Gelu>(FORWARD_SCALED, y, [gate, up], factors)
}

/// The gradients of [`geglu_forward`].
///
/// dgate = dy * up * (s + gate * s * (1 - s) * 2 z'), dup = dy * gate * s, s = sigmoid(2 z), z' = sqrt(2 / pi) (1 +
/// 0.134145 gate^2).
///
/// Shapes: all (T, C).
/// Accumulates: nothing, `dgate` and `dup` are overwritten.
/// Precision: f32; within 2e-6 of f64, relative to the largest term.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: derived from the formula above.
pub fn geglu_backward(dgate: ViewMut, dup: ViewMut, dy: View, gate: View, up: View) -> Result<()> {
    gated::check_gradients(BACKWARD, [&dgate, &dup], [dy, gate, up])?;
    if let Some(cuda) = dy.cuda() {
        return gated::backward_cuda(BACKWARD, BACKWARD, cuda, [&dgate, &dup], None, [dy, gate, up]);
    }
    gated::backward_fast::<Gelu>(BACKWARD, [dgate, dup], [dy, gate, up])
}

/// The gradients of [`geglu_forward_scaled`] and of what its factors are multiples of; see
/// [`swiglu_backward_scaled`](super::swiglu::swiglu_backward_scaled).
///
/// Shapes: `dgate`, `dup`, `dy`, `gate`, `up` (T, C); `factors`, `dscales`, `scales` (1, C) each.
/// Accumulates: `dscales` are added to; `dgate` and `dup` are overwritten.
/// Precision: as [`geglu_backward`] and [`row_scale_backward`](super::row_scale::row_scale_backward).
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: the two ops.
pub fn geglu_backward_scaled(
    dgate: ViewMut,
    dup: ViewMut,
    dscales: [ViewMut; 2],
    dy: View,
    gate: View,
    up: View,
    factors: [View; 2],
    scales: [View; 2],
) -> Result<()> {
    gated::check_gradients(SCALED, [&dgate, &dup], [dy, gate, up])?;
    gated::check_factors(SCALED, factors, gate)?;
    gated::check_scales(SCALED, &dscales, scales, gate)?;
    if let Some(cuda) = dy.cuda() {
        let (gradients, inputs, kernel) = ([&dgate, &dup], [dy, gate, up], "geglu_backward_columns");
        let dscales = dscales.each_ref();
        return gated::scaled_cuda(SCALED, kernel, cuda, gradients, None, dscales, inputs, factors, scales);
    }
    gated::backward_scaled_fast::<Gelu>(SCALED, [dgate, dup], dscales, [dy, gate, up], factors, scales)
}

// ------------------------------------------------------------------------------------------ CPU

/// 2 sqrt(2 / pi).
const TWICE_ROOT: f32 = 1.595_769_1;
/// The coefficient of the cube.
const CUBE: f32 = 0.044_715;
/// Beyond it the sigmoid is 0 or 1 in f32; the cube of a larger gate could overflow.
const SATURATED: f32 = 12.0;

#[cfg(test)]
fn gelu_naive(g: f64) -> (f64, f64) {
    let root = (2.0 / std::f64::consts::PI).sqrt();
    let tanh = (root * (g + 0.044715 * g.powi(3))).tanh();
    // gelu = 0.5 g (1 + tanh(z)), d tanh / dz = 1 - tanh^2
    let slope = 0.5 * (1.0 + tanh) + 0.5 * g * (1.0 - tanh * tanh) * root * (1.0 + 3.0 * 0.044715 * g * g);
    (0.5 * g * (1.0 + tanh), slope)
}

#[cfg(test)]
fn forward_naive(y: &mut [f64], gate: &[f64], up: &[f64]) {
    for i in 0..y.len() {
        y[i] = gelu_naive(gate[i]).0 * up[i];
    }
}

#[cfg(test)]
fn backward_naive(dgate: &mut [f64], dup: &mut [f64], dy: &[f64], gate: &[f64], up: &[f64]) {
    for i in 0..dy.len() {
        // y = gelu(gate) * up
        let (gelu, slope) = gelu_naive(gate[i]);
        dgate[i] = dy[i] * up[i] * slope;
        dup[i] = dy[i] * gelu;
    }
}

struct Gelu;

impl Gate for Gelu {
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "inlining carries the target features into it")]
    fn at(gate: f32) -> Activated {
        let g = gate.clamp(-SATURATED, SATURATED);
        let s = math::sigmoid(TWICE_ROOT * (g + CUBE * g * g * g));
        let inner = TWICE_ROOT * (1.0 + 3.0 * CUBE * g * g);
        Activated { value: gate * s, slope: s + gate * s * (1.0 - s) * inner }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Mat, Out, assert_close, check_fast, check_gradient, cuda, inner, tolerance};

    #[test]
    fn the_fast_versions_equal_the_naive_ones() {
        for (rows, cols) in [(1, 1), (1, 127), (7, 129), (129, 7), (33, 576), (0, 8)] {
            let n = rows * cols;
            let gate = Mat::random(1, rows, cols, 4.0);
            let [up, dy] = [2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0));
            let [mut y, mut dgate, mut dup] = [0; 3].map(|_| vec![0.0; n]);
            forward_naive(&mut y, &gate.f64(), &up.f64());
            backward_naive(&mut dgate, &mut dup, &dy.f64(), &gate.f64(), &up.f64());
            // The exponent of a small sigmoid has the rounding of its argument: 1e-6 where gelu is 1e-2 and less.
            let (what, close) = (format!("geglu {rows} x {cols}"), tolerance(2e-6, 2e-6));
            check_fast(&what, [(Out::Set(rows, cols), &y)], [&gate, &up], close, |[y], [gate, up]| {
                geglu_forward(y, gate, up)
            });
            check_fast(
                &what,
                [(Out::Set(rows, cols), &dgate), (Out::Set(rows, cols), &dup)],
                [&dy, &gate, &up],
                close,
                |[dgate, dup], [dy, gate, up]| geglu_backward(dgate, dup, dy, gate, up),
            );
        }
    }

    #[test]
    fn gelu_has_its_published_values_and_stays_finite() {
        // `torch.nn.functional.gelu(x, approximate="tanh")` of -1, 0, 1 and 3.
        let gate = Mat::new(1, 8, vec![-1.0, 0.0, 1.0, 3.0, -200.0, 200.0, -1e30, 1e30]);
        let ones = Mat::new(1, 8, vec![1.0; 8]);
        let [mut y, mut dgate, mut dup] = [0; 3].map(|_| Mat::poisoned(1, 8));
        geglu_forward(y.view_mut(), gate.view(), ones.view()).unwrap();
        geglu_backward(dgate.view_mut(), dup.view_mut(), ones.view(), gate.view(), ones.view()).unwrap();
        let expected = [-0.158_808, 0.0, 0.841_192, 2.996_362_7, 0.0, 200.0, 0.0, 1e30];
        assert_close("gelu", &y.values(), &expected, tolerance(1e-6, 1e-6));
        assert_eq!(dgate.values()[4..], [0.0, 1.0, 0.0, 1.0]);
        assert_eq!(dup.values()[4..], [0.0, 200.0, 0.0, 1e30]);
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
    fn the_cuda_twins_equal_the_naive_versions() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES {
            let gate = Mat::random(1, rows, cols, 4.0).rounded();
            let [up, dy] = [2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0).rounded());
            let gated = cuda::Gated {
                name: "geglu",
                forward_naive,
                backward_naive,
                forward: geglu_forward,
                forward_scaled: geglu_forward_scaled,
                backward: |[dgate, dup], [dy, gate, up]| geglu_backward(dgate, dup, dy, gate, up),
                scaled: |[dgate, dup], dscales, [dy, gate, up], factors, scales| {
                    geglu_backward_scaled(dgate, dup, dscales, dy, gate, up, factors, scales)
                },
            };
            cuda::check_gated(&device, [&gate, &up, &dy], &gated);
        }
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let mat = |rows, cols| Mat::random(1, rows, cols, 1.0);
        let error = geglu_forward(mat(2, 3).view_mut(), mat(2, 4).view(), mat(2, 4).view()).unwrap_err();
        assert_eq!(error.to_string(), "geglu_forward: columns of y is 3, expected 4");
        let (mut dgate, mut dup, same) = (mat(2, 4), mat(2, 5), mat(2, 4));
        let error = geglu_backward(dgate.view_mut(), dup.view_mut(), same.view(), same.view(), same.view())
            .unwrap_err();
        assert_eq!(error.to_string(), "geglu_backward: columns of dup is 5, expected 4");
    }
}
