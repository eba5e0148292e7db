//! Which tokens begin, end and fill a text, whether they are added, and the chat template: from
//! `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `config.json`, in the order of
//! gguf-py's `SpecialVocab`.

use std::path::Path;

use qpeft_formats::gguf::{Array, Metadata, Value as GgufValue};
use serde_json::Value;

use super::bpe::named_token;
use super::json::TokenizerJson;
use crate::convert::settings::Settings;
use crate::error::{Error, Result};

/// Names of special tokens in `tokenizer_config.json` (before `_token`) and in a GGUF (before `_token_id`).
pub const SPECIAL: [(&str, &str); 7] = [
    ("bos", "bos"),
    ("eos", "eos"),
    ("unk", "unknown"),
    ("sep", "seperator"),
    ("pad", "padding"),
    ("cls", "cls"),
    ("mask", "mask"),
];

/// Adds the ids, the switches and the template.
///
/// # Errors
/// A setting is mistyped.
pub fn put(
    dir: &Path,
    json: Option<&TokenizerJson>,
    config: &mut Settings,
    size: u32,
    out: &mut Metadata,
) -> Result<()> {
    let mut adds: Vec<(&str, bool)> = Vec::new();
    let mut first_by_template = None;
    if let Some(json) = json {
        (adds, first_by_template) = post_processor(&json.json["post_processor"], config)?;
    }
    for (name, _) in SPECIAL {
        if let Some(add) = config.flag(&format!("add_{name}_token"))?
            && !adds.iter().any(|(known, _)| *known == name)
        {
            adds.push((name, add));
        }
    }

    let mut ids: Vec<(&str, u32)> = Vec::new();
    let mut set = |gguf: &'static str, id: Option<u64>| {
        if let Some(id) = id.and_then(|id| u32::try_from(id).ok()).filter(|&id| id < size)
            && !ids.iter().any(|(known, _)| *known == gguf)
        {
            ids.push((gguf, id));
        }
    };
    if let Some(json) = json {
        for (name, gguf) in SPECIAL {
            let named = match (name, named_token(config, &format!("{name}_token"))?) {
                ("bos", None) => first_by_template.clone(),
                (_, named) => named,
            };
            set(gguf, named.and_then(|content| json.added_id(&content)));
        }
    }
    let model_config = Settings::read(&dir.join("config.json"))?;
    let text_config = model_config.object("text_config")?;
    for (name, gguf) in SPECIAL {
        let key = format!("{name}_token_id");
        // Several end tokens are a list, of which a GGUF cannot tell the one.
        let id = match model_config.get(&key) {
            Some(id) => Some(id),
            None => text_config.as_ref().and_then(|config| config.get(&key)),
        };
        set(gguf, id.and_then(Value::as_u64));
    }
    for (name, id) in ids {
        out.insert(format!("tokenizer.ggml.{name}_token_id"), GgufValue::U32(id));
    }
    for (name, add) in adds {
        if matches!(name, "bos" | "eos" | "sep") {
            out.insert(format!("tokenizer.ggml.add_{name}_token"), GgufValue::Bool(add));
        }
    }
    chat_template(dir, config, out)
}

type Adds = Vec<(&'static str, bool)>;

/// What a post-processor adds, and the token that it puts first.
fn post_processor(json: &Value, config: &Settings) -> Result<(Adds, Option<String>)> {
    let single = std::slice::from_ref(json);
    let processors = json["processors"].as_array().map_or(single, Vec::as_slice);
    let mut adds: Adds = Vec::new();
    let mut first_token = None;
    let set = |adds: &mut Adds, name, add, replaces: bool| match adds.iter_mut().find(|(n, _)| *n == name) {
        Some(known) if replaces => known.1 = add,
        Some(_) => {}
        None => adds.push((name, add)),
    };
    let bos = named_token(config, "bos_token")?;
    let eos = named_token(config, "eos_token")?;
    for processor in processors {
        match processor["type"].as_str() {
            Some("ByteLevel") => {
                set(&mut adds, "bos", false, false);
                set(&mut adds, "eos", false, false);
            }
            Some("TemplateProcessing") => {
                let Some(single) = processor["single"].as_array().filter(|single| single.len() > 1) else {
                    continue;
                };

                if let Some(first) = special_token(single.first()) {
                    first_token = Some(first.to_owned());
                    set(&mut adds, "bos", bos.as_deref().is_none_or(|bos| bos == first), true);
                }
                if let Some(last) = special_token(single.last()) {
                    set(&mut adds, "eos", eos.as_deref().is_none_or(|eos| eos == last), true);
                }
            }
            _ => {}
        }
    }
    Ok((adds, first_token))
}

/// The special token of a step of a template.
fn special_token(part: Option<&Value>) -> Option<&str> {
    part?["SpecialToken"]["id"].as_str()
}

/// One template, or several with names.
fn chat_template(dir: &Path, config: &Settings, out: &mut Metadata) -> Result<()> {
    let mut put = |key: &str, text: &str| out.insert(key, GgufValue::String(text.to_owned()));
    let refuse = |path: &Path, what: String| Error::refused(format!("`{}`: {what}", path.display()));
    match config.get("chat_template") {
        Some(Value::String(text)) => {
            put("tokenizer.chat_template", text);
        }
        Some(Value::Array(list)) => {
            let mut names = Vec::new();
            let mut default = None;
            for entry in list {
                let (Some(name), Some(text)) = (entry["name"].as_str(), entry["template"].as_str()) else {
                    return Err(config.refuse("chat_template", "an entry lacks `name` or `template`"));
                };
                if name == "default" {
                    default = Some(text);
                    continue;
                }
                let name: String =
                    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
                put(&format!("tokenizer.chat_template.{name}"), text);
                names.push(name);
            }
            if let Some(text) = default {
                put("tokenizer.chat_template", text);
            }
            if !names.is_empty() {
                out.insert("tokenizer.chat_templates", GgufValue::Array(Array::String(names)));
            }
        }
        Some(other) => return Err(config.wrong("chat_template", "string or list", other)),
        None => {
            let jinja = dir.join("chat_template.jinja");
            let json = dir.join("chat_template.json");
            if jinja.is_file() {
                let text = std::fs::read_to_string(&jinja).map_err(|e| refuse(&jinja, e.to_string()))?;
                put("tokenizer.chat_template", &text);
            } else if json.is_file() {
                let json = Settings::read(&json)?;
                if let Some(text) = json.text("chat_template")? {
                    put("tokenizer.chat_template", text);
                }
            }
        }
    }
    Ok(())
}
