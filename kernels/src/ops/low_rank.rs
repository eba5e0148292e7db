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
use crate::cuda::Source;
use crate::cuda::gemm::transposed;
use crate::error::{Error, Result, check};
use crate::ops::convert::convert;
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "low_rank_forward";
const PROJECTION: &str = "low_rank_projection_backward";
const INPUT: &str = "low_rank_input_gradient";
const BRANCH: &str = "low_rank_branch_gradients";

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

/// The gradient of h = A x by A.
///
/// dA += dh^T x. `dh` comes from [`low_rank_branch_gradients`], scale included.
///
/// Shapes: `x` (T, K); `da` (R, K); `dh` (T, R): R of one linear, or of several of one input whose factors lie one below
/// the other.
/// Accumulates: `da` is added to.
/// Precision: f32, sums over tokens included; within 1e-5 of f64, relative to the sum of the terms'
/// magnitudes. Equal bits for any number of threads: no sum is split between them.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: derived from the formula of [`low_rank_forward`].
pub fn low_rank_projection_backward(da: ViewMut, dh: View, x: View) -> Result<()> {
    check(PROJECTION, "rows of da", dh.cols, da.rows)?;
    check(PROJECTION, "columns of da", x.cols, da.cols)?;
    check(PROJECTION, "rows of dh", x.rows, dh.rows)?;
    if let Some(cuda) = x.cuda() {
        let dh = transposed(dh.matrix(PROJECTION)?);
        return cuda.gemm(da.matrix(PROJECTION)?, dh, x.matrix(PROJECTION)?, 1.0, 1.0);
    }
    da_fast(da.mat(PROJECTION)?, dh.mat(PROJECTION)?, x.mat(PROJECTION)?);
    Ok(())
}

/// The gradient of the projection's input alone: dropout stands between it and dx.
///
/// dx += dh A.
///
/// Shapes: `dx` (T, K); `dh` (T, R); `a` (R, K).
/// Accumulates: `dx` is added to.
/// Precision: as [`low_rank_projection_backward`].
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: derived from the formula of [`low_rank_forward`].
pub fn low_rank_input_gradient(dx: ViewMut, dh: View, a: View) -> Result<()> {
    check(INPUT, "rows of dx", dh.rows, dx.rows)?;
    check(INPUT, "columns of dx", a.cols, dx.cols)?;
    check(INPUT, "columns of dh", a.rows, dh.cols)?;
    if let Some(cuda) = dh.cuda() {
        return cuda.gemm(dx.matrix(INPUT)?, dh.matrix(INPUT)?, a.matrix(INPUT)?, 1.0, 1.0);
    }
    dx_fast(dx.mat(INPUT)?, dh.mat(INPUT)?, a.mat(INPUT)?);
    Ok(())
}

/// Both gradients that the branch of y = s diag(g) B h + ... takes from dy, in one pass over it.
///
/// dh = dy b, with scaling and row scale in b; dB += s diag(g) dy^T h.
///
/// Shapes: `dh`, `twin`, `h` (T, R); `db` (N, R); `dy` (T, N); `b` (N, R), of the type of activations. `twin` gets the
/// values of `dh` again: the dh of linears that share an input lie side by side in it.
/// Accumulates: `db` is added to, `dh` and `twin` are overwritten.
/// Precision: as [`low_rank_projection_backward`]; on CUDA `dh` is rounded to bf16 once. Equal bits for equal operands
/// on the same device.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: derived from the formula above; the row scale is a constant (DoRA, arXiv 2402.09353, section 4.3).
pub fn low_rank_branch_gradients(
    dh: ViewMut,
    twin: Option<ViewMut>,
    db: ViewMut,
    dy: View,
    b: View,
    h: View,
    out_scale: OutScale,
) -> Result<()> {
    low_rank_branch_gradients_together([(dy, Branch { dh, twin, db, b, h, out_scale })])
}

