//! What is wrong with a model that can be read: numbers that are not finite, a tokenizer with holes, layers
//! that are missing. Each problem is one line with the tensor or key.

use std::collections::BTreeSet;

use anyhow::Context;
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{Array, GgufFile, Metadata, Value};
use qpeft_formats::safetensors::TensorView;
use qpeft_formats::{GgmlType, blocks};
use rayon::prelude::*;

use crate::model::base::dense_type;
use crate::model::config::Config;

/// Bytes that are read at once.
const CHUNK: usize = 4 << 20;

/// Problems of a GGUF. Reads all of its data.
///
/// # Errors
/// A file cannot be read.
pub fn of_gguf(file: &GgufFile) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    if file.metadata().get("general.type").is_none_or(|t| *t == Value::String("model".into())) {
        if let Err(e) = Config::from_gguf(file) {
            problems.push(format!("qpeft cannot train on it: {e}"));
        }
        problems.extend(of_layers(file));
        problems.extend(of_tokenizer(file));
    }
    let tensors: Vec<_> =
        file.tensors().iter().map(|t| (t.name.as_str(), Some(t.dtype), file.bytes(t))).collect();
    problems.extend(of_numbers(&tensors)?);
    Ok(problems)
}

/// Tensors of a safetensors file, with values that are not finite. Reads all data of dense types.
///
/// # Errors
/// A file cannot be read.
pub fn of_views(views: &[TensorView]) -> anyhow::Result<Vec<String>> {
    let tensors: Vec<_> =
        views.iter().map(|v| (v.name.as_str(), dense_type(v.dtype), v.bytes.clone())).collect();
    of_numbers(&tensors)
}

/// The first element or scale of each tensor that is not finite.
fn of_numbers(tensors: &[(&str, Option<GgmlType>, Bytes)]) -> anyhow::Result<Vec<String>> {
    let found = tensors.par_iter().map(|(name, dtype, bytes)| -> anyhow::Result<Option<String>> {
        let Some(dtype) = *dtype else { return Ok(None) };
        let step = CHUNK / dtype.block_bytes() * dtype.block_bytes();
        let mut chunk = Vec::new();
        for start in (0..bytes.len()).step_by(step) {
            chunk.resize(step.min(bytes.len() - start), 0);
            bytes.read_at(start, &mut chunk).with_context(|| format!("cannot read tensor `{name}`"))?;
            if let Err((index, value)) = blocks::check_scales(dtype, &chunk) {
                let index = start / dtype.block_bytes() + index;
                let what = if dtype.is_dense() { "element" } else { "the scale of block" };
                return Ok(Some(format!("tensor `{name}`: {what} {index} is {value}")));
            }
        }
        Ok(None)
    });
    Ok(found.collect::<anyhow::Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// Layers that the metadata promise and no tensor lies in.
fn of_layers(file: &GgufFile) -> Option<String> {
    let metadata = file.metadata();
    let arch = metadata.str("general.architecture").ok()??;
    let layers = metadata.u32(&format!("{arch}.block_count")).ok()??;
    let found: BTreeSet<u32> = file
        .tensors()
        .iter()
        .filter_map(|t| t.name.strip_prefix("blk.")?.split('.').next()?.parse().ok())
        .collect();
    // A file of metadata alone has none at all.
    let missing = (0..layers).find(|layer| !found.contains(layer))?;
    (!file.tensors().is_empty()).then(|| format!("layer {missing} of {layers} has no tensors"))
}

/// Keys of the tokenizer that are missing or do not belong together.
fn of_tokenizer(file: &GgufFile) -> Vec<String> {
    let metadata = file.metadata();
    let length = |key: &str| match metadata.get(key) {
        Some(Value::Array(array)) => Some(array.len()),
        _ => None,
    };
    let mut problems = Vec::new();
    if metadata.get("tokenizer.ggml.model").is_none() {
        problems.push("key `tokenizer.ggml.model`: the key is missing".to_owned());
    }
    let Some(tokens) = length("tokenizer.ggml.tokens") else {
        problems.push("key `tokenizer.ggml.tokens`: the key is missing or no array".to_owned());
        return problems;
    };
    for key in ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"] {
        if let Some(found) = length(key).filter(|&found| found != tokens) {
            problems.push(format!("key `{key}`: has {found} elements, there are {tokens} tokens"));
        }
    }
    let is = |model: &str| metadata.str("tokenizer.ggml.model").is_ok_and(|found| found == Some(model));
    for (model, key) in [("gpt2", "tokenizer.ggml.merges"), ("llama", "tokenizer.ggml.scores")] {
        if is(model) && metadata.get(key).is_none() {
            problems.push(format!("key `{key}`: the key is missing, a `{model}` tokenizer has it"));
        }
    }
    problems.extend(ids(metadata, tokens));
    if let Some(embedding) = file.tensor("token_embd.weight")
        && embedding.n_rows() != tokens
    {
        let rows = embedding.n_rows();
        problems.push(format!("tensor `token_embd.weight`: has {rows} rows, there are {tokens} tokens"));
    }
    problems
}

/// Special tokens that are not in the vocabulary.
fn ids(metadata: &Metadata, tokens: usize) -> Vec<String> {
    let id = |value: &Value| match *value {
        Value::U32(id) => Some(u64::from(id)),
        Value::I32(id) => u64::try_from(id).ok(),
        Value::U64(id) => Some(id),
        _ => None,
    };
    metadata
        .iter()
        .filter(|(key, _)| key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id"))
        .filter_map(|(key, value)| Some((key, id(value)?)))
        .filter(|(_, id)| *id >= tokens as u64)
        .map(|(key, id)| format!("key `{key}`: is {id}, there are {tokens} tokens"))
        .collect()
}

/// Whether the head is the token embedding, where there is one.
pub fn head(file: &GgufFile) -> Option<&'static str> {
    file.tensor("token_embd.weight")?;
    Some(if file.tensor("output.weight").is_some() { "untied" } else { "tied" })
}

/// The tokens of a GGUF's vocabulary, if it has one.
pub fn vocabulary(metadata: &Metadata) -> Option<usize> {
    match metadata.get("tokenizer.ggml.tokens") {
        Some(Value::Array(Array::String(tokens))) => Some(tokens.len()),
        _ => None,
    }
}
