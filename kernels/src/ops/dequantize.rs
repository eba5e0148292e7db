//! Packed rows as plain numbers: what a matrix product on a device reads, and what an SVD starts from.
//!
//! On the CPU the linear layer dequantizes tiles into its own buffers; this op writes whole rows to memory. On CUDA
//! that memory is the operand of a matrix product, so the row scale of DoRA and the columns of the adapter, which would
//! each cost a pass of their own over the activations, are written with the rows.
//!
//! The kernels are in `dequantize/`: a frame that all types share and a decoder for each type. A new type is a
//! decoder there, its row of the table in `weight/device/planes.rs` and its row in `kernels`.

use std::ops::Range;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::safetensors::Dtype as Element;
use rayon::prelude::*;

use crate::cuda::{Arg, Cuda, Grid, Source};
use crate::error::{Error, Result, check};
use crate::ids::Ids;
use crate::ops::row_norm::packed::{RowNorms, row_norms};
use crate::tensor::{Dtype, View, ViewMut};
use crate::weight::device::{DeviceWeight, GROUP};
use crate::weight::{BaseWeight, WeightType};

/// A packed weight where it is.
#[derive(Debug, Clone, Copy)]
pub enum Packed<'a> {
    /// In host memory.
    Host(&'a BaseWeight),
    /// On a CUDA device.
    Device(&'a DeviceWeight),
}

impl<'a> From<&'a BaseWeight> for Packed<'a> {
    /// Where its kernels read it: on the device, if it is there.
    fn from(weight: &'a BaseWeight) -> Packed<'a> {
        weight.device().map_or(Packed::Host(weight), Packed::Device)
    }
}

impl<'a> From<&'a DeviceWeight> for Packed<'a> {
    fn from(weight: &'a DeviceWeight) -> Packed<'a> {
        Packed::Device(weight)
    }
}

impl Packed<'_> {
    fn shape(&self) -> (usize, usize) {
        match self {
            Packed::Host(weight) => (weight.rows(), weight.cols()),
            Packed::Device(weight) => (weight.rows(), weight.cols()),
        }
    }
}

/// Columns of an adapter behind those of the weight.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// (N, R), of the type of the destination's device: bf16 on CUDA.
    pub b: View<'a>,
    /// How many columns of zeros come between the weight and b.
    pub offset: usize,
}

/// Some rows of a packed weight, scaled, with adapter columns behind them.
///
/// `out_i = [g_n · (factor · w_n) | 0 | b_n | 0]` with n = rows.start + i.
///
/// - `Shapes`: out (rows, K + P) with any P; weight (N, K); row_scale (1, N); b (N, R) with offset + R <= P.
/// - `Accumulates`: `out =`, all K + P columns.
/// - `Precision`: each product is rounded to f32, then the element once to the type of out: the bits of the CPU codec,
///   rounded to nearest even where out is bf16.
/// - `Errors`: shapes that do not belong together; operands on different devices.
/// - `Source`: the formats' own descriptions; row scale and columns folded into the operand: DoRA (arXiv 2402.09353)
///   equation 5, `diag(g) (W + B A) x = [diag(g) W | diag(g) B] [x; A x]`.
pub fn dequantize_rows<'a>(
    out: ViewMut<'_>,
    weight: impl Into<Packed<'a>>,
    rows: Range<usize>,
    row_scale: Option<View<'_>>,
    columns: Option<Columns<'_>>,
) -> Result<()> {
    rows_of("dequantize_rows", out, weight.into(), rows, row_scale, columns, None)
}

/// [`dequantize_rows`] with the rows of an adapter's other factor below them.
///
/// `out_i = [g_n · (factor · w_n) | 0 | b_n | 0]`, and below them `[a_r | .]`, of which only the K columns are written.
///
/// - `Shapes`: out (rows + R, K + P); below (R, K), of the type of out on CUDA; the others as [`dequantize_rows`].
/// - `Accumulates`: `out =`.
/// - `Precision`: as [`dequantize_rows`].
/// - `Errors`: as [`dequantize_rows`].
/// - `Source`: see [`dequantize_rows`]; `dy diag(g) W + dh A = [dy dh] [diag(g) W; A]`.
pub fn dequantize_rows_above<'a>(
    out: ViewMut<'_>,
    weight: impl Into<Packed<'a>>,
    rows: Range<usize>,
    row_scale: Option<View<'_>>,
    columns: Option<Columns<'_>>,
    below: View<'_>,
) -> Result<()> {
    rows_of("dequantize_rows_above", out, weight.into(), rows, row_scale, columns, Some(below))
}

