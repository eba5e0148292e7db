//! Matrix products on the CPU: strided matrices, tiles that tasks may write at the same time, `gemm`.
//!
//! The one safe door to the `gemm` crate, and the only `unsafe` of the linear ops. A destination is
//! cut into tiles of a fixed size and every tile is computed by one task from start to end, so that
//! a result never depends on how many threads there are.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use crate::error::Result;
use crate::tensor::{View, ViewMut};

/// A borrowed matrix: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

/// A destination: rows `stride` apart, the elements of a row next to each other.
///
/// Holds a pointer because the rows of two tiles of one matrix interleave in memory.
#[derive(Debug)]
pub struct MatMut<'a> {
    data: *mut f32,
    rows: usize,
    cols: usize,
    stride: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: a `MatMut` is an exclusive borrow of the f32 it can reach, as `&mut [f32]` is.
unsafe impl Send for MatMut<'_> {}

/// Where the elements of a (rows, cols) matrix end, when rows lie `stride` apart.
fn extent(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

impl<'a> Mat<'a> {
    /// A row-major matrix whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// `data` ends before the last element, or rows overlap.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, stride: usize) -> Mat<'a> {
        assert!(stride >= cols || rows <= 1, "rows of {cols} at a stride of {stride}");
        assert!(data.len() >= extent(rows, cols, stride), "a {rows} x {cols} matrix over {}", data.len());
        Mat { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Rows and columns exchanged; nothing moves.
    #[must_use]
    pub fn transposed(self) -> Mat<'a> {
        Mat {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Some of the rows.
    ///
    /// # Panics
    /// The range lies outside of the matrix.
    #[must_use]
    pub fn row_range(self, range: Range<usize>) -> Mat<'a> {
        assert!(range.start <= range.end && range.end <= self.rows, "rows {range:?} of {}", self.rows);
        let start = (range.start * self.row_stride).min(self.data.len());
        Mat { data: &self.data[start..], rows: range.len(), ..self }
    }

    /// Some of the columns.
    ///
    /// # Panics
    /// The range lies outside of the matrix.
    #[must_use]
    pub fn col_range(self, range: Range<usize>) -> Mat<'a> {
        self.transposed().row_range(range).transposed()
    }

    /// Row `i` of a matrix whose rows are contiguous.
    ///
    /// # Panics
    /// There is no such row, or the matrix is transposed.
    pub fn row(self, i: usize) -> &'a [f32] {
        assert!(self.col_stride == 1 && i < self.rows, "row {i} of {}", self.rows);
        &self.data[i * self.row_stride..][..self.cols]
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

impl<'a> MatMut<'a> {
    /// A matrix whose rows start `stride` elements apart.
    ///
    /// # Panics
    /// `data` ends before the last element, or rows overlap.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> MatMut<'a> {
        assert!(stride >= cols || rows <= 1, "rows of {cols} at a stride of {stride}");
        assert!(data.len() >= extent(rows, cols, stride), "a {rows} x {cols} matrix over {}", data.len());
        MatMut { data: data.as_mut_ptr(), rows, cols, stride, owner: PhantomData }
    }

    /// The same matrix for a shorter time, so that it can be passed on and used again.
    pub fn reborrow(&mut self) -> MatMut<'_> {
        MatMut { data: self.data, rows: self.rows, cols: self.cols, stride: self.stride, owner: PhantomData }
    }

    /// Row `i`.
    ///
    /// # Panics
    /// There is no such row.
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        // SAFETY: the constructor checked that row i lies in the borrowed memory, and `self` is borrowed
        // exclusively for as long as the row is.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(i * self.stride), self.cols) }
    }

    /// Runs `task(tile, rows, cols)` for every tile of at most `height` x `width`, in parallel.
    ///
    /// The cut depends on the sizes alone. A task owns its tile and may not see the others.
    ///
    /// # Panics
    /// `height` or `width` is zero.
    pub fn par_tiles<F>(self, height: usize, width: usize, task: F)
    where
        F: Fn(MatMut<'_>, Range<usize>, Range<usize>) + Sync,
    {
        assert!(height > 0 && width > 0, "tiles of {height} x {width}");
        let (down, across) = (self.rows.div_ceil(height), self.cols.div_ceil(width));
        let whole = Shared(self);
        (0..down * across).into_par_iter().with_max_len(1).for_each(|index| {
            let whole = &whole;
            let (i, j) = (index / across * height, index % across * width);
            let rows = i..whole.0.rows.min(i + height);
            let cols = j..whole.0.cols.min(j + width);
            let tile = MatMut {
                // SAFETY: (i, j) is an element of the matrix, because neither range is empty.
                data: unsafe { whole.0.data.add(i * whole.0.stride + j) },
                rows: rows.len(),
                cols: cols.len(),
                stride: whole.0.stride,
                owner: PhantomData,
            };
            task(tile, rows, cols);
        });
    }
}

/// A destination that tasks share to cut disjoint tiles out of it.
struct Shared<'a>(MatMut<'a>);

// SAFETY: `par_tiles` only computes addresses from it, and gives each element to one tile.
unsafe impl Sync for Shared<'_> {}

