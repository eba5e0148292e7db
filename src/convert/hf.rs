//! A Hugging Face folder as the source of a GGUF: names, shapes, row order and metadata of llama.cpp's converter.
//!
//! Everything is checked when the folder is opened: each tensor has its place and its size, and none is
//! missing. What a GGUF cannot say is refused, or noted where llama.cpp's converter leaves it out too.

use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;

use qpeft_formats::bitsandbytes::weight_of;
use qpeft_formats::error::{Error as FormatError, Kind, Place};
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{Metadata, TensorDecl, Value, names};
use qpeft_formats::safetensors::{Checkpoint, Dtype, TensorView};
use qpeft_formats::{GgmlType, blocks};

use super::card;
use super::families::rope::Rope;
use super::families::{Change, Dims, Family, HEAD, Key, numbered};
use super::gguf::read_packed;
use super::merge_folder::dense_type_of;
use super::settings::Settings;
use super::source::Source;
use super::vocab;
use crate::error::{Error, Result};
use crate::model::BaseWeight;
use crate::model::base::{dense_type, folder_matrix, quantization};

/// An opened and checked folder.
#[derive(Debug)]
pub struct HfSource {
    folder: Checkpoint,
    family: &'static Family,
    metadata: Metadata,
    tensors: Vec<TensorDecl>,
    origins: Vec<Origin>,
    notes: Vec<String>,
    /// The packed weight that was read last: pieces of a tensor are asked for one after another.
    packed: Mutex<Option<(usize, BaseWeight)>>,
}

/// Where a tensor's values come from.
#[derive(Debug)]
enum Origin {
    /// A tensor of the folder; the number of heads matters where rows are permuted.
    Stored { view: TensorView, change: Change, heads: usize },
    /// A matrix that the folder holds in 4 or 8 bits, with scales in other tensors.
    Packed { name: String, change: Change, heads: usize },
    /// Settings of `config.json`.
    Made(Vec<f32>),
}

/// Buffers that old checkpoints contain and no format needs.
const BUFFERS: [&str; 5] =
    [".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"];

/// Parts of multimodal models that a text model does not have.
const OTHER_PARTS: [&str; 3] = ["vision_tower.", "multi_modal_projector.", "vision_model."];

impl HfSource {
    /// Opens a folder with `config.json`, safetensors and tokenizer files.
    ///
    /// # Errors
    /// The family is not supported, a setting is missing or cannot be said in a GGUF, a tensor is missing,
    /// unknown or of another shape, or the tokenizer cannot be converted.
    pub fn open(dir: &Path) -> Result<HfSource> {
        HfSource::open_with_pre(dir, None)
    }

    /// As [`HfSource::open`], with the value of `tokenizer.ggml.pre` where the user knows it better.
    ///
    /// # Errors
    /// See [`HfSource::open`].
    pub fn open_with_pre(dir: &Path, pre: Option<&str>) -> Result<HfSource> {
        let folder = Checkpoint::open(dir)?;
        let mut config = Settings::new(&folder.config_path(), folder.config().clone())?;
        let family = Family::of_config(&config)?;
        config.flatten("text_config")?;
        for fixed in family.fixed {
            fixed.check(family, &config)?;
        }

        let (keys, rope) = keys(family, &config)?;
        // Multimodal configurations may leave it to the default of their class.
        let vocab_size = match config.size("vocab_size")? {
            Some(size) => size,
            None => embedding_rows(&folder, family).map_or_else(|| config.require_size("vocab_size"), Ok)?,
        };
        let place = config.path().display().to_string();
        let dims = Dims::read(family, &keys, vocab_size.into(), &place)?;
        let mut notes = (family.check)(&config, &dims)?;

        let (mut tensors, mut origins) = stored(&folder, family, &dims, &config, &mut notes)?;
        if let Some(rope) = &rope {
            // Sizes were compared with the tensors, so that what is made of them is not too large.
            let made = rope.tensors(&dims, &config)?.into_iter();
            let (first, values): (Vec<_>, Vec<_>) = made
                .map(|(name, values)| {
                    let shape = vec![values.len() as u64];
                    (TensorDecl { name: name.to_owned(), shape, dtype: GgmlType::F32 }, Origin::Made(values))
                })
                .unzip();
            tensors.splice(0..0, first);
            origins.splice(0..0, values);
        }

        let vocab = vocab::of_folder(dir, family, vocab_size, pre)?;
        notes.extend(vocab.notes);

        let mut metadata = Metadata::new();
        metadata.insert("general.architecture", Value::String(family.arch.to_owned()));
        metadata.insert("general.type", Value::String("model".to_owned()));
        let parameters = tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum();
        notes.extend(card::describe(dir, &config, parameters, &mut metadata)?);
        for (key, value) in keys.iter() {
            metadata.insert(key, value.clone());
        }
        metadata.insert("general.quantization_version", Value::U32(2));
        for (key, value) in vocab.metadata.iter() {
            metadata.insert(key, value.clone());
        }
        let packed = Mutex::new(None);
        Ok(HfSource { folder, family, metadata, tensors, origins, notes, packed })
    }

