//! Products of small tiles inside of a task, on the task's own thread.

/// A matrix in a slice: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row_stride: usize,
    pub(crate) col_stride: usize,
}

impl<'a> Tile<'a> {
    /// Rows of a row-major matrix.
    pub(crate) fn rows(data: &'a [f32], stride: usize) -> Tile<'a> {
        Tile { data, row_stride: stride, col_stride: 1 }
    }

    /// The same matrix with rows and columns exchanged.
    pub(crate) fn transposed(self) -> Tile<'a> {
        Tile { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn check(&self, rows: usize, cols: usize) {
        let last = (rows - 1) * self.row_stride + (cols - 1) * self.col_stride;
        assert!(last < self.data.len(), "a {rows} x {cols} tile ends at {last} of {}", self.data.len());
    }
}

/// y (M, N) = scale a (M, K) b (K, N), added to y if `accumulate`. `y` is row-major without gaps.
pub(crate) fn product(
    y: &mut [f32],
    accumulate: bool,
    [m, n, k]: [usize; 3],
    scale: f32,
    a: Tile<'_>,
    b: Tile<'_>,
) {
    if m == 0 || n == 0 || k == 0 {
        if !accumulate {
            y.fill(0.0);
        }
        return;
    }
    assert_eq!(y.len(), m * n, "a {m} x {n} product");
    a.check(m, k);
    b.check(k, n);
    // SAFETY: the last elements of all three matrices lie in their slices, checked above; strides are not
    // negative, so the first and all others do too; `y` is borrowed exclusively, so it overlaps neither.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            y.as_mut_ptr(),
            1,
            n as isize,
            accumulate,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
