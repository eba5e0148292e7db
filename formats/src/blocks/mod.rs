//! Block codecs: bytes of one row <-> f32, bit-identical to llama.cpp's reference on x86-64.
//!
//! A codec is one implementation of `Block`, in a file of its own that opens with a byte map. The
//! macro `with_codec!` below is the only list of them. Operations are written in the order of the
//! reference; Rust never fuses or reassociates them, so every instruction set gives the same bits.
#![expect(
    clippy::inline_always,
    reason = "inlining carries the target features of the caller into the loops of a codec"
)]

mod dense;
mod fp4;
pub(crate) mod half;
mod iq1_m;
mod iq1_s;
mod iq1_search;
mod iq2_s;
mod iq2_xs;
mod iq2_xxs;
mod iq3_s;
mod iq3_xxs;
mod iq4_nl;
mod iq4_xs;
mod iq_codebook;
mod iq_grids;
mod iq_search;
mod k_quants;
mod k_quants_affine;
mod k_quants_symmetric;
mod mxfp4;
mod nibbles;
mod nvfp4;
mod q1_0;
mod q2_0;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;
mod q8_1;
mod q8_k;
mod rounding;
mod ternary;
mod tq1_0;
mod tq2_0;
mod validate;
mod weighted;

use crate::dtype::GgmlType;
pub use validate::check_scales;

/// One block type: `BYTES` bytes hold `LEN` elements. Multi-byte fields are little-endian.
trait Block<const BYTES: usize, const LEN: usize> {
    /// The row of the type table that describes this block.
    const DTYPE: GgmlType;

    /// Block -> values. Branch-free, and always inlined to be vectorized with its caller.
    fn dequantize(block: &[u8; BYTES], out: &mut [f32; LEN]);
}

/// A block type in which values can be written.
trait Quantize<const BYTES: usize, const LEN: usize>: Block<BYTES, LEN> {
    /// Values -> block. Overwrites every byte.
    fn quantize(x: &[f32; LEN], importance: Option<Importance<'_, LEN>>, block: &mut [u8; BYTES]);
}

/// A block type in which rows can be written; types that implement [`Quantize`] do so block by block.
trait QuantizeRow<const BYTES: usize, const LEN: usize>: Block<BYTES, LEN> {
    /// Values -> blocks. Overwrites every byte. The slices have the same length.
    fn quantize_row(row: &[[f32; LEN]], importance: Option<&[[f32; LEN]]>, blocks: &mut [[u8; BYTES]]);
}

impl<B: Quantize<BYTES, LEN>, const BYTES: usize, const LEN: usize> QuantizeRow<BYTES, LEN> for B {
    #[inline(always)]
    fn quantize_row(row: &[[f32; LEN]], importance: Option<&[[f32; LEN]]>, blocks: &mut [[u8; BYTES]]) {
        let Some(importance) = importance else {
            for (x, block) in row.iter().zip(blocks) {
                B::quantize(x, None, block);
            }
            return;
        };
        let values = row.as_flattened();
        let row_mean_square = values.iter().fold(0.0, |sum, x| sum + x * x) / values.len() as f32;
        for ((x, weights), block) in row.iter().zip(importance).zip(blocks) {
            B::quantize(x, Some(Importance { weights, row_mean_square }), block);
        }
    }
}

/// What an importance matrix says of one block: how much an error in each of its columns matters.
#[derive(Debug, Clone, Copy)]
struct Importance<'a, const LEN: usize> {
    /// Mean squared activation of each column of the block.
    weights: &'a [f32; LEN],
    /// Mean of x^2 over the whole row, summed in f32 from left to right.
    row_mean_square: f32,
}

