//! Every tensor type that a GGUF file can declare, so that any file can be listed and its layout
//! checked. Only those of [`GgmlType`] can be computed with; the others have a name and a size here.

use crate::dtype::GgmlType;
use crate::error::{Error, Kind, Result};

/// A type as a file declares it: number, ggml's name, block length and block bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TensorType {
    id: u32,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
}

const fn row(id: u32, name: &'static str, block_len: usize, block_bytes: usize) -> TensorType {
    TensorType { id, name, block_len, block_bytes }
}

/// The types that are not in [`GgmlType`]. ggml removed 4, 5, 31 to 33 and 36 to 38.
const LISTED: [TensorType; 24] = [
    row(9, "Q8_1", 32, 36),
    row(10, "Q2_K", 256, 84),
    row(11, "Q3_K", 256, 110),
    row(15, "Q8_K", 256, 292),
    row(16, "IQ2_XXS", 256, 66),
    row(17, "IQ2_XS", 256, 74),
    row(18, "IQ3_XXS", 256, 98),
    row(19, "IQ1_S", 256, 50),
    row(20, "IQ4_NL", 32, 18),
    row(21, "IQ3_S", 256, 110),
    row(22, "IQ2_S", 256, 82),
    row(23, "IQ4_XS", 256, 136),
    row(24, "I8", 1, 1),
    row(25, "I16", 1, 2),
    row(26, "I32", 1, 4),
    row(27, "I64", 1, 8),
    row(28, "F64", 1, 8),
    row(29, "IQ1_M", 256, 56),
    row(34, "TQ1_0", 256, 54),
    row(35, "TQ2_0", 256, 66),
    row(39, "MXFP4", 32, 17),
    row(40, "NVFP4", 64, 36),
    row(41, "Q1_0", 128, 18),
    row(42, "Q2_0", 64, 18),
];

impl TensorType {
    /// The type with this GGUF number; none for numbers that ggml removed or never had.
    pub fn from_id(id: u32) -> Option<TensorType> {
        GgmlType::from_id(id)
            .map(TensorType::from)
            .or_else(|| LISTED.into_iter().find(|listed| listed.id == id))
    }

    /// The number in the file.
    pub const fn id(self) -> u32 {
        self.id
    }

    /// ggml's name: `IQ4_XS`.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Elements in one block.
    pub const fn block_len(self) -> usize {
        self.block_len
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        self.block_bytes
    }

    /// The type to compute with.
    ///
    /// # Errors
    /// This version cannot; the message names the types that it can.
    pub fn dtype(self) -> Result<GgmlType> {
        GgmlType::from_id(self.id).ok_or_else(|| Error::new(Kind::UnsupportedType { found: self.name }))
    }
}

impl From<GgmlType> for TensorType {
    fn from(dtype: GgmlType) -> TensorType {
        row(dtype.id(), dtype.name(), dtype.block_len(), dtype.block_bytes())
    }
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}
