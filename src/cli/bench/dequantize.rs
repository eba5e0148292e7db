//! `qpeft bench dequantize`: how fast every stored type is unpacked, by one core or by a GPU.
//!
//! On the CPU the packed rows and the f32 tile they become fit the second-level cache together, as they do in
//! training, where a tile is unpacked right before it is multiplied. On a GPU whole matrices become bf16, and what is
//! read and written was not touched for longer than any cache remembers.

use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::dtype::Quantizer;
use qpeft_formats::file::Bytes;
use qpeft_kernels::cpu::Isa;
use qpeft_kernels::cpu::quantize::quantize_rows;
use qpeft_kernels::cuda::Cuda;
use qpeft_kernels::ops::dequantize::dequantize_rows;
use qpeft_kernels::weight::WeightType;
use qpeft_kernels::{BaseWeight, Device, Dtype, Tensor};
use serde_json::{Value, json};

use super::{Fastest, median_seconds, normal, rounds};
use crate::cli::args::{BenchDequantizeArgs, ComputeArgs};
use crate::cli::printer::Printer;
use crate::cli::session::open_device;

/// The matrix on the CPU: a tile of 64 KiB of f32.
const TILE: (usize, usize) = (16, 1024);
/// The matrix on a GPU: the largest of an 8B model's layers.
const MATRIX: (usize, usize) = (14336, 4096);
/// Elements of a measured call on the CPU, so that the clock is read rarely.
const ELEMENTS: usize = 1 << 20;
/// Time for one type on the CPU.
const TIME: Duration = Duration::from_millis(300);
/// Elements that are quantized; a larger matrix repeats them, because some types take long to make.
const QUANTIZED: usize = 1 << 18;
/// Bytes between two uses of the same memory: several times the caches of the largest GPU.
const COLD: usize = 512 << 20;

/// What was measured of one type.
struct Speed {
    name: String,
    bits: f64,
    seconds: f64,
    /// Bytes read plus bytes written, on a GPU.
    bytes: Option<usize>,
}

/// Runs the command.
///
/// # Errors
/// The device cannot be used, or printing fails.
pub fn run(args: &BenchDequantizeArgs, printer: &Printer) -> anyhow::Result<()> {
    let device = open_device(&ComputeArgs { device: args.device.clone(), threads: None }, printer)?;
    let (rows, cols) = if device.cuda().is_some() { MATRIX } else { TILE };
    let (rows, cols) = (args.rows.unwrap_or(rows), args.cols.unwrap_or(cols));
    let types = if args.types.is_empty() { all_types() } else { args.types.clone() };
    let mut speeds = Vec::new();
    for of in types {
        let weight = weight(of, rows, cols)?;
        let name = weight.type_name().to_owned();
        let bits = weight.size_bytes() as f64 * 8.0 / (rows * cols) as f64;
        let (seconds, bytes) = match &device {
            Device::Cuda(cuda) => {
                let bytes = weight.size_bytes() + rows * cols * Dtype::Bf16.size();
                (on_gpu(cuda, &weight, bytes)?, Some(bytes))
            }
            Device::Cpu | Device::Meta(_) => (on_core(&weight), None),
        };
        speeds.push(Speed { name, bits, seconds, bytes });
    }
    let elements = (rows * cols) as f64;
    if args.json {
        let types = speeds.iter().map(|speed| {
            let mut row = json!({
                "type": speed.name,
                "bits_per_weight": speed.bits,
                "gelem_per_second": elements / speed.seconds / 1e9,
            });
            if let Some(bytes) = speed.bytes {
                row["microseconds"] = json!(1e6 * speed.seconds);
                row["gb_per_second"] = json!(bytes as f64 / speed.seconds / 1e9);
            }
            row
        });
        let types: Vec<Value> = types.collect();
        let mut report = json!({ "device": device.to_string(), "rows": rows, "cols": cols, "types": types });
        match &device {
            Device::Cuda(cuda) => report["gpu"] = json!(cuda.model()?),
            Device::Cpu | Device::Meta(_) => report["instruction_set"] = json!(Isa::detect().name()),
        }
        return Ok(printer.json(&report)?);
    }
    let mut text = format!("{:<8} {:>8} {:>10}", "type", "bits", "Gelem/s");
    text.push_str(if device.cuda().is_some() { "         us       GB/s\n" } else { "\n" });
    for Speed { name, bits, seconds, bytes } in speeds {
        write!(text, "{name:<8} {bits:>8.4} {:>10.2}", elements / seconds / 1e9)?;
        if let Some(bytes) = bytes {
            write!(text, " {:>10.1} {:>10.0}", 1e6 * seconds, bytes as f64 / seconds / 1e9)?;
        }
        text.push('\n');
    }
    Ok(printer.data(&text)?)
}

/// All types that can be written.
fn all_types() -> Vec<WeightType> {
    let ggml = GgmlType::ALL.into_iter().filter(|t| t.quantizer() != Quantizer::Never);
    let four_bit = |quant_type, double| WeightType::FourBit { quant_type, double };
    let others = [
        four_bit(QuantType::Nf4, false),
        four_bit(QuantType::Nf4, true),
        four_bit(QuantType::Fp4, false),
        WeightType::Int8,
    ];
    ggml.map(WeightType::Ggml).chain(others).collect()
}

/// Normally distributed numbers in this type.
fn weight(of: WeightType, rows: usize, cols: usize) -> anyhow::Result<BaseWeight> {
    let WeightType::Ggml(dtype) = of else {
        return Ok(BaseWeight::from_f32(rows, cols, &normal(rows, cols, 0.02, 0))?.quantized(of)?);
    };
    let some = rows.min((QUANTIZED / cols).max(1));
    // All columns alike: some types are not written without importance.
    let importance = (dtype.quantizer() == Quantizer::Required).then(|| vec![1.0; cols]);
    let mut bytes = vec![0; some * dtype.row_bytes(cols)?];
    quantize_rows(dtype, &normal(some, cols, 0.02, 0), cols, importance.as_deref(), &mut bytes);
    let all = rows * dtype.row_bytes(cols)?;
    let bytes: Vec<u8> = bytes.into_iter().cycle().take(all).collect();
    Ok(BaseWeight::from_ggml(dtype, rows, cols, Bytes::from(bytes))?)
}

/// Seconds of the fastest call of one core.
fn on_core(weight: &BaseWeight) -> f64 {
    let elements = weight.rows() * weight.cols();
    let mut tile = vec![0.0; elements];
    let repeats = (ELEMENTS / elements).max(1);
    let mut fastest = Fastest::none();
    for _ in rounds(5, usize::MAX, TIME) {
        fastest.time(|| {
            for _ in 0..repeats {
                weight.dequantize_rows(0..weight.rows(), black_box(&mut tile));
            }
        });
    }
    fastest.0 / repeats as f64
}

/// Median seconds of a GPU on copies that take turns; a call reads and writes `bytes`.
fn on_gpu(cuda: &Arc<Cuda>, weight: &BaseWeight, bytes: usize) -> anyhow::Result<f64> {
    let device = Device::Cuda(Arc::clone(cuda));
    let copies = COLD.div_ceil(bytes).max(2);
    let mut places = (0..copies)
        .map(|_| {
            let packed = weight.clone().to_device(&device)?;
            Ok((packed, Tensor::activations(&device, weight.rows(), weight.cols())?))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    median_seconds(&device, |number| {
        let (packed, out) = &mut places[number % copies];
        Ok(dequantize_rows(out.view_mut(), &*packed, 0..weight.rows(), None, None)?)
    })
}