    /// The name that a tensor has in the folder; none for what is made of the configuration.
    pub fn hf_name(&self, tensor: usize) -> Option<String> {
        match &self.origins[tensor] {
            Origin::Stored { view, .. } => Some(view.name.clone()),
            Origin::Packed { name, .. } => Some(name.clone()),
            Origin::Made(_) => None,
        }
    }

    /// A packed weight; the last one is kept, because pieces of a tensor follow each other.
    fn packed_weight(&self, tensor: usize, name: &str) -> Result<BaseWeight> {
        let mut last = self.packed.lock().expect("no holder of the lock panics");
        if let Some((index, weight)) = &*last
            && *index == tensor
        {
            return Ok(weight.clone());
        }
        let weight = folder_matrix(&self.folder, name)?;
        *last = Some((tensor, weight.clone()));
        Ok(weight)
    }

    /// The family that the folder belongs to.
    pub fn family(&self) -> &'static Family {
        self.family
    }

    /// What a GGUF cannot say and is therefore lost, one sentence each, for people.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }
}

impl Source for HfSource {
    fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    fn tensors(&self) -> &[TensorDecl] {
        &self.tensors
    }

    fn rows(&self, tensor: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let cols = self.tensors[tensor].row_len();
        assert_eq!(out.len(), rows.len() * cols, "`out` must hold the rows that are asked for");
        let (view, change, heads) = match &self.origins[tensor] {
            Origin::Made(values) => {
                out.copy_from_slice(&values[rows.start * cols..rows.end * cols]);
                return Ok(());
            }
            Origin::Packed { name, change, heads } => {
                let weight = self.packed_weight(tensor, name)?;
                if *change == Change::Same {
                    weight.dequantize_rows(rows, out);
                    return Ok(());
                }
                let head_dim = weight.rows() / heads;
                for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
                    let from = names::hf_row_of_gguf_row(row, *heads, head_dim);
                    weight.dequantize_rows(from..from + 1, out);
                }
                return Ok(());
            }
            Origin::Stored { view, change, heads } => (view, *change, *heads),
        };
        let total = view.shape.iter().product::<usize>();
        let width = view.bytes.len().checked_div(total).unwrap_or(0);
        // Read, not mapped: a whole model passes through here, and mapped pages would stay.
        let read = |elements: Range<usize>, out: &mut [f32]| -> Result<()> {
            thread_local! {
                static BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
            }
            BYTES.with_borrow_mut(|bytes| {
                bytes.resize(elements.len() * width, 0);
                read_packed(&view.bytes, elements.start * width, bytes)?;
                decode(view.dtype, bytes, out);
                Ok(())
            })
        };
        match change {
            Change::Same | Change::Drop => read(rows.start * cols..rows.end * cols, out)?,
            Change::PlusOne => {
                read(rows.start * cols..rows.end * cols, out)?;
                for x in out {
                    *x += 1.0;
                }
            }
            // A bias is one row, whose elements go the way of the weight's rows.
            Change::PermuteQ | Change::PermuteK => {
                let is_vector = self.tensors[tensor].shape.len() == 1;
                let (units, unit) = if is_vector { (0..total, 1) } else { (rows, cols) };
                let head_dim = total / unit / heads;
                for (row, out) in units.zip(out.chunks_exact_mut(unit)) {
                    let from = names::hf_row_of_gguf_row(row, heads, head_dim);
                    read(from * unit..(from + 1) * unit, out)?;
                }
            }
            Change::Transpose => {
                let stride = total / cols;
                let mut piece = vec![0.0; rows.len()];
                for column in 0..cols {
                    let start = column * stride + rows.start;
                    read(start..start + rows.len(), &mut piece)?;
                    for (row, &x) in piece.iter().enumerate() {
                        out[row * cols + column] = x;
                    }
                }
            }
        }
        Ok(())
    }

    fn packed(&self, tensor: usize) -> Option<Bytes> {
        match &self.origins[tensor] {
            Origin::Stored { view, change: Change::Same, .. }
                if dense_type(view.dtype) == Some(self.tensors[tensor].dtype) =>
            {
                Some(view.bytes.clone())
            }
            _ => None,
        }
    }
}

