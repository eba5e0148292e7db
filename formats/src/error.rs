//! One error type for every format: which file, where in it, what was expected and found, what to do.

use std::path::{Path, PathBuf};

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
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("row length {row_len} is not a multiple of the {dtype} block length {block_len}")]
    PartialBlock { dtype: &'static str, block_len: usize, row_len: u64 },
    #[error("{what} overflow 64 bits")]
    SizeOverflow { what: &'static str },
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
        None
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
            Place::Key(key) => write!(f, "key `{key}`: ")?,
            Place::Tensor(name) => write!(f, "tensor `{name}`: ")?,
        }
        write!(f, "{}", self.kind)?;
        match self.offset {
            Some(offset) => write!(f, " (at byte {offset})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            Kind::Io(e) => Some(e),
            _ => None,
        }
    }
}
