//! The loss of a chunk of logits, and its gradient in the place of the logits.
//!
//! The caller passes the rows of supervised tokens only and adds up what comes back, so there is neither
//! an ignored index nor a mean here.

use rayon::prelude::*;

use crate::cpu::rows::{row, rows_per_task};
use crate::cpu::{by_isa, math};
use crate::cuda::{Arg, Cuda, Grid, Source};
use crate::error::{Error, Result, check};
use crate::ids::Ids;
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "cross_entropy_forward";
const FORWARD_BACKWARD: &str = "cross_entropy_forward_backward";

/// The negative log-likelihood of every token's target, for evaluation.
///
/// nll_t = ln sum_v exp(logits_tv) - logits_t,target(t).
///
/// Shapes: `nll` (1, T); `logits` (T, V); `targets` T numbers below V.
/// Accumulates: nothing, `nll` is overwritten.
/// Precision: f32, sums of exponentials in 32 partial sums per 4096 elements, added in f64; within 1e-6 of
/// f64, relative to the largest logit.
///
/// # Errors
/// Shapes that do not belong together, a target outside of the vocabulary, or no kernel for the device.
///
/// Source: the definition.
pub fn cross_entropy_forward<'a>(nll: ViewMut, logits: View, targets: impl Into<Ids<'a>>) -> Result<()> {
    let targets = targets.into();
    check_operands(FORWARD, nll.as_view(), logits, targets.host())?;
    if let Some(cuda) = logits.cuda() {
        return cuda_rows(FORWARD, cuda, &nll, logits, targets, None);
    }
    forward_fast(nll, logits, targets.host())
}

/// [`cross_entropy_forward`], and the gradient of `scale` times the sum of `nll` overwrites the logits.
///
/// logits_tv := (softmax(logits_t)_v - [v = target(t)]) scale, where `scale` is one over the number of supervised
/// tokens of the optimizer step.
///
/// Shapes: as [`cross_entropy_forward`].
/// Accumulates: nothing, `nll` is overwritten and `logits` replaced.
/// Precision: as [`cross_entropy_forward`]; the gradient within 1e-6 scale of f64.
///
/// # Errors
/// As [`cross_entropy_forward`].
///
/// Source: derived from the formula above; in place as in Hsu et al., arXiv 2410.10989, section 3.2.
pub fn cross_entropy_forward_backward<'a>(
    nll: ViewMut,
    logits: ViewMut,
    targets: impl Into<Ids<'a>>,
    scale: f32,
) -> Result<()> {
    let targets = targets.into();
    check_operands(FORWARD_BACKWARD, nll.as_view(), logits.as_view(), targets.host())?;
    if let Some(cuda) = logits.cuda() {
        return cuda_rows(FORWARD_BACKWARD, &cuda, &nll, logits.as_view(), targets, Some(scale));
    }
    forward_backward_fast(nll, logits, targets.host(), scale)
}