fn rows_of(
    op: &'static str,
    out: ViewMut<'_>,
    weight: Packed<'_>,
    rows: Range<usize>,
    row_scale: Option<View<'_>>,
    columns: Option<Columns<'_>>,
    below: Option<View<'_>>,
) -> Result<()> {
    let (n, k) = weight.shape();
    if rows.start > rows.end || rows.end > n {
        let index = rows.start.max(rows.end);
        return Err(Error::IndexOutOfRange { op, what: "end of rows", index, limit: n + 1 });
    }
    check(op, "rows of out", rows.len() + below.map_or(0, |below| below.rows), out.rows)?;
    if let Some(below) = below {
        check(op, "columns of below", k, below.cols)?;
    }
    if out.cols < k {
        check(op, "columns of out", k, out.cols)?;
    }
    if let Some(row_scale) = &row_scale {
        check(op, "rows of row_scale", 1, row_scale.rows)?;
        check(op, "columns of row_scale", n, row_scale.cols)?;
    }
    if let Some(Columns { b, offset }) = &columns {
        check(op, "rows of b", n, b.rows)?;
        let end = offset.saturating_add(b.cols);
        if end > out.cols - k {
            let (what, limit) = ("end of b behind the weight", out.cols - k + 1);
            return Err(Error::IndexOutOfRange { op, what, index: end, limit });
        }
    }
    match weight {
        Packed::Host(weight) => rows_cpu(op, out, weight, rows, row_scale, columns, below),
        Packed::Device(weight) => rows_cuda(op, &out, weight, rows, row_scale, columns, below),
    }
}

/// `out_n = Σ_k (factor · w_nk)²`, the squared length of every row; constant, so the caller keeps it.
///
/// - `Shapes`: out (1, N), weight (N, K).
/// - `Accumulates`: `out =`.
/// - `Precision`: in host memory see [`BaseWeight::row_norms_squared`]; on CUDA f32, summed in an order that is always the
///   same: eight elements, the groups of a thread, its warp, its block; within 1e-6 of f64.
/// - `Errors`: another shape of out; operands on different devices.
pub fn row_norms_squared<'a>(out: ViewMut<'_>, weight: impl Into<Packed<'a>>) -> Result<()> {
    const OP: &str = "row_norms_squared";
    let weight = match weight.into() {
        Packed::Host(weight) => return weight.row_norms_squared(out),
        Packed::Device(weight) => weight,
    };
    check(OP, "rows of out", 1, out.rows)?;
    check(OP, "columns of out", weight.rows(), out.cols)?;
    same_device(OP, weight, &out.as_view())?;
    let mut args = vec![Arg::Ptr(out.f32(OP)?)];
    args.extend(packed_args(weight));
    args.extend([Arg::size(weight.rows()), Arg::F32(weight.factor())]);
    let Kernels { source, norms, .. } = kernels(weight);
    let blocks = weight.rows().min(weight.cuda().sms() * BLOCKS_PER_SM);
    weight.cuda().launch(source, norms, Grid::of(blocks, THREADS), &args)
}

/// The rows `ids` of a table on a device, for [`embedding_forward`](super::embedding::embedding_forward).
pub(super) fn rows_by_id(
    op: &'static str,
    out: &ViewMut<'_>,
    table: &DeviceWeight,
    ids: Ids<'_>,
) -> Result<()> {
    same_device(op, table, &out.as_view())?;
    let mut args = vec![Arg::Ptr(out.bf16(op)?), Arg::I64(out.stride as i64)];
    args.extend(packed_args(table));
    args.extend([Arg::Ptr(ids.device(op)?), Arg::size(ids.len()), Arg::F32(table.factor())]);
    let Kernels { source, embedding, .. } = kernels(table);
    table.cuda().launch(source, embedding, Grid::of(ids.len().min(1 << 16), THREADS), &args)
}

