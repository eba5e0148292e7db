//! Row norms of W + s B A without the sum: what DoRA divides by, once per optimizer step.
//!
//! There is no backward: DoRA treats the norm as a constant (section 4.3), and so does PEFT.

pub(crate) mod packed;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;

use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::gemm::Mat;
use crate::cpu::scratch::with_scratch;
use crate::cuda::gemm::Matrix;
use crate::cuda::{Arg, Cuda, Grid, Source};
use crate::error::{Error, Result, check};
use crate::ops::fold::{fold_branch, fold_row_factor};
use crate::ops::quant_linear::{for_each_tile, quant_linear_forward};
use crate::tensor::{Dtype, View, ViewMut};
use crate::weight::{BaseWeight, DeviceWeight};

const FORWARD: &str = "row_norm_forward";

/// The Euclidean length of every row of W + s B A, in factored form.
///
/// norm_n = sqrt(|W_n|^2 + 2 s B_n . (W A^T)_n + s^2 B_n (A A^T) B_n^T).
///
/// Where B A nearly cancels W (the sum is below a thousandth of |W_n|^2 + s^2 |(B A)_n|^2) the three
/// terms have lost their leading digits, and the row itself is built and measured.
///
/// Shapes: `norm`, `w_squared` (1, N), the latter from
/// [`row_norms_squared`](BaseWeight::row_norms_squared); `wa` (R, N) = A W^T, a
/// [`quant_linear_forward`] of A; `a` (R, K); `b` (N, R);
/// `weight` (N, K).
/// Accumulates: nothing, `norm` is overwritten.
/// Precision: sums in f64 over f32 operands; within 1e-6 of f64, relative, and within 1e-4 near the
/// cancellation limit.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: Liu et al. (DoRA), arXiv 2402.09353, equation 5 and section 4.3; the square multiplied out.
pub fn row_norm_forward(
    norm: ViewMut,
    w_squared: View,
    wa: View,
    a: View,
    b: View,
    scaling: f32,
    weight: &BaseWeight,
) -> Result<()> {
    let operands = Operands { w_squared, a, b, scaling };
    check_operands(&norm, &operands, weight)?;
    check(FORWARD, "rows of wa", a.rows, wa.rows)?;
    check(FORWARD, "columns of wa", weight.rows(), wa.cols)?;
    if let Some(cuda) = norm.cuda() {
        let device = format!("{} with W A^T made before", cuda.name());
        return Err(Error::NoKernel { op: FORWARD, device });
    }
    forward_fast(norm.cpu(FORWARD)?, operands, wa, weight)
}

/// [`row_norm_forward`] with the product W A^T made on the way: on CUDA one kernel reads the rows once: those of a copy or of
/// a weight that is bf16 itself, or the packed ones (up to rank 16, a multiple of 32 columns, aligned A, no rounding to f16),
/// else those that were dequantized into scratch.
///
/// Shapes: as [`row_norm_forward`]. `a` is of the type of activations.
/// `folded`: the row scale g that a copy of the weight on the device has in its rows, if there is such a copy; then
/// its rows, divided by g, serve. A row of g = 0 keeps |W|^2 + s^2 |B A|^2: its factor m / norm stays 0.
/// Accumulates: nothing, `norm` is overwritten.
/// Precision: as [`row_norm_forward`]. On CUDA W and A enter as bf16, which moves a norm by about 1e-5 of itself where
/// B A is a tenth of W. Up to rank 16, where rows are aligned and a multiple of 32 columns: W A^T and A A^T are summed
/// in f32 over all columns, which leaves |B A|^2 an error of about 1e-6 of |B|^2 |A|^2 (tensor cores truncate); B is
/// taken as it is. Else B enters as the sum of two bf16, which moves a norm by up to 4e-6 of s |B| |A|, and W . (B A)
/// and |B A|^2 are summed in f32 over some hundred columns and in f64 over these sums. Equal bits for equal input.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: see [`row_norm_forward`].
pub fn row_norm_packed(
    mut norm: ViewMut,
    w_squared: View,
    a: View,
    b: View,
    scaling: f32,
    weight: &BaseWeight,
    folded: View,
) -> Result<()> {
    let Some(cuda) = norm.cuda() else {
        let (rank, n) = (a.rows, weight.rows());
        return with_scratch(rank * n, |wa| {
            let mut wa = ViewMut::from_slice(wa, rank, n);
            quant_linear_forward(wa.reborrow(), a, weight, None, None)?;
            row_norm_forward(norm, w_squared, wa.as_view(), a, b, scaling, weight)
        });
    };
    packed_cuda(&cuda, &mut norm, [w_squared, a, b], scaling, weight, folded, None)
}

