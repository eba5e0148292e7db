//! `qpeft merge`: base + adapter -> one GGUF.

use std::collections::BTreeMap;

use qpeft_formats::GgmlType;
use serde_json::json;

use super::args::MergeArgs;
use super::printer::Printer;
use super::progress::Progress;
use super::session::{open_adapted, open_device, refuse_existing};
use crate::convert::merge::{MergeOptions, merge_to_gguf};
use crate::model::Base;

/// Runs the command.
///
/// # Errors
/// A file is refused, the adapter belongs to other weights, or the output cannot be written.
pub fn run(args: &MergeArgs, printer: &Printer) -> anyhow::Result<()> {
    if args.quant.is_none() {
        args.types.require_mixture("without `--quant`")?;
    }
    let options = MergeOptions {
        mixture: args.quant.map(|quant| args.types.mixture(quant)),
        split: args.types.split(),
    };
    refuse_existing(&args.output, args.overwrite_output)?;
    let device = open_device(&args.compute)?;
    let (base, decoder, params) = open_adapted(Base::open(&args.model)?, Some(&args.adapter), &device)?;
    let mut bar: Option<Progress> = None;
    let report = merge_to_gguf(&base, &decoder, &params, &options, &args.output, |done, total| {
        let bar = bar.get_or_insert_with(|| Progress::start(printer, "tensor", 0, total as u64));
        bar.update(done as u64, "");
    })?;
    drop(bar);

    let mut fallbacks: BTreeMap<(GgmlType, GgmlType), usize> = BTreeMap::new();
    for (_, asked, taken) in &report.fallbacks {
        *fallbacks.entry((*asked, *taken)).or_default() += 1;
    }
    for ((asked, taken), count) in fallbacks {
        printer.warn(&format!(
            "{count} tensors are {taken}: their row length is not a multiple of a {asked} block"
        ));
    }
    if args.json {
        return Ok(printer.json(&json!({
            "output": args.output,
            "merged": report.merged,
            "converted": report.converted,
            "copied": report.copied,
            "change_arrived": report.arrived_share(),
            "noise_to_change": report.noise_to_change(),
            "relative_noise": report.relative_noise(),
        }))?);
    }
    printer.note(&format!(
        "{} tensors merged, {} converted, {} copied; {:.0} % of the change is in the packed weights, packing moved them by {:.2} % of their norm",
        report.merged,
        report.converted,
        report.copied,
        100.0 * report.arrived_share(),
        100.0 * report.relative_noise()
    ));
    if report.arrived_share() < 0.8 {
        printer.warn(
            "packing rounds much of the change away; compare with `qpeft eval`, and give a finer type with `--quant q8_0` if it matters",
        );
    }
    printer.note(&format!("wrote {}", args.output.display()));
    Ok(())
}
