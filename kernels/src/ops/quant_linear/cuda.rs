//! The CUDA twin: the weight is dequantized to bf16 into scratch and goes into one library product.
//!
//! The scratch rows carry more than the weight: the row scale is multiplied in, and where the branch's `h`
//! lies in the padding behind the rows of `x` ([`Tensor::with_padding`](crate::Tensor::with_padding)), the
//! branch's `b` is appended, so that one product of depth K + padding gives y = x Wᵀ diag(g) + h bᵀ. Where its `dh` lies
//! behind the rows of `dy`, the rows of `a` go below those of the weight, and one product of depth N + rank gives
//! dx = dy diag(g) W + dh a. Elsewhere the branch is a product of its own.

use std::ops::Range;
use std::sync::Arc;

use qpeft_formats::GgmlType;

use super::Branch;
use crate::cuda::gemm::{Matrix, transposed};
use crate::cuda::{Cuda, Scratch};
use crate::error::Result;
use crate::ops::convert::convert;
use crate::ops::dequantize::{Columns, dequantize_rows, dequantize_rows_above};
use crate::tensor::{Dtype, View, ViewMut};
use crate::weight::{BaseWeight, Missing, Place, Room, WeightType};

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
    to: Option<View<'_>>,
    x: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    branch: Option<Branch<'_>>,
) -> Result<()> {
    let (y, x) = (y.matrix(op)?, x.matrix(op)?);
    let to = to.map(|to| to.matrix(op)).transpose()?;
    let place = match branch {
        Some(Branch { h, .. }) => find(x, h.matrix(op)?),
        None => None,
    };
    let beside = place.and(branch).zip(place).map(|(branch, place)| (branch.b, place));
    let depth = weight.cols() + place.map_or(0, |place| place.padding);
    let x = Matrix { cols: depth, ..x };
    for rows in tiles(weight, depth) {
        let w = folded(cuda, weight, rows.clone(), row_scale, beside)?;
        match to {
            None => cuda.gemm(columns(y, rows), x, transposed(w), 1.0, 0.0)?,
            Some(to) => cuda.gemm_onto(columns(y, rows.clone()), columns(to, rows), x, transposed(w))?,
        }
    }
    match branch {
        Some(Branch { h, b }) if place.is_none() => {
            cuda.gemm(y, h.matrix(op)?, transposed(b.matrix(op)?), 1.0, 1.0)
        }
        _ => Ok(()),
    }
}

pub(super) fn backward(
    op: &'static str,
    cuda: &Arc<Cuda>,
    dx: &ViewMut<'_>,
    dy: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    accumulate: bool,
) -> Result<()> {
    let (dx, dy) = (dx.matrix(op)?, dy.matrix(op)?);
    let (rows, cols) = (weight.rows(), weight.cols());
    let beta = |adds: bool| if adds { 1.0 } else { 0.0 };
    if let Some(Room { ptr, stride, .. }) = weight.copy_with_room(row_scale.is_some(), 0) {
        let w = Matrix { ptr, rows, cols, stride, dtype: Dtype::Bf16 };
        return cuda.gemm(dx, dy, w, 1.0, beta(accumulate));
    }
    for (i, rows) in tiles(weight, cols).enumerate() {
        let w = folded(cuda, weight, rows.clone(), row_scale, None)?;
        cuda.gemm(dx, columns(dy, rows), w, 1.0, beta(accumulate || i > 0))?;
    }
    Ok(())
}

