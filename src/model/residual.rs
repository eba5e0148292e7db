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
use super::linear::{BaseWeight, Linear};
use super::save::{linear_of, permuted_heads, repack, slot_of, write_gguf};
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
/// `targets`: module paths of the linears that get the type `residual`, if one is given.
///
/// # Errors
/// The container of the base does not have the type to which it is quantized at load, or that of the residuals; or the
/// rows of a target are not whole blocks of it.
pub fn check(base: &Base, targets: &[String], residual: Option<WeightType>) -> Result<()> {
    let (container, at_load) = match base {
        Base::Quantized { base, to } => (&**base, Some(*to)),
        Base::Gguf(_) | Base::Folder(_) => (base, None),
    };
    let (is_gguf, shown) = (matches!(container, Base::Gguf(_)), base.path().display());
    let refused = |flag: &str, to: WeightType, hint: &str| {
        let (container, types) = if is_gguf {
            ("a GGUF file", "ggml's types")
        } else {
            ("a Hugging Face folder", "nf4, nf4-dq, fp4, fp4-dq, int8, f32, f16 and bf16")
        };
        Err(Error::refused(format!(
            "PiSSA writes a residual base like `{shown}`, {container}, which cannot hold `{flag} {to}`; it holds {types}"
        ))
        .with_hint(hint))
    };
    let fits = |to: WeightType| match to {
        WeightType::Ggml(dtype) => is_gguf || matches!(dtype, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16),
        WeightType::FourBit { .. } | WeightType::Int8 => !is_gguf,
    };
    if let Some(to) = at_load.filter(|&to| !fits(to)) {
        let hint = "quantize the model first with `qpeft quantize`, and train on the result";
        return refused("--base-quant", to, hint);
    }
    let Some(to) = residual else { return Ok(()) };
    if !fits(to) {
        let hint = if is_gguf { "give `q8_0` or `bf16`" } else { "give `int8` or `bf16`" };
        return refused("--residual-quant", to, hint);
    }
    let config = base.config()?;
    for module in targets {
        let Some((_, slot)) = slot_of(&format!("{module}.weight")) else { continue };
        BaseWeight::empty(to, 1, slot.shape(&config).1).map_err(|e| {
            Error::refused(format!("`{shown}`: the residual of `{module}` cannot be stored in {to}: {e}"))
                .with_hint("choose a type of smaller blocks for `--residual-quant`: q8_0, bf16")
        })?;
    }
    Ok(())
}

/// Writes `base` to `path`, with the weights of `targets` (module paths) from `decoder`.
///
/// `residual`: the type that all targets were given, if they were.
///
/// # Errors
/// See [`check`]; or the output cannot be written. Nothing is left at `path` then.
pub fn write<'d>(
    base: &Base,
    decoder: &'d Decoder,
    targets: &[String],
    residual: Option<WeightType>,
    path: &Path,
) -> Result<()> {
    check(base, targets, residual)?;
    // Tensors say how they are stored; what is said of all is said of what the targets leave, if they leave any.
    let all_are_split = || decoder.linears().all(|linear| targets.contains(&linear.module));
    let common = residual.filter(|_| all_are_split());
    let linear = |name: &str| linear_of(decoder, name).map(|(linear, _)| linear);
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
        Base::Folder(folder) => {
            let config = common.map_or_else(|| folder.config().clone(), |to| config_as(folder.config(), to));
            write_folder(folder, path, &config, SHARD_BYTES, |name| {
                target(name).map(|linear| tensors(linear, name)).transpose()
            })
        }
        Base::Quantized { base, to } => match &**base {
            Base::Gguf(file) => gguf(file, &linear),
            Base::Folder(folder) => {
                let config = config_as(folder.config(), common.unwrap_or(*to));
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
