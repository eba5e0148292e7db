//! Rows of a matrix picked by index, so that the head runs over supervised tokens only.
//!
//! Forward: `y[i] = x[rows[i]]`. Backward: `dx[rows[i]] += dy[i]`.

use crate::error::{Error, Result, check};
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
pub fn gather_forward(y: ViewMut<'_>, x: View<'_>, rows: &[u32]) -> Result<()> {
    check_rows(y.rows, y.cols, x.rows, x.cols, rows)?;
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
pub fn gather_backward(dx: ViewMut<'_>, dy: View<'_>, rows: &[u32]) -> Result<()> {
    check_rows(dy.rows, dy.cols, dx.rows, dx.cols, rows)?;
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
