//! How the elementwise and row-wise ops walk strided matrices with all threads.
//!
//! Rows are independent in these ops, so how they are spread over threads changes no bit of the result.

/// Elements that one task should have at least: a few microseconds of work.
const GRAIN: usize = 8192;

/// Rows of `cols` elements that make up one task.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (GRAIN / cols.max(1)).max(1)
}

/// Row `i` of a matrix.
pub(crate) fn row(data: &[f32], i: usize, cols: usize, stride: usize) -> &[f32] {
    &data[i * stride..i * stride + cols]
}

/// How to walk equally shaped matrices element by element: piece `i` of matrix `m` has `cols` elements at
/// `i * strides[m]`, the last piece possibly less. Matrices without gaps are cut regardless of their rows.
pub(crate) struct Pieces<const M: usize> {
    pub(crate) cols: usize,
    pub(crate) strides: [usize; M],
}

/// The pieces of matrices of `cols` columns with these strides. `cols` must not be 0.
pub(crate) fn pieces<const M: usize>(cols: usize, strides: [usize; M]) -> Pieces<M> {
    if strides.iter().all(|&stride| stride == cols) {
        Pieces { cols: GRAIN, strides: [GRAIN; M] }
    } else {
        Pieces { cols, strides }
    }
}
