//! The frozen base weight: packed rows behind one interface, the seam between methods and formats.
//!
//! A linear layer holds one [`BaseWeight`] and asks it for f32 rows or tiles; an adapter never learns
//! in which type they are stored, and a new type is one more `Storage` variant here. The bytes stay
//! packed and usually mapped from the file: a clone is a pointer, and only the tile at work is f32.
//! N rows are output features, K columns are input features. Here is what a weight is; what is done with it (read,
//! requantize, keep on a device) and each storage have files of their own.

mod copy;
mod dequantize;
pub mod device;
mod four_bit;
mod ggml;
mod int8;
mod kind;
mod on_device;
mod requantize;

use std::sync::Arc;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::{FourBit, Int8};
use qpeft_formats::file::Bytes;
use qpeft_formats::safetensors::{Dtype, TensorView};

pub use copy::Place;
pub(crate) use copy::{Missing, Room};
pub use device::DeviceWeight;
pub use ggml::dequantize_blocks;
pub use kind::WeightType;

use self::on_device::OnDevice;
use crate::error::{Result, check};

/// A frozen (N, K) matrix in the type of its checkpoint.
#[derive(Debug, Clone)]
pub struct BaseWeight {
    rows: usize,
    cols: usize,
    storage: Storage,
    on_device: Option<Arc<OnDevice>>,
}

/// How the rows are stored.
#[derive(Debug, Clone)]
enum Storage {
    /// Rows of ggml blocks, one after another; F32, F16 and BF16 are blocks of one element. Every element
    /// is multiplied by `factor`, mostly 1.
    Ggml { dtype: GgmlType, bytes: Bytes, factor: f32 },
    /// bitsandbytes NF4 or FP4: blocks over the flat matrix.
    FourBit(FourBit),
    /// bitsandbytes LLM.int8: a scale per row.
    Int8(Int8),
}

impl BaseWeight {
    /// `rows` x `cols` elements of `dtype`, row by row, as a GGUF tensor stores them.
    ///
    /// # Errors
    /// `cols` is not a whole number of blocks, or `bytes` has another length than the shape asks for.
    pub fn from_ggml(dtype: GgmlType, rows: usize, cols: usize, bytes: Bytes) -> Result<BaseWeight> {
        let expected = dtype.row_bytes(cols)?.saturating_mul(rows);
        check("weight", "size in bytes", expected, bytes.len())?;
        Ok(BaseWeight { rows, cols, storage: Storage::Ggml { dtype, bytes, factor: 1.0 }, on_device: None })
    }

    /// The same blocks with every element times `factor`, as a file has it that keeps a factor of the whole
    /// tensor beside the blocks (NVFP4). [`BaseWeight::requantize`] keeps the factor.
    ///
    /// # Panics
    /// The weight is not stored in ggml blocks: the other formats have no such factor.
    #[must_use]
    pub fn scaled_by(mut self, by: f32) -> BaseWeight {
        match &mut self.storage {
            Storage::Ggml { factor, .. } => *factor = by,
            Storage::FourBit(_) | Storage::Int8(_) => panic!("{} has no factor", self.type_name()),
        }
        self
    }

    /// What every element of the blocks is multiplied by; 1 if nothing was said.
    pub fn factor(&self) -> f32 {
        match &self.storage {
            Storage::Ggml { factor, .. } => *factor,
            Storage::FourBit(_) | Storage::Int8(_) => 1.0,
        }
    }