fn check_operands(op: &'static str, nll: View, logits: View, targets: &[u32]) -> Result<()> {
    check(op, "rows of nll", 1, nll.rows)?;
    check(op, "columns of nll (tokens)", logits.rows, nll.cols)?;
    check(op, "number of targets", logits.rows, targets.len())?;
    match targets.iter().find(|&&target| target as usize >= logits.cols) {
        Some(&target) => {
            Err(Error::IndexOutOfRange { op, what: "target", index: target as usize, limit: logits.cols })
        }
        None => Ok(()),
    }
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("cross_entropy.cu", include_str!("cross_entropy.cu"));

/// Threads of the block of a row.
const THREADS: usize = 1024;

/// The kernels have the names of the ops; the one with a scale writes the gradient over the logits.
fn cuda_rows(
    op: &'static str,
    cuda: &Cuda,
    nll: &ViewMut,
    logits: View,
    targets: Ids,
    scale: Option<f32>,
) -> Result<()> {
    if logits.rows == 0 {
        return Ok(());
    }
    let mut args = vec![
        Arg::Ptr(nll.f32(op)?),
        Arg::Ptr(logits.bf16(op)?),
        Arg::size(logits.stride),
        Arg::Ptr(targets.device(op)?),
        Arg::size(logits.cols),
    ];
    args.extend(scale.map(Arg::F32));
    cuda.launch(&SOURCE, op, Grid::of(logits.rows, THREADS), &args)
}

// ------------------------------------------------------------------------------------------ CPU

/// Elements whose exponentials are added in f32.
const SUM_BLOCK: usize = 4096;

#[cfg(test)]
fn forward_naive(nll: &mut [f64], logits: &[f64], targets: &[u32]) {
    let vocabulary = logits.len() / targets.len();
    for (t, &target) in targets.iter().enumerate() {
        let logits = &logits[t * vocabulary..][..vocabulary];
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
        nll[t] = sum.ln() + max - logits[target as usize];
    }
}

#[cfg(test)]
fn forward_backward_naive(nll: &mut [f64], logits: &mut [f64], targets: &[u32], scale: f64) {
    forward_naive(nll, logits, targets);
    let vocabulary = logits.len() / targets.len();
    for (t, &target) in targets.iter().enumerate() {
        let logits = &mut logits[t * vocabulary..][..vocabulary];
        // nll = ln sum exp(logits) - logits_target
        let log_sum = nll[t] + logits[target as usize];
        for x in logits.iter_mut() {
            *x = (*x - log_sum).exp() * scale;
        }
        logits[target as usize] -= scale;
    }
}

fn forward_fast(nll: ViewMut, logits: View, targets: &[u32]) -> Result<()> {
    let (cols, stride) = (logits.cols, logits.stride);
    let (nll, logits) = (nll.cpu(FORWARD)?, logits.cpu(FORWARD)?);
    nll.par_iter_mut()
        .zip(targets)
        .enumerate()
        .with_min_len(rows_per_task(cols))
        .for_each(|(t, (nll, &target))| *nll = forward_row(row(logits, t, cols, stride), target as usize));
    Ok(())
}

by_isa! {
    fn forward_row(logits: &[f32], target: usize) -> f32 {
        let max = math::max(logits);
        let mut sum = 0.0;
        for block in logits.chunks(SUM_BLOCK) {
            sum += math::sum_of_exp(block, max) as f64;
        }
        (sum.ln() + (max as f64 - logits[target] as f64)) as f32
    }
}

fn forward_backward_fast(nll: ViewMut, logits: ViewMut, targets: &[u32], scale: f32) -> Result<()> {
    let (cols, stride) = (logits.cols, logits.stride);
    let (nll, logits) = (nll.cpu(FORWARD_BACKWARD)?, logits.cpu(FORWARD_BACKWARD)?);
    // Without columns there is no valid target, hence no row.
    nll.par_iter_mut()
        .zip(logits.par_chunks_mut(stride.max(1)))
        .zip(targets)
        .with_min_len(rows_per_task(cols))
        .for_each(|((nll, logits), &target)| {
            *nll = forward_backward_row(&mut logits[..cols], target as usize, scale);
        });
    Ok(())
}

by_isa! {
    fn forward_backward_row(logits: &mut [f32], target: usize, scale: f32) -> f32 {
        let max = math::max(logits);
        let target_logit = logits[target];
        let mut sum = 0.0;
        for block in logits.chunks_mut(SUM_BLOCK) {
            sum += math::exp_and_sum(block, max) as f64;
        }
        let weight = (scale as f64 / sum) as f32;
        for x in logits.iter_mut() {
            *x *= weight;
        }
        logits[target] -= scale;
        (sum.ln() + (max as f64 - target_logit as f64)) as f32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::tensor::Tensor;
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, assert_close, check_fast, check_gradient, golden, seconds, tolerance};

    /// Targets that cover the vocabulary's ends, repeated.
    fn targets(tokens: usize, vocabulary: usize) -> Vec<u32> {
        (0..tokens).map(|t| [0, vocabulary - 1, t % vocabulary][t % 3] as u32).collect()
    }

    #[test]
    fn the_fast_versions_equal_the_naive_ones() {
        for (tokens, vocabulary) in [(1, 1), (1, 127), (7, 129), (129, 7), (3, 49152), (0, 8)] {
            for std in [1.0, 10.0, 1e4] {
                let logits = Mat::random(1, tokens, vocabulary, std);
                let targets = targets(tokens, vocabulary);
                let scale = 0.125;
                let (mut nll, mut dlogits) = (vec![0.0; tokens], logits.f64());
                if tokens > 0 {
                    forward_backward_naive(&mut nll, &mut dlogits, &targets, scale as f64);
                }
                let what = format!("cross_entropy {tokens} x {vocabulary}, logits of {std}");
                let close = tolerance(1e-6, 1e-6);
                check_fast(&what, [(Out::Set(1, tokens), &nll)], [&logits], close, |[nll], [logits]| {
                    cross_entropy_forward(nll, logits, &targets)
                });
                let outputs = [(Out::Set(1, tokens), &nll[..]), (Out::Add(&logits), &dlogits[..])];
                check_fast(&what, outputs, [], close, |[nll, logits], []| {
                    cross_entropy_forward_backward(nll, logits, &targets, scale)
                });
            }
        }
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let logits = Mat::random(1, 5, 9, 2.0).f64();
        let targets = targets(5, 9);
        let (mut nll, mut dlogits) = (vec![0.0; 5], logits.clone());
        forward_backward_naive(&mut nll, &mut dlogits, &targets, 0.2);
        check_gradient("cross_entropy", &logits, &dlogits, |logits| {
            let mut nll = vec![0.0; 5];
            forward_naive(&mut nll, logits, &targets);
            nll.iter().sum::<f64>() * 0.2
        });
    }

    #[test]
    fn loss_and_gradient_equal_pytorch() {
        let golden = golden("cross_entropy");
        let (mut logits, targets) = (golden.mat("logits"), golden.indices("targets"));
        let mut nll = Mat::poisoned(1, logits.rows);
        let scale = 1.0 / logits.rows as f32;
        cross_entropy_forward_backward(nll.view_mut(), logits.view_mut(), &targets, scale).unwrap();
        assert_close("nll", &nll.values(), &golden.mat("nll").values(), tolerance(1e-6, 1e-6));
        assert_close("dlogits", &logits.values(), &golden.mat("dlogits").values(), tolerance(1e-6, 1e-7));
    }

    #[test]
    fn a_nan_logit_makes_the_loss_nan() {
        let logits = Mat::new(1, 3, vec![0.0, f32::NAN, 1.0]);
        let mut nll = Mat::poisoned(1, 1);
        cross_entropy_forward(nll.view_mut(), logits.view(), &[0]).unwrap();
        assert!(nll.values()[0].is_nan());
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let forward = |tokens: usize, targets: &[u32]| {
            let (mut nll, logits) = (Mat::poisoned(1, tokens), Mat::random(1, 2, 5, 1.0));
            cross_entropy_forward(nll.view_mut(), logits.view(), targets).unwrap_err().to_string()
        };
        assert_eq!(forward(2, &[4, 5]), "cross_entropy_forward: target 5 is outside of 0..5");
        assert_eq!(forward(2, &[4]), "cross_entropy_forward: number of targets is 1, expected 2");
        assert_eq!(forward(3, &[4, 4]), "cross_entropy_forward: columns of nll (tokens) is 3, expected 2");
        let (mut nll, mut logits) = (Mat::poisoned(2, 1), Mat::random(1, 2, 5, 1.0));
        let error =
            cross_entropy_forward_backward(nll.view_mut(), logits.view_mut(), &[0, 0], 1.0).unwrap_err();
        assert_eq!(error.to_string(), "cross_entropy_forward_backward: rows of nll is 2, expected 1");
    }

    #[test]
    #[ignore = "prints a timing"]
    fn timing() {
        let (tokens, vocabulary) = (256, 49152);
        let mut logits = Mat::random(1, tokens, vocabulary, 1.0);
        let (mut nll, targets) = (Mat::poisoned(1, tokens), targets(tokens, vocabulary));
        let forward = seconds(|| cross_entropy_forward(nll.view_mut(), logits.view(), &targets).unwrap());
        let both = seconds(|| {
            cross_entropy_forward_backward(nll.view_mut(), logits.view_mut(), &targets, 1.0).unwrap();
        });
        let giga = (tokens * vocabulary) as f64 / 1e9;
        println!(
            "cross_entropy {tokens} x {vocabulary}: {:.2} Gelem/s forward, {:.2} forward and backward",
            giga / forward,
            giga / both
        );
    }

    #[test]
    fn the_cuda_twins_equal_the_naive_versions() {
        let Some(device) = cuda::device() else { return };
        let long = [(2, 49152), (1, 128_256), (3, 50_257), (2, 262_144)];
        for (tokens, vocabulary) in cuda::SHAPES.into_iter().chain(long) {
            for std in [1.0, 10.0, 1e4] {
                let logits = Mat::random(1, tokens, vocabulary, std).rounded();
                let targets = targets(tokens, vocabulary);
                let ids = cuda::ids(&device, &targets);
                let scale = 0.125;
                let (mut nll, mut dlogits) = (vec![0.0; tokens], logits.f64());
                if tokens > 0 {
                    forward_backward_naive(&mut nll, &mut dlogits, &targets, scale as f64);
                }
                let what = format!("cross_entropy {tokens} x {vocabulary}, logits of {std}");
                // Relative to the largest logit, about 5 deviations.
                let close = tolerance(2e-6, 5e-6 * std as f64);
                let outputs = [(Out::Set(1, tokens), F32, &nll[..])];
                check_cuda(&device, &what, outputs, [(&logits, Bf16)], close, |[nll], [logits]| {
                    cross_entropy_forward(nll, logits, ids.ids())
                });
                let outputs = [(Out::Set(1, tokens), F32, &nll[..]), (Out::Add(&logits), Bf16, &dlogits[..])];
                check_cuda(&device, &what, outputs, [], close, |[nll, logits], []| {
                    cross_entropy_forward_backward(nll, logits, ids.ids(), scale)
                });
            }
        }
    }

    #[test]
    fn on_cuda_a_nan_logit_makes_the_loss_nan_and_minus_infinity_counts_as_nothing() {
        let Some(device) = cuda::device() else { return };
        let ids = cuda::ids(&device, &[0]);
        let nll = |values: Vec<f32>| {
            let mut logits = Tensor::activations(&device, 1, values.len()).unwrap();
            logits.write(&values).unwrap();
            let mut nll = Tensor::zeros(&device, 1, 1).unwrap();
            cross_entropy_forward(nll.view_mut(), logits.view(), ids.ids()).unwrap();
            nll.read().unwrap()[0]
        };
        for columns in [3, 64] {
            let mut values = vec![0.0; columns];
            values[2] = f32::NAN;
            assert!(nll(values.clone()).is_nan());
            values[1..].fill(f32::NEG_INFINITY);
            assert_eq!(nll(values), 0.0);
        }
    }
}
