//! The linear layer on a packed weight, with row scale and low-rank branch: where a step spends its time.
//!
//! The weight is dequantized tile by tile into a per-thread buffer that feeds a matrix product, and a
//! row scale (the DoRA factor g) is multiplied into the rows while they are there. The branch adds
//! its product to the same tile of the output, so that LoRA and DoRA cost one pass over y.

mod cuda;

pub(crate) use cuda::for_each_tile;
pub use cuda::weight_scratch;

use crate::cpu::gemm::{Mat, MatMut, gemm};
use crate::cpu::scratch::with_scratch;
use crate::cpu::{by_isa, math};
use crate::error::{Result, check};
use crate::ops::low_rank::low_rank_input_gradient;
use crate::tensor::{View, ViewMut};
use crate::weight::BaseWeight;

/// The low-rank branch of a linear layer: `y += h bᵀ`.
#[derive(Debug, Clone, Copy)]
pub struct Branch<'a> {
    /// `h = x Aᵀ`, (T, R), after dropout if there is one.
    pub h: View<'a>,
    /// `b = s diag(g) B`, (N, R): scaling and row scale are already folded in.
    pub b: View<'a>,
}

/// The product with a frozen packed weight, its rows scaled, plus a low-rank branch.
///
/// `y = x Wᵀ diag(g) + h bᵀ`; backward: `dx = dy diag(g) W`, and for the branch [`low_rank`](super::low_rank)'s. W and g
/// get no gradient here: W is frozen, and the one of g's magnitude is [`row_scale`](super::row_scale)'s.
///
/// - `Shapes`: y (T, N), x (T, K), weight (N, K), row_scale (1, N), h (T, R), b (N, R).
/// - `Accumulates`: `y =`.
/// - `Precision`: f32 products and sums of the dequantized weight; within 1e-5 of f64 relative to
///   `Σ |x| |w|`. Equal bits for any number of threads.
/// - `Errors`: shapes that do not belong together; a device without this kernel.
/// - `Source`: LoRA (arXiv 2106.09685) equation 3; DoRA (arXiv 2402.09353) equation 5 with m / ‖V‖ = g.
pub fn quant_linear_forward(
    y: ViewMut<'_>,
    x: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    branch: Option<Branch<'_>>,
) -> Result<()> {
    forward("quant_linear_forward", y, None, x, weight, row_scale, branch)
}

/// [`quant_linear_forward`] onto a residual stream: `y = to + x Wᵀ diag(g) + h bᵀ`.
///
/// On CUDA one product makes y where h lies in the padding behind the rows of x. Its backward is that of
/// [`quant_linear_forward`]; the gradient of `to` is dy.
///
/// - `Shapes`: as [`quant_linear_forward`], and to (T, N).
/// - `Accumulates`: `y =`.
/// - `Precision`: as [`quant_linear_forward`], and one rounding of the sum.
/// - `Errors`: as [`quant_linear_forward`].
/// - `Source`: see [`quant_linear_forward`]; He et al., arXiv 1512.03385, equation 1.
pub fn quant_linear_forward_onto(
    y: ViewMut<'_>,
    to: View<'_>,
    x: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    branch: Option<Branch<'_>>,
) -> Result<()> {
    const OP: &str = "quant_linear_forward_onto";
    check(OP, "rows of to", y.rows, to.rows)?;
    check(OP, "columns of to", y.cols, to.cols)?;
    forward(OP, y, Some(to), x, weight, row_scale, branch)
}

/// `y = x Wᵀ diag(g) + h bᵀ`, and `to` added to it.
fn forward(
    op: &'static str,
    y: ViewMut<'_>,
    to: Option<View<'_>>,
    x: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    branch: Option<Branch<'_>>,
) -> Result<()> {
    check(op, "columns of x", weight.cols(), x.cols)?;
    check(op, "rows of y", x.rows, y.rows)?;
    check(op, "columns of y", weight.rows(), y.cols)?;
    check_row_scale(op, row_scale, weight)?;
    if let Some(Branch { h, b }) = branch {
        check(op, "rows of h", x.rows, h.rows)?;
        check(op, "rows of b", weight.rows(), b.rows)?;
        check(op, "columns of b", h.cols, b.cols)?;
    }
    if let Some(device) = x.cuda() {
        return cuda::forward(op, device, &y, to, x, weight, row_scale, branch);
    }
    let row_scale = row_scale_slice(op, row_scale)?;
    let branch = match branch {
        None => None,
        Some(Branch { h, b }) => Some((h.mat(op)?, b.mat(op)?)),
    };
    let to = to.map(|to| to.mat(op)).transpose()?;
    forward_fast(y.mat(op)?, to, x.mat(op)?, weight, row_scale, branch);
    Ok(())
}