/// [`row_norm_packed`] and what DoRA folds with the norm, in one kernel on CUDA.
///
/// g_n = m_n / norm_n as [`fold_row_factor`], folded = s diag(g) B as [`fold_branch`].
///
/// Shapes: as [`row_norm_packed`]; `m`, `g` (1, N); `folded` (N, R) of the type of activations.
/// `g` holds on entry the row scale that a copy of the weight on the device has in its rows, if there is such a copy.
/// Accumulates: nothing, `norm`, `g` and `folded` are overwritten.
/// Precision: as the three ops.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: the three ops.
pub fn row_norm_fold(
    mut norm: ViewMut,
    mut g: ViewMut,
    folded: ViewMut,
    w_squared: View,
    a: View,
    b: View,
    m: View,
    scaling: f32,
    weight: &BaseWeight,
) -> Result<()> {
    check(FORWARD, "columns of m", weight.rows(), m.cols)?;
    check(FORWARD, "columns of g", weight.rows(), g.cols)?;
    check(FORWARD, "rows of folded", weight.rows(), folded.rows)?;
    check(FORWARD, "columns of folded", a.rows, folded.cols)?;
    let Some(cuda) = norm.cuda() else {
        row_norm_packed(norm.reborrow(), w_squared, a, b, scaling, weight, g.as_view())?;
        fold_row_factor(g.reborrow(), m, norm.as_view())?;
        return fold_branch(folded, b, scaling, Some(g.as_view()));
    };
    let fold = Fold { m, g: g.as_view(), folded: folded.as_view() };
    packed_cuda(&cuda, &mut norm, [w_squared, a, b], scaling, weight, g.as_view(), Some(fold))
}

/// What the norms are made of, but for the weight itself.
#[derive(Debug, Clone, Copy)]
struct Operands<'a> {
    w_squared: View<'a>,
    a: View<'a>,
    b: View<'a>,
    scaling: f32,
}

impl Operands<'_> {
    /// What every kernel takes first.
    fn args(&self, norm: &ViewMut) -> Result<[Arg; 6]> {
        let Operands { w_squared, a, b, .. } = self;
        Ok([
            Arg::Ptr(norm.f32(FORWARD)?),
            Arg::Ptr(w_squared.f32(FORWARD)?),
            Arg::Ptr(a.bf16(FORWARD)?),
            Arg::size(a.stride),
            Arg::Ptr(b.f32(FORWARD)?),
            Arg::size(b.stride),
        ])
    }
}

fn check_operands(norm: &ViewMut, operands: &Operands, weight: &BaseWeight) -> Result<()> {
    let Operands { w_squared, a, b, .. } = operands;
    let (n, k) = (weight.rows(), weight.cols());
    check(FORWARD, "rows of norm", 1, norm.rows)?;
    check(FORWARD, "columns of norm", n, norm.cols)?;
    check(FORWARD, "rows of w_squared", 1, w_squared.rows)?;
    check(FORWARD, "columns of w_squared", n, w_squared.cols)?;
    check(FORWARD, "columns of a", k, a.cols)?;
    check(FORWARD, "rows of b", n, b.rows)?;
    check(FORWARD, "columns of b", a.rows, b.cols)
}

