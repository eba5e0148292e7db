//! `qpeft bench quantize --device cuda`: how fast a GPU packs each type, beside all cores of the CPU.
//!
//! The kernel is measured on f32 rows in device memory that no cache holds; then rows that start and end in host memory, which
//! cross the bus: packed by the cores alone, and by the cores and the GPU together. What they write must be equal byte by byte.

use std::fmt::Write as _;
use std::sync::Arc;

use anyhow::Context;
use qpeft_kernels::cpu::Isa;
use qpeft_kernels::cuda::Cuda;
use qpeft_kernels::ops::quantize::{Packers, Packing, is_packed_on_device};
use qpeft_kernels::weight::WeightType;
use qpeft_kernels::{BaseWeight, Device, Tensor};
use rayon::ThreadPool;
use serde_json::json;

use super::quantize::ROW_LEN;
use super::{Fastest, median_seconds, normal};
use crate::cli::args::BenchQuantizeArgs;
use crate::cli::printer::Printer;
use crate::cli::progress::Progress;

/// Rows, if nobody says how many elements: the largest matrix of an 8B model's layers.
const ROWS: usize = 14336;
/// Bytes between two uses of the same memory: several times the caches of the largest GPU.
const COLD: usize = 512 << 20;
/// Calls of what takes long: the fastest counts.
const CALLS: usize = 3;

/// Seconds for one type.
struct Speed {
    of: WeightType,
    /// Read and written by the kernel.
    bytes: usize,
    kernel: f64,
    together: f64,
    cpu: f64,
    /// The part of the GPU in what was packed together.
    share: f64,
    bytes_equal: bool,
}

/// Runs the command on a GPU.
///
/// # Errors
/// A type that the GPU does not pack, memory runs out, or the bytes differ from the CPU's.
pub fn run(cuda: &Arc<Cuda>, args: &BenchQuantizeArgs, printer: &Printer) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.ggml_library.is_none() && !args.importance,
        "`--ggml-library` and `--importance` are for the CPU: leave out `--device {}`",
        args.device
    );
    let rows = args.elements.map_or(ROWS, |elements| elements.div_ceil(ROW_LEN));
    let types = types(args)?;
    let threads = match args.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism().context("cannot count the cores")?.get(),
    };
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .with_context(|| format!("cannot start {threads} threads"))?;
    let values = normal(rows, ROW_LEN, 0.02, 0);
    let mut bar = Progress::start(printer, "type", 0, types.len() as u64);
    let mut speeds = Vec::new();
    for of in types {
        speeds.push(measure(cuda, of, rows, &values, &pool)?);
        bar.update(speeds.len() as u64, of.name());
    }
    bar.finish();

    let elements = values.len() as f64;
    if args.json {
        let types = speeds.iter().map(|speed| {
            json!({
                "type": speed.of.name(),
                "microseconds": 1e6 * speed.kernel,
                "gelem_per_second": elements / speed.kernel / 1e9,
                "gb_per_second": speed.bytes as f64 / speed.kernel / 1e9,
                "gelem_per_second_together": elements / speed.together / 1e9,
                "gpu_share": speed.share,
                "cpu_gelem_per_second": elements / speed.cpu / 1e9,
                "bytes_equal": speed.bytes_equal,
            })
        });
        printer.json(&json!({
            "device": cuda.name(),
            "gpu": cuda.model()?,
            "rows": rows,
            "row_len": ROW_LEN,
            "threads": threads,
            "instruction_set": Isa::detect().name(),
            "types": types.collect::<Vec<_>>(),
        }))?;
    } else {
        let mut text = format!(
            "{:<8} {:>10} {:>10} {:>8} {:>10} {:>10} {:>7} {:>6}   Gelem/s\n",
            "type", "us", "kernel", "GB/s", "CPU", "CPU + GPU", "of GPU", "bytes"
        );
        for Speed { of, bytes, kernel, together, cpu, share, bytes_equal } in &speeds {
            writeln!(
                text,
                "{:<8} {:>10.1} {:>10.2} {:>8.0} {:>10.3} {:>10.3} {:>6.0}% {:>6}",
                of.name(),
                1e6 * kernel,
                elements / kernel / 1e9,
                *bytes as f64 / kernel / 1e9,
                elements / cpu / 1e9,
                elements / together / 1e9,
                100.0 * share,
                if *bytes_equal { "equal" } else { "DIFFER" }
            )?;
        }
        printer.data(&text)?;
    }
    let other: Vec<&str> = speeds.iter().filter(|s| !s.bytes_equal).map(|s| s.of.name()).collect();
    anyhow::ensure!(other.is_empty(), "the bytes of {} differ from those of the CPU", other.join(", "));
    Ok(())
}

/// The types that were named, or all that a GPU packs.
fn types(args: &BenchQuantizeArgs) -> anyhow::Result<Vec<WeightType>> {
    let is_packed = |of: &WeightType| -> anyhow::Result<bool> {
        Ok(is_packed_on_device(&BaseWeight::empty(*of, 1, ROW_LEN)?))
    };
    if args.types.is_empty() {
        return WeightType::writable()
            .map(|of| Ok(is_packed(&of)?.then_some(of)))
            .filter_map(anyhow::Result::transpose)
            .collect();
    }
    for of in &args.types {
        anyhow::ensure!(is_packed(of)?, "a GPU does not pack `{of}`: that type is left to the CPU");
    }
    Ok(args.types.clone())
}

fn measure(
    cuda: &Arc<Cuda>,
    of: WeightType,
    rows: usize,
    values: &[f32],
    pool: &ThreadPool,
) -> anyhow::Result<Speed> {
    let device = Device::Cuda(Arc::clone(cuda));
    let like = BaseWeight::empty(of, rows, ROW_LEN)?;
    let bytes = size_of_val(values) + like.size_bytes();
    let places = (0..COLD.div_ceil(bytes).max(2))
        .map(|_| {
            let x = Tensor::from_slice(&device, rows, ROW_LEN, values)?;
            let packing =
                Packing::new(cuda, &like)?.context("the type is packed there, as was asked before")?;
            Ok((x, packing))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let kernel = median_seconds(&device, |number| {
        let (x, packing) = &places[number % places.len()];
        Ok(packing.enqueue(x.view(), None)?)
    })?;

    drop(places);

    let packers = Packers::of(&device)?;
    let (mut found, mut expected) = (None, None);
    let (mut together, mut cpu) = (Fastest::none(), Fastest::none());
    for _ in 0..CALLS {
        together.time(|| found = Some(pool.install(|| like.requantize_by(&packers, values))));
        cpu.time(|| expected = Some(pool.install(|| like.requantize(values))));
    }
    let found = found.context("there is at least one call")??;
    let expected = expected.context("there is at least one call")??;
    Ok(Speed {
        of,
        bytes,
        kernel,
        together: together.0,
        cpu: cpu.0,
        share: packers.elements_on_device() as f64 / (CALLS * values.len()) as f64,
        bytes_equal: stored(&found) == stored(&expected),
    })
}

/// The packed bytes, with the scales.
fn stored(weight: &BaseWeight) -> Vec<u8> {
    match weight.ggml() {
        Some((_, bytes)) => bytes.to_vec(),
        None => weight.tensors("w").into_iter().flatten().flat_map(|tensor| tensor.bytes.to_vec()).collect(),
    }
}
