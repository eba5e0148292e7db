//! Which parts a `tokenizer.json` may be made of. The library runs whatever the file names and trusts its
//! numbers, some of which end the program; so the parts are asked for by name first.
//!
//! Listed is what byte-level and SentencePiece-style BPE tokenizers are saved with: every model that is
//! supported has one.

use serde_json::Value;

/// A key of the file, the parts that may stand there, and under which key a `Sequence` lists its own.
const PLACES: [(&str, &[&str], &str); 4] = [
    (
        "normalizer",
        &["NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend", "Replace"],
        "normalizers",
    ),
    (
        "pre_tokenizer",
        &["ByteLevel", "Digits", "Split", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"],
        "pretokenizers",
    ),
    ("post_processor", &["ByteLevel", "TemplateProcessing", "RobertaProcessing"], "processors"),
    (
        "decoder",
        &["ByteLevel", "ByteFallback", "Fuse", "Replace", "Metaspace", "BPEDecoder", "Strip"],
        "decoders",
    ),
];

/// How deep sequences may lie in each other; real ones do not.
const DEPTH: usize = 4;

/// Refuses a file with other parts, in words.
pub(super) fn check(json: &Value) -> Result<(), String> {
    let model = &json["model"];
    // Early files do not say which model it is; only BPE has merges.
    let is_bpe = match &model["type"] {
        Value::Null => true,
        kind => kind == "BPE",
    };
    if !is_bpe || !model["vocab"].is_object() || !model["merges"].is_array() {
        return Err(format!(
            "`model` is of type {}, expected `BPE` with `vocab` and `merges`",
            shown(&model["type"])
        ));
    }
    for (key, known, list) in PLACES {
        part(key, &json[key], known, list, DEPTH)?;
    }
    Ok(())
}

fn part(key: &str, value: &Value, known: &[&str], list: &str, depth: usize) -> Result<(), String> {
    if value.is_null() {
        return Ok(());
    }
    let kind = value["type"].as_str().unwrap_or_default();
    match &value[list] {
        Value::Array(parts) if kind == "Sequence" && depth > 0 => {
            return parts.iter().try_for_each(|value| part(key, value, known, list, depth - 1));
        }
        _ if !known.contains(&kind) => {
            return Err(format!(
                "`{key}` is of type {}, supported are `Sequence` and {}",
                shown(&value["type"]),
                known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
            ));
        }
        _ => {}
    }
    if kind == "TemplateProcessing" {
        return template(value).map_err(|message| format!("`{key}`: {message}"));
    }
    // Cutting at both ends of a token cuts past its middle where they meet.
    if key == "decoder" && kind == "Strip" && value["stop"] != 0 {
        return Err(format!(
            "`decoder` strips `stop` = {} characters, supported is 0",
            shown(&value["stop"])
        ));
    }
    Ok(())
}

/// The library looks special tokens up, and takes a second text, without asking whether they are there.
fn template(value: &Value) -> Result<(), String> {
    for (list, texts) in [("single", &["A"][..]), ("pair", &["A", "B"])] {
        for piece in value[list].as_array().into_iter().flatten() {
            let (text, token) = (&piece["Sequence"]["id"], &piece["SpecialToken"]["id"]);
            match (text.as_str(), token.as_str()) {
                (Some(text), None) if texts.contains(&text) => {}
                (None, Some(token)) if value["special_tokens"][token].is_object() => {}
                _ => return Err(format!("`{list}` has {}, which is not defined", shown(piece))),
            }
        }
    }
    for (name, token) in value["special_tokens"].as_object().into_iter().flatten() {
        let len = |key: &str| token[key].as_array().map(Vec::len);
        if len("ids") != len("tokens") {
            return Err(format!("`special_tokens` has `{name}` with other numbers of `ids` and `tokens`"));
        }
    }
    Ok(())
}

/// A value in a message: short, on one line.
fn shown(value: &Value) -> String {
    let text: String = value.to_string().chars().take(80).collect();
    format!("`{text}`")
}
