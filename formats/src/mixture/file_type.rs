//! What a whole file can be quantized to: name, number in `general.file_type`, type of most tensors.
//!
//! One table, [`FileType::ALL`]; numbers 4 to 6 and 33 to 35 are those of file types that llama.cpp removed.

use crate::dtype::GgmlType;

/// A file type of llama.cpp (`llama_ftype`): a mixture of tensor types under one name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types)]
#[allow(missing_docs, reason = "the names are llama.cpp's own and say it all")]
#[rustfmt::skip]
pub enum FileType {
    F32, F16, BF16,
    Q1_0, Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0,
    Q2_K, Q2_K_S, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K,
    IQ1_S, IQ1_M, IQ2_XXS, IQ2_XS, IQ2_S, IQ2_M, IQ3_XXS, IQ3_XS, IQ3_S, IQ3_M, IQ4_NL, IQ4_XS,
    TQ1_0, TQ2_0, MXFP4_MOE,
}

/// What the table knows of one file type.
struct Row {
    file_type: FileType,
    name: &'static str,
    id: u32,
    default: GgmlType,
}

#[rustfmt::skip]
const TABLE: [Row; 35] = [
    Row { file_type: FileType::F32,       name: "F32",       id: 0,  default: GgmlType::F32 },
    Row { file_type: FileType::F16,       name: "F16",       id: 1,  default: GgmlType::F16 },
    Row { file_type: FileType::BF16,      name: "BF16",      id: 32, default: GgmlType::BF16 },
    Row { file_type: FileType::Q1_0,      name: "Q1_0",      id: 40, default: GgmlType::Q1_0 },
    Row { file_type: FileType::Q2_0,      name: "Q2_0",      id: 41, default: GgmlType::Q2_0 },
    Row { file_type: FileType::Q4_0,      name: "Q4_0",      id: 2,  default: GgmlType::Q4_0 },
    Row { file_type: FileType::Q4_1,      name: "Q4_1",      id: 3,  default: GgmlType::Q4_1 },
    Row { file_type: FileType::Q5_0,      name: "Q5_0",      id: 8,  default: GgmlType::Q5_0 },
    Row { file_type: FileType::Q5_1,      name: "Q5_1",      id: 9,  default: GgmlType::Q5_1 },
    Row { file_type: FileType::Q8_0,      name: "Q8_0",      id: 7,  default: GgmlType::Q8_0 },
    Row { file_type: FileType::Q2_K,      name: "Q2_K",      id: 10, default: GgmlType::Q2_K },
    Row { file_type: FileType::Q2_K_S,    name: "Q2_K_S",    id: 21, default: GgmlType::Q2_K },
    Row { file_type: FileType::Q3_K_S,    name: "Q3_K_S",    id: 11, default: GgmlType::Q3_K },
    Row { file_type: FileType::Q3_K_M,    name: "Q3_K_M",    id: 12, default: GgmlType::Q3_K },
    Row { file_type: FileType::Q3_K_L,    name: "Q3_K_L",    id: 13, default: GgmlType::Q3_K },
    Row { file_type: FileType::Q4_K_S,    name: "Q4_K_S",    id: 14, default: GgmlType::Q4_K },
    Row { file_type: FileType::Q4_K_M,    name: "Q4_K_M",    id: 15, default: GgmlType::Q4_K },
    Row { file_type: FileType::Q5_K_S,    name: "Q5_K_S",    id: 16, default: GgmlType::Q5_K },
    Row { file_type: FileType::Q5_K_M,    name: "Q5_K_M",    id: 17, default: GgmlType::Q5_K },
    Row { file_type: FileType::Q6_K,      name: "Q6_K",      id: 18, default: GgmlType::Q6_K },
    Row { file_type: FileType::IQ1_S,     name: "IQ1_S",     id: 24, default: GgmlType::IQ1_S },
    Row { file_type: FileType::IQ1_M,     name: "IQ1_M",     id: 31, default: GgmlType::IQ1_M },
    Row { file_type: FileType::IQ2_XXS,   name: "IQ2_XXS",   id: 19, default: GgmlType::IQ2_XXS },
    Row { file_type: FileType::IQ2_XS,    name: "IQ2_XS",    id: 20, default: GgmlType::IQ2_XS },
    Row { file_type: FileType::IQ2_S,     name: "IQ2_S",     id: 28, default: GgmlType::IQ2_XS },
    Row { file_type: FileType::IQ2_M,     name: "IQ2_M",     id: 29, default: GgmlType::IQ2_S },
    Row { file_type: FileType::IQ3_XXS,   name: "IQ3_XXS",   id: 23, default: GgmlType::IQ3_XXS },
    Row { file_type: FileType::IQ3_XS,    name: "IQ3_XS",    id: 22, default: GgmlType::IQ3_S },
    Row { file_type: FileType::IQ3_S,     name: "IQ3_S",     id: 26, default: GgmlType::IQ3_S },
    Row { file_type: FileType::IQ3_M,     name: "IQ3_M",     id: 27, default: GgmlType::IQ3_S },
    Row { file_type: FileType::IQ4_NL,    name: "IQ4_NL",    id: 25, default: GgmlType::IQ4_NL },
    Row { file_type: FileType::IQ4_XS,    name: "IQ4_XS",    id: 30, default: GgmlType::IQ4_XS },
    Row { file_type: FileType::TQ1_0,     name: "TQ1_0",     id: 36, default: GgmlType::TQ1_0 },
    Row { file_type: FileType::TQ2_0,     name: "TQ2_0",     id: 37, default: GgmlType::TQ2_0 },
    Row { file_type: FileType::MXFP4_MOE, name: "MXFP4_MOE", id: 38, default: GgmlType::MXFP4 },
];

/// Further names, as llama-quantize takes them.
const ALIASES: [(&str, FileType); 3] =
    [("Q3_K", FileType::Q3_K_M), ("Q4_K", FileType::Q4_K_M), ("Q5_K", FileType::Q5_K_M)];

impl FileType {
    /// Every file type of the table, in the order of the enum.
    pub const ALL: [FileType; TABLE.len()] = {
        let mut all = [FileType::F32; TABLE.len()];
        let mut i = 0;
        while i < TABLE.len() {
            assert!(TABLE[i].file_type as usize == i, "TABLE must be in the order of the enum");
            all[i] = TABLE[i].file_type;
            i += 1;
        }
        all
    };

    const fn row(self) -> &'static Row {
        &TABLE[self as usize]
    }

    /// llama.cpp's name: `Q4_K_M`.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// The number that stands for it in `general.file_type`.
    pub const fn id(self) -> u32 {
        self.row().id
    }

    /// The type of the tensors for which no rule says otherwise.
    pub const fn default_type(self) -> GgmlType {
        self.row().default
    }

    /// The file type with this number.
    pub fn from_id(id: u32) -> Option<FileType> {
        Self::ALL.into_iter().find(|t| t.id() == id)
    }

    /// The file type with this name or alias, in any case, with `-` for `_` allowed: `q4_k_m`, `Q4_K`.
    pub fn from_name(name: &str) -> Option<FileType> {
        let name = name.replace('-', "_");
        let named = Self::ALL.into_iter().find(|t| t.name().eq_ignore_ascii_case(&name));
        named.or_else(|| {
            ALIASES.into_iter().find(|(alias, _)| alias.eq_ignore_ascii_case(&name)).map(|(_, t)| t)
        })
    }
}

impl std::fmt::Display for FileType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
