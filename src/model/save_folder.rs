//! A Hugging Face folder written again with some of its weights replaced: a residual base, a merged model, a
//! quantized one. Everything else is copied byte for byte, tensor by tensor.

use std::collections::BTreeMap;
use std::path::Path;

use qpeft_formats::bitsandbytes::weight_of;
use qpeft_formats::file::{AtomicDir, write_atomic};
use qpeft_formats::safetensors::folder::header_bytes;
use qpeft_formats::safetensors::{Checkpoint, FolderWriter, TensorView};
use serde_json::Value;

use crate::error::{Error, Result};

/// Tensors that a 4-bit weight has beside itself.
const COMPANIONS: [&str; 5] =
    [".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4"];

/// The weights of a folder, each with the tensors that store it: its own, then scales and code books.
pub fn weights(folder: &Checkpoint) -> BTreeMap<String, Vec<String>> {
    let mut weights: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in folder.names() {
        let weight = weight_of(name).filter(|weight| folder.tensor(weight).is_some());
        weights.entry(weight.unwrap_or_else(|| name.to_owned())).or_default().push(name.to_owned());
    }
    weights
}

/// Writes a folder like `folder`, with another `config.json`, to `path`.
///
/// `replace`: the tensors in place of a weight and of what belongs to it (scales, code books), or `None` to
/// copy them. `shard_bytes`: the most data that one file holds.
///
/// # Errors
/// The output cannot be written or `replace` fails. Nothing is left at `path` then.
pub fn write_folder(
    folder: &Checkpoint,
    path: &Path,
    config: &Value,
    shard_bytes: u64,
    mut replace: impl FnMut(&str) -> Result<Option<Vec<TensorView>>>,
) -> Result<()> {
    let staged = AtomicDir::create(path)?;
    let weights = weights(folder);
    // Any weight may be replaced by one that has companions.
    let is_matrix = |name: &str| folder.tensor(name).is_some_and(|view| view.shape.len() == 2);
    let longest: Vec<String> = weights
        .iter()
        .filter(|(name, stored)| stored.len() == 1 && is_matrix(name))
        .flat_map(|(name, _)| COMPANIONS.map(|suffix| format!("{name}{suffix}")))
        .collect();
    let names = folder.names().chain(longest.iter().map(String::as_str));
    let mut writer = FolderWriter::create(staged.staging(), shard_bytes, header_bytes(names));
    for (name, stored) in &weights {
        let tensors = match replace(name)? {
            Some(tensors) => tensors,
            None => stored.iter().map(|name| folder.require(name)).collect::<Result<_, _>>()?,
        };
        for tensor in &tensors {
            writer.write(tensor)?;
        }
    }
    writer.finish()?;
    copy_side_files(folder.dir(), staged.staging())?;
    let mut text = serde_json::to_vec_pretty(config).expect("a JSON value has a text form");
    text.push(b'\n');
    write_atomic(&staged.staging().join("config.json"), &text)?;
    Ok(staged.commit()?)
}

/// Tokenizer, chat templates and generation settings: the small files that make a folder of weights a
/// model. `config.json` is written apart.
const SIDE_FILES: [&str; 13] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
];

fn copy_side_files(from: &Path, to: &Path) -> Result<()> {
    for name in SIDE_FILES {
        let file = from.join(name);
        if file.exists() {
            // Not `fs::copy`: a base that is read-only would make the copy read-only too.
            std::fs::read(&file)
                .and_then(|bytes| std::fs::write(to.join(name), bytes))
                .map_err(|e| Error::refused(format!("cannot copy `{}`: {e}", file.display())))?;
        }
    }
    Ok(())
}