/// Where dh lies right behind the rows of dy: dx = (dy, dh) (diag(g) W; a), with the rows of a below those of the
/// weight. False: it does not, or the weight is too large for scratch, and nothing was done.
pub(super) fn backward_with_branch(
    op: &'static str,
    cuda: &Arc<Cuda>,
    dx: &ViewMut<'_>,
    dh: View<'_>,
    dy: View<'_>,
    weight: &BaseWeight,
    row_scale: Option<View<'_>>,
    a: View<'_>,
    accumulate: bool,
) -> Result<bool> {
    let (dx, dh, dy) = (dx.matrix(op)?, dh.matrix(op)?, dy.matrix(op)?);
    let (rows, cols, rank) = (weight.rows(), weight.cols(), dh.cols);
    if find(dy, dh).is_none_or(|place| place.offset != 0) || tiles(weight, cols).count() != 1 {
        return Ok(false);
    }
    let of = |ptr: u64, rows: usize, stride: usize| Matrix { ptr, rows, cols, stride, dtype: Dtype::Bf16 };
    let Room { ptr, stride, is_filled } = if let Some(room) = weight.copy_with_room(row_scale.is_some(), rank)
    {
        room
    } else {
        let ptr = cuda.scratch(Scratch::Weight, (rows + rank) * cols * Dtype::Bf16.size())?;
        let to = ViewMut::on_cuda(cuda, of(ptr, rows + rank, cols));
        dequantize_rows_above(to, weight, 0..rows, row_scale, None, a)?;
        Room { ptr, stride: cols, is_filled: true }
    };
    if !is_filled {
        let below = ptr + (rows * stride * Dtype::Bf16.size()) as u64;
        convert(ViewMut::on_cuda(cuda, of(below, rank, stride)), a)?;
    }
    let beta = if accumulate { 1.0 } else { 0.0 };
    cuda.gemm(dx, Matrix { cols: rows + rank, ..dy }, of(ptr, rows + rank, stride), 1.0, beta)?;
    Ok(true)
}

/// Bytes of scratch that products with a weight take: its bf16 rows with this padding, and as many below as the rank,
/// unless it has a copy or is bf16.
pub fn weight_scratch(weight: &BaseWeight, padding: usize, rank: usize, copied: bool) -> usize {
    let (rows, cols) = (weight.rows(), weight.cols());
    let depth = cols + padding;
    let dense = padding == 0 && weight.weight_type() == WeightType::Ggml(GgmlType::BF16);
    if copied || dense {
        return 0;
    }
    let forward = rows.min((TILE / depth.max(1)).max(1)) * depth;
    let backward = if tiles(weight, cols).count() == 1 { (rows + rank) * cols } else { 0 };
    forward.max(backward) * Dtype::Bf16.size()
}

/// The rows of the weight in the pieces that a product takes: those that fit scratch, or all of a copy.
fn tiles(weight: &BaseWeight, depth: usize) -> impl Iterator<Item = Range<usize>> {
    pieces(weight.rows(), if weight.is_cached() { weight.rows() } else { TILE / depth.max(1) })
}

fn pieces(rows: usize, at_once: usize) -> impl Iterator<Item = Range<usize>> {
    let at_once = at_once.max(1);
    (0..rows).step_by(at_once).map(move |start| start..(start + at_once).min(rows))
}