/// Tensors that llama.cpp wants in F32 whatever the others are: vectors, norms, learned positions.
pub fn stays_f32(name: &str, dims: usize) -> bool {
    dims <= 1
        || name.ends_with("_norm.weight")
        || !name.ends_with(".weight")
        || name == "position_embd.weight"
}

/// The GGUF keys of the family, in the order of its table, and its rotary embedding.
fn keys(family: &Family, config: &Settings) -> Result<(Metadata, Option<Rope>)> {
    let rope = match &family.rope {
        Some(rules) => Some((rules, Rope::of_config(family, rules, config)?)),
        None => None,
    };
    let mut keys = Metadata::new();
    for key in family.keys {
        match (key, &rope) {
            (Key::Rope, Some((rules, rope))) => rope.put(family, rules, &mut keys)?,
            (Key::RopeDims, Some((_, rope))) => rope.put_dims(family, &mut keys)?,
            _ => key.put(family, config, &mut keys)?,
        }
    }
    Ok((keys, rope.map(|(_, rope)| rope)))
}

/// Rows of the token embeddings, if there are any.
fn embedding_rows(folder: &Checkpoint, family: &Family) -> Option<u32> {
    let is_table = |name: &&str| family.find_hf(name).is_some_and(|(row, _)| row.gguf == "token_embd.weight");
    let name = folder.names_by_file().find(is_table)?;
    folder.tensor(name)?.shape.first().and_then(|&rows| u32::try_from(rows).ok())
}

