//! `qpeft convert hf-to-gguf` and `gguf-to-hf`: a model in the other format.

use qpeft_formats::gguf::GgufFile;
use serde_json::json;

use super::args::{GgufToHfArgs, HfToGgufArgs};
use super::printer::Printer;
use super::progress::Progress;
use super::session::{refuse_existing, refuse_inputs, refuse_other_folder};
use crate::convert::gguf_to_hf::{SHARD, default_dtype, write_folder};
use crate::convert::hf::HfSource;
use crate::convert::hf_to_gguf::write_gguf;
use crate::convert::merge_folder::element;

/// Runs `qpeft convert hf-to-gguf`.
///
/// # Errors
/// The folder is refused, or the output cannot be written.
pub fn hf_to_gguf(args: &HfToGgufArgs, printer: &Printer) -> anyhow::Result<()> {
    refuse_existing(&args.output, args.overwrite_output)?;
    refuse_inputs(&args.output, &[&args.model])?;
    let source = HfSource::open_with_pre(&args.model, args.pre.as_deref())?;
    for note in source.notes() {
        printer.warn(note);
    }
    let mut bar = Bar::new(printer);
    let written = write_gguf(&source, &args.output, args.outtype, |done, total| bar.update(done, total))?;
    drop(bar);
    if !written.fallbacks.is_empty() {
        printer.warn(&format!(
            "{} tensors are F16: their row length is not a multiple of a {} block",
            written.fallbacks.len(),
            written.dtype
        ));
    }
    let arch = source.family().arch;
    if args.json {
        return Ok(printer.json(&json!({
            "output": args.output,
            "architecture": arch,
            "type": written.dtype.name(),
            "tensors": written.tensors,
            "bytes": written.bytes,
            "notes": source.notes(),
        }))?);
    }
    printer.note(&format!(
        "wrote {} (architecture {arch}, {} tensors, {})",
        args.output.display(),
        written.tensors,
        written.dtype
    ));
    Ok(())
}

/// Runs `qpeft convert gguf-to-hf`.
///
/// # Errors
/// The file is refused, or the output cannot be written.
pub fn gguf_to_hf(args: &GgufToHfArgs, printer: &Printer) -> anyhow::Result<()> {
    refuse_existing(&args.output, args.overwrite_output)?;
    refuse_inputs(&args.output, &[&args.model])?;
    refuse_other_folder(&args.output)?;
    let file = GgufFile::open(&args.model)?;
    let dtype = args.dtype.map_or_else(|| default_dtype(&file), element);
    let mut bar = Bar::new(printer);
    let written = write_folder(&file, &args.output, dtype, SHARD, |done, total| bar.update(done, total))?;
    drop(bar);
    if args.json {
        return Ok(printer.json(&json!({
            "output": args.output,
            "architecture": written.architecture,
            "type": written.dtype.to_string(),
            "tensors": written.tensors,
            "shards": written.shards,
            "bytes": written.bytes,
        }))?);
    }
    printer.note(&format!(
        "wrote {} ({}, {} tensors in {} files, {})",
        args.output.display(),
        written.architecture,
        written.tensors,
        written.shards,
        written.dtype
    ));
    Ok(())
}

/// Progress that starts with the first tensor.
struct Bar<'a> {
    printer: &'a Printer,
    progress: Option<Progress>,
}

impl<'a> Bar<'a> {
    fn new(printer: &'a Printer) -> Bar<'a> {
        Bar { printer, progress: None }
    }

    fn update(&mut self, done: usize, total: usize) {
        let start = || Progress::start(self.printer, "tensor", 0, total as u64);
        self.progress.get_or_insert_with(start).update(done as u64, "");
    }
}
