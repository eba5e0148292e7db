//! Rows of a matrix picked by index, so that the head runs over supervised tokens only.
//!
//! Forward: `y[i] = x[rows[i]]`. Backward: `dx[rows[i]] += dy[i]`.

use crate::cuda::{Arg, Cuda, Source, spans};
use crate::error::{Error, Result, check};
use crate::ids::Ids;
use crate::tensor::{View, ViewMut};

const OP: &str = "gather";

/// Copies row `rows[i]` of x to row i of y.
///
/// `y[i, c] = x[rows[i], c]`
///
/// Shapes: y (N, C), x (T, C), N indices below T. Overwrites y. Precision: exact.
///
/// # Errors
/// Shapes that differ, or an index outside of x.
pub fn gather_forward<'a>(y: ViewMut<'_>, x: View<'_>, rows: impl Into<Ids<'a>>) -> Result<()> {
    let rows = rows.into();
    check_rows(y.rows, y.cols, x.rows, x.cols, rows.host())?;
    if let Some(cuda) = y.cuda() {
        return forward_cuda(&cuda, &y, x, rows);
    }
    let rows = rows.host();
    let (n, c, y_stride, x_stride) = (y.rows, y.cols, y.stride, x.stride);
    let (y, x) = (y.cpu(OP)?, x.cpu(OP)?);
    for i in 0..n {
        let from = rows[i] as usize * x_stride;
        y[i * y_stride..][..c].copy_from_slice(&x[from..from + c]);
    }
    Ok(())
}

/// Adds row i of dy to row `rows[i]` of dx.
///
/// `dx[rows[i], c] += dy[i, c]`
///
/// Shapes: dx (T, C), dy (N, C), N indices below T. Accumulates into dx. Precision: f32 sums.
///
/// # Errors
/// Shapes that differ, or an index outside of dx.
pub fn gather_backward<'a>(dx: ViewMut<'_>, dy: View<'_>, rows: impl Into<Ids<'a>>) -> Result<()> {
    let rows = rows.into();
    check_rows(dy.rows, dy.cols, dx.rows, dx.cols, rows.host())?;
    if let Some(cuda) = dx.cuda() {
        return backward_cuda(&cuda, &dx, dy, rows);
    }
    let rows = rows.host();
    let (n, c, dx_stride, dy_stride) = (dy.rows, dy.cols, dx.stride, dy.stride);
    let (dx, dy) = (dx.cpu(OP)?, dy.cpu(OP)?);
    for i in 0..n {
        let to = rows[i] as usize * dx_stride;
        for (dx, dy) in dx[to..to + c].iter_mut().zip(&dy[i * dy_stride..][..c]) {
            *dx += dy;
        }
    }
    Ok(())
}

