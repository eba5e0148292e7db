//! `qpeft quantize`: a model in other types.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context;
use qpeft_formats::GgmlType;
use qpeft_formats::gguf::GgufFile;
use qpeft_formats::imatrix::Imatrix;
use qpeft_kernels::Device;
use qpeft_kernels::ops::quantize::Packers;
use qpeft_kernels::weight::WeightType;
use serde_json::json;

use super::args::QuantizeArgs;
use super::printer::Printer;
use super::progress::Progress;
use super::quantize_folder;
use super::report::Usage;
use super::session::{open_packers, refuse_existing, refuse_inputs, threads_of};
use super::values::Quant;
use crate::convert::gguf::GgufSource;
use crate::convert::hf::HfSource;
use crate::convert::quantize::Plan;
use crate::convert::source::Source;

const MIB: f64 = 1024.0 * 1024.0;

/// Runs the command.
///
/// # Errors
/// A file is refused, a tensor cannot have the type that is asked for, or the output cannot be written.
pub fn run(args: &QuantizeArgs, printer: &Printer) -> anyhow::Result<()> {
    if args.output.is_none() && !args.dry_run {
        return Err(Usage::new("`qpeft quantize` needs `--output`")
            .hint("give the file to write, or `--dry-run` to write nothing")
            .into());
    }
    if args.quant == Quant::Copy {
        args.types.require_mixture("with `--quant copy`")?;
        if args.imatrix.is_some() {
            return Err(Usage::new("`--imatrix` does nothing with `--quant copy`").into());
        }
    }
    let ordinal = Device::ordinal(&args.compute.device)
        .with_context(|| format!("cannot use the device `{}`", args.compute.device))?;
    if let Quant::FourBit(quant_type, double) = args.quant {
        return quantize_folder::run(args, quant_type, double, printer);
    }
    let source = open(args)?;
    let imatrix = args.imatrix.as_deref().map(Imatrix::open).transpose()?;
    let mixture = match args.quant {
        Quant::To(file_type) => Some(args.types.mixture(file_type)),
        Quant::Copy | Quant::FourBit(..) => None,
    };
    let plan = Plan::new(&*source, mixture.as_ref(), imatrix.as_ref(), args.types.split())?;
    if args.dry_run {
        warn(&plan, args, printer);
        return print_plan(&plan, args, printer);
    }

    let output = args.output.as_deref().expect("checked above");
    let outputs = plan.outputs(output)?;
    for path in &outputs {
        refuse_existing(path, args.overwrite_output)?;
        let inputs: Vec<&Path> =
            [&args.model].into_iter().chain(&args.imatrix).map(PathBuf::as_path).collect();
        refuse_inputs(path, &inputs)?;
    }
    warn(&plan, args, printer);
    let shared = plan.elements_to_share();
    if shared == 0 && ordinal.is_some() {
        let types = GgmlType::ALL.into_iter().filter(|&dtype| Packers::is_shared(WeightType::Ggml(dtype)));
        printer.warn(&format!(
            "`--device {}` does nothing: a GPU takes part in packing {} without importance",
            args.compute.device,
            types.map(GgmlType::name).collect::<Vec<_>>().join(", ")
        ));
    }
    let packers = open_packers(&args.compute, shared, printer)?;
    let threads = threads_of(&args.compute)?;
    let mut bar: Option<Progress> = None;
    plan.write(output, threads, &packers, |done, total| {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        bar.get_or_insert_with(|| Progress::start(printer, "MiB", 0, mib(total))).update(mib(done), "");
    })?;
    drop(bar);

    if args.json {
        return Ok(printer.json(&summary(&plan, args, &outputs))?);
    }
    printer.note(&sizes(&plan));
    for path in outputs {
        printer.note(&format!("wrote {}", path.display()));
    }
    Ok(())
}

/// The model as tensors under GGUF names.
fn open(args: &QuantizeArgs) -> anyhow::Result<Box<dyn Source>> {
    if args.model.is_dir() {
        return Ok(Box::new(HfSource::open(&args.model)?));
    }
    Ok(Box::new(GgufSource::new(GgufFile::open(&args.model)?)))
}

