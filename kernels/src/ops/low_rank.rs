//! The low-rank half of an adapter: x projected to rank, and the gradients of both factors.
//!
//! The other half, h bᵀ, is added by [`quant_linear`](super::quant_linear), which also adds dh A to dx.

#[cfg(test)]
mod branch_tests;
mod cuda;

pub use cuda::branch_gradients_scratch;

use crate::cpu::by_isa;
use crate::cpu::gemm::{Mat, MatMut, gemm};
use crate::cpu::scratch::with_scratch;
use crate::cuda::gemm::{Matrix, transposed};
use crate::cuda::{Arg, Cuda, Grid, Scratch, Source};
use crate::error::{Error, Result, check};
use crate::ops::convert::convert;
use crate::tensor::{Dtype, View, ViewMut};

const FORWARD: &str = "low_rank_forward";
const BACKWARD: &str = "low_rank_backward";

/// What the product h Bᵀ is multiplied by before it is added to y: `scaling`, and a factor per output.
#[derive(Debug, Clone, Copy)]
pub struct OutScale<'a> {
    /// s: alpha / r, or alpha / sqrt(r).
    pub scaling: f32,
    /// g (1, N): the row scale of DoRA, m / norm; ones if absent.
    pub rows: Option<View<'a>>,
}

/// Projects every token to the rank of an adapter.
///
/// h = x A^T.
///
/// Shapes: `h` (T, R); `x` (T, K); `a` (R, K).
/// Accumulates: nothing, `h` is overwritten.
/// Precision: f32; within 1e-5 of f64, relative to sum |x| |a|. Equal bits for any number of threads.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: Hu et al. (LoRA), arXiv 2106.09685, section 4.1.
pub fn low_rank_forward(h: ViewMut, x: View, a: View) -> Result<()> {
    check(FORWARD, "columns of x", a.cols, x.cols)?;
    check(FORWARD, "rows of h", x.rows, h.rows)?;
    check(FORWARD, "columns of h", a.rows, h.cols)?;
    if let Some(cuda) = x.cuda() {
        return cuda.gemm(h.matrix(FORWARD)?, x.matrix(FORWARD)?, transposed(a.matrix(FORWARD)?), 1.0, 0.0);
    }
    forward_fast(h.mat(FORWARD)?, x.mat(FORWARD)?, a.mat(FORWARD)?);
    Ok(())
}

/// The gradients of y = s diag(g) B h + ..., h = A x, by both factors and by x.
///
/// dA += dh^T x; dB += s diag(g) dy^T h; dx += dh A. `dh` comes from
/// [`low_rank_branch_gradients`], scale included.
///
/// Shapes: `dx`, `x` (T, K); `da`, `a` (R, K); `db` (N, R); `dh`, `h` (T, R); `dy` (T, N).
/// Accumulates: all three are added to.
/// Precision: f32, sums over tokens included; within 1e-5 of f64, relative to the sum of the terms'
/// magnitudes. Equal bits for any number of threads: no sum is split between them.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: derived from the formula above; the row scale is a constant (DoRA, arXiv 2402.09353, section 4.3).
pub fn low_rank_backward(
    dx: Option<ViewMut>,
    da: ViewMut,
    db: ViewMut,
    dh: View,
    dy: View,
    h: View,
    x: View,
    a: View,
    out_scale: OutScale,
) -> Result<()> {
    let (tokens, rank) = (x.rows, a.rows);
    check(BACKWARD, "columns of x", a.cols, x.cols)?;
    check(BACKWARD, "rows of da", rank, da.rows)?;
    check(BACKWARD, "columns of da", a.cols, da.cols)?;
    check(BACKWARD, "rows of dh", tokens, dh.rows)?;
    check(BACKWARD, "columns of dh", rank, dh.cols)?;
    check(BACKWARD, "rows of h", tokens, h.rows)?;
    check(BACKWARD, "columns of h", rank, h.cols)?;
    check(BACKWARD, "rows of dy", tokens, dy.rows)?;
    check(BACKWARD, "rows of db", dy.cols, db.rows)?;
    check(BACKWARD, "columns of db", rank, db.cols)?;
    if let Some(dx) = &dx {
        check(BACKWARD, "rows of dx", tokens, dx.rows)?;
        check(BACKWARD, "columns of dx", a.cols, dx.cols)?;
    }
    check_row_scale(out_scale, dy)?;
    if let Some(cuda) = x.cuda() {
        return backward_cuda(cuda, dx, &da, &db, [dh, dy, h, x, a], out_scale);
    }
    let row_scale = out_scale.rows.map(|rows| Ok::<_, Error>(rows.mat(BACKWARD)?.row(0))).transpose()?;
    let (dh, x) = (dh.mat(BACKWARD)?, x.mat(BACKWARD)?);
    if let Some(dx) = dx {
        dx_fast(dx.mat(BACKWARD)?, dh, a.mat(BACKWARD)?);
    }
    da_fast(da.mat(BACKWARD)?, dh, x);
    db_fast(db.mat(BACKWARD)?, dy.mat(BACKWARD)?, h.mat(BACKWARD)?, out_scale.scaling, row_scale);
    Ok(())
}