/// A branch: what its gradients are made of besides dy, and where they go; see [`low_rank_branch_gradients`].
#[derive(Debug)]
pub struct Branch<'a> {
    /// (T, R).
    pub dh: ViewMut<'a>,
    /// (T, R): the values of `dh` again.
    pub twin: Option<ViewMut<'a>>,
    /// (N, R).
    pub db: ViewMut<'a>,
    /// (N, R): s diag(g) B.
    pub b: View<'a>,
    /// (T, R).
    pub h: View<'a>,
    /// s and g.
    pub out_scale: OutScale<'a>,
}

impl Branch<'_> {
    fn check(&self, dy: View) -> Result<()> {
        let Branch { dh, twin, db, b, h, out_scale } = self;
        let rank = h.cols;
        for (to, [rows, cols]) in [
            (Some(dh), ["rows of dh", "columns of dh"]),
            (twin.as_ref(), ["rows of the twin", "columns of the twin"]),
        ] {
            let Some(to) = to else { continue };
            check(BRANCH, rows, dy.rows, to.rows)?;
            check(BRANCH, cols, rank, to.cols)?;
        }
        check(BRANCH, "rows of h", dy.rows, h.rows)?;
        check(BRANCH, "rows of b", dy.cols, b.rows)?;
        check(BRANCH, "columns of b", rank, b.cols)?;
        check(BRANCH, "rows of db", dy.cols, db.rows)?;
        check(BRANCH, "columns of db", rank, db.cols)?;
        let Some(rows) = out_scale.rows else { return Ok(()) };
        check(BRANCH, "rows of the row scale", 1, rows.rows)?;
        check(BRANCH, "columns of the row scale", dy.cols, rows.cols)
    }
}