    /// An unquantized weight, row by row.
    ///
    /// # Errors
    /// `values` does not hold rows x cols elements.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<BaseWeight> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        BaseWeight::from_ggml(GgmlType::F32, rows, cols, Bytes::from(bytes))
    }

    /// A weight of this type whose values do not matter.
    ///
    /// # Errors
    /// `cols` is not a whole number of blocks.
    pub fn empty(of: WeightType, rows: usize, cols: usize) -> Result<BaseWeight> {
        BaseWeight::empty_from(of, rows, cols, Dtype::BF16)
    }

    /// As [`BaseWeight::empty`], as if the elements had been of `dtype` (F32, F16 or BF16): dequantized 4-bit values
    /// are rounded to it.
    ///
    /// # Errors
    /// See [`BaseWeight::empty`].
    pub fn empty_from(of: WeightType, rows: usize, cols: usize, dtype: Dtype) -> Result<BaseWeight> {
        of.empty(rows, cols, dtype)
    }

    /// A weight in NF4 or FP4.
    pub fn from_four_bit(weight: FourBit) -> BaseWeight {
        let state = *weight.state();
        BaseWeight { rows: state.rows, cols: state.cols, storage: Storage::FourBit(weight), on_device: None }
    }

    /// A weight in LLM.int8.
    pub fn from_int8(weight: Int8) -> BaseWeight {
        BaseWeight {
            rows: weight.rows(),
            cols: weight.cols(),
            storage: Storage::Int8(weight),
            on_device: None,
        }
    }

    /// Output features, N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features, K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How the rows are stored.
    pub fn weight_type(&self) -> WeightType {
        match &self.storage {
            Storage::Ggml { dtype, .. } => WeightType::Ggml(*dtype),
            Storage::FourBit(weight) => {
                WeightType::FourBit { quant_type: weight.state().quant_type, double: weight.is_double() }
            }
            Storage::Int8(_) => WeightType::Int8,
        }
    }

    /// The storage type as its format calls it: `Q4_K`, `nf4-dq`.
    pub fn type_name(&self) -> &'static str {
        self.weight_type().name()
    }

    /// Bytes of the packed rows.
    pub fn size_bytes(&self) -> usize {
        match &self.storage {
            Storage::Ggml { bytes, .. } => bytes.len(),
            Storage::FourBit(weight) => weight.size_bytes(),
            Storage::Int8(weight) => weight.size_bytes(),
        }
    }

    /// Elements of a row that share a scale; tiles start and end at a multiple of it.
    pub fn block_len(&self) -> usize {
        match &self.storage {
            Storage::Ggml { dtype, .. } => dtype.block_len(),
            Storage::FourBit(weight) => four_bit::block_len(weight),
            Storage::Int8(_) => 1,
        }
    }

    /// The ggml type and its bytes, for writing files; `None` when stored otherwise. The values are those of
    /// the bytes times [`BaseWeight::factor`].
    pub fn ggml(&self) -> Option<(GgmlType, &Bytes)> {
        match &self.storage {
            Storage::Ggml { dtype, bytes, .. } => Some((*dtype, bytes)),
            Storage::FourBit(_) | Storage::Int8(_) => None,
        }
    }

    /// The tensors that store the weight in a safetensors folder under `name`; `None` for ggml blocks,
    /// which such a folder cannot hold.
    pub fn tensors(&self, name: &str) -> Option<Vec<TensorView>> {
        match &self.storage {
            Storage::Ggml { dtype, bytes, factor } => {
                let dtype = match dtype {
                    _ if *factor != 1.0 => return None,
                    GgmlType::F32 => Dtype::F32,
                    GgmlType::F16 => Dtype::F16,
                    GgmlType::BF16 => Dtype::BF16,
                    _ => return None,
                };
                let shape = vec![self.rows, self.cols];
                Some(vec![TensorView { name: name.to_owned(), dtype, shape, bytes: bytes.clone() }])
            }
            Storage::FourBit(weight) => Some(weight.tensors(name)),
            Storage::Int8(weight) => Some(weight.tensors(name)),
        }
    }

    /// NF4 and FP4.
    pub(crate) fn four_bit(&self) -> Option<&FourBit> {
        match &self.storage {
            Storage::FourBit(weight) => Some(weight),
            Storage::Ggml { .. } | Storage::Int8(_) => None,
        }
    }

    /// The type of the elements that were stored or quantized: F32, F16 or BF16.
    pub fn element_type(&self) -> Dtype {
        match &self.storage {
            Storage::Ggml { dtype: GgmlType::BF16, .. } => Dtype::BF16,
            Storage::Ggml { dtype: GgmlType::F16, .. } | Storage::Int8(_) => Dtype::F16,
            Storage::Ggml { .. } => Dtype::F32,
            Storage::FourBit(weight) => weight.state().dtype,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn zeros(dtype: GgmlType, rows: usize, cols: usize) -> BaseWeight {
        BaseWeight::from_ggml(dtype, rows, cols, Bytes::from(vec![0; rows * dtype.row_bytes(cols).unwrap()]))
            .unwrap()
    }

    #[test]
    fn a_size_that_does_not_fit_the_shape_is_refused() {
        let error = |dtype, rows, cols, bytes: usize| {
            BaseWeight::from_ggml(dtype, rows, cols, Bytes::from(vec![0; bytes])).unwrap_err().to_string()
        };
        assert_eq!(error(GgmlType::Q8_0, 2, 64, 135), "weight: size in bytes is 135, expected 136");
        assert!(error(GgmlType::Q8_0, 2, 63, 0).contains("63 is not a multiple of the Q8_0 block length 32"));
        assert!(error(GgmlType::F32, usize::MAX, 64, 4).starts_with("weight: size in bytes is 4, expected "));
        assert_eq!(
            BaseWeight::from_f32(2, 3, &[0.0; 5]).unwrap_err().to_string(),
            "weight: size in bytes is 20, expected 24"
        );
    }
}
