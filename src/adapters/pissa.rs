//! PiSSA: the principal singular directions of W become the adapter, the rest becomes the frozen base
//! (Meng et al. 2024).
//!
//! `W = U S Vᵀ`; `B0 = U_r √(S_r / s)`, `A0 = √(S_r / s) V_rᵀ`, `W_res = W - s B0 A0`, stored as
//! `Q(W_res)` in the base's own block type, or in the one that was asked for. From then on the pair trains as
//! LoRA's (or DoRA's) does, on the residual; this file only splits. The split is computed once and written down (see `staged`): a
//! second SVD would give other factors, and a raw PiSSA pair fits no base but its own residual.
//!
//! Refined, the pair is taken out of `W - Q(W_res)` instead, what a pair must hold for nothing to be lost, and what it
//! leaves is rounded anew: the alternation that the paper calls T iterations of QPiSSA.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use qpeft_kernels::cuda::Cuda;
use qpeft_kernels::svd::{Remainder, SvdOptions, subtract, weight_svd};
use qpeft_kernels::weight::WeightType;
use qpeft_kernels::{Device, Dtype};

use crate::error::Result;
use crate::model::linear::BaseWeight;

/// The low-rank part of a split: s B A.
#[derive(Debug, Clone, PartialEq)]
pub struct Pair {
    /// (r, in).
    pub a: Vec<f32>,
    /// (out, r).
    pub b: Vec<f32>,
}

/// A linear to split.
#[derive(Debug)]
pub struct Job {
    /// W, in host memory.
    pub weight: BaseWeight,
    /// r.
    pub rank: usize,
    /// s.
    pub scaling: f32,
    /// The pair to take out, in place of the principal one.
    pub given: Option<Pair>,
    /// Type of the residual.
    pub residual: WeightType,
}

/// How the principal pairs are computed.
#[derive(Debug, Clone, Copy, Default)]
pub struct SplitOptions {
    /// The SVD.
    pub svd: SvdOptions,
    /// Rounds of refinement at most: a linear's end with the first that loses as much as the one before.
    pub refinements: usize,
}

/// One linear, split.
#[derive(Debug)]
pub struct Split {
    /// What was taken out.
    pub pair: Pair,
    /// `Q(W_res)`, in host memory.
    pub residual: BaseWeight,
    /// What the split costs and what it leaves.
    pub error: SplitError,
}

/// Squared Frobenius norms that tell how good a split is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SplitError {
    /// ‖W‖².
    pub weight: f64,
    /// ‖W_res‖²: what the low-rank pair does not hold.
    pub residual: f64,
    /// ‖W_res - Q(W_res)‖²: what no low-rank adapter on the original base can carry.
    pub quantization: f64,
}

impl std::ops::AddAssign for SplitError {
    fn add_assign(&mut self, other: SplitError) {
        self.weight += other.weight;
        self.residual += other.residual;
        self.quantization += other.quantization;
    }
}

impl SplitError {
    /// ‖W_res - Q(W_res)‖ / ‖W‖: how far (residual + pair) is from the original weight.
    pub fn relative_quantization(self) -> f64 {
        if self.weight == 0.0 { 0.0 } else { (self.quantization / self.weight).sqrt() }
    }

    /// Share of ‖W‖² that the low-rank pair holds.
    pub fn captured(self) -> f64 {
        if self.weight == 0.0 { 0.0 } else { 1.0 - self.residual / self.weight }
    }
}

/// The principal factors of `weight`, computed where it is.
///
/// Shapes: weight (out, in). Precision: f32 randomized SVD of the dequantized weight. Source: PEFT's `pissa_niter_N`
/// for the convention (S divided by the scaling, its root on both sides); factors are unique up to the sign of each pair.
///
/// # Errors
/// The rank exceeds the smaller side of the weight.
pub fn factorize(weight: &BaseWeight, rank: usize, scaling: f32, options: &SvdOptions) -> Result<Pair> {
    let svd = weight_svd(weight, rank, options)?;
    let roots: Vec<f32> = svd.s.iter().map(|s| (s / scaling).sqrt()).collect();
    let (mut a, mut b) = (svd.v, svd.u);
    for (a, root) in a.chunks_exact_mut(weight.cols().max(1)).zip(&roots) {
        for a in a {
            *a *= root;
        }
    }
    for b in b.chunks_exact_mut(rank) {
        b.iter_mut().zip(&roots).for_each(|(b, root)| *b *= root);
    }
    Ok(Pair { a, b })
}

/// Takes `s B A` out of `weight` and packs the rest in the type `to`, where the weight is.
///
/// # Errors
/// The residual is not finite, or its rows are not whole blocks of the type.
pub fn split(weight: &BaseWeight, pair: Pair, scaling: f32, to: WeightType) -> Result<Split> {
    let Remainder { packed, weight, remainder, quantization } =
        subtract(weight, &pair.b, &pair.a, scaling, to)?;
    let error = SplitError { weight, residual: remainder, quantization };
    Ok(Split { pair, residual: packed, error })
}

/// `W - Q(W_res)`, in host memory as both are.
fn without(weight: &BaseWeight, residual: &BaseWeight) -> Result<BaseWeight> {
    let mut rest = weight.dequantize();
    let mut row = vec![0.0; weight.cols()];
    for (i, rest) in rest.chunks_exact_mut(weight.cols().max(1)).enumerate() {
        residual.dequantize_rows(i..i + 1, &mut row);
        rest.iter_mut().zip(&row).for_each(|(w, q)| *w -= q);
    }
    Ok(BaseWeight::from_f32(weight.rows(), weight.cols(), &rest)?)
}

