//! What can be wrong with a data file, with the line that is wrong and what to do about it.

use std::path::PathBuf;

use crate::model::chat::ChatTemplateError;
use crate::model::tokenizer::TokenizerError;

/// Shorthand of this module.
pub(super) type Result<T, E = DataError> = std::result::Result<T, E>;

/// A refusal: the file, the line and what is wrong with it.
#[derive(Debug)]
pub struct DataError {
    /// The data file.
    pub path: PathBuf,
    /// The line, from 1, where one is at fault.
    pub line: Option<usize>,
    /// What is wrong.
    pub kind: DataErrorKind,
}

/// The shapes that a record can have, for messages.
pub(super) const SHAPES: &str = r#"{"messages": [{"role", "content"}, ...]}, {"prompt", "completion"}, {"text"} or {"input_ids", "labels"}"#;

/// The ways in which data can be wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages document the variants")]
pub enum DataErrorKind {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("the file holds no examples")]
    Empty,
    #[error("the text is not UTF-8")]
    NotUtf8,
    #[error("not a JSON object: {message}")]
    NotJson { message: String },
    #[error("expected {SHAPES}, found an object with {}", quoted(keys))]
    UnknownShape { keys: Vec<String> },
    #[error(
        "expected the field {} as in the first record, found an object with {}",
        quoted(std::slice::from_ref(field)),
        quoted(keys)
    )]
    MissingField { field: String, keys: Vec<String> },
    #[error("field `{field}`: expected {expected}, found {found}")]
    Field { field: String, expected: &'static str, found: String },
    #[error("`{field}` is a list of messages, which needs a chat template, and there is none")]
    NeedsTemplate { field: String },
    #[error("the conversation has no assistant turn to train on")]
    NoAssistant,
    #[error("the conversation begins with an assistant turn")]
    AssistantFirst,
    #[error(
        "the chat template writes the turns before assistant turn {turn} in another way when that turn follows"
    )]
    UnstableTemplate { turn: usize },
    #[error("`input_ids[{index}]` is {id}, outside of the vocabulary of {vocab_size}")]
    TokenId { index: usize, id: i64, vocab_size: usize },
    #[error("`labels[{index}]` is {label}, expected -100 or a token of the vocabulary of {vocab_size}")]
    Label { index: usize, label: i64, vocab_size: usize },
    #[error("`labels` has {labels} entries and `input_ids` {input_ids}, expected as many")]
    LabelCount { input_ids: usize, labels: usize },
    #[error("`attention_mask` has {mask} entries and `input_ids` {input_ids}, expected as many")]
    MaskCount { input_ids: usize, mask: usize },
    #[error("`attention_mask[{index}]` is {found}, expected 1: zeros stand before the tokens or behind them")]
    Mask { index: usize, found: i64 },
    #[error("the text must end with an end-of-text token, and the tokenizer names none")]
    NoEos,
    #[error(
        "no example has a token to train on ({examples} read): the first has {prompt_tokens} tokens without loss before its completion, and max_seq_length is {max_seq_length}"
    )]
    NoSupervised { prompt_tokens: usize, max_seq_length: usize, examples: usize },
    #[error("max_seq_length is {found}, expected at least 2: a token is learned from the one before it")]
    MaxSeqLength { found: usize },
    #[error(
        "{wanted} examples are wanted for evaluation, and there are {found}: at least one must remain to train on"
    )]
    EvalSize { wanted: usize, found: usize },
    #[error(transparent)]
    Template(#[from] ChatTemplateError),
    #[error(transparent)]
    Tokenizer(Box<TokenizerError>),
}

impl From<TokenizerError> for DataErrorKind {
    fn from(e: TokenizerError) -> DataErrorKind {
        DataErrorKind::Tokenizer(Box::new(e))
    }
}

impl DataError {
    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        let hint = match &self.kind {
            DataErrorKind::Template(e) => return e.hint(),
            DataErrorKind::Tokenizer(e) => return e.hint(),
            DataErrorKind::NotJson { .. } => "write one JSON object per line (JSON Lines)",
            DataErrorKind::UnknownShape { .. } => {
                "name the fields of a pair, for example `--prompt-field question --completion-field answer`"
            }
            DataErrorKind::MissingField { .. } => "keep one shape of record per file",
            DataErrorKind::NeedsTemplate { .. } => {
                "use a model whose files have a chat template, or write prompt and completion as strings"
            }
            DataErrorKind::NoAssistant => {
                "add the answer as a message with the role `assistant`, or train on everything with `--train-on-prompt`"
            }
            DataErrorKind::AssistantFirst => "put the message that is answered before it",
            DataErrorKind::UnstableTemplate { .. } => {
                "write the record as `prompt` and `completion`, and format them plainly with `--no-chat-template`"
            }
            DataErrorKind::TokenId { .. } | DataErrorKind::Label { .. } => {
                "tokenize the data with this model's own tokenizer"
            }
            DataErrorKind::NoSupervised { prompt_tokens, max_seq_length, .. }
                if prompt_tokens >= max_seq_length =>
            {
                return Some(format!("raise `--max-seq-length` above {prompt_tokens}"));
            }
            DataErrorKind::NoSupervised { .. } => {
                "give every example at least one token whose label is not -100"
            }
            DataErrorKind::NoEos => "give a tokenizer that names one with `--tokenizer FILE`",
            _ => return None,
        };
        Some(hint.into())
    }
}

impl std::fmt::Display for DataError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}`", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        write!(f, ": {}", self.kind)
    }
}

impl std::error::Error for DataError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            DataErrorKind::Io(e) => Some(e),
            DataErrorKind::Template(e) => Some(e),
            DataErrorKind::Tokenizer(e) => Some(e),
            _ => None,
        }
    }
}

fn quoted(keys: &[String]) -> String {
    if keys.is_empty() {
        return "no fields".into();
    }
    let quoted: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
    quoted.join(", ")
}