/// The bf16 copy of a weight on a device with the row scale and the adapter of now, where a product wrote one with a row
/// scale before, so that the next product finds it; nothing elsewhere.
///
/// `copy = [diag(g) W | b]`, and below it `a` where there is room.
///
/// - `Shapes`: row_scale (1, N), b (N, R), a (R, K), weight (N, K).
/// - `Accumulates`: nothing, the copy is overwritten.
/// - `Precision`: that of [`dequantize_rows`](super::dequantize::dequantize_rows).
/// - `Errors`: shapes that do not belong together.
/// - `Source`: see [`quant_linear_forward`].
pub fn scale_copy_anew(weight: &BaseWeight, row_scale: View<'_>, b: View<'_>, a: View<'_>) -> Result<()> {
    const OP: &str = "scale_copy_anew";
    check(OP, "columns of row_scale", weight.rows(), row_scale.cols)?;
    check(OP, "rows of b", weight.rows(), b.rows)?;
    check(OP, "columns of a", weight.cols(), a.cols)?;
    check(OP, "rows of a", b.cols, a.rows)?;
    match row_scale.cuda() {
        Some(cuda) => cuda::scale_copy_anew(cuda, weight, row_scale, b, a),
        None => Ok(()),
    }
}

/// Backward of [`quant_linear_forward`] to its input: `dx = dy diag(g) W`.
///
/// - `Shapes`: dx (T, K), dy (T, N), weight (N, K), row_scale (1, N).
/// - `Accumulates`: `dx =`, or `dx +=` with `accumulate`.
/// - `Precision`: as forward, relative to `Σ |dy| |g w|`.
/// - `Errors`: shapes that do not belong together; a device without this kernel.
/// - `Source`: see [`quant_linear_forward`].
pub fn quant_linear_backward(
    dx: ViewMut<'_>,
    dy: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    accumulate: bool,
) -> Result<()> {
    const OP: &str = "quant_linear_backward";
    check_backward(OP, &dx, dy, weight, row_scale)?;
    backward(OP, dx, dy, weight, row_scale, accumulate)
}

/// [`quant_linear_backward`] together with the gradient that reaches x through the branch: `dx = dy diag(g) W + dh a`.
///
/// On CUDA one product makes dx where dh lies in the padding behind the rows of dy.
///
/// - `Shapes`: as [`quant_linear_backward`], dh (T, R) and a (R, K).
/// - `Accumulates`: `dx =`, or `dx +=` with `accumulate`.
/// - `Precision`: as [`quant_linear_backward`], relative to `Σ |dy| |g w| + Σ |dh| |a|`.
/// - `Errors`: as [`quant_linear_backward`].
/// - `Source`: LoRA (arXiv 2106.09685) equation 3, by x.
pub fn quant_linear_backward_with_branch(
    mut dx: ViewMut<'_>,
    dh: View<'_>,
    dy: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    a: View<'_>,
    accumulate: bool,
) -> Result<()> {
    const OP: &str = "quant_linear_backward_with_branch";
    check_backward(OP, &dx, dy, weight, row_scale)?;
    check(OP, "rows of dh", dy.rows, dh.rows)?;
    check(OP, "rows of a", dh.cols, a.rows)?;
    check(OP, "columns of a", weight.cols(), a.cols)?;
    if let Some(device) = dy.cuda()
        && cuda::backward_with_branch(OP, device, &dx, dh, dy, weight, row_scale, a, accumulate)?
    {
        return Ok(());
    }
    backward(OP, dx.reborrow(), dy, weight, row_scale, accumulate)?;
    low_rank_input_gradient(dx, dh, a)
}

/// [`quant_linear_backward`] of operands that were checked.
fn backward(
    op: &'static str,
    dx: ViewMut<'_>,
    dy: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    accumulate: bool,
) -> Result<()> {
    if let Some(device) = dy.cuda() {
        return cuda::backward(op, device, &dx, dy, weight, row_scale, accumulate);
    }
    let row_scale = row_scale_slice(op, row_scale)?;
    backward_fast(dx.mat(op)?, dy.mat(op)?, weight, row_scale, accumulate);
    Ok(())
}

