//! `tokenizer.json`, checked as far as conversion needs it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::Result;
use crate::model::tokenizer::TokenizerError;

/// The parts of a `tokenizer.json` with a BPE model.
#[derive(Debug)]
pub struct TokenizerJson {
    /// The file.
    pub path: PathBuf,
    /// All of it.
    pub json: Value,
    /// Tokens of the model with their ids.
    pub vocab: Vec<(String, u64)>,
    /// Pairs of tokens in order of rank.
    pub merges: Vec<(String, String)>,
    /// Tokens that are cut out of a text first.
    pub added: Vec<Added>,
}

/// One of `added_tokens`.
#[derive(Debug, Clone)]
pub struct Added {
    /// Its number.
    pub id: u64,
    /// Its text.
    pub content: String,
    /// Whether it is structure rather than text.
    pub special: bool,
}

impl TokenizerJson {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, is no BPE tokenizer, or names a token that does not exist.
    pub fn read(path: &Path) -> Result<TokenizerJson> {
        let json: Value = qpeft_formats::json::read_json(path)?;
        let wrong = |message: String| TokenizerError::Json { path: path.to_owned(), message };
        let model = &json["model"];
        let kind =
            model["type"].as_str().unwrap_or(if model["merges"].is_array() { "BPE" } else { "unknown" });
        if kind != "BPE" {
            return Err(wrong(format!("`model.type` is `{kind}`; only `BPE` can be converted")).into());
        }
        let Some(entries) = model["vocab"].as_object() else {
            return Err(wrong("`model.vocab` is not an object".to_owned()).into());
        };
        let mut vocab = Vec::with_capacity(entries.len());
        for (token, id) in entries {
            let id =
                id.as_u64().ok_or_else(|| wrong(format!("`model.vocab`: the id of `{token}` is `{id}`")))?;
            vocab.push((token.clone(), id));
        }
        let merges = merges(path, &model["merges"], entries)?;
        let mut added = Vec::new();
        if let Some(list) = json["added_tokens"].as_array() {
            for entry in list {
                let (Some(id), Some(content)) = (entry["id"].as_u64(), entry["content"].as_str()) else {
                    return Err(wrong("`added_tokens`: an entry lacks `id` or `content`".to_owned()).into());
                };
                let special = entry["special"].as_bool().unwrap_or(false);
                added.push(Added { id, content: content.to_owned(), special });
            }
        }
        Ok(TokenizerJson { path: path.to_owned(), vocab, merges, added, json })
    }

    /// Whether what the vocabulary lacks falls to byte tokens: a SentencePiece vocabulary in other clothes.
    pub fn has_byte_fallback(&self) -> bool {
        self.json["model"]["byte_fallback"] == true
    }

    /// The id of an added token.
    pub fn added_id(&self, content: &str) -> Option<u64> {
        self.added.iter().find(|token| token.content == content).map(|token| token.id)
    }
}

fn merges(
    path: &Path,
    json: &Value,
    vocab: &serde_json::Map<String, Value>,
) -> Result<Vec<(String, String)>> {
    let Some(list) = json.as_array() else {
        let message = "`model.merges` is not a list".to_owned();
        return Err(TokenizerError::Json { path: path.to_owned(), message }.into());
    };
    let known: HashSet<&str> = vocab.keys().map(String::as_str).collect();
    let mut pairs = Vec::with_capacity(list.len());
    for (index, merge) in list.iter().enumerate() {
        let pair = match merge {
            Value::String(merge) => merge.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        let Some((left, right)) = pair else {
            let message = format!("merge {index} is `{merge}`, expected two tokens");
            return Err(TokenizerError::Json { path: path.to_owned(), message }.into());
        };
        let joined = format!("{left}{right}");
        if let Some(token) = [left, right, &joined].into_iter().find(|token| !known.contains(token)) {
            let (place, token) = (format!("`{}`", path.display()), token.to_owned());
            return Err(TokenizerError::MergeToken { place, index, token }.into());
        }
        pairs.push((left.to_owned(), right.to_owned()));
    }
    Ok(pairs)
}
