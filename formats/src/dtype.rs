//! The element and block types that a ggml tensor can have: number, name, block length, block bytes.
//!
//! One table, [`GgmlType::ALL`], serves reader, writer, codecs and `--quant`. Numbers 4, 5, 31 to 33
//! and 36 to 38 are those of types that ggml removed.

use crate::error::{Error, Kind, Result};

/// A tensor type of ggml, as a GGUF file can declare it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)]
#[allow(missing_docs, reason = "the names are ggml's own and say it all")]
#[rustfmt::skip]
pub enum GgmlType {
    F32, F16, BF16, F64, I8, I16, I32, I64,
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1,
    Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K,
    IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ4_NL, IQ4_XS,
    TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0,
}

/// Whether values can be written in a type, and what an importance matrix does there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quantizer {
    /// The type is read only.
    Never,
    /// Quantizes; importance makes no difference.
    Plain,
    /// Quantizes, and better with importance.
    Weighted,
    /// Quantizes only with importance.
    Required,
}

/// What the table knows of one type.
#[derive(Debug)]
struct Row {
    dtype: GgmlType,
    id: u32,
    name: &'static str,
    block_len: usize,
    block_bytes: usize,
    quantizer: Quantizer,
}

#[rustfmt::skip]
const TABLE: [Row; 35] = [
    Row { dtype: GgmlType::F32,     id: 0,  name: "F32",     block_len: 1,   block_bytes: 4,   quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::F16,     id: 1,  name: "F16",     block_len: 1,   block_bytes: 2,   quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::BF16,    id: 30, name: "BF16",    block_len: 1,   block_bytes: 2,   quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::F64,     id: 28, name: "F64",     block_len: 1,   block_bytes: 8,   quantizer: Quantizer::Never },
    Row { dtype: GgmlType::I8,      id: 24, name: "I8",      block_len: 1,   block_bytes: 1,   quantizer: Quantizer::Never },
    Row { dtype: GgmlType::I16,     id: 25, name: "I16",     block_len: 1,   block_bytes: 2,   quantizer: Quantizer::Never },
    Row { dtype: GgmlType::I32,     id: 26, name: "I32",     block_len: 1,   block_bytes: 4,   quantizer: Quantizer::Never },
    Row { dtype: GgmlType::I64,     id: 27, name: "I64",     block_len: 1,   block_bytes: 8,   quantizer: Quantizer::Never },
    Row { dtype: GgmlType::Q4_0,    id: 2,  name: "Q4_0",    block_len: 32,  block_bytes: 18,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q4_1,    id: 3,  name: "Q4_1",    block_len: 32,  block_bytes: 20,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q5_0,    id: 6,  name: "Q5_0",    block_len: 32,  block_bytes: 22,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q5_1,    id: 7,  name: "Q5_1",    block_len: 32,  block_bytes: 24,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q8_0,    id: 8,  name: "Q8_0",    block_len: 32,  block_bytes: 34,  quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::Q8_1,    id: 9,  name: "Q8_1",    block_len: 32,  block_bytes: 36,  quantizer: Quantizer::Never },
    Row { dtype: GgmlType::Q2_K,    id: 10, name: "Q2_K",    block_len: 256, block_bytes: 84,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q3_K,    id: 11, name: "Q3_K",    block_len: 256, block_bytes: 110, quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q4_K,    id: 12, name: "Q4_K",    block_len: 256, block_bytes: 144, quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q5_K,    id: 13, name: "Q5_K",    block_len: 256, block_bytes: 176, quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q6_K,    id: 14, name: "Q6_K",    block_len: 256, block_bytes: 210, quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::Q8_K,    id: 15, name: "Q8_K",    block_len: 256, block_bytes: 292, quantizer: Quantizer::Never },
    Row { dtype: GgmlType::IQ1_S,   id: 19, name: "IQ1_S",   block_len: 256, block_bytes: 50,  quantizer: Quantizer::Required },
    Row { dtype: GgmlType::IQ1_M,   id: 29, name: "IQ1_M",   block_len: 256, block_bytes: 56,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::IQ2_XXS, id: 16, name: "IQ2_XXS", block_len: 256, block_bytes: 66,  quantizer: Quantizer::Required },
    Row { dtype: GgmlType::IQ2_XS,  id: 17, name: "IQ2_XS",  block_len: 256, block_bytes: 74,  quantizer: Quantizer::Required },
    Row { dtype: GgmlType::IQ2_S,   id: 22, name: "IQ2_S",   block_len: 256, block_bytes: 82,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::IQ3_XXS, id: 18, name: "IQ3_XXS", block_len: 256, block_bytes: 98,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::IQ3_S,   id: 21, name: "IQ3_S",   block_len: 256, block_bytes: 110, quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::IQ4_NL,  id: 20, name: "IQ4_NL",  block_len: 32,  block_bytes: 18,  quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::IQ4_XS,  id: 23, name: "IQ4_XS",  block_len: 256, block_bytes: 136, quantizer: Quantizer::Weighted },
    Row { dtype: GgmlType::TQ1_0,   id: 34, name: "TQ1_0",   block_len: 256, block_bytes: 54,  quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::TQ2_0,   id: 35, name: "TQ2_0",   block_len: 256, block_bytes: 66,  quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::MXFP4,   id: 39, name: "MXFP4",   block_len: 32,  block_bytes: 17,  quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::NVFP4,   id: 40, name: "NVFP4",   block_len: 64,  block_bytes: 36,  quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::Q1_0,    id: 41, name: "Q1_0",    block_len: 128, block_bytes: 18,  quantizer: Quantizer::Plain },
    Row { dtype: GgmlType::Q2_0,    id: 42, name: "Q2_0",    block_len: 64,  block_bytes: 18,  quantizer: Quantizer::Plain },
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

    /// Whether values can be written in the type, and what an importance matrix does there.
    pub const fn quantizer(self) -> Quantizer {
        self.row().quantizer
    }

    /// Refuses a type in which values cannot be written with what is at hand.
    ///
    /// # Errors
    /// The type is read only, or needs importance and there is none.
    pub fn require_quantizer(self, has_importance: bool) -> Result<()> {
        match self.quantizer() {
            Quantizer::Never => Err(Error::new(Kind::ReadOnlyType { found: self.name() })),
            Quantizer::Required if !has_importance => {
                Err(Error::new(Kind::ImportanceRequired { found: self.name() }))
            }
            _ => Ok(()),
        }
    }

    /// The types in which values can be written without importance.
    pub fn writable() -> impl Iterator<Item = GgmlType> {
        Self::ALL.into_iter().filter(|t| t.require_quantizer(false).is_ok())
    }

    /// F32, F16 or BF16: an element stands alone and no scale is shared.
    pub const fn is_dense(self) -> bool {
        self.block_len() == 1
    }

    /// The type with this GGUF number; none for numbers that ggml removed or never had.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        Self::ALL.into_iter().find(|t| t.id() == id)
    }

    /// The type with this name, in any case, with `-` for `_` allowed: `q4_k`, `Q8-0`.
    pub fn from_name(name: &str) -> Option<GgmlType> {
        let name = name.replace('-', "_");
        Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(&name))
    }

    /// The names of the types of [`GgmlType::writable`], for messages: `F32, F16, ...`.
    pub fn writable_names() -> String {
        Self::writable().map(GgmlType::name).collect::<Vec<_>>().join(", ")
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