fn split_one(job: &Job, device: &Device, options: &SplitOptions) -> Result<Split> {
    let weight = job.weight.clone().to_device(device)?;
    if let Some(given) = &job.given {
        return split(&weight, given.clone(), job.scaling, job.residual);
    }
    let pair = factorize(&weight, job.rank, job.scaling, &options.svd)?;
    let mut best = split(&weight, pair, job.scaling, job.residual)?;
    for _ in 0..options.refinements {
        // As after a residual that is not rounded at all.
        if best.error.quantization == 0.0 {
            break;
        }
        let held = without(&job.weight, &best.residual)?.to_device(device)?;
        let pair = factorize(&held, job.rank, job.scaling, &options.svd)?;
        let next = split(&weight, pair, job.scaling, job.residual)?;
        if next.error.quantization >= best.error.quantization {
            break;
        }
        best = next;
    }
    Ok(best)
}

/// Splits all, on a device several at once: some compute on the host what others wait for on the device. Weights are
/// uploaded for their own split only.
///
/// `done` hears of every job by its number; on a device in any order.
///
/// # Errors
/// A rank exceeds its weight, a residual is not finite, or `done` refuses.
pub fn split_all(
    jobs: &[Job],
    device: &Device,
    options: &SplitOptions,
    mut done: impl FnMut(usize, Split) -> Result<()>,
) -> Result<()> {
    let Some(cuda) = device.cuda() else {
        return jobs.iter().enumerate().try_for_each(|(i, job)| done(i, split_one(job, device, options)?));
    };
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let (send, receive) = mpsc::sync_channel(1);
        for _ in 0..workers(cuda, jobs)? {
            let (send, next) = (send.clone(), &next);
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(job) = jobs.get(i) else { break };
                    // Nobody listens any more after an error.
                    if send.send((i, split_one(job, device, options))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(send);
        for (i, split) in receive {
            done(i, split?)?;
        }
        Ok(())
    })
}

/// Splits at once: as many as there are threads, if the device has memory for two f32 copies of each weight.
fn workers(cuda: &Cuda, jobs: &[Job]) -> Result<usize> {
    /// Beyond this the device is never idle.
    const MOST: usize = 16;
    let largest = jobs.iter().map(|job| job.weight.rows() * job.weight.cols()).max().unwrap_or(0);
    let need = 3 * largest * Dtype::F32.size();
    let (free, _) = cuda.free_memory()?;
    Ok(rayon::current_num_threads().min(MOST).min(jobs.len()).min(free / need.max(1)).max(1))
}

#[cfg(test)]
mod tests {
    use qpeft_kernels::rng::RngKey;

    use super::*;

    /// Some strong directions and a flat rest, in Q4_1.
    fn weight(rows: usize, cols: usize) -> BaseWeight {
        let random = |stream, n| {
            let mut values = vec![0.0; n];
            RngKey { seed: 5, stream }.fill_normal(&mut values, 1.0);
            values
        };
        let (b, a, mut w) = (random(1, rows * 2), random(2, 2 * cols), random(3, rows * cols));
        for (i, w) in w.iter_mut().enumerate() {
            let (row, col) = (i / cols, i % cols);
            *w += 4.0 * b[row * 2] * a[col] + 2.0 * b[row * 2 + 1] * a[cols + col];
        }
        BaseWeight::empty("q4_1".parse().unwrap(), rows, cols).unwrap().requantize(&w).unwrap()
    }

    fn split_with(weight: &BaseWeight, residual: &str, refinements: usize) -> Split {
        let residual = residual.parse().unwrap();
        let job = Job { weight: weight.clone(), rank: 4, scaling: 0.5, given: None, residual };
        split_one(&job, &Device::Cpu, &SplitOptions { svd: SvdOptions::default(), refinements }).unwrap()
    }

    /// |W - Q(W_res) - s B A|^2.
    fn lost(weight: &BaseWeight, split: &Split) -> f64 {
        let rest = without(weight, &split.residual).unwrap().dequantize();
        let (cols, rank) = (weight.cols(), 4);
        let product = |i: usize| -> f64 {
            (0..rank)
                .map(|r| {
                    f64::from(split.pair.b[i / cols * rank + r])
                        * f64::from(split.pair.a[r * cols + i % cols])
                })
                .sum()
        };
        rest.iter().enumerate().map(|(i, &x)| (f64::from(x) - 0.5 * product(i)).powi(2)).sum()
    }

    #[test]
    fn refinements_lose_less_each_and_say_what_they_lose() {
        let weight = weight(96, 128);
        let losses = [0, 1, 4].map(|refinements| {
            let split = split_with(&weight, "q4_1", refinements);
            let (told, found) = (split.error.quantization, lost(&weight, &split));
            assert!((told - found).abs() < 1e-5 * found, "{told}, found {found}");
            found
        });
        // Rank 4 of 96 holds the largest directions of what rounding loses: more than its share of it, 4 %.
        assert!(losses[1] < 0.96 * losses[0] && losses[2] < losses[1], "{losses:?}");
    }

    #[test]
    fn what_is_not_rounded_is_not_refined() {
        let weight = weight(32, 64);
        let [once, refined] = [0, 3].map(|refinements| split_with(&weight, "f32", refinements));
        assert_eq!((once.pair, once.error), (refined.pair, refined.error));
    }
}
