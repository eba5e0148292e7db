//! The `tokenizer.*` keys of a GGUF as `tokenizer.json`, `tokenizer_config.json` and, for SentencePiece,
//! `tokenizer.model`.
//!
//! The vocabulary is first built and checked as the one that this program tokenizes with.

use std::collections::HashMap;
use std::path::Path;

use qpeft_formats::file::write_atomic;
use qpeft_formats::gguf::Metadata;
use serde_json::{Map, Value, json};

use super::bpe::padding;
use super::kind;
use super::sentencepiece::{Model, Piece};
use super::special::SPECIAL;
use crate::error::{Error, Result};
use crate::model::tokenizer::{Tokenizer, pre};

/// Bytes of a token: every split of every token is looked up, and the longest real ones are runs of some
/// hundred bytes.
const LONGEST: usize = 4096;

/// Writes the tokenizer files into `dir`.
///
/// # Errors
/// The vocabulary is missing, damaged, or of a kind that is not supported, or a file cannot be written.
pub fn write(metadata: &Metadata, dir: &Path) -> Result<()> {
    // The hint of the error speaks of another command's flag.
    let tokenizer = Tokenizer::from_gguf(metadata).map_err(|e| {
        Error::refused(e.to_string()).with_hint(
            "the vocabulary cannot be said in a `tokenizer.json`; take the folder of the original model",
        )
    })?;
    let tokens = metadata.require_strings("tokenizer.ggml.tokens")?;
    let kinds =
        metadata.i32s("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![kind::NORMAL; tokens.len()]);
    let is_scores = metadata.require_str("tokenizer.ggml.model")? == "llama";
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(is_scores);
    let ids = ids(metadata, is_scores)?;
    let unknown = ids.iter().find(|(name, _)| *name == "unk").map(|(_, id)| *id);

    let (parts, scores) = if is_scores {
        let scores = metadata.f32s("tokenizer.ggml.scores")?.unwrap_or_default();
        if let Some((id, token)) = tokens.iter().enumerate().find(|(_, token)| token.len() > LONGEST) {
            return Err(Error::refused(format!(
                "key `tokenizer.ggml.tokens`: token {id} has {} bytes, at most {LONGEST} are supported",
                token.len()
            )));
        }
        (scores_parts(tokens, &kinds, &scores, prefix, unknown), Some(scores))
    } else {
        (byte_parts(metadata, tokens, &kinds)?, None)
    };
    let added = added_tokens(tokens, &kinds);
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(&tokenizer, tokens, is_scores),
        "decoder": parts.decoder,
        "model": parts.model,
    });
    let text = json.to_string();
    // What the library does not read must not be written.
    if let Err(e) = tokenizers::Tokenizer::from_bytes(text.as_bytes()) {
        return Err(Error::refused(format!("the vocabulary makes no valid `tokenizer.json`: {e}")));
    }
    write_atomic(&dir.join("tokenizer.json"), text.as_bytes())?;
    if let Some(scores) = scores {
        let pieces = tokens.iter().zip(&kinds).zip(&scores).map(|((text, kind), score)| Piece {
            text: text.clone(),
            score: *score,
            kind: *kind,
        });
        let model = Model { pieces: pieces.collect(), is_bpe: true, add_dummy_prefix: prefix };
        write_atomic(&dir.join("tokenizer.model"), &model.to_bytes())?;
    }
    let config = tokenizer_config(metadata, &tokenizer, tokens, &kinds, &ids, is_scores)?;
    let text = serde_json::to_string_pretty(&config).expect("a JSON value has only string keys");
    Ok(write_atomic(&dir.join("tokenizer_config.json"), text.as_bytes())?)
}

/// The parts of a `tokenizer.json` in which the two kinds differ.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
}

