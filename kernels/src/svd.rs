//! The leading singular vectors of a dense host matrix, for adapters that start from them (PiSSA).
//!
//! [`randomized_svd`] is the one to use: block Krylov iteration reads W a few times with matrix products
//! and decomposes only the small projection. [`exact_svd`] decomposes W itself and is the reference.
//! Both are deterministic: counter-based random numbers, sums that do not depend on the number of
//! threads, and in each left vector the component of largest magnitude is positive.

use faer::linalg::solvers::Svd;

use crate::cpu::gemm::{Mat, MatMut, gemm};
use crate::error::{Error, Result};
use crate::rng::RngKey;
use crate::tensor::View;

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
    RngKey { seed: options.seed, stream: 0x0073_7664 }.fill_normal(&mut start, 1.0);
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
    let limit = w.rows.min(w.cols);
    if rank == 0 || rank > limit {
        return Err(Error::RankOutOfRange { op, rank, limit });
    }
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

fn with_fixed_signs(mut svd: LowRankSvd, rank: usize) -> LowRankSvd {
    let cols = svd.v.len() / rank;
    for r in 0..rank {
        let column = svd.u.iter().skip(r).step_by(rank);
        let largest = column.fold(0.0f32, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
        if largest < 0.0 {
            svd.u.iter_mut().skip(r).step_by(rank).for_each(|x| *x = -*x);
            svd.v[r * cols..][..cols].iter_mut().for_each(|x| *x = -*x);
        }
    }
    svd
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Mat as TestMat, same_on_one_and_four_threads};

    /// |W - U diag(s) V|^2 in f64.
    fn residual(w: &[f32], svd: &LowRankSvd, n: usize, k: usize) -> f64 {
        let rank = svd.s.len();
        let at = |i: usize, j: usize| -> f64 {
            (0..rank).map(|r| svd.u[i * rank + r] as f64 * svd.s[r] as f64 * svd.v[r * k + j] as f64).sum()
        };
        (0..n * k).map(|i| (w[i] as f64 - at(i / k, i % k)).powi(2)).sum()
    }

    fn assert_orthonormal(svd: &LowRankSvd, n: usize, k: usize) {
        let rank = svd.s.len();
        for a in 0..rank {
            for b in 0..rank {
                let left: f64 = (0..n).map(|i| svd.u[i * rank + a] as f64 * svd.u[i * rank + b] as f64).sum();
                let right: f64 = (0..k).map(|j| svd.v[a * k + j] as f64 * svd.v[b * k + j] as f64).sum();
                let expected = f64::from(u8::from(a == b));
                assert!((left - expected).abs() < 1e-5 && (right - expected).abs() < 1e-5, "{left} {right}");
            }
        }
    }

    /// Noise plus a few directions of decaying size: the shape of a trained weight's spectrum.
    fn weight_like(n: usize, k: usize) -> Vec<f32> {
        let mut w = TestMat::random(1, n, k, 0.02).values();
        let (u, v) = (TestMat::random(2, n, 30, 1.0).values(), TestMat::random(3, 30, k, 1.0).values());
        for (i, w) in w.iter_mut().enumerate() {
            *w += (0..30).map(|r| u[i / k * 30 + r] * v[r * k + i % k] * 0.05 / (r + 1) as f32).sum::<f32>();
        }
        w
    }

    #[test]
    fn randomized_reaches_the_energy_of_the_exact_decomposition() {
        for (n, k, rank) in [(200, 300, 16), (300, 200, 16), (150, 129, 1), (257, 255, 40)] {
            let w = weight_like(n, k);
            let view = View::from_slice(&w, n, k);
            let exact = exact_svd(view, rank).unwrap();
            let nearly = randomized_svd(view, rank, &SvdOptions::default()).unwrap();
            assert_orthonormal(&exact, n, k);
            assert_orthonormal(&nearly, n, k);
            let (best, found) = (residual(&w, &exact, n, k), residual(&w, &nearly, n, k));
            assert!(found <= best * 1.004, "{n} x {k}, rank {rank}: residual {found} for {best}");
            let energy = |svd: &LowRankSvd| svd.s.iter().map(|&s| s as f64 * s as f64).sum::<f64>();
            let (best, found) = (energy(&exact), energy(&nearly));
            assert!((1.0 - found / best).abs() < 2e-3, "{n} x {k}, rank {rank}: energy {found} for {best}");
        }
    }

    #[test]
    fn exact_reproduces_the_matrix_and_its_norm() {
        let (n, k) = (40, 33);
        let w = TestMat::random(5, n, k, 1.0).values();
        let svd = exact_svd(View::from_slice(&w, n, k), 33).unwrap();
        let total: f64 = w.iter().map(|&x| x as f64 * x as f64).sum();
        assert!(residual(&w, &svd, n, k) < 1e-11 * total);
        assert!(svd.s.windows(2).all(|pair| pair[0] >= pair[1]));
        // A full-rank request is served by the randomized one as well.
        assert_eq!(randomized_svd(View::from_slice(&w, n, k), 33, &SvdOptions::default()).unwrap(), svd);
    }

    #[test]
    fn a_matrix_of_lower_rank_than_asked_for_gives_orthonormal_vectors_and_zeros() {
        let (n, k) = (120, 150);
        let (u, v) = (TestMat::random(1, n, 2, 1.0).values(), TestMat::random(2, 2, k, 1.0).values());
        let w: Vec<f32> =
            (0..n * k).map(|i| u[i / k * 2] * v[i % k] + u[i / k * 2 + 1] * v[k + i % k]).collect();
        for w in [w, vec![0.0; n * k]] {
            let svd = randomized_svd(View::from_slice(&w, n, k), 5, &SvdOptions::default()).unwrap();
            assert_orthonormal(&svd, n, k);
            assert!(svd.s[2..].iter().all(|&s| s <= 1e-5 * svd.s[0]), "{:?}", svd.s);
            let total: f64 = w.iter().map(|&x| x as f64 * x as f64).sum();
            assert!(residual(&w, &svd, n, k) <= 1e-11 * total);
        }
    }

    #[test]
    fn the_largest_component_of_every_left_vector_is_positive() {
        let w = weight_like(200, 220);
        let view = View::from_slice(&w, 200, 220);
        for svd in [exact_svd(view, 7).unwrap(), randomized_svd(view, 7, &SvdOptions::default()).unwrap()] {
            for r in 0..7 {
                let column = svd.u.iter().skip(r).step_by(7);
                let largest = column.copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
                assert!(largest > 0.0);
            }
        }
    }

    #[test]
    fn the_result_depends_on_the_seed_and_not_on_the_threads() {
        let w = weight_like(210, 230);
        let run = |seed| {
            let options = SvdOptions { seed, ..SvdOptions::default() };
            let svd = randomized_svd(View::from_slice(&w, 210, 230), 8, &options).unwrap();
            [svd.u, svd.s, svd.v].concat()
        };
        let first = same_on_one_and_four_threads("randomized_svd", || run(1));
        assert_ne!(first, run(2));
    }

    #[test]
    fn rows_of_a_larger_buffer_are_served() {
        let w = weight_like(130, 140);
        let padded: Vec<f32> =
            w.chunks(140).flat_map(|row| row.iter().copied().chain([f32::NAN; 3])).collect();
        let mut view = View::from_slice(&padded, 130, 143);
        view.cols = 140;
        let options = SvdOptions::default();
        let plain = randomized_svd(View::from_slice(&w, 130, 140), 4, &options).unwrap();
        assert_eq!(randomized_svd(view, 4, &options).unwrap(), plain);
    }

    #[test]
    fn impossible_ranks_and_elements_that_are_not_finite_are_refused() {
        let mut w = vec![1.0; 12];
        for rank in [0, 4] {
            let error = exact_svd(View::from_slice(&w, 3, 4), rank).unwrap_err().to_string();
            assert_eq!(error, format!("exact_svd: rank {rank} is outside of 1..=3"));
        }
        w[6] = f32::NAN;
        let error = randomized_svd(View::from_slice(&w, 3, 4), 1, &SvdOptions::default()).unwrap_err();
        assert_eq!(error.to_string(), "randomized_svd: row 1, column 2 is `NaN`, expected a finite number");
    }
}
