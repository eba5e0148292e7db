//! Copies between matrices, with a change of type where source and destination differ, and fills.
//!
//! No backward: these move data, nothing is differentiated through them.

use crate::cuda::{Arg, Cuda, Source, spans};
use crate::error::{Result, check};
use crate::tensor::{View, ViewMut};

const COPY: &str = "convert";
const FILL: &str = "fill";

/// Copies a matrix into one of another type or other gaps.
///
/// y = x.
///
/// Shapes: both alike, each f32 or bf16 on CUDA.
/// Accumulates: nothing, `y` is overwritten.
/// Precision: exact, or rounded to nearest (ties to even) where `y` is bf16 and `x` is not.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: the definition.
pub fn convert(y: ViewMut, x: View) -> Result<()> {
    check(COPY, "rows of y", x.rows, y.rows)?;
    check(COPY, "columns of y", x.cols, y.cols)?;
    if let Some(cuda) = y.cuda() {
        return convert_cuda(&cuda, &y, x);
    }
    let (cols, y_stride, x_stride) = (x.cols, y.stride.max(1), x.stride.max(1));
    let (y, x) = (y.cpu(COPY)?, x.cpu(COPY)?);
    for (y, x) in y.chunks_mut(y_stride).zip(x.chunks(x_stride)) {
        y[..cols].copy_from_slice(&x[..cols]);
    }
    Ok(())
}

/// Sets every element.
///
/// y = value.
///
/// Shapes: any.
/// Accumulates: nothing, `y` is overwritten.
/// Precision: rounded to the type of `y`.
///
/// # Errors
/// No kernel for the device.
///
/// Source: the definition.
pub fn fill(y: ViewMut, value: f32) -> Result<()> {
    if let Some(cuda) = y.cuda() {
        return fill_cuda(&cuda, &y, value);
    }
    let (cols, stride) = (y.cols, y.stride.max(1));
    y.cpu(FILL)?.chunks_mut(stride).for_each(|row| row[..cols].fill(value));
    Ok(())
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("convert.cu", include_str!("convert.cu"));

fn convert_cuda(cuda: &Cuda, y: &ViewMut, x: View) -> Result<()> {
    let kernel = match (y.bf16(COPY).is_ok(), x.bf16(COPY).is_ok()) {
        (true, true) => "convert_bf16",
        (true, false) => "convert_f32_to_bf16",
        (false, true) => "convert_bf16_to_f32",
        (false, false) => "convert_f32",
    };
    let (rows, cols, [y_stride, x_stride]) = spans::flat(x.rows, x.cols, [y.stride, x.stride]);
    let grid = spans::grid(COPY, rows, cols, 2)?;
    let args = [
        Arg::Ptr(y.bf16(COPY).or_else(|_| y.f32(COPY))?),
        Arg::size(y_stride),
        Arg::Ptr(x.bf16(COPY).or_else(|_| x.f32(COPY))?),
        Arg::size(x_stride),
        Arg::size(rows),
        Arg::size(cols),
    ];
    cuda.launch(&SOURCE, kernel, grid, &args)
}

fn fill_cuda(cuda: &Cuda, y: &ViewMut, value: f32) -> Result<()> {
    let (kernel, ptr) = match y.bf16(FILL) {
        Ok(ptr) => ("convert_fill_bf16", ptr),
        Err(_) => ("convert_fill_f32", y.f32(FILL)?),
    };
    let (rows, cols, [stride]) = spans::flat(y.rows, y.cols, [y.stride]);
    let grid = spans::grid(FILL, rows, cols, 2)?;
    let args = [Arg::Ptr(ptr), Arg::size(stride), Arg::F32(value), Arg::size(rows), Arg::size(cols)];
    cuda.launch(&SOURCE, kernel, grid, &args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, check_fast, tolerance};

    #[test]
    fn copies_and_fills_leave_gaps_alone() {
        for (rows, cols) in [(1, 1), (7, 129), (129, 7), (0, 8)] {
            let x = Mat::random(1, rows, cols, 1.0);
            let exact = tolerance(0.0, 0.0);
            check_fast("convert", [(Out::Set(rows, cols), &x.f64())], [&x], exact, |[y], [x]| convert(y, x));
            let filled = vec![2.5; rows * cols];
            check_fast("fill", [(Out::Set(rows, cols), &filled)], [], exact, |[y], []| fill(y, 2.5));
        }
    }

    #[test]
    fn shapes_that_differ_are_refused() {
        let (mut y, x) = (Mat::poisoned(2, 3), Mat::random(1, 2, 4, 1.0));
        let error = convert(y.view_mut(), x.view()).unwrap_err().to_string();
        assert_eq!(error, "convert: columns of y is 3, expected 4");
    }

    #[test]
    fn the_cuda_twins_convert_and_fill_exactly() {
        let Some(device) = cuda::device() else { return };
        let exact = tolerance(0.0, 0.0);
        for (rows, cols) in cuda::SHAPES {
            for (to, from) in [(F32, F32), (F32, Bf16), (Bf16, F32), (Bf16, Bf16)] {
                let x = Mat::random(1, rows, cols, 1.0);
                let x = if from == Bf16 { x.rounded() } else { x };
                let what = format!("convert {rows} x {cols} from {from:?} to {to:?}");
                let (y, filled) = (x.f64(), vec![2.5; rows * cols]);
                let outputs = [(Out::Set(rows, cols), to, &y[..])];
                check_cuda(&device, &what, outputs, [(&x, from)], exact, |[y], [x]| convert(y, x));
                let outputs = [(Out::Set(rows, cols), to, &filled[..])];
                check_cuda(&device, &what, outputs, [], exact, |[y], []| fill(y, 2.5));
            }
        }
    }
}