/// Byte-level BPE.
fn byte_parts(metadata: &Metadata, tokens: &[String], kinds: &[i32]) -> Result<Parts> {
    let row = pre::find(metadata.require_str("tokenizer.ggml.pre")?)?;
    let merges = metadata.require_strings("tokenizer.ggml.merges")?;
    let pairs: Vec<Value> = merges
        .iter()
        .map(|merge| {
            let skip = merge.chars().next().map_or(0, char::len_utf8);
            let space =
                skip + merge[skip..].find(' ').expect("merges were checked when the tokenizer was built");
            json!([merge[..space], merge[space + 1..]])
        })
        .collect();
    let pre_tokenizer = serde_json::to_value(row.split.build()?).expect("the library writes its own parts");
    Ok(Parts {
        normalizer: Value::Null,
        pre_tokenizer,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": row.ignore_merges,
            "vocab": vocab(tokens, kinds),
            "merges": pairs,
        }),
    })
}

/// SentencePiece as BPE with byte fallback: every way to make a token of two others is a merge, and tokens of
/// higher score come first.
fn scores_parts(
    tokens: &[String],
    kinds: &[i32],
    scores: &[f32],
    prefix: bool,
    unknown: Option<u32>,
) -> Parts {
    let texts = |wanted: &'static [i32]| {
        tokens.iter().enumerate().filter(move |(id, _)| wanted.contains(&kinds[*id]))
    };
    let known: HashMap<&str, usize> = texts(&[kind::NORMAL]).map(|(id, text)| (text.as_str(), id)).collect();
    let mut merges: Vec<(f32, usize, usize)> = Vec::new();
    for (id, text) in texts(&[kind::NORMAL]) {
        for (at, _) in text.char_indices().skip(1) {
            if let (Some(&left), Some(&right)) = (known.get(&text[..at]), known.get(&text[at..])) {
                merges.push((scores[id], left, right));
            }
        }
    }
    // Of pairs that make the same token, transformers takes the longest left part first.
    merges.sort_by(|a, b| {
        let lengths = |m: &(f32, usize, usize)| (tokens[m.1].chars().count(), tokens[m.2].chars().count());
        b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a)))
    });
    let merges: Vec<Value> =
        merges.into_iter().map(|(_, left, right)| json!([tokens[left], tokens[right]])).collect();
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"});
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u{2581}"}, space]})
    } else {
        space
    };
    Parts {
        normalizer,
        pre_tokenizer: Value::Null,
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown.map(|id| &tokens[id as usize]),
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "vocab": vocab(tokens, kinds),
            "merges": merges,
        }),
    }
}

/// Tokens with their ids; numbers without token are left out.
fn vocab(tokens: &[String], kinds: &[i32]) -> Map<String, Value> {
    let is_padding = |id: usize| kinds[id] == kind::UNUSED && tokens[id] == padding(id);
    let entries = tokens.iter().enumerate().filter(|(id, _)| !is_padding(*id));
    entries.map(|(id, token)| (token.clone(), json!(id))).collect()
}

/// Tokens that are cut out of a text first.
fn added_tokens(tokens: &[String], kinds: &[i32]) -> Vec<Value> {
    let cut = |kind: i32| matches!(kind, kind::CONTROL | kind::UNKNOWN | kind::USER_DEFINED);
    let all =
        tokens.iter().zip(kinds).enumerate().filter(|(_, (token, kind))| cut(**kind) && !token.is_empty());
    all.map(|(id, (token, &kind))| {
        json!({
            "id": id,
            "content": token,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": kind != kind::USER_DEFINED,
        })
    })
    .collect()
}