// ---------------------------------------------------------------------------------------------- CPU

fn rows_cpu(
    op: &'static str,
    out: ViewMut<'_>,
    weight: &BaseWeight,
    rows: Range<usize>,
    row_scale: Option<View<'_>>,
    columns: Option<Columns<'_>>,
    below: Option<View<'_>>,
) -> Result<()> {
    let (k, cols, stride) = (weight.cols(), out.cols, out.stride.max(1));
    let g = row_scale.map(|g| g.cpu(op)).transpose()?;
    let columns = match columns {
        Some(Columns { b, offset }) => Some((b.cpu(op)?, b.stride, k + offset..k + offset + b.cols)),
        None => None,
    };
    let out = out.cpu(op)?;
    let (out, rest) = out.split_at_mut((rows.len() * stride).min(out.len()));
    if let Some(below) = below {
        let a = below.cpu(op)?;
        for (out, a) in rest.chunks_mut(stride).zip(a.chunks(below.stride.max(1))) {
            out[..k].copy_from_slice(&a[..k]);
        }
    }
    out.par_chunks_mut(stride).zip(rows).for_each(|(out, n)| {
        let (values, padding) = out[..cols].split_at_mut(k);
        weight.dequantize_rows(n..n + 1, values);
        if let Some(g) = g {
            for x in values {
                *x *= g[n];
            }
        }
        padding.fill(0.0);
        if let Some((b, stride, at)) = &columns {
            out[at.clone()].copy_from_slice(&b[n * stride..][..at.len()]);
        }
    });
    Ok(())
}

// --------------------------------------------------------------------------------------------- CUDA

/// Threads of a block, as `frame.cuh` has it.
const THREADS: usize = 256;

/// Groups that a thread decodes at a time, for most types.
const GROUPS_PER_THREAD: usize = 4;

/// Blocks that are started for a multiprocessor at most; they go on until all is done.
const BLOCKS_PER_SM: usize = 32;

macro_rules! source {
    ($name:ident, $file:literal) => {
        #[doc = concat!("The decoders of `", $file, "` in the frame.")]
        pub static $name: Source = Source::new(
            $file,
            concat!(
                "#line 1 \"frame.cuh\"\n",
                include_str!("dequantize/frame.cuh"),
                "\n#line 1 \"",
                $file,
                "\"\n",
                include_str!(concat!("dequantize/", $file))
            ),
        );
    };
}
source!(DENSE, "dequantize_dense.cu");
source!(BLOCKS, "dequantize_blocks.cu");
source!(CODE_BOOKS, "dequantize_code_books.cu");
source!(FOUR_BIT, "dequantize_four_bit.cu");

/// The kernels of a type: to bf16, to f32, chosen rows to bf16, the squared lengths of its rows; and, of another file, the
/// norms of its rows with an adapter.
pub(super) struct Kernels {
    source: &'static Source,
    bf16: &'static str,
    f32: &'static str,
    embedding: &'static str,
    norms: &'static str,
    pub(super) row_norms: RowNorms,
}

/// Those of a weight.
pub(super) fn kernels(weight: &DeviceWeight) -> Kernels {
    // Rows that end within a group start within one too, and a group can lie in two blocks.
    kernels_of(weight.weight_type(), !weight.cols().is_multiple_of(GROUP))
}

