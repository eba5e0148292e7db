//! A GGUF file as a Hugging Face folder: configuration, tokenizer and dequantized safetensors.
//!
//! The mirror of `hf`: the same table, read the other way. Streams; a shard is at most [`SHARD`] bytes.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use qpeft_formats::error::{Error as FormatError, Kind, Place};
use qpeft_formats::file::{AtomicDir, write_atomic};
use qpeft_formats::gguf::{GgufFile, Metadata, TensorInfo, names};
use qpeft_formats::safetensors::{Dtype, SafetensorsWriter};
use qpeft_formats::{GgmlType, blocks};
use qpeft_kernels::cpu::quantize::quantize_rows;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::families::keys::check_finite;
use super::families::rope::{MADE, Rope};
use super::families::{Change, Dims, Family, numbered};
use super::vocab::to_hf;
use crate::error::{Error, Result};
use crate::model::base::dense_type;

/// Bytes of tensor data in one file, as transformers splits.
pub const SHARD: u64 = 5_000_000_000;

/// Elements that are in memory at a time, unless a matrix is transposed.
const CHUNK: usize = 1 << 22;

/// What was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written {
    /// The class of the model.
    pub architecture: &'static str,
    /// The type of all tensors.
    pub dtype: Dtype,
    /// Tensors.
    pub tensors: usize,
    /// Weight files.
    pub shards: usize,
    /// Their data, in bytes.
    pub bytes: u64,
}

/// One tensor of the folder.
struct Planned<'a> {
    info: &'a TensorInfo,
    name: String,
    shape: Vec<usize>,
    change: Change,
    heads: usize,
}

/// The type in which a GGUF is written when nobody asks for one: its own, if its matrices are dense, else
/// BF16, in which every family here computes without overflow.
pub fn default_dtype(file: &GgufFile) -> Dtype {
    let matrix = file.tensors().iter().find(|info| info.shape.len() > 1 && info.name.starts_with("blk."));
    match matrix.map(|info| info.dtype) {
        Some(GgmlType::F32) => Dtype::F32,
        Some(GgmlType::F16) => Dtype::F16,
        _ => Dtype::BF16,
    }
}

/// Writes the folder `dir`; `progress` gets tensors done and to do.
///
/// # Errors
/// The architecture is not supported, a key or tensor is missing, unknown or does not fit the others, or the
/// folder cannot be written; nothing is left at `dir` then.
pub fn write_folder(
    file: &GgufFile,
    dir: &Path,
    dtype: Dtype,
    shard: u64,
    mut progress: impl FnMut(usize, usize),
) -> Result<Written> {
    let metadata = file.metadata();
    let place = file.path().display().to_string();
    let family = Family::of_arch(metadata.require_str("general.architecture")?, &place)?;
    check_finite(metadata, &place)?;
    let table = family.find_hf(&format!("{}{}", family.prefix, embeddings(family))).map(|(row, _)| row.gguf);
    let vocab = file.require(table.unwrap_or("token_embd.weight"))?.n_rows() as u64;
    let dims = Dims::read(family, metadata, vocab, &place)?;
    let planned = plan(file, family, &dims, &place)?;
    let config = config(file, family, &dims, dtype, &place)?;

    let staged = AtomicDir::create(dir)?;
    let put_json = |name: &str, value: &Value| -> Result<()> {
        let mut text = serde_json::to_string_pretty(value).expect("a JSON value has only string keys");
        text.push('\n');
        Ok(write_atomic(&staged.staging().join(name), text.as_bytes())?)
    };
    put_json("config.json", &Value::Object(config.clone()))?;
    put_json("generation_config.json", &generation_config(metadata, &config)?)?;
    to_hf::write(metadata, staged.staging())?;

    let shards = split(&planned, dtype, shard);
    let (count, mut done, mut bytes) = (shards.len(), 0, 0);
    let mut weight_map = Map::new();
    for (number, shard) in shards.into_iter().enumerate() {
        let name = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let declared: Vec<_> = shard.iter().map(|t| (t.name.clone(), dtype, t.shape.clone())).collect();
        let format = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let mut writer = SafetensorsWriter::create(&staged.staging().join(&name), &declared, &format)?;
        for tensor in shard {
            progress(done, planned.len());
            done += 1;
            bytes += write_tensor(file, tensor, dtype, &mut writer)?;
            weight_map.insert(tensor.name.clone(), Value::from(name.as_str()));
        }
        writer.finish()?;
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": bytes}, "weight_map": weight_map});
        put_json("model.safetensors.index.json", &index)?;
    }
    staged.commit()?;
    progress(planned.len(), planned.len());
    let architecture = family.classes[0].architecture;
    Ok(Written { architecture, dtype, tensors: planned.len(), shards: count, bytes })
}

/// The Hugging Face name of the token embeddings, without prefix.
fn embeddings(family: &Family) -> &'static str {
    let row = family.tensors.iter().find(|row| row.gguf == "token_embd.weight");
    row.map_or("embed_tokens.weight", |row| row.hf)
}