/// The gradient of h = A x by A.
///
/// dA += dh^T x.
///
/// Shapes: `x` (T, K); `da` (R, K); `dh` (T, R): R of one linear, or of several of one input whose factors lie one below
/// the other.
/// Accumulates: `da` is added to.
/// Precision: as [`low_rank_backward`].
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: see [`low_rank_backward`].
pub fn low_rank_projection_backward(da: ViewMut, dh: View, x: View) -> Result<()> {
    check(BACKWARD, "rows of da", dh.cols, da.rows)?;
    check(BACKWARD, "columns of da", x.cols, da.cols)?;
    check(BACKWARD, "rows of dh", x.rows, dh.rows)?;
    if let Some(cuda) = x.cuda() {
        let dh = transposed(dh.matrix(BACKWARD)?);
        return cuda.gemm(da.matrix(BACKWARD)?, dh, x.matrix(BACKWARD)?, 1.0, 1.0);
    }
    da_fast(da.mat(BACKWARD)?, dh.mat(BACKWARD)?, x.mat(BACKWARD)?);
    Ok(())
}

/// The gradient by B alone: the part of [`low_rank_backward`] that every linear has for itself.
///
/// dB += s diag(g) dy^T h.
///
/// Shapes: `db` (N, R); `dy` (T, N); `h` (T, R).
/// Accumulates: `db` is added to.
/// Precision: as [`low_rank_backward`].
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: see [`low_rank_backward`].
pub fn low_rank_branch_backward(db: ViewMut, dy: View, h: View, out_scale: OutScale) -> Result<()> {
    check(BACKWARD, "rows of h", dy.rows, h.rows)?;
    check(BACKWARD, "rows of db", dy.cols, db.rows)?;
    check(BACKWARD, "columns of db", h.cols, db.cols)?;
    check_row_scale(out_scale, dy)?;
    if let Some(cuda) = dy.cuda() {
        return db_cuda(cuda, &db, dy, h, out_scale);
    }
    let row_scale = out_scale.rows.map(|rows| Ok::<_, Error>(rows.mat(BACKWARD)?.row(0))).transpose()?;
    db_fast(db.mat(BACKWARD)?, dy.mat(BACKWARD)?, h.mat(BACKWARD)?, out_scale.scaling, row_scale);
    Ok(())
}

fn check_row_scale(out_scale: OutScale, dy: View) -> Result<()> {
    let Some(rows) = out_scale.rows else { return Ok(()) };
    check(BACKWARD, "rows of the row scale", 1, rows.rows)?;
    check(BACKWARD, "columns of the row scale", dy.cols, rows.cols)
}

/// The gradient of the projection's input alone: dropout stands between it and dx.
///
/// dx += dh A.
///
/// Shapes: `dx` (T, K); `dh` (T, R); `a` (R, K).
/// Accumulates: `dx` is added to.
/// Precision: f32, as [`low_rank_backward`].
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: see [`low_rank_backward`].
pub fn low_rank_input_gradient(dx: ViewMut, dh: View, a: View) -> Result<()> {
    check(BACKWARD, "rows of dx", dh.rows, dx.rows)?;
    check(BACKWARD, "columns of dx", a.cols, dx.cols)?;
    check(BACKWARD, "columns of dh", a.rows, dh.cols)?;
    if let Some(cuda) = dh.cuda() {
        return cuda.gemm(dx.matrix(BACKWARD)?, dh.matrix(BACKWARD)?, a.matrix(BACKWARD)?, 1.0, 1.0);
    }
    dx_fast(dx.mat(BACKWARD)?, dh.mat(BACKWARD)?, a.mat(BACKWARD)?);
    Ok(())
}