/// Whether the norms of this weight with these rows of A are made of rows in scratch, on a device.
pub fn row_norm_uses_scratch(weight: &BaseWeight, a: View) -> bool {
    !weight.has_rows_in_copy() && weight.dense_bf16().is_none() && packed_rows(weight, a).is_none()
}

/// The weight, if a kernel measures its packed rows. Rows that are bf16 already are read where they are.
fn packed_rows<'w>(weight: &'w BaseWeight, a: View<'_>) -> Option<&'w DeviceWeight> {
    packed::served(weight, a).filter(|_| weight.dense_bf16().is_none())
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new(
    "row_norm.cu",
    concat!(
        "#line 1 \"products.cuh\"\n",
        include_str!("row_norm/products.cuh"),
        "\n#line 1 \"row_norm.cu\"\n",
        include_str!("row_norm.cu")
    ),
);

/// Where the kernel writes what is folded with a norm; both are written to.
#[derive(Debug, Clone, Copy)]
struct Fold<'a> {
    m: View<'a>,
    g: View<'a>,
    folded: View<'a>,
}

fn packed_cuda(
    cuda: &Arc<Cuda>,
    norm: &mut ViewMut,
    [w_squared, a, b]: [View; 3],
    scaling: f32,
    weight: &BaseWeight,
    folded: View,
    fold: Option<Fold>,
) -> Result<()> {
    let operands = Operands { w_squared, a, b, scaling };
    check_operands(norm, &operands, weight)?;
    if let Some((ptr, stride, scaled)) = weight.rows_in_copy() {
        let (rows, cols) = (weight.rows(), weight.cols());
        check(FORWARD, "columns of folded", rows, folded.cols)?;
        let w = ViewMut::on_cuda(cuda, Matrix { ptr, rows, cols, stride, dtype: Dtype::Bf16 });
        return forward_cuda(cuda, norm, operands, w.as_view(), scaled.then_some(folded), fold);
    }
    if let Some(weight) = packed_rows(weight, a) {
        return packed::forward(norm, operands, weight, fold);
    }
    for_each_tile(cuda, weight, |rows, w| {
        let (start, len) = (rows.start, rows.len());
        let norm = norm.reborrow().into_column_range(start, len);
        let operands = Operands {
            w_squared: w_squared.column_range(start, len),
            b: b.row_range(start, len),
            ..operands
        };
        let fold = fold.map(|Fold { m, g, folded }| Fold {
            m: m.column_range(start, len),
            g: g.column_range(start, len),
            folded: folded.row_range(start, len),
        });
        forward_cuda(cuda, &norm, operands, w, None, fold)
    })
}

/// A kernel of the file, the rows of W that a block of it measures, and the bytes of shared memory per warp of a block.
#[derive(Debug, Clone, Copy)]
struct Kernel {
    name: &'static str,
    rows: usize,
    shared: usize,
}

impl Kernel {
    /// One that makes B A on the way.
    const fn of_ba(name: &'static str) -> Kernel {
        Kernel { name, rows: 32, shared: 0 }
    }

    /// One that makes W A^T and A A^T, of which a warp stores 512 bytes for every 8 rows of both.
    const fn of_products(name: &'static str, rows: usize) -> Kernel {
        Kernel { name, rows, shared: (rows / 8 + 2) * 512 }
    }

    /// The one for these rows and this rank. `aligned`: rows of both matrices are whole and aligned 16 bytes.
    fn choose(aligned: bool, rows: usize, cols: usize, rank: usize, sms: usize) -> Kernel {
        if !aligned {
            return ANY;
        }
        if rank > GROUP {
            return ALIGNED;
        }
        if rank == 0 || !cols.is_multiple_of(32) {
            return ALIGNED_R16;
        }
        // More rows of a block are fewer readings of A; but most multiprocessors should have two blocks.
        let [rest @ .., last] = &PRODUCTS;
        *rest.iter().find(|kernel| 2 * rows.div_ceil(kernel.rows) >= 3 * sms).unwrap_or(last)
    }