/// Every tensor's place and size in the folder, sorted by name; refuses what is unknown, missing or of
/// another size.
fn plan<'a>(
    file: &'a GgufFile,
    family: &'static Family,
    dims: &Dims,
    place: &str,
) -> Result<Vec<Planned<'a>>> {
    let mut planned = Vec::new();
    let mut found = HashSet::new();
    for info in file.tensors() {
        if MADE.contains(&info.name.as_str()) {
            continue;
        }
        let row = family.find_gguf(&info.name).filter(|(row, _)| row.change != Change::Drop);
        let Some((row, layer)) = row.filter(|(_, layer)| layer.is_none_or(|layer| layer < dims.layers))
        else {
            return Err(Error::refused(format!(
                "`{place}`: tensor `{}`: has no place in a Hugging Face folder of architecture `{}` with {} layers",
                info.name, family.classes[0].architecture, dims.layers
            )));
        };
        let shape = dims.shape(row.shape);
        let mut expected = shape.clone();
        if row.change != Change::Transpose {
            expected.reverse();
        }
        if info.shape != expected {
            let (expected, found) = (format!("{expected:?}").into(), format!("{:?}", info.shape).into());
            let error = FormatError::new(Kind::WrongShape { expected, found });
            return Err(error.at(Place::Tensor(info.name.clone())).in_file(file.path()).into());
        }
        found.insert(info.name.as_str());
        let heads = if row.change == Change::PermuteQ { dims.heads } else { dims.kv_heads };
        planned.push(Planned {
            info,
            name: family.hf_name(row, layer),
            shape: shape.into_iter().map(|dim| dim as usize).collect(),
            change: row.change,
            heads: heads as usize,
        });
    }
    for row in family.tensors.iter().filter(|row| !row.optional) {
        for layer in if row.per_layer() { 0..dims.layers } else { 0..1 } {
            let name = numbered(row.gguf, row.per_layer().then_some(layer));
            if !found.contains(name.as_str()) {
                file.require(&name)?;
            }
        }
    }
    planned.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(planned)
}

/// `config.json`.
fn config(
    file: &GgufFile,
    family: &Family,
    dims: &Dims,
    dtype: Dtype,
    place: &str,
) -> Result<Map<String, Value>> {
    let metadata = file.metadata();
    let mut out = Map::new();
    out.insert("architectures".to_owned(), json!([family.classes[0].architecture]));
    out.insert("model_type".to_owned(), json!(family.classes[0].model_type));
    for key in family.keys {
        key.take(family, metadata, dims, &mut out)?;
    }
    out.insert("vocab_size".to_owned(), json!(dims.vocab));
    for fixed in family.fixed {
        fixed.write(&mut out);
    }
    for (name, tensor, there) in family.flags {
        out.insert((*name).to_owned(), json!(file.tensor(tensor).is_some() == *there));
    }
    if let Some(rules) = &family.rope {
        let tensor = |name: &str| -> Result<Option<Vec<f32>>> {
            let Some(info) = file.tensor(name) else { return Ok(None) };
            let pairs = dims.head_dim as usize / 2;
            if info.dtype != GgmlType::F32 || info.n_rows() != 1 || info.row_len() > pairs {
                let expected = format!("{pairs} values of type F32").into();
                let found = format!("{:?} of type {}", info.shape, info.dtype).into();
                let error = FormatError::new(Kind::WrongShape { expected, found });
                return Err(error.at(Place::Tensor(name.to_owned())).in_file(file.path()).into());
            }
            let mut values = vec![0.0; info.row_len()];
            blocks::dequantize_row(info.dtype, &file.bytes(info), &mut values);
            Ok(Some(values))
        };
        Rope::of_gguf(family, rules, metadata, dims, place, &tensor)?.write(rules, &mut out);
    }
    (family.extra)(dims, &mut out);
    for (hf, gguf) in [("bos", "bos"), ("eos", "eos"), ("pad", "padding")] {
        let id = metadata.u32(&format!("tokenizer.ggml.{gguf}_token_id"))?;
        out.insert(format!("{hf}_token_id"), json!(id));
    }
    let name = match dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        _ => "bfloat16",
    };
    // transformers 5 says `dtype`, and older ones `torch_dtype`.
    for key in ["dtype", "torch_dtype"] {
        out.insert(key.to_owned(), json!(name));
    }
    Ok(out)
}

/// `generation_config.json`: the tokens that end a text, and how to sample.
fn generation_config(metadata: &Metadata, config: &Map<String, Value>) -> Result<Value> {
    let mut out = Map::new();
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(id) = config.get(key).filter(|id| !id.is_null()) {
            out.insert(key.to_owned(), id.clone());
        }
    }
    let eos = metadata.u32("tokenizer.ggml.eos_token_id")?;
    let ends =
        [eos, metadata.u32("tokenizer.ggml.eot_token_id")?, metadata.u32("tokenizer.ggml.eom_token_id")?];
    let mut ends: Vec<u32> = ends.into_iter().flatten().collect();
    ends.dedup();
    if ends.len() > 1 {
        out.insert("eos_token_id".to_owned(), json!(ends));
    }
    for (hf, gguf) in [
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("temperature", "temp"),
        ("repetition_penalty", "penalty_repeat"),
    ] {
        if let Some(value) = metadata.f32(&format!("general.sampling.{gguf}"))? {
            out.insert(hf.to_owned(), super::families::keys::decimal(value));
            out.insert("do_sample".to_owned(), json!(true));
        }
    }
    if let Some(value) = metadata.u32("general.sampling.top_k")? {
        out.insert("top_k".to_owned(), json!(value));
        out.insert("do_sample".to_owned(), json!(true));
    }
    Ok(Value::Object(out))
}

