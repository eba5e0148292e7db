//! Base + adapter -> a Hugging Face folder, dense or in bitsandbytes' 4 bits, tensor by tensor.
//!
//! An adapted weight is dequantized, adapted in f32 and stored again; the others are copied where they are
//! already stored as asked. What storing took from the change is measured and returned.

use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::safetensors::{Checkpoint, Dtype, TensorView};
use qpeft_kernels::weight::WeightType;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::merge::MergeReport;
use crate::error::{Error, Result};
use crate::model::base::{dense_type, folder_matrix};
use crate::model::residual::config_as;
use crate::model::save::slot_of;
use crate::model::save_folder::{weights, write_folder};
use crate::model::{Base, BaseWeight, Decoder, Linear, Parameters};

/// How the weights of the merged folder are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FolderTarget {
    /// All tensors dense: F32, F16 or BF16; without a type, as the base's dense tensors.
    Dense(Option<GgmlType>),
    /// The linears of the blocks in 4 bits, everything else as in the base.
    FourBit {
        /// The code book.
        quant_type: QuantType,
        /// Whether the scales are quantized too; without it, as in the base.
        double: Option<bool>,
    },
}

/// Rows that one task adapts or compares.
const ROWS_PER_TASK: usize = 64;

/// Writes the merged model of `base` and the adapters on `decoder` to the folder `path`.
///
/// # Errors
/// The base is not a folder, a merged value is not finite, or the folder cannot be written; nothing is left
/// at `path` then.
pub fn merge_to_folder(
    base: &Base,
    decoder: &Decoder,
    params: &Parameters,
    target: FolderTarget,
    path: &Path,
    shard_bytes: u64,
    mut progress: impl FnMut(usize, usize),
) -> Result<MergeReport> {
    let folder = folder_of(base)?;
    let dense = dense_type_of(folder);
    let to = match target {
        FolderTarget::Dense(dtype) => WeightType::Ggml(dtype.unwrap_or(dense)),
        FolderTarget::FourBit { quant_type, double } => {
            let is_double =
                |w: &BaseWeight| matches!(w.weight_type(), WeightType::FourBit { double: true, .. });
            let double = double.unwrap_or_else(|| decoder.linears().any(|linear| is_double(&linear.weight)));
            WeightType::FourBit { quant_type, double }
        }
    };
    let others = match target {
        FolderTarget::Dense(dtype) => dtype,
        FolderTarget::FourBit { .. } => None,
    };
    let values = params.values.read()?;
    let mut report = MergeReport::default();
    let (total, mut done) = (weights(folder).len(), 0);
    write_folder(folder, path, &config(folder, to), shard_bytes, |name| {
        progress(done, total);
        done += 1;
        let linear =
            slot_of(name).and_then(|(layer, slot)| Some(&decoder.layers.get(layer)?.linears[slot as usize]));
        let Some(linear) = linear else {
            return other(folder, name, others.unwrap_or(dense), others, &mut report);
        };
        let is_adapted = linear.adapter.is_some();
        if !is_adapted && linear.weight.weight_type() == to {
            report.copied += 1;
            return Ok(linear.weight.tensors(name));
        }
        let merged = merged(linear, &values);
        let empty = BaseWeight::from_f32(linear.weight.rows(), linear.weight.cols(), &merged)?;
        // 4-bit values are rounded to the type that the base's dense tensors have.
        let stored = empty.quantized_from(to, element(dense)).map_err(|e| at(name, &e))?;
        if is_adapted {
            report.merged += 1;
            measure(&mut report, linear, &merged, &stored);
        } else {
            report.converted += 1;
        }
        Ok(stored.tensors(name))
    })?;
    progress(total, total);
    Ok(report)
}

fn at(name: &str, e: &qpeft_kernels::Error) -> Error {
    Error::refused(format!("tensor `{name}`: {e}"))
}

/// The folder behind a base.
pub fn folder_of(base: &Base) -> Result<&Checkpoint> {
    match base {
        Base::Folder(folder) => Ok(folder),
        Base::Quantized { base, .. } => folder_of(base),
        Base::Gguf(file) => Err(Error::refused(format!(
            "`{}` is a GGUF file; a merge to a folder needs a base that is a Hugging Face folder",
            file.path().display()
        ))
        .with_hint("merge with `--to gguf`")),
    }
}

