//! `qpeft merge`: base + adapter -> one GGUF.

use serde_json::json;

use super::args::MergeArgs;
use super::printer::Printer;
use super::progress::Progress;
use super::session::{open_adapted, open_device, refuse_existing};
use crate::convert::merge::merge_to_gguf;
use crate::model::Base;

/// Runs the command.
///
/// # Errors
/// A file is refused, the adapter belongs to other weights, or the output cannot be written.
pub fn run(args: &MergeArgs, printer: &Printer) -> anyhow::Result<()> {
    refuse_existing(&args.output, args.overwrite_output)?;
    let device = open_device(&args.compute)?;
    let (base, decoder, params) = open_adapted(Base::open(&args.model)?, Some(&args.adapter), &device)?;
    let mut bar: Option<Progress> = None;
    let report = merge_to_gguf(&base, &decoder, &params, args.quant, &args.output, |done, total| {
        let bar = bar.get_or_insert_with(|| Progress::start(printer, "tensor", 0, total as u64));
        bar.update(done as u64, "");
    })?;
    drop(bar);

    for (name, asked, taken) in &report.fallbacks {
        printer.warn(&format!("`{name}` is {taken}: its row length is not a multiple of a {asked} block"));
    }
    if args.json {
        return Ok(printer.json(&json!({
            "output": args.output,
            "merged": report.merged,
            "converted": report.converted,
            "copied": report.copied,
            "relative_loss": report.relative_loss(),
        }))?);
    }
    printer.note(&format!(
        "{} tensors merged, {} converted, {} copied; packing moved the merged weights by {:.1} % of what training changed",
        report.merged,
        report.converted,
        report.copied,
        100.0 * report.relative_loss()
    ));
    if report.relative_loss() > 1.0 {
        printer.warn(
            "packing adds more noise than the adapter changed; measure with `qpeft eval`, or give a larger type with `--quant q8_0`",
        );
    }
    printer.note(&format!("wrote {}", args.output.display()));
    Ok(())
}
