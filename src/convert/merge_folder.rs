//! Base + adapter -> a Hugging Face folder, dense or in bitsandbytes' 4 bits, tensor by tensor.
//!
//! An adapted weight is dequantized, adapted in f32 and stored again; the others are copied where they are
//! already stored as asked. What storing took from the change is measured and returned.

use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::safetensors::{Checkpoint, Dtype, TensorView};
use qpeft_kernels::Device;
use qpeft_kernels::ops::packing_loss::PackingLoss;
use qpeft_kernels::weight::WeightType;
use serde_json::{Value, json};

use super::adapted::{Merger, one_ahead};
use super::merge::MergeReport;
use crate::error::{Error, Result};
use crate::model::base::{dense_type, folder_matrix};
use crate::model::residual::config_as;
use crate::model::save::linear_of;
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

/// Writes the merged model of `base` and the adapters on `decoder` to the folder `path`, computing on `device`.
///
/// # Errors
/// The base is not a folder, a merged value is not finite, or the folder cannot be written; nothing is left
/// at `path` then.
pub fn merge_to_folder(
    base: &Base,
    decoder: &Decoder,
    params: &Parameters,
    target: FolderTarget,
    device: &Device,
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
    let mut merger = Merger::new(decoder, params, device)?;
    let mut report = MergeReport::default();
    let linear_of = |name: &str| linear_of(decoder, name).map(|(linear, _)| linear);
    let is_packed = |linear: &Linear| linear.adapter.is_some() || linear.weight.weight_type() != to;
    let weights = weights(folder);
    let jobs = weights.keys().filter_map(|name| {
        let linear = linear_of(name).filter(|linear| is_packed(linear))?;
        Some((name.as_str(), linear))
    });
    let mut loss = PackingLoss::default();
    let make = |(name, linear): (&str, &Linear)| {
        // 4-bit values are rounded to the type that the base's dense tensors have.
        let (rows, cols) = (linear.weight.rows(), linear.weight.cols());
        let like = BaseWeight::empty_from(to, rows, cols, element(dense)).map_err(|e| at(name, &e))?;
        Ok(merger.pack(name, linear, &like, &mut loss)?.tensors(name))
    };
    let (total, mut done) = (weights.len(), 0);
    one_ahead(jobs.collect(), make, |next| {
        write_folder(folder, path, &config(folder, to), shard_bytes, |name| {
            progress(done, total);
            done += 1;
            let Some(linear) = linear_of(name) else {
                return other(folder, name, others.unwrap_or(dense), others, &mut report);
            };
            if !is_packed(linear) {
                report.copied += 1;
                return Ok(linear.weight.tensors(name));
            }
            let count = if linear.adapter.is_some() { &mut report.merged } else { &mut report.converted };
            *count += 1;
            next()
        })
    })?;
    report.loss = loss;
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