fn warn(plan: &Plan<'_>, args: &QuantizeArgs, printer: &Printer) {
    let mut fallbacks: BTreeMap<(GgmlType, GgmlType), usize> = BTreeMap::new();
    for tensor in plan.fallbacks() {
        *fallbacks.entry((tensor.wanted, tensor.decl.dtype)).or_default() += 1;
    }
    for ((wanted, taken), count) in fallbacks {
        printer.warn(&format!(
            "{count} tensors are {taken}: their row length is not a multiple of a {wanted} block"
        ));
    }
    let requantized: Vec<_> = plan.requantized().collect();
    if let Some(first) = requantized.first().filter(|_| !args.allow_requantize) {
        printer.warn(&format!(
            "{} tensors are quantized already (`{}` is {}); quantizing again loses more than from 16 or 32 bit",
            requantized.len(),
            first.decl.name,
            first.from
        ));
    }
}

fn print_plan(plan: &Plan<'_>, args: &QuantizeArgs, printer: &Printer) -> anyhow::Result<()> {
    if let Some((name, dtype)) = plan.lacking() {
        printer.warn(&format!(
            "tensor `{name}` needs importance for {dtype}: this will be refused without `--imatrix FILE`"
        ));
    }
    if args.json {
        let outputs = args.output.as_deref().map(|path| plan.outputs(path)).transpose()?;
        return Ok(printer.json(&summary(plan, args, &outputs.unwrap_or_default()))?);
    }
    let mut text = String::new();
    for tensor in plan.tensors() {
        let shape: Vec<_> = tensor.decl.shape.iter().map(u64::to_string).collect();
        let types = if tensor.from == tensor.decl.dtype {
            tensor.from.to_string()
        } else {
            format!("{} -> {}", tensor.from, tensor.decl.dtype)
        };
        writeln!(
            text,
            "{:40}  {:20}  {types:18}  {:.3} MiB",
            tensor.decl.name,
            shape.join(" x "),
            tensor.bytes as f64 / MIB
        )
        .expect("a string takes any text");
    }
    printer.data(&text)?;
    printer.note(&sizes(plan));
    Ok(())
}

/// Bytes before and after, and elements.
fn totals(plan: &Plan<'_>) -> (f64, f64, f64) {
    let mut totals = (0.0, 0.0, 0.0);
    for tensor in plan.tensors() {
        let elements = tensor.decl.shape.iter().product::<u64>() as f64;
        totals.0 += elements / tensor.from.block_len() as f64 * tensor.from.block_bytes() as f64;
        totals.1 += tensor.bytes as f64;
        totals.2 += elements;
    }
    totals
}

fn sizes(plan: &Plan<'_>) -> String {
    let (before, after, elements) = totals(plan);
    let bits = |bytes: f64| if elements == 0.0 { 0.0 } else { 8.0 * bytes / elements };
    let converted = plan.tensors().iter().filter(|t| plan.is_converted(t)).count();
    format!(
        "{:.2} MiB ({:.2} bits per weight) -> {:.2} MiB ({:.2}); {converted} tensors quantized, {} copied",
        before / MIB,
        bits(before),
        after / MIB,
        bits(after),
        plan.tensors().len() - converted
    )
}

fn summary(plan: &Plan<'_>, args: &QuantizeArgs, outputs: &[std::path::PathBuf]) -> serde_json::Value {
    let (before, after, elements) = totals(plan);
    let tensors: Vec<_> = plan
        .tensors()
        .iter()
        .map(|t| {
            json!({
                "name": t.decl.name,
                "shape": t.decl.shape,
                "from": t.from.name(),
                "to": t.decl.dtype.name(),
                "bytes": t.bytes,
            })
        })
        .collect();
    json!({
        "output": outputs,
        "dry_run": args.dry_run,
        "bytes_before": before,
        "bytes_after": after,
        "bits_per_weight": if elements == 0.0 { 0.0 } else { 8.0 * after / elements },
        "needs_importance": plan.lacking().map(|(name, _)| name),
        "fallbacks": plan.fallbacks().count(),
        "tensors": tensors,
    })
}