#[rustfmt::skip]
fn kernels_of(weight_type: WeightType, ragged: bool) -> Kernels {
    macro_rules! kernels {
        (DENSE, $name:literal) => { kernels!(&DENSE, "dequantize_dense.cu", $name) };
        (BLOCKS, $name:literal) => { kernels!(&BLOCKS, "dequantize_blocks.cu", $name) };
        (CODE_BOOKS, $name:literal) => { kernels!(&CODE_BOOKS, "dequantize_code_books.cu", $name) };
        (FOUR_BIT, $name:literal) => { kernels!(&FOUR_BIT, "dequantize_four_bit.cu", $name) };
        ($source:expr, $decoders:literal, $name:literal) => {
            Kernels {
                source: $source,
                bf16: concat!("dequantize_", $name),
                f32: concat!("dequantize_", $name, "_f32"),
                embedding: concat!("embedding_forward_", $name),
                norms: concat!("row_norms_squared_", $name),
                row_norms: row_norms!($decoders, $name),
            }
        };
    }
    match weight_type {
        WeightType::FourBit { quant_type: QuantType::Nf4 | QuantType::Fp4, double } => match (double, ragged) {
            (false, false) => kernels!(FOUR_BIT, "four_bit"),
            (false, true) => kernels!(FOUR_BIT, "four_bit_ragged"),
            (true, false) => kernels!(FOUR_BIT, "four_bit_double"),
            (true, true) => kernels!(FOUR_BIT, "four_bit_double_ragged"),
        },
        WeightType::Int8 => kernels!(DENSE, "int8"),
        WeightType::Ggml(dtype) => match dtype {
            GgmlType::F32 => kernels!(DENSE, "f32"),
            GgmlType::F16 => kernels!(DENSE, "f16"),
            GgmlType::BF16 => kernels!(DENSE, "bf16"),
            GgmlType::F64 => kernels!(DENSE, "f64"),
            GgmlType::I8 => kernels!(DENSE, "i8"),
            GgmlType::I16 => kernels!(DENSE, "i16"),
            GgmlType::I32 => kernels!(DENSE, "i32"),
            GgmlType::I64 => kernels!(DENSE, "i64"),
            GgmlType::Q4_0 => kernels!(BLOCKS, "q4_0"),
            GgmlType::Q4_1 => kernels!(BLOCKS, "q4_1"),
            GgmlType::Q5_0 => kernels!(BLOCKS, "q5_0"),
            GgmlType::Q5_1 => kernels!(BLOCKS, "q5_1"),
            // On the device they are the same.
            GgmlType::Q8_0 | GgmlType::Q8_1 => kernels!(BLOCKS, "q8_0"),
            GgmlType::Q8_K => kernels!(BLOCKS, "q8_k"),
            GgmlType::Q2_K => kernels!(BLOCKS, "q2_k"),
            GgmlType::Q3_K => kernels!(BLOCKS, "q3_k"),
            GgmlType::Q4_K => kernels!(BLOCKS, "q4_k"),
            GgmlType::Q5_K => kernels!(BLOCKS, "q5_k"),
            GgmlType::Q6_K => kernels!(BLOCKS, "q6_k"),
            GgmlType::Q1_0 => kernels!(BLOCKS, "q1_0"),
            GgmlType::Q2_0 => kernels!(BLOCKS, "q2_0"),
            GgmlType::TQ1_0 => kernels!(BLOCKS, "tq1_0"),
            GgmlType::TQ2_0 => kernels!(BLOCKS, "tq2_0"),
            GgmlType::IQ1_S => kernels!(CODE_BOOKS, "iq1_s"),
            GgmlType::IQ1_M => kernels!(CODE_BOOKS, "iq1_m"),
            GgmlType::IQ2_XXS => kernels!(CODE_BOOKS, "iq2_xxs"),
            GgmlType::IQ2_XS => kernels!(CODE_BOOKS, "iq2_xs"),
            GgmlType::IQ2_S => kernels!(CODE_BOOKS, "iq2_s"),
            GgmlType::IQ3_XXS => kernels!(CODE_BOOKS, "iq3_xxs"),
            GgmlType::IQ3_S => kernels!(CODE_BOOKS, "iq3_s"),
            GgmlType::IQ4_NL => kernels!(CODE_BOOKS, "iq4_nl"),
            GgmlType::IQ4_XS => kernels!(CODE_BOOKS, "iq4_xs"),
            GgmlType::MXFP4 => kernels!(CODE_BOOKS, "mxfp4"),
            GgmlType::NVFP4 => kernels!(CODE_BOOKS, "nvfp4"),
        },
    }
}

/// The files that measure rows, of all types.
#[cfg(test)]
pub(crate) fn row_norm_sources() -> Vec<&'static Source> {
    let four_bit = [false, true].map(|double| WeightType::FourBit { quant_type: QuantType::Nf4, double });
    let types = four_bit.into_iter().chain([WeightType::Int8]).chain(GgmlType::ALL.map(WeightType::Ggml));
    let mut sources: Vec<_> = types.map(|of| kernels_of(of, false).row_norms.source).collect();
    // Some types share theirs.
    sources.sort_by_key(|source| source.name);
    sources.dedup_by_key(|source| source.name);
    sources
}

