//! The linear layer on a packed weight, with row scale and low-rank branch: where a step spends its time.
//!
//! The weight is dequantized tile by tile into a per-thread buffer that feeds a matrix product, and a
//! row scale (the DoRA factor g) is multiplied into the rows while they are there. The branch adds
//! its product to the same tile of the output, so that LoRA and DoRA cost one pass over y.

use crate::cpu::by_isa;
use crate::cpu::gemm::{Mat, MatMut, gemm};
use crate::cpu::scratch::with_scratch;
use crate::error::{Result, check};
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
/// `y = x Wᵀ diag(g) + h bᵀ`; backward: `dx = dy diag(g) W`, `dh = dy b`. W and g get no gradient
/// here: W is frozen, and the one of g's magnitude is [`row_scale`](super::row_scale)'s.
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
    const OP: &str = "quant_linear_forward";
    check(OP, "columns of x", weight.cols(), x.cols)?;
    check(OP, "rows of y", x.rows, y.rows)?;
    check(OP, "columns of y", weight.rows(), y.cols)?;
    let row_scale = row_scale_slice(OP, row_scale, weight)?;
    let branch = match branch {
        None => None,
        Some(Branch { h, b }) => {
            check(OP, "rows of h", x.rows, h.rows)?;
            check(OP, "rows of b", weight.rows(), b.rows)?;
            check(OP, "columns of b", h.cols, b.cols)?;
            Some((h.mat(OP)?, b.mat(OP)?))
        }
    };
    forward_fast(y.mat(OP)?, x.mat(OP)?, weight, row_scale, branch);
    Ok(())
}

/// Backward of [`quant_linear_forward`] to its inputs: `dx = dy diag(g) W` and `dh = dy b`.
///
/// - `Shapes`: dx (T, K), dh (T, R), dy (T, N), weight (N, K), row_scale (1, N), b (N, R).
/// - `Accumulates`: `dx =`, or `dx +=` with `accumulate`; `dh =` always.
/// - `Precision`: as forward, relative to `Σ |dy| |g w|`.
/// - `Errors`: shapes that do not belong together; one of dh and b without the other; a device
///   without this kernel.
/// - `Source`: see [`quant_linear_forward`].
pub fn quant_linear_backward(
    dx: ViewMut<'_>,
    dh: Option<ViewMut<'_>>,
    dy: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    b: Option<View<'_>>,
    accumulate: bool,
) -> Result<()> {
    const OP: &str = "quant_linear_backward";
    check(OP, "columns of dy", weight.rows(), dy.cols)?;
    check(OP, "rows of dx", dy.rows, dx.rows)?;
    check(OP, "columns of dx", weight.cols(), dx.cols)?;
    check(OP, "number of b (as many as dh)", usize::from(dh.is_some()), usize::from(b.is_some()))?;
    let row_scale = row_scale_slice(OP, row_scale, weight)?;
    let branch = match (dh, b) {
        (Some(dh), Some(b)) => {
            check(OP, "rows of dh", dy.rows, dh.rows)?;
            check(OP, "rows of b", weight.rows(), b.rows)?;
            check(OP, "columns of dh", b.cols, dh.cols)?;
            Some((dh.mat(OP)?, b.mat(OP)?))
        }
        _ => None,
    };
    backward_fast(dx.mat(OP)?, branch, dy.mat(OP)?, weight, row_scale, accumulate);
    Ok(())
}

fn row_scale_slice<'a>(
    op: &'static str,
    row_scale: Option<View<'a>>,
    weight: &BaseWeight,
) -> Result<Option<&'a [f32]>> {
    let Some(row_scale) = row_scale else { return Ok(None) };
    check(op, "rows of row_scale", 1, row_scale.rows)?;
    check(op, "columns of row_scale", weight.rows(), row_scale.cols)?;
    Ok(Some(row_scale.mat(op)?.row(0)))
}

// ---------------------------------------------------------------------------------------------- CPU

/// Rows of W that one forward task dequantizes: a multiple of the 8, 16, 24 and 48 rows that the
/// matrix product works on at a time, and for K of a few thousand a tile of about one megabyte.
const ROW_TILE: usize = 96;

/// Least columns of W in one backward panel, for the same reasons; rounded up to whole blocks.
const COL_PANEL: usize = 96;

