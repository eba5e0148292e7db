//! Inverted dropout whose mask is a function of a key and the element's index.
//!
//! Nothing is stored: the backward pass makes the same mask again.

use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::rows::{pieces, rows_per_task};
use crate::cuda::{Arg, Cuda, Source, spans};
use crate::error::{Result, check};
use crate::rng::RngKey;
use crate::tensor::{View, ViewMut};

const FORWARD: &str = "dropout_forward";
const BACKWARD: &str = "dropout_backward";

/// Drops elements with probability `p` and scales up the others.
///
/// y_i = x_i mask_i / (1 - p), mask_i = [word_i >= 2^32 p] with the random word i of `key`, i = row * C + column. With
/// p = 0 nothing is dropped, with p = 1 everything.
///
/// Shapes: both (T, C).
/// Accumulates: nothing, `y` is overwritten.
/// Precision: one rounding in f32; p in units of 2^-32.
///
/// # Errors
/// Shapes that differ, or no kernel for the device.
///
/// Source: Srivastava et al., JMLR 15 (2014), section 4, scaled as `torch.nn.Dropout`.
pub fn dropout_forward(y: ViewMut, x: View, p: f32, key: RngKey) -> Result<()> {
    check(FORWARD, "rows of y", x.rows, y.rows)?;
    check(FORWARD, "columns of y", x.cols, y.cols)?;
    if let Some(cuda) = y.cuda() {
        return masked_cuda(FORWARD, &cuda, &y, x, Mask::new(p, key));
    }
    masked_fast(FORWARD, y, x, Mask::new(p, key), forward_block)
}

/// The gradient of [`dropout_forward`] with the same `p` and `key`.
///
/// dx_i += dy_i mask_i / (1 - p).
///
/// Shapes: both (T, C).
/// Accumulates: `dx` is added to.
/// Precision, errors and source: as [`dropout_forward`].
///
/// # Errors
/// As [`dropout_forward`].
pub fn dropout_backward(dx: ViewMut, dy: View, p: f32, key: RngKey) -> Result<()> {
    check(BACKWARD, "rows of dx", dy.rows, dx.rows)?;
    check(BACKWARD, "columns of dx", dy.cols, dx.cols)?;
    if let Some(cuda) = dx.cuda() {
        return masked_cuda(BACKWARD, &cuda, &dx, dy, Mask::new(p, key));
    }
    masked_fast(BACKWARD, dx, dy, Mask::new(p, key), backward_block)
}

/// Which elements stay, and what they are multiplied by.
#[derive(Debug, Clone, Copy)]
struct Mask {
    key: RngKey,
    /// Words below it are dropped; u64 so that 2^32 drops all.
    threshold: u64,
    scale: f32,
}

impl Mask {
    fn new(p: f32, key: RngKey) -> Mask {
        let threshold = (p as f64 * (1_u64 << 32) as f64).round() as u64;
        // Everything is dropped at p = 1; 1 / (1 - p) would make NaN of the zeros.
        let scale = if p >= 1.0 { 0.0 } else { 1.0 / (1.0 - p) };
        Mask { key, threshold, scale }
    }

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "called in the bodies that are compiled per instruction set")]
    fn factor(self, word: u32) -> f32 {
        if (word as u64) < self.threshold { 0.0 } else { self.scale }
    }
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new(
    "dropout.cu",
    concat!(
        "#line 1 \"philox.cuh\"\n",
        include_str!("../cuda/philox.cuh"),
        "\n#line 1 \"dropout.cu\"\n",
        include_str!("dropout.cu"),
    ),
);