/// Calls `visit` with the weight's rows in bf16, a piece that fits scratch at a time; a copy that it may have is left alone.
pub(crate) fn for_each_tile(
    cuda: &Arc<Cuda>,
    weight: &BaseWeight,
    mut visit: impl FnMut(Range<usize>, View<'_>) -> Result<()>,
) -> Result<()> {
    for rows in pieces(weight.rows(), TILE / weight.cols().max(1)) {
        let w = match dense_rows(weight, &rows) {
            Some(dense) => dense,
            None => dequantized(cuda, weight, rows.clone(), None, None)?,
        };
        visit(rows, ViewMut::on_cuda(cuda, w).as_view())?;
    }
    Ok(())
}

/// The copy of a weight with a row scale and an adapter, where a product wrote it before.
pub(super) fn scale_copy_anew(
    cuda: &Arc<Cuda>,
    weight: &BaseWeight,
    row_scale: View<'_>,
    b: View<'_>,
    a: View<'_>,
) -> Result<()> {
    let Some((ptr, place)) = weight.copy_to_scale_anew() else { return Ok(()) };
    let stride = weight.cols() + place.map_or(0, |place| place.padding);
    let of = |rows| Matrix { ptr, rows, cols: stride, stride, dtype: Dtype::Bf16 };
    let (rows, columns) = (weight.rows(), place.map(|place| Columns { b, offset: place.offset }));
    if weight.rows_below_copy(a.rows).is_some() {
        let to = ViewMut::on_cuda(cuda, of(rows + a.rows));
        dequantize_rows_above(to, weight, 0..rows, Some(row_scale), columns, a)
    } else {
        dequantize_rows(ViewMut::on_cuda(cuda, of(rows)), weight, 0..rows, Some(row_scale), columns)
    }
}

fn columns(matrix: Matrix, range: Range<usize>) -> Matrix {
    let ptr = matrix.ptr + (range.start * matrix.dtype.size()) as u64;
    Matrix { ptr, cols: range.len(), ..matrix }
}

/// Rows of a weight that is bf16 itself.
fn dense_rows(weight: &BaseWeight, rows: &Range<usize>) -> Option<Matrix> {
    let (cols, size) = (weight.cols(), Dtype::Bf16.size());
    let ptr = weight.dense_bf16()? + (rows.start * cols * size) as u64;
    Some(Matrix { ptr, rows: rows.len(), cols, stride: cols, dtype: Dtype::Bf16 })
}

/// Rows of diag(g) W in scratch, the branch in their padding.
fn dequantized(
    cuda: &Arc<Cuda>,
    weight: &BaseWeight,
    rows: Range<usize>,
    row_scale: Option<View<'_>>,
    beside: Option<(View<'_>, Place)>,
) -> Result<Matrix> {
    let stride = weight.cols() + beside.map_or(0, |(_, place)| place.padding);
    let ptr = cuda.scratch(Scratch::Weight, rows.len() * stride * Dtype::Bf16.size())?;
    let matrix = Matrix { ptr, rows: rows.len(), cols: stride, stride, dtype: Dtype::Bf16 };
    let columns = beside.map(|(b, place)| Columns { b, offset: place.offset });
    dequantize_rows(ViewMut::on_cuda(cuda, matrix), weight, rows, row_scale, columns)?;
    Ok(matrix)
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
        && let Some(dense) = dense_rows(weight, &rows)
    {
        return Ok(dense);
    }
    let Some((ptr, missing)) = weight.cached_copy(row_scale.is_some(), place) else {
        return dequantized(cuda, weight, rows, row_scale, beside);
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

#[cfg(test)]
mod tests {
    use qpeft_formats::GgmlType;

    use crate::ops::quant_linear::{
        Branch, quant_linear_backward, quant_linear_backward_with_branch, quant_linear_forward,
        quant_linear_forward_onto, scale_copy_anew,
    };
    use crate::testing::{Mat, Tolerance, assert_close, cuda, tolerance};
    use crate::weight::{BaseWeight, WeightType};
    use crate::{Device, Tensor};

    fn put(tensor: &mut Tensor, values: &Mat) {
        tensor.write(&values.values()).unwrap();
    }

    /// Values that bf16 holds, so that both devices begin with the same numbers.
    fn random(seed: u64, rows: usize, cols: usize) -> Mat {
        Mat::random(seed, rows, cols, 1.0).rounded()
    }

    /// Sums of products of unit normals with rows scaled by g and rounded to bf16: each term is off by 1.1e-3 |g| in the
    /// root mean square, the worst of 10^5 sums by five times what their number's root makes of it; and half as much
    /// again for what is rounded on the way.
    fn close(terms: usize, g: &Mat) -> Tolerance {
        let largest = g.values().iter().fold(1.0f64, |largest, g| largest.max(f64::from(g.abs())));
        tolerance(1.0 / 128.0, 8e-3 * largest * (terms as f64).sqrt())
    }

    /// All three products on the device against the CPU's, with the low-rank matrices beside x, dy or dx, or apart.
    fn check(device: &Device, weight: &BaseWeight, t: usize, r: usize, copied: bool) {
        let (n, k) = (weight.rows(), weight.cols());
        let what = format!("{} {n} x {k}, {t} tokens, rank {r}, copied {copied}", weight.type_name());
        let [x, dy] = [random(1, t, k), random(2, t, n)];
        let [h, b, a, dh] = [random(3, t, r), random(4, n, r), random(5, r, k), random(10, t, r)];
        let g = Mat::random(6, 1, n, 1.0);
        let mut on_device = weight.clone().to_device(device).unwrap();
        if copied {
            on_device.keep_copy(device, crate::tensor::padding(k, &[r]), r, true).unwrap();
        }
        let activations = |m: &Mat| {
            let mut tensor = Tensor::activations(device, m.rows, m.cols).unwrap();
            put(&mut tensor, m);
            tensor
        };
        let mut g_device = Tensor::zeros(device, 1, n).unwrap();
        put(&mut g_device, &g);
        let [b_device, a_device] = [&b, &a].map(activations);
        let (mut x_device, mut beside_x) = Tensor::with_padding(device, t, k, &[r]).unwrap();
        let (mut dy_device, mut beside_dy) = Tensor::with_padding(device, t, n, &[r]).unwrap();
        put(&mut x_device, &x);
        put(&mut beside_x[0], &h);
        put(&mut dy_device, &dy);

        let mut y = Mat::poisoned(t, n);
        let branch = Branch { h: h.view(), b: b.view() };
        quant_linear_forward(y.view_mut(), x.view(), weight, Some(g.view()), Some(branch)).unwrap();
        let mut y_device = activations(&Mat::poisoned(t, n));
        let branch = Branch { h: beside_x[0].view(), b: b_device.view() };
        let scale = Some(g_device.view());
        let weight_device = &on_device;
        quant_linear_forward(y_device.view_mut(), x_device.view(), weight_device, scale, Some(branch))
            .unwrap();
        assert_close(&format!("{what}: y"), &y_device.read().unwrap(), &y.values(), close(k, &g));

        // Rounded once, whatever it is added to.
        let stream = random(7, t, n);
        let stream_device = activations(&stream);
        let branch = Branch { h: h.view(), b: b.view() };
        quant_linear_forward_onto(
            y.view_mut(),
            stream.view(),
            x.view(),
            weight,
            Some(g.view()),
            Some(branch),
        )
        .unwrap();
        let branch = Branch { h: beside_x[0].view(), b: b_device.view() };
        let (to, onto, from) = (y_device.view_mut(), stream_device.view(), x_device.view());
        quant_linear_forward_onto(to, onto, from, weight_device, scale, Some(branch)).unwrap();
        assert_close(&format!("{what}: y onto"), &y_device.read().unwrap(), &y.values(), close(k, &g));

        // dh has terms of the size of 1, dh A as many as the rank.
        let (row_scale, start) = (Some(g.view()), random(8, t, k));
        let mut apart = activations(&dh);
        put(&mut beside_dy[0], &dh);
        for (beside, accumulate) in [(true, false), (true, true), (false, false), (false, true)] {
            let first = if accumulate { start.values() } else { vec![f32::NAN; t * k] };
            let mut dx = Mat::new(t, k, first.clone());
            quant_linear_backward_with_branch(
                dx.view_mut(),
                dh.view(),
                dy.view(),
                weight,
                row_scale,
                a.view(),
                accumulate,
            )
            .unwrap();
            let mut dx_device = activations(&Mat::new(t, k, first));
            let dh_device = if beside { &mut beside_dy[0] } else { &mut apart };
            quant_linear_backward_with_branch(
                dx_device.view_mut(),
                dh_device.view(),
                dy_device.view(),
                weight_device,
                scale,
                a_device.view(),
                accumulate,
            )
            .unwrap();
            let what = format!("{what}, beside {beside}, accumulate {accumulate}: dx");
            assert_close(&what, &dx_device.read().unwrap(), &dx.values(), close(n + r, &g));
        }
        let mut dx = Mat::poisoned(t, k);
        quant_linear_backward(dx.view_mut(), dy.view(), weight, row_scale, false).unwrap();
        let mut dx_device = activations(&Mat::poisoned(t, k));
        quant_linear_backward(dx_device.view_mut(), dy_device.view(), weight_device, scale, false).unwrap();
        assert_close(&format!("{what}: dx alone"), &dx_device.read().unwrap(), &dx.values(), close(n, &g));
    }

    #[test]
    fn the_cuda_products_equal_those_of_the_cpu_wherever_the_branch_lies() {
        let Some(device) = cuda::device() else { return };
        for (n, k) in [(8, 32), (96, 256), (257, 96), (512, 1024)] {
            let f32 = BaseWeight::from_f32(n, k, &Mat::random(9, n, k, 1.0).rounded().values()).unwrap();
            let q8_0 = f32.quantized(WeightType::Ggml(GgmlType::Q8_0)).unwrap();
            for weight in [&f32, &q8_0] {
                for (t, r) in [(1, 8), (33, 16), (129, 4)] {
                    for copied in [false, true] {
                        check(&device, weight, t, r, copied);
                    }
                }
            }
        }
    }

    /// Both products by a copy that was written with other row scales and another adapter have the bits of one that never
    /// was.
    #[test]
    fn a_cuda_copy_that_is_scaled_anew_is_that_of_a_new_weight() {
        let Some(device) = cuda::device() else { return };
        let (n, k, t, r) = (96, 256, 33, 16);
        let f32 = BaseWeight::from_f32(n, k, &Mat::random(9, n, k, 1.0).values()).unwrap();
        let weight = f32.quantized(WeightType::Ggml(GgmlType::Q8_0)).unwrap();
        let there = |m: Mat, mut tensor: Tensor| {
            put(&mut tensor, &m);
            tensor
        };
        let activations = |seed, rows, cols| {
            there(random(seed, rows, cols), Tensor::activations(&device, rows, cols).unwrap())
        };
        // Row scale, second and first factor, before a step and after it.
        let [before, after] = [20, 30].map(|seed| {
            let g = there(Mat::random(seed, 1, n, 1.0), Tensor::zeros(&device, 1, n).unwrap());
            (g, activations(seed + 1, n, r), activations(seed + 2, r, k))
        });
        let (mut x, mut h) = Tensor::with_padding(&device, t, k, &[r]).unwrap();
        let (mut dy, mut dh) = Tensor::with_padding(&device, t, n, &[r]).unwrap();
        for (seed, tensor) in [&mut x, &mut h[0], &mut dy, &mut dh[0]].into_iter().enumerate() {
            put(tensor, &random(seed as u64, t, tensor.cols()));
        }
        let products = |weight: &BaseWeight, (g, b, a): &(Tensor, Tensor, Tensor)| {
            let (mut y, mut dx) = (activations(7, t, n), activations(8, t, k));
            let branch = Some(Branch { h: h[0].view(), b: b.view() });
            let (to, dh, dy, g) = (dx.view_mut(), dh[0].view(), dy.view(), Some(g.view()));
            quant_linear_forward(y.view_mut(), x.view(), weight, g, branch).unwrap();
            quant_linear_backward_with_branch(to, dh, dy, weight, g, a.view(), false).unwrap();
            [y.read().unwrap(), dx.read().unwrap()]
        };
        let with_copy = || {
            let mut weight = weight.clone().to_device(&device).unwrap();
            weight.keep_copy(&device, crate::tensor::padding(k, &[r]), r, true).unwrap();
            weight
        };
        let used = with_copy();
        let (g, b, a) = &after;
        // Nothing is there to scale before a product wrote it.
        scale_copy_anew(&used, g.view(), b.view(), a.view()).unwrap();
        assert!(!used.has_rows_in_copy());
        let old = products(&used, &before);
        scale_copy_anew(&used, g.view(), b.view(), a.view()).unwrap();
        used.set_refreshed(r);
        assert!(used.has_rows_in_copy());
        let found = products(&used, &after);
        assert_eq!(found, products(&with_copy(), &after));
        assert_ne!(found, old);
    }

    /// Products that are large enough to look for their fastest algorithm, which must not show in the result, nor in
    /// what a product adds to.
    #[test]
    fn cuda_tuning_changes_no_bit() {
        let Some(device) = cuda::device() else { return };
        let cuda = device.cuda().unwrap();
        let (t, n, k) = (1024, 1032, 1536);
        let [a, b, c] = [random(1, t, k), random(2, n, k), random(3, t, n)].map(|m| {
            let mut tensor = Tensor::activations(&device, m.rows, m.cols).unwrap();
            put(&mut tensor, &m);
            tensor
        });
        for beta in [0.0, 1.0] {
            let product = || {
                let mut to = Tensor::activations(&device, t, n).unwrap();
                to.write(&c.read().unwrap()).unwrap();
                let [to_matrix, a, b] =
                    [to.view(), a.view(), b.view()].map(|view| view.matrix("test").unwrap());
                cuda.gemm(to_matrix, a, crate::cuda::gemm::transposed(b), 1.0, beta).unwrap();
                to.read().unwrap()
            };
            let before = product();
            let mut while_tuning = Vec::new();
            cuda.tuning(|| {
                while_tuning = product();
                Ok::<_, crate::Error>(())
            })
            .unwrap();
            assert!(before == while_tuning && before == product(), "beta {beta}: other bits");
        }
    }
}
