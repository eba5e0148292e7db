//! The examples of a file, what was left out of it, and the part that is held back for evaluation.

use std::path::PathBuf;

use super::Example;
use super::error::{DataError, DataErrorKind, Result};
use super::sampler::shuffled;
use crate::model::Batch;

/// Examples in file order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    /// What is trained on.
    pub examples: Vec<Example>,
    /// The file.
    pub source: PathBuf,
    /// blake3 of the file's bytes, in hexadecimal.
    pub hash: String,
    /// Examples without a token to train on.
    pub skipped: Vec<Skipped>,
    /// Examples whose end was cut off.
    pub truncated: usize,
}

/// An example that was left out because nothing of its completion remained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Skipped {
    /// Line of the file, from 1.
    pub line: usize,
    /// Tokens before its completion.
    pub prompt_tokens: usize,
}

/// How much is held back for evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EvalSize {
    /// This share of the examples, 0 to 1, at least one.
    Fraction(f64),
    /// This many examples.
    Count(usize),
}

/// Lines that a warning lists by number.
const LISTED: usize = 10;

impl Dataset {
    /// Tokens in all examples.
    pub fn tokens(&self) -> usize {
        self.examples.iter().map(|e| e.input_ids.len()).sum()
    }

    /// blake3 of all token ids and labels: what the tokenizer and the chat template made of the file.
    pub fn examples_hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for example in &self.examples {
            hasher.update(&(example.input_ids.len() as u64).to_le_bytes());
            for (id, label) in example.input_ids.iter().zip(&example.labels) {
                hasher.update(&id.to_le_bytes());
                hasher.update(&label.to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Some of the examples, laid end to end.
    ///
    /// # Panics
    /// There is no such example.
    pub fn batch(&self, indices: &[usize]) -> Batch {
        let mut batch = Batch::new();
        for &index in indices {
            batch.push(&self.examples[index].input_ids, &self.examples[index].labels);
        }
        batch
    }

    /// What a user should know about skipped examples, if there are any.
    pub fn warning(&self) -> Option<String> {
        let longest = self.skipped.iter().map(|s| s.prompt_tokens).max()?;
        let lines: Vec<String> = self.skipped.iter().take(LISTED).map(|s| s.line.to_string()).collect();
        let more = if self.skipped.len() > LISTED { ", ..." } else { "" };
        Some(format!(
            "`{}`: skipped {} of {} examples without a token to train on (line {}{more}); the longest prompt has {longest} tokens",
            self.source.display(),
            self.skipped.len(),
            self.skipped.len() + self.examples.len(),
            lines.join(", "),
        ))
    }

    /// Splits into (train, eval): the eval part is drawn by `seed`, and both keep the order of the file.
    /// Both name the same source and hash; what was skipped stays with the first.
    pub fn split_eval(mut self, size: EvalSize, seed: u64) -> Result<(Dataset, Dataset)> {
        let found = self.examples.len();
        let wanted = match size {
            EvalSize::Fraction(share) => ((found as f64 * share).round() as usize).max(1),
            EvalSize::Count(count) => count,
        };
        if wanted == 0 || wanted >= found {
            let (path, kind) = (self.source, DataErrorKind::EvalSize { wanted, found });
            return Err(DataError { path, line: None, kind });
        }
        let mut held_back = vec![false; found];
        for &index in &shuffled(found, seed, u64::MAX)[..wanted] {
            held_back[index as usize] = true;
        }
        let mut eval = Dataset {
            examples: Vec::with_capacity(wanted),
            source: self.source.clone(),
            hash: self.hash.clone(),
            skipped: Vec::new(),
            truncated: 0,
        };
        let mut train = Vec::with_capacity(found - wanted);
        for (example, held_back) in self.examples.into_iter().zip(held_back) {
            if held_back { eval.examples.push(example) } else { train.push(example) }
        }
        self.examples = train;
        Ok((self, eval))
    }
}
