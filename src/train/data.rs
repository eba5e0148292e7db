//! A file of records as examples to train on: token ids, and which of them carry loss.
//!
//! | record | trained by default |
//! |---|---|
//! | `{"messages": [{"role", "content"}, ...]}` | every assistant turn and its end-of-turn token |
//! | `{"prompt", "completion"}` (strings, or lists of messages), or other fields by name | the completion and the token that ends it |
//! | `{"text"}` | everything |
//! | `{"input_ids", "labels"}` (labels optional) | what `labels` does not mark with -100 |
//! | a `.txt` file | everything, in windows of `max_seq_length` tokens |
//!
//! The first record of a file decides its shape, and every other line is held to it. With a chat template,
//! prompt and completion become a user and an assistant turn. Order, masks and ids depend on nothing but
//! the file, the tokenizer and the options.

mod batch;
mod dataset;
mod error;
mod mask;
mod record;
mod sampler;

use std::path::Path;

use rayon::prelude::*;

use crate::model::chat::ChatTemplate;
use crate::model::tokenizer::Tokenizer;

pub use batch::Batch;
pub use dataset::{Dataset, EvalSize, Skipped};
pub use error::{DataError, DataErrorKind};
pub use sampler::Sampler;

use error::Result;
use mask::Masker;
use record::{Record, Shape};

/// The label of a token that carries no loss.
pub const IGNORE: i32 = -100;

/// Lines that are tokenized between two reports of progress.
const CHUNK: usize = 256;

/// One sequence. `labels[t]` is the token *at* t, or [`IGNORE`]: the model shifts, so the logits at t are
/// held against `labels[t + 1]` and `labels[0]` never counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids, at most `max_seq_length`.
    pub input_ids: Vec<u32>,
    /// As long as `input_ids`.
    pub labels: Vec<i32>,
}

impl Example {
    /// Tokens that carry loss.
    pub fn supervised(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&label| label != IGNORE).count()
    }
}

/// The share of an example's tokens that carry no loss, 0 to 1.
pub fn masked_share(example: &Example) -> f32 {
    let masked = example.labels.iter().filter(|&&label| label == IGNORE).count();
    masked as f32 / example.labels.len().max(1) as f32
}

/// How records become examples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataOptions {
    /// Longer examples are cut off at their end.
    pub max_seq_length: usize,
    /// The field that holds the prompt, `prompt` unless given.
    pub prompt_field: Option<String>,
    /// The field that holds the completion, `completion` unless given.
    pub completion_field: Option<String>,
    /// Loss on prompts too.
    pub train_on_prompt: bool,
    /// Whether prompt and completion become turns of the chat template, if there is one. Without it they
    /// are written one after the other, and end of text follows.
    pub use_chat_template: bool,
}

impl Default for DataOptions {
    fn default() -> DataOptions {
        DataOptions {
            max_seq_length: 1024,
            prompt_field: None,
            completion_field: None,
            train_on_prompt: false,
            use_chat_template: true,
        }
    }
}

/// Reads `path`: a `.txt` file is one document, everything else JSON Lines. `progress` hears the bytes
/// that are done and the bytes in all. Fails at the first bad line; an example that is left without loss
/// (its completion was cut away) is skipped and listed, unless that is all of them.
pub fn load(
    path: &Path,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &DataOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Dataset> {
    let at = |kind| DataError { path: path.to_owned(), line: None, kind };
    if options.max_seq_length < 2 {
        return Err(at(DataErrorKind::MaxSeqLength { found: options.max_seq_length }));
    }
    let bytes = std::fs::read(path).map_err(|e| at(DataErrorKind::Io(e)))?;
    let hash = blake3::hash(&bytes).to_hex().to_string();
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(&bytes);
    let mut dataset =
        Dataset { examples: Vec::new(), source: path.to_owned(), hash, skipped: Vec::new(), truncated: 0 };
    let masker = Masker { tokenizer, template: template.filter(|_| options.use_chat_template), options };
    if path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("txt")) {
        let text = std::str::from_utf8(bytes).map_err(|e| DataError {
            line: Some(bytes[..e.valid_up_to()].split(|&b| b == b'\n').count()),
            ..at(DataErrorKind::NotUtf8)
        })?;
        dataset.examples = masker.windows(text).map_err(at)?;
        progress(bytes.len() as u64, bytes.len() as u64);
    } else {
        load_lines(path, bytes, &masker, &mut dataset, progress)?;
    }
    match (dataset.examples.is_empty(), dataset.skipped.first()) {
        (false, _) => Ok(dataset),
        (true, None) => Err(at(DataErrorKind::Empty)),
        (true, Some(first)) => Err(DataError {
            line: Some(first.line),
            ..at(DataErrorKind::NoSupervised {
                prompt_tokens: first.prompt_tokens,
                max_seq_length: options.max_seq_length,
                examples: dataset.skipped.len(),
            })
        }),
    }
}

fn load_lines(
    path: &Path,
    bytes: &[u8],
    masker: &Masker,
    dataset: &mut Dataset,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let lines: Vec<(usize, &[u8])> = bytes
        .split(|&b| b == b'\n')
        .enumerate()
        .map(|(i, line)| (i + 1, line.trim_ascii()))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    let Some(&(first_number, first)) = lines.first() else { return Ok(()) };
    let at = |line: usize, kind| DataError { path: path.to_owned(), line: Some(line), kind };
    let shape = record::parse(first)
        .and_then(|object| Shape::detect(&object, masker.options))
        .map_err(|kind| at(first_number, kind))?;
    let total = bytes.len() as u64;
    for chunk in lines.chunks(CHUNK) {
        let results: Vec<Result<Vec<mask::Made>, DataErrorKind>> = chunk
            .par_iter()
            .map(|(_, line)| {
                let record = Record::read(&record::parse(line)?, &shape)?;
                masker.examples(record)
            })
            .collect();
        for (&(line, _), made) in chunk.iter().zip(results) {
            for made in made.map_err(|kind| at(line, kind))? {
                if made.example.supervised() == 0 {
                    dataset.skipped.push(Skipped { line, prompt_tokens: made.prompt_tokens });
                    continue;
                }
                dataset.truncated += usize::from(made.truncated);
                dataset.examples.push(made.example);
            }
        }
        let end =
            chunk.last().map_or(0, |(_, line)| line.as_ptr_range().end as usize - bytes.as_ptr() as usize);
        progress(end as u64, total);
    }
    progress(total, total);
    Ok(())
}

#[cfg(test)]
mod tests;
