//! `qpeft quantize --quant nf4|nf4-dq|fp4`: a model as a bitsandbytes folder.

use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::file::AtomicDir;
use qpeft_formats::gguf::GgufFile;
use qpeft_formats::safetensors::Checkpoint;
use qpeft_formats::safetensors::folder::SHARD_BYTES;
use qpeft_kernels::ops::quantize::Packers;
use serde_json::json;

use super::args::QuantizeArgs;
use super::printer::Printer;
use super::progress::Progress;
use super::report::Usage;
use super::session::{open_packers, refuse_existing, refuse_inputs, refuse_other_folder};
use crate::convert::bitsandbytes::{QuantizeReport, elements_to_quantize, write_bitsandbytes_folder};
use crate::convert::gguf_to_hf;

/// Runs the command.
///
/// A GGUF passes through a dense folder beside the output, which goes away again.
///
/// # Errors
/// A flag does not apply to folders, the model is refused, or the output cannot be written.
pub fn run(
    args: &QuantizeArgs,
    quant_type: QuantType,
    double: bool,
    printer: &Printer,
) -> anyhow::Result<()> {
    const WHY: &str = "with a bitsandbytes type";
    args.types.require_mixture(WHY)?;
    let others = [
        ("--imatrix", args.imatrix.is_some()),
        ("--dry-run", args.dry_run),
        ("--split-max-size", args.types.split().is_some()),
        ("--allow-requantize", args.allow_requantize),
    ];
    if let Some((flag, _)) = others.into_iter().find(|(_, given)| *given) {
        return Err(Usage::new(format!("`{flag}` does nothing {WHY}")).into());
    }
    let output = args.output.as_deref().expect("the caller checked that it is given");
    refuse_existing(output, args.overwrite_output)?;
    refuse_inputs(output, &[&args.model])?;
    refuse_other_folder(output)?;

    // Before anything is written, and before other threads are at work.
    let open = |elements| open_packers(&args.compute, elements, printer);
    let report = if args.model.is_dir() {
        let folder = Checkpoint::open(&args.model)?;
        let packers = open(elements_to_quantize(&folder))?;
        pack(&folder, args, quant_type, double, &packers, printer)?
    } else {
        let file = GgufFile::open(&args.model)?;
        let elements = file.tensors().iter().map(|tensor| (tensor.n_rows() * tensor.row_len()) as u64);
        let packers = open(elements.sum())?;
        // Another name than the output's, whose own temporary folder exists at the same time.
        let mut name = output.file_name().unwrap_or_default().to_owned();
        name.push(".dense");
        let beside = AtomicDir::create(&output.with_file_name(name))?;
        let dense = beside.staging().join("model");
        let mut bar: Option<Progress> = None;
        let dtype = gguf_to_hf::default_dtype(&file);
        gguf_to_hf::write_folder(&file, &dense, dtype, gguf_to_hf::SHARD, |done, total| {
            let start = || Progress::start(printer, "tensor dequantized", 0, total as u64);
            bar.get_or_insert_with(start).update(done as u64, "");
        })?;
        drop(bar);
        pack(&Checkpoint::open(&dense)?, args, quant_type, double, &packers, printer)?
    };
    if args.json {
        return Ok(printer.json(&json!({
            "output": output,
            "quantized": report.quantized,
            "copied": report.copied,
            "elements": report.elements,
        }))?);
    }
    printer.note(&format!(
        "{} tensors ({} elements) quantized, {} copied",
        report.quantized, report.elements, report.copied
    ));
    printer.note(&format!("wrote {}", output.display()));
    Ok(())
}

fn pack(
    folder: &Checkpoint,
    args: &QuantizeArgs,
    quant_type: QuantType,
    double: bool,
    packers: &Packers,
    printer: &Printer,
) -> anyhow::Result<QuantizeReport> {
    let output = args.output.as_deref().expect("the caller checked that it is given");
    let mut bar: Option<Progress> = None;
    let progress = |done: usize, total: usize| {
        bar.get_or_insert_with(|| Progress::start(printer, "tensor", 0, total as u64))
            .update(done as u64, "");
    };
    Ok(write_bitsandbytes_folder(folder, quant_type, double, packers, output, SHARD_BYTES, progress)?)
}
