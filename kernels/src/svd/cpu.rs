//! Both decompositions in host memory: matrix products on all threads, small decompositions by faer.

use faer::linalg::solvers::Svd;

use super::{LowRankSvd, SvdOptions, check_rank, with_fixed_signs};
use crate::cpu::gemm::{Mat, MatMut, gemm};
use crate::error::{Error, Result};
use crate::tensor::View;

/// The `rank` largest singular triples of `w`, nearly, by randomized block Krylov iteration.
///
/// The subspace is span(W X, (W W^T) W X, ..., (W W^T)^q W X) for a random X (K, rank + oversampling);
/// W is projected onto it and the projection decomposed. A subspace as large as W is W: then the
/// result is [`exact_svd`]'s.
///
/// Shapes: `w` (N, K); u (N, R); v (R, K).
/// Precision: f32 products, the small decomposition in f64; vectors are orthonormal within 1e-5.
///
/// # Errors
/// A rank of 0 or above min(N, K), an element that is not finite, or a view on another device.
///
/// Source: Musco and Musco, arXiv 1504.05477, algorithm 2; Halko, Martinsson and Tropp, arXiv 0909.4061.
pub fn randomized_svd(w: View, rank: usize, options: &SvdOptions) -> Result<LowRankSvd> {
    const OP: &str = "randomized_svd";
    let w = checked(OP, w, rank)?;
    let (n, k) = (w.rows(), w.cols());
    let block = rank.saturating_add(options.oversampling);
    let width = options.iterations.saturating_add(1).saturating_mul(block);
    if width >= n.min(k) {
        return exact(OP, w, rank);
    }

    let mut start = vec![0.0; k * block];
    options.start().fill_normal(&mut start, 1.0);
    let mut basis = vec![0.0; n * width];
    let mut newest = product(w, Mat::new(&start, k, block, block));
    for i in 0..=options.iterations {
        if i > 0 {
            let back = product(w.transposed(), Mat::new(&newest, n, block, block));
            newest = product(w, Mat::new(&back, k, block, block));
            // Directions that the basis has already would drown the new ones in rounding errors.
            for _ in 0..2 {
                let found = Mat::new(&basis, n, i * block, width);
                let shared = product(found.transposed(), Mat::new(&newest, n, block, block));
                subtract_product(&mut newest, found, Mat::new(&shared, i * block, block, block));
            }
        }
        newest = orthonormal(Mat::new(&newest, n, block, block)).0;
        for (basis, newest) in basis.chunks_exact_mut(width).zip(newest.chunks_exact(block)) {
            basis[i * block..][..block].copy_from_slice(newest);
        }
    }
    // Householder: orthonormal even where W has less rank than the basis has columns.
    let (basis, _) = orthonormal(Mat::new(&basis, n, width, width));
    let basis = Mat::new(&basis, n, width, width);

    // W ~ Q (Q^T W), (W^T Q) = P R, R = X S Y^T: the triples of Q R^T P^T are (Q Y, S, P X).
    let projected = product(w.transposed(), basis);
    let (p, r) = orthonormal(Mat::new(&projected, k, width, width));
    let small = decompose(OP, width, width, |i, j| r[i * width + j])?;
    let left = faer_columns(small.V(), rank);
    let right = faer_columns(small.U(), rank);
    let u = product(basis, Mat::new(&left, width, rank, rank));
    let v =
        product(Mat::new(&right, width, rank, rank).transposed(), Mat::new(&p, k, width, width).transposed());
    let s = (0..rank).map(|i| small.S().column_vector()[i] as f32).collect();
    Ok(with_fixed_signs(LowRankSvd { u, s, v }, rank))
}

/// The `rank` largest singular triples of `w`, to the last digit of f32, in O(N K min(N, K)).
///
/// Shapes: `w` (N, K); u (N, R); v (R, K).
/// Precision: f64, rounded at the end.
///
/// # Errors
/// As [`randomized_svd`]; also when the decomposition does not converge.
///
/// Source: `thin_svd` of the faer crate.
pub fn exact_svd(w: View, rank: usize) -> Result<LowRankSvd> {
    const OP: &str = "exact_svd";
    exact(OP, checked(OP, w, rank)?, rank)
}

fn exact(op: &'static str, w: Mat<'_>, rank: usize) -> Result<LowRankSvd> {
    let svd = decompose(op, w.rows(), w.cols(), |i, j| w.row(i)[j])?;
    let columns = faer_columns(svd.V(), rank);
    let v = (0..rank * w.cols()).map(|i| columns[i % w.cols() * rank + i / w.cols()]).collect();
    let s = (0..rank).map(|i| svd.S().column_vector()[i] as f32).collect();
    Ok(with_fixed_signs(LowRankSvd { u: faer_columns(svd.U(), rank), s, v }, rank))
}

fn checked<'a>(op: &'static str, w: View<'a>, rank: usize) -> Result<Mat<'a>> {
    check_rank(op, rank, w.rows, w.cols)?;
    let w = w.mat(op)?;
    for row in 0..w.rows() {
        if let Some(col) = w.row(row).iter().position(|x| !x.is_finite()) {
            return Err(Error::NotFinite { op, row, col, value: w.row(row)[col] });
        }
    }
    Ok(w)
}

/// Rows of a product that one task computes.
const ROW_TILE: usize = 96;

/// a b, row by row.
fn product(a: Mat<'_>, b: Mat<'_>) -> Vec<f32> {
    let (rows, cols) = (a.rows(), b.cols());
    let mut out = vec![0.0; rows * cols];
    MatMut::new(&mut out, rows, cols, cols)
        .par_tiles(ROW_TILE, cols, |tile, rows, _| gemm(tile, false, 1.0, a.row_range(rows), b));
    out
}

/// out -= a b.
fn subtract_product(out: &mut [f32], a: Mat<'_>, b: Mat<'_>) {
    MatMut::new(out, a.rows(), b.cols(), b.cols())
        .par_tiles(ROW_TILE, b.cols(), |tile, rows, _| gemm(tile, true, -1.0, a.row_range(rows), b));
}

/// (Q, R) of a tall matrix by Householder reflections: Q of its shape, R square, both row by row.
fn orthonormal(a: Mat<'_>) -> (Vec<f32>, Vec<f32>) {
    let qr = faer::Mat::<f32>::from_fn(a.rows(), a.cols(), |i, j| a.row(i)[j]).qr();
    let (q, r, width) = (qr.compute_thin_Q(), qr.thin_R(), a.cols());
    let q = (0..a.rows() * width).map(|i| q[(i / width, i % width)]).collect();
    // Below the diagonal faer keeps the reflections.
    let upper = |i: usize, j: usize| if i <= j { r[(i, j)] } else { 0.0 };
    (q, (0..width * width).map(|i| upper(i / width, i % width)).collect())
}

fn decompose(
    op: &'static str,
    rows: usize,
    cols: usize,
    at: impl Fn(usize, usize) -> f32,
) -> Result<Svd<f64>> {
    faer::Mat::<f64>::from_fn(rows, cols, |i, j| f64::from(at(i, j)))
        .thin_svd()
        .map_err(|_| Error::NoConvergence { op })
}

/// The first `count` columns, row by row.
fn faer_columns(matrix: faer::MatRef<'_, f64>, count: usize) -> Vec<f32> {
    (0..matrix.nrows() * count).map(|i| matrix[(i / count, i % count)] as f32).collect()
}