/// The kernels have the names of the ops.
fn masked_cuda(op: &'static str, cuda: &Cuda, y: &ViewMut, x: View, mask: Mask) -> Result<()> {
    let (rows, cols, [y_stride, x_stride]) = spans::flat(x.rows, x.cols, [y.stride, x.stride]);
    let grid = spans::grid(op, rows, cols, 1)?;
    let args = [
        Arg::Ptr(y.bf16(op)?),
        Arg::size(y_stride),
        Arg::Ptr(x.bf16(op)?),
        Arg::size(x_stride),
        Arg::size(rows),
        Arg::size(cols),
        Arg::U64(mask.key.seed),
        Arg::U64(mask.key.stream),
        // 2^32 drops the largest word, too: the scale is 0 then.
        Arg::U32(u32::try_from(mask.threshold).unwrap_or(u32::MAX)),
        Arg::F32(mask.scale),
    ];
    cuda.launch(&SOURCE, op, grid, &args)
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn forward_naive(y: &mut [f64], x: &[f64], p: f64, key: RngKey) {
    for i in 0..x.len() {
        let keep = key.word(i as u64) as f64 >= p * 2_f64.powi(32);
        y[i] = if keep { x[i] / (1.0 - p) } else { 0.0 };
    }
}

#[cfg(test)]
fn backward_naive(dx: &mut [f64], dy: &[f64], p: f64, key: RngKey) {
    for i in 0..dx.len() {
        // y = x mask / (1 - p)
        let keep = key.word(i as u64) as f64 >= p * 2_f64.powi(32);
        dx[i] += if keep { dy[i] / (1.0 - p) } else { 0.0 };
    }
}

fn masked_fast(
    op: &'static str,
    y: ViewMut,
    x: View,
    mask: Mask,
    block: fn(&mut [f32], &[f32], Mask, u64),
) -> Result<()> {
    let (cols, strides) = (x.cols, [y.stride, x.stride]);
    let (y, x) = (y.cpu(op)?, x.cpu(op)?);
    if cols == 0 {
        return Ok(());
    }
    let walk = pieces(cols, strides);
    let [y_stride, x_stride] = walk.strides;
    y.par_chunks_mut(y_stride).enumerate().with_min_len(rows_per_task(walk.cols)).for_each(|(i, y)| {
        let n = y.len().min(walk.cols);
        block(&mut y[..n], &x[i * x_stride..][..n], mask, (i * walk.cols) as u64);
    });
    Ok(())
}

by_isa! {
    fn forward_block(y: &mut [f32], x: &[f32], mask: Mask, first: u64) {
        for_each_factor(y.len(), mask, first, |i, factor| y[i] = x[i] * factor);
    }
}

by_isa! {
    fn backward_block(dx: &mut [f32], dy: &[f32], mask: Mask, first: u64) {
        for_each_factor(dx.len(), mask, first, |i, factor| dx[i] += dy[i] * factor);
    }
}

/// Random blocks that are made together: eight of the same word side by side fill a vector.
const TOGETHER: usize = 8;

/// Calls `visit(i, factor of element first + i)` for `n` elements.
#[inline(always)]
#[expect(clippy::inline_always, reason = "called in the bodies that are compiled per instruction set")]
fn for_each_factor(n: usize, mask: Mask, first: u64, mut visit: impl FnMut(usize, f32)) {
    let skipped = (first % 4) as usize;
    let mut next = 0;
    let mut block = first / 4;
    let mut offset = skipped;
    while next < n {
        let mut factors = [0.0; 4 * TOGETHER];
        for i in 0..TOGETHER {
            let words = mask.key.block(block + i as u64);
            for lane in 0..4 {
                factors[4 * i + lane] = mask.factor(words[lane]);
            }
        }
        let count = (4 * TOGETHER - offset).min(n - next);
        for (i, &factor) in factors[offset..offset + count].iter().enumerate() {
            visit(next + i, factor);
        }
        next += count;
        block += TOGETHER as u64;
        offset = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::Bf16;
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, check_fast, check_gradient, inner, seconds, tolerance};

    const KEY: RngKey = RngKey { seed: 11, stream: 5 };

    #[test]
    fn the_fast_versions_equal_the_naive_ones() {
        for (rows, cols) in [(1, 1), (1, 127), (7, 129), (129, 7), (33, 576), (3, 8193), (0, 8)] {
            for p in [0.0, 0.25, 0.1] {
                let [x, start] = [1, 2].map(|seed| Mat::random(seed, rows, cols, 1.0));
                let (mut y, mut dx) = (vec![0.0; rows * cols], start.f64());
                forward_naive(&mut y, &x.f64(), p as f64, KEY);
                backward_naive(&mut dx, &x.f64(), p as f64, KEY);
                let what = format!("dropout {rows} x {cols} of {p}");
                check_fast(&what, [(Out::Set(rows, cols), &y)], [&x], tolerance(3e-7, 0.0), |[y], [x]| {
                    dropout_forward(y, x, p, KEY)
                });
                // Terms up to 4, which may cancel.
                let close = tolerance(3e-7, 1e-6);
                check_fast(&what, [(Out::Add(&start), &dx)], [&x], close, |[dx], [dy]| {
                    dropout_backward(dx, dy, p, KEY)
                });
            }
        }
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let [x, dy] = [1, 2].map(|seed| Mat::random(seed, 1, 40, 1.0).f64());
        let mut dx = vec![0.0; 40];
        backward_naive(&mut dx, &dy, 0.3, KEY);
        check_gradient("dropout", &x, &dx, |x| {
            let mut y = vec![0.0; 40];
            forward_naive(&mut y, x, 0.3, KEY);
            inner(&y, &dy)
        });
    }

    #[test]
    fn the_share_of_dropped_elements_is_p_and_the_mean_is_kept() {
        let n = 100_000;
        let ones = Mat::new(1, n, vec![1.0; n]);
        let mut y = Mat::poisoned(1, n);
        dropout_forward(y.view_mut(), ones.view(), 0.2, KEY).unwrap();
        let dropped = y.values().iter().filter(|&&y| y == 0.0).count();
        // Binomial with deviation 126: five deviations.
        assert!(dropped.abs_diff(20_000) < 632, "{dropped}");
        assert!(y.values().iter().all(|&y| y == 0.0 || y == 1.25));
    }

    #[test]
    fn everything_is_dropped_with_probability_one() {
        let x = Mat::random(1, 2, 9, 1.0);
        let mut y = Mat::poisoned(2, 9);
        dropout_forward(y.view_mut(), x.view(), 1.0, KEY).unwrap();
        assert!(y.values().iter().all(|&y| y == 0.0));
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let mat = |rows, cols| Mat::random(1, rows, cols, 1.0);
        let error = dropout_forward(mat(2, 3).view_mut(), mat(2, 4).view(), 0.1, KEY).unwrap_err();
        assert_eq!(error.to_string(), "dropout_forward: columns of y is 3, expected 4");
        let error = dropout_backward(mat(1, 4).view_mut(), mat(2, 4).view(), 0.1, KEY).unwrap_err();
        assert_eq!(error.to_string(), "dropout_backward: rows of dx is 1, expected 2");
    }

    #[test]
    #[ignore = "prints a timing"]
    fn timing() {
        let x = Mat::random(1, 2048, 576, 1.0);
        let mut y = Mat::poisoned(2048, 576);
        let time = seconds(|| dropout_forward(y.view_mut(), x.view(), 0.1, KEY).unwrap());
        println!("dropout: {:.2} Gelem/s", (2048 * 576) as f64 / time / 1e9);
    }

    #[test]
    fn the_cuda_twins_drop_the_same_elements() {
        let Some(device) = cuda::device() else { return };
        for (rows, cols) in cuda::SHAPES {
            for p in [0.0, 0.25, 0.1] {
                let [x, start] = [1, 2].map(|seed| Mat::random(seed, rows, cols, 1.0).rounded());
                let (mut y, mut dx) = (vec![0.0; rows * cols], start.f64());
                forward_naive(&mut y, &x.f64(), p as f64, KEY);
                backward_naive(&mut dx, &x.f64(), p as f64, KEY);
                let (what, exact) = (format!("dropout {rows} x {cols} of {p}"), tolerance(0.0, 0.0));
                let outputs = [(Out::Set(rows, cols), Bf16, &y[..])];
                check_cuda(&device, &what, outputs, [(&x, Bf16)], exact, |[y], [x]| {
                    dropout_forward(y, x, p, KEY)
                });
                let outputs = [(Out::Add(&start), Bf16, &dx[..])];
                check_cuda(&device, &what, outputs, [(&x, Bf16)], exact, |[dx], [dy]| {
                    dropout_backward(dx, dy, p, KEY)
                });
            }
        }
    }
}