    /// Warps of a block, when there are so many blocks: a multiprocessor holds 16 warps, of two blocks, one of which
    /// reads while the other ends, or of its only one.
    fn warps(blocks: usize, sms: usize) -> usize {
        if blocks <= sms { 16 } else { 8 }
    }
}

const ANY: Kernel = Kernel::of_ba("row_norm_forward");
const ALIGNED: Kernel = Kernel::of_ba("row_norm_forward_aligned");
const ALIGNED_R16: Kernel = Kernel::of_ba("row_norm_forward_aligned_r16");

/// The most rows of a block first; 56 and 14336 rows are two blocks for each of 128 multiprocessors.
const PRODUCTS: [Kernel; 3] = [
    Kernel::of_products("row_norm_products_56", 56),
    Kernel::of_products("row_norm_products_32", 32),
    Kernel::of_products("row_norm_products_16", 16),
];

/// The rank that one product of the kernels sums over.
const GROUP: usize = 16;

/// Whether rows of a matrix are whole and aligned 16 bytes.
fn aligned(view: View) -> Result<bool> {
    let row = view.stride * Dtype::Bf16.size();
    Ok(view.bf16(FORWARD)?.is_multiple_of(16) && row.is_multiple_of(16) && view.cols.is_multiple_of(8))
}

/// `w`: rows of the weight, multiplied by `folded` if that is given.
fn forward_cuda(
    cuda: &Cuda,
    norm: &ViewMut,
    operands: Operands,
    w: View,
    folded: Option<View>,
    fold: Option<Fold>,
) -> Result<()> {
    let a = operands.a;
    let kernel = Kernel::choose(aligned(a)? && aligned(w)?, w.rows, w.cols, a.rows, cuda.sms());
    let warps = Kernel::warps(w.rows.div_ceil(kernel.rows), cuda.sms());
    launch(cuda, kernel, warps, norm, operands, w, folded, fold)
}

/// [`forward_cuda`] by this kernel, with so many warps a block.
fn launch(
    cuda: &Cuda,
    kernel: Kernel,
    warps: usize,
    norm: &ViewMut,
    operands: Operands,
    w: View,
    folded: Option<View>,
    fold: Option<Fold>,
) -> Result<()> {
    let mut args = operands.args(norm)?.to_vec();
    args.extend([
        Arg::Ptr(w.bf16(FORWARD)?),
        Arg::size(w.stride),
        Arg::Ptr(folded.map_or(Ok(0), |g| g.f32(FORWARD))?),
    ]);
    args.extend(fold_args(fold)?);
    let rank = operands.a.rows;
    args.extend([Arg::F32(operands.scaling), Arg::size(w.rows), Arg::size(w.cols), Arg::size(rank)]);
    let grid = Grid { shared: warps * kernel.shared, ..Grid::of(w.rows.div_ceil(kernel.rows), warps * 32) };
    cuda.launch(&SOURCE, kernel.name, grid, &args)
}

/// Where a kernel finds the magnitudes, and writes what is folded.
fn fold_args(fold: Option<Fold>) -> Result<[Arg; 4]> {
    Ok(match fold {
        None => [Arg::Ptr(0), Arg::Ptr(0), Arg::Ptr(0), Arg::size(0)],
        Some(Fold { m, g, folded }) => [
            Arg::Ptr(m.f32(FORWARD)?),
            Arg::Ptr(g.f32(FORWARD)?),
            Arg::Ptr(folded.bf16(FORWARD)?),
            Arg::size(folded.stride),
        ],
    })
}

// ------------------------------------------------------------------------------------------ CPU

/// Below this part of |W|^2 + s^2 |B A|^2 the factored square is not trusted.
const CANCELLATION: f64 = 1e-3;

/// Rows of one task.
const ROW_TILE: usize = 32;

thread_local! {
    /// A A^T in f64, kept between calls so that the step loop does not allocate.
    static GRAM: Cell<Vec<f64>> = const { Cell::new(Vec::new()) };
}