fn check_backward(
    op: &'static str,
    dx: &ViewMut<'_>,
    dy: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
) -> Result<()> {
    check(op, "columns of dy", weight.rows(), dy.cols)?;
    check(op, "rows of dx", dy.rows, dx.rows)?;
    check(op, "columns of dx", weight.cols(), dx.cols)?;
    check_row_scale(op, row_scale, weight)
}

fn check_row_scale(op: &'static str, row_scale: Option<View<'_>>, weight: &BaseWeight) -> Result<()> {
    let Some(row_scale) = row_scale else { return Ok(()) };
    check(op, "rows of row_scale", 1, row_scale.rows)?;
    check(op, "columns of row_scale", weight.rows(), row_scale.cols)
}

fn row_scale_slice<'a>(op: &'static str, row_scale: Option<View<'a>>) -> Result<Option<&'a [f32]>> {
    row_scale.map(|row_scale| Ok(row_scale.mat(op)?.row(0))).transpose()
}

// ---------------------------------------------------------------------------------------------- CPU

/// Rows of W that one forward task dequantizes: a multiple of the 8, 16, 24 and 48 rows that the
/// matrix product works on at a time, and for K of a few thousand a tile of about one megabyte.
const ROW_TILE: usize = 96;

/// Least columns of W in one backward panel, for the same reasons; rounded up to whole blocks.
const COL_PANEL: usize = 192;

/// Rows of W that a backward task dequantizes at a time.
const ROW_CHUNK: usize = 512;

/// Tasks that a product is cut into at least, if it is large enough: work for the cores of a desktop.
const TASKS: usize = 12;

/// Fewest tokens of one task: below, unpacking W costs more than a few per cent of the product.
const LEAST_TOKENS: usize = 128;

/// Tokens of one task. Every task unpacks its part of W, so a wide layer keeps all tokens together and a
/// narrow one is cut along its tokens too.
fn token_tile(tokens: usize, tiles_across: usize) -> usize {
    let down = TASKS.div_ceil(tiles_across.max(1));
    tokens.div_ceil(down).next_multiple_of(32).max(LEAST_TOKENS)
}

/// Up to so many tokens (generation) a dot product per row beats packing W for a matrix product.
const DOT_TOKENS: usize = 4;

/// The definition, in f64: `branch` is (h, b, R).
#[cfg(test)]
fn forward_naive(y: &mut [f64], x: &[f64], w: &[f64], g: &[f64], branch: Option<(&[f64], &[f64], usize)>) {
    let n_rows = g.len();
    let k_cols = w.len() / n_rows.max(1);
    for (t, y) in y.chunks_mut(n_rows.max(1)).enumerate() {
        for n in 0..n_rows {
            let base: f64 = (0..k_cols).map(|k| x[t * k_cols + k] * w[n * k_cols + k]).sum();
            y[n] = g[n] * base;
            if let Some((h, b, rank)) = branch {
                y[n] += (0..rank).map(|r| h[t * rank + r] * b[n * rank + r]).sum::<f64>();
            }
        }
    }
}

/// The definition, in f64: adds to dx.
#[cfg(test)]
fn backward_naive(dx: &mut [f64], dy: &[f64], w: &[f64], g: &[f64]) {
    let n_rows = g.len();
    let k_cols = w.len() / n_rows.max(1);
    for (t, dy) in dy.chunks(n_rows.max(1)).enumerate() {
        for k in 0..k_cols {
            // y[t][n] = g[n] * sum_k x[t][k] * w[n][k] + ...
            dx[t * k_cols + k] += (0..n_rows).map(|n| dy[n] * g[n] * w[n * k_cols + k]).sum::<f64>();
        }
    }
}

