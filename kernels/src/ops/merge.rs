//! An adapter put into the dense rows of its weight: what the merge of a method is made of.
//!
//! In host memory these run on the calling thread, because a merge hands rows to its threads, from packed to packed. On a
//! device a weight is dense as a whole. No backward: a merge is the end of training.

use std::sync::Arc;

use crate::cuda::{Arg, Cuda, Grid, Source};
use crate::error::{Result, check};
use crate::tensor::{View, ViewMut};

const LOW_RANK: &str = "merge_low_rank";
const ROW_LENGTHS: &str = "merge_row_lengths";

/// Adds a low-rank product.
///
/// w += scaling b a.
///
/// Shapes: `w` (N, K), `b` (N, R), `a` (R, K).
/// Accumulates: `w` is added to.
/// Precision: f32, each of the R terms rounded as it is added; the same bits on every device.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: Hu et al. (LoRA), arXiv 2106.09685, section 4.1.
pub fn merge_low_rank(w: ViewMut, b: View, a: View, scaling: f32) -> Result<()> {
    check(LOW_RANK, "rows of b", w.rows, b.rows)?;
    check(LOW_RANK, "columns of a", w.cols, a.cols)?;
    check(LOW_RANK, "rows of a", b.cols, a.rows)?;
    if let Some(cuda) = w.cuda() {
        return low_rank_cuda(&cuda, &w, b, a, scaling);
    }
    let (cols, strides) = (w.cols, [w.stride, b.stride, a.stride].map(|stride| stride.max(1)));
    let rank = b.cols;
    let (b, a) = (b.cpu(LOW_RANK)?, a.cpu(LOW_RANK)?);
    for (w, b) in w.cpu(LOW_RANK)?.chunks_mut(strides[0]).zip(b.chunks(strides[1])) {
        for (b, a) in b[..rank].iter().zip(a.chunks(strides[2])) {
            let factor = scaling * b;
            w[..cols].iter_mut().zip(&a[..cols]).for_each(|(w, a)| *w += factor * a);
        }
    }
    Ok(())
}

