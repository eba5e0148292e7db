//! Which pre-tokenizer a `tokenizer.json` has, as `tokenizer.ggml.pre` names it.
//!
//! llama.cpp's converter hashes the ids of a text and knows the hashes of published models. Here the
//! splitting itself is compared with the ways that [`pre::TABLE`] lists, so that a model with a vocabulary
//! of its own is recognized too; the name is then the first of those that mean the same.

use serde_json::Value;

use super::json::TokenizerJson;
use crate::error::{Error, Result};
use crate::model::tokenizer::pre::{self, PreSplit};

/// The name of the pre-tokenizer.
///
/// # Errors
/// No row of the table splits like it.
pub fn recognize(tokenizer: &TokenizerJson) -> Result<&'static str> {
    let json = &tokenizer.json;
    let ignore_merges = json["model"]["ignore_merges"] == true;
    let refuse = |what: String| {
        let known = pre::TABLE.iter().map(|row| format!("`{}`", row.names[0])).collect::<Vec<_>>().join(", ");
        let message = format!("`{}`: {what}; known pre-tokenizers: {known}", tokenizer.path.display());
        Err(Error::refused(message)
            .with_hint("name the pre-tokenizer that llama.cpp has for this model with `--pre NAME`"))
    };
    let normalizer = json["normalizer"]["type"].as_str().unwrap_or("none");
    if !matches!(normalizer, "none" | "NFC") {
        return refuse(format!("the normalizer `{normalizer}` has no place in a GGUF"));
    }
    let Some(splits) = splits(&json["pre_tokenizer"]) else {
        return refuse(format!("the pre-tokenizer {} has no name in a GGUF", brief(&json["pre_tokenizer"])));
    };
    let same = |row: &&pre::Pre| row.ignore_merges == ignore_merges && is_same(row.split, &splits);
    match pre::TABLE.iter().find(same) {
        Some(row) => Ok(row.names[0]),
        None => refuse(format!(
            "the pre-tokenizer {} with `ignore_merges` {ignore_merges} has no name in a GGUF",
            brief(&json["pre_tokenizer"])
        )),
    }
}

/// One step of splitting.
#[derive(Debug, PartialEq)]
enum Step {
    Digits,
    Pattern(String),
    Gpt2,
}

/// The steps before the byte alphabet; none for what is not byte-level or has other options.
fn splits(json: &Value) -> Option<Vec<Step>> {
    let steps = match json["type"].as_str()? {
        "Sequence" => json["pretokenizers"].as_array()?.clone(),
        _ => vec![json.clone()],
    };
    let (last, first) = steps.split_last()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    let mut found = Vec::new();
    for step in first {
        found.push(match step["type"].as_str()? {
            "Digits" if step["individual_digits"] == true => Step::Digits,
            "Split" if step["behavior"] == "Isolated" && step["invert"] != true => {
                Step::Pattern(canonical(step["pattern"]["Regex"].as_str()?))
            }
            _ => return None,
        });
    }
    // The library's default is to use GPT-2's pattern.
    if last["use_regex"] != false {
        found.push(Step::Gpt2);
    }
    Some(found)
}

fn is_same(split: PreSplit, found: &[Step]) -> bool {
    match (split, found) {
        (PreSplit::Gpt2, [Step::Gpt2]) | (PreSplit::DigitsGpt2, [Step::Digits, Step::Gpt2]) => true,
        (PreSplit::Pattern(pattern), [Step::Pattern(found)]) => canonical(pattern) == *found,
        _ => false,
    }
}

/// Contractions in any case have two spellings.
fn canonical(pattern: &str) -> String {
    pattern
        .replace("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", "(?i:'s|'t|'re|'ve|'m|'ll|'d)")
}

fn brief(json: &Value) -> String {
    let text = json.to_string();
    let end = text.char_indices().nth(120).map_or(text.len(), |(at, _)| at);
    format!("`{}`", &text[..end])
}
