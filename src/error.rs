//! The library's error: a refusal of a format, of a kernel, or of the pipeline itself, with its hint.

/// Shorthand used across the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the pipeline stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file is wrong.
    #[error(transparent)]
    Format(#[from] qpeft_formats::Error),
    /// An op or a device refused.
    #[error(transparent)]
    Kernel(#[from] qpeft_kernels::Error),
    /// There is no usable tokenizer, or it refused a text.
    #[error(transparent)]
    Tokenizer(#[from] crate::model::tokenizer::TokenizerError),
    /// The pieces do not fit together, or the pipeline does not support them.
    #[error("{message}")]
    Refused {
        /// What, where, expected and found.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
}

impl Error {
    /// A refusal without a hint.
    pub fn refused(message: impl Into<String>) -> Error {
        Error::Refused { message: message.into(), hint: None }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn with_hint(self, text: impl Into<String>) -> Error {
        match self {
            Error::Refused { message, .. } => Error::Refused { message, hint: Some(text.into()) },
            other => other,
        }
    }

    /// What the user can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Format(e) => e.hint(),
            Error::Kernel(e) => e.hint(),
            Error::Tokenizer(e) => e.hint(),
            Error::Refused { hint, .. } => hint.clone(),
        }
    }
}
