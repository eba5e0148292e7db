//! Rotary position embedding in the rotate-half convention of transformers, in place.
//!
//! Angles come from a table made once for the longest sequence, so the step loop computes no sine.

mod scaled;

use rayon::prelude::*;

pub use self::scaled::rope_backward_scaled;

use crate::cpu::by_isa;
use crate::cpu::rows::{row, rows_per_task};
use crate::cuda::{Arg, Cuda, Source, spans};
use crate::device::Device;
use crate::error::{Error, Result, check};
use crate::ids::Ids;
use crate::tensor::{Tensor, View, ViewMut};

const TABLE: &str = "rope_table";
const FORWARD_SCALED: &str = "rope_forward_scaled";
const FORWARD: &str = "rope_forward";
const BACKWARD: &str = "rope_backward";

/// How the frequencies differ from theta^(-2j/D).
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// They do not.
    None,
    /// All are divided by `factor` (position interpolation).
    Linear {
        /// How much longer the context becomes.
        factor: f32,
    },
    /// Low frequencies are divided by `factor`, high ones kept, those between interpolated (Llama 3.1).
    Llama3 {
        /// How much longer the context becomes.
        factor: f32,
        /// Fewer turns than this within the original context: a low frequency.
        low_freq_factor: f32,
        /// More turns than this within the original context: a high frequency.
        high_freq_factor: f32,
        /// The context length of pre-training.
        original_max_position_embeddings: u32,
    },
    /// Frequency j is divided by factor j (the GGUF tensor `rope_freqs.weight`, D / 2 of them).
    Factors(Vec<f32>),
}

/// The cosines and sines of all positions and frequencies.
///
/// table_pj = cos(p f_j), table_p,D/2+j = sin(p f_j), f_j = theta^(-2j/D) scaled by `scaling`, j < D/2.
///
/// Shapes: (max_positions, D).
/// Precision: frequencies and angles are rounded to f32 as transformers does, cosine and sine are exact to f32.
///
/// # Errors
/// An odd head dimension, factors that are not D / 2, or a device that refuses.
///
/// Source: Su et al., arXiv 2104.09864, section 3.4; `modeling_rope_utils` of transformers for the scalings.
pub fn rope_table(
    device: &Device,
    max_positions: usize,
    head_dim: usize,
    theta: f32,
    scaling: &RopeScaling,
) -> Result<Tensor> {
    check(TABLE, "head dimension (must be even)", head_dim & !1, head_dim)?;
    let frequencies = frequencies(head_dim, theta, scaling)?;
    // The size of the allocation is checked by `zeros`, before the host copy is made.
    let mut table = Tensor::zeros(device, max_positions, head_dim)?;
    let mut values = vec![0.0; table.len()];
    for (position, row) in values.chunks_mut(head_dim.max(1)).enumerate() {
        let (cos, sin) = row.split_at_mut(head_dim / 2);
        for ((cos, sin), frequency) in cos.iter_mut().zip(sin).zip(&frequencies) {
            let angle = (position as f32 * frequency) as f64;
            *cos = angle.cos() as f32;
            *sin = angle.sin() as f32;
        }
    }
    table.write(&values)?;
    Ok(table)
}

fn frequencies(head_dim: usize, theta: f32, scaling: &RopeScaling) -> Result<Vec<f32>> {
    let half = head_dim / 2;
    let plain = (0..half).map(|j| {
        let exponent = (2 * j) as f32 / head_dim as f32;
        (1.0 / (theta as f64).powf(exponent as f64) as f32, j)
    });
    match scaling {
        RopeScaling::None => Ok(plain.map(|(f, _)| f).collect()),
        RopeScaling::Linear { factor } => Ok(plain.map(|(f, _)| f / factor).collect()),
        RopeScaling::Factors(factors) => {
            check(TABLE, "number of frequency factors", half, factors.len())?;
            Ok(plain.map(|(f, j)| f / factors[j]).collect())
        }
        &RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let context = original_max_position_embeddings as f32;
            let scale = |f: f32| {
                let wavelength = std::f32::consts::TAU / f;
                if wavelength > context / low_freq_factor {
                    f / factor
                } else if wavelength < context / high_freq_factor {
                    f
                } else {
                    let smooth =
                        (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            };
            Ok(plain.map(|(f, _)| scale(f)).collect())
        }
    }
}

/// Rotates every head of every token by the angles of the token's position, in place.
///
/// With c, s from the table's row: (x_j, x_j+D/2) := (x_j c_j - x_j+D/2 s_j, x_j+D/2 c_j + x_j s_j), j < D/2.
///
/// Shapes: `x` (T, heads * D); `table` (P, D) from [`rope_table`]; `positions` T numbers below P.
/// Precision: f32, within 2e-7 of the pair's length.
///
/// # Errors
/// Shapes that do not belong together, a position outside of the table, or no kernel for the device.
///
/// Source: Su et al., arXiv 2104.09864, equation 34, with the halves of transformers' `rotate_half`.
pub fn rope_forward<'a>(
    x: ViewMut,
    table: View,
    positions: impl Into<Ids<'a>>,
    head_dim: usize,
) -> Result<()> {
    let positions = positions.into();
    check_operands(FORWARD, x.as_view(), table, positions, head_dim)?;
    if let Some(cuda) = x.cuda() {
        return rotate_cuda(FORWARD, &cuda, &x, table, positions, head_dim, None);
    }
    rotate_fast(FORWARD, x, table, positions.host(), head_dim, None, false)
}

