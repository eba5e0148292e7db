//! Row norms of W + s B A without the sum: what DoRA divides by, once per optimizer step.
//!
//! There is no backward: DoRA treats the norm as a constant (section 4.3), and so does PEFT.

use std::cell::Cell;
use std::sync::Arc;

use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::gemm::Mat;
use crate::cpu::scratch::with_scratch;
use crate::cuda::gemm::{Matrix, transposed};
use crate::cuda::{Arg, Cuda, Grid, Scratch, Source};
use crate::error::{Error, Result, check};
use crate::ops::fold::{fold_branch, fold_row_factor};
use crate::ops::quant_linear::{for_each_tile, quant_linear_forward};
use crate::tensor::{Dtype, View, ViewMut};
use crate::weight::{BaseWeight, Room};

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
    let operands = Operands { w_squared, wa, a, b, scaling };
    check_operands(&norm, &operands, weight.rows(), weight.cols())?;
    if let Some(cuda) = norm.cuda() {
        return Err(Error::NoKernel { op: FORWARD, device: format!("{} and a packed weight", cuda.name()) });
    }
    forward_fast(norm.cpu(FORWARD)?, operands, Rows::Packed(weight))
}

/// [`row_norm_forward`] with the product W A^T made on the way: on CUDA both read the same dequantized rows.
///
/// Shapes: as [`row_norm_forward`]. `a` is of the type of activations.
/// `folded`: the row scale g that a copy of the weight on the device has in its rows, if there is such a copy; then
/// its rows, divided by g, serve. A row of g = 0 keeps |W|^2 + s^2 |B A|^2: its factor m / norm stays 0.
/// Accumulates: nothing, `norm` is overwritten.
/// Precision: as [`row_norm_forward`]; on CUDA W and A enter as bf16, which moves a norm by about 1e-5 of itself where
/// B A is a tenth of W.
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

/// [`row_norm_forward`] of a weight that lies dequantized in memory.
///
/// Shapes: as [`row_norm_forward`], with `w` (N, K) as the weight.
/// Accumulates: nothing, `norm` is overwritten.
/// Precision: as [`row_norm_forward`]. On CUDA `wa`, `a`, `b` and `w` may be bf16 or f32 each, A A^T is summed in f32 over 128
/// columns' distance and f64 beyond: within 2e-6 of f64, relative, and within 1e-4 near the cancellation limit.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: see [`row_norm_forward`].
pub fn row_norm_forward_dense(
    norm: ViewMut,
    w_squared: View,
    wa: View,
    a: View,
    b: View,
    scaling: f32,
    w: View,
) -> Result<()> {
    let operands = Operands { w_squared, wa, a, b, scaling };
    check_operands(&norm, &operands, w.rows, w.cols)?;
    if let Some(cuda) = norm.cuda() {
        return forward_cuda(&cuda, &norm, operands, w, None, None, None);
    }
    forward_fast(norm.cpu(FORWARD)?, operands, Rows::Dense(w.mat(FORWARD)?))
}

/// What the norms are made of, but for the weight itself.
#[derive(Debug, Clone, Copy)]
struct Operands<'a> {
    w_squared: View<'a>,
    wa: View<'a>,
    a: View<'a>,
    b: View<'a>,
    scaling: f32,
}

