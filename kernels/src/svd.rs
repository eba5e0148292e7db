//! The leading singular vectors of a matrix, for adapters that start from them (PiSSA), and what is left without them.
//!
//! [`randomized_svd`] is the one to use: block Krylov iteration reads W a few times with matrix products
//! and decomposes only the small projection. [`exact_svd`] decomposes W itself and is the reference.
//! [`weight_svd`] and [`subtract()`] take a packed weight and run where it is: in host memory (`svd/cpu.rs`) or on its
//! device (`svd/cuda.rs`, `svd/subtract.rs`). All are deterministic: counter-based random numbers, sums that do not depend
//! on the number of threads, and in each left vector the component of largest magnitude is positive. Devices differ from
//! each other in the last bits.

mod cpu;
mod cuda;
mod subtract;
#[cfg(test)]
mod tests;

pub use cpu::{exact_svd, randomized_svd};

use crate::cuda::Source;
use crate::error::{Error, Result, check};
use crate::rng::RngKey;
use crate::tensor::View;
use crate::weight::{BaseWeight, WeightType};

pub(crate) static SOURCE: Source = Source::new(
    "svd.cu",
    concat!(
        "#line 1 \"philox.cuh\"\n",
        include_str!("cuda/philox.cuh"),
        "\n#line 1 \"svd.cu\"\n",
        include_str!("svd/svd.cu"),
    ),
);

/// W ~ U diag(s) V: the R largest singular values and their vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRankSvd {
    /// Left vectors as columns, (N, R) row by row.
    pub u: Vec<f32>,
    /// Singular values, largest first.
    pub s: Vec<f32>,
    /// Right vectors as rows, (R, K) row by row.
    pub v: Vec<f32>,
}

/// How hard [`randomized_svd`] tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SvdOptions {
    /// Random directions beyond the rank.
    pub oversampling: usize,
    /// Applications of W W^T after the first; each reads W twice and adds a block to the subspace.
    pub iterations: usize,
    /// Seed of the random start.
    pub seed: u64,
}

impl Default for SvdOptions {
    /// Eight more directions and three iterations: the error exceeds the best possible by about 0.1 %
    /// of it on a spectrum with a flat tail, and by nothing visible on one that decays.
    fn default() -> SvdOptions {
        SvdOptions { oversampling: 8, iterations: 3, seed: 0 }
    }
}

impl SvdOptions {
    /// The random numbers of the start.
    fn start(&self) -> RngKey {
        RngKey { seed: self.seed, stream: 0x0073_7664 }
    }
}

/// The `rank` largest singular triples of a packed weight, nearly: [`randomized_svd`] where the weight is.
///
/// Shapes: `weight` (N, K); u (N, R); v (R, K).
/// Precision: on CUDA the subspace comes from products of bf16 operands, the projection onto it from f32 ones; vectors
/// are orthonormal within 1e-5. Weights that are small beside the rank, or of a lower one, are decomposed in host memory.
///
/// # Errors
/// A rank of 0 or above min(N, K), an element that is not finite, or the device refuses.
///
/// Source: as [`randomized_svd`]; orthonormalization by repeated Cholesky QR: Fukaya et al., arXiv 1809.11085.
pub fn weight_svd(weight: &BaseWeight, rank: usize, options: &SvdOptions) -> Result<LowRankSvd> {
    let (n, k) = (weight.rows(), weight.cols());
    check_rank("weight_svd", rank, n, k)?;
    if let Some(device) = weight.device()
        && let Some(svd) = cuda::randomized_svd(device, rank, options)?
    {
        return Ok(svd);
    }
    randomized_svd(View::from_slice(&weight.dequantize(), n, k), rank, options)
}

/// A weight without a low-rank product, packed again.
#[derive(Debug)]
pub struct Remainder {
    /// Q(W - s B A), in host memory.
    pub packed: BaseWeight,
    /// |W|^2.
    pub weight: f64,
    /// |W - s B A|^2.
    pub remainder: f64,
    /// |(W - s B A) - Q(W - s B A)|^2.
    pub quantization: f64,
}

/// Takes `scaling B A` out of a packed weight and packs the rest in the type `to`, where the weight is.
///
/// Shapes: `weight` (N, K), `b` (N, R), `a` (R, K), row by row.
/// Precision: f32 products; squares summed in f64; the packed rest has the bits of [`BaseWeight::requantize`] of it.
///
/// # Errors
/// Factors of another shape, rows that are not whole blocks of the type, an element of the rest that is not finite, or the device refuses.
///
/// Source: Meng et al., arXiv 2404.02948, section 3 (the residual model).
pub fn subtract(
    weight: &BaseWeight,
    b: &[f32],
    a: &[f32],
    scaling: f32,
    to: WeightType,
) -> Result<Remainder> {
    const OP: &str = "subtract";
    let (n, k) = (weight.rows(), weight.cols());
    let rank = b.len() / n.max(1);
    check(OP, "elements of b", n * rank, b.len())?;
    check(OP, "elements of a", rank * k, a.len())?;
    let like = weight.retyped(to)?;
    match weight.device() {
        Some(device) => subtract::on_cuda(device, b, a, scaling, &like),
        None => subtract::on_cpu(weight, b, a, scaling, &like),
    }
}

fn check_rank(op: &'static str, rank: usize, n: usize, k: usize) -> Result<()> {
    let limit = n.min(k);
    if rank == 0 || rank > limit { Err(Error::RankOutOfRange { op, rank, limit }) } else { Ok(()) }
}

/// Turns the vectors so that in each left one the component of largest magnitude, the first of these, is positive.
fn with_fixed_signs(mut svd: LowRankSvd, rank: usize) -> LowRankSvd {
    let mut largest = vec![0.0f32; rank];
    for row in svd.u.chunks_exact(rank) {
        for (largest, &x) in largest.iter_mut().zip(row) {
            *largest = if x.abs() > largest.abs() { x } else { *largest };
        }
    }
    let signs: Vec<f32> = largest.iter().map(|&x| if x < 0.0 { -1.0 } else { 1.0 }).collect();
    for row in svd.u.chunks_exact_mut(rank) {
        row.iter_mut().zip(&signs).for_each(|(x, sign)| *x *= sign);
    }
    let cols = svd.v.len() / rank;
    for (row, sign) in svd.v.chunks_exact_mut(cols.max(1)).zip(&signs) {
        for x in &mut *row {
            *x *= sign;
        }
    }
    svd
}
