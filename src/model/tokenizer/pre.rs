//! The pre-tokenizers: into which pieces a text falls before byte-level BPE merges inside each.
//!
//! A GGUF names its pre-tokenizer in `tokenizer.ggml.pre`. One row per way of splitting, with every name
//! that llama.cpp gives to it; the patterns are those of llama.cpp, which agree with each model's
//! `tokenizer.json`. A wrong guess would train on other tokens than the model serves with, so an
//! unknown name is an error.

use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

use super::error::{Result, TokenizerError};

/// One way of splitting, and what else llama.cpp attaches to its name.
#[derive(Debug)]
pub struct Pre {
    /// The values of `tokenizer.ggml.pre` that mean it.
    pub names: &'static [&'static str],
    /// How a text is split.
    pub split: PreSplit,
    /// A piece that is a token as a whole is taken without merging.
    pub ignore_merges: bool,
    /// Begin of text is added unless `add_bos_token` says otherwise.
    pub add_bos: bool,
}

/// How a text is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreSplit {
    /// GPT-2's pattern.
    Gpt2,
    /// Every digit alone, then GPT-2's pattern.
    DigitsGpt2,
    /// The pattern, each match a piece.
    Pattern(&'static str),
}

/// Contractions, words with one leading sign, up to three digits, signs with their line breaks, spaces.
const LLAMA3: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The same with single digits.
const QWEN2: &str = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Every known pre-tokenizer.
pub const TABLE: &[Pre] = &[
    Pre {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "exaone4", "modern-bert", "gigachat", "a.x-4.0", "mellum"],
        split: PreSplit::Gpt2,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        split: PreSplit::DigitsGpt2,
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        split: PreSplit::Pattern(LLAMA3),
        ignore_merges: true,
        add_bos: true,
    },
    Pre {
        names: &["dbrx", "smaug-bpe"],
        split: PreSplit::Pattern(LLAMA3),
        ignore_merges: false,
        add_bos: false,
    },
    Pre {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez", "grok-2", "kormo", "f2llmv2"],
        split: PreSplit::Pattern(QWEN2),
        ignore_merges: false,
        add_bos: false,
    },
];

/// The row of a name.
pub fn find(name: &str) -> Result<&'static Pre> {
    TABLE
        .iter()
        .find(|row| row.names.contains(&name))
        .ok_or_else(|| TokenizerError::UnknownPre { found: name.to_owned() })
}

/// All names, for messages.
pub(super) fn names() -> String {
    let quoted: Vec<String> =
        TABLE.iter().flat_map(|row| row.names).map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

impl PreSplit {
    /// The splitter, ending in the byte alphabet of byte-level BPE.
    pub(crate) fn build(self) -> Result<PreTokenizerWrapper> {
        let bytes = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, false, use_regex));
        Ok(match self {
            PreSplit::Gpt2 => bytes(true),
            PreSplit::DigitsGpt2 => {
                PreTokenizerWrapper::from(Sequence::new(vec![Digits::new(true).into(), bytes(true)]))
            }
            PreSplit::Pattern(pattern) => {
                let pattern = SplitPattern::Regex(pattern.to_owned());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                    .map_err(|e| TokenizerError::Library(e.to_string()))?;
                PreTokenizerWrapper::from(Sequence::new(vec![split.into(), bytes(false)]))
            }
        })
    }
}
