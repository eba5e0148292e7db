//! The optimizer step on a flat buffer of parameters. No backward: nothing is differentiated through it.

use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::rows::{pieces, rows_per_task};
use crate::cuda::{Arg, Cuda, Source, spans};
use crate::error::{Result, check};
use crate::ops::convert::convert;
use crate::tensor::{View, ViewMut};

const OP: &str = "adamw_update";
const CLIPPED: &str = "adamw_update_clipped";

/// The constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled: multiplied by the learning rate, not by the gradient's scale.
    pub weight_decay: f32,
}

impl Default for AdamW {
    /// The defaults of `torch.optim.AdamW`, except for no weight decay.
    fn default() -> AdamW {
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// One AdamW step with decoupled weight decay.
///
/// g = grad_scale grads; p -= lr weight_decay p; m += (1 - beta1) (g - m); v = beta2 v + (1 - beta2) g^2;
/// p -= lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps). Steps count from 1; `grad_scale` is the
/// factor of [`super::global_norm::clip_factor`], 1 without clipping.
///
/// Shapes: all alike, usually one row.
/// Accumulates: `params`, `m` and `v` are updated in place; `m` and `v` start as zeros.
/// Precision: f32 in the order of operations above, constants and bias corrections in f64 and then rounded.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; the single-tensor path of `torch.optim.AdamW`
/// for the order of operations.
pub fn adamw_update(
    params: ViewMut,
    m: ViewMut,
    v: ViewMut,
    grads: View,
    hyper: &AdamW,
    lr: f32,
    step: u64,
    grad_scale: f32,
) -> Result<()> {
    check_operands(OP, &params, &m, &v, grads)?;
    let factors = Factors::new(hyper, lr, step, grad_scale);
    if let Some(cuda) = params.cuda() {
        return update_cuda(OP, &cuda, [&params, &m, &v], None, grads, None, factors);
    }
    update_fast(params, m, v, grads, factors)
}

/// [`adamw_update`] with what [`global_norm_clip`](super::global_norm::global_norm_clip) left, and a copy of the new
/// parameters in the type that products read.
///
/// With clip = (norm, factor, unusable): nothing changes if `unusable` is not 0; else [`adamw_update`] with
/// `grad_scale` = factor, and copy = p.
///
/// Shapes: all alike, usually one row; `clip` (1, 3).
/// Accumulates: `params`, `m` and `v` are updated in place, `copy` is overwritten.
/// Precision: as [`adamw_update`]; `copy` is rounded to nearest.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: see [`adamw_update`].
pub fn adamw_update_clipped(
    mut params: ViewMut,
    m: ViewMut,
    v: ViewMut,
    copy: Option<ViewMut>,
    grads: View,
    clip: View,
    hyper: &AdamW,
    lr: f32,
    step: u64,
) -> Result<()> {
    check_operands(CLIPPED, &params, &m, &v, grads)?;
    check(CLIPPED, "rows of clip", 1, clip.rows)?;
    check(CLIPPED, "columns of clip", 3, clip.cols)?;
    if let Some(copy) = &copy {
        check(CLIPPED, "rows of copy", grads.rows, copy.rows)?;
        check(CLIPPED, "columns of copy", grads.cols, copy.cols)?;
    }
    let factors = Factors::new(hyper, lr, step, 1.0);
    if let Some(cuda) = params.cuda() {
        return update_cuda(CLIPPED, &cuda, [&params, &m, &v], copy.as_ref(), grads, Some(clip), factors);
    }
    let clip = clip.cpu(CLIPPED)?;
    if clip[2] != 0.0 {
        return Ok(());
    }
    update_fast(params.reborrow(), m, v, grads, Factors { grad_scale: clip[1], ..factors })?;
    match copy {
        Some(copy) => convert(copy, params.as_view()),
        None => Ok(()),
    }
}

fn check_operands(op: &'static str, params: &ViewMut, m: &ViewMut, v: &ViewMut, grads: View) -> Result<()> {
    let operands = [
        ("rows of params", "columns of params", params.as_view()),
        ("rows of m", "columns of m", m.as_view()),
        ("rows of v", "columns of v", v.as_view()),
    ];
    for (rows, columns, operand) in operands {
        check(op, rows, grads.rows, operand.rows)?;
        check(op, columns, grads.cols, operand.cols)?;
    }
    Ok(())
}

/// What is the same for all elements of a step.
#[derive(Debug, Clone, Copy)]
struct Factors {
    grad_scale: f32,
    /// 1 - lr weight_decay.
    keep: f32,
    /// 1 - beta1.
    blend: f32,
    beta2: f32,
    /// 1 - beta2.
    blend2: f32,
    /// sqrt(1 - beta2^step).
    correction2: f32,
    eps: f32,
    /// lr / (1 - beta1^step).
    step_size: f32,
}

impl Factors {
    fn new(hyper: &AdamW, lr: f32, step: u64, grad_scale: f32) -> Factors {
        let (beta1, beta2, lr) = (hyper.beta1 as f64, hyper.beta2 as f64, lr as f64);
        let steps = step as f64;
        Factors {
            grad_scale,
            keep: (1.0 - lr * hyper.weight_decay as f64) as f32,
            blend: (1.0 - beta1) as f32,
            beta2: hyper.beta2,
            blend2: (1.0 - beta2) as f32,
            correction2: (1.0 - beta2.powf(steps)).sqrt() as f32,
            eps: hyper.eps,
            step_size: (lr / (1.0 - beta1.powf(steps))) as f32,
        }
    }
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("adamw.cu", include_str!("adamw.cu"));

fn update_cuda(
    op: &'static str,
    cuda: &Cuda,
    [params, m, v]: [&ViewMut; 3],
    copy: Option<&ViewMut>,
    grads: View,
    clip: Option<View>,
    f: Factors,
) -> Result<()> {
    let copy_stride = copy.map_or(grads.stride, |copy| copy.stride);
    let strides = [params.stride, m.stride, v.stride, copy_stride, grads.stride];
    let (rows, cols, strides) = spans::flat(grads.rows, grads.cols, strides);
    let grid = spans::grid(op, rows, cols, 1)?;
    let args = [
        Arg::Ptr(params.f32(op)?),
        Arg::size(strides[0]),
        Arg::Ptr(m.f32(op)?),
        Arg::size(strides[1]),
        Arg::Ptr(v.f32(op)?),
        Arg::size(strides[2]),
        Arg::Ptr(copy.map_or(Ok(0), |copy| copy.bf16(op))?),
        Arg::size(strides[3]),
        Arg::Ptr(grads.f32(op)?),
        Arg::size(strides[4]),
        Arg::Ptr(clip.map_or(Ok(0), |clip| clip.f32(op))?),
        Arg::size(rows),
        Arg::size(cols),
        Arg::F32(f.grad_scale),
        Arg::F32(f.keep),
        Arg::F32(f.blend),
        Arg::F32(f.beta2),
        Arg::F32(f.blend2),
        Arg::F32(f.correction2),
        Arg::F32(f.eps),
        Arg::F32(f.step_size),
    ];
    cuda.launch(&SOURCE, "adamw_update", grid, &args)
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn update_naive(
    params: &mut [f64],
    m: &mut [f64],
    v: &mut [f64],
    grads: &[f64],
    hyper: &AdamW,
    lr: f64,
    step: i32,
    grad_scale: f64,
) {
    let [beta1, beta2, eps, decay] =
        [hyper.beta1, hyper.beta2, hyper.eps, hyper.weight_decay].map(|x| x as f64);
    for i in 0..params.len() {
        let g = grads[i] * grad_scale;
        m[i] = beta1 * m[i] + (1.0 - beta1) * g;
        v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
        let m_hat = m[i] / (1.0 - beta1.powi(step));
        let v_hat = v[i] / (1.0 - beta2.powi(step));
        params[i] -= lr * (m_hat / (v_hat.sqrt() + eps) + decay * params[i]);
    }
}

fn update_fast(params: ViewMut, m: ViewMut, v: ViewMut, grads: View, factors: Factors) -> Result<()> {
    let (cols, strides) = (grads.cols, [params.stride, m.stride, v.stride, grads.stride]);
    let (params, m, v, grads) = (params.cpu(OP)?, m.cpu(OP)?, v.cpu(OP)?, grads.cpu(OP)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [p_stride, m_stride, v_stride, g_stride] = walk.strides;
    params
        .par_chunks_mut(p_stride)
        .zip(m.par_chunks_mut(m_stride))
        .zip(v.par_chunks_mut(v_stride))
        .enumerate()
        .with_min_len(rows_per_task(walk.cols))
        .for_each(|(i, ((p, m), v))| {
            let n = p.len().min(walk.cols);
            update_piece(&mut p[..n], &mut m[..n], &mut v[..n], &grads[i * g_stride..][..n], factors);
        });
    Ok(())
}

by_isa! {
    fn update_piece(p: &mut [f32], m: &mut [f32], v: &mut [f32], grads: &[f32], f: Factors) {
        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(grads) {
            let g = g * f.grad_scale;
            let kept = *p * f.keep;
            *m += f.blend * (g - *m);
            *v = *v * f.beta2 + f.blend2 * g * g;
            let denominator = v.sqrt() / f.correction2 + f.eps;
            *p = kept - f.step_size * (*m / denominator);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::global_norm::{clip_factor, global_norm};
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, assert_close, check_fast, golden, seconds, tolerance};

    const HYPER: AdamW = AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };

    #[test]
    fn the_fast_version_equals_the_naive_one() {
        for (rows, cols) in [(1, 1), (1, 127), (7, 129), (129, 7), (1, 20_000), (0, 8)] {
            let [params, m, grads] = [1, 2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0));
            let v = Mat::new(rows, cols, m.values().iter().map(|m| m * m).collect());
            for step in [1, 2, 1000] {
                let [mut p64, mut m64, mut v64] = [&params, &m, &v].map(Mat::f64);
                update_naive(&mut p64, &mut m64, &mut v64, &grads.f64(), &HYPER, 1e-3, step, 0.5);
                check_fast(
                    &format!("adamw_update {rows} x {cols}, step {step}"),
                    [(Out::Add(&params), &p64), (Out::Add(&m), &m64), (Out::Add(&v), &v64)],
                    [&grads],
                    tolerance(1e-6, 3e-7),
                    |[p, m, v], [grads]| adamw_update(p, m, v, grads, &HYPER, 1e-3, step as u64, 0.5),
                );
            }
        }
    }

    #[test]
    fn ten_clipped_steps_equal_pytorch() {
        let golden = golden("adamw");
        let [mut params, grads, lrs, norms] = ["start", "grads", "lrs", "norms"].map(|name| golden.mat(name));
        let expected = golden.mat("params");
        let n = params.cols;
        let [mut m, mut v] = [0; 2].map(|_| Mat::new(1, n, vec![0.0; n]));
        for step in 0..10 {
            let grads = grads.view().row_range(step, 1);
            let norm = global_norm(grads).unwrap();
            assert_close("norm", &[norm], &norms.values()[step..=step], tolerance(1e-6, 0.0));
            let lr = lrs.values()[step];
            let (p, m, v) = (params.view_mut(), m.view_mut(), v.view_mut());
            adamw_update(p, m, v, grads, &HYPER, lr, step as u64 + 1, clip_factor(norm, 1.0)).unwrap();
            let row = expected.view().row_range(step, 1).cpu("test").unwrap();
            // Parameters of magnitude 1 and updates of 1e-3: a few roundings per step.
            assert_close(&format!("step {step}"), &params.values(), row, tolerance(5e-7, 5e-8));
        }
        assert_close("m", &m.values(), &golden.mat("m").values(), tolerance(2e-6, 1e-8));
        // 0.999 as f32 is off by 1.3e-8, which is 1.3e-5 of 1 - beta2; the bias correction cancels it.
        assert_close("v", &v.values(), &golden.mat("v").values(), tolerance(2e-5, 0.0));
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let update = |m: usize, v: usize, grads: usize| {
            let [mut p, mut m, mut v, grads] = [4, m, v, grads].map(|cols| Mat::random(1, 1, cols, 1.0));
            let (p, m, v) = (p.view_mut(), m.view_mut(), v.view_mut());
            adamw_update(p, m, v, grads.view(), &HYPER, 1e-3, 1, 1.0).unwrap_err().to_string()
        };
        assert_eq!(update(4, 4, 5), "adamw_update: columns of params is 4, expected 5");
        assert_eq!(update(3, 4, 4), "adamw_update: columns of m is 3, expected 4");
        assert_eq!(update(4, 3, 4), "adamw_update: columns of v is 3, expected 4");
    }

    #[test]
    #[ignore = "prints a timing"]
    fn timing() {
        let n = 5_000_000;
        let [mut p, mut m, grads] = [1, 2, 3].map(|seed| Mat::random(seed, 1, n, 1.0));
        let mut v = Mat::new(1, n, vec![1.0; n]);
        let time = seconds(|| {
            let (p, m, v) = (p.view_mut(), m.view_mut(), v.view_mut());
            adamw_update(p, m, v, grads.view(), &HYPER, 1e-3, 1, 1.0).unwrap();
        });
        println!("adamw {n}: {:.2} Gelem/s, {:.1} GB/s", n as f64 / time / 1e9, 28.0 * n as f64 / time / 1e9);
    }

    #[test]
    fn the_clipped_update_copies_the_parameters_and_leaves_them_alone_where_the_norm_is_not_finite() {
        let [params, m, grads] = [1, 2, 3].map(|seed| Mat::random(seed, 7, 129, 1.0));
        let v = Mat::new(7, 129, m.values().iter().map(|m| m * m).collect());
        let [mut p, mut m1, mut v1] = [&params, &m, &v].map(Mat::clone);
        adamw_update(p.view_mut(), m1.view_mut(), v1.view_mut(), grads.view(), &HYPER, 1e-3, 3, 0.5).unwrap();
        for unusable in [0.0, 1.0] {
            let clip = Mat::new(1, 3, vec![9.0, 0.5, unusable]);
            let copy = Mat::new(7, 129, vec![8.0; 7 * 129]);
            let expected = if unusable == 0.0 { [&p, &m1, &v1, &p] } else { [&params, &m, &v, &copy] };
            let expected = expected.map(Mat::f64);
            check_fast(
                "adamw_update_clipped",
                [
                    (Out::Add(&params), &expected[0]),
                    (Out::Add(&m), &expected[1]),
                    (Out::Add(&v), &expected[2]),
                    (Out::Add(&copy), &expected[3]),
                ],
                [&grads, &clip],
                tolerance(0.0, 0.0),
                |[p, m, v, copy], [grads, clip]| {
                    adamw_update_clipped(p, m, v, Some(copy), grads, clip, &HYPER, 1e-3, 3)
                },
            );
        }
    }

    #[test]
    fn the_cuda_twin_equals_the_naive_version_and_writes_the_copy() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES {
            let [params, m, grads] = [1, 2, 3].map(|seed| Mat::random(seed, rows, cols, 1.0));
            let v = Mat::new(rows, cols, m.values().iter().map(|m| m * m).collect());
            for (step, unusable) in [(1, 0.0), (1000, 0.0), (2, 1.0)] {
                let [mut p64, mut m64, mut v64] = [&params, &m, &v].map(Mat::f64);
                if unusable == 0.0 {
                    update_naive(&mut p64, &mut m64, &mut v64, &grads.f64(), &HYPER, 1e-3, step, 0.5);
                }
                let clip = Mat::new(1, 3, vec![9.0, 0.5, unusable]);
                // Untouched, it is what it was.
                let copy = params.rounded();
                check_cuda(
                    &device,
                    &format!("adamw_update_clipped {rows} x {cols}, step {step}"),
                    [
                        (Out::Add(&params), F32, &p64),
                        (Out::Add(&m), F32, &m64),
                        (Out::Add(&v), F32, &v64),
                        (Out::Add(&copy), Bf16, &p64),
                    ],
                    [(&grads, F32), (&clip, F32)],
                    tolerance(1e-6, 3e-7),
                    |[p, m, v, copy], [grads, clip]| {
                        adamw_update_clipped(p, m, v, Some(copy), grads, clip, &HYPER, 1e-3, step as u64)
                    },
                );
            }
        }
    }
}
