//! `qpeft merge`: base + adapter -> one GGUF, or a Hugging Face folder.

use std::collections::BTreeMap;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_kernels::Device;
use serde_json::json;

use super::args::{MergeArgs, MergeTarget};
use super::printer::Printer;
use super::progress::Progress;
use super::report::Usage;
use super::session::{open_device, refuse_existing, refuse_inputs, refuse_other_folder};
use crate::adapters::AdapterFolder;
use crate::convert::merge::{MergeOptions, merge_to_gguf};
use crate::convert::merge_folder::{FolderTarget, folder_of, merge_to_folder};
use crate::convert::merge_source::merge_folder_to_gguf;
use crate::model::base::Quantizing;
use crate::model::{Base, Decoder};

/// Gigabytes of one file of a folder, as transformers has it.
const SHARD_SIZE: f64 = 5.0;

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
    refuse_inputs(&args.output, &[&args.model, &args.adapter])?;
    let target = folder_target(args)?;
    if target.is_some() {
        refuse_other_folder(&args.output)?;
    }
    let device = open_device(&args.compute, printer)?;
    let folder = AdapterFolder::open(&args.adapter)?;
    let base = folder.resolve(Base::open_as(&args.model, args.base_quant)?)?;
    // Weights stay in host memory: a device gets one at a time.
    let mut decoder = Decoder::load_quantizing(&base, &Device::Cpu, false, &Quantizing::of(&base, &device)?)?;
    let params = folder.attach(&mut decoder)?;
    let mut bar: Option<Progress> = None;
    let folder = if is_gguf(&base) { None } else { Some(folder_of(&base)?.dir()) };
    let what = if target.is_none() && folder.is_some() { "MiB" } else { "tensor" };
    let progress = |done, total| {
        let bar = bar.get_or_insert_with(|| Progress::start(printer, what, 0, total as u64));
        bar.update(done as u64, "");
    };
    let report = match (target, folder) {
        (None, None) => merge_to_gguf(&base, &decoder, &params, &options, &device, &args.output, progress)?,
        (None, Some(dir)) => {
            merge_folder_to_gguf(dir, &decoder, &params, &options, &device, &args.output, progress)?
        }
        (Some(target), _) => {
            let shard_bytes = (args.max_shard_size.unwrap_or(SHARD_SIZE) * 1e9) as u64;
            merge_to_folder(&base, &decoder, &params, target, &device, &args.output, shard_bytes, progress)?
        }
    };
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
            "packing rounds much of the change away; compare with `qpeft eval`, and give a finer type (`--quant q8_0`, or `--to safetensors`) if it matters",
        );
    }
    printer.note(&format!("wrote {}", args.output.display()));
    Ok(())
}

/// Whether the base is a GGUF file, quantized at load or not.
fn is_gguf(base: &Base) -> bool {
    match base {
        Base::Gguf(_) => true,
        Base::Folder(_) => false,
        Base::Quantized { base, .. } => is_gguf(base),
    }
}

/// How a folder is to be stored; `None` for a GGUF.
fn folder_target(args: &MergeArgs) -> Result<Option<FolderTarget>, Usage> {
    if args.quant.is_some() && args.to != MergeTarget::Gguf {
        return Err(Usage::new("`--quant` is the type of a GGUF")
            .hint("leave it out: `--to` says how a folder is stored, and `--dtype` its dense type"));
    }
    if args.dtype.is_some() && args.to != MergeTarget::Safetensors {
        return Err(Usage::new("`--dtype` is the type of a dense folder").hint("give `--to safetensors`"));
    }
    if args.max_shard_size.is_some() && args.to == MergeTarget::Gguf {
        return Err(Usage::new("`--max-shard-size` is for the files of a folder")
            .hint("a GGUF is split with `--split-max-size`"));
    }
    let four_bit = |quant_type, double| Some(FolderTarget::FourBit { quant_type, double });
    Ok(match args.to {
        MergeTarget::Gguf => None,
        MergeTarget::Safetensors => Some(FolderTarget::Dense(args.dtype)),
        MergeTarget::Nf4 => four_bit(QuantType::Nf4, None),
        MergeTarget::Nf4Dq => four_bit(QuantType::Nf4, Some(true)),
        MergeTarget::Fp4 => four_bit(QuantType::Fp4, None),
    })
}