/// [`rope_forward`] of an x that has a factor per column yet to come: that of DoRA's rows.
///
/// x := rope_forward(diag(factor) x).
///
/// Shapes: as [`rope_forward`]; `factor` (1, heads * D).
/// Precision: as [`rope_forward`], of products in f32.
///
/// # Errors
/// As [`rope_forward`].
///
/// Source: see [`rope_forward`].
pub fn rope_forward_scaled<'a>(
    x: ViewMut,
    table: View,
    positions: impl Into<Ids<'a>>,
    head_dim: usize,
    factor: View,
) -> Result<()> {
    let positions = positions.into();
    check_operands(FORWARD_SCALED, x.as_view(), table, positions, head_dim)?;
    check(FORWARD_SCALED, "rows of factor", 1, factor.rows)?;
    check(FORWARD_SCALED, "columns of factor", x.cols, factor.cols)?;
    if let Some(cuda) = x.cuda() {
        return rotate_cuda(FORWARD, &cuda, &x, table, positions, head_dim, Some(factor));
    }
    let factor = Some(factor.cpu(FORWARD_SCALED)?);
    rotate_fast(FORWARD_SCALED, x, table, positions.host(), head_dim, factor, false)
}

/// The gradient of [`rope_forward`]: the inverse rotation, in place. It also undoes a rotation.
///
/// (dx_j, dx_j+D/2) := (dx_j c_j + dx_j+D/2 s_j, dx_j+D/2 c_j - dx_j s_j), j < D/2.
///
/// Shapes, precision, errors and source: as [`rope_forward`].
///
/// # Errors
/// As [`rope_forward`].
pub fn rope_backward<'a>(
    dx: ViewMut,
    table: View,
    positions: impl Into<Ids<'a>>,
    head_dim: usize,
) -> Result<()> {
    let positions = positions.into();
    check_operands(BACKWARD, dx.as_view(), table, positions, head_dim)?;
    if let Some(cuda) = dx.cuda() {
        return rotate_cuda(BACKWARD, &cuda, &dx, table, positions, head_dim, None);
    }
    rotate_fast(BACKWARD, dx, table, positions.host(), head_dim, None, true)
}

fn check_operands(op: &'static str, x: View, table: View, positions: Ids, head_dim: usize) -> Result<()> {
    check(op, "head dimension (must be even)", head_dim & !1, head_dim)?;
    let whole_heads = x.cols.checked_div(head_dim).unwrap_or(0) * head_dim;
    check(op, "columns of x (whole heads)", whole_heads, x.cols)?;
    check(op, "columns of table", head_dim, table.cols)?;
    check(op, "number of positions", x.rows, positions.len())?;
    match positions.host().iter().find(|&&position| position as usize >= table.rows) {
        Some(&position) => {
            Err(Error::IndexOutOfRange { op, what: "position", index: position as usize, limit: table.rows })
        }
        None => Ok(()),
    }
}

// ----------------------------------------------------------------------------------------- CUDA

pub(crate) static SOURCE: Source = Source::new("rope.cu", include_str!("rope.cu"));

/// The kernels have the names of the ops.
fn rotate_cuda(
    op: &'static str,
    cuda: &Cuda,
    x: &ViewMut,
    table: View,
    positions: Ids,
    head_dim: usize,
    factor: Option<View>,
) -> Result<()> {
    if x.rows == 0 || x.cols == 0 {
        return Ok(());
    }
    let grid = spans::grid(op, x.rows, x.cols / 2, 1)?;
    let args = [
        Arg::Ptr(x.bf16(op)?),
        Arg::size(x.stride),
        Arg::Ptr(table.f32(op)?),
        Arg::size(table.stride),
        Arg::Ptr(positions.device(op)?),
        Arg::Ptr(factor.map_or(Ok(0), |factor| factor.f32(op))?),
        Arg::size(x.rows),
        Arg::size(x.cols / head_dim),
        Arg::size(head_dim / 2),
    ];
    cuda.launch(&SOURCE, op, grid, &args)
}

// ------------------------------------------------------------------------------------------ CPU

