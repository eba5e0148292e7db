//! A `tokenizer.json` with a BPE model: byte-level as it is, with byte fallback as scores.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::json::{Added, TokenizerJson};
use super::{How, Tokens, kind, looks_special, pre, too_many};
use crate::convert::settings::Settings;
use crate::error::{Error, Result};

/// The named tokens of `tokenizer_config.json`, which transformers makes special.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// The token `[PAD7]` that stands where the vocabulary has no token 7.
pub fn padding(id: usize) -> String {
    format!("[PAD{id}]")
}

/// Byte-level BPE: GPT-2 and its many descendants.
///
/// # Errors
/// The pre-tokenizer is not one that GGUF has a name for, or a token is out of range.
pub fn byte_level(json: &TokenizerJson, size: u32, config: &Settings, pre: Option<&str>) -> Result<Tokens> {
    let pre = match pre {
        Some(name) => name.to_owned(),
        None => pre::recognize(json)?.to_owned(),
    };
    let (tokens, kinds) = list(json, size, config)?;
    // A space inside of a token is written as the byte alphabet writes it.
    let part = |part: &str| part.replace(' ', "\u{120}");
    let merges = json.merges.iter().map(|(left, right)| format!("{} {}", part(left), part(right))).collect();
    Ok(Tokens { texts: tokens, kinds, how: How::Bpe { pre, merges }, space_prefix: None })
}

/// SentencePiece as BPE (Llama 2, Mistral and Gemma in their fast form). The score of a token is the rank of
/// the first merge that makes it, so that the highest score is merged first, as the rank asks.
///
/// llama.cpp's converter gives every token the same score here, with which texts fall apart differently.
///
/// # Errors
/// A token is out of range.
pub fn with_byte_fallback(json: &TokenizerJson, size: u32, config: &Settings) -> Result<Tokens> {
    let (tokens, mut kinds) = list(json, size, config)?;
    let mut ranks: HashMap<String, usize> = HashMap::with_capacity(json.merges.len());
    for (rank, (left, right)) in json.merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    let unknown = json.json["model"]["unk_token"].as_str();
    let mut scores = Vec::with_capacity(tokens.len());
    for (token, kind) in tokens.iter().zip(&mut kinds) {
        let is_byte = token.len() == 6
            && token
                .strip_prefix("<0x")
                .and_then(|t| t.strip_suffix('>'))
                .is_some_and(|hex| u8::from_str_radix(hex, 16).is_ok());
        if is_byte {
            *kind = kind::BYTE;
        } else if Some(token.as_str()) == unknown {
            *kind = kind::UNKNOWN;
        }
        scores.push(match (*kind, ranks.get(token)) {
            (kind::NORMAL, Some(&rank)) => -(rank as f32),
            (kind::NORMAL, None) => -(json.merges.len() as f32),
            (kind::BYTE | kind::UNKNOWN | kind::CONTROL, _) => 0.0,
            (kind::UNUSED, _) => -10_000.0,
            _ => -1000.0,
        });
    }
    Ok(Tokens {
        texts: tokens,
        kinds,
        how: How::Scores(scores),
        space_prefix: (!has_space_prefix(json)).then_some(false),
    })
}

/// Whether a space is put before a text.
fn has_space_prefix(json: &TokenizerJson) -> bool {
    fn any(part: &Value, list: &str, is: &dyn Fn(&Value) -> bool) -> bool {
        is(part) || part[list].as_array().is_some_and(|parts| parts.iter().any(|part| any(part, list, is)))
    }
    any(&json.json["normalizer"], "normalizers", &|part| part["type"] == "Prepend")
        || any(&json.json["pre_tokenizer"], "pretokenizers", &|part| {
            part["type"] == "Metaspace"
                && part["add_prefix_space"] != false
                && part["prepend_scheme"].as_str() != Some("never")
        })
}

/// Tokens and kinds by id, `size` of them.
fn list(json: &TokenizerJson, size: u32, config: &Settings) -> Result<(Vec<String>, Vec<i32>)> {
    let mut added: BTreeMap<u64, Added> = json.added.iter().map(|token| (token.id, token.clone())).collect();
    for token in of_config(config)? {
        added.entry(token.id).or_insert(token);
    }
    let mut named = Vec::new();
    for key in NAMED {
        named.extend(named_token(config, key)?);
    }
    let mut tokens: Vec<Option<String>> = vec![None; size as usize];
    let mut kinds = vec![kind::UNUSED; size as usize];
    for (token, id) in &json.vocab {
        let slot = tokens.get_mut(*id as usize).ok_or_else(|| too_many(&json.path, *id, size))?;
        if let Some(other) = slot.replace(token.clone()) {
            return Err(Error::refused(format!(
                "`{}`: the tokens `{other}` and `{token}` have the same id {id}",
                json.path.display()
            )));
        }
        kinds[*id as usize] = kind::NORMAL;
    }
    for (id, token) in added {
        let slot = tokens.get_mut(id as usize).ok_or_else(|| too_many(&json.path, id, size))?;
        let special = token.special || named.contains(&token.content) || looks_special(&token.content);
        if special {
            *slot = Some(token.content);
            kinds[id as usize] = kind::CONTROL;
        } else {
            *slot = Some(token.content.replace('\u{2581}', " "));
            kinds[id as usize] = kind::USER_DEFINED;
        }
    }
    let tokens = tokens.into_iter().enumerate().map(|(id, token)| token.unwrap_or_else(|| padding(id)));
    Ok((tokens.collect(), kinds))
}

/// `added_tokens_decoder` of `tokenizer_config.json`.
///
/// # Errors
/// An entry is mistyped.
pub fn of_config(config: &Settings) -> Result<Vec<Added>> {
    const KEY: &str = "added_tokens_decoder";
    let Some(value) = config.get(KEY) else { return Ok(Vec::new()) };
    let entries = value.as_object().ok_or_else(|| config.wrong(KEY, "object", value))?;
    let mut tokens = Vec::with_capacity(entries.len());
    for (id, entry) in entries {
        let (Ok(id), Some(content)) = (id.parse(), entry["content"].as_str()) else {
            return Err(config.refuse(KEY, &format!("entry `{id}` is not a number with a `content`")));
        };
        let special = entry["special"].as_bool().unwrap_or(false);
        tokens.push(Added { id, content: content.to_owned(), special });
    }
    tokens.sort_by_key(|token| token.id);
    Ok(tokens)
}

/// A token that `tokenizer_config.json` names by its text, or by an object with its `content`.
///
/// # Errors
/// It is neither.
pub fn named_token(config: &Settings, key: &str) -> Result<Option<String>> {
    match config.get(key) {
        None => Ok(None),
        Some(value) => match value.as_str().or_else(|| value["content"].as_str()) {
            Some(text) => Ok(Some(text.to_owned())),
            None => Err(config.wrong(key, "token", value)),
        },
    }
}
