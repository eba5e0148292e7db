//! The CUDA twin: the weight is dequantized to bf16 into scratch and goes into one library product.
//!
//! The scratch rows carry more than the weight: the row scale is multiplied in, and where the branch's `h`
//! lies in the padding behind the rows of `x` ([`Tensor::with_padding`](crate::Tensor::with_padding)), the
//! branch's `b` is appended, so that one product of depth K + padding gives y = x Wᵀ diag(g) + h bᵀ, and one
//! product backward gives dx and dh side by side. Elsewhere the branch is a product of its own.

use std::ops::Range;
use std::sync::Arc;

use qpeft_formats::GgmlType;

use super::Branch;
use crate::cuda::gemm::{Matrix, transposed};
use crate::cuda::{Cuda, Scratch};
use crate::error::Result;
use crate::ops::convert::convert;
use crate::ops::dequantize::{Columns, dequantize_rows};
use crate::tensor::{Dtype, View, ViewMut};
use crate::weight::{BaseWeight, Missing, Place, WeightType};

/// Elements of dequantized weight in scratch at a time: a wide matrix (an output head) goes in pieces.
const TILE: usize = 128 << 20;

/// The place of `h` in the padding of `x`, if it lies there.
fn find(x: Matrix, h: Matrix) -> Option<Place> {
    let size = x.dtype.size() as u64;
    let bytes = h.ptr.checked_sub(x.ptr + x.cols as u64 * size)?;
    let (offset, padding) = ((bytes / size) as usize, x.stride - x.cols);
    let inside = h.stride == x.stride && h.dtype == x.dtype && offset + h.cols <= padding;
    (inside && bytes.is_multiple_of(size)).then_some(Place { offset, padding })
}

pub(super) fn forward(
    op: &'static str,
    cuda: &Arc<Cuda>,
    y: &ViewMut<'_>,
    x: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    branch: Option<Branch<'_>>,
) -> Result<()> {
    let (y, x) = (y.matrix(op)?, x.matrix(op)?);
    let place = match branch {
        Some(Branch { h, .. }) => find(x, h.matrix(op)?),
        None => None,
    };
    let beside = place.and(branch).zip(place).map(|(branch, place)| (branch.b, place));
    let depth = weight.cols() + place.map_or(0, |place| place.padding);
    let x = Matrix { cols: depth, ..x };
    for rows in tiles(weight, depth) {
        let w = folded(cuda, weight, rows.clone(), row_scale, beside)?;
        cuda.gemm(columns(y, rows), x, transposed(w), 1.0, 0.0)?;
    }
    match branch {
        Some(Branch { h, b }) if place.is_none() => {
            cuda.gemm(y, h.matrix(op)?, transposed(b.matrix(op)?), 1.0, 1.0)
        }
        _ => Ok(()),
    }
}

/// With `accumulate` the product adds to the padding, too: dh must hold zeros, as a product that overwrites the same
/// rows with its own branch elsewhere in the padding leaves them.
pub(super) fn backward(
    op: &'static str,
    cuda: &Arc<Cuda>,
    dx: &ViewMut<'_>,
    dh: Option<ViewMut<'_>>,
    dy: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    b: Option<View<'_>>,
    accumulate: bool,
) -> Result<()> {
    let (dx, dy) = (dx.matrix(op)?, dy.matrix(op)?);
    let branch = dh.zip(b);
    let place = match &branch {
        Some((dh, _)) => find(dx, dh.matrix(op)?),
        None => None,
    };
    let beside = branch.as_ref().zip(place).map(|((_, b), place)| (*b, place));
    let depth = weight.cols() + place.map_or(0, |place| place.padding);
    let dx = Matrix { cols: depth, ..dx };
    if let Some((dh, b)) = branch
        && place.is_none()
    {
        cuda.gemm(dh.matrix(op)?, dy, b.matrix(op)?, 1.0, 0.0)?;
    }
    for (i, rows) in tiles(weight, depth).enumerate() {
        let w = folded(cuda, weight, rows.clone(), row_scale, beside)?;
        let beta = if accumulate || i > 0 { 1.0 } else { 0.0 };
        cuda.gemm(dx, columns(dy, rows), w, 1.0, beta)?;
    }
    Ok(())
}