#[cfg(test)]
fn forward_naive(x: &mut [f64], table: &[f64], positions: &[u32], head_dim: usize) {
    rotate_naive(x, table, positions, head_dim, 1.0);
}

#[cfg(test)]
fn backward_naive(dx: &mut [f64], table: &[f64], positions: &[u32], head_dim: usize) {
    rotate_naive(dx, table, positions, head_dim, -1.0);
}

#[cfg(test)]
fn rotate_naive(x: &mut [f64], table: &[f64], positions: &[u32], head_dim: usize, direction: f64) {
    let half = head_dim / 2;
    let cols = x.len() / positions.len();
    for (t, &position) in positions.iter().enumerate() {
        for head in 0..cols / head_dim {
            for j in 0..half {
                let (a, b) = (t * cols + head * head_dim + j, t * cols + head * head_dim + half + j);
                let cos = table[position as usize * head_dim + j];
                let sin = table[position as usize * head_dim + half + j] * direction;
                (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin);
            }
        }
    }
}

fn rotate_fast(
    op: &'static str,
    x: ViewMut,
    table: View,
    positions: &[u32],
    head_dim: usize,
    factor: Option<&[f32]>,
    inverse: bool,
) -> Result<()> {
    let (cols, x_stride, table_stride) = (x.cols, x.stride, table.stride);
    let (x, table) = (x.cpu(op)?, table.cpu(op)?);
    if cols == 0 {
        return Ok(());
    }
    x.par_chunks_mut(x_stride).zip(positions).with_min_len(rows_per_task(cols)).for_each(|(x, &position)| {
        let (cos, sin) = row(table, position as usize, head_dim, table_stride).split_at(head_dim / 2);
        if let Some(factor) = factor {
            multiply_row(&mut x[..cols], factor);
        }
        rotate_row(&mut x[..cols], cos, sin, inverse);
    });
    Ok(())
}

by_isa! {
    fn multiply_row(x: &mut [f32], factor: &[f32]) {
        x.iter_mut().zip(factor).for_each(|(x, factor)| *x *= factor);
    }
}

