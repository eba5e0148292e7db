//! Codes to values and back, for both 4-bit types.
//!
//! A byte is two elements, so one table of 256 pairs turns a byte into two values with one load; the
//! products with the scale are then vectors. Quantizing counts the midpoints between table entries that lie below an element: a tie
//! goes to the lower entry, as in bitsandbytes' CPU path.

use super::{FourBit, QuantType};
use crate::blocks::half::{bf16_to_f32, f32_to_bf16, round_to_f16};
use crate::safetensors::Dtype;

static NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Sign in bit 3; the magnitudes of the other three bits are not in order.
static FP4: [f32; 16] = [
    0.0,
    0.005_208_333_5,
    0.666_666_7,
    1.0,
    0.333_333_34,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_5,
    -0.666_666_7,
    -1.0,
    -0.333_333_34,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// The codes in the order of their values. FP4 has zero twice; bitsandbytes puts code 0 first, so that a
/// positive element below the smallest step gets code 8.
static NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
static FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

static NF4_BOUNDS: [f32; 15] = bounds(&NF4, &NF4_ORDER);
static FP4_BOUNDS: [f32; 15] = bounds(&FP4, &FP4_ORDER);

static NF4_PAIRS: [[f32; 2]; 256] = pairs(&NF4);
static FP4_PAIRS: [[f32; 2]; 256] = pairs(&FP4);

/// Midpoints between neighbouring values, in f32.
const fn bounds(table: &[f32; 16], order: &[u8; 16]) -> [f32; 15] {
    let mut bounds = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        let sum = table[order[i] as usize] + table[order[i + 1] as usize];
        // In f32: `f32::midpoint` goes through f64, and bitsandbytes does not.
        bounds[i] = sum / 2.0;
        i += 1;
    }
    bounds
}

/// The two values of every byte, high nibble first.
const fn pairs(table: &[f32; 16]) -> [[f32; 2]; 256] {
    let mut pairs = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        pairs[byte] = [table[byte >> 4], table[byte & 15]];
        byte += 1;
    }
    pairs
}

pub(super) const fn table(quant_type: QuantType) -> &'static [f32; 16] {
    match quant_type {
        QuantType::Nf4 => &NF4,
        QuantType::Fp4 => &FP4,
    }
}

pub(super) const fn order(quant_type: QuantType) -> &'static [u8; 16] {
    match quant_type {
        QuantType::Nf4 => &NF4_ORDER,
        QuantType::Fp4 => &FP4_ORDER,
    }
}

/// The smallest scale that an element is divided by.
const LEAST_ABSMAX: f32 = 1e-38;

/// Quantizes consecutive elements of a flat weight: whole blocks, or the end of the weight.
///
/// absmax = max |x| of a block; code = number of midpoints below x · (1/absmax), in f32. The last block, if
/// it is shorter, is divided by its absmax instead, of which the least is 1e-38: that is how bitsandbytes
/// treats it. An odd last element shares its byte with the code of zero. NaN and infinities give codes
/// without meaning (see [`check_finite`](crate::blocks::check_finite)).
///
/// # Panics
/// `codes` does not hold a nibble per element, or `absmax` a scale per block.
pub fn quantize_blocks(
    quant_type: QuantType,
    blocksize: usize,
    values: &[f32],
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    assert_eq!(codes.len(), values.len().div_ceil(2), "bytes of {} elements", values.len());
    assert_eq!(absmax.len(), values.len().div_ceil(blocksize), "scales of {} elements", values.len());
    let order = order(quant_type);
    let bounds = match quant_type {
        QuantType::Nf4 => &NF4_BOUNDS,
        QuantType::Fp4 => &FP4_BOUNDS,
    };
    let blocks = values.chunks(blocksize).zip(codes.chunks_mut(blocksize / 2));
    for ((x, codes), absmax) in blocks.zip(absmax) {
        let largest = largest_magnitude(x);
        let is_whole = x.len() == blocksize;
        *absmax = if is_whole { largest } else { largest.max(LEAST_ABSMAX) };
        let inverse = 1.0 / largest.max(LEAST_ABSMAX);
        for (x, codes) in x.chunks(32).zip(codes.chunks_mut(16)) {
            let mut scaled = [0.0; 32];
            for (scaled, x) in scaled.iter_mut().zip(x) {
                *scaled = if is_whole { x * inverse } else { x / *absmax };
            }
            let below = count_below(bounds, &scaled);
            for (byte, pair) in codes.iter_mut().zip(below.as_chunks::<2>().0) {
                *byte = order[pair[0] as usize & 15] << 4 | order[pair[1] as usize & 15];
            }
        }
    }
}

/// max |x|, 0 of nothing.
fn largest_magnitude(x: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let (chunks, rest) = x.as_chunks::<8>();
    for x in chunks {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = if *lane < x.abs() { x.abs() } else { *lane };
        }
    }
    lanes.iter().chain(rest).fold(0.0, |a, b| if a < b.abs() { b.abs() } else { a })
}

/// How many bounds lie below each element.
#[inline(always)]
fn count_below(bounds: &[f32; 15], x: &[f32; 32]) -> [u32; 32] {
    let mut below = [0; 32];
    for bound in bounds {
        for (below, x) in below.iter_mut().zip(x) {
            *below += u32::from(*x > *bound);
        }
    }
    below
}

