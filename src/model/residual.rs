//! A base written again with the weights of some linears taken from a decoder: the residual base of a split.
//!
//! What the base stores of other weights is copied byte for byte; a base that is quantized at load is written as
//! it is in memory, so that the copy needs no quantization any more.

use std::path::Path;

use qpeft_formats::bitsandbytes::config::{Quantization, bitsandbytes};
use qpeft_formats::safetensors::TensorView;
use qpeft_formats::safetensors::folder::SHARD_BYTES;
use qpeft_formats::{GgmlType, gguf::GgufFile};
use qpeft_kernels::weight::WeightType;
use serde_json::Value;

use super::base::Base;
use super::decoder::Decoder;
use super::linear::Linear;
use super::save::{permuted_heads, repack, slot_of, write_gguf};
use super::save_folder::write_folder;
use crate::error::{Error, Result};

/// Name of the copy: a GGUF file or a folder, as the base.
pub fn file_name(base: &Base) -> &'static str {
    match base {
        Base::Gguf(_) => "residual.gguf",
        Base::Folder(_) => "residual",
        Base::Quantized { base, .. } => file_name(base),
    }
}

/// Refuses a base whose copy could not be stored, before anything expensive is done.
///
/// # Errors
/// The base is quantized at load to a type that its container does not have.
pub fn check(base: &Base) -> Result<()> {
    let Base::Quantized { base: inner, to } = base else { return Ok(()) };
    let (fits, container, types) = match (&**inner, to) {
        (Base::Gguf(_), to) => (matches!(to, WeightType::Ggml(_)), "a GGUF file", "ggml's"),
        (_, WeightType::Ggml(GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)) => (true, "", ""),
        (_, to) => (
            !matches!(to, WeightType::Ggml(_)),
            "a Hugging Face folder",
            "nf4, nf4-dq, fp4, fp4-dq, int8, f32, f16 and bf16",
        ),
    };
    if fits {
        return Ok(());
    }
    Err(Error::refused(format!(
        "PiSSA writes a residual base like `{}`, {container}, which cannot hold `--base-quant {to}`; it holds {types}",
        base.path().display()
    ))
    .with_hint("quantize the model first with `qpeft quantize`, and train on the result"))
}

/// Writes `base` to `path`, with the weights of `targets` (module paths) from `decoder`.
///
/// # Errors
/// See [`check`]; or the output cannot be written. Nothing is left at `path` then.
pub fn write<'d>(base: &Base, decoder: &'d Decoder, targets: &[String], path: &Path) -> Result<()> {
    check(base)?;
    let linear = |name: &str| -> Option<&'d Linear> {
        let (layer, slot) = slot_of(name)?;
        Some(&decoder.layers.get(layer)?.linears[slot as usize])
    };
    let target = |name: &str| linear(name).filter(|linear| targets.contains(&linear.module));
    let tensors = |linear: &Linear, name: &str| -> Result<Vec<TensorView>> {
        linear.weight.tensors(name).ok_or_else(|| {
            Error::refused(format!("a {} weight cannot be written to a folder", linear.weight.type_name()))
        })
    };
    let gguf = |file: &GgufFile, chosen: &dyn Fn(&str) -> Option<&'d Linear>| {
        write_gguf(
            file,
            path,
            file.metadata(),
            None,
            |hf, info| {
                let replaced = hf.and_then(chosen).and_then(|linear| linear.weight.ggml());
                Ok(replaced.map_or(info.dtype, |(dtype, _)| dtype))
            },
            |hf, _| {
                let Some((name, linear)) = hf.and_then(|name| Some((name, chosen(name)?))) else {
                    return Ok(None);
                };
                repack(&linear.weight, permuted_heads(base, &decoder.config, name)).map(Some)
            },
        )
    };
    match base {
        Base::Gguf(file) => gguf(file, &target),
        Base::Folder(folder) => write_folder(folder, path, folder.config(), SHARD_BYTES, |name| {
            target(name).map(|linear| tensors(linear, name)).transpose()
        }),
        Base::Quantized { base, to } => match &**base {
            Base::Gguf(file) => gguf(file, &linear),
            Base::Folder(folder) => {
                let config = config_as(folder.config(), *to);
                write_folder(folder, path, &config, SHARD_BYTES, |name| {
                    linear(name).map(|linear| tensors(linear, name)).transpose()
                })
            }
            Base::Quantized { .. } => Err(Error::refused("a base is quantized at load once")),
        },
    }
}

/// A `config.json` that says how linears of a type are stored.
pub fn config_as(config: &Value, to: WeightType) -> Value {
    let quantization = match to {
        WeightType::FourBit { quant_type, double } => Quantization::FourBit { quant_type, double },
        WeightType::Int8 => Quantization::Int8,
        WeightType::Ggml(_) => Quantization::None,
    };
    let mut config = config.clone();
    if let Some(object) = config.as_object_mut() {
        let compute = dtype_name(object.get("dtype").or(object.get("torch_dtype")));
        object.shift_remove("quantization_config");
        if let Some(settings) = bitsandbytes(&quantization, compute, None) {
            object.insert("quantization_config".to_owned(), settings);
        }
    }
    config
}

/// The element type that a `config.json` names; float32 where it names none.
fn dtype_name(value: Option<&Value>) -> &'static str {
    match value.and_then(Value::as_str) {
        Some("bfloat16") => "bfloat16",
        Some("float16") => "float16",
        _ => "float32",
    }
}