/// Calls `$row::<Codec, _, _>(args)` with the codec of a type.
macro_rules! with_codec {
    ($dtype:expr, $row:ident($($arg:expr),*)) => {
        match $dtype {
            GgmlType::F32 => $row::<dense::F32, _, _>($($arg),*),
            GgmlType::F16 => $row::<dense::F16, _, _>($($arg),*),
            GgmlType::BF16 => $row::<dense::BF16, _, _>($($arg),*),
            GgmlType::F64 => $row::<dense::F64, _, _>($($arg),*),
            GgmlType::I8 => $row::<dense::I8, _, _>($($arg),*),
            GgmlType::I16 => $row::<dense::I16, _, _>($($arg),*),
            GgmlType::I32 => $row::<dense::I32, _, _>($($arg),*),
            GgmlType::I64 => $row::<dense::I64, _, _>($($arg),*),
            GgmlType::Q4_0 => $row::<q4_0::Q4_0, _, _>($($arg),*),
            GgmlType::Q4_1 => $row::<q4_1::Q4_1, _, _>($($arg),*),
            GgmlType::Q5_0 => $row::<q5_0::Q5_0, _, _>($($arg),*),
            GgmlType::Q5_1 => $row::<q5_1::Q5_1, _, _>($($arg),*),
            GgmlType::Q8_0 => $row::<q8_0::Q8_0, _, _>($($arg),*),
            GgmlType::Q2_K => $row::<q2_k::Q2_K, _, _>($($arg),*),
            GgmlType::Q3_K => $row::<q3_k::Q3_K, _, _>($($arg),*),
            GgmlType::Q8_1 => $row::<q8_1::Q8_1, _, _>($($arg),*),
            GgmlType::Q4_K => $row::<q4_k::Q4_K, _, _>($($arg),*),
            GgmlType::Q5_K => $row::<q5_k::Q5_K, _, _>($($arg),*),
            GgmlType::Q6_K => $row::<q6_k::Q6_K, _, _>($($arg),*),
            GgmlType::Q8_K => $row::<q8_k::Q8_K, _, _>($($arg),*),
            GgmlType::IQ1_S => $row::<iq1_s::IQ1_S, _, _>($($arg),*),
            GgmlType::IQ1_M => $row::<iq1_m::IQ1_M, _, _>($($arg),*),
            GgmlType::IQ2_XXS => $row::<iq2_xxs::IQ2_XXS, _, _>($($arg),*),
            GgmlType::IQ2_XS => $row::<iq2_xs::IQ2_XS, _, _>($($arg),*),
            GgmlType::IQ2_S => $row::<iq2_s::IQ2_S, _, _>($($arg),*),
            GgmlType::IQ3_XXS => $row::<iq3_xxs::IQ3_XXS, _, _>($($arg),*),
            GgmlType::IQ3_S => $row::<iq3_s::IQ3_S, _, _>($($arg),*),
            GgmlType::IQ4_NL => $row::<iq4_nl::IQ4_NL, _, _>($($arg),*),
            GgmlType::IQ4_XS => $row::<iq4_xs::IQ4_XS, _, _>($($arg),*),
            GgmlType::TQ1_0 => $row::<tq1_0::TQ1_0, _, _>($($arg),*),
            GgmlType::TQ2_0 => $row::<tq2_0::TQ2_0, _, _>($($arg),*),
            GgmlType::MXFP4 => $row::<mxfp4::MXFP4, _, _>($($arg),*),
            GgmlType::NVFP4 => $row::<nvfp4::NVFP4, _, _>($($arg),*),
            GgmlType::Q1_0 => $row::<q1_0::Q1_0, _, _>($($arg),*),
            GgmlType::Q2_0 => $row::<q2_0::Q2_0, _, _>($($arg),*),
        }
    };
}

/// As `with_codec!`, for the types in which values can be written.
macro_rules! with_quantizer {
    ($dtype:expr, $row:ident($($arg:expr),*)) => {
        match $dtype {
            GgmlType::F32 => $row::<dense::F32, _, _>($($arg),*),
            GgmlType::F16 => $row::<dense::F16, _, _>($($arg),*),
            GgmlType::BF16 => $row::<dense::BF16, _, _>($($arg),*),
            GgmlType::Q4_0 => $row::<q4_0::Q4_0, _, _>($($arg),*),
            GgmlType::Q4_1 => $row::<q4_1::Q4_1, _, _>($($arg),*),
            GgmlType::Q5_0 => $row::<q5_0::Q5_0, _, _>($($arg),*),
            GgmlType::Q5_1 => $row::<q5_1::Q5_1, _, _>($($arg),*),
            GgmlType::Q8_0 => $row::<q8_0::Q8_0, _, _>($($arg),*),
            GgmlType::Q2_K => $row::<q2_k::Q2_K, _, _>($($arg),*),
            GgmlType::Q3_K => $row::<q3_k::Q3_K, _, _>($($arg),*),
            GgmlType::Q4_K => $row::<q4_k::Q4_K, _, _>($($arg),*),
            GgmlType::Q5_K => $row::<q5_k::Q5_K, _, _>($($arg),*),
            GgmlType::Q6_K => $row::<q6_k::Q6_K, _, _>($($arg),*),
            GgmlType::IQ1_S => $row::<iq1_s::IQ1_S, _, _>($($arg),*),
            GgmlType::IQ1_M => $row::<iq1_m::IQ1_M, _, _>($($arg),*),
            GgmlType::IQ2_XXS => $row::<iq2_xxs::IQ2_XXS, _, _>($($arg),*),
            GgmlType::IQ2_XS => $row::<iq2_xs::IQ2_XS, _, _>($($arg),*),
            GgmlType::IQ2_S => $row::<iq2_s::IQ2_S, _, _>($($arg),*),
            GgmlType::IQ3_XXS => $row::<iq3_xxs::IQ3_XXS, _, _>($($arg),*),
            GgmlType::IQ3_S => $row::<iq3_s::IQ3_S, _, _>($($arg),*),
            GgmlType::IQ4_NL => $row::<iq4_nl::IQ4_NL, _, _>($($arg),*),
            GgmlType::IQ4_XS => $row::<iq4_xs::IQ4_XS, _, _>($($arg),*),
            GgmlType::TQ1_0 => $row::<tq1_0::TQ1_0, _, _>($($arg),*),
            GgmlType::TQ2_0 => $row::<tq2_0::TQ2_0, _, _>($($arg),*),
            GgmlType::MXFP4 => $row::<mxfp4::MXFP4, _, _>($($arg),*),
            GgmlType::NVFP4 => $row::<nvfp4::NVFP4, _, _>($($arg),*),
            GgmlType::Q1_0 => $row::<q1_0::Q1_0, _, _>($($arg),*),
            GgmlType::Q2_0 => $row::<q2_0::Q2_0, _, _>($($arg),*),
            read_only => panic!("values cannot be written in type {read_only}"),
        }
    };
}