/// The folder's tensors as the GGUF has them, in the order of its files.
fn stored(
    folder: &Checkpoint,
    family: &'static Family,
    dims: &Dims,
    config: &Settings,
    notes: &mut Vec<String>,
) -> Result<(Vec<TensorDecl>, Vec<Origin>)> {
    let (mut tensors, mut origins) = (Vec::new(), Vec::new());
    let mut found = HashSet::new();
    let mut left_out = 0;
    // Refuses what no reader here knows; the scales of what they know belong to their weights.
    quantization(folder)?;
    let dense_rest = dense_type_of(folder);
    for name in folder.names_by_file() {
        if weight_of(name).is_some_and(|weight| folder.tensor(&weight).is_some()) {
            continue;
        }
        if BUFFERS.iter().any(|buffer| name.ends_with(buffer)) {
            continue;
        }
        if OTHER_PARTS.iter().any(|part| name.contains(part)) {
            left_out += 1;
            continue;
        }
        let refuse = |kind| {
            Error::from(FormatError::new(kind).at(Place::Tensor(name.to_owned())).in_file(folder.dir()))
        };
        let Some((row, layer)) =
            family.find_hf(name).filter(|(_, layer)| layer.is_none_or(|l| l < dims.layers))
        else {
            return Err(Error::refused(format!(
                "`{}`: tensor `{name}`: has no place in a model of architecture `{}` with {} layers",
                folder.dir().display(),
                family.arch,
                dims.layers
            )));
        };
        let view = folder.require(name)?;
        let expected = dims.shape(row.shape);
        let is_dense = matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64);
        let packs = matches!(row.change, Change::Same | Change::PermuteQ | Change::PermuteK);
        let shape = if is_dense || packs && view.is_fp8() {
            view.shape.clone()
        } else if packs && matches!(view.dtype, Dtype::U8 | Dtype::I8) {
            let weight = folder_matrix(folder, name)?;
            vec![weight.rows(), weight.cols()]
        } else {
            let found = view.dtype.to_string().into();
            return Err(refuse(Kind::UnsupportedDtype { found, supported: "F32, F16, BF16, F64" }));
        };
        if shape.iter().map(|&dim| dim as u64).ne(expected.iter().copied()) {
            let found = format!("{shape:?}").into();
            return Err(refuse(Kind::WrongShape { expected: format!("{expected:?}").into(), found }));
        }
        let gguf = numbered(row.gguf, layer);
        if !found.insert(gguf.clone()) {
            return Err(refuse(Kind::DuplicateTensor));
        }
        if row.change == Change::Drop {
            continue;
        }
        let mut shape = expected;
        if row.change != Change::Transpose {
            shape.reverse();
        }
        let dense = dense_type(view.dtype).unwrap_or(if is_dense { GgmlType::F32 } else { dense_rest });
        let dtype = if stays_f32(&gguf, shape.len()) { GgmlType::F32 } else { dense };
        let heads = match row.change {
            Change::PermuteQ => dims.heads,
            _ => dims.kv_heads,
        };
        tensors.push(TensorDecl { name: gguf, shape, dtype });
        let (change, heads) = (row.change, heads as usize);
        origins.push(if is_dense {
            Origin::Stored { view, change, heads }
        } else {
            Origin::Packed { name: name.to_owned(), change, heads }
        });
    }
    if left_out > 0 {
        notes
            .push(format!("{left_out} tensors of the vision part are left out: the text model is converted"));
    }
    require_all(folder, family, dims, config, &found)?;
    Ok((tensors, origins))
}

/// Refuses a folder in which a tensor is missing.
fn require_all(
    folder: &Checkpoint,
    family: &Family,
    dims: &Dims,
    config: &Settings,
    found: &HashSet<String>,
) -> Result<()> {
    let missing = |name: String| {
        Err(FormatError::new(Kind::MissingTensor).at(Place::Tensor(name)).in_file(folder.dir()).into())
    };
    // Ends at the first tensor that is missing, however many layers `config.json` declares.
    for tensor in family.tensors.iter().filter(|tensor| !tensor.optional) {
        let layers = if tensor.per_layer() { 0..dims.layers } else { 0..1 };
        for layer in layers {
            let layer = tensor.per_layer().then_some(layer);
            if !found.contains(&numbered(tensor.gguf, layer)) {
                return missing(family.hf_name(tensor, layer));
            }
        }
    }
    let has_head = family.head().is_some_and(|head| found.contains(head.gguf));
    let tied = config.flag("tie_word_embeddings")?.unwrap_or(family.tied);
    let is_headless = config
        .get("architectures")
        .and_then(|list| list[0].as_str())
        .is_some_and(|name| !name.contains("ForCausalLM") && !name.contains("LMHead"));
    if !has_head && !tied && !is_headless {
        return missing(HEAD.to_owned());
    }
    Ok(())
}

/// Elements of a checked type as f32: exact, F64 rounded to nearest.
fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dense_type(dtype) {
        Some(dense) => blocks::dequantize_row(dense, bytes, out),
        None => {
            for (x, bytes) in out.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *x = f64::from_le_bytes(*bytes) as f32;
            }
        }
    }
}