fn forward_fast(
    y: MatMut<'_>,
    to: Option<Mat<'_>>,
    x: Mat<'_>,
    weight: &BaseWeight,
    row_scale: Option<&[f32]>,
    branch: Option<(Mat<'_>, Mat<'_>)>,
) {
    let k = weight.cols();
    let token_tile = token_tile(x.rows(), weight.rows().div_ceil(ROW_TILE));
    y.par_tiles(token_tile, ROW_TILE, |mut tile, tokens, rows| {
        with_scratch(rows.len() * k, |w| {
            weight.dequantize_rows(rows.clone(), w);
            if let Some(g) = row_scale {
                scale_rows(w, &g[rows.clone()], k);
            }
            let x = x.row_range(tokens.clone());
            let w = Mat::new(w, rows.len(), k, k);
            if x.rows() <= DOT_TOKENS {
                for t in 0..x.rows() {
                    for (n, y) in tile.row(t).iter_mut().enumerate() {
                        *y = dot(x.row(t), w.row(n));
                    }
                }
            } else {
                gemm(tile.reborrow(), false, 1.0, x, w.transposed());
            }
            if let Some((h, b)) = branch {
                let b = b.row_range(rows.clone());
                gemm(tile.reborrow(), true, 1.0, h.row_range(tokens.clone()), b.transposed());
            }
            if let Some(to) = to {
                for (i, t) in tokens.enumerate() {
                    add(tile.row(i), &to.row(t)[rows.clone()]);
                }
            }
        });
    });
}

fn backward_fast(
    dx: MatMut<'_>,
    dy: Mat<'_>,
    weight: &BaseWeight,
    row_scale: Option<&[f32]>,
    accumulate: bool,
) {
    let width = COL_PANEL.next_multiple_of(weight.block_len());
    let token_tile = token_tile(dy.rows(), weight.cols().div_ceil(width));
    dx.par_tiles(token_tile, width, |mut tile, tokens, cols| {
        let dy = dy.row_range(tokens);
        // No row at all is one empty chunk, which clears dx as the empty sum asks for.
        for start in (0..weight.rows().max(1)).step_by(ROW_CHUNK) {
            let rows = start..weight.rows().min(start + ROW_CHUNK);
            with_scratch(rows.len() * cols.len(), |w| {
                weight.dequantize_tile(rows.clone(), cols.clone(), w);
                if let Some(g) = row_scale {
                    scale_rows(w, &g[rows.clone()], cols.len());
                }
                let w = Mat::new(w, rows.len(), cols.len(), cols.len());
                gemm(tile.reborrow(), accumulate || start > 0, 1.0, dy.col_range(rows), w);
            });
        }
    });
}

by_isa! {
    fn add(y: &mut [f32], x: &[f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x;
        }
    }
}

by_isa! {
    fn scale_rows(w: &mut [f32], scale: &[f32], width: usize) {
        for (row, scale) in w.chunks_exact_mut(width.max(1)).zip(scale) {
            for w in row {
                *w *= scale;
            }
        }
    }
}

by_isa! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        math::dot(a, b)
    }
}

#[cfg(test)]
mod tests {
    use qpeft_formats::GgmlType;
    use qpeft_formats::file::Bytes;

    use super::*;
    use crate::testing::{Mat as TestMat, Out, assert_close, check_fast, check_gradient, inner, tolerance};

