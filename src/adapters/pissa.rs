//! PiSSA: the principal singular directions of W become the adapter, the rest becomes the frozen base
//! (Meng et al. 2024).
//!
//! `W = U S Vᵀ`; `B0 = U_r √(S_r / s)`, `A0 = √(S_r / s) V_rᵀ`, `W_res = W - s B0 A0`, stored as
//! `Q(W_res)` in the base's own block type. From then on the pair trains as LoRA's (or DoRA's) does, on
//! the residual; this file only splits. The split is computed once and written down (see `staged`): a
//! second SVD would give other factors, and a raw PiSSA pair fits no base but its own residual.

use qpeft_kernels::View;
use qpeft_kernels::svd::{SvdOptions, randomized_svd};

use super::lora::Lora;
use crate::error::Result;
use crate::model::linear::BaseWeight;

/// One linear, split.
#[derive(Debug)]
pub struct Split {
    /// `Q(W_res)`, in the base's block type.
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

/// Writes the principal factors of `weight` into the pair's place in `values`.
///
/// Shapes: weight (out, in); A (r, in), B (out, r). Precision: f32 randomized SVD of the dequantized
/// weight. Source: PEFT's `pissa_niter_N` for the convention (S divided by the scaling, its root on both
/// sides); factors are unique up to the sign of each pair.
///
/// # Errors
/// The rank exceeds the smaller side of the weight.
pub fn factorize(lora: &Lora, values: &mut [f32], weight: &BaseWeight, options: &SvdOptions) -> Result<()> {
    let (rows, cols, rank) = (weight.rows(), weight.cols(), lora.a.shape[0]);
    let dense = weight.dequantize();
    let svd = randomized_svd(View::from_slice(&dense, rows, cols), rank, options)?;
    let roots: Vec<f32> = svd.s.iter().map(|s| (s / lora.scaling).sqrt()).collect();
    for (a, (v, root)) in
        values[lora.a.range()].chunks_exact_mut(cols).zip(svd.v.chunks_exact(cols).zip(&roots))
    {
        a.iter_mut().zip(v).for_each(|(a, v)| *a = root * v);
    }
    for (b, u) in values[lora.b.range()].chunks_exact_mut(rank).zip(svd.u.chunks_exact(rank)) {
        b.iter_mut().zip(u).zip(&roots).for_each(|((b, u), root)| *b = u * root);
    }
    Ok(())
}

/// Takes `s B A` out of `weight` and packs the rest in the weight's own type.
///
/// # Errors
/// The residual is not finite.
pub fn split(lora: &Lora, values: &[f32], weight: &BaseWeight) -> Result<Split> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let dense = weight.dequantize();
    let mut residual = dense.clone();
    lora.add_product(-lora.scaling, 0..rows, &mut residual, values);
    let packed = weight.requantize(&residual)?;
    let mut stored = vec![0.0; rows * cols];
    packed.dequantize_rows(0..rows, &mut stored);
    let square = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let quantization = residual.iter().zip(&stored).map(|(r, q)| f64::from(r - q).powi(2)).sum();
    let error = SplitError { weight: square(&dense), residual: square(&residual), quantization };
    Ok(Split { residual: packed, error })
}
