//! The element and block types that a ggml tensor can have: number, name, block length, block bytes.
//!
//! One table, [`GgmlType::ALL`], serves reader, writer, codecs and `--quant`. A type that is not in
//! it cannot be read as a number by this version; the reader names it in the error.

use crate::error::{Error, Kind, Result};

/// A ggml tensor type that this crate can dequantize and quantize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)]
#[allow(missing_docs, reason = "the names are ggml's own and say it all")]
#[rustfmt::skip]
pub enum GgmlType { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K }

/// What the table knows of one type.
#[derive(Debug)]
struct Row {
    dtype: GgmlType,
    id: u32,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    /// `general.file_type` of a file whose weights mostly have this type (llama_ftype).
    file_type: u32,
}

#[rustfmt::skip]
const TABLE: [Row; 11] = [
    Row { dtype: GgmlType::F32,  id: 0,  name: "F32",  block_len: 1,   block_bytes: 4,   file_type: 0 },
    Row { dtype: GgmlType::F16,  id: 1,  name: "F16",  block_len: 1,   block_bytes: 2,   file_type: 1 },
    Row { dtype: GgmlType::BF16, id: 30, name: "BF16", block_len: 1,   block_bytes: 2,   file_type: 32 },
    Row { dtype: GgmlType::Q4_0, id: 2,  name: "Q4_0", block_len: 32,  block_bytes: 18,  file_type: 2 },
    Row { dtype: GgmlType::Q4_1, id: 3,  name: "Q4_1", block_len: 32,  block_bytes: 20,  file_type: 3 },
    Row { dtype: GgmlType::Q5_0, id: 6,  name: "Q5_0", block_len: 32,  block_bytes: 22,  file_type: 8 },
    Row { dtype: GgmlType::Q5_1, id: 7,  name: "Q5_1", block_len: 32,  block_bytes: 24,  file_type: 9 },
    Row { dtype: GgmlType::Q8_0, id: 8,  name: "Q8_0", block_len: 32,  block_bytes: 34,  file_type: 7 },
    Row { dtype: GgmlType::Q4_K, id: 12, name: "Q4_K", block_len: 256, block_bytes: 144, file_type: 15 },
    Row { dtype: GgmlType::Q5_K, id: 13, name: "Q5_K", block_len: 256, block_bytes: 176, file_type: 17 },
    Row { dtype: GgmlType::Q6_K, id: 14, name: "Q6_K", block_len: 256, block_bytes: 210, file_type: 18 },
];

impl GgmlType {
    /// Every type of the table, in the order of the enum.
    pub const ALL: [GgmlType; TABLE.len()] = {
        let mut all = [GgmlType::F32; TABLE.len()];
        let mut i = 0;
        while i < TABLE.len() {
            assert!(TABLE[i].dtype as usize == i, "TABLE must be in the order of the enum");
            all[i] = TABLE[i].dtype;
            i += 1;
        }
        all
    };

    const fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// ggml's name, as llama.cpp and gguf-py print it: `Q4_K`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// The number that stands for the type in a GGUF file.
    pub const fn id(self) -> u32 {
        self.row().id
    }

    /// Elements in one block; 1 for the dense types.
    pub const fn block_len(self) -> usize {
        self.row().block_len
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        self.row().block_bytes
    }

    /// `general.file_type` of a file whose weights mostly have this type (llama.cpp's `llama_ftype`).
    pub const fn file_type(self) -> u32 {
        self.row().file_type
    }

    /// F32, F16 or BF16: an element stands alone and no scale is shared.
    pub const fn is_dense(self) -> bool {
        self.block_len() == 1
    }

    /// The type with this GGUF number.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        Self::ALL.into_iter().find(|t| t.id() == id)
    }

    /// The type with this name, in any case, with `-` for `_` allowed: `q4_k`, `Q8-0`.
    pub fn from_name(name: &str) -> Option<GgmlType> {
        let name = name.replace('-', "_");
        Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(&name))
    }

    /// The names of all types, for messages: `F32, F16, ...`.
    pub fn names() -> String {
        Self::ALL.map(GgmlType::name).join(", ")
    }

    /// Bytes of a row of `len` elements.
    ///
    /// # Errors
    /// `len` is not a whole number of blocks, or the size overflows.
    pub fn row_bytes(self, len: usize) -> Result<usize> {
        if !len.is_multiple_of(self.block_len()) {
            return Err(Error::new(Kind::PartialBlock {
                dtype: self.name(),
                block_len: self.block_len(),
                row_len: len as u64,
            }));
        }
        (len / self.block_len())
            .checked_mul(self.block_bytes())
            .ok_or_else(|| Error::new(Kind::SizeOverflow { what: "row bytes" }))
    }
}

impl std::fmt::Display for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
