//! Base + adapter -> one GGUF, tensor by tensor.
//!
//! An adapted weight is dequantized, adapted in f32 and packed again ([`Merger`]); everything else is copied byte for
//! byte unless another type is asked for. What packing took from the change is measured and returned.

use std::collections::HashMap;
use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::gguf::split::SplitLimit;
use qpeft_formats::gguf::{GgufFile, TensorDecl, TensorInfo, Value, names};
use qpeft_formats::mixture::{Mixture, ModelFacts};
use qpeft_kernels::Device;
use qpeft_kernels::ops::packing_loss::PackingLoss;
use qpeft_kernels::weight::{WeightType, dequantize_blocks};
use rayon::prelude::*;

use super::adapted::{Merger, one_ahead};
use crate::error::{Error, Result};
use crate::model::layer::Slot;
use crate::model::save::{Replacement, linear_of, pack_rows, repack, write_gguf};
use crate::model::{Base, Decoder, Linear, Parameters};

/// What a merge did.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MergeReport {
    /// Adapted tensors.
    pub merged: usize,
    /// Other tensors that were packed anew, for another type.
    pub converted: usize,
    /// Tensors copied byte for byte.
    pub copied: usize,
    /// Tensors whose row length does not fit the asked type: name, asked, taken.
    pub fallbacks: Vec<(String, GgmlType, GgmlType)>,
    /// What packing took from the changes of the adapted weights.
    pub loss: PackingLoss,
}

impl MergeReport {
    /// Share of the change that arrives in the packed weights: rounding to a coarse grid swallows small
    /// changes.
    pub fn arrived_share(&self) -> f64 {
        if self.loss.change == 0.0 { 1.0 } else { self.loss.arrived / self.loss.change }
    }

    /// ‖stored - W'‖ / ‖W' - W‖.
    pub fn noise_to_change(&self) -> f64 {
        if self.loss.change == 0.0 { 0.0 } else { (self.loss.noise / self.loss.change).sqrt() }
    }

    /// ‖stored - W'‖ / ‖W'‖.
    pub fn relative_noise(&self) -> f64 {
        if self.loss.adapted == 0.0 { 0.0 } else { (self.loss.noise / self.loss.adapted).sqrt() }
    }
}

/// How the merged model is stored.
#[derive(Debug, Clone, Default)]
pub struct MergeOptions {
    /// The types of the tensors; without it every tensor keeps the base's.
    pub mixture: Option<Mixture>,
    /// Several files in place of one.
    pub split: Option<SplitLimit>,
}

/// Writes the merged model of `base` and the adapters on `decoder` to `path`, computing on `device`.
///
/// # Errors
/// The base is not a GGUF, a merged value is not finite, or the file cannot be written; nothing is left at
/// `path` then.
pub fn merge_to_gguf(
    base: &Base,
    decoder: &Decoder,
    params: &Parameters,
    options: &MergeOptions,
    device: &Device,
    path: &Path,
    mut progress: impl FnMut(usize, usize),
) -> Result<MergeReport> {
    let file = match base {
        Base::Gguf(file) => file,
        Base::Quantized { base: inner, to } if matches!(**inner, Base::Gguf(_)) => {
            return Err(Error::refused(format!(
                "`--to gguf` writes the base's own types, and this adapter was trained on `{}` quantized to {to} at load",
                base.path().display()
            ))
            .with_hint("quantize the GGUF first with `qpeft quantize`, and train on the result"));
        }
        Base::Folder(_) | Base::Quantized { .. } => {
            return Err(Error::refused(format!(
                "`{}` is a Hugging Face folder; `--to gguf` needs a base that is a GGUF file",
                base.path().display()
            ))
            .with_hint("merge with `--to safetensors` or `--to nf4`, or convert the base to GGUF first"));
        }
    };
    let mut merger = Merger::new(decoder, params, device)?;
    let mut report = MergeReport::default();
    let mut metadata = file.metadata().clone();
    let mut chosen = HashMap::new();
    if let Some(mixture) = &options.mixture {
        metadata.insert("general.file_type", Value::U32(mixture.file_type.id()));
        let decls: Vec<TensorDecl> = file.tensors().iter().map(TensorInfo::decl).collect();
        let choices = mixture.choose(&ModelFacts::read(&metadata)?, &decls, false)?;
        for (decl, choice) in decls.into_iter().zip(choices) {
            if choice.dtype != choice.wanted {
                report.fallbacks.push((decl.name.clone(), choice.wanted, choice.dtype));
            }
            chosen.insert(decl.name, choice.dtype);
        }
    }
    let dtype_of = |info: &TensorInfo| chosen.get(&info.name).copied().unwrap_or(info.dtype);
    let adapted = |hf: Option<&str>| -> Option<(&Linear, Slot)> {
        linear_of(decoder, hf?).filter(|(linear, _)| linear.adapter.is_some())
    };
    let jobs = file.tensors().iter().filter_map(|info| {
        let hf = names::hf_tensor(&info.name);
        adapted(hf.as_deref()).map(|(linear, slot)| (linear, slot, info, dtype_of(info)))
    });
    let mut loss = PackingLoss::default();
    let make = |(linear, slot, info, dtype): (&Linear, Slot, &TensorInfo, GgmlType)| {
        // A factor that the file keeps beside the blocks (NVFP4) stays there.
        let like = linear.weight.retyped(WeightType::Ggml(dtype))?;
        let packed = merger.pack(&info.name, linear, &like, &mut loss)?;
        repack(&packed, slot.permuted_heads(&decoder.config))
    };
    let (total, mut done) = (file.tensors().len(), 0);
    one_ahead(jobs.collect(), make, |next| {
        write_gguf(
            file,
            path,
            &metadata,
            options.split,
            |_, info| Ok(dtype_of(info)),
            |name, info| {
                progress(done, total);
                done += 1;
                if adapted(name).is_some() {
                    report.merged += 1;
                    return next().map(Some);
                }
                let dtype = dtype_of(info);
                if dtype == info.dtype {
                    report.copied += 1;
                    return Ok(None);
                }
                report.converted += 1;
                converted_weight(file, info, dtype).map(Some)
            },
        )
    })?;
    report.loss = loss;
    progress(total, total);
    Ok(report)
}

/// A tensor of the base in another type, rows in the order of the file; a factor beside it stays there.
fn converted_weight(file: &GgufFile, info: &TensorInfo, dtype: GgmlType) -> Result<Replacement> {
    let (from, bytes, cols) = (info.dtype, file.bytes(info), info.row_len());
    let mut values = vec![0.0; info.n_rows() * cols];
    values
        .par_chunks_mut(cols)
        .zip(bytes.par_chunks(from.row_bytes(cols)?))
        .for_each(|(row, bytes)| dequantize_blocks(from, bytes, row));
    pack_rows(&values, cols, dtype, None, &info.name)
}