fn check_operands(norm: &ViewMut, operands: &Operands, n: usize, k: usize) -> Result<()> {
    let Operands { w_squared, wa, a, b, .. } = operands;
    check(FORWARD, "rows of norm", 1, norm.rows)?;
    check(FORWARD, "columns of norm", n, norm.cols)?;
    check(FORWARD, "rows of w_squared", 1, w_squared.rows)?;
    check(FORWARD, "columns of w_squared", n, w_squared.cols)?;
    check(FORWARD, "columns of a", k, a.cols)?;
    check(FORWARD, "rows of wa", a.rows, wa.rows)?;
    check(FORWARD, "columns of wa", n, wa.cols)?;
    check(FORWARD, "rows of b", n, b.rows)?;
    check(FORWARD, "columns of b", a.rows, b.cols)
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("row_norm.cu", include_str!("row_norm.cu"));

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
    let (rank, n) = (a.rows, weight.rows());
    let ptr = cuda.scratch(Scratch::Products, products_scratch(n, rank))?;
    let products = Matrix { ptr, rows: rank, cols: n + rank, stride: n + rank, dtype: Dtype::F32 };
    let mut wa = ViewMut::on_cuda(cuda, Matrix { cols: n, ..products });
    let operands = Operands { w_squared, wa: wa.as_view(), a, b, scaling };
    check_operands(norm, &operands, weight.rows(), weight.cols())?;
    if let Some(Room { ptr, stride, is_filled }) = weight.scaled_copy() {
        check(FORWARD, "columns of folded", weight.rows(), folded.cols)?;
        let w = Matrix { ptr, rows: n, cols: weight.cols(), stride, dtype: Dtype::Bf16 };
        // With A below W one product makes both A W^T and A A^T.
        let both = if is_filled { n + rank } else { n };
        let (to, factors) = (Matrix { cols: both, ..products }, a.matrix(FORWARD)?);
        cuda.gemm(to, factors, transposed(Matrix { rows: both, ..w }), 1.0, 0.0)?;
        let ptr = products.ptr + (n * Dtype::F32.size()) as u64;
        let gram = is_filled.then_some(Matrix { ptr, cols: rank, ..products });
        let w = ViewMut::on_cuda(cuda, w);
        return forward_cuda(cuda, norm, operands, w.as_view(), gram, Some(folded), fold);
    }
    for_each_tile(cuda, weight, |rows, w| {
        let wa = wa.reborrow().into_column_range(rows.start, rows.len());
        cuda.gemm(wa.matrix(FORWARD)?, a.matrix(FORWARD)?, transposed(w.matrix(FORWARD)?), 1.0, 0.0)?;
        let (start, len) = (rows.start, rows.len());
        let operands = Operands {
            w_squared: w_squared.column_range(start, len),
            wa: wa.as_view(),
            a,
            b: b.row_range(start, len),
            scaling,
        };
        let fold = fold.map(|Fold { m, g, folded }| Fold {
            m: m.column_range(start, len),
            g: g.column_range(start, len),
            folded: folded.row_range(start, len),
        });
        let norm = norm.reborrow().into_column_range(start, len);
        forward_cuda(cuda, &norm, operands, w, None, None, fold)
    })
}

/// Bytes of scratch for A W^T and A A^T of a weight of so many rows.
pub fn products_scratch(rows: usize, rank: usize) -> usize {
    rank * (rows + rank) * Dtype::F32.size()
}

/// `gram`: A A^T, if it was made already.
fn forward_cuda(
    cuda: &Cuda,
    norm: &ViewMut,
    operands: Operands,
    w: View,
    gram: Option<Matrix>,
    folded: Option<View>,
    fold: Option<Fold>,
) -> Result<()> {
    let Operands { w_squared, wa, a, b, scaling } = operands;
    let (rank, tiles) = (a.rows, a.rows.div_ceil(4));
    // A matrix of either type: address, stride, whether it is bf16.
    let either = |view: View| -> Result<[Arg; 3]> {
        let (ptr, is_bf16) = match view.bf16(FORWARD) {
            Ok(ptr) => (ptr, 1),
            Err(_) => (view.f32(FORWARD)?, 0),
        };
        Ok([Arg::Ptr(ptr), Arg::size(view.stride), Arg::I32(is_bf16)])
    };
    let gram = if let Some(gram) = gram {
        gram
    } else {
        let ptr = cuda.scratch(Scratch::Partials, (rank * rank).max(1) * size_of::<f32>())?;
        let gram = Matrix { ptr, rows: rank, cols: rank, stride: rank, dtype: Dtype::F32 };
        let a_matrix = a.matrix(FORWARD)?;
        if a_matrix.dtype == Dtype::Bf16 {
            // Products of bf16 are exact in f32, and the library splits the long sum over many multiprocessors.
            cuda.gemm(gram, a_matrix, transposed(a_matrix), 1.0, 0.0)?;
        } else {
            let mut args = vec![Arg::Ptr(gram.ptr)];
            args.extend(either(a)?);
            args.extend([Arg::size(rank), Arg::size(a.cols)]);
            let grid = Grid { blocks: (tiles, tiles, 1), threads: 128, shared: 0 };
            cuda.launch(&SOURCE, "row_norm_gram", grid, &args)?;
        }
        gram
    };
    let mut args = vec![Arg::Ptr(norm.f32(FORWARD)?), Arg::Ptr(w_squared.f32(FORWARD)?)];
    for view in [wa, a, b] {
        args.extend(either(view)?);
    }
    args.extend([Arg::Ptr(gram.ptr), Arg::size(gram.stride)]);
    args.extend(either(w)?);
    args.push(Arg::Ptr(folded.map_or(Ok(0), |g| g.f32(FORWARD))?));
    args.extend(match fold {
        None => [Arg::Ptr(0), Arg::Ptr(0), Arg::Ptr(0), Arg::size(0)],
        Some(Fold { m, g, folded }) => [
            Arg::Ptr(m.f32(FORWARD)?),
            Arg::Ptr(g.f32(FORWARD)?),
            Arg::Ptr(folded.bf16(FORWARD)?),
            Arg::size(folded.stride),
        ],
    });
    args.extend([Arg::F32(scaling), Arg::size(w.rows), Arg::size(w.cols), Arg::size(rank)]);
    cuda.launch(&SOURCE, "row_norm_forward", Grid::of(w.rows.div_ceil(8), 256), &args)
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

/// Where the rows of the weight come from.
#[derive(Debug, Clone, Copy)]
enum Rows<'a> {
    Packed(&'a BaseWeight),
    Dense(Mat<'a>),
}

fn forward_fast(norm: &mut [f32], operands: Operands, w: Rows) -> Result<()> {
    let Operands { w_squared, wa, a, b, scaling } = operands;
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
                square = direct_square(w, n, a, b, scaling);
            }
            *norm = square.sqrt() as f32;
        }
    });
    GRAM.set(gram);
    Ok(())
}

