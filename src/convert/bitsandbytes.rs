//! A Hugging Face folder -> the same folder in bitsandbytes' 4 bits, as transformers would save it.
//!
//! One tensor is in memory at a time, and all cores quantize it. Quantized are the linears of the
//! blocks; embeddings, the output head and norms stay.

use std::path::Path;

use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::bitsandbytes::config::Quantization;
use qpeft_formats::safetensors::Checkpoint;
use qpeft_kernels::ops::quantize::Packers;
use qpeft_kernels::weight::WeightType;

use super::merge_folder::{dense_type_of, element};
use crate::error::{Error, Result};
use crate::model::base::{folder_matrix, quantization};
use crate::model::residual::config_as;
use crate::model::save_folder::{weights, write_folder};

/// Families whose blocks hold no matrices but linears.
const FAMILIES: [&str; 8] = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma", "phi3"];

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QuantizeReport {
    /// Tensors in 4 bits.
    pub quantized: usize,
    /// Tensors copied byte for byte.
    pub copied: usize,
    /// Elements in 4 bits.
    pub elements: u64,
}

/// Writes `folder` to `path` with the linears of its blocks in NF4 or FP4, blocks of 64.
///
/// `double`: quantize the scales too. `packers`: who packs. `shard_bytes`: the most data that one file holds. `progress`
/// gets the weights that are done and their number.
///
/// # Errors
/// The folder is quantized already or of a family that is not supported, an element is not finite, or the
/// output cannot be written; nothing is left at `path` then.
pub fn write_bitsandbytes_folder(
    folder: &Checkpoint,
    quant_type: QuantType,
    double: bool,
    packers: &Packers,
    path: &Path,
    shard_bytes: u64,
    mut progress: impl FnMut(usize, usize),
) -> Result<QuantizeReport> {
    let place = folder.config_path().display().to_string();
    let family = folder.config()["model_type"].as_str().unwrap_or("");
    if !FAMILIES.contains(&family) {
        return Err(Error::refused(format!(
            "`{place}`: model_type `{family}` cannot be written in bitsandbytes' types; supported: {}",
            FAMILIES.join(", ")
        )));
    }
    if !matches!(quantization(folder)?, Quantization::None | Quantization::Fp8 { .. }) {
        return Err(Error::refused(format!("`{place}`: the model is quantized already"))
            .with_hint("give the full-precision model"));
    }
    let to = WeightType::FourBit { quant_type, double };
    let dense = dense_type_of(folder);
    let mut report = QuantizeReport::default();
    let (total, mut done) = (weights(folder).len(), 0);
    write_folder(folder, path, &config_as(folder.config(), to), shard_bytes, |name| {
        progress(done, total);
        done += 1;
        let view = folder.require(name)?;
        if !(is_linear(name) && view.shape.len() == 2) {
            report.copied += 1;
            return Ok(None);
        }
        let weight = folder_matrix(folder, name)?;
        // As torch loads it: elements of the checkpoint's own type.
        let dtype = if view.is_fp8() { element(dense) } else { weight.element_type() };
        let packed = weight.quantized_by(packers, to, dtype);
        let packed = packed.map_err(|e| Error::refused(format!("tensor `{name}`: {e}")))?;
        report.quantized += 1;
        report.elements += (weight.rows() * weight.cols()) as u64;
        Ok(packed.tensors(name))
    })?;
    progress(total, total);
    Ok(report)
}

/// Elements of a folder that [`write_bitsandbytes_folder`] quantizes.
pub fn elements_to_quantize(folder: &Checkpoint) -> u64 {
    let linears = folder.names().filter(|name| is_linear(name)).filter_map(|name| folder.tensor(name));
    linears.map(|tensor| tensor.shape.iter().product::<usize>() as u64).sum()
}

/// Whether a tensor is the weight of a linear inside of a block.
fn is_linear(name: &str) -> bool {
    let in_block = name.contains(".layers.") || name.starts_with("layers.");
    in_block && name.ends_with("_proj.weight")
}