/// Tensors in files of at most `limit` bytes (a larger tensor has its own).
fn split<'p, 'a>(planned: &'p [Planned<'a>], dtype: Dtype, limit: u64) -> Vec<Vec<&'p Planned<'a>>> {
    let mut shards: Vec<Vec<&Planned<'_>>> = Vec::new();
    let mut size = 0;
    for tensor in planned {
        let bytes = tensor.shape.iter().product::<usize>() as u64 * dtype.bitsize() as u64 / 8;
        if shards.is_empty() || size + bytes > limit {
            shards.push(Vec::new());
            size = 0;
        }
        size += bytes;
        shards.last_mut().expect("one was pushed").push(tensor);
    }
    shards
}

/// Writes one tensor and returns its bytes.
fn write_tensor(
    file: &GgufFile,
    tensor: &Planned<'_>,
    dtype: Dtype,
    writer: &mut SafetensorsWriter,
) -> Result<u64> {
    let target = dense_type(dtype).expect("callers ask for F32, F16 or BF16");
    let (info, bytes) = (tensor.info, file.bytes(tensor.info));
    let (cols, rows) = (info.row_len(), info.n_rows());
    let mut written = 0;
    if rows == 0 || cols == 0 {
        return Ok(0);
    }
    if info.dtype == target && tensor.change == Change::Same {
        writer.write(&tensor.name, &bytes)?;
        return Ok(bytes.len() as u64);
    }
    let row_bytes = info.dtype.row_bytes(cols)?;
    let read = |row: usize, out: &mut [f32]| {
        blocks::dequantize_row(info.dtype, &bytes[row * row_bytes..(row + 1) * row_bytes], out);
    };
    let mut put = |values: &[f32]| -> Result<()> {
        let packed = pack(target, values, tensor)?;
        written += packed.len() as u64;
        Ok(writer.write(&tensor.name, &packed)?)
    };
    match tensor.change {
        Change::Transpose => {
            let mut whole = vec![0.0; rows * cols];
            whole.par_chunks_mut(cols).enumerate().for_each(|(row, out)| read(row, out));
            let chunk = (CHUNK / rows).clamp(1, cols);
            for start in (0..cols).step_by(chunk) {
                let count = chunk.min(cols - start);
                let mut values = vec![0.0; count * rows];
                values.par_chunks_mut(rows).enumerate().for_each(|(i, out)| {
                    for (row, x) in out.iter_mut().enumerate() {
                        *x = whole[row * cols + start + i];
                    }
                });
                put(&values)?;
            }
        }
        // A bias is one row, whose elements go the way of the weight's rows.
        Change::PermuteQ | Change::PermuteK if info.shape.len() == 1 => {
            let mut row = vec![0.0; cols];
            read(0, &mut row);
            let back = |i| row[names::gguf_row_of_hf_row(i, tensor.heads, cols / tensor.heads)];
            put(&(0..cols).map(back).collect::<Vec<_>>())?;
        }
        change => {
            let chunk = (CHUNK / cols).clamp(1, rows);
            let mut values = vec![0.0; chunk * cols];
            for start in (0..rows).step_by(chunk) {
                let values = &mut values[..chunk.min(rows - start) * cols];
                values.par_chunks_mut(cols).enumerate().for_each(|(i, out)| {
                    let row = start + i;
                    match change {
                        Change::PermuteQ | Change::PermuteK => {
                            read(names::gguf_row_of_hf_row(row, tensor.heads, rows / tensor.heads), out);
                        }
                        Change::PlusOne => {
                            read(row, out);
                            for x in out {
                                *x -= 1.0;
                            }
                        }
                        _ => read(row, out),
                    }
                });
                put(values)?;
            }
        }
    }
    Ok(written)
}

/// Values in a dense type.
fn pack(target: GgmlType, values: &[f32], tensor: &Planned<'_>) -> Result<Vec<u8>> {
    const PART: usize = 1 << 14;
    if target == GgmlType::F16
        && let Some(x) = values.iter().find(|x| x.is_finite() && x.abs() >= 65520.0)
    {
        let message = format!("tensor `{}`: has the value {x}, which F16 cannot hold", tensor.info.name);
        return Err(
            Error::refused(message).with_hint("write BF16 (`--dtype bf16`), which has the range of F32")
        );
    }
    let width = target.block_bytes();
    let mut packed = vec![0; values.len() * width];
    packed
        .par_chunks_mut(PART * width)
        .zip(values.par_chunks(PART))
        .for_each(|(packed, values)| quantize_rows(target, values, values.len(), None, packed));
    Ok(packed)
}
