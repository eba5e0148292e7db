//! `qpeft bench svd`: how long PiSSA takes to split the linears of a model, and where that time goes.
//!
//! The weights are random, one matrix per shape, so that their spectra are flat: the hardest case for the iteration.
//! On a GPU a layer is split first, to compile the kernels, and once more alone with events around every launch.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::time::Instant;

use qpeft_kernels::svd::SvdOptions;
use qpeft_kernels::weight::WeightType;
use qpeft_kernels::{BaseWeight, Device};
use serde_json::json;

use crate::adapters::pissa::{Job, SplitError, SplitOptions, split_all};
use crate::cli::args::BenchSvdArgs;
use crate::cli::printer::Printer;
use crate::cli::session::open_device;
use crate::model::layer::Slot;
use crate::model::synthetic::random_weight;

/// Runs the command.
///
/// # Errors
/// The type does not fit the shapes, or memory runs out.
pub fn run(args: &BenchSvdArgs, printer: &Printer) -> anyhow::Result<()> {
    let device = open_device(&args.compute, printer)?;
    let options = SplitOptions {
        svd: SvdOptions { iterations: args.pissa_niter, ..SvdOptions::default() },
        refinements: args.pissa_refinements,
    };
    let jobs = jobs(args)?;
    let mut parts = BTreeMap::new();
    let mut layer_seconds = None;
    if let Device::Cuda(cuda) = &device {
        let layer = &jobs[..jobs.len().min(Slot::ALL.len())];
        split(layer, &device, &options)?;
        // Events of several threads would enclose each other's launches.
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
        cuda.start_profile();
        let began = Instant::now();
        alone.install(|| split(layer, &device, &options))?;
        layer_seconds = Some(began.elapsed().as_secs_f64());
        parts = cuda.stop_profile()?;
    }
    let began = Instant::now();
    let total = split(&jobs, &device, &options)?;
    let seconds = began.elapsed().as_secs_f64();
    let elements: usize = jobs.iter().map(|job| job.weight.rows() * job.weight.cols()).sum();

    let mut report = json!({
        "device": device.to_string(),
        "threads": rayon::current_num_threads(),
        "base_type": args.base.name(),
        "residual_type": residual(args).name(),
        "matrices": jobs.len(),
        "elements": elements,
        "rank": args.lora_r,
        "iterations": args.pissa_niter,
        "refinements": args.pissa_refinements,
        "seconds": seconds,
        "layer_device_ms": parts,
        "captured": total.captured(),
        "quantization_error": total.relative_quantization(),
    });
    let mut text = format!(
        "{} matrices, {:.3} billion elements, {}, rank {}, residuals in {}: split in {seconds:.3} s; captured {:.6}\n",
        jobs.len(),
        elements as f64 / 1e9,
        args.base.name(),
        args.lora_r,
        residual(args).name(),
        total.captured()
    );
    if let Device::Cuda(cuda) = &device {
        report["gpu"] = json!(cuda.model()?);
        let busy: f64 = parts.values().sum();
        report["layer_ms"] = json!({ "alone": layer_seconds.map(|s| 1e3 * s), "device": busy });
        writeln!(
            text,
            "one layer by one thread: {:.2} ms, of which the device is busy for {busy:.2} ms",
            1e3 * layer_seconds.unwrap_or_default()
        )?;
        for (what, ms) in &parts {
            writeln!(text, "  {what:<28} {ms:9.2} ms")?;
        }
    }
    if args.check {
        let smallest = jobs.iter().min_by_key(|job| job.weight.rows() * job.weight.cols());
        let smallest = smallest.expect("a model has linears");
        let one = |device: &Device| split(std::slice::from_ref(smallest), device, &options);
        let (here, there) = (one(&device)?, one(&Device::Cpu)?);
        report["check"] = json!({
            "rows": smallest.weight.rows(),
            "cols": smallest.weight.cols(),
            "residual": here.residual.sqrt(),
            "residual_on_cpu": there.residual.sqrt(),
            "captured": here.captured(),
            "captured_on_cpu": there.captured(),
        });
        writeln!(
            text,
            "{} x {}: captured {:.6}, on the CPU {:.6}; residual {:.6} of the CPU's",
            smallest.weight.rows(),
            smallest.weight.cols(),
            here.captured(),
            there.captured(),
            (here.residual / there.residual).sqrt()
        )?;
    }
    if args.json { Ok(printer.json(&report)?) } else { Ok(printer.data(&text)?) }
}

/// The type of what is left.
fn residual(args: &BenchSvdArgs) -> WeightType {
    args.residual_quant.unwrap_or(args.base)
}

/// The linears of all layers, which share their bytes.
fn jobs(args: &BenchSvdArgs) -> anyhow::Result<Vec<Job>> {
    let shapes: Vec<(usize, usize)> = match (&args.shape, args.rows, args.cols) {
        (Some(shape), ..) => {
            let layer = Slot::ALL.map(|slot| slot.shape(&shape.config));
            layer.iter().copied().cycle().take(layer.len() * shape.config.n_layers).collect()
        }
        (None, Some(rows), Some(cols)) => vec![(rows, cols)],
        (None, ..) => anyhow::bail!("name a `--shape`, or `--rows` and `--cols`"),
    };
    let mut made: HashMap<(usize, usize), BaseWeight> = HashMap::new();
    let jobs = shapes.into_iter().map(|(rows, cols)| {
        let weight = match made.get(&(rows, cols)) {
            Some(weight) => weight.clone(),
            None => random_weight(args.base, rows, cols)?,
        };
        made.insert((rows, cols), weight.clone());
        Ok(Job { weight, rank: args.lora_r, scaling: 1.0, given: None, residual: residual(args) })
    });
    jobs.collect()
}

fn split(jobs: &[Job], device: &Device, options: &SplitOptions) -> anyhow::Result<SplitError> {
    let mut total = SplitError::default();
    split_all(jobs, device, options, |_, split| {
        total += split.error;
        Ok(())
    })?;
    Ok(total)
}