/// What is put around a text.
fn post_processor(tokenizer: &Tokenizer, tokens: &[String], is_scores: bool) -> Value {
    let token = |id: &u32| json!({"SpecialToken": {"id": tokens[*id as usize], "type_id": 0}});
    let (before, after) = (tokenizer.prefix(), tokenizer.suffix());
    let bytes =
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true});
    if before.is_empty() && after.is_empty() {
        return if is_scores { Value::Null } else { bytes };
    }
    let around = |text: &[Value]| -> Vec<Value> {
        before.iter().map(token).chain(text.iter().cloned()).chain(after.iter().map(token)).collect()
    };
    let sequence = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
    let specials: Map<String, Value> = before
        .iter()
        .chain(after)
        .map(|&id| {
            let token = &tokens[id as usize];
            (token.clone(), json!({"id": token, "ids": [id], "tokens": [token]}))
        })
        .collect();
    let (a, b) = (sequence("A", 0), sequence("B", 1));
    let pair: Vec<Value> =
        around(std::slice::from_ref(&a)).into_iter().chain(around(std::slice::from_ref(&b))).collect();
    let template = json!({
        "type": "TemplateProcessing",
        "single": around(std::slice::from_ref(&a)),
        "pair": pair,
        "special_tokens": specials,
    });
    if is_scores { template } else { json!({"type": "Sequence", "processors": [bytes, template]}) }
}

/// The special tokens that the metadata names, and those that it may leave out.
fn ids(metadata: &Metadata, is_scores: bool) -> Result<Vec<(&'static str, u32)>> {
    let mut ids = Vec::new();
    for (name, gguf) in SPECIAL {
        let default = match name {
            "bos" if is_scores => Some(1),
            "eos" if is_scores => Some(2),
            "unk" if is_scores => Some(0),
            _ => None,
        };
        let size = metadata.require_strings("tokenizer.ggml.tokens")?.len();
        let id = metadata.u32(&format!("tokenizer.ggml.{gguf}_token_id"))?.or(default);
        ids.extend(id.filter(|&id| (id as usize) < size).map(|id| (name, id)));
    }
    Ok(ids)
}

fn tokenizer_config(
    metadata: &Metadata,
    tokenizer: &Tokenizer,
    tokens: &[String],
    kinds: &[i32],
    ids: &[(&str, u32)],
    is_scores: bool,
) -> Result<Value> {
    let mut out = Map::new();
    out.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    for (name, id) in ids {
        out.insert(format!("{name}_token"), json!(tokens[*id as usize]));
    }
    out.insert("add_bos_token".to_owned(), json!(!tokenizer.prefix().is_empty()));
    out.insert("add_eos_token".to_owned(), json!(!tokenizer.suffix().is_empty()));
    out.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    if let Some(prefix) = metadata.bool("tokenizer.ggml.add_space_prefix")? {
        out.insert("add_prefix_space".to_owned(), json!(prefix));
    }
    if is_scores {
        // `tokenizer.model` knows the kinds of its own tokens; added ones it does not.
        let added =
            tokens.iter().zip(kinds).enumerate().filter(|(_, (_, kind))| **kind == kind::USER_DEFINED);
        let added: Map<String, Value> = added
            .map(|(id, (token, _))| {
                let entry = json!({"content": token, "lstrip": false, "normalized": false, "rstrip": false, "single_word": false, "special": false});
                (id.to_string(), entry)
            })
            .collect();
        if !added.is_empty() {
            out.insert("added_tokens_decoder".to_owned(), Value::Object(added));
        }
    }
    if let Some(key) = metadata.iter().map(|(key, _)| key).find(|key| key.ends_with(".context_length")) {
        out.insert("model_max_length".to_owned(), json!(metadata.u32(key)?));
    }
    let default = metadata.str("tokenizer.chat_template")?;
    let mut named = Vec::new();
    for name in metadata.strings("tokenizer.chat_templates")?.unwrap_or_default() {
        let template = metadata.require_str(&format!("tokenizer.chat_template.{name}"))?;
        named.push(json!({"name": name, "template": template}));
    }
    match default {
        Some(template) if named.is_empty() => {
            out.insert("chat_template".to_owned(), json!(template));
        }
        default => {
            if let Some(template) = default {
                named.insert(0, json!({"name": "default", "template": template}));
            }
            if !named.is_empty() {
                out.insert("chat_template".to_owned(), Value::Array(named));
            }
        }
    }
    Ok(Value::Object(out))
}
