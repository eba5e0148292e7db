//! The vocabulary of a Hugging Face folder as the `tokenizer.*` keys of a GGUF, and back.
//!
//! There are two kinds: byte-level BPE (`gpt2`: tokens, merges and the name of a pre-tokenizer) and
//! SentencePiece (`llama`: tokens with scores). Which files say so: `tokenizer.model` is SentencePiece, a
//! `tokenizer.json` is one or the other.

mod bpe;
mod json;
mod pre;
pub mod sentencepiece;
mod special;
pub mod to_hf;

use std::path::Path;

use qpeft_formats::gguf::{Array, Metadata, Value};

use super::families::Family;
use super::settings::Settings;
use crate::error::{Error, Result};
use crate::model::tokenizer::TokenizerError;
use json::TokenizerJson;

/// `tokenizer.ggml.token_type`: what a token is.
pub mod kind {
    /// Text.
    pub const NORMAL: i32 = 1;
    /// Stands for what the vocabulary lacks.
    pub const UNKNOWN: i32 = 2;
    /// Structure: begins and ends texts and turns.
    pub const CONTROL: i32 = 3;
    /// Text that is never split.
    pub const USER_DEFINED: i32 = 4;
    /// A number without token.
    pub const UNUSED: i32 = 5;
    /// One byte.
    pub const BYTE: i32 = 6;
}

/// The keys of a vocabulary, and what could not be said in them.
#[derive(Debug)]
pub struct Vocab {
    /// `tokenizer.*`, in the order of llama.cpp's converter.
    pub metadata: Metadata,
    /// One sentence each, for people.
    pub notes: Vec<String>,
}

/// Tokens by id, and how texts become tokens.
#[derive(Debug)]
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<i32>,
    how: How,
    /// Whether a space before the text is not wanted, where the files say so.
    space_prefix: Option<bool>,
}

#[derive(Debug)]
enum How {
    Bpe { pre: String, merges: Vec<String> },
    Scores(Vec<f32>),
}

/// Reads the tokenizer files of a folder whose model has `size` tokens.
///
/// # Errors
/// There is no tokenizer file, it is damaged or of a kind that GGUF does not have, or it has more tokens
/// than the model.
pub fn of_folder(dir: &Path, family: &Family, size: u32, pre: Option<&str>) -> Result<Vocab> {
    let mut tokenizer_config = Settings::read_if_there(&dir.join("tokenizer_config.json"))?;
    let (model, json) = (dir.join("tokenizer.model"), dir.join("tokenizer.json"));
    let json = if json.is_file() { Some(TokenizerJson::read(&json)?) } else { None };
    // Phi-4 has Phi-3's architecture and a byte-level vocabulary, which its configuration tells.
    let wants_bpe =
        family.arch == "phi3" && tokenizer_config.text("tokenizer_class")? == Some("GPT2Tokenizer");
    // Phi's converter is the only one that reads the added tokens of both files.
    let phi_json = json.as_ref().filter(|_| family.arch == "phi3");
    let tokens = match &json {
        _ if model.is_file() && !wants_bpe => sentencepiece::tokens(dir, size, &tokenizer_config, phi_json)?,
        Some(json) if json.has_byte_fallback() => bpe::with_byte_fallback(json, size, &tokenizer_config)?,
        Some(json) => bpe::byte_level(json, size, &tokenizer_config, pre)?,
        None => return Err(TokenizerError::NoTokenizerJson { dir: dir.to_owned() }.into()),
    };

    let mut metadata = Metadata::new();
    let mut put = |key: &str, value: Value| metadata.insert(format!("tokenizer.ggml.{key}"), value);
    let is_scores = matches!(tokens.how, How::Scores(_));
    let asked = tokenizer_config.flag("add_prefix_space")?.filter(|_| family.arch == "llama");
    let prefix = family.space_prefix.filter(|_| is_scores);
    if let Some(prefix) = asked.or(tokens.space_prefix.filter(|_| prefix.is_none())) {
        put("add_space_prefix", Value::Bool(prefix));
    }
    match tokens.how {
        How::Bpe { pre, merges } => {
            put("model", Value::String("gpt2".to_owned()));
            put("pre", Value::String(pre));
            put("tokens", Value::Array(Array::String(tokens.texts)));
            put("token_type", Value::Array(Array::I32(tokens.kinds)));
            put("merges", Value::Array(Array::String(merges)));
        }
        How::Scores(scores) => {
            put("model", Value::String("llama".to_owned()));
            put("pre", Value::String("default".to_owned()));
            put("tokens", Value::Array(Array::String(tokens.texts)));
            put("scores", Value::Array(Array::F32(scores)));
            put("token_type", Value::Array(Array::I32(tokens.kinds)));
        }
    }
    special::put(dir, json.as_ref(), &mut tokenizer_config, size, &mut metadata)?;
    // What llama.cpp's converter knows of two vocabularies by their size: Code Llama's infill tokens, and
    // models that want no begin of text.
    if family.arch == "llama" && size == 32_016 {
        for (name, id) in [("prefix", 32_007), ("suffix", 32_008), ("middle", 32_009), ("eot", 32_010)] {
            metadata.insert(format!("tokenizer.ggml.{name}_token_id"), Value::U32(id));
        }
    }
    if family.arch == "llama" && size == 49_152 {
        metadata.insert("tokenizer.ggml.add_bos_token", Value::Bool(false));
    }
    if let Some(prefix) = prefix {
        metadata.insert("tokenizer.ggml.add_space_prefix", Value::Bool(prefix));
    }
    let mut notes = Vec::new();
    if !is_scores && json.as_ref().is_some_and(|json| json.json["normalizer"]["type"] == "NFC") {
        notes.push(
            "the tokenizer composes characters first (Unicode NFC), which a GGUF cannot say: text that is not composed gets other tokens there"
                .to_owned(),
        );
    }
    Ok(Vocab { metadata, notes })
}

/// Tokens named by their texts that are control tokens even where no file says so.
fn looks_special(token: &str) -> bool {
    let between = |start: &str, end: &str| token.starts_with(start) && token.ends_with(end);
    matches!(token, "<pad>" | "<mask>" | "<2mass>" | "[@BOS@]")
        || between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
}

/// Refuses a token that the model has no row for.
fn too_many(path: &Path, id: u64, size: u32) -> Error {
    Error::refused(format!(
        "`{}`: token {id} is outside of the model's vocabulary of {size} (`vocab_size` in `config.json`)",
        path.display()
    ))
}