/// Gives every row the length that was trained for it; a row of zeros stays one.
///
/// w_n *= m_n / ||w_n||.
///
/// Shapes: `w` (N, K), `m` (1, N).
/// Accumulates: `w` is read and written.
/// Precision: squares summed in f64, the factor rounded to f32 once.
///
/// # Errors
/// Shapes that do not belong together, or no kernel for the device.
///
/// Source: Liu et al. (DoRA), arXiv 2402.09353, equation 5.
pub fn merge_row_lengths(w: ViewMut, m: View) -> Result<()> {
    check(ROW_LENGTHS, "rows of m", 1, m.rows)?;
    check(ROW_LENGTHS, "columns of m", w.rows, m.cols)?;
    if let Some(cuda) = w.cuda() {
        return row_lengths_cuda(&cuda, &w, m);
    }
    let (cols, stride) = (w.cols, w.stride.max(1));
    for (w, &m) in w.cpu(ROW_LENGTHS)?.chunks_mut(stride).zip(m.cpu(ROW_LENGTHS)?) {
        let w = &mut w[..cols];
        let length = w.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
        let factor = if length == 0.0 { 0.0 } else { (f64::from(m) / length) as f32 };
        for x in w {
            *x *= factor;
        }
    }
    Ok(())
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("merge.cu", include_str!("merge.cu"));

/// Threads of a block and rows of a thread, as `merge.cu` has them.
const THREADS: usize = 256;
const ROWS: usize = 8;

fn low_rank_cuda(cuda: &Cuda, w: &ViewMut, b: View, a: View, scaling: f32) -> Result<()> {
    let args = [
        Arg::Ptr(w.f32(LOW_RANK)?),
        Arg::I64(w.stride as i64),
        Arg::Ptr(b.f32(LOW_RANK)?),
        Arg::I64(b.stride as i64),
        Arg::Ptr(a.f32(LOW_RANK)?),
        Arg::I64(a.stride as i64),
        Arg::F32(scaling),
        Arg::size(w.rows),
        Arg::size(w.cols),
        Arg::size(b.cols),
    ];
    let blocks = (w.rows.div_ceil(ROWS), w.cols.div_ceil(THREADS), 1);
    cuda.launch(&SOURCE, LOW_RANK, Grid { blocks, threads: THREADS, shared: 0 }, &args)
}

fn row_lengths_cuda(cuda: &Arc<Cuda>, w: &ViewMut, m: View) -> Result<()> {
    let args = [
        Arg::Ptr(w.f32(ROW_LENGTHS)?),
        Arg::I64(w.stride as i64),
        Arg::Ptr(m.f32(ROW_LENGTHS)?),
        Arg::size(w.cols),
    ];
    cuda.launch(&SOURCE, "merge_row_lengths", Grid::of(w.rows, THREADS), &args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::F32;
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, check_fast, tolerance};

    fn product(w: &Mat, b: &Mat, a: &Mat, scaling: f64) -> Vec<f64> {
        let (mut sum, b, a) = (w.f64(), b.f64(), a.f64());
        let rank = a.len() / w.cols.max(1);
        for (i, sum) in sum.iter_mut().enumerate() {
            let (row, col) = (i / w.cols, i % w.cols);
            *sum += (0..rank).map(|r| scaling * b[row * rank + r] * a[r * w.cols + col]).sum::<f64>();
        }
        sum
    }

    fn lengths(w: &Mat, m: &Mat) -> Vec<f64> {
        let (w64, m) = (w.f64(), m.f64());
        let rows = w64.chunks(w.cols.max(1)).zip(m).flat_map(|(row, m)| {
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.iter().map(|x| if length == 0.0 { 0.0 } else { x * m / length }).collect::<Vec<f64>>()
        });
        rows.collect()
    }

    /// Of every size: w, b, a and the row lengths; one row of w is zero.
    fn cases() -> impl Iterator<Item = [Mat; 4]> {
        [(1, 1, 1), (7, 129, 3), (129, 8, 16), (33, 576, 5), (64, 4096, 16)].into_iter().map(|(n, k, r)| {
            let mut w = Mat::random(1, n, k, 1.0).values();
            w[..k].fill(0.0);
            [
                Mat::new(n, k, w),
                Mat::random(2, n, r, 0.3),
                Mat::random(3, r, k, 0.3),
                Mat::random(4, 1, n, 1.0),
            ]
        })
    }

    #[test]
    fn rows_get_the_product_and_then_their_lengths() {
        for [w, b, a, m] in cases() {
            let close = tolerance(1e-6, 3e-6);
            let expected = product(&w, &b, &a, 1.5);
            check_fast("merge_low_rank", [(Out::Add(&w), &expected)], [&b, &a], close, |[w], [b, a]| {
                merge_low_rank(w, b, a, 1.5)
            });
            let expected = lengths(&w, &m);
            check_fast("merge_row_lengths", [(Out::Add(&w), &expected)], [&m], close, |[w], [m]| {
                merge_row_lengths(w, m)
            });
        }
        let mut w = Mat::random(1, 2, 3, 1.0);
        let (b, a) = (Mat::random(2, 2, 1, 1.0), Mat::random(3, 2, 3, 1.0));
        let error = merge_low_rank(w.view_mut(), b.view(), a.view(), 1.0).unwrap_err().to_string();
        assert_eq!(error, "merge_low_rank: rows of a is 2, expected 1");
        let error = merge_row_lengths(w.view_mut(), a.view().row_range(0, 1)).unwrap_err().to_string();
        assert_eq!(error, "merge_row_lengths: columns of m is 3, expected 2");
    }

    #[test]
    fn cuda_rows_get_the_product_and_then_their_lengths() {
        let Some(device) = cuda::device() else { return };
        for [w, b, a, m] in cases() {
            // Terms of about 0.1, sixteen at most, beside a w of 1.
            let close = tolerance(1e-6, 3e-6);
            let what = format!("{} x {}", w.rows, w.cols);
            let expected = product(&w, &b, &a, 1.5);
            let inputs = [(&b, F32), (&a, F32)];
            check_cuda(&device, &what, [(Out::Add(&w), F32, &expected)], inputs, close, |[w], [b, a]| {
                merge_low_rank(w, b, a, 1.5)
            });
            let expected = lengths(&w, &m);
            check_cuda(&device, &what, [(Out::Add(&w), F32, &expected)], [(&m, F32)], close, |[w], [m]| {
                merge_row_lengths(w, m)
            });
        }
    }
}