/// `PACKED_PARAMETERS` of `frame.cuh`.
pub(super) fn packed_args(weight: &DeviceWeight) -> impl Iterator<Item = Arg> {
    let layout = weight.layout();
    let planes = layout.planes.map(|at| Arg::Ptr(weight.address(at)));
    let rounding = match layout.rounding {
        Element::F16 => 1,
        Element::BF16 => 2,
        _ => 0,
    };
    planes.into_iter().chain([
        Arg::Ptr(weight.address(layout.table)),
        Arg::F32(layout.offset),
        Arg::I32(layout.block_shift as i32),
        Arg::I32(layout.nested_shift as i32),
        Arg::I32(rounding),
        Arg::size(weight.cols()),
    ])
}

pub(super) fn same_device(op: &'static str, weight: &DeviceWeight, operand: &View<'_>) -> Result<()> {
    let cuda: &Cuda = weight.cuda();
    match operand.cuda() {
        Some(other) if std::ptr::eq(&raw const **other, cuda) => Ok(()),
        Some(other) => {
            Err(Error::NoKernel { op, device: format!("{} and {} together", cuda.name(), other.name()) })
        }
        None => Err(Error::NoKernel { op, device: format!("{} and cpu together", cuda.name()) }),
    }
}

/// What `Divisor` of `frame.cuh` multiplies by and shifts by, for quotients of numbers below 2^31.
fn divisor(by: usize) -> (u32, u32) {
    if by <= 1 {
        return (0, 0);
    }
    // The quotient of n is the upper part of n * (2^(31 + log2) / by, rounded up), which is at most n * by / 2^log2 too large
    // in units of 2^-31, and by <= 2^log2.
    let log2 = by.next_power_of_two().trailing_zeros();
    (((1_u64 << (31 + log2)) / by as u64 + 1) as u32, log2 - 1)
}

fn rows_cuda(
    op: &'static str,
    out: &ViewMut<'_>,
    weight: &DeviceWeight,
    rows: Range<usize>,
    row_scale: Option<View<'_>>,
    columns: Option<Columns<'_>>,
    below: Option<View<'_>>,
) -> Result<()> {
    same_device(op, weight, &out.as_view())?;
    let groups = rows.len().saturating_mul(out.cols.div_ceil(GROUP));
    if groups >= 1 << 31 {
        let what = "groups of eight elements of out";
        return Err(Error::IndexOutOfRange { op, what, index: groups, limit: 1 << 31 });
    }
    let kernels = kernels(weight);
    let matrix = out.matrix(op)?;
    let kernel = match matrix.dtype {
        Dtype::Bf16 => kernels.bf16,
        Dtype::F32 => kernels.f32,
    };
    let g = match row_scale {
        Some(g) => g.f32(op)?,
        None => 0,
    };
    let (b, b_stride, rank, at) = match columns {
        Some(Columns { b, offset }) => (b.bf16(op)?, b.stride, b.cols, offset),
        None => (0, 0, 0, 0),
    };
    let (a, a_stride, a_rows) = match below {
        Some(a) => (a.bf16(op)?, a.stride, a.rows),
        None => (0, 0, 0),
    };
    let (mul, shift) = divisor(weight.cols() / GROUP);
    let mut args = vec![Arg::Ptr(matrix.ptr), Arg::I64(matrix.stride as i64)];
    args.extend(packed_args(weight));
    args.extend([
        Arg::size(rows.start),
        Arg::size(rows.len()),
        Arg::size(out.cols),
        Arg::U32(mul),
        Arg::U32(shift),
        Arg::F32(weight.factor()),
        Arg::Ptr(g),
        Arg::Ptr(b),
        Arg::I64(b_stride as i64),
        Arg::size(rank),
        Arg::size(at),
        Arg::Ptr(a),
        Arg::I64(a_stride as i64),
        Arg::size(a_rows),
    ]);
    let blocks = groups.div_ceil(THREADS * GROUPS_PER_THREAD).min(weight.cuda().sms() * BLOCKS_PER_SM);
    weight.cuda().launch(kernels.source, kernel, Grid::of(blocks, THREADS), &args)
}

#[cfg(test)]
mod tests;
