//! bitsandbytes: 4-bit weights (NF4, FP4) with plain or double-quantized scales, and LLM.int8.
//!
//! A weight `w` of shape (N, K) in 4 bits is these tensors of a safetensors folder:
//!
//! | key | type | shape | content |
//! |---|---|---|---|
//! | `w` | U8 | (⌈NK/2⌉, 1) | element 2i in the high nibble of byte i, element 2i+1 in the low one |
//! | `w.absmax` | F32 or U8 | (blocks) | scale of every block, or its 8-bit code |
//! | `w.quant_map` | F32 | (16) | the code book |
//! | `w.nested_absmax` | F32 | (⌈blocks/256⌉) | double quantization: scales of the scales |
//! | `w.nested_quant_map` | F32 | (256) | double quantization: code book of the scales |
//! | `w.quant_state.bitsandbytes__nf4` | U8 | (bytes) | JSON: type, block size, shape, element type |
//!
//! `x = table[code] * absmax`, with `absmax = map[code8] * nested_absmax + offset` under double
//! quantization; all in f32, then rounded to the element type of the weight that was quantized.
//! Blocks run over the flat weight, so that they cross rows where the block size does not divide K.
//! Source: bitsandbytes 0.50 (`functional.py`, `backends/default/ops.py`), read for facts, and its outputs.
#![expect(
    clippy::inline_always,
    reason = "inlining carries the target features of the caller of `dequantize` into its loops"
)]

mod blob;
mod codec;
pub mod config;
mod int8;
mod nested;
mod read;
mod write;

pub use codec::{dequantize_blocks, quantize_blocks};
pub use int8::Int8;
pub use nested::mean_of_scales;

use crate::file::Bytes;
use crate::safetensors::Dtype;

/// Block sizes that bitsandbytes has kernels for.
pub const BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The block size of every checkpoint that transformers writes.
pub const BLOCK_SIZE: usize = 64;

/// A 4-bit code book.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum QuantType {
    /// Normal float: quantiles of a normal distribution.
    Nf4,
    /// Sign, two exponent bits, one mantissa bit.
    Fp4,
}

impl QuantType {
    /// Both.
    pub const ALL: [QuantType; 2] = [QuantType::Nf4, QuantType::Fp4];

    /// bitsandbytes' name: `nf4`.
    pub const fn name(self) -> &'static str {
        match self {
            QuantType::Nf4 => "nf4",
            QuantType::Fp4 => "fp4",
        }
    }

    /// The type with this name.
    pub fn from_name(name: &str) -> Option<QuantType> {
        QuantType::ALL.into_iter().find(|t| t.name() == name)
    }

    /// The value of every code.
    pub const fn table(self) -> &'static [f32; 16] {
        codec::table(self)
    }

    /// The codes in the order of their values.
    pub const fn order(self) -> &'static [u8; 16] {
        codec::order(self)
    }
}

/// What the JSON of a 4-bit weight says: how its bytes are to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QuantState {
    /// The code book.
    pub quant_type: QuantType,
    /// Elements that share a scale.
    pub blocksize: usize,
    /// Output features, N.
    pub rows: usize,
    /// Input features, K.
    pub cols: usize,
    /// Element type of the weight that was quantized: F32, F16 or BF16. Dequantized values are rounded to it.
    pub dtype: Dtype,
}

impl QuantState {
    /// N x K.
    pub fn elements(&self) -> usize {
        self.rows * self.cols
    }

    /// Blocks, the last of which may be shorter.
    pub fn blocks(&self) -> usize {
        self.elements().div_ceil(self.blocksize)
    }

    /// Bytes of the packed codes.
    pub fn code_bytes(&self) -> usize {
        self.elements().div_ceil(2)
    }
}

/// The scales of the blocks.
#[derive(Debug, Clone)]
enum Scales {
    /// f32, little-endian.
    Plain(Bytes),
    /// Double quantization.
    Nested(nested::Nested),
}

/// The scales of the blocks as they are stored.
#[derive(Debug, Clone, Copy)]
pub enum StoredScales<'a> {
    /// f32, little-endian, one per block.
    Plain(&'a Bytes),
    /// Double quantization: the scale of block i is `map[codes[i]] * absmax[i / blocksize] + offset`.
    Double {
        /// One code per block.
        codes: &'a Bytes,
        /// The scales of the codes.
        absmax: &'a [f32],
        /// Codes that share a scale, a power of two.
        blocksize: usize,
        /// The value of every code.
        map: &'a [f32; 256],
        /// The mean of the scales.
        offset: f32,
    },
}

