//! The names of all storages of a base weight: what `--base-quant` takes and what a run records.

use std::fmt;
use std::str::FromStr;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::{BLOCK_SIZE, FourBit, Int8, QuantState, QuantType};
use qpeft_formats::file::Bytes;
use qpeft_formats::safetensors::Dtype;

use super::BaseWeight;
use crate::error::Result;

/// How a weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// ggml blocks, or dense elements.
    Ggml(GgmlType),
    /// bitsandbytes, 4 bits in blocks of 64.
    FourBit {
        /// The code book.
        quant_type: QuantType,
        /// Whether the scales are quantized too.
        double: bool,
    },
    /// bitsandbytes LLM.int8.
    Int8,
}

impl WeightType {
    /// `nf4`, `nf4-dq`, `fp4`, `fp4-dq`, `int8`, or ggml's name: `Q4_K`.
    pub const fn name(self) -> &'static str {
        match self {
            WeightType::Ggml(dtype) => dtype.name(),
            WeightType::FourBit { quant_type: QuantType::Nf4, double: false } => "nf4",
            WeightType::FourBit { quant_type: QuantType::Nf4, double: true } => "nf4-dq",
            WeightType::FourBit { quant_type: QuantType::Fp4, double: false } => "fp4",
            WeightType::FourBit { quant_type: QuantType::Fp4, double: true } => "fp4-dq",
            WeightType::Int8 => "int8",
        }
    }

    /// All types in which values can be written without importance.
    pub fn writable() -> impl Iterator<Item = WeightType> {
        let four_bit = QuantType::ALL
            .into_iter()
            .flat_map(|quant_type| [false, true].map(|double| WeightType::FourBit { quant_type, double }));
        four_bit.chain([WeightType::Int8]).chain(GgmlType::writable().map(WeightType::Ggml))
    }

    /// A weight of this type whose values do not matter, to be requantized.
    ///
    /// `dtype`: what the elements were, to which dequantized 4-bit values are rounded.
    pub(super) fn empty(self, rows: usize, cols: usize, dtype: Dtype) -> Result<BaseWeight> {
        match self {
            WeightType::Ggml(dtype) => {
                let bytes = Bytes::from(vec![0; dtype.row_bytes(cols)? * rows]);
                BaseWeight::from_ggml(dtype, rows, cols, bytes)
            }
            WeightType::FourBit { quant_type, double } => {
                let state = QuantState { quant_type, blocksize: BLOCK_SIZE, rows, cols, dtype };
                let (codes, absmax) = (vec![0; state.code_bytes()], vec![0.0; state.blocks()]);
                Ok(BaseWeight::from_four_bit(FourBit::from_parts(state, codes, &absmax, double)))
            }
            WeightType::Int8 => Ok(BaseWeight::from_int8(Int8::quantize(cols, &vec![0.0; rows * cols]))),
        }
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WeightType {
    type Err = String;

    /// Any case, `_` and `-` alike.
    fn from_str(text: &str) -> Result<WeightType, String> {
        let name = text.replace('_', "-");
        let same = |t: &WeightType| t.name().replace('_', "-").eq_ignore_ascii_case(&name);
        WeightType::writable().find(same).ok_or_else(|| {
            let names: Vec<&str> = WeightType::writable().map(WeightType::name).collect();
            format!("`{text}` is not a type in which weights can be written; there are {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back() {
        for weight_type in WeightType::writable() {
            assert_eq!(weight_type.name().parse(), Ok(weight_type));
            assert_eq!(weight_type.name().to_lowercase().replace('-', "_").parse(), Ok(weight_type));
        }
        assert!("q9_k".parse::<WeightType>().unwrap_err().contains("nf4-dq"));
    }
}