/// The definition: the rows themselves.
#[cfg(test)]
fn forward_naive(norm: &mut [f64], w: &[f64], a: &[f64], b: &[f64], scaling: f64) {
    let (k_cols, rank) = (w.len() / norm.len(), b.len() / norm.len());
    for (n, norm) in norm.iter_mut().enumerate() {
        let square = |k: usize| {
            let low_rank: f64 = (0..rank).map(|r| b[n * rank + r] * a[r * k_cols + k]).sum();
            (w[n * k_cols + k] + scaling * low_rank).powi(2)
        };
        *norm = (0..k_cols).map(square).sum::<f64>().sqrt();
    }
}

fn forward_fast(norm: &mut [f32], operands: Operands, wa: View, weight: &BaseWeight) -> Result<()> {
    let Operands { w_squared, a, b, scaling } = operands;
    let (count, w_squared, wa) = (w_squared.cols, w_squared.cpu(FORWARD)?, wa.mat(FORWARD)?);
    let (a, b, scaling) = (a.mat(FORWARD)?, b.mat(FORWARD)?, f64::from(scaling));
    let rank = a.rows();
    let mut gram = GRAM.take();
    gram.clear();
    gram.resize(rank * rank, 0.0);
    gram.par_chunks_mut(rank.max(1)).enumerate().for_each(|(i, row)| {
        for (j, product) in row.iter_mut().enumerate() {
            *product = dot(a.row(i), a.row(j));
        }
    });
    let gram_rows = &gram;
    norm[..count].par_chunks_mut(ROW_TILE).enumerate().for_each(|(tile, norm)| {
        for (i, norm) in norm.iter_mut().enumerate() {
            let n = tile * ROW_TILE + i;
            let b = b.row(n);
            let cross: f64 = (0..rank).map(|r| wa.row(r)[n] as f64 * b[r] as f64).sum();
            let low_rank: f64 =
                (0..rank).map(|r| b[r] as f64 * mixed_dot(&gram_rows[r * rank..][..rank], b)).sum();
            let low_rank = scaling * scaling * low_rank;
            let mut square = w_squared[n] as f64 + 2.0 * scaling * cross + low_rank;
            if square < CANCELLATION * (w_squared[n] as f64 + low_rank).max(0.0) || square < 0.0 {
                square = direct_square(weight, n, a, b, scaling);
            }
            *norm = square.sqrt() as f32;
        }
    });
    GRAM.set(gram);
    Ok(())
}

/// |W_n + s (B A)_n|^2 from the row itself.
fn direct_square(weight: &BaseWeight, n: usize, a: Mat<'_>, b: &[f32], scaling: f64) -> f64 {
    with_scratch(weight.cols(), |w| {
        weight.dequantize_rows(n..n + 1, w);
        let element = |k: usize| {
            let low_rank: f64 = b.iter().enumerate().map(|(r, &b)| b as f64 * a.row(r)[k] as f64).sum();
            w[k] as f64 + scaling * low_rank
        };
        (0..w.len()).map(|k| element(k).powi(2)).sum()
    })
}

by_isa! {
    /// sum a b in f64, in eight interleaved sums that fit vector registers.
    fn dot(a: &[f32], b: &[f32]) -> f64 {
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
        let mut sums = [0.0; 8];
        for (a, b) in a.iter().zip(b) {
            for i in 0..8 {
                sums[i] += a[i] as f64 * b[i] as f64;
            }
        }
        let rest: f64 = a_rest.iter().zip(b_rest).map(|(&a, &b)| a as f64 * b as f64).sum();
        sums.iter().sum::<f64>() + rest
    }
}

by_isa! {
    fn mixed_dot(a: &[f64], b: &[f32]) -> f64 {
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
        let mut sums = [0.0; 8];
        for (a, b) in a.iter().zip(b) {
            for i in 0..8 {
                sums[i] += a[i] * b[i] as f64;
            }
        }
        let rest: f64 = a_rest.iter().zip(b_rest).map(|(&a, &b)| a * b as f64).sum();
        sums.iter().sum::<f64>() + rest
    }
}