/// The type of the dense tensors: that of the embedding, which no quantization touches.
pub(super) fn dense_type_of(folder: &Checkpoint) -> GgmlType {
    let types = ["model.embed_tokens.weight", "model.norm.weight"];
    let found = types.iter().find_map(|name| dense_type(folder.tensor(name)?.dtype));
    found.unwrap_or(GgmlType::F32)
}

/// The same type by its safetensors name.
pub fn element(dtype: GgmlType) -> Dtype {
    match dtype {
        GgmlType::F16 => Dtype::F16,
        GgmlType::BF16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// `config.json` of the merged folder.
fn config(folder: &Checkpoint, to: WeightType) -> Value {
    let mut config = config_as(folder.config(), to);
    if let (WeightType::Ggml(dtype), Some(object)) = (to, config.as_object_mut()) {
        let name = match dtype {
            GgmlType::F16 => "float16",
            GgmlType::BF16 => "bfloat16",
            _ => "float32",
        };
        let key = if object.contains_key("torch_dtype") { "torch_dtype" } else { "dtype" };
        object.insert(key.to_owned(), json!(name));
    }
    config
}

/// The weight in f32 with its adapter, if it has one.
fn merged(linear: &Linear, values: &[f32]) -> Vec<f32> {
    let cols = linear.weight.cols();
    let mut merged = linear.weight.dequantize();
    if let Some(adapter) = &linear.adapter {
        merged.par_chunks_mut(ROWS_PER_TASK * cols).enumerate().for_each(|(chunk, w)| {
            let start = chunk * ROWS_PER_TASK;
            adapter.merge(start..start + w.len() / cols, w, values);
        });
    }
    merged
}

/// Adds to the report what storing `merged` took from the change.
fn measure(report: &mut MergeReport, linear: &Linear, merged: &[f32], stored: &BaseWeight) {
    let cols = linear.weight.cols();
    let parts: Vec<[f64; 4]> = merged
        .par_chunks(ROWS_PER_TASK * cols)
        .enumerate()
        .map(|(chunk, merged)| {
            let start = chunk * ROWS_PER_TASK;
            let rows = start..start + merged.len() / cols;
            let (mut before, mut after) = (vec![0.0; merged.len()], vec![0.0; merged.len()]);
            linear.weight.dequantize_rows(rows.clone(), &mut before);
            stored.dequantize_rows(rows, &mut after);
            let mut sums = [0.0; 4];
            for ((w, before), stored) in merged.iter().zip(&before).zip(&after) {
                let (w, change) = (f64::from(*w), f64::from(w - before));
                sums[0] += w * w;
                sums[1] += change * change;
                sums[2] += f64::from(stored - before) * change;
                sums[3] += (f64::from(*stored) - w).powi(2);
            }
            sums
        })
        .collect();
    for [adapted, change, arrived, noise] in parts {
        report.adapted += adapted;
        report.change += change;
        report.arrived += arrived;
        report.noise += noise;
    }
}

/// A tensor that is no linear of a block: copied, unless it is packed or another type is asked for.
///
/// `dense`: the type of a packed one; `asked`: the type of all.
fn other(
    folder: &Checkpoint,
    name: &str,
    dense: GgmlType,
    asked: Option<GgmlType>,
    report: &mut MergeReport,
) -> Result<Option<Vec<TensorView>>> {
    let view = folder.require(name)?;
    let is_integer = matches!(
        view.dtype,
        Dtype::BOOL | Dtype::I16 | Dtype::I32 | Dtype::I64 | Dtype::U16 | Dtype::U32 | Dtype::U64
    );
    let keeps = match dense_type(view.dtype) {
        Some(dtype) => asked.is_none_or(|asked| asked == dtype),
        None => is_integer,
    };
    if keeps {
        report.copied += 1;
        return Ok(None);
    }
    report.converted += 1;
    let weight = if view.shape.len() == 2 {
        folder_matrix(folder, name)?
    } else {
        let values = view.to_f32()?;
        BaseWeight::from_f32(1, values.len(), &values)?
    };
    let shape = if view.shape.len() == 2 { vec![weight.rows(), weight.cols()] } else { view.shape.clone() };
    let stored = weight.quantized(WeightType::Ggml(dense)).map_err(|e| at(name, &e))?;
    let mut tensors = stored.tensors(name).expect("a dense type has a place in a folder");
    for tensor in &mut tensors {
        tensor.shape.clone_from(&shape);
    }
    Ok(Some(tensors))
}