by_isa! {
    fn rotate_row(x: &mut [f32], cos: &[f32], sin: &[f32], inverse: bool) {
        let direction = if inverse { -1.0 } else { 1.0 };
        for head in x.chunks_exact_mut(2 * cos.len()) {
            let (a, b) = head.split_at_mut(cos.len());
            for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let sin = sin * direction;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype::{Bf16, F32};
    use crate::testing::cuda::{self, check_cuda};
    use crate::testing::{Mat, Out, assert_close, check_fast, check_gradient, golden, inner, tolerance};

    pub(super) fn table(positions: usize, head_dim: usize) -> Mat {
        let table = rope_table(&Device::Cpu, positions, head_dim, 1e4, &RopeScaling::None).unwrap();
        Mat::new(positions, head_dim, table.read().unwrap())
    }

    /// Positions of two sequences laid end to end.
    pub(super) fn positions(tokens: usize) -> Vec<u32> {
        (0..tokens).map(|t| (if t < tokens / 3 { t } else { t - tokens / 3 }) as u32).collect()
    }

    #[test]
    fn the_fast_rotations_equal_the_naive_ones() {
        for (tokens, heads, head_dim) in [(1, 1, 2), (7, 9, 64), (129, 3, 16), (33, 4, 80), (12, 1, 6)] {
            let x = Mat::random(1, tokens, heads * head_dim, 1.0);
            let (table, positions) = (table(tokens, head_dim), positions(tokens));
            let (mut y, mut dx) = (x.f64(), x.f64());
            forward_naive(&mut y, &table.f64(), &positions, head_dim);
            backward_naive(&mut dx, &table.f64(), &positions, head_dim);
            let what = format!("rope {tokens} x {heads} x {head_dim}");
            check_fast(&what, [(Out::Add(&x), &y)], [&table], tolerance(1e-6, 1e-6), |[x], [table]| {
                rope_forward(x, table, &positions, head_dim)
            });
            check_fast(&what, [(Out::Add(&x), &dx)], [&table], tolerance(1e-6, 1e-6), |[x], [table]| {
                rope_backward(x, table, &positions, head_dim)
            });
        }
    }

    #[test]
    fn the_naive_backward_is_the_derivative_of_the_naive_forward() {
        let (tokens, head_dim) = (5, 6);
        let [x, dy] = [1, 2].map(|seed| Mat::random(seed, tokens, 2 * head_dim, 1.0).f64());
        let (table, positions) = (table(tokens, head_dim).f64(), positions(tokens));
        let mut dx = dy.clone();
        backward_naive(&mut dx, &table, &positions, head_dim);
        check_gradient("rope", &x, &dx, |x| {
            let mut y = x.to_vec();
            forward_naive(&mut y, &table, &positions, head_dim);
            inner(&y, &dy)
        });
    }

    #[test]
    fn the_backward_undoes_the_forward() {
        let x = Mat::random(1, 17, 3 * 16, 1.0);
        let (table, positions) = (table(17, 16), positions(17));
        let mut y = x.clone();
        rope_forward(y.view_mut(), table.view(), &positions, 16).unwrap();
        rope_backward(y.view_mut(), table.view(), &positions, 16).unwrap();
        assert_close("unrotated", &y.values(), &x.values(), tolerance(1e-6, 1e-6));
    }

    #[test]
    fn tables_and_rotations_equal_transformers() {
        let golden = golden("rope");
        let llama3 = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 128,
        };
        let kinds = [
            ("none", RopeScaling::None, 1e5),
            ("linear", RopeScaling::Linear { factor: 4.0 }, 1e4),
            ("llama3", llama3, 5e5),
        ];
        for (name, scaling, theta) in kinds {
            let expected = golden.mat(&format!("table.{name}"));
            let table = rope_table(&Device::Cpu, expected.rows, expected.cols, theta, &scaling).unwrap();
            // Frequencies may differ in the last bit (6e-8), which the last position multiplies.
            let angle = 1.2e-7 * expected.rows as f64;
            assert_close(name, &table.read().unwrap(), &expected.values(), tolerance(0.0, angle));
        }
        let mut x = golden.mat("x");
        let positions = golden.indices("positions");
        rope_forward(x.view_mut(), golden.mat("table.none").view(), &positions, 32).unwrap();
        assert_close("y", &x.values(), &golden.mat("y").values(), tolerance(1e-6, 1e-6));
    }

    #[test]
    fn factors_divide_their_frequency() {
        let factors = RopeScaling::Factors(vec![1.0, 2.0, 4.0]);
        let plain = frequencies(6, 1e4, &RopeScaling::None).unwrap();
        let scaled = frequencies(6, 1e4, &factors).unwrap();
        assert_eq!(scaled, [plain[0], plain[1] / 2.0, plain[2] / 4.0]);
        let error = rope_table(&Device::Cpu, 4, 8, 1e4, &factors).unwrap_err().to_string();
        assert_eq!(error, "rope_table: number of frequency factors is 3, expected 4");
    }

    #[test]
    fn operands_that_do_not_belong_together_are_refused() {
        let table = table(4, 8);
        let forward = |cols: usize, positions: &[u32], head_dim| {
            let mut x = Mat::random(1, 2, cols, 1.0);
            rope_forward(x.view_mut(), table.view(), positions, head_dim).unwrap_err().to_string()
        };
        assert_eq!(forward(16, &[0, 4], 8), "rope_forward: position 4 is outside of 0..4");
        assert_eq!(forward(16, &[0], 8), "rope_forward: number of positions is 1, expected 2");
        assert_eq!(forward(12, &[0, 1], 8), "rope_forward: columns of x (whole heads) is 12, expected 8");
        assert_eq!(forward(16, &[0, 1], 4), "rope_forward: columns of table is 8, expected 4");
        assert!(forward(16, &[0, 1], 7).contains("head dimension (must be even) is 7"));
        assert!(forward(16, &[0, 1], 0).contains("columns of x (whole heads) is 16, expected 0"));
        let error = rope_table(&Device::Cpu, 4, 7, 1e4, &RopeScaling::None).unwrap_err().to_string();
        assert!(error.contains("head dimension (must be even) is 7"), "{error}");
    }

    #[test]
    fn the_cuda_rotations_equal_the_naive_ones() {
        let Some(device) = cuda::device() else { return };
        let cases = [(1, 1, 2), (7, 9, 64), (129, 3, 16), (33, 4, 80), (12, 1, 6), (3, 2, 256), (0, 1, 64)];
        for (tokens, heads, head_dim) in cases {
            let x = Mat::random(1, tokens, heads * head_dim, 1.0).rounded();
            let (table, positions) = (table(tokens, head_dim), positions(tokens));
            let on_device = cuda::ids(&device, &positions);
            let (mut y, mut dx) = (x.f64(), x.f64());
            if tokens > 0 {
                forward_naive(&mut y, &table.f64(), &positions, head_dim);
                backward_naive(&mut dx, &table.f64(), &positions, head_dim);
            }
            let (what, exact) = (format!("rope {tokens} x {heads} x {head_dim}"), tolerance(0.0, 0.0));
            let inputs = [(&table, F32)];
            check_cuda(&device, &what, [(Out::Add(&x), Bf16, &y)], inputs, exact, |[x], [table]| {
                rope_forward(x, table, on_device.ids(), head_dim)
            });
            check_cuda(&device, &what, [(Out::Add(&x), Bf16, &dx)], inputs, exact, |[x], [table]| {
                rope_backward(x, table, on_device.ids(), head_dim)
            });
        }
    }
}