/// Rows of W that a backward task dequantizes at a time.
const ROW_CHUNK: usize = 256;

/// Tokens of one task. A longer batch dequantizes a tile again for every so many tokens, which is a
/// few per cent of their product, and in return gives every thread work on narrow layers.
const TOKEN_TILE: usize = 512;

/// Up to so many tokens (generation) a dot product per row beats packing W for a matrix product.
const DOT_TOKENS: usize = 4;

/// The definition: one row of W at a time, summed in f64.
#[cfg(test)]
fn forward_naive(
    mut y: MatMut<'_>,
    x: Mat<'_>,
    weight: &BaseWeight,
    row_scale: Option<&[f32]>,
    branch: Option<(Mat<'_>, Mat<'_>)>,
) {
    let dot = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum() };
    let mut w = vec![0.0; weight.cols()];
    for n in 0..weight.rows() {
        weight.dequantize_rows(n..n + 1, &mut w);
        let g = row_scale.map_or(1.0, |g| g[n] as f64);
        for t in 0..x.rows() {
            let low_rank = branch.map_or(0.0, |(h, b)| dot(h.row(t), b.row(n)));
            y.row(t)[n] = (g * dot(x.row(t), &w) + low_rank) as f32;
        }
    }
}

/// The definition: every term of every sum, in f64.
#[cfg(test)]
fn backward_naive(
    mut dx: MatMut<'_>,
    branch: Option<(MatMut<'_>, Mat<'_>)>,
    dy: Mat<'_>,
    weight: &BaseWeight,
    row_scale: Option<&[f32]>,
    accumulate: bool,
) {
    let w = weight.dequantize();
    for t in 0..dy.rows() {
        // forward: y[t][n] = g[n] Σ_k x[t][k] W[n][k] + Σ_r h[t][r] b[n][r]
        for k in 0..weight.cols() {
            let term = |n: usize| {
                let g = row_scale.map_or(1.0, |g| g[n] as f64);
                dy.row(t)[n] as f64 * g * w[n * weight.cols() + k] as f64
            };
            let sum: f64 = (0..weight.rows()).map(term).sum();
            let before = if accumulate { dx.row(t)[k] as f64 } else { 0.0 };
            dx.row(t)[k] = (before + sum) as f32;
        }
    }
    if let Some((mut dh, b)) = branch {
        for t in 0..dy.rows() {
            for r in 0..b.cols() {
                let sum: f64 = (0..weight.rows()).map(|n| dy.row(t)[n] as f64 * b.row(n)[r] as f64).sum();
                dh.row(t)[r] = sum as f32;
            }
        }
    }
}

fn forward_fast(
    y: MatMut<'_>,
    x: Mat<'_>,
    weight: &BaseWeight,
    row_scale: Option<&[f32]>,
    branch: Option<(Mat<'_>, Mat<'_>)>,
) {
    let k = weight.cols();
    y.par_tiles(TOKEN_TILE, ROW_TILE, |mut tile, tokens, rows| {
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
                gemm(tile, true, 1.0, h.row_range(tokens), b.row_range(rows).transposed());
            }
        });
    });
}

