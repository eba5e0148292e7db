//! The inverse rotation of a gradient that also makes the gradient of the factors of a linear's rows.
//!
//! The linear's own output is recovered from the rotated one that attention has kept, where it is needed.

use rayon::prelude::*;

use super::{SOURCE, check_operands};
use crate::cpu::by_isa;
use crate::cpu::rows::row;
use crate::cpu::scratch::with_scratch;
use crate::cuda::spans::Chunks;
use crate::cuda::{Arg, Cuda, Scratch};
use crate::error::{Result, check};
use crate::ids::Ids;
use crate::ops::row_scale::{GROUP, add_group_sums, add_partials_cuda};
use crate::tensor::{View, ViewMut};

const SCALED: &str = "rope_backward_scaled";

/// The gradient of [`rope_forward_scaled`](super::rope_forward_scaled), and that of what the factor is a multiple of,
/// without another pass over the gradient: where x comes from a linear with magnitudes (DoRA), and the factor is the
/// magnitude over a constant.
///
/// dx as `rope_backward`; dscale_n += sum_t dx_tn u_tn / scale_n, dx and u both rotated back, u from the rotated `x`
/// that `rope_forward_scaled` left and that stays as it is; a scale of 0 as in
/// [`row_scale_backward`](crate::ops::row_scale::row_scale_backward); then dx := diag(factor) dx.
///
/// Shapes: `dx`, `x` (T, heads * D); `dscale`, `factor`, `scale` (1, heads * D); `table` and `positions` as `rope_forward`.
/// Accumulates: `dscale` is added to; `dx` is rotated in place.
/// Precision: as the two ops; on CUDA the sums are of numbers before they are rounded to bf16.
///
/// # Errors
/// As `rope_forward`.
///
/// Source: the two ops.
pub fn rope_backward_scaled<'a>(
    dx: ViewMut,
    dscale: ViewMut,
    x: View,
    table: View,
    positions: impl Into<Ids<'a>>,
    head_dim: usize,
    factor: View,
    scale: View,
) -> Result<()> {
    let positions = positions.into();
    check_operands(SCALED, dx.as_view(), table, positions, head_dim)?;
    check(SCALED, "rows of the rotated x", dx.rows, x.rows)?;
    check(SCALED, "columns of the rotated x", dx.cols, x.cols)?;
    for (rows, columns, row) in [
        ("rows of dscale", "columns of dscale", dscale.as_view()),
        ("rows of factor", "columns of factor", factor),
        ("rows of scale", "columns of scale", scale),
    ] {
        check(SCALED, rows, 1, row.rows)?;
        check(SCALED, columns, dx.cols, row.cols)?;
    }
    if let Some(cuda) = dx.cuda() {
        return scaled_cuda(&cuda, &dx, &dscale, x, table, positions, head_dim, [factor, scale]);
    }
    scaled_fast(dx, dscale, x, table, positions.host(), head_dim, [factor, scale])
}

// ----------------------------------------------------------------------------------------- CUDA

