//! What an adapter folds once per optimizer step, so that no token pays for it: the row factor
//! `g = m / n` of DoRA, and the scaled second factor `scaling * diag(g) * B`.
//!
//! No backward: the branch's gradients are those of `low_rank`, the magnitude's that of `row_scale`,
//! and the norm is a constant (DoRA, section 4.3).

use crate::cuda::{Arg, Grid, Source, spans};
use crate::error::{Result, check};
use crate::tensor::{View, ViewMut};

const OP: &str = "fold";

pub(crate) static SOURCE: Source = Source::new("fold.cu", include_str!("fold.cu"));

/// The factor that brings each row of a weight to its magnitude.
///
/// `g[i] = m[i] / n[i]`, and 0 where n is 0: a row of zeros has no direction, whatever its magnitude.
///
/// Shapes: g, m, n (1, N). Overwrites g. Precision: one f32 division.
///
/// # Errors
/// Shapes that differ.
pub fn fold_row_factor(g: ViewMut<'_>, m: View<'_>, n: View<'_>) -> Result<()> {
    check(OP, "magnitudes", g.cols, m.cols)?;
    check(OP, "norms", g.cols, n.cols)?;
    if let Some(cuda) = g.cuda() {
        let args = [Arg::Ptr(g.f32(OP)?), Arg::Ptr(m.f32(OP)?), Arg::Ptr(n.f32(OP)?), Arg::size(g.cols)];
        return cuda.launch(&SOURCE, "fold_row_factor", Grid::over(g.cols, spans::THREADS), &args);
    }
    let (g, m, n) = (g.cpu(OP)?, m.cpu(OP)?, n.cpu(OP)?);
    for ((g, m), n) in g.iter_mut().zip(m).zip(n) {
        *g = if *n == 0.0 { 0.0 } else { m / n };
    }
    Ok(())
}

/// The second low-rank factor with scaling and row factor in it.
///
/// `folded[i, r] = scaling * g[i] * b[i, r]`, with g = 1 where there is none.
///
/// Shapes: folded, b (N, R), g (1, N). Overwrites folded. Precision: f32, and one rounding where folded is bf16.
///
/// # Errors
/// Shapes that differ.
pub fn fold_branch(folded: ViewMut<'_>, b: View<'_>, scaling: f32, g: Option<View<'_>>) -> Result<()> {
    fold_branch_beside(folded, None, b, scaling, g)
}