fn backward_fast(
    dx: MatMut<'_>,
    branch: Option<(MatMut<'_>, Mat<'_>)>,
    dy: Mat<'_>,
    weight: &BaseWeight,
    row_scale: Option<&[f32]>,
    accumulate: bool,
) {
    let width = COL_PANEL.next_multiple_of(weight.block_len());
    dx.par_tiles(TOKEN_TILE, width, |mut tile, tokens, cols| {
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
    if let Some((dh, b)) = branch {
        dh.par_tiles(TOKEN_TILE / 8, b.cols().max(1), |tile, tokens, _| {
            gemm(tile, false, 1.0, dy.row_range(tokens), b);
        });
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
    /// Σ a b in 32 interleaved sums, enough to hide the latency of the additions.
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut sums = [0.0f32; 32];
        let (a, b) = (a.chunks_exact(32), b.chunks_exact(32));
        let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
        for (a, b) in a.zip(b) {
            for i in 0..32 {
                sums[i] += a[i] * b[i];
            }
        }
        let mut half = 16;
        while half > 0 {
            for i in 0..half {
                sums[i] += sums[i + half];
            }
            half /= 2;
        }
        sums[0] + rest
    }
}

#[cfg(test)]
mod tests {
    use qpeft_formats::GgmlType;
    use qpeft_formats::file::Bytes;

    use super::*;
    use crate::cpu::fixtures::{Padded, assert_close, values, with_threads};

    struct Case {
        weight: BaseWeight,
        x: Padded,
        g: Option<Padded>,
        branch: Option<(Padded, Padded)>,
        dy: Padded,
    }

    /// (T, N, K, R) with rows `pad` elements apart; R = 0 has neither branch nor row scale.
    fn case(weight: BaseWeight, t: usize, r: usize, pad: usize) -> Case {
        let (n, k) = (weight.rows(), weight.cols());
        Case {
            x: Padded::random(1, t, k, pad),
            g: (r > 0).then(|| Padded::random(2, 1, n, 0)),
            branch: (r > 0).then(|| (Padded::random(3, t, r, pad), Padded::random(4, n, r, pad))),
            dy: Padded::random(5, t, n, pad),
            weight,
        }
    }

    fn f32_weight(n: usize, k: usize) -> BaseWeight {
        BaseWeight::from_f32(n, k, &values(9, n * k)).unwrap()
    }

    impl Case {
        fn branch(&self) -> Option<Branch<'_>> {
            self.branch.as_ref().map(|(h, b)| Branch { h: h.view(), b: b.view() })
        }

        fn forward(&self) -> Padded {
            let mut y = Padded::filled(self.x.rows, self.weight.rows(), 3, f32::NAN);
            let g = self.g.as_ref().map(Padded::view);
            quant_linear_forward(y.view_mut(), self.x.view(), &self.weight, g, self.branch()).unwrap();
            y
        }

        fn forward_naive(&self) -> Padded {
            let mut y = Padded::filled(self.x.rows, self.weight.rows(), 3, f32::NAN);
            let g = self.g.as_ref().map(|g| g.mat().row(0));
            let branch = self.branch.as_ref().map(|(h, b)| (h.mat(), b.mat()));
            forward_naive(y.mat_mut(), self.x.mat(), &self.weight, g, branch);
            y
        }

        /// (dx, dh): both start as NaN, or dx as 0.25 with `accumulate`.
        fn gradients(&self, accumulate: bool) -> (Padded, Option<Padded>) {
            let start = if accumulate { 0.25 } else { f32::NAN };
            let dh = self.branch.as_ref().map(|(h, _)| Padded::filled(h.rows, h.cols, 1, f32::NAN));
            (Padded::filled(self.x.rows, self.x.cols, 2, start), dh)
        }

        fn backward(&self, accumulate: bool) -> (Padded, Option<Padded>) {
            let (mut dx, mut dh) = self.gradients(accumulate);
            let g = self.g.as_ref().map(Padded::view);
            let b = self.branch().map(|branch| branch.b);
            let dh_view = dh.as_mut().map(Padded::view_mut);
            quant_linear_backward(dx.view_mut(), dh_view, self.dy.view(), &self.weight, g, b, accumulate)
                .unwrap();
            (dx, dh)
        }

        fn backward_naive(&self, accumulate: bool) -> (Padded, Option<Padded>) {
            let (mut dx, mut dh) = self.gradients(accumulate);
            let g = self.g.as_ref().map(|g| g.mat().row(0));
            let branch = dh.as_mut().zip(self.branch.as_ref()).map(|(dh, (_, b))| (dh.mat_mut(), b.mat()));
            backward_naive(dx.mat_mut(), branch, self.dy.mat(), &self.weight, g, accumulate);
            (dx, dh)
        }

        /// Fast against naive. Every term is at most 1, so that n sums in f32 err by a few √n roundings.
        fn check(&self) {
            let tolerance = |terms: usize| 4e-7 * (terms as f64 + 16.0).sqrt() * 4.0;
            let (n, k) = (self.weight.rows(), self.weight.cols());
            assert_close(&self.forward(), &self.forward_naive(), tolerance(k));
            for accumulate in [false, true] {
                let (dx, dh) = self.backward(accumulate);
                let (dx_naive, dh_naive) = self.backward_naive(accumulate);
                assert_close(&dx, &dx_naive, tolerance(n));
                if let (Some(dh), Some(dh_naive)) = (dh, dh_naive) {
                    assert_close(&dh, &dh_naive, tolerance(n));
                }
            }
        }
    }

    #[test]
    fn fast_matches_naive_at_odd_sizes_and_strides() {
        for (t, n, k, r) in [
            (1, 1, 1, 1),
            (1, 129, 127, 7),
            (4, 97, 33, 0),
            (5, 7, 129, 1),
            (16, 200, 97, 3),
            (7, 300, 129, 8),
        ] {
            for pad in [0, 5] {
                case(f32_weight(n, k), t, r, pad).check();
            }
        }
    }

    #[test]
    fn fast_matches_naive_over_several_tiles_of_every_dimension() {
        case(f32_weight(2 * ROW_CHUNK + 17, 2 * COL_PANEL + 1), TOKEN_TILE + 3, 5, 1).check();
    }

    #[test]
    fn every_block_type_computes_with_its_dequantized_values() {
        for dtype in GgmlType::ALL {
            let (n, k) = (37, 768);
            let empty = Bytes::from(vec![0; n * dtype.row_bytes(k).unwrap()]);
            let weight = BaseWeight::from_ggml(dtype, n, k, empty).unwrap();
            let weight = weight.requantize(&values(11, n * k)).unwrap();
            for t in [1, 19] {
                case(weight.clone(), t, 4, 0).check();
            }
        }
    }

    #[test]
    fn backward_is_the_derivative_of_forward() {
        let case = case(f32_weight(6, 5), 3, 2, 1);
        let (dx, dh) = case.backward_naive(false);
        let dh = dh.unwrap();
        let loss = |case: &Case| -> f64 {
            let y = case.forward_naive();
            y.elements().iter().zip(case.dy.elements()).map(|(&y, dy)| y as f64 * dy as f64).sum()
        };
        // Forward is linear in x and h: central differences are exact at any step, up to y's rounding
        // to f32 (6e-8 of at most 5 for each of the 18 outputs).
        let step = 0.5;
        for t in 0..3 {
            for (gradient, cols, pick) in [(&dx, 5, 0), (&dh, 2, 1)] {
                for j in 0..cols {
                    let moved = |by: f32| {
                        let mut moved = Case {
                            weight: case.weight.clone(),
                            x: case.x.clone(),
                            g: case.g.clone(),
                            branch: case.branch.clone(),
                            dy: case.dy.clone(),
                        };
                        let input =
                            if pick == 0 { &mut moved.x } else { &mut moved.branch.as_mut().unwrap().0 };
                        let at = t * input.stride + j;
                        input.data[at] += by;
                        loss(&moved)
                    };
                    let difference = (moved(step) - moved(-step)) / (2.0 * step as f64);
                    let error = (difference - gradient.at(t, j) as f64).abs();
                    assert!(error < 5e-6, "({t}, {j}): {difference} for {}", gradient.at(t, j));
                }
            }
        }
    }

    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        for t in [1, TOKEN_TILE + 40] {
            let case = case(f32_weight(700, 300), t, 8, 0);
            let run = || {
                let (dx, dh) = case.backward(false);
                (case.forward().bits(), dx.bits(), dh.map(|dh| dh.bits()))
            };
            let one = with_threads(1, run);
            for threads in [2, 3, 4] {
                assert_eq!(one, with_threads(threads, run), "{threads} threads");
            }
        }
    }

    #[test]
    fn no_tokens_and_no_rows_are_served() {
        case(f32_weight(5, 4), 0, 2, 0).check();
        let weight = f32_weight(0, 4);
        let mut dx = Padded::filled(2, 4, 0, f32::NAN);
        let dy = Padded::filled(2, 0, 1, 0.0);
        quant_linear_backward(dx.view_mut(), None, dy.view(), &weight, None, None, false).unwrap();
        assert_eq!(dx.elements(), [0.0; 8]);
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let weight = f32_weight(3, 4);
        let m = |rows, cols| Padded::filled(rows, cols, 0, 0.0);
        let forward = |y: &mut Padded, x: &Padded, g: Option<&Padded>, branch: Option<(&Padded, &Padded)>| {
            let branch = branch.map(|(h, b)| Branch { h: h.view(), b: b.view() });
            quant_linear_forward(y.view_mut(), x.view(), &weight, g.map(Padded::view), branch)
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
        let backward = |dx: &mut Padded, dh: Option<&mut Padded>, dy: &Padded, b: Option<&Padded>| {
            let dh = dh.map(Padded::view_mut);
            quant_linear_backward(dx.view_mut(), dh, dy.view(), &weight, None, b.map(Padded::view), false)
                .unwrap_err()
                .to_string()
        };
        let prefix = "quant_linear_backward: ";
        for (message, expected) in [
            (backward(&mut m(2, 4), None, &m(2, 4), None), "columns of dy is 4, expected 3"),
            (backward(&mut m(1, 4), None, &m(2, 3), None), "rows of dx is 1, expected 2"),
            (backward(&mut m(2, 3), None, &m(2, 3), None), "columns of dx is 3, expected 4"),
            (
                backward(&mut m(2, 4), None, &m(2, 3), Some(&m(3, 1))),
                "number of b (as many as dh) is 1, expected 0",
            ),
            (
                backward(&mut m(2, 4), Some(&mut m(2, 2)), &m(2, 3), Some(&m(3, 1))),
                "columns of dh is 2, expected 1",
            ),
            (
                backward(&mut m(2, 4), Some(&mut m(1, 2)), &m(2, 3), Some(&m(3, 2))),
                "rows of dh is 1, expected 2",
            ),
            (
                backward(&mut m(2, 4), Some(&mut m(2, 2)), &m(2, 3), Some(&m(4, 2))),
                "rows of b is 4, expected 3",
            ),
        ] {
            assert_eq!(message, format!("{prefix}{expected}"));
        }
    }

    /// `cargo test --release -p qpeft-kernels quant_linear_speed -- --ignored --nocapture`
    #[test]
    #[ignore = "prints GFLOP/s; asserts nothing, because the machine may be busy"]
    fn quant_linear_speed() {
        let best = |work: &mut dyn FnMut()| {
            let once = |work: &mut dyn FnMut()| {
                let start = std::time::Instant::now();
                work();
                start.elapsed().as_secs_f64()
            };
            (0..12).map(|_| once(work)).fold(f64::INFINITY, f64::min)
        };
        for dtype in [GgmlType::F32, GgmlType::Q4_1, GgmlType::Q8_0] {
            for (n, k) in [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576)] {
                // One byte everywhere is a small finite number in each of these types.
                let bytes = Bytes::from(vec![0x2c; n * dtype.row_bytes(k).unwrap()]);
                let weight = BaseWeight::from_ggml(dtype, n, k, bytes).unwrap();
                for t in [1, 512, 2048].into_iter().filter(|t| t * n <= 512 * 49152) {
                    let (x, dy) = (values(1, t * k), values(2, t * n));
                    let (h, b, g) = (values(3, t * 16), values(4, n * 16), values(5, n));
                    let (mut y, mut dx, mut dh) = (vec![0.0; t * n], vec![0.0; t * k], vec![0.0; t * 16]);
                    let flops = 2.0 * (t * n) as f64 * k as f64 * 1e-9;
                    let branch = Branch { h: View::from_slice(&h, t, 16), b: View::from_slice(&b, n, 16) };
                    let g = View::from_slice(&g, 1, n);
                    let (x, dy) = (View::from_slice(&x, t, k), View::from_slice(&dy, t, n));
                    let plain = best(&mut || {
                        let y = ViewMut::from_slice(&mut y, t, n);
                        quant_linear_forward(y, x, &weight, None, None).unwrap();
                    });
                    let adapted = best(&mut || {
                        let y = ViewMut::from_slice(&mut y, t, n);
                        quant_linear_forward(y, x, &weight, Some(g), Some(branch)).unwrap();
                    });
                    let backward = best(&mut || {
                        let dx = ViewMut::from_slice(&mut dx, t, k);
                        let dh = ViewMut::from_slice(&mut dh, t, 16);
                        quant_linear_backward(dx, Some(dh), dy, &weight, Some(g), Some(branch.b), false)
                            .unwrap();
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
