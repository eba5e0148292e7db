//! What a GGUF says about its model for people: name, size, licence, how to sample, from the folder's name,
//! `generation_config.json` and the head of the model card, as gguf-py finds it.

use std::path::Path;

use qpeft_formats::gguf::{Array, Metadata, Value};
use serde_json::Value as Json;

use super::model_name::{ModelName, size_label, title};
use super::settings::Settings;
use crate::error::Result;

/// A setting of `generation_config.json`: its names, the GGUF key, whether it is an integer.
const SAMPLING: [(&[&str], &str, bool); 8] = [
    (&["top_k"], "top_k", true),
    (&["top_p"], "top_p", false),
    (&["min_p"], "min_p", false),
    (&["xtc_probability"], "xtc_probability", false),
    (&["xtc_threshold"], "xtc_threshold", false),
    (&["temperature"], "temp", false),
    (&["penalty_last_n"], "penalty_last_n", true),
    (&["penalty_repeat", "repetition_penalty"], "penalty_repeat", false),
];

/// Bytes of a model card: real ones have some ten thousand.
const LONGEST_CARD: u64 = 4 << 20;

/// Adds the `general.*` keys of a folder whose model has so many parameters. A model card that cannot be
/// read is returned as a sentence: it is for people, and no reason to refuse the model.
///
/// # Errors
/// `generation_config.json` is there and damaged.
pub fn describe(
    dir: &Path,
    config: &Settings,
    parameters: u64,
    out: &mut Metadata,
) -> Result<Option<String>> {
    let generation = Settings::read_if_there(&dir.join("generation_config.json"))?;
    for (names, key, is_integer) in SAMPLING {
        for name in names {
            let Some(value) = generation.number(name)? else { continue };
            let value = if is_integer { Value::I32(value as i32) } else { Value::F32(value as f32) };
            out.insert(format!("general.sampling.{key}"), value);
            break;
        }
    }
    let (card, note) = match read_card(dir) {
        Ok(card) => (card, None),
        Err(what) => (
            Json::Null,
            Some(format!("`{}`: {what}; its licence and tags are left out", dir.join("README.md").display())),
        ),
    };
    let mut put = |key: &str, text: Option<String>| {
        if let Some(text) = text {
            out.insert(format!("general.{key}"), Value::String(text));
        }
    };
    // A model is told by the name that its configuration keeps, unless that is a path, and by its folder.
    let folder = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let folder = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let kept =
        config.text("_name_or_path")?.filter(|name| !name.is_empty() && name.matches('/').count() <= 1);
    let mut name = ModelName::parse(kept.unwrap_or(&folder), parameters);
    name.or(ModelName::parse(&folder, parameters));
    put("name", Some(title(&name.full)));
    put("version", name.version);
    put("organization", name.organization.as_deref().map(title));
    put("finetune", name.finetune);
    put("basename", name.basename);
    put("size_label", Some(name.size_label.unwrap_or_else(|| size_label(parameters))));
    put("license", Some(texts(&card, &["license"]).join(",")).filter(|text| !text.is_empty()));
    put("license.name", card["license_name"].as_str().map(str::to_owned));
    put("license.link", card["license_link"].as_str().map(str::to_owned));
    for (key, names) in [
        ("base_model", &["base_model", "base_models", "base_model_sources"]),
        ("dataset", &["datasets", "dataset", "dataset_sources"]),
    ] {
        let ids =
            names.iter().map(|name| texts(&card, &[name])).find(|ids| !ids.is_empty()).unwrap_or_default();
        if ids.is_empty() {
            continue;
        }
        out.insert(format!("general.{key}.count"), Value::U32(ids.len() as u32));
        for (i, id) in ids.iter().enumerate() {
            let mut put = |field: &str, text: Option<String>| {
                if let Some(text) = text {
                    out.insert(format!("general.{key}.{i}.{field}"), Value::String(text));
                }
            };
            if ["http://", "https://", "ssh://"].iter().any(|start| id.starts_with(start)) {
                put("repo_url", Some(id.clone()));
                continue;
            }
            let name = ModelName::parse(id, parameters);
            let url =
                name.organization.as_ref().map(|org| format!("https://huggingface.co/{org}/{}", name.full));
            put("name", Some(title(&name.full)));
            put("version", name.version);
            put("organization", name.organization.as_deref().map(title));
            put("repo_url", url);
        }
    }
    for (key, names) in [("tags", ["tags", "pipeline_tag"]), ("languages", ["languages", "language"])] {
        let list = texts(&card, &names);
        if !list.is_empty() {
            out.insert(format!("general.{key}"), Value::Array(Array::String(list)));
        }
    }
    Ok(note)
}

/// The texts of some keys, each one text or a list of them.
fn texts(card: &Json, keys: &[&str]) -> Vec<String> {
    let mut out = Vec::new();
    for key in keys {
        match &card[*key] {
            Json::String(text) => out.push(text.clone()),
            Json::Array(list) => out.extend(list.iter().filter_map(Json::as_str).map(str::to_owned)),
            _ => {}
        }
    }
    out
}

/// The YAML between the first two lines `---` of the model card; nothing where there is none.
fn read_card(dir: &Path) -> Result<Json, String> {
    let path = dir.join("README.md");
    let Ok(size) = std::fs::metadata(&path).map(|file| file.len()) else { return Ok(Json::Null) };
    if size > LONGEST_CARD {
        return Err(format!("has {size} bytes, at most {LONGEST_CARD} are read"));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| e.to_string())?;
    let mut lines = text.lines();
    if lines.next() != Some("---") {
        return Ok(Json::Null);
    }
    let yaml: String = lines.take_while(|line| *line != "---").flat_map(|line| [line, "\n"]).collect();
    if yaml.trim().is_empty() {
        return Ok(Json::Null);
    }
    serde_saphyr::from_str(&yaml.replace('\t', "  ")).map_err(|e| format!("its head is no YAML: {e}"))
}
