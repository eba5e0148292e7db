//! `qpeft plan`: what a training run would take of a device's memory, decided without loading a weight.

use std::fmt::Write as _;

use qpeft_formats::peft::{PeftConfig, TargetModules};
use qpeft_kernels::Device;
use serde_json::{Map, Value, json};

use super::args::{PlanArgs, refuse_residual_quant};
use super::printer::Printer;
use super::report::Usage;
use crate::model::memory::meta;
use crate::model::{Base, Decoder};
use crate::train::fit::{ALL_LAYERS, ANY_LAYERS, fit_decoder, limit_of, retype_targets};

const GIB: f64 = (1_u64 << 30) as f64;

/// Runs the command.
///
/// # Errors
/// The model is refused, nothing fits, or there is neither a device nor a limit.
pub fn run(args: &PlanArgs, printer: &Printer) -> anyhow::Result<()> {
    refuse_residual_quant(args.method, args.residual_quant)?;
    let wanted = args.memory_limit.map(|bytes| bytes as usize);
    // A limit alone is enough, so that a plan for another machine can be made.
    let limit = match wanted {
        Some(limit) => limit,
        None => limit_of(&Device::open(&args.device)?, None)?.ok_or_else(|| {
            Usage::new("there is no CUDA device whose free memory could be the limit")
                .hint("say how much there is, as in `--memory-limit 24GiB`")
        })?,
    };
    let (device, meter) = meta();
    let mut decoder = match (&args.model, &args.shape) {
        (Some(path), _) => Decoder::load(&Base::open_as(path, args.base_quant)?, &device)?,
        (None, Some(shape)) => Decoder::synthetic(shape, args.base, &device, false)?,
        (None, None) => unreachable!("one of both is required"),
    };
    let mut config = PeftConfig::new(args.lora_r, 2.0 * args.lora_r as f64);
    config.target_modules = Some(TargetModules::AllLinear);
    config.use_dora = args.method.info().magnitude;
    if let Some(residual) = args.residual_quant {
        retype_targets(&mut decoder, &config, residual)?;
    }
    let recomputed = if args.gradient_checkpointing { ALL_LAYERS } else { ANY_LAYERS };
    let fit =
        fit_decoder(decoder, &config, (args.batch_size, args.max_seq_length), recomputed, limit, &meter)?;

    let parts = fit.need.parts();
    if args.json {
        let bytes: Map<String, Value> =
            parts.iter().map(|(what, bytes)| ((*what).to_owned(), json!(bytes))).collect();
        return Ok(printer.json(&json!({
            "limit_bytes": limit,
            "peak_bytes": fit.need.total(),
            "parts": bytes,
            "copied_linears": fit.settings.copied,
            "recomputed_layers": fit.settings.recomputed,
            "remakes_act": fit.settings.remakes_act,
            "embedding_on_host": fit.settings.embedding_on_host,
            "layer_inputs_on_host": fit.settings.streams_on_host,
            "batch_size": fit.settings.batch,
        }))?);
    }
    let mut text = String::new();
    writeln!(text, "{}", fit.settings)?;
    for (what, bytes) in parts {
        writeln!(text, "{what:<26} {:8.3} GiB", bytes as f64 / GIB)?;
    }
    writeln!(text, "{:<26} {:8.3} GiB of {:.3}", "peak", fit.need.total() as f64 / GIB, limit as f64 / GIB)?;
    Ok(printer.data(&text)?)
}
