//! The ways in which a tokenizer can be refused, each with what to do.

use std::path::PathBuf;

use super::pre;

/// Shorthand of this module.
pub(super) type Result<T, E = TokenizerError> = std::result::Result<T, E>;

/// A refusal of a vocabulary, or of a text or id that does not fit it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages document the variants")]
pub enum TokenizerError {
    #[error(transparent)]
    Metadata(#[from] qpeft_formats::Error),
    #[error("key `tokenizer.ggml.model`: unsupported tokenizer `{found}`, expected `gpt2` or `llama`")]
    UnknownModel { found: String },
    #[error("key `tokenizer.ggml.pre`: unknown pre-tokenizer `{found}`, known are {}", pre::names())]
    UnknownPre { found: String },
    #[error(
        "key `tokenizer.ggml.pre` is missing: the file does not say how text is split, known ways are {}",
        pre::names()
    )]
    MissingPre,
    #[error("key `tokenizer.ggml.tokens`: the vocabulary is empty")]
    EmptyVocabulary,
    #[error("key `{key}` is missing")]
    MissingKey { key: &'static str },
    #[error("key `{key}`: expected {expected} entries, one per token, found {found}")]
    Length { key: &'static str, expected: usize, found: usize },
    #[error(
        "key `tokenizer.ggml.merges`: merge {index} is `{merge}`, expected two tokens with a space between"
    )]
    MergeForm { index: usize, merge: String },
    #[error("{place}: merge {index} names `{token}`, which is not in the vocabulary")]
    MergeToken { place: String, index: usize, token: String },
    #[error("key `{key}`: token {id} is outside of the vocabulary of {vocab_size}")]
    SpecialId { key: &'static str, id: u32, vocab_size: usize },
    #[error("the vocabulary has neither a token for byte `0x{byte:02X}` nor an unknown token")]
    Byte { byte: u8 },
    #[error("token {id} is outside of the vocabulary of {vocab_size}")]
    UnknownId { id: u32, vocab_size: usize },
    #[error("`{}` has no `tokenizer.json`", dir.display())]
    NoTokenizerJson { dir: PathBuf },
    #[error("`{}`: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("`{}`: {message}", path.display())]
    Json { path: PathBuf, message: String },
    #[error("`{}`: `{key}` names the token `{token}`, which is not in the vocabulary", path.display())]
    NamedToken { path: PathBuf, key: &'static str, token: String },
    #[error("the text could not be tokenized: {0}")]
    Library(String),
}

impl TokenizerError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            TokenizerError::Metadata(e) => e.hint(),
            TokenizerError::UnknownModel { .. }
            | TokenizerError::UnknownPre { .. }
            | TokenizerError::MissingPre => {
                Some("give the model's own tokenizer with `--tokenizer FILE` (a tokenizer.json)".into())
            }
            TokenizerError::NoTokenizerJson { .. } => Some(
                "save the tokenizer in its fast form (transformers: `AutoTokenizer.from_pretrained(dir).save_pretrained(dir)`)"
                    .into(),
            ),
            TokenizerError::EmptyVocabulary
            | TokenizerError::MissingKey { .. }
            | TokenizerError::Length { .. }
            | TokenizerError::MergeForm { .. }
            | TokenizerError::MergeToken { .. }
            | TokenizerError::SpecialId { .. } => {
                Some("the file is damaged or was converted wrongly; convert the model again".into())
            }
            _ => None,
        }
    }
}