/// A matrix in NF4 or FP4.
#[derive(Debug, Clone)]
pub struct FourBit {
    state: QuantState,
    codes: Bytes,
    scales: Scales,
}

impl FourBit {
    /// How the bytes are to be read.
    pub fn state(&self) -> &QuantState {
        &self.state
    }

    /// Whether the scales are quantized as well.
    pub fn is_double(&self) -> bool {
        matches!(self.scales, Scales::Nested(_))
    }

    /// The packed codes, two per byte.
    pub fn codes(&self) -> &Bytes {
        &self.codes
    }

    /// The scales of the blocks as they are stored.
    pub fn scales(&self) -> StoredScales<'_> {
        match &self.scales {
            Scales::Plain(absmax) => StoredScales::Plain(absmax),
            Scales::Nested(nested::Nested { codes, absmax, blocksize, map, offset }) => {
                StoredScales::Double { codes, absmax, blocksize: *blocksize, map, offset: *offset }
            }
        }
    }

    /// Bytes of codes and scales.
    pub fn size_bytes(&self) -> usize {
        self.codes.len()
            + match &self.scales {
                Scales::Plain(absmax) => absmax.len(),
                Scales::Nested(nested) => nested.size_bytes(),
            }
    }

    /// The scale of a block.
    ///
    /// # Panics
    /// There is no such block.
    #[inline(always)]
    pub fn absmax(&self, block: usize) -> f32 {
        match &self.scales {
            Scales::Plain(absmax) => f32::from_le_bytes(absmax.as_chunks().0[block]),
            Scales::Nested(nested) => nested.scale(block),
        }
    }

    /// Packed codes and scales as a weight; the scales are quantized if `double`.
    ///
    /// # Panics
    /// The lengths are not those of the state.
    pub fn from_parts(state: QuantState, codes: Vec<u8>, absmax: &[f32], double: bool) -> FourBit {
        assert_eq!(codes.len(), state.code_bytes(), "codes of {state:?}");
        assert_eq!(absmax.len(), state.blocks(), "scales of {state:?}");
        let scales = if double {
            Scales::Nested(nested::Nested::quantize(absmax))
        } else {
            Scales::Plain(absmax.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>().into())
        };
        FourBit { state, codes: codes.into(), scales }
    }

    /// Quantizes a matrix on the calling thread: row by row, as one flat list of blocks.
    ///
    /// # Panics
    /// `values` does not hold the elements of the state.
    pub fn quantize(state: QuantState, values: &[f32], double: bool) -> FourBit {
        assert_eq!(values.len(), state.elements(), "elements of {state:?}");
        let (mut codes, mut absmax) = (vec![0; state.code_bytes()], vec![0.0; state.blocks()]);
        quantize_blocks(state.quant_type, state.blocksize, values, &mut codes, &mut absmax);
        FourBit::from_parts(state, codes, &absmax, double)
    }

    /// `out.len()` elements of the flat weight from element `start` on, as f32.
    ///
    /// Always inlined, so that a caller compiled for AVX2 or AVX-512 gets the loops vectorized for it.
    ///
    /// # Panics
    /// The elements lie outside of the weight.
    #[inline(always)]
    pub fn dequantize(&self, start: usize, out: &mut [f32]) {
        codec::dequantize(self, start, out);
    }
}

/// The weight that a tensor belongs to, if it is no weight itself: scales, code books, JSON.
///
/// Covers LLM.int8 and the scales of FP8 too: `m.SCB` belongs to `m.weight`.
pub fn weight_of(name: &str) -> Option<String> {
    let after_weight = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state.bitsandbytes__nf4",
        "quant_state.bitsandbytes__fp4",
    ];
    if let Some(weight) = after_weight.iter().find_map(|s| name.strip_suffix(s)?.strip_suffix('.')) {
        return Some(weight.to_owned());
    }
    let beside = ["SCB", "weight_format", "weight_scale_inv", "weight_scale", "input_scale"];
    beside.iter().find_map(|s| name.strip_suffix(s)?.strip_suffix('.')).map(|m| format!("{m}.weight"))
}

#[cfg(test)]
mod tests;