fn check_rows(n: usize, c: usize, t: usize, x_cols: usize, rows: &[u32]) -> Result<()> {
    check(OP, "row indices", n, rows.len())?;
    check(OP, "columns", c, x_cols)?;
    match rows.iter().find(|&&row| row as usize >= t) {
        Some(&row) => Err(Error::IndexOutOfRange { op: OP, what: "row", index: row as usize, limit: t }),
        None => Ok(()),
    }
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("gather.cu", include_str!("gather.cu"));

fn forward_cuda(cuda: &Cuda, y: &ViewMut<'_>, x: View<'_>, rows: Ids<'_>) -> Result<()> {
    if y.rows == 0 || y.cols == 0 {
        return Ok(());
    }
    let grid = spans::grid(OP, y.rows, y.cols, 1)?;
    let args = [
        Arg::Ptr(y.bf16(OP)?),
        Arg::size(y.stride),
        Arg::Ptr(x.bf16(OP)?),
        Arg::size(x.stride),
        Arg::Ptr(rows.device(OP)?),
        Arg::size(y.rows),
        Arg::size(y.cols),
    ];
    cuda.launch(&SOURCE, "gather_forward", grid, &args)
}

/// A row may be named twice, but not in one launch: two threads would add to it. Runs of rising indices, which the
/// rows of supervised tokens are one of, name it once each.
fn backward_cuda(cuda: &Cuda, dx: &ViewMut<'_>, dy: View<'_>, rows: Ids<'_>) -> Result<()> {
    if dy.cols == 0 {
        return Ok(());
    }
    let mut start = 0;
    for run in rows.host().chunk_by(|a, b| a < b) {
        let end = start + run.len();
        let dy = dy.row_range(start, run.len());
        let grid = spans::grid(OP, dy.rows, dy.cols, 1)?;
        let args = [
            Arg::Ptr(dx.bf16(OP)?),
            Arg::size(dx.stride),
            Arg::Ptr(dy.bf16(OP)?),
            Arg::size(dy.stride),
            Arg::Ptr(rows.slice(start..end).device(OP)?),
            Arg::size(dy.rows),
            Arg::size(dy.cols),
        ];
        cuda.launch(&SOURCE, "gather_backward", grid, &args)?;
        start = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::Bf16;
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, tolerance};

    #[test]
    fn backward_scatters_what_forward_gathered() {
        let x: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut y = [f32::NAN; 6];
        gather_forward(ViewMut::from_slice(&mut y, 2, 3), View::from_slice(&x, 4, 3), &[3, 1]).unwrap();
        assert_eq!(y, [9.0, 10.0, 11.0, 3.0, 4.0, 5.0]);
        let mut dx = [1.0; 12];
        gather_backward(ViewMut::from_slice(&mut dx, 4, 3), View::from_slice(&y, 2, 3), &[3, 1]).unwrap();
        assert_eq!(dx, [1.0, 1.0, 1.0, 4.0, 5.0, 6.0, 1.0, 1.0, 1.0, 10.0, 11.0, 12.0]);
    }

    #[test]
    fn an_index_outside_is_refused() {
        let mut y = [0.0; 3];
        let error =
            gather_forward(ViewMut::from_slice(&mut y, 1, 3), View::from_slice(&[0.0; 6], 2, 3), &[2]);
        assert!(matches!(error, Err(Error::IndexOutOfRange { index: 2, limit: 2, .. })));
    }

    #[test]
    fn the_cuda_twins_pick_and_add_rows_also_repeated_ones() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES.into_iter().filter(|&(rows, _)| rows > 0) {
            let last = rows as u32 - 1;
            let all: Vec<u32> = (0..=last).collect();
            for indices in [vec![], all, vec![last, 0, last, last, 0]] {
                let n = indices.len();
                let ids = cuda::ids(&device, &indices);
                let x = Mat::random(1, rows, cols, 1.0).rounded();
                let dy = Mat::random(2, n, cols, 1.0).rounded();
                let (from, mut y, mut dx) = (x.f64(), vec![], x.f64());
                for (i, &row) in indices.iter().enumerate() {
                    let row = row as usize * cols;
                    y.extend(&from[row..row + cols]);
                    for (dx, dy) in dx[row..row + cols].iter_mut().zip(&dy.f64()[i * cols..]) {
                        // Every sum is rounded when it is stored.
                        *dx = half::bf16::from_f64(*dx + dy).to_f64();
                    }
                }
                let (what, exact) = (format!("gather {n} of {rows} x {cols}"), tolerance(0.0, 0.0));
                let outputs = [(Out::Set(n, cols), Bf16, &y[..])];
                check_cuda(&device, &what, outputs, [(&x, Bf16)], exact, |[y], [x]| {
                    gather_forward(y, x, ids.ids())
                });
                let outputs = [(Out::Add(&x), Bf16, &dx[..])];
                check_cuda(&device, &what, outputs, [(&dy, Bf16)], exact, |[dx], [dy]| {
                    gather_backward(dx, dy, ids.ids())
                });
            }
        }
    }
}