fn scaled_cuda(
    cuda: &Cuda,
    dx: &ViewMut,
    dscale: &ViewMut,
    x: View,
    table: View,
    positions: Ids,
    head_dim: usize,
    [factor, scale]: [View; 2],
) -> Result<()> {
    if x.cols == 0 {
        return Ok(());
    }
    // A thread holds both columns of a pair.
    let chunks = Chunks::of(x.rows, x.cols / 2);
    let partial = cuda.scratch(Scratch::Partials, chunks.count * x.cols * size_of::<f32>())?;
    let args = [
        Arg::Ptr(dx.bf16(SCALED)?),
        Arg::size(dx.stride),
        Arg::Ptr(partial),
        Arg::Ptr(x.bf16(SCALED)?),
        Arg::size(x.stride),
        Arg::Ptr(table.f32(SCALED)?),
        Arg::size(table.stride),
        Arg::Ptr(positions.device(SCALED)?),
        Arg::Ptr(factor.f32(SCALED)?),
        Arg::size(x.rows),
        Arg::size(x.cols / head_dim),
        Arg::size(head_dim / 2),
        Arg::size(chunks.rows),
    ];
    cuda.launch(&SOURCE, "rope_backward_columns", chunks.grid(), &args)?;
    add_partials_cuda(SCALED, cuda, dscale, partial, chunks, scale)
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn scaled_naive(
    dx: &mut [f64],
    dscale: &mut [f64],
    x: &[f64],
    table: &[f64],
    positions: &[u32],
    head_dim: usize,
    factor: &[f64],
    scale: &[f64],
) {
    if positions.is_empty() {
        return;
    }
    let mut unrotated = x.to_vec();
    super::backward_naive(dx, table, positions, head_dim);
    super::backward_naive(&mut unrotated, table, positions, head_dim);
    crate::ops::row_scale::backward_naive(dscale, dx, &unrotated, scale);
    dx.iter_mut().enumerate().for_each(|(i, dx)| *dx *= factor[i % factor.len()]);
}

/// The sums have the bits of those of `row_scale_backward` for an x that was rotated back in place.
fn scaled_fast(
    dx: ViewMut,
    dscale: ViewMut,
    x: View,
    table: View,
    positions: &[u32],
    head_dim: usize,
    [factor, scale]: [View; 2],
) -> Result<()> {
    let (cols, [dx_stride, x_stride, table_stride]) = (x.cols, [dx.stride, x.stride, table.stride]);
    let (dx, dscale, x, table) = (dx.cpu(SCALED)?, dscale.cpu(SCALED)?, x.cpu(SCALED)?, table.cpu(SCALED)?);
    let (factor, scale) = (factor.cpu(SCALED)?, scale.cpu(SCALED)?);
    if cols == 0 {
        return Ok(());
    }
    with_scratch(positions.len().div_ceil(GROUP) * cols, |sums| {
        let groups = sums.par_chunks_mut(cols).zip(dx.par_chunks_mut(GROUP * dx_stride));
        groups.zip(positions.par_chunks(GROUP)).enumerate().for_each(|(group, ((sums, dx), positions))| {
            sums.fill(0.0);
            for ((t, &position), dx) in (group * GROUP..).zip(positions).zip(dx.chunks_mut(dx_stride)) {
                let (cos, sin) = row(table, position as usize, head_dim, table_stride).split_at(head_dim / 2);
                scaled_row(&mut dx[..cols], sums, row(x, t, cols, x_stride), cos, sin, &factor[..cols]);
            }
        });
        add_group_sums(&mut dscale[..cols], sums, cols, scale);
    });
    Ok(())
}

by_isa! {
    fn scaled_row(dx: &mut [f32], sums: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32], factor: &[f32]) {
        let half = cos.len();
        let sin = &sin[..half];
        let heads = dx.chunks_exact_mut(2 * half).zip(sums.chunks_exact_mut(2 * half));
        for ((dx, sums), (x, factor)) in heads.zip(x.chunks_exact(2 * half).zip(factor.chunks_exact(2 * half))) {
            let ((da, db), (sum_a, sum_b)) = (dx.split_at_mut(half), sums.split_at_mut(half));
            let ((xa, xb), (fa, fb)) = (x.split_at(half), factor.split_at(half));
            for j in 0..half {
                let (a, b) = (da[j] * cos[j] + db[j] * sin[j], db[j] * cos[j] - da[j] * sin[j]);
                sum_a[j] += a * (xa[j] * cos[j] + xb[j] * sin[j]);
                sum_b[j] += b * (xb[j] * cos[j] - xa[j] * sin[j]);
                da[j] = a * fa[j];
                db[j] = b * fb[j];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{positions, table};
    use super::super::{forward_naive, rope_backward, rope_forward_scaled};
    use super::*;
    use crate::ops::row_scale::{Output, row_scale_backward};
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, check_fast, check_gradient, inner, tolerance};

    /// Factors away from 0, where the quotients of the sums grow without bound; and 0 itself.
    fn factors(cols: usize) -> Mat {
        let mut values = Mat::random(3, 1, cols, 1.0).values();
        for x in &mut values {
            *x += x.signum() * 0.5;
        }
        values.iter_mut().skip(1).step_by(5).for_each(|x| *x = 0.0);
        Mat::new(1, cols, values)
    }

    #[test]
    fn the_scaled_backward_equals_the_naive_one_and_has_the_bits_of_the_two_ops() {
        let cases = [(1, 1, 2), (7, 9, 64), (129, 3, 16), (33, 4, 80), (12, 1, 6), (19, 2, 256), (0, 1, 64)];
        for (tokens, heads, head_dim) in cases {
            let cols = heads * head_dim;
            let [dy, x] = [1, 2].map(|seed| Mat::random(seed, tokens, cols, 1.0));
            let (scale, start) = (factors(cols), Mat::random(4, 1, cols, 1.0));
            let factor = Mat::random(5, 1, cols, 1.0);
            let (table, positions) = (table(tokens.max(1), head_dim), positions(tokens));
            let (mut dx, mut dscale) = (dy.f64(), start.f64());
            let (x64, table64) = (x.f64(), table.f64());
            let by = (factor.f64(), scale.f64());
            scaled_naive(&mut dx, &mut dscale, &x64, &table64, &positions, head_dim, &by.0, &by.1);
            let [mut once, mut unrotated, mut sums] = [&dy, &x, &start].map(Mat::clone);
            rope_backward(once.view_mut(), table.view(), &positions, head_dim).unwrap();
            rope_backward(unrotated.view_mut(), table.view(), &positions, head_dim).unwrap();
            row_scale_backward(sums.view_mut(), once.view(), Output::Kept(unrotated.view()), scale.view())
                .unwrap();
            let products = once.values().into_iter().enumerate().map(|(i, x)| x * factor.values()[i % cols]);
            once = Mat::new(tokens, cols, products.collect());
            let what = format!("rope_backward_scaled {tokens} x {heads} x {head_dim}");
            for (dx, dscale, tolerance) in [
                (&dx, &dscale, tolerance(1e-6, 2e-6 * (tokens as f64).sqrt().max(1.0))),
                (&once.f64(), &sums.f64(), tolerance(0.0, 0.0)),
            ] {
                check_fast(
                    &what,
                    [(Out::Add(&dy), dx), (Out::Add(&start), dscale)],
                    [&x, &table, &factor, &scale],
                    tolerance,
                    |[dx, dscale], [x, table, factor, scale]| {
                        rope_backward_scaled(dx, dscale, x, table, &positions, head_dim, factor, scale)
                    },
                );
            }
        }
    }

    #[test]
    fn the_scaled_rotation_is_that_of_the_products() {
        for (tokens, heads, head_dim) in [(1, 1, 2), (7, 9, 64), (33, 4, 80), (0, 1, 64)] {
            let cols = heads * head_dim;
            let (x, factor) = (Mat::random(1, tokens, cols, 1.0), Mat::random(2, 1, cols, 1.0));
            let (table, positions) = (table(tokens.max(1), head_dim), positions(tokens));
            let by = factor.f64();
            let mut y: Vec<f64> = x.f64().iter().enumerate().map(|(i, x)| x * by[i % cols]).collect();
            if tokens > 0 {
                forward_naive(&mut y, &table.f64(), &positions, head_dim);
            }
            let what = format!("rope_forward_scaled {tokens} x {heads} x {head_dim}");
            let (outputs, inputs) = ([(Out::Add(&x), &y[..])], [&table, &factor]);
            check_fast(&what, outputs, inputs, tolerance(1e-6, 1e-6), |[x], [table, factor]| {
                rope_forward_scaled(x, table, &positions, head_dim, factor)
            });
        }
    }

    #[test]
    fn the_naive_scaled_backward_is_the_derivative_by_the_factors() {
        let (tokens, head_dim, cols) = (5, 6, 12);
        let [x, dy] = [1, 2].map(|seed| Mat::random(seed, tokens, cols, 1.0).f64());
        let scale = Mat::random(3, 1, cols, 1.0).f64();
        let (table, positions) = (table(tokens, head_dim).f64(), positions(tokens));
        let forward = |scale: &[f64]| {
            let mut y: Vec<f64> = x.iter().enumerate().map(|(i, x)| scale[i % cols] * x).collect();
            forward_naive(&mut y, &table, &positions, head_dim);
            y
        };
        let (mut dx, mut dscale) = (dy.clone(), vec![0.0; cols]);
        scaled_naive(&mut dx, &mut dscale, &forward(&scale), &table, &positions, head_dim, &scale, &scale);
        check_gradient("dscale", &scale, &dscale, |scale| inner(&forward(scale), &dy));
        let forward_of = |x: &[f64]| {
            let mut y: Vec<f64> = x.iter().enumerate().map(|(i, x)| scale[i % cols] * x).collect();
            forward_naive(&mut y, &table, &positions, head_dim);
            y
        };
        check_gradient("dx", &x, &dx, |x| inner(&forward_of(x), &dy));
    }

    #[test]
    fn operands_of_the_scaled_backward_that_do_not_belong_together_are_refused() {
        let (mat, table) = (|rows, cols| Mat::random(1, rows, cols, 1.0), table(4, 8));
        let scaled = |mut dscale: Mat, x: Mat, positions: &[u32], scale: Mat| {
            let (mut dx, x, scale, factor) = (mat(2, 16), x.view(), scale.view(), mat(1, 16));
            let (dx, dscale, table, factor) = (dx.view_mut(), dscale.view_mut(), table.view(), factor.view());
            rope_backward_scaled(dx, dscale, x, table, positions, 8, factor, scale).unwrap_err().to_string()
        };
        let (one, two) = (|| mat(1, 16), || mat(2, 16));
        let cases = [
            (scaled(one(), two(), &[0, 4], one()), "position 4 is outside of 0..4"),
            (scaled(one(), two(), &[0], one()), "number of positions is 1, expected 2"),
            (scaled(one(), mat(3, 16), &[0, 1], one()), "rows of the rotated x is 3, expected 2"),
            (scaled(one(), mat(2, 8), &[0, 1], one()), "columns of the rotated x is 8, expected 16"),
            (scaled(two(), two(), &[0, 1], one()), "rows of dscale is 2, expected 1"),
            (scaled(mat(1, 8), two(), &[0, 1], one()), "columns of dscale is 8, expected 16"),
            (scaled(one(), two(), &[0, 1], two()), "rows of scale is 2, expected 1"),
            (scaled(one(), two(), &[0, 1], mat(1, 8)), "columns of scale is 8, expected 16"),
        ];
        for (found, expected) in cases {
            assert_eq!(found, format!("rope_backward_scaled: {expected}"));
        }
    }

    #[test]
    fn the_cuda_scaled_backward_equals_the_naive_one() {
        let Some(device) = cuda::device() else { return };
        let cases = [(1, 1, 2), (7, 9, 64), (600, 3, 16), (33, 4, 80), (12, 1, 6), (130, 5, 256), (0, 1, 64)];
        for (tokens, heads, head_dim) in cases {
            let cols = heads * head_dim;
            let [dy, x] = [1, 2].map(|seed| Mat::random(seed, tokens, cols, 1.0).rounded());
            let (scale, start) = (factors(cols), Mat::random(4, 1, cols, 1.0));
            let factor = Mat::random(5, 1, cols, 1.0);
            let (table, positions) = (table(tokens.max(1), head_dim), positions(tokens));
            let on_device = cuda::ids(&device, &positions);
            let (mut dx, mut dscale) = (dy.f64(), start.f64());
            let (x64, table64) = (x.f64(), table.f64());
            let by = (factor.f64(), scale.f64());
            scaled_naive(&mut dx, &mut dscale, &x64, &table64, &positions, head_dim, &by.0, &by.1);
            let what = format!("rope_backward_scaled {tokens} x {heads} x {head_dim}");
            // As for the sums of row_scale, whose terms here bring the roundings of two rotations with them.
            let close = tolerance(4e-6, 4e-6 * (tokens as f64).sqrt().max(1.0));
            let outputs = [(Out::Add(&dy), Bf16, &dx[..]), (Out::Add(&start), F32, &dscale[..])];
            let inputs = [(&x, Bf16), (&table, F32), (&factor, F32), (&scale, F32)];
            check_cuda(&device, &what, outputs, inputs, close, |[dx, dscale], [x, table, factor, scale]| {
                rope_backward_scaled(dx, dscale, x, table, on_device.ids(), head_dim, factor, scale)
            });
            let mut y = x64.clone();
            y.iter_mut().enumerate().for_each(|(i, y)| *y *= by.0[i % cols]);
            if tokens > 0 {
                forward_naive(&mut y, &table64, &positions, head_dim);
            }
            let (what, outputs) = (format!("rope_forward_scaled of {what}"), [(Out::Add(&x), Bf16, &y[..])]);
            let inputs = [(&table, F32), (&factor, F32)];
            check_cuda(&device, &what, outputs, inputs, close, |[x], [table, factor]| {
                rope_forward_scaled(x, table, on_device.ids(), head_dim, factor)
            });
        }
    }
}
