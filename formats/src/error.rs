//! One error type for every format: which file, where in it, what was expected and found, what to do.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::dtype::GgmlType;

/// Shorthand used across the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A refusal: the file, the place in it, and the way in which it is wrong.
#[derive(Debug)]
pub struct Error {
    /// The file, once known (readers fill it in with [`Error::in_file`]).
    pub path: Option<PathBuf>,
    /// The key or tensor at fault.
    pub place: Place,
    /// Byte offset in the file, where one is meaningful.
    pub offset: Option<u64>,
    /// What is wrong.
    pub kind: Kind,
}

/// Where in a file an error lies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Place {
    /// The file as a whole.
    #[default]
    File,
    /// The fixed header.
    Header,
    /// A metadata key.
    Key(String),
    /// A tensor.
    Tensor(String),
}

/// The ways to be wrong. One variant each, with what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages document the variants")]
pub enum Kind {
    // Bytes on disk.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("is not a regular file")]
    NotAFile,
    #[error("{what} needs {needed} bytes, {left} are left")]
    Truncated { what: &'static str, needed: u64, left: u64 },
    #[error("declares {found} {what}, at most {limit} are possible here")]
    TooMany { what: &'static str, found: u64, limit: u64 },
    #[error("{what} has {found} bytes, at most {limit} are allowed")]
    TooLong { what: &'static str, found: u64, limit: u64 },
    #[error("{what} is not UTF-8")]
    NotUtf8 { what: &'static str },

    // Sizes of tensors, in every format.
    #[error("row length {row_len} is not a multiple of the {dtype} block length {block_len}")]
    PartialBlock { dtype: &'static str, block_len: usize, row_len: u64 },
    #[error("{what} overflow 64 bits")]
    SizeOverflow { what: &'static str },
    #[error("data ends at byte {end}, the file at byte {len}")]
    PastEnd { end: u64, len: u64 },

    // GGUF: header and metadata.
    #[error("starts with {found:02x?}, a GGUF file with `GGUF`")]
    NotGguf { found: [u8; 4] },
    #[error("is a big-endian GGUF file, only little-endian files are supported")]
    BigEndian,
    #[error("has GGUF version {found}, versions 2 and 3 are supported")]
    UnsupportedVersion { found: u32 },
    #[error("the key is empty")]
    EmptyKey,
    #[error("the key appears twice")]
    DuplicateKey,
    #[error("value type {found} does not exist, GGUF has types 0 to 12")]
    UnknownValueType { found: u32 },
    #[error("is an array of arrays, which is not supported")]
    NestedArray,
    #[error("is {found}, an alignment is a power of two from 1 to {limit}")]
    BadAlignment { found: u64, limit: u64 },
    #[error(
        "is file {number} of {count}; a split model has files `NAME-00001-of-{count:05}.gguf` and so on, and is opened by the first"
    )]
    SplitFile { number: u64, count: u64 },
    #[error("is {found}, expected {expected} in this file of the split model")]
    WrongPart { expected: u64, found: u64 },
    #[error("is {expected}, the files of the split model hold {found} tensors")]
    WrongTensorCount { expected: u64, found: u64 },
    #[error("the key is missing")]
    MissingKey,
    #[error("is of type {found}, expected {expected}")]
    WrongValueType { expected: &'static str, found: Box<str> },
    #[error("value {found} does not fit {expected}")]
    ValueOutOfRange { expected: &'static str, found: Box<str> },

    // GGUF: tensors.
    #[error("the tensor name is empty")]
    EmptyTensorName,
    #[error("the tensor name appears twice")]
    DuplicateTensor,
    #[error("has {found} dimensions, at most {limit} are allowed")]
    TooManyDims { found: u64, limit: u64 },
    #[error("dimension {dim} is {found}")]
    NegativeDim { dim: usize, found: i64 },
    #[error("tensor type {found} does not exist")]
    UnknownTensorType { found: u32 },
    #[error("data lies at offset {found}, expected {expected}")]
    WrongOffset { expected: u64, found: u64 },
    #[error("values cannot be written in type {found}; writable: {}", GgmlType::writable_names())]
    ReadOnlyType { found: &'static str },
    #[error(
        "type {found} is written only with an importance matrix; without: {}",
        GgmlType::writable_names()
    )]
    ImportanceRequired { found: &'static str },
    #[error("the tensor is missing")]
    MissingTensor,
    #[error("does not lie in one of the {layers} layers, as `blk.N.` in its name should say")]
    NotInALayer { layers: u64 },

    // GGUF: writing.
    #[error("was given before tensor `{expected}` was complete")]
    OutOfOrder { expected: Box<str> },
    #[error("was not declared when the file was created")]
    UndeclaredTensor,
    #[error("needs {expected} bytes, {found} were given")]
    WrongLength { expected: u64, found: u64 },

    // Importance matrices.
    #[error("is `{found}`, an importance matrix has `imatrix`")]
    NotImatrix { found: Box<str> },
    #[error("holds no importance")]
    NoImportance,
    #[error("is of type {found}, expected {expected}")]
    WrongTensorType { expected: &'static str, found: &'static str },
    #[error("{what} {index} is `{value}`, expected a finite number of at least 0")]
    BadImportance { what: &'static str, index: u64, value: f32 },
    #[error("{values} values cannot be those of {experts} experts")]
    UnevenImportance { values: u64, experts: u64 },
    #[error("has {found} values of importance, the weight has {expected} columns over all experts")]
    ImportanceLength { expected: u64, found: u64 },

    // JSON, safetensors and checkpoint folders.
    #[error("is not the expected JSON: {0}")]
    Json(#[from] serde_json::Error),
    #[error("the last tensor ends at byte {end} of the data, the data at byte {len}")]
    TrailingData { end: u64, len: u64 },
    #[error("elements are of type {found}, which cannot be converted to f32; supported: {supported}")]
    UnsupportedDtype { found: Box<str>, supported: &'static str },
    #[error("has neither `model.safetensors` nor `model.safetensors.index.json`")]
    NoWeights,
    #[error("names the shard `{shard}`, which is not a plain file name")]
    BadShardName { shard: Box<str> },
    #[error("names the shard `{shard}`, which does not exist")]
    MissingShard { shard: Box<str> },
    #[error("is not in the shard `{shard}`, where the index has it")]
    NotInShard { shard: Box<str> },
    #[error("lies in two shards, `{first}` and `{second}`")]
    TensorInTwoShards { first: Box<str>, second: Box<str> },

    // Quantized weights of checkpoint folders.
    #[error("has elements of type {found}, expected {expected}")]
    WrongDtype { expected: &'static str, found: Box<str> },
    #[error("has {found}, expected {expected}")]
    WrongQuantState { expected: &'static str, found: Box<str> },
    #[error("entry {entry} is `{found}`, the {table} table has `{expected}`")]
    WrongTable { table: &'static str, entry: usize, expected: f32, found: f32 },
    #[error("element {index} is `{value}`, and a scale is a finite number")]
    BadScale { index: u64, value: f32 },
    #[error("quantization `{found}` is not supported; supported: {supported}")]
    UnsupportedQuantization { found: Box<str>, supported: &'static str },

    // PEFT adapter folders.
    #[error("is {found}, expected a {expected}")]
    WrongSetting { expected: &'static str, found: Box<str> },
    #[error("is {found}, which is not supported; supported: {supported}")]
    UnsupportedSetting { found: Box<str>, supported: &'static str },
    #[error("pattern `{pattern}` is not usable: {reason}")]
    BadPattern { pattern: Box<str>, reason: Box<str> },
    #[error("does not belong into this adapter; supported: {supported}")]
    UnexpectedTensor { supported: &'static str },
    #[error("has shape {found}, expected {expected}")]
    WrongShape { expected: Box<str>, found: Box<str> },
    #[error("holds no adapter tensors")]
    NoTensors,
    #[error("element {index} is `{value}`, and only finite numbers can be quantized")]
    NotFinite { index: u64, value: f32 },
}

impl Error {
    /// An error without file or place; add them with the builder methods below.
    pub fn new(kind: Kind) -> Error {
        Error { path: None, place: Place::File, offset: None, kind }
    }

    /// Names the file.
    #[must_use]
    pub fn in_file(mut self, path: &Path) -> Error {
        self.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// Names the key or tensor.
    #[must_use]
    pub fn at(mut self, place: Place) -> Error {
        if self.place == Place::File {
            self.place = place;
        }
        self
    }

    /// Names the byte offset.
    #[must_use]
    pub fn offset(mut self, offset: u64) -> Error {
        self.offset.get_or_insert(offset);
        self
    }

    /// What the user can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        let hint = match &self.kind {
            Kind::Io(e) => match e.kind() {
                ErrorKind::NotFound => "check the path",
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
                    "choose a folder in which you may read and write"
                }
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "free some space on the disk",
                _ => return None,
            },
            Kind::Truncated { .. } | Kind::PastEnd { .. } => "the download may be incomplete; fetch it again",
            Kind::TrailingData { .. }
            | Kind::TooMany { .. }
            | Kind::WrongOffset { .. }
            | Kind::NotUtf8 { .. } => "the file is damaged; fetch or convert it again",
            Kind::NotGguf { .. } => "give the path of a `.gguf` file",
            Kind::BigEndian => "convert the model again for a little-endian machine",
            Kind::UnsupportedVersion { .. } => "convert the model again with a current converter",
            Kind::SplitFile { .. } => "give the path of the first file, under the name it was published with",
            Kind::WrongPart { .. } | Kind::WrongTensorCount { .. } => {
                "the files do not belong together; fetch all of them again from one place"
            }
            Kind::NoWeights => "give the folder of a safetensors checkpoint, or a `.gguf` file",
            Kind::MissingShard { .. } => "the download may be incomplete; fetch the missing shard",
            Kind::UnsupportedQuantization { .. } => {
                "give the unquantized checkpoint, with `--base-quant nf4` to quantize it at load, or a GGUF"
            }
            Kind::WrongTable { .. } | Kind::WrongQuantState { .. } | Kind::WrongDtype { .. } => {
                "quantize the model again with a current bitsandbytes, or with `qpeft quantize`"
            }
            Kind::UnsupportedSetting { .. } => "convert the adapter to a plain LoRA or DoRA with PEFT first",
            Kind::NotImatrix { .. } | Kind::NoImportance => {
                "give a file that `llama-imatrix` wrote for this model"
            }
            Kind::ImportanceLength { .. } => "give the importance matrix of this model",
            Kind::ReadOnlyType { .. } => "choose one of the writable types",
            Kind::ImportanceRequired { .. } => {
                "give an importance matrix (`--imatrix FILE`), or another type"
            }
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

impl From<std::io::Error> for Error {
    fn from(e: std::io::Error) -> Error {
        Error::new(Kind::Io(e))
    }
}

impl From<serde_json::Error> for Error {
    fn from(e: serde_json::Error) -> Error {
        Error::new(Kind::Json(e))
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(path) = &self.path {
            write!(f, "`{}`: ", path.display())?;
        }
        match &self.place {
            Place::File => {}
            Place::Header => write!(f, "header: ")?,
            Place::Key(key) => write!(f, "key `{}`: ", Shown(key))?,
            Place::Tensor(name) => write!(f, "tensor `{}`: ", Shown(name))?,
        }
        write!(f, "{}", self.kind)?;
        match self.offset {
            Some(offset) => write!(f, " (at byte {offset})"),
            None => Ok(()),
        }
    }
}

/// A name out of a file, as a message shows it: control characters, which could move a terminal's cursor,
/// are spelled out, and a long name is cut.
struct Shown<'a>(&'a str);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        use std::fmt::Write as _;
        for (i, c) in self.0.chars().enumerate() {
            if i == LONGEST_SHOWN {
                return f.write_str("...");
            }
            if c.is_control() { write!(f, "{}", c.escape_default())? } else { f.write_char(c)? }
        }
        Ok(())
    }
}

/// Characters of a name that a message shows; real names are half as long.
const LONGEST_SHOWN: usize = 200;

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            Kind::Io(e) => Some(e),
            Kind::Json(e) => Some(e),
            _ => None,
        }
    }
}