impl<'a> View<'a> {
    /// The matrix in host memory.
    ///
    /// # Errors
    /// [`Error::NoKernel`](crate::Error::NoKernel): the view is on another device, which `op` does not serve.
    pub(crate) fn mat(self, op: &'static str) -> Result<Mat<'a>> {
        Ok(Mat::new(self.cpu(op)?, self.rows, self.cols, self.stride))
    }
}

impl<'a> ViewMut<'a> {
    /// The matrix in host memory, to write to.
    ///
    /// # Errors
    /// [`Error::NoKernel`](crate::Error::NoKernel): the view is on another device, which `op` does not serve.
    pub(crate) fn mat(self, op: &'static str) -> Result<MatMut<'a>> {
        let (rows, cols, stride) = (self.rows, self.cols, self.stride);
        Ok(MatMut::new(self.cpu(op)?, rows, cols, stride))
    }
}

/// `dst = alpha a b`, or `dst += alpha a b` with `accumulate`; on the calling thread.
///
/// Without `accumulate` the old contents of `dst` are not read. f32 with fused multiply-add where the
/// processor has it; the order of summation depends on sizes and strides alone.
///
/// # Panics
/// The sizes do not belong together.
#[expect(clippy::needless_pass_by_value, reason = "a destination is exclusive, as a `&mut` is")]
pub fn gemm(dst: MatMut<'_>, accumulate: bool, alpha: f32, a: Mat<'_>, b: Mat<'_>) {
    assert!(
        dst.rows == a.rows && dst.cols == b.cols && a.cols == b.rows,
        "({} x {}) = ({} x {}) ({} x {})",
        dst.rows,
        dst.cols,
        a.rows,
        a.cols,
        b.rows,
        b.cols
    );
    // SAFETY: the constructors checked that all elements lie in the borrowed memory, ranges and
    // transposition keep that, the sizes agree, and `dst` is borrowed exclusively.
    unsafe {
        gemm::gemm(
            dst.rows,
            dst.cols,
            a.cols,
            dst.data,
            1,
            dst.stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + seed * 101) % 41) as f32 * 0.05 - 1.0).collect()
    }

    fn reference(a: Mat<'_>, b: Mat<'_>, i: usize, j: usize) -> f64 {
        (0..a.cols)
            .map(|k| {
                let left = a.data[i * a.row_stride + k * a.col_stride];
                let right = b.data[k * b.row_stride + j * b.col_stride];
                f64::from(left) * f64::from(right)
            })
            .sum()
    }

    #[test]
    fn products_of_every_orientation_and_stride_match_a_triple_loop() {
        for (m, n, k) in [(1, 1, 1), (1, 7, 129), (7, 1, 5), (5, 9, 0), (33, 127, 65), (127, 129, 70)] {
            let (pad_a, pad_b, pad_d) = (3, 1, 5);
            let a = values(m * (k + pad_a), 1);
            let at = values(k * (m + pad_a), 2);
            let b = values(k * (n + pad_b), 3);
            let bt = values(n * (k + pad_b), 4);
            for (a, b) in [
                (Mat::new(&a, m, k, k + pad_a), Mat::new(&b, k, n, n + pad_b)),
                (Mat::new(&at, k, m, m + pad_a).transposed(), Mat::new(&b, k, n, n + pad_b)),
                (Mat::new(&a, m, k, k + pad_a), Mat::new(&bt, n, k, k + pad_b).transposed()),
            ] {
                for accumulate in [false, true] {
                    let start = if accumulate { 0.5 } else { f32::NAN };
                    let stride = n + pad_d;
                    let mut dst = vec![start; m * stride];
                    gemm(MatMut::new(&mut dst, m, n, stride), accumulate, 0.5, a, b);
                    for (i, row) in dst.chunks(stride).enumerate() {
                        for j in 0..n {
                            let expected = 0.5 * reference(a, b, i, j) + if accumulate { 0.5 } else { 0.0 };
                            let error = (f64::from(row[j]) - expected).abs();
                            assert!(error < 1e-5, "{m} {n} {k}: {} for {expected}", row[j]);
                        }
                        assert!(row[n..].iter().all(|x| x.to_bits() == start.to_bits()), "padding written");
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_cover_every_element_once() {
        for (rows, cols, height, width) in [(1, 1, 4, 4), (9, 13, 4, 5), (8, 10, 4, 5), (0, 3, 2, 2)] {
            let stride = cols + 2;
            let mut data = vec![0.0; rows * stride];
            MatMut::new(&mut data, rows, cols, stride).par_tiles(height, width, |mut tile, rows, cols| {
                for (r, i) in rows.enumerate() {
                    for (x, j) in tile.row(r).iter_mut().zip(cols.clone()) {
                        *x += (i * 100 + j + 1) as f32;
                    }
                }
            });
            for (i, row) in data.chunks(stride).enumerate() {
                for (j, x) in row.iter().enumerate() {
                    assert_eq!(*x, if j < cols { (i * 100 + j + 1) as f32 } else { 0.0 });
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "a 2 x 3 matrix over 5")]
    fn a_slice_that_ends_too_early_is_refused() {
        Mat::new(&[0.0; 5], 2, 3, 3);
    }

    #[test]
    #[should_panic(expected = "(2 x 2) = (2 x 3) (2 x 2)")]
    fn sizes_that_do_not_belong_together_are_refused() {
        let (a, b, mut d) = ([0.0; 6], [0.0; 4], [0.0; 4]);
        gemm(MatMut::new(&mut d, 2, 2, 2), false, 1.0, Mat::new(&a, 2, 3, 3), Mat::new(&b, 2, 2, 2));
    }
}
