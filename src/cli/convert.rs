//! `qpeft convert ...`: adapters of one kind as another.

use std::path::Path;

use qpeft_formats::peft::PeftAdapter;
use serde_json::json;

use super::args::PissaToLoraArgs;
use super::printer::Printer;
use super::session::{refuse_existing, refuse_inputs};
use crate::adapters::AdapterFolder;
use crate::adapters::folder::{RUN_FILE, is_pissa};
use crate::adapters::staged::FileId;
use crate::convert::pissa_to_lora::pissa_to_lora;
use crate::error::Error;
use crate::model::Base;

/// Runs `qpeft convert pissa-to-lora`.
///
/// # Errors
/// The adapter is no PiSSA adapter, its initial factors are not there, or the output cannot be written.
pub fn pissa(args: &PissaToLoraArgs, printer: &Printer) -> anyhow::Result<()> {
    refuse_existing(&args.output, args.overwrite_output)?;
    let trained = AdapterFolder::open(&args.adapter)?;
    if args.output.canonicalize().is_ok_and(|output| output.starts_with(&trained.run)) {
        return Err(Error::refused(format!(
            "`--output {}` lies in the run that is converted",
            args.output.display()
        ))
        .with_hint("give a folder outside of the run: its adapter stays as it is")
        .into());
    }
    if !is_pissa(&trained.adapter.config) {
        return Err(Error::refused(format!("`{}` is not a PiSSA adapter", args.adapter.display()))
            .with_hint("its `adapter_config.json` says `init_lora_weights`; only `pissa` needs converting")
            .into());
    }
    if let Some(dir) = &args.init_adapter {
        refuse_inputs(&args.output, &[dir])?;
    }
    let initial = match &args.init_adapter {
        Some(dir) => PeftAdapter::read(dir)?,
        None => trained.initial()?,
    };
    let lora = pissa_to_lora(&trained.adapter, &initial)?;
    if let (Some(model), Some(manifest)) = (&args.model, &trained.manifest) {
        let found = FileId::of(&Base::open(model)?)?;
        // Of a base that was quantized at load, the fingerprint of the file comes first.
        let split = manifest.base.fingerprint.split('+').next();
        if found.fingerprint != manifest.base.fingerprint && Some(found.fingerprint.as_str()) != split {
            return Err(Error::refused(format!(
                "`{}` is not the base that the run split: fingerprint {}, expected {}",
                model.display(),
                found.fingerprint,
                manifest.base.fingerprint
            ))
            .into());
        }
    }
    lora.write(&args.output)?;
    let error = trained.manifest.as_ref().map(|m| m.quantization_error);
    if let Some(manifest) = &trained.manifest {
        write_provenance(&args.output, &manifest.base)?;
    }

    if args.json {
        let kind = if lora.config.use_dora { "dora" } else { "lora" };
        return Ok(printer.json(&json!({
            "output": args.output,
            "kind": kind,
            "r": lora.config.r,
            "lora_alpha": lora.config.lora_alpha,
            "residual_quantization_error": error,
        }))?);
    }
    if lora.config.use_dora {
        printer.note("the adapter trains magnitudes too, so the result is a DoRA adapter");
    }
    match error {
        Some(0.0) => printer.note("the residual was stored exactly: on the original base the result is exact"),
        Some(error) => printer.warn(&format!(
            "not exact on the original base: the adapter was trained on a quantized residual, which differs from the exact one by {:.3} % of the weights' norm (residual quantization error); for the exact model use the run folder itself, or `qpeft merge`",
            100.0 * error
        )),
        None => printer.warn(
            "there is no manifest of a staged init, so the residual that the adapter was trained on is unknown; exact only if it was stored in full precision",
        ),
    }
    printer.note(&format!(
        "wrote {} (r {}, alpha {})",
        args.output.display(),
        lora.config.r,
        lora.config.lora_alpha
    ));
    Ok(())
}

/// Ties the converted adapter to the original base.
fn write_provenance(dir: &Path, base: &FileId) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(&json!({
        "qpeft_version": env!("CARGO_PKG_VERSION"),
        "converted_from": "pissa",
        "base": base,
    }))?;
    Ok(qpeft_formats::file::write_atomic(&dir.join(RUN_FILE), json.as_bytes())?)
}