/// |W_n + s (B A)_n|^2 from the row itself.
fn direct_square(w: Rows, n: usize, a: Mat<'_>, b: &[f32], scaling: f64) -> f64 {
    let measure = |w: &[f32]| {
        let element = |k: usize| {
            let low_rank: f64 = b.iter().enumerate().map(|(r, &b)| b as f64 * a.row(r)[k] as f64).sum();
            w[k] as f64 + scaling * low_rank
        };
        (0..w.len()).map(|k| element(k).powi(2)).sum()
    };
    match w {
        Rows::Dense(w) => measure(w.row(n)),
        Rows::Packed(weight) => with_scratch(weight.cols(), |w| {
            weight.dequantize_rows(n..n + 1, w);
            measure(w)
        }),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::quant_linear::quant_linear_forward;
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat as TestMat, Out, check_fast, tolerance};

    fn f64s(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&x| x as f64).collect()
    }

    /// (w_squared, wa) as a training step prepares them.
    fn prepared(weight: &BaseWeight, a: &TestMat) -> (TestMat, TestMat) {
        let mut w_squared = TestMat::poisoned(1, weight.rows());
        weight.row_norms_squared(w_squared.view_mut()).unwrap();
        let mut wa = TestMat::poisoned(a.rows, weight.rows());
        quant_linear_forward(wa.view_mut(), a.view(), weight, None, None).unwrap();
        (w_squared, wa)
    }

    fn check_case(what: &str, weight: &BaseWeight, a: &TestMat, b: &TestMat, scaling: f32, rel: f64) {
        let (w_squared, wa) = prepared(weight, a);
        let mut norm = vec![0.0; weight.rows()];
        forward_naive(&mut norm, &f64s(&weight.dequantize()), &a.f64(), &b.f64(), scaling as f64);
        check_fast(
            what,
            [(Out::Set(1, weight.rows()), &norm)],
            [&w_squared, &wa, a, b],
            tolerance(rel, 0.0),
            |[norm], [w_squared, wa, a, b]| row_norm_forward(norm, w_squared, wa, a, b, scaling, weight),
        );
    }

    #[test]
    fn factored_norms_equal_the_norms_of_the_rows() {
        for (n, k, r) in [(1, 1, 1), (7, 129, 1), (129, 127, 7), (70, 300, 16)] {
            let weight = BaseWeight::from_f32(n, k, &TestMat::random(1, n, k, 1.0).values()).unwrap();
            let a = TestMat::random(2, r, k, 0.5);
            for (size, scaling) in [(0.0, 2.0), (0.01, 1.0), (0.5, 0.5), (5.0, 2.0)] {
                let b = TestMat::random(3, n, r, size);
                // A row may come near the cancellation limit by chance when k = 1.
                let rel = if k == 1 { 1e-4 } else { 1e-6 };
                check_case(&format!("{n} x {k}, rank {r}, b {size}"), &weight, &a, &b, scaling, rel);
            }
        }
    }

    #[test]
    fn rows_that_the_adapter_cancels_are_measured_directly() {
        let (n, k, r, scaling) = (40, 64, 4, 2.0f32);
        let (a, b) = (TestMat::random(1, r, k, 1.0), TestMat::random(2, n, r, 1.0));
        let noise = TestMat::random(3, n, k, 1e-5).values();
        let (a_values, b_values) = (a.values(), b.values());
        let minus_ba = |i: usize| {
            let (n, k_) = (i / k, i % k);
            -scaling * (0..r).map(|r_| b_values[n * r + r_] * a_values[r_ * k + k_]).sum::<f32>()
        };
        let values: Vec<f32> = (0..n * k).map(|i| minus_ba(i) + noise[i]).collect();
        let weight = BaseWeight::from_f32(n, k, &values).unwrap();
        check_case("cancelled", &weight, &a, &b, scaling, 1e-6);
    }

    #[test]
    fn a_row_of_zeros_has_norm_zero_and_nan_stays_visible() {
        let weight = BaseWeight::from_f32(2, 3, &[0.0, 0.0, 0.0, 1.0, 2.0, 2.0]).unwrap();
        let a = TestMat::random(1, 2, 3, 1.0);
        let (w_squared, wa) = prepared(&weight, &a);
        let norm = |b: TestMat| {
            let mut norm = TestMat::poisoned(1, 2);
            let (w_squared, wa, a) = (w_squared.view(), wa.view(), a.view());
            row_norm_forward(norm.view_mut(), w_squared, wa, a, b.view(), 1.0, &weight).unwrap();
            norm.values()
        };
        assert_eq!(norm(TestMat::new(2, 2, vec![0.0; 4])), [0.0, 3.0]);
        let found = norm(TestMat::new(2, 2, vec![f32::NAN, 0.0, 0.0, 0.0]));
        assert!(found[0].is_nan() && found[1] == 3.0, "{found:?}");
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        // N 5, K 4, R 3: norm, w_squared, wa, a, b; one of them wrong at a time.
        let weight = BaseWeight::from_f32(5, 4, &[0.0; 20]).unwrap();
        let right = [(1, 5), (1, 5), (3, 5), (3, 4), (5, 3)];
        for (wrong, shape, expected) in [
            (0, (2, 5), "rows of norm is 2, expected 1"),
            (0, (1, 4), "columns of norm is 4, expected 5"),
            (1, (2, 5), "rows of w_squared is 2, expected 1"),
            (1, (1, 4), "columns of w_squared is 4, expected 5"),
            (2, (2, 5), "rows of wa is 2, expected 3"),
            (2, (3, 4), "columns of wa is 4, expected 5"),
            (3, (3, 5), "columns of a is 5, expected 4"),
            (4, (4, 3), "rows of b is 4, expected 5"),
            (4, (5, 2), "columns of b is 2, expected 3"),
        ] {
            let mut shapes = right;
            shapes[wrong] = shape;
            let [mut norm, w_squared, wa, a, b] =
                shapes.map(|(rows, cols)| TestMat::new(rows, cols, vec![0.0; rows * cols]));
            let (w_squared, wa, a, b) = (w_squared.view(), wa.view(), a.view(), b.view());
            let error = row_norm_forward(norm.view_mut(), w_squared, wa, a, b, 1.0, &weight);
            assert_eq!(error.unwrap_err().to_string(), format!("row_norm_forward: {expected}"));
        }
    }

    #[test]
    fn norms_of_a_dense_weight_are_those_of_the_packed_one() {
        let (n, k, r) = (33, 65, 4);
        let (w, a, b) =
            (TestMat::random(1, n, k, 1.0), TestMat::random(2, r, k, 0.5), TestMat::random(3, n, r, 0.5));
        let weight = BaseWeight::from_f32(n, k, &w.values()).unwrap();
        let (w_squared, wa) = prepared(&weight, &a);
        let [mut packed, mut dense] = [0; 2].map(|_| TestMat::poisoned(1, n));
        let (w2, wa) = (w_squared.view(), wa.view());
        row_norm_forward(packed.view_mut(), w2, wa, a.view(), b.view(), 2.0, &weight).unwrap();
        row_norm_forward_dense(dense.view_mut(), w2, wa, a.view(), b.view(), 2.0, w.view()).unwrap();
        assert_eq!(packed.values(), dense.values());
    }

    #[test]
    fn what_is_folded_with_a_norm_follows_from_it_also_on_cuda() {
        let device = cuda::device();
        for (n, k, r) in [(1, 1, 1), (7, 129, 1), (129, 127, 7), (70, 300, 16), (40, 576, 40)] {
            let [a, w] = [(1, r), (3, n)].map(|(seed, rows)| TestMat::random(seed, rows, k, 0.7).rounded());
            let (b, m, s) = (TestMat::random(2, n, r, 0.7), TestMat::random(4, 1, n, 1.0), 2.0_f32);
            let weight = BaseWeight::from_f32(n, k, &w.values()).unwrap();
            let (w_squared, _) = prepared(&weight, &a);
            let mut norm = vec![0.0; n];
            forward_naive(&mut norm, &w.f64(), &a.f64(), &b.f64(), f64::from(s));
            let g: Vec<f64> = m.f64().iter().zip(&norm).map(|(m, norm)| m / norm).collect();
            let folded: Vec<f64> =
                b.f64().iter().enumerate().map(|(i, b)| f64::from(s) * g[i / r] * b).collect();
            let close = tolerance(if k == 1 { 1e-4 } else { 1e-5 }, 0.0);
            let what = format!("row_norm_fold {n} x {k}, rank {r}");
            check_fast(
                &what,
                [(Out::Set(1, n), &norm), (Out::Set(1, n), &g), (Out::Set(n, r), &folded)],
                [&w_squared, &a, &b, &m],
                close,
                |[norm, g, folded], [w_squared, a, b, m]| {
                    row_norm_fold(norm, g, folded, w_squared, a, b, m, s, &weight)
                },
            );
            let Some(device) = &device else { continue };
            let weight = weight.to_device(device).unwrap();
            let outputs = [
                (Out::Set(1, n), F32, &norm[..]),
                (Out::Set(1, n), F32, &g[..]),
                (Out::Set(n, r), Bf16, &folded[..]),
            ];
            let inputs = [(&w_squared, F32), (&a, Bf16), (&b, F32), (&m, F32)];
            check_cuda(device, &what, outputs, inputs, close, |[norm, g, folded], [w_squared, a, b, m]| {
                row_norm_fold(norm, g, folded, w_squared, a, b, m, s, &weight)
            });
        }
    }

    #[test]
    fn the_cuda_norms_equal_those_of_the_rows_also_where_the_adapter_cancels_them() {
        let Some(device) = cuda::device() else { return };
        for (n, k, r) in [(1, 1, 1), (7, 129, 1), (129, 127, 7), (70, 300, 16), (40, 576, 40)] {
            for (dtype, cancels) in [(F32, false), (Bf16, false), (F32, true)] {
                let random = |seed, rows, cols| {
                    let mat = TestMat::random(seed, rows, cols, 0.7);
                    if dtype == Bf16 { mat.rounded() } else { mat }
                };
                let (a, b, mut w, s) = (random(1, r, k), random(2, n, r), random(3, n, k), 2.0_f32);
                let (a64, b64) = (a.f64(), b.f64());
                if cancels {
                    let minus_ba = |i: usize| -> f64 {
                        (0..r).map(|r_| b64[i / k * r + r_] * a64[r_ * k + i % k]).sum::<f64>() * -(s as f64)
                    };
                    let noise = w.values();
                    let values = (0..n * k).map(|i| (minus_ba(i) + 1e-4 * noise[i] as f64) as f32);
                    w = TestMat::new(n, k, values.collect());
                }
                let weight = BaseWeight::from_f32(n, k, &w.values()).unwrap();
                let (w_squared, wa) = prepared(&weight, &a);
                let mut norm = vec![0.0; n];
                forward_naive(&mut norm, &w.f64(), &a64, &b64, s as f64);
                // One column cancels by chance; elsewhere sums in f32.
                let rel = if k == 1 { 1e-4 } else { 4e-6 };
                check_cuda(
                    &device,
                    &format!("row_norm {n} x {k}, rank {r}, {dtype:?}, cancelled: {cancels}"),
                    [(Out::Set(1, n), F32, &norm)],
                    [(&w_squared, F32), (&wa, F32), (&a, dtype), (&b, dtype), (&w, dtype)],
                    tolerance(rel, 0.0),
                    |[norm], [w_squared, wa, a, b, w]| {
                        row_norm_forward_dense(norm, w_squared, wa, a, b, s, w)
                    },
                );
            }
        }
    }
}
