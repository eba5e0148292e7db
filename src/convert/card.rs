//! What a GGUF says about its model for people: name, size, licence, how to sample, from the folder's name,
//! `generation_config.json` and the model card, as gguf-py finds it.

use std::path::Path;

use qpeft_formats::gguf::{Metadata, Value};

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

/// Adds the `general.*` keys of a folder whose model has so many parameters.
///
/// # Errors
/// `generation_config.json` is there and damaged.
pub fn describe(dir: &Path, config: &Settings, parameters: u64, out: &mut Metadata) -> Result<()> {
    let generation = Settings::read_if_there(&dir.join("generation_config.json"))?;
    for (names, key, is_integer) in SAMPLING {
        for name in names {
            let Some(value) = generation.number(name)? else { continue };
            let value = if is_integer { Value::I32(value as i32) } else { Value::F32(value as f32) };
            out.insert(format!("general.sampling.{key}"), value);
            break;
        }
    }
    // A model is told by the name that its configuration keeps, unless that is a path, or by its folder.
    let folder = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    let folder = folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let kept =
        config.text("_name_or_path")?.filter(|name| !name.is_empty() && name.matches('/').count() <= 1);
    let name = kept.map_or(folder.as_str(), |name| name.rsplit('/').next().unwrap_or(name));
    out.insert("general.name", Value::String(title(name)));
    out.insert("general.size_label", Value::String(size_label(parameters)));
    Ok(())
}

/// Words with a capital, except versions and words that have capitals already.
fn title(name: &str) -> String {
    let word = |word: &str| {
        let is_version = word.trim_start_matches('v').starts_with(|c: char| c.is_ascii_digit());
        let lower = word.chars().any(char::is_alphabetic) && !word.chars().any(char::is_uppercase);
        if is_version || !lower {
            return word.to_owned();
        }
        let mut chars = word.chars();
        chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
    };
    name.trim().replace('-', " ").split_whitespace().map(word).collect::<Vec<_>>().join(" ")
}

/// `135M`, `1.5B`: two digits at least.
fn size_label(parameters: u64) -> String {
    let count = parameters as f64;
    let (scaled, unit) = match count {
        n if n > 1e12 => (n * 1e-12, "T"),
        n if n > 1e9 => (n * 1e-9, "B"),
        n if n > 1e6 => (n * 1e-6, "M"),
        n => (n * 1e-3, "K"),
    };
    let rounded = format!("{scaled:.0}");
    let digits = 2_usize.saturating_sub(rounded.trim_start_matches('0').len());
    format!("{scaled:.digits$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_two_digits_and_names_capitals() {
        let sizes = [
            (361_088, "361K"),
            (36_000, "36K"),
            (1_543_714_304, "1.5B"),
            (134_515_008, "135M"),
            (500, "0.50K"),
        ];
        for (count, label) in sizes {
            assert_eq!(size_label(count), label);
        }
        assert_eq!(title("tiny-llama"), "Tiny Llama");
        assert_eq!(title("SmolLM2-135M-instruct-v0.2"), "SmolLM2 135M Instruct v0.2");
    }
}
