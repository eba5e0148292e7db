//! Base + adapter -> one GGUF, tensor by tensor.
//!
//! An adapted weight is dequantized, adapted in f32 and packed again; everything else is copied byte for
//! byte unless another type is asked for. What packing took from the change is measured and returned.

use std::collections::HashMap;
use std::path::Path;

use qpeft_formats::GgmlType;
use qpeft_formats::gguf::split::SplitLimit;
use qpeft_formats::gguf::{GgufFile, TensorDecl, TensorInfo, Value};
use qpeft_formats::mixture::{Mixture, ModelFacts};
use qpeft_kernels::cpu::quantize::quantize_rows;
use qpeft_kernels::weight::dequantize_blocks;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::model::layer::Slot;
use crate::model::save::{Replacement, pack_rows, slot_of, write_gguf};
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
    /// ‖W'‖² of the adapted weights.
    pub adapted: f64,
    /// ‖W' - W‖²: the change.
    pub change: f64,
    /// ⟨stored - W, W' - W⟩: the part of the change that is in what was stored.
    pub arrived: f64,
    /// ‖stored - W'‖²: the noise of packing.
    pub noise: f64,
}

impl MergeReport {
    /// Share of the change that arrives in the packed weights: rounding to a coarse grid swallows small
    /// changes.
    pub fn arrived_share(&self) -> f64 {
        if self.change == 0.0 { 1.0 } else { self.arrived / self.change }
    }

    /// ‖stored - W'‖ / ‖W' - W‖.
    pub fn noise_to_change(&self) -> f64 {
        if self.change == 0.0 { 0.0 } else { (self.noise / self.change).sqrt() }
    }

    /// ‖stored - W'‖ / ‖W'‖.
    pub fn relative_noise(&self) -> f64 {
        if self.adapted == 0.0 { 0.0 } else { (self.noise / self.adapted).sqrt() }
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

/// Writes the merged model of `base` and the adapters on `decoder` to `path`.
///
/// # Errors
/// The base is not a GGUF, a merged value is not finite, or the file cannot be written; nothing is left at
/// `path` then.
pub fn merge_to_gguf(
    base: &Base,
    decoder: &Decoder,
    params: &Parameters,
    options: &MergeOptions,
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
    let values = params.values.read()?;
    let mut report = MergeReport::default();
    let mut metadata = file.metadata().clone();
    let mut chosen = HashMap::new();
    if let Some(mixture) = &options.mixture {
        metadata.insert("general.file_type", Value::U32(mixture.file_type.id()));
        let decls: Vec<TensorDecl> = file
            .tensors()
            .iter()
            .map(|t| TensorDecl { name: t.name.clone(), shape: t.shape.clone(), dtype: t.dtype })
            .collect();
        let choices = mixture.choose(&ModelFacts::read(&metadata)?, &decls, false)?;
        for (decl, choice) in decls.into_iter().zip(choices) {
            if choice.dtype != choice.wanted {
                report.fallbacks.push((decl.name.clone(), choice.wanted, choice.dtype));
            }
            chosen.insert(decl.name, choice.dtype);
        }
    }
    let dtype_of = |info: &TensorInfo| chosen.get(&info.name).copied().unwrap_or(info.dtype);
    let (total, mut done) = (file.tensors().len(), 0);
    write_gguf(
        file,
        path,
        &metadata,
        options.split,
        |_, info| Ok(dtype_of(info)),
        |name, info| {
            progress(done, total);
            done += 1;
            let dtype = dtype_of(info);
            let linear = name.and_then(slot_of).and_then(|(layer, slot)| adapted(decoder, layer, slot));
            if let Some((linear, slot)) = linear {
                report.merged += 1;
                let heads = slot.permuted_heads(&decoder.config);
                return merged_weight(linear, &values, dtype, heads, &info.name, &mut report).map(Some);
            }
            if dtype == info.dtype {
                report.copied += 1;
                return Ok(None);
            }
            report.converted += 1;
            converted_weight(file, info, dtype).map(Some)
        },
    )?;
    progress(total, total);
    Ok(report)
}

/// The linear of a tensor, if it has an adapter.
fn adapted(decoder: &Decoder, layer: usize, slot: Slot) -> Option<(&Linear, Slot)> {
    let linear = &decoder.layers.get(layer)?.linears[slot as usize];
    linear.adapter.is_some().then_some((linear, slot))
}

/// One adapted weight: W' in f32 by row chunks, packed, with the loss of packing measured.
///
/// A factor that the file keeps beside the blocks (NVFP4) stays there, so W' is divided by it first.
fn merged_weight(
    linear: &Linear,
    values: &[f32],
    dtype: GgmlType,
    heads: Option<usize>,
    name: &str,
    report: &mut MergeReport,
) -> Result<Replacement> {
    const CHUNK: usize = 64;
    let adapter = linear.adapter.as_ref().expect("only adapted linears are merged");
    let (cols, factor) = (linear.weight.cols(), linear.weight.factor());
    dtype.require_quantizer(false)?;
    let row_bytes = dtype.row_bytes(cols)?;
    let mut merged = vec![0.0; linear.weight.rows() * cols];
    let parts: Vec<[f64; 4]> = merged
        .par_chunks_mut(CHUNK * cols)
        .enumerate()
        .map(|(chunk, w)| {
            let rows = chunk * CHUNK..chunk * CHUNK + w.len() / cols;
            linear.weight.dequantize_rows(rows.clone(), w);
            let before = w.to_vec();
            adapter.merge(rows, w, values);
            let unscaled: Vec<f32> = w.iter().map(|w| w / factor).collect();
            let (mut packed, mut stored) = (vec![0; w.len() / cols * row_bytes], vec![0.0; w.len()]);
            quantize_rows(dtype, &unscaled, cols, None, &mut packed);
            dequantize_blocks(dtype, &packed, &mut stored);
            let mut sums = [0.0; 4];
            for ((w, before), stored) in w.iter().zip(&before).zip(&stored) {
                let stored = stored * factor;
                let (w, change) = (f64::from(*w), f64::from(w - before));
                sums[0] += w * w;
                sums[1] += change * change;
                sums[2] += f64::from(stored - before) * change;
                sums[3] += (f64::from(stored) - w).powi(2);
            }
            w.copy_from_slice(&unscaled);
            sums
        })
        .collect();
    for [adapted, change, arrived, noise] in parts {
        report.adapted += adapted;
        report.change += change;
        report.arrived += arrived;
        report.noise += noise;
    }
    pack_rows(&merged, cols, dtype, heads, name)
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