/// [`fold_branch`], and the same once more to `twin`: the columns of a weight's copy on a device that the branch lies in.
///
/// Shapes: as [`fold_branch`]; twin (N, R) of the type of folded. Overwrites both.
///
/// # Errors
/// Shapes or types that differ.
pub fn fold_branch_beside(
    folded: ViewMut<'_>,
    twin: Option<ViewMut<'_>>,
    b: View<'_>,
    scaling: f32,
    g: Option<View<'_>>,
) -> Result<()> {
    if let Some(twin) = &twin {
        check(OP, "rows of twin", folded.rows, twin.rows)?;
        check(OP, "columns of twin", folded.cols, twin.cols)?;
    }
    check(OP, "rows of b", folded.rows, b.rows)?;
    check(OP, "columns of b", folded.cols, b.cols)?;
    if let Some(g) = &g {
        check(OP, "row factors", folded.rows, g.cols)?;
    }
    if let Some(cuda) = folded.cuda() {
        let (kernel, to, beside) = match folded.bf16(OP) {
            Ok(to) => ("fold_branch_bf16", to, twin.as_ref().map(|twin| twin.bf16(OP))),
            Err(_) => ("fold_branch_f32", folded.f32(OP)?, twin.as_ref().map(|twin| twin.f32(OP))),
        };
        let grid = spans::grid(OP, b.rows, b.cols, 1)?;
        let args = [
            Arg::Ptr(to),
            Arg::size(folded.stride),
            Arg::Ptr(beside.unwrap_or(Ok(0))?),
            Arg::size(twin.as_ref().map_or(0, |twin| twin.stride)),
            Arg::Ptr(b.f32(OP)?),
            Arg::size(b.stride),
            Arg::Ptr(g.map_or(Ok(0), |g| g.f32(OP))?),
            Arg::F32(scaling),
            Arg::size(b.rows),
            Arg::size(b.cols),
        ];
        return cuda.launch(&SOURCE, kernel, grid, &args);
    }
    if let Some(twin) = twin {
        fold_branch_beside(twin, None, b, scaling, g)?;
    }
    let (rows, r, f_stride, b_stride) = (folded.rows, folded.cols, folded.stride, b.stride);
    let (folded, b) = (folded.cpu(OP)?, b.cpu(OP)?);
    let g = g.map(|g| g.cpu(OP)).transpose()?;
    for i in 0..rows {
        let factor = scaling * g.map_or(1.0, |g| g[i]);
        let (folded, b) = (&mut folded[i * f_stride..][..r], &b[i * b_stride..][..r]);
        for (folded, b) in folded.iter_mut().zip(b) {
            *folded = factor * b;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, tolerance};

    #[test]
    fn rows_of_zeros_get_the_factor_zero() {
        let mut g = [f32::NAN; 3];
        let (m, n) = ([3.0, 1.0, 0.0], [2.0, 0.0, 0.0]);
        fold_row_factor(
            ViewMut::from_slice(&mut g, 1, 3),
            View::from_slice(&m, 1, 3),
            View::from_slice(&n, 1, 3),
        )
        .unwrap();
        assert_eq!(g, [1.5, 0.0, 0.0]);
    }

    #[test]
    fn scaling_and_row_factor_are_in_the_folded_matrix() {
        let (b, g) = ([1.0, 2.0, 3.0, 4.0], [10.0, 0.5]);
        let mut folded = [f32::NAN; 4];
        let (b, g) = (View::from_slice(&b, 2, 2), View::from_slice(&g, 1, 2));
        fold_branch(ViewMut::from_slice(&mut folded, 2, 2), b, 2.0, Some(g)).unwrap();
        assert_eq!(folded, [20.0, 40.0, 3.0, 4.0]);
        fold_branch(ViewMut::from_slice(&mut folded, 2, 2), b, 2.0, None).unwrap();
        assert_eq!(folded, [2.0, 4.0, 6.0, 8.0]);
    }

    #[test]
    fn the_cuda_twins_fold_into_either_type() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in [(1, 1), (7, 3), (129, 16), (33, 64), (5, 127), (0, 8)] {
            let b = Mat::random(1, rows, cols, 1.0);
            let [m, n] = [2, 3].map(|seed| Mat::random(seed, 1, rows, 1.0));
            let mut n = n.values();
            n.iter_mut().step_by(3).for_each(|n| *n = 0.0);
            let n = Mat::new(1, rows, n);
            let g = |(m, n): (f64, f64)| if n == 0.0 { 0.0 } else { m / n };
            let g: Vec<f64> = m.f64().into_iter().zip(n.f64()).map(g).collect();
            let close = tolerance(3e-7, 0.0);
            let (outputs, inputs) = ([(Out::Set(1, rows), F32, &g[..])], [(&m, F32), (&n, F32)]);
            check_cuda(&device, "fold_row_factor", outputs, inputs, close, |[g], [m, n]| {
                fold_row_factor(g, m, n)
            });
            let m64 = m.f64();
            let folded = |with_g: bool| -> Vec<f64> {
                let factor = |i: usize| if with_g { 2.0 * m64[i / cols] } else { 2.0 };
                b.f64().iter().enumerate().map(|(i, b)| factor(i) * b).collect()
            };
            let (with, without) = (folded(true), folded(false));
            for dtype in [Bf16, F32] {
                let what = format!("fold_branch {rows} x {cols}");
                let (outputs, inputs) = ([(Out::Set(rows, cols), dtype, &with[..])], [(&b, F32), (&m, F32)]);
                check_cuda(&device, &what, outputs, inputs, close, |[folded], [b, g]| {
                    fold_branch(folded, b, 2.0, Some(g))
                });
                let outputs = [(Out::Set(rows, cols), dtype, &without[..])];
                check_cuda(&device, &what, outputs, [(&b, F32)], close, |[folded], [b]| {
                    fold_branch(folded, b, 2.0, None)
                });
                let outputs =
                    [(Out::Set(rows, cols), dtype, &with[..]), (Out::Set(rows, cols), dtype, &with[..])];
                let inputs = [(&b, F32), (&m, F32)];
                check_cuda(&device, &what, outputs, inputs, close, |[folded, twin], [b, g]| {
                    fold_branch_beside(folded, Some(twin), b, 2.0, Some(g))
                });
            }
        }
    }
}