    fn widen(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&x| x as f64).collect()
    }

    fn f32_weight(n: usize, k: usize) -> BaseWeight {
        BaseWeight::from_f32(n, k, &TestMat::random(9, n, k, 1.0).values()).unwrap()
    }

    /// Fast against naive, T tokens, with row scale and branch of rank r.
    ///
    /// The terms are products of unit normals (times g in scaled rows). Summed one after another in f32,
    /// the i-th addition rounds a partial sum of size √i by 2.5e-8 of it (root mean square), which adds
    /// up to 1.8e-8 n; the worst of 100 000 elements lies at five times that.
    fn check_case(what: &str, weight: &BaseWeight, t: usize, r: usize) {
        let (n, k) = (weight.rows(), weight.cols());
        let [x, dy] = [(1, k), (2, n)].map(|(seed, cols)| TestMat::random(seed, t, cols, 1.0));
        let [h, b] = [(3, t), (4, n)].map(|(seed, rows)| TestMat::random(seed, rows, r, 1.0));
        let g = TestMat::random(5, 1, n, 1.0);
        let w = widen(&weight.dequantize());
        let ones = vec![1.0; n];
        let close = |terms: usize| tolerance(1e-6, 1e-7 * (terms as f64 + 8.0));
        let largest = g.values().iter().fold(1.0, |largest: f64, g| largest.max(g.abs() as f64));
        let close_scaled = |terms: usize| tolerance(1e-6, close(terms).abs * largest);

        let mut y = vec![0.0; t * n];
        forward_naive(&mut y, &x.f64(), &w, &ones, None);
        check_fast(what, [(Out::Set(t, n), &y)], [&x], close(k), |[y], [x]| {
            quant_linear_forward(y, x, weight, None, None)
        });
        forward_naive(&mut y, &x.f64(), &w, &g.f64(), Some((&h.f64(), &b.f64(), r)));
        check_fast(
            what,
            [(Out::Set(t, n), &y)],
            [&x, &g, &h, &b],
            close_scaled(k + r),
            |[y], [x, g, h, b]| quant_linear_forward(y, x, weight, Some(g), Some(Branch { h, b })),
        );
        let to = TestMat::random(8, t, n, 1.0);
        y.iter_mut().zip(to.f64()).for_each(|(y, to)| *y += to);
        check_fast(
            what,
            [(Out::Set(t, n), &y)],
            [&to, &x, &g, &h, &b],
            close_scaled(k + r + 1),
            |[y], [to, x, g, h, b]| {
                quant_linear_forward_onto(y, to, x, weight, Some(g), Some(Branch { h, b }))
            },
        );

        let mut dx = vec![0.0; t * k];
        backward_naive(&mut dx, &dy.f64(), &w, &ones);
        check_fast(what, [(Out::Set(t, k), &dx)], [&dy], close(n), |[dx], [dy]| {
            quant_linear_backward(dx, dy, weight, None, false)
        });
        let start = TestMat::random(6, t, k, 1.0);
        let mut dx = start.f64();
        backward_naive(&mut dx, &dy.f64(), &w, &g.f64());
        check_fast(what, [(Out::Add(&start), &dx)], [&dy, &g], close_scaled(n), |[dx], [dy, g]| {
            quant_linear_backward(dx, dy, weight, Some(g), true)
        });
        if k == 1 {
            // Not through the harness: a matrix of one column is summed in another order when it is contiguous.
            return;
        }
        // dx = dy diag(g) W + dh a is that of one weight with the rows of a below.
        let a = TestMat::random(7, r, k, 1.0);
        let joined = |left: &[f64], right: &[f64]| -> Vec<f64> {
            let rows = left.chunks(n.max(1)).zip(right.chunks(r.max(1)));
            rows.flat_map(|(left, right)| left.iter().chain(right).copied().collect::<Vec<_>>()).collect()
        };
        let [below, scale] = [[&w[..], &a.f64()].concat(), [&g.f64()[..], &vec![1.0; r]].concat()];
        for (accumulate, out) in [(false, Out::Set(t, k)), (true, Out::Add(&start))] {
            let mut dx = if accumulate { start.f64() } else { vec![0.0; t * k] };
            backward_naive(&mut dx, &joined(&dy.f64(), &h.f64()), &below, &scale);
            check_fast(what, [(out, &dx)], [&dy, &h, &g, &a], close_scaled(n + r), |[dx], [dy, dh, g, a]| {
                quant_linear_backward_with_branch(dx, dh, dy, weight, Some(g), a, accumulate)
            });
        }
    }

    #[test]
    fn fast_equals_naive_at_odd_sizes() {
        for (t, n, k, r) in [
            (0, 5, 4, 2),
            (1, 1, 1, 2),
            (1, 129, 127, 7),
            (4, 97, 33, 2),
            (5, 7, 129, 9),
            (16, 200, 97, 3),
            (7, 300, 129, 8),
        ] {
            check_case(&format!("T {t} N {n} K {k} R {r}"), &f32_weight(n, k), t, r);
        }
    }

    #[test]
    fn fast_equals_naive_over_several_tiles_of_every_dimension() {
        check_case("several tiles", &f32_weight(ROW_CHUNK + 17, 2 * COL_PANEL + 1), 3 * LEAST_TOKENS + 3, 5);
    }

    #[test]
    fn every_block_type_computes_with_its_dequantized_values() {
        for dtype in GgmlType::writable() {
            let (n, k) = (37, 512);
            let zeros = Bytes::from(vec![0; n * dtype.row_bytes(k).unwrap()]);
            let weight = BaseWeight::from_ggml(dtype, n, k, zeros).unwrap();
            let weight = weight.requantize(&TestMat::random(9, n, k, 1.0).values()).unwrap();
            for t in [1, 19] {
                check_case(dtype.name(), &weight, t, 4);
            }
        }
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let (t, n, k, r) = (3, 6, 5, 2);
        let [x, w, g, h, b, dy] = [(t, k), (n, k), (1, n), (t, r), (n, r), (t, n)]
            .map(|(rows, cols)| TestMat::random((rows * 10 + cols) as u64, rows, cols, 1.0).f64());
        let loss = |x: &[f64], h: &[f64]| {
            let mut y = vec![0.0; t * n];
            forward_naive(&mut y, x, &w, &g, Some((h, &b, r)));
            inner(&y, &dy)
        };
        let mut dx = vec![0.0; t * k];
        backward_naive(&mut dx, &dy, &w, &g);
        check_gradient("dx", &x, &dx, |x| loss(x, &h));
    }

    #[test]
    fn a_branch_of_rank_one_is_served() {
        // Not through the harness: a matrix of one column is summed in another order when it is contiguous.
        let (weight, ones) = (f32_weight(7, 5), vec![1.0; 7]);
        let [x, h, b, dy] = [(3, 5), (3, 1), (7, 1), (3, 7)].map(|(r, c)| TestMat::random(8, r, c, 1.0));
        let w = widen(&weight.dequantize());
        let (mut y, mut dx) = (vec![0.0; 21], vec![0.0; 15]);
        forward_naive(&mut y, &x.f64(), &w, &ones, Some((&h.f64(), &b.f64(), 1)));
        backward_naive(&mut dx, &dy.f64(), &w, &ones);
        let [mut y_fast, mut dx_fast] = [(3, 7), (3, 5)].map(|(r, c)| TestMat::poisoned(r, c));
        let branch = Branch { h: h.view(), b: b.view() };
        quant_linear_forward(y_fast.view_mut(), x.view(), &weight, None, Some(branch)).unwrap();
        quant_linear_backward(dx_fast.view_mut(), dy.view(), &weight, None, false).unwrap();
        for (what, found, expected) in [("y", y_fast, y), ("dx", dx_fast, dx)] {
            assert_close(what, &found.values(), &expected, tolerance(1e-6, 3e-6));
        }
    }

    #[test]
    fn a_weight_without_rows_gives_a_gradient_of_zero() {
        let (weight, mut dx) = (f32_weight(0, 4), TestMat::poisoned(2, 4));
        let dy = TestMat::poisoned(2, 0);
        quant_linear_backward(dx.view_mut(), dy.view(), &weight, None, false).unwrap();
        assert_eq!(dx.values(), [0.0; 8]);
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let weight = f32_weight(3, 4);
        let m = |rows, cols| TestMat::new(rows, cols, vec![0.0; rows * cols]);
        let forward =
            |y: &mut TestMat, x: &TestMat, g: Option<&TestMat>, branch: Option<(&TestMat, &TestMat)>| {
                let branch = branch.map(|(h, b)| Branch { h: h.view(), b: b.view() });
                quant_linear_forward(y.view_mut(), x.view(), &weight, g.map(TestMat::view), branch)
                    .unwrap_err()
                    .to_string()
            };
        let prefix = "quant_linear_forward: ";
        for (message, expected) in [
            (forward(&mut m(2, 3), &m(2, 5), None, None), "columns of x is 5, expected 4"),
            (forward(&mut m(1, 3), &m(2, 4), None, None), "rows of y is 1, expected 2"),
            (forward(&mut m(2, 4), &m(2, 4), None, None), "columns of y is 4, expected 3"),
            (forward(&mut m(2, 3), &m(2, 4), Some(&m(1, 4)), None), "columns of row_scale is 4, expected 3"),
            (forward(&mut m(2, 3), &m(2, 4), Some(&m(3, 3)), None), "rows of row_scale is 3, expected 1"),
            (forward(&mut m(2, 3), &m(2, 4), None, Some((&m(1, 2), &m(3, 2)))), "rows of h is 1, expected 2"),
            (forward(&mut m(2, 3), &m(2, 4), None, Some((&m(2, 2), &m(4, 2)))), "rows of b is 4, expected 3"),
            (
                forward(&mut m(2, 3), &m(2, 4), None, Some((&m(2, 2), &m(3, 1)))),
                "columns of b is 1, expected 2",
            ),
        ] {
            assert_eq!(message, format!("{prefix}{expected}"));
        }
        let backward = |dx: &mut TestMat, dy: &TestMat| {
            quant_linear_backward(dx.view_mut(), dy.view(), &weight, None, false).unwrap_err().to_string()
        };
        let prefix = "quant_linear_backward: ";
        for (message, expected) in [
            (backward(&mut m(2, 4), &m(2, 4)), "columns of dy is 4, expected 3"),
            (backward(&mut m(1, 4), &m(2, 3)), "rows of dx is 1, expected 2"),
            (backward(&mut m(2, 3), &m(2, 3)), "columns of dx is 3, expected 4"),
        ] {
            assert_eq!(message, format!("{prefix}{expected}"));
        }
        let with_branch = |dh: &TestMat, a: &TestMat| {
            let (mut dx, dy) = (m(2, 4), m(2, 3));
            let (dx, dh, dy) = (dx.view_mut(), dh.view(), dy.view());
            quant_linear_backward_with_branch(dx, dh, dy, &weight, None, a.view(), false)
                .unwrap_err()
                .to_string()
        };
        let prefix = "quant_linear_backward_with_branch: ";
        for (message, expected) in [
            (with_branch(&m(1, 2), &m(2, 4)), "rows of dh is 1, expected 2"),
            (with_branch(&m(2, 2), &m(1, 4)), "rows of a is 1, expected 2"),
            (with_branch(&m(2, 2), &m(2, 3)), "columns of a is 3, expected 4"),
        ] {
            assert_eq!(message, format!("{prefix}{expected}"));
        }
    }

    /// `cargo test --release -p qpeft-kernels quant_linear_speed -- --ignored --nocapture`
    #[test]
    #[ignore = "prints GFLOP/s of one thread; asserts nothing, because machines differ"]
    fn quant_linear_speed() {
        // The processor time of one thread where Linux counts it: a busy machine then matters little.
        let clock = std::time::Instant::now();
        let now = || {
            let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
            let nanoseconds = stat.split(' ').next().and_then(|n| n.parse::<f64>().ok());
            nanoseconds.map_or_else(|| clock.elapsed().as_secs_f64(), |n| n * 1e-9)
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        // Seconds of one call, over a span that is long against the tick of that clock.
        let time = |work: &mut (dyn FnMut() + Send)| {
            pool.install(|| {
                let (start, mut calls) = (now(), 0.0);
                while now() - start < 0.15 {
                    work();
                    calls += 1.0;
                }
                (now() - start) / calls
            })
        };
        let random = |seed, len| TestMat::random(seed, 1, len, 1.0).values();
        for dtype in [GgmlType::F32, GgmlType::Q4_1, GgmlType::Q8_0] {
            for (n, k) in [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)] {
                // One byte everywhere is a small finite number in each of these types.
                let bytes = Bytes::from(vec![0x2c; n * dtype.row_bytes(k).unwrap()]);
                let weight = BaseWeight::from_ggml(dtype, n, k, bytes).unwrap();
                for t in [1, 16, 512, 2048].into_iter().filter(|t| t * n <= 512 * 49152) {
                    let (x, dy) = (random(1, t * k), random(2, t * n));
                    let (h, b, g) = (random(3, t * 16), random(4, n * 16), random(5, n));
                    let (mut y, mut dx) = (vec![0.0; t * n], vec![0.0; t * k]);
                    let flops = 2.0 * (t * n) as f64 * k as f64 * 1e-9;
                    let branch = Branch { h: View::from_slice(&h, t, 16), b: View::from_slice(&b, n, 16) };
                    let g = View::from_slice(&g, 1, n);
                    let (x, dy) = (View::from_slice(&x, t, k), View::from_slice(&dy, t, n));
                    let plain = time(&mut || {
                        let y = ViewMut::from_slice(&mut y, t, n);
                        quant_linear_forward(y, x, &weight, None, None).unwrap();
                    });
                    let adapted = time(&mut || {
                        let y = ViewMut::from_slice(&mut y, t, n);
                        quant_linear_forward(y, x, &weight, Some(g), Some(branch)).unwrap();
                    });
                    let backward = time(&mut || {
                        let dx = ViewMut::from_slice(&mut dx, t, k);
                        quant_linear_backward(dx, dy, &weight, Some(g), false).unwrap();
                    });
                    println!(
                        "{dtype:5} T {t:4} N {n:5} K {k:4}: forward {:6.1}, with g and branch {:6.1}, backward {:6.1} GFLOP/s",
                        flops / plain,
                        flops / adapted,
                        flops / backward,
                    );
                }
            }
        }
    }
}