/// The gradient of the projection alone, where nothing below the linear is trained and dx is not made.
///
/// dh = dy b, with scaling and row scale in b.
///
/// Shapes: `dh` (T, R); `dy` (T, N); `b` (N, R).
/// Accumulates: nothing, `dh` is overwritten.
/// Precision: f32, as [`low_rank_forward`].
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: see [`low_rank_backward`].
pub fn low_rank_branch_gradient(dh: ViewMut, dy: View, b: View) -> Result<()> {
    check(BACKWARD, "rows of dh", dy.rows, dh.rows)?;
    check(BACKWARD, "columns of dh", b.cols, dh.cols)?;
    check(BACKWARD, "columns of dy", b.rows, dy.cols)?;
    if let Some(cuda) = dy.cuda() {
        return cuda.gemm(dh.matrix(BACKWARD)?, dy.matrix(BACKWARD)?, b.matrix(BACKWARD)?, 1.0, 0.0);
    }
    forward_fast(dh.mat(BACKWARD)?, dy.mat(BACKWARD)?, b.mat(BACKWARD)?.transposed());
    Ok(())
}

/// Both gradients that a linear's branch takes from dy, in one pass over it.
///
/// dh = dy b, with scaling and row scale in b; dB += s diag(g) dy^T h.
///
/// Shapes: `dh`, `twin`, `h` (T, R); `db` (N, R); `dy` (T, N); `b` (N, R), of the type of activations. `twin` gets the
/// values of `dh` again: the dh of linears that share an input lie side by side in it.
/// Accumulates: `db` is added to, `dh` and `twin` are overwritten.
/// Precision: f32, as [`low_rank_backward`]; on CUDA `dh` is rounded to bf16 once. Equal bits for equal operands on
/// the same device.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: see [`low_rank_backward`].
pub fn low_rank_branch_gradients(
    mut dh: ViewMut,
    twin: Option<ViewMut>,
    db: ViewMut,
    dy: View,
    b: View,
    h: View,
    out_scale: OutScale,
) -> Result<()> {
    let rank = h.cols;
    for (to, [rows, cols]) in [
        (Some(&dh), ["rows of dh", "columns of dh"]),
        (twin.as_ref(), ["rows of the twin", "columns of the twin"]),
    ] {
        let Some(to) = to else { continue };
        check(BACKWARD, rows, dy.rows, to.rows)?;
        check(BACKWARD, cols, rank, to.cols)?;
    }
    check(BACKWARD, "rows of h", dy.rows, h.rows)?;
    check(BACKWARD, "rows of b", dy.cols, b.rows)?;
    check(BACKWARD, "columns of b", rank, b.cols)?;
    check(BACKWARD, "rows of db", dy.cols, db.rows)?;
    check(BACKWARD, "columns of db", rank, db.cols)?;
    check_row_scale(out_scale, dy)?;
    if let Some(cuda) = dy.cuda()
        && cuda::branch_gradients(cuda, &dh, twin.as_ref(), &db, [dy, b, h], out_scale)?
    {
        return Ok(());
    }
    low_rank_branch_gradient(dh.reborrow(), dy, b)?;
    if let Some(twin) = twin {
        convert(twin, dh.as_view())?;
    }
    low_rank_branch_backward(db, dy, h, out_scale)
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("low_rank.cu", include_str!("low_rank.cu"));

/// Products by cuBLASLt; sums over tokens are in f32 and added to f32 gradients.
fn backward_cuda(
    cuda: &Cuda,
    dx: Option<ViewMut>,
    da: &ViewMut,
    db: &ViewMut,
    [dh, dy, h, x, a]: [View; 5],
    out_scale: OutScale,
) -> Result<()> {
    let dh = dh.matrix(BACKWARD)?;
    if let Some(dx) = dx {
        cuda.gemm(dx.matrix(BACKWARD)?, dh, a.matrix(BACKWARD)?, 1.0, 1.0)?;
    }
    cuda.gemm(da.matrix(BACKWARD)?, transposed(dh), x.matrix(BACKWARD)?, 1.0, 1.0)?;
    db_cuda(cuda, db, dy, h, out_scale)
}

fn db_cuda(cuda: &Cuda, db: &ViewMut, dy: View, h: View, out_scale: OutScale) -> Result<()> {
    let (dy, h, to) = (transposed(dy.matrix(BACKWARD)?), h.matrix(BACKWARD)?, db.matrix(BACKWARD)?);
    let Some(rows) = out_scale.rows else { return cuda.gemm(to, dy, h, out_scale.scaling, 1.0) };
    let ptr = cuda.scratch(Scratch::Partials, db.rows * db.cols * Dtype::F32.size())?;
    cuda.gemm(Matrix { ptr, stride: db.cols, ..to }, dy, h, 1.0, 0.0)?;
    let args = [
        Arg::Ptr(db.f32(BACKWARD)?),
        Arg::Ptr(ptr),
        Arg::Ptr(rows.f32(BACKWARD)?),
        Arg::F32(out_scale.scaling),
        Arg::size(db.rows),
        Arg::size(db.cols),
        Arg::size(db.stride),
    ];
    cuda.launch(&SOURCE, "low_rank_add_scaled", Grid::over(db.rows * db.cols, 256), &args)
}

// ------------------------------------------------------------------------------------------ CPU

/// Tokens of one task where tokens are independent.
const TOKEN_TILE: usize = 128;

/// Features of one task where the sum runs over tokens.
const FEATURE_TILE: usize = 96;

#[cfg(test)]
fn forward_naive(h: &mut [f64], x: &[f64], a: &[f64], [tokens, k_cols, rank]: [usize; 3]) {
    for t in 0..tokens {
        for r in 0..rank {
            h[t * rank + r] = (0..k_cols).map(|k| x[t * k_cols + k] * a[r * k_cols + k]).sum();
        }
    }
}

fn forward_fast(h: MatMut<'_>, x: Mat<'_>, a: Mat<'_>) {
    let rank = a.rows().max(1);
    h.par_tiles(TOKEN_TILE, rank, |h, tokens, _| gemm(h, false, 1.0, x.row_range(tokens), a.transposed()));
}

/// y[t][n] = s * g[n] * sum_r h[t][r] * b[n][r] and h[t][r] = sum_k x[t][k] * a[r][k], by a, b and x.
#[cfg(test)]
fn backward_naive(
    [dx, da, db]: [&mut [f64]; 3],
    [dh, dy, h, x, a]: [&[f64]; 5],
    scaling: f64,
    g: &[f64],
    [tokens, n_rows, k_cols, rank]: [usize; 4],
) {
    for t in 0..tokens {
        for r in 0..rank {
            for k in 0..k_cols {
                dx[t * k_cols + k] += dh[t * rank + r] * a[r * k_cols + k];
                da[r * k_cols + k] += dh[t * rank + r] * x[t * k_cols + k];
            }
            for n in 0..n_rows {
                db[n * rank + r] += scaling * g[n] * dy[t * n_rows + n] * h[t * rank + r];
            }
        }
    }
}

fn dx_fast(dx: MatMut<'_>, dh: Mat<'_>, a: Mat<'_>) {
    dx.par_tiles(TOKEN_TILE, 4 * FEATURE_TILE, |dx, tokens, cols| {
        gemm(dx, true, 1.0, dh.row_range(tokens), a.col_range(cols));
    });
}

fn da_fast(da: MatMut<'_>, dh: Mat<'_>, x: Mat<'_>) {
    let rank = dh.cols().max(1);
    da.par_tiles(rank, FEATURE_TILE, |da, _, cols| gemm(da, true, 1.0, dh.transposed(), x.col_range(cols)));
}

fn db_fast(db: MatMut<'_>, dy: Mat<'_>, h: Mat<'_>, scaling: f32, row_scale: Option<&[f32]>) {
    let rank = h.cols();
    db.par_tiles(FEATURE_TILE, rank.max(1), |mut db, rows, _| {
        let dy = dy.col_range(rows.clone()).transposed();
        let Some(row_scale) = row_scale else {
            return gemm(db, true, scaling, dy, h);
        };
        with_scratch(rows.len() * rank, |product| {
            gemm(MatMut::new(product, rows.len(), rank, rank), false, scaling, dy, h);
            for (i, n) in rows.enumerate() {
                add_scaled(db.row(i), row_scale[n], &product[i * rank..][..rank]);
            }
        });
    });
}

by_isa! {
    fn add_scaled(y: &mut [f32], scale: f32, x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += scale * x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Mat as TestMat, Out, Tolerance, check_fast, check_gradient, inner, tolerance};

    /// T, N, K, R. Rank 1 has a test of its own below.
    const SHAPES: [[usize; 4]; 6] =
        [[1, 1, 1, 2], [1, 129, 127, 7], [7, 97, 129, 3], [130, 200, 33, 16], [33, 40, 400, 8], [0, 3, 4, 2]];

    /// See the quantized linear: n terms in f32 err by 1.8e-8 n, the worst element by five times that.
    fn close(terms: usize) -> Tolerance {
        tolerance(1e-6, 1e-7 * (terms as f64 + 8.0) * 4.0)
    }

    fn inputs([t, n, k, r]: [usize; 4]) -> [TestMat; 6] {
        [(t, r), (t, n), (t, r), (t, k), (r, k), (1, n)]
            .map(|(rows, cols)| TestMat::random((rows * 3 + cols) as u64, rows, cols, 1.0))
    }

    #[test]
    fn the_fast_forward_equals_the_naive_one() {
        for shape @ [t, _, k, r] in SHAPES {
            let [_, _, _, x, a, _] = inputs(shape);
            let mut h = vec![0.0; t * r];
            forward_naive(&mut h, &x.f64(), &a.f64(), [t, k, r]);
            check_fast(&format!("{shape:?}"), [(Out::Set(t, r), &h)], [&x, &a], close(k), |[h], [x, a]| {
                low_rank_forward(h, x, a)
            });
        }
    }

    #[test]
    fn the_fast_backward_equals_the_naive_one_and_adds() {
        for shape @ [t, n, k, r] in SHAPES {
            let [dh, dy, h, x, a, g] = inputs(shape);
            let starts = [(t, k), (r, k), (n, r)].map(|(rows, cols)| TestMat::random(7, rows, cols, 1.0));
            for scaled in [false, true] {
                let factors = if scaled { g.f64() } else { vec![1.0; n] };
                let [mut dx, mut da, mut db] = starts.each_ref().map(TestMat::f64);
                backward_naive(
                    [&mut dx, &mut da, &mut db],
                    [&dh, &dy, &h, &x, &a].map(TestMat::f64).each_ref().map(Vec::as_slice),
                    0.5,
                    &factors,
                    shape,
                );
                let [dx_start, da_start, db_start] = &starts;
                check_fast(
                    &format!("{shape:?}, row scale: {scaled}"),
                    [(Out::Add(dx_start), &dx), (Out::Add(da_start), &da), (Out::Add(db_start), &db)],
                    [&dh, &dy, &h, &x, &a, &g],
                    close(t.max(r)),
                    |[dx, da, db], [dh, dy, h, x, a, g]| {
                        let out_scale = OutScale { scaling: 0.5, rows: scaled.then_some(g) };
                        low_rank_backward(Some(dx), da, db, dh, dy, h, x, a, out_scale)
                    },
                );
            }
        }
    }

    #[test]
    fn rank_one_and_a_gradient_without_dx_are_served() {
        // Not through the harness: a matrix of one column is summed in another order when it is contiguous.
        let shape @ [t, n, k, r] = [5, 7, 9, 1];
        let mats @ [dh, dy, h, x, a, _] = &inputs(shape);
        let values = mats.each_ref().map(TestMat::f64);
        let mut expected = vec![0.0; t];
        forward_naive(&mut expected, &values[3], &values[4], [t, k, r]);
        let mut found = TestMat::poisoned(t, r);
        low_rank_forward(found.view_mut(), x.view(), a.view()).unwrap();
        crate::testing::assert_close("h", &found.values(), &expected, close(k));
        let (mut da, mut db, mut dx) = (vec![0.0; k], vec![0.0; n], vec![0.0; t * k]);
        let [v0, v1, v2, v3, v4, _] = values.each_ref().map(Vec::as_slice);
        backward_naive([&mut dx, &mut da, &mut db], [v0, v1, v2, v3, v4], 2.0, &[1.0; 7], shape);
        let mut da_found = TestMat::new(r, k, vec![0.0; k]);
        let mut db_found = TestMat::new(n, r, vec![0.0; n]);
        let (da_view, db_view) = (da_found.view_mut(), db_found.view_mut());
        let out_scale = OutScale { scaling: 2.0, rows: None };
        let (dh, dy, h, x, a) = (dh.view(), dy.view(), h.view(), x.view(), a.view());
        low_rank_backward(None, da_view, db_view, dh, dy, h, x, a, out_scale).unwrap();
        crate::testing::assert_close("da", &da_found.values(), &da, close(t));
        crate::testing::assert_close("db", &db_found.values(), &db, close(t));
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let shape @ [t, n, k, r] = [4, 5, 6, 3];
        let [_, dy, _, x, a, g] = inputs(shape).map(|mat| mat.f64());
        let b = TestMat::random(8, n, r, 1.0).f64();
        let scaling = 0.5;
        let hidden = |x: &[f64], a: &[f64]| {
            let mut h = vec![0.0; t * r];
            forward_naive(&mut h, x, a, [t, k, r]);
            h
        };
        let loss = |x: &[f64], a: &[f64], b: &[f64]| {
            let (h, mut y) = (hidden(x, a), vec![0.0; t * n]);
            forward_naive(&mut y, &h, b, [t, r, n]);
            y.iter_mut().enumerate().for_each(|(i, y)| *y *= scaling * g[i % n]);
            inner(&y, &dy)
        };
        // dh as the linear gives it: dy times s diag(g) B.
        let h = hidden(&x, &a);
        let mut dh = vec![0.0; t * r];
        for t in 0..t {
            for i in 0..r {
                dh[t * r + i] = (0..n).map(|n_| dy[t * n + n_] * scaling * g[n_] * b[n_ * r + i]).sum();
            }
        }
        let (mut dx, mut da, mut db) = (vec![0.0; t * k], vec![0.0; r * k], vec![0.0; n * r]);
        backward_naive([&mut dx, &mut da, &mut db], [&dh, &dy, &h, &x, &a], scaling, &g, shape);
        check_gradient("x", &x, &dx, |x| loss(x, &a, &b));
        check_gradient("a", &a, &da, |a| loss(&x, a, &b));
        check_gradient("b", &b, &db, |b| loss(&x, &a, b));
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let mat = |(rows, cols)| TestMat::new(rows, cols, vec![0.0; rows * cols]);
        let forward = |h, x, a| {
            let (mut h, x, a) = (mat(h), mat(x), mat(a));
            low_rank_forward(h.view_mut(), x.view(), a.view()).unwrap_err().to_string()
        };
        assert_eq!(forward((2, 3), (2, 5), (3, 4)), "low_rank_forward: columns of x is 5, expected 4");
        assert_eq!(forward((1, 3), (2, 4), (3, 4)), "low_rank_forward: rows of h is 1, expected 2");
        assert_eq!(forward((2, 2), (2, 4), (3, 4)), "low_rank_forward: columns of h is 2, expected 3");
        // T 2, N 5, K 4, R 3: dx, da, db, dh, dy, h, x, a, row scale; one of them wrong at a time.
        let right = [(2, 4), (3, 4), (5, 3), (2, 3), (2, 5), (2, 3), (2, 4), (3, 4), (1, 5)];
        for (wrong, shape, expected) in [
            (0, (1, 4), "rows of dx is 1, expected 2"),
            (0, (2, 5), "columns of dx is 5, expected 4"),
            (1, (2, 4), "rows of da is 2, expected 3"),
            (1, (3, 5), "columns of da is 5, expected 4"),
            (2, (4, 3), "rows of db is 4, expected 5"),
            (2, (5, 2), "columns of db is 2, expected 3"),
            (3, (1, 3), "rows of dh is 1, expected 2"),
            (3, (2, 2), "columns of dh is 2, expected 3"),
            (4, (1, 5), "rows of dy is 1, expected 2"),
            (5, (1, 3), "rows of h is 1, expected 2"),
            (5, (2, 4), "columns of h is 4, expected 3"),
            (6, (2, 5), "columns of x is 5, expected 4"),
            (8, (2, 5), "rows of the row scale is 2, expected 1"),
            (8, (1, 4), "columns of the row scale is 4, expected 5"),
        ] {
            let mut shapes = right;
            shapes[wrong] = shape;
            let [mut dx, mut da, mut db, dh, dy, h, x, a, g] = shapes.map(mat);
            let error = low_rank_backward(
                Some(dx.view_mut()),
                da.view_mut(),
                db.view_mut(),
                dh.view(),
                dy.view(),
                h.view(),
                x.view(),
                a.view(),
                OutScale { scaling: 1.0, rows: Some(g.view()) },
            );
            assert_eq!(error.unwrap_err().to_string(), format!("low_rank_backward: {expected}"));
        }
    }
}