/// Bytes of scratch that products with a weight take: its bf16 rows with this padding, unless it has a copy or is bf16.
pub fn weight_scratch(weight: &BaseWeight, padding: usize, copied: bool) -> usize {
    let depth = weight.cols() + padding;
    let dense = padding == 0 && weight.weight_type() == WeightType::Ggml(GgmlType::BF16);
    if copied || dense {
        0
    } else {
        weight.rows().min((TILE / depth.max(1)).max(1)) * depth * Dtype::Bf16.size()
    }
}

/// The rows of the weight in pieces that fit scratch.
fn tiles(weight: &BaseWeight, depth: usize) -> impl Iterator<Item = Range<usize>> {
    let (rows, at_once) = (weight.rows(), (TILE / depth.max(1)).max(1));
    let at_once = if weight.is_cached() { rows.max(1) } else { at_once };
    (0..rows).step_by(at_once).map(move |start| start..(start + at_once).min(rows))
}

/// Calls `visit` with the weight's rows in bf16, a piece that fits scratch at a time.
pub(crate) fn for_each_tile(
    cuda: &Arc<Cuda>,
    weight: &BaseWeight,
    mut visit: impl FnMut(Range<usize>, View<'_>) -> Result<()>,
) -> Result<()> {
    for rows in tiles(weight, weight.cols()) {
        let w = folded(cuda, weight, rows.clone(), None, None)?;
        visit(rows, ViewMut::on_cuda(cuda, w).as_view())?;
    }
    Ok(())
}

fn columns(matrix: Matrix, range: Range<usize>) -> Matrix {
    let ptr = matrix.ptr + (range.start * matrix.dtype.size()) as u64;
    Matrix { ptr, cols: range.len(), ..matrix }
}

/// Rows of diag(g) W in bf16, the branch in their padding.
fn folded(
    cuda: &Arc<Cuda>,
    weight: &BaseWeight,
    rows: Range<usize>,
    row_scale: Option<View<'_>>,
    beside: Option<(View<'_>, Place)>,
) -> Result<Matrix> {
    let place = beside.map(|(_, place)| place);
    let stride = weight.cols() + place.map_or(0, |place| place.padding);
    if row_scale.is_none()
        && beside.is_none()
        && let Some(dense) = weight.dense_bf16()
    {
        let ptr = dense + (rows.start * weight.cols() * Dtype::Bf16.size()) as u64;
        return Ok(Matrix { ptr, rows: rows.len(), cols: stride, stride, dtype: Dtype::Bf16 });
    }
    let (ptr, missing) = if let Some(cached) = weight.cached_copy(row_scale.is_some(), place) {
        cached
    } else {
        let bytes = rows.len() * stride * Dtype::Bf16.size();
        (cuda.scratch(Scratch::Weight, bytes)?, Missing::Everything)
    };
    let matrix = Matrix { ptr, rows: rows.len(), cols: stride, stride, dtype: Dtype::Bf16 };
    let to = ViewMut::on_cuda(cuda, matrix);
    match (missing, beside) {
        (Missing::Nothing, _) | (Missing::Columns, None) => {}
        (Missing::Columns, Some((b, place))) => {
            let at = weight.cols() + place.offset;
            convert(to.into_column_range(at, b.cols), b.row_range(rows.start, rows.len()))?;
        }
        (Missing::Everything, _) => {
            let columns = beside.map(|(b, place)| Columns { b, offset: place.offset });
            dequantize_rows(to, weight, rows, row_scale, columns)?;
        }
    }
    Ok(matrix)
}
