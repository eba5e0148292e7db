//! A tokenizer from a `tokenizer.json` and the `tokenizer_config.json` beside it.

use std::collections::HashSet;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use super::error::{Result, TokenizerError};
use super::gguf::SpecialFields;
use super::parts;

/// The library's tokenizer, and a copy that keeps control tokens as text, made when first asked for.
pub(super) struct HfTokenizer {
    parsing: tokenizers::Tokenizer,
    plain: OnceLock<tokenizers::Tokenizer>,
    vocab_size: usize,
}

/// A tokenizer and what the files beside it said.
pub(super) struct Parts {
    pub engine: HfTokenizer,
    pub specials: super::Specials,
    pub before: Vec<u32>,
    pub after: Vec<u32>,
}

/// Reads `path` and what lies beside it.
pub(super) fn read(path: &Path) -> Result<Parts> {
    let json = parse(path, &read_file(path)?)?;
    parts::check(&json).map_err(|message| TokenizerError::Json { path: path.to_owned(), message })?;
    check_merges(path, &json)?;
    // The library must see what was checked, and not the first of a key that stands there twice.
    let mut parsing = tokenizers::Tokenizer::from_bytes(json.to_string())
        .map_err(|e| TokenizerError::Json { path: path.to_owned(), message: e.to_string() })?;
    // Lengths are the data's business, not the vocabulary's.
    parsing.with_padding(None);
    parsing.with_truncation(None).map_err(|e| TokenizerError::Library(e.to_string()))?;
    let vocab_size =
        parsing.get_vocab(true).into_values().max().ok_or(TokenizerError::EmptyVocabulary)? as usize + 1;
    let engine = HfTokenizer { parsing, plain: OnceLock::new(), vocab_size };

    let config_path = path.with_file_name("tokenizer_config.json");
    let config =
        if config_path.is_file() { parse(&config_path, &read_file(&config_path)?)? } else { Value::Null };
    let template_path = path.with_file_name("chat_template.jinja");
    let chat_template = if template_path.is_file() {
        let text = String::from_utf8(read_file(&template_path)?);
        Some(text.map_err(|e| TokenizerError::Json { path: template_path, message: e.to_string() })?)
    } else {
        chat_template(&config)
    };
    let named = |key: &'static str| match token_text(&config[key]) {
        Some(token) => engine.token_to_id(token).map(Some).ok_or_else(|| TokenizerError::NamedToken {
            path: config_path.clone(),
            key,
            token: token.to_owned(),
        }),
        None => Ok(None),
    };
    let fields = SpecialFields {
        bos: named("bos_token")?,
        eos: named("eos_token")?,
        chat_template,
        ..SpecialFields::default()
    };
    let specials = fields.resolve(|text| engine.token_to_id(text), vocab_size)?;

    // The post-processor says what surrounds a text; the older switches of the config override it.
    let (mut before, mut after) = engine.surroundings()?;
    let switch = |key: &str, id: Option<u32>| match (config[key].as_bool(), id) {
        (Some(true), Some(id)) => Some(vec![id]),
        (Some(false), _) => Some(Vec::new()),
        _ => None,
    };
    before = switch("add_bos_token", specials.bos).unwrap_or(before);
    after = switch("add_eos_token", specials.eos).unwrap_or(after);
    // A post-processor names ids of its own.
    if let Some(&id) = before.iter().chain(&after).find(|&&id| id as usize >= vocab_size) {
        let message = format!("`post_processor` adds token {id}, outside of the vocabulary of {vocab_size}");
        return Err(TokenizerError::Json { path: path.to_owned(), message });
    }
    Ok(Parts { engine, specials, before, after })
}

impl HfTokenizer {
    pub(super) fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        encode(&self.parsing, text, false, out)
    }

    pub(super) fn encode_plain(&self, text: &str, out: &mut Vec<u32>) -> Result<()> {
        let plain = self.plain.get_or_init(|| {
            let mut copy = self.parsing.clone();
            copy.set_encode_special_tokens(true);
            copy
        });
        encode(plain, text, false, out)
    }

    pub(super) fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.parsing.decode(ids, skip_special).map_err(|e| TokenizerError::Library(e.to_string()))
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    pub(super) fn token_to_id(&self, token: &str) -> Option<u32> {
        self.parsing.token_to_id(token)
    }

    pub(super) fn id_to_token(&self, id: u32) -> Option<String> {
        self.parsing.id_to_token(id)
    }

    /// What the post-processor puts before and after a text, seen on a probe.
    fn surroundings(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        encode(&self.parsing, "a", true, &mut with)?;
        encode(&self.parsing, "a", false, &mut without)?;
        let at = (0..=with.len().saturating_sub(without.len())).find(|&i| with[i..].starts_with(&without));
        let at = at.unwrap_or(0);
        Ok((with[..at].to_vec(), with[(at + without.len()).min(with.len())..].to_vec()))
    }
}

fn encode(tokenizer: &tokenizers::Tokenizer, text: &str, add: bool, out: &mut Vec<u32>) -> Result<()> {
    let encoding = tokenizer.encode_fast(text, add).map_err(|e| TokenizerError::Library(e.to_string()))?;
    out.extend_from_slice(encoding.get_ids());
    Ok(())
}

fn read_file(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| TokenizerError::Io { path: path.to_owned(), source })
}

fn parse(path: &Path, bytes: &[u8]) -> Result<Value> {
    serde_json::from_slice(bytes)
        .map_err(|e| TokenizerError::Json { path: path.to_owned(), message: e.to_string() })
}

/// The library indexes by the result of a merge without asking whether it exists, so ask first.
fn check_merges(path: &Path, json: &Value) -> Result<()> {
    let (Some(vocab), Some(merges)) =
        (json["model"]["vocab"].as_object(), json["model"]["merges"].as_array())
    else {
        return Ok(());
    };
    let prefix = json["model"]["continuing_subword_prefix"].as_str().unwrap_or("");
    let known: HashSet<&str> = vocab.keys().map(String::as_str).collect();
    for (index, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(s) => s.split_once(' '),
            Value::Array(a) => match a.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        let Some((left, right)) = pair else {
            let message = format!("merge {index} is `{merge}`, expected two tokens");
            return Err(TokenizerError::Json { path: path.to_owned(), message });
        };
        let joined = format!("{left}{}", right.strip_prefix(prefix).unwrap_or(right));
        if let Some(token) = [left, right, joined.as_str()].into_iter().find(|t| !known.contains(t)) {
            let place = format!("`{}`", path.display());
            return Err(TokenizerError::MergeToken { place, index, token: token.to_owned() });
        }
    }
    Ok(())
}

/// A token is named by its text or by an object with its `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// One template, or the one called `default` of several.
fn chat_template(config: &Value) -> Option<String> {
    match &config["chat_template"] {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    }
}