/// [`low_rank_branch_gradients`] of several branches, with dy of each: on CUDA by one kernel for up to three of them.
///
/// Shapes: as [`low_rank_branch_gradients`], for every branch.
/// Accumulates: as there.
/// Precision: as there; on CUDA the sums over tokens are split otherwise than alone, so that last bits may differ.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: the op.
pub fn low_rank_branch_gradients_together<const N: usize>(mut branches: [(View, Branch); N]) -> Result<()> {
    for (dy, branch) in &branches {
        branch.check(*dy)?;
    }
    if let Some(cuda) = branches.first().and_then(|(dy, _)| dy.cuda()) {
        return cuda::branch_gradients(cuda, &mut branches);
    }
    for (dy, Branch { mut dh, twin, db, b, h, out_scale }) in branches {
        let row_scale = out_scale.rows.map(|rows| Ok::<_, Error>(rows.mat(BRANCH)?.row(0))).transpose()?;
        let dy = dy.mat(BRANCH)?;
        forward_fast(dh.reborrow().mat(BRANCH)?, dy, b.mat(BRANCH)?.transposed());
        if let Some(twin) = twin {
            convert(twin, dh.as_view())?;
        }
        db_fast(db.mat(BRANCH)?, dy, h.mat(BRANCH)?, out_scale.scaling, row_scale);
    }
    Ok(())
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new(
    "low_rank.cu",
    concat!(
        "#line 1 \"mma.cuh\"\n",
        include_str!("../cuda/mma.cuh"),
        "\n#line 1 \"low_rank.cu\"\n",
        include_str!("low_rank.cu"),
    ),
);

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

/// h[t][r] = sum_k x[t][k] * a[r][k], by x and a.
#[cfg(test)]
pub(super) fn projection_backward_naive(
    [dx, da]: [&mut [f64]; 2],
    [dh, x, a]: [&[f64]; 3],
    [tokens, k_cols, rank]: [usize; 3],
) {
    for t in 0..tokens {
        for r in 0..rank {
            for k in 0..k_cols {
                dx[t * k_cols + k] += dh[t * rank + r] * a[r * k_cols + k];
                da[r * k_cols + k] += dh[t * rank + r] * x[t * k_cols + k];
            }
        }
    }
}

/// y[t][n] = sum_r h[t][r] * b[n][r] with b[n][r] = s * g[n] * B[n][r], by h and B.
#[cfg(test)]
pub(super) fn branch_gradients_naive(
    [dh, db]: [&mut [f64]; 2],
    [dy, b, h]: [&[f64]; 3],
    scaling: f64,
    g: &[f64],
    [tokens, n_rows, rank]: [usize; 3],
) {
    dh.fill(0.0);
    for t in 0..tokens {
        for n in 0..n_rows {
            for r in 0..rank {
                dh[t * rank + r] += dy[t * n_rows + n] * b[n * rank + r];
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
    use crate::testing::{
        Mat as TestMat, Out, Tolerance, assert_close, check_fast, check_gradient, inner, tolerance,
    };

    /// T, K, R. Rank 1 has a test of its own below.
    const SHAPES: [[usize; 3]; 6] =
        [[1, 1, 2], [1, 127, 7], [7, 129, 3], [130, 33, 16], [33, 400, 8], [0, 4, 2]];

    /// See the quantized linear: n terms in f32 err by 1.8e-8 n, the worst element by five times that.
    fn close(terms: usize) -> Tolerance {
        tolerance(1e-6, 1e-7 * (terms as f64 + 8.0) * 4.0)
    }

    /// dh, x and a.
    fn inputs([t, k, r]: [usize; 3]) -> [TestMat; 3] {
        [(t, r), (t, k), (r, k)]
            .map(|(rows, cols)| TestMat::random((rows * 3 + cols) as u64, rows, cols, 1.0))
    }

    #[test]
    fn the_fast_forward_equals_the_naive_one() {
        for shape @ [t, k, r] in SHAPES {
            let [_, x, a] = inputs(shape);
            let mut h = vec![0.0; t * r];
            forward_naive(&mut h, &x.f64(), &a.f64(), shape);
            check_fast(&format!("{shape:?}"), [(Out::Set(t, r), &h)], [&x, &a], close(k), |[h], [x, a]| {
                low_rank_forward(h, x, a)
            });
        }
    }

    #[test]
    fn the_fast_backward_of_the_projection_equals_the_naive_one_and_adds() {
        for shape @ [t, k, r] in SHAPES {
            let [dh, x, a] = &inputs(shape);
            let [dx_start, da_start] =
                &[(t, k), (r, k)].map(|(rows, cols)| TestMat::random(7, rows, cols, 1.0));
            let (mut dx, mut da) = (dx_start.f64(), da_start.f64());
            projection_backward_naive([&mut dx, &mut da], [&dh.f64(), &x.f64(), &a.f64()], shape);
            let what = format!("{shape:?}");
            check_fast(&what, [(Out::Add(dx_start), &dx)], [dh, a], close(r), |[dx], [dh, a]| {
                low_rank_input_gradient(dx, dh, a)
            });
            check_fast(&what, [(Out::Add(da_start), &da)], [dh, x], close(t), |[da], [dh, x]| {
                low_rank_projection_backward(da, dh, x)
            });
        }
    }

    #[test]
    fn rank_one_is_served() {
        // Not through the harness: a matrix of one column is summed in another order when it is contiguous.
        let shape @ [t, k, r] = [5, 9, 1];
        let n = 7;
        let [dh, x, a] = &inputs(shape);
        let mut h = vec![0.0; t];
        forward_naive(&mut h, &x.f64(), &a.f64(), shape);
        let mut found = TestMat::poisoned(t, r);
        low_rank_forward(found.view_mut(), x.view(), a.view()).unwrap();
        assert_close("h", &found.values(), &h, close(k));

        let (mut dx, mut da) = (vec![0.0; t * k], vec![0.0; k]);
        projection_backward_naive([&mut dx, &mut da], [&dh.f64(), &x.f64(), &a.f64()], shape);
        let mut found = TestMat::new(r, k, vec![0.0; k]);
        low_rank_projection_backward(found.view_mut(), dh.view(), x.view()).unwrap();
        assert_close("da", &found.values(), &da, close(t));

        let [dy, b, h] = &[(t, n), (n, r), (t, r)].map(|(rows, cols)| TestMat::random(8, rows, cols, 1.0));
        let (mut expected, mut db) = (vec![0.0; t], vec![0.0; n]);
        let values = [dy, b, h].map(TestMat::f64);
        let values = values.each_ref().map(Vec::as_slice);
        branch_gradients_naive([&mut expected, &mut db], values, 2.0, &[1.0; 7], [t, n, r]);
        let (mut dh, mut found) = (TestMat::poisoned(t, r), TestMat::new(n, r, vec![0.0; n]));
        let out_scale = OutScale { scaling: 2.0, rows: None };
        let (to, db_to) = (dh.view_mut(), found.view_mut());
        low_rank_branch_gradients(to, None, db_to, dy.view(), b.view(), h.view(), out_scale).unwrap();
        assert_close("dh", &dh.values(), &expected, close(n));
        assert_close("db", &found.values(), &db, close(t));
    }

    #[test]
    fn the_naive_gradients_are_the_derivatives_of_the_naive_forward() {
        let [t, n, k, r] = [4, 5, 6, 3];
        let [_, x, a] = inputs([t, k, r]).map(|mat| mat.f64());
        let [dy, b, g] =
            [(t, n), (n, r), (1, n)].map(|(rows, cols)| TestMat::random(8, rows, cols, 1.0).f64());
        let scaling = 0.5;
        let folded =
            |b: &[f64]| b.iter().enumerate().map(|(i, b)| scaling * g[i / r] * b).collect::<Vec<_>>();
        let hidden = |x: &[f64], a: &[f64]| {
            let mut h = vec![0.0; t * r];
            forward_naive(&mut h, x, a, [t, k, r]);
            h
        };
        let loss = |x: &[f64], a: &[f64], b: &[f64]| {
            let mut y = vec![0.0; t * n];
            forward_naive(&mut y, &hidden(x, a), &folded(b), [t, r, n]);
            inner(&y, &dy)
        };
        let (mut dh, mut db) = (vec![0.0; t * r], vec![0.0; n * r]);
        let values = [&dy[..], &folded(&b), &hidden(&x, &a)];
        branch_gradients_naive([&mut dh, &mut db], values, scaling, &g, [t, n, r]);
        let (mut dx, mut da) = (vec![0.0; t * k], vec![0.0; r * k]);
        projection_backward_naive([&mut dx, &mut da], [&dh, &x, &a], [t, k, r]);
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
        // T 2, K 4, R 3: dx, dh, a; then da, dh, x; one of them wrong at a time.
        for (shapes, expected) in [
            ([(1, 4), (2, 3), (3, 4)], "rows of dx is 1, expected 2"),
            ([(2, 5), (2, 3), (3, 4)], "columns of dx is 5, expected 4"),
            ([(2, 4), (2, 2), (3, 4)], "columns of dh is 2, expected 3"),
        ] {
            let [mut dx, dh, a] = shapes.map(mat);
            let error = low_rank_input_gradient(dx.view_mut(), dh.view(), a.view()).unwrap_err();
            assert_eq!(error.to_string(), format!("low_rank_input_gradient: {expected}"));
        }
        for (shapes, expected) in [
            ([(2, 4), (2, 3), (2, 4)], "rows of da is 2, expected 3"),
            ([(3, 5), (2, 3), (2, 4)], "columns of da is 5, expected 4"),
            ([(3, 4), (1, 3), (2, 4)], "rows of dh is 1, expected 2"),
        ] {
            let [mut da, dh, x] = shapes.map(mat);
            let error = low_rank_projection_backward(da.view_mut(), dh.view(), x.view()).unwrap_err();
            assert_eq!(error.to_string(), format!("low_rank_projection_backward: {expected}"));
        }
    }
}