/// Rounding to the element type of the weight.
trait Round {
    /// Whether rounding costs so much that the sixteen values of a block are rounded once, not each element.
    const ONCE_PER_BLOCK: bool = false;

    fn round(x: f32) -> f32;
}

struct ToF32;
struct ToF16;
struct ToBf16;

impl Round for ToF32 {
    #[inline(always)]
    fn round(x: f32) -> f32 {
        x
    }
}

impl Round for ToF16 {
    const ONCE_PER_BLOCK: bool = true;

    #[inline(always)]
    fn round(x: f32) -> f32 {
        round_to_f16(x)
    }
}

impl Round for ToBf16 {
    #[inline(always)]
    fn round(x: f32) -> f32 {
        bf16_to_f32(f32_to_bf16(x))
    }
}

/// See [`FourBit::dequantize`].
#[inline(always)]
pub(super) fn dequantize(weight: &FourBit, start: usize, out: &mut [f32]) {
    let end = start.checked_add(out.len());
    assert!(end.is_some_and(|end| end <= weight.state.elements()), "elements past the end");
    match weight.state.dtype {
        Dtype::F16 => flat::<ToF16>(weight, start, out),
        Dtype::BF16 => flat::<ToBf16>(weight, start, out),
        _ => flat::<ToF32>(weight, start, out),
    }
}

/// Dequantizes whole blocks of `absmax.len()` scales without a rounding of the products.
///
/// # Panics
/// The lengths do not belong together.
#[inline(always)]
pub fn dequantize_blocks(
    quant_type: QuantType,
    blocksize: usize,
    codes: &[u8],
    absmax: &[f32],
    out: &mut [f32],
) {
    assert_eq!(out.len(), absmax.len() * blocksize, "elements of {} blocks", absmax.len());
    assert_eq!(codes.len() * 2, out.len(), "bytes of {} elements", out.len());
    let pairs = pairs_of(quant_type);
    for ((codes, out), absmax) in
        codes.chunks_exact(blocksize / 2).zip(out.chunks_exact_mut(blocksize)).zip(absmax)
    {
        scaled_pairs::<ToF32>(pairs, codes, *absmax, out);
    }
}

#[inline(always)]
fn pairs_of(quant_type: QuantType) -> &'static [[f32; 2]; 256] {
    match quant_type {
        QuantType::Nf4 => &NF4_PAIRS,
        QuantType::Fp4 => &FP4_PAIRS,
    }
}

/// A range of the flat weight, block by block; it may start and end within a block or a byte.
#[inline(always)]
fn flat<R: Round>(weight: &FourBit, start: usize, out: &mut [f32]) {
    let blocksize = weight.state.blocksize;
    let pairs = pairs_of(weight.state.quant_type);
    let codes: &[u8] = &weight.codes;
    let (mut at, mut out) = (start, out);
    while !out.is_empty() {
        let block = at / blocksize;
        let absmax = weight.absmax(block);
        let len = ((block + 1) * blocksize - at).min(out.len());
        let (piece, rest) = out.split_at_mut(len);
        (out, at) = (rest, at + len);
        ragged::<R>(pairs, codes, at - len, absmax, piece);
    }
}

/// Elements of one block from element `at` of the weight on.
#[inline(always)]
fn ragged<R: Round>(pairs: &[[f32; 2]; 256], codes: &[u8], at: usize, absmax: f32, out: &mut [f32]) {
    let head = (at % 2).min(out.len());
    let (first, out) = out.split_at_mut(head);
    if let Some(first) = first.first_mut() {
        *first = R::round(pairs[usize::from(codes[at / 2])][1] * absmax);
    }
    let at = at + head;
    let bytes = out.len() / 2;
    let (even, odd) = out.split_at_mut(bytes * 2);
    scaled_pairs::<R>(pairs, &codes[at / 2..at / 2 + bytes], absmax, even);
    if let Some(last) = odd.first_mut() {
        *last = R::round(pairs[usize::from(codes[at / 2 + bytes])][0] * absmax);
    }
}

/// Two elements per byte. Sixteen at a time, which the compiler turns into loads of pairs and vector products.
#[inline(always)]
fn scaled_pairs<R: Round>(pairs: &[[f32; 2]; 256], codes: &[u8], absmax: f32, out: &mut [f32]) {
    if R::ONCE_PER_BLOCK {
        let table: [f32; 16] = std::array::from_fn(|code| R::round(pairs[code][1] * absmax));
        for (&code, out) in codes.iter().zip(out.as_chunks_mut::<2>().0) {
            *out = [table[usize::from(code >> 4)], table[usize::from(code & 15)]];
        }
        return;
    }
    let (codes, codes_left) = codes.as_chunks::<8>();
    let (out, out_left) = out.as_chunks_mut::<16>();
    for (codes, out) in codes.iter().zip(out) {
        let mut values = [0.0; 16];
        for (i, &code) in codes.iter().enumerate() {
            [values[2 * i], values[2 * i + 1]] = pairs[usize::from(code)];
        }
        *out = values.map(|value| R::round(value * absmax));
    }
    for (&code, out) in codes_left.iter().zip(out_left.as_chunks_mut::<2>().0) {
        *out = pairs[usize::from(code)].map(|value| R::round(value * absmax));
    }
}