/// Dequantizes whole blocks: `bytes` holds `out.len() / block_len` blocks of `dtype`.
///
/// Always inlined, so that a caller compiled for AVX2 or AVX-512 gets the codec vectorized for it.
///
/// # Panics
/// The lengths do not belong together; callers take both from [`GgmlType::row_bytes`].
#[inline(always)]
pub fn dequantize_row(dtype: GgmlType, bytes: &[u8], out: &mut [f32]) {
    with_codec!(dtype, dequantize_blocks(bytes, out));
}

/// Quantizes one row; `bytes` receives `row.len() / block_len` blocks.
///
/// `importance` holds one weight per column, as an importance matrix has it. Callers ask
/// [`GgmlType::require_quantizer`] first.
///
/// Always inlined, so that a caller compiled for AVX2 or AVX-512 gets the codec vectorized for it.
///
/// NaN and infinities give blocks without meaning (see [`check_finite`]). A finite block whose scale
/// is beyond 65504 gets an infinite f16 scale, as in the reference.
///
/// # Panics
/// The lengths do not belong together (callers take both from [`GgmlType::row_bytes`]), or values
/// cannot be written in the type.
#[inline(always)]
pub fn quantize_row(dtype: GgmlType, row: &[f32], importance: Option<&[f32]>, bytes: &mut [u8]) {
    with_quantizer!(dtype, quantize_blocks(row, importance, bytes));
}

/// What the codes of a type stand for, if they are numbers of a table: one number per 4-bit code, or the 8 or 4
/// numbers of each point of an IQ type's code book, one point after another.
pub fn code_book(dtype: GgmlType) -> Option<Vec<i8>> {
    Some(match dtype {
        GgmlType::IQ1_S | GgmlType::IQ1_M => iq1_s::Q.as_flattened().to_vec(),
        GgmlType::IQ2_XXS => iq2_xxs::Q.as_flattened().to_vec(),
        GgmlType::IQ2_XS => iq2_xs::Q.as_flattened().to_vec(),
        GgmlType::IQ2_S => iq2_s::Q.as_flattened().to_vec(),
        GgmlType::IQ3_XXS => iq3_xxs::Q.as_flattened().to_vec(),
        GgmlType::IQ3_S => iq3_s::Q.as_flattened().to_vec(),
        GgmlType::IQ4_NL | GgmlType::IQ4_XS => iq4_nl::VALUES.map(|value| value as i8).to_vec(),
        GgmlType::MXFP4 | GgmlType::NVFP4 => (0..16).map(fp4::value).collect(),
        _ => return None,
    })
}

/// Looks for NaN and infinities before quantizing.
///
/// # Errors
/// The index of the first element that is not finite.
pub fn check_finite(row: &[f32]) -> Result<(), usize> {
    match row.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(index),
        None => Ok(()),
    }
}

#[inline(always)]
fn dequantize_blocks<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>(
    bytes: &[u8],
    out: &mut [f32],
) {
    const { assert_sizes::<B, BYTES, LEN>() };
    let (blocks, bytes_left) = bytes.as_chunks::<BYTES>();
    let (values, values_left) = out.as_chunks_mut::<LEN>();
    assert!(
        blocks.len() == values.len() && bytes_left.is_empty() && values_left.is_empty(),
        "bytes and values of a row must be the same number of whole blocks"
    );
    for (block, values) in blocks.iter().zip(values) {
        B::dequantize(block, values);
    }
}

#[inline(always)]
fn quantize_blocks<B: QuantizeRow<BYTES, LEN>, const BYTES: usize, const LEN: usize>(
    row: &[f32],
    importance: Option<&[f32]>,
    bytes: &mut [u8],
) {
    const { assert_sizes::<B, BYTES, LEN>() };
    let (values, values_left) = row.as_chunks::<LEN>();
    let (blocks, bytes_left) = bytes.as_chunks_mut::<BYTES>();
    assert!(
        blocks.len() == values.len() && bytes_left.is_empty() && values_left.is_empty(),
        "bytes and values of a row must be the same number of whole blocks"
    );
    let importance = importance.map(|importance| {
        assert_eq!(importance.len(), row.len(), "one importance per column");
        importance.as_chunks::<LEN>().0
    });
    B::quantize_row(values, importance, blocks);
}

/// The `N` bytes of a block from byte `at`.
#[inline(always)]
fn field<const N: usize, const BYTES: usize>(block: &[u8; BYTES], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("the byte map of the block holds this field")
}

/// Fails the build when a codec and the type table disagree.
const fn assert_sizes<B: Block<BYTES, LEN>, const BYTES: usize, const LEN: usize>() {
    assert!(B::DTYPE.block_bytes() == BYTES, "block bytes differ from the type table");
    assert!(B::DTYPE.block_len() == LEN, "block length differs from the type table");
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod properties;
