//! `qpeft bench dequantize`: elements per second that one core unpacks of every stored type.
//!
//! The packed rows and the f32 tile they become fit the second-level cache together, as they do in
//! training, where a tile is unpacked right before it is multiplied.

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::Duration;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::QuantType;
use qpeft_formats::dtype::Quantizer;
use qpeft_formats::file::Bytes;
use qpeft_kernels::BaseWeight;
use qpeft_kernels::cpu::Isa;
use qpeft_kernels::cpu::quantize::quantize_rows;
use qpeft_kernels::rng::RngKey;
use qpeft_kernels::weight::WeightType;
use serde_json::json;

use super::{Fastest, rounds};
use crate::cli::args::BenchDequantizeArgs;
use crate::cli::printer::Printer;

/// The tile: 64 KiB of f32.
const ROWS: usize = 16;
const COLS: usize = 1024;
/// Tiles of a measured call, so that the clock is read rarely.
const REPEATS: usize = 64;
/// Time for one type.
const TIME: Duration = Duration::from_millis(300);

/// Runs the command.
///
/// # Errors
/// Printing fails.
pub fn run(args: &BenchDequantizeArgs, printer: &Printer) -> anyhow::Result<()> {
    let mut speeds = Vec::new();
    for weight in weights(&args.types)? {
        let bits = weight.size_bytes() as f64 * 8.0 / (ROWS * COLS) as f64;
        speeds.push((weight.type_name().to_owned(), bits, measure(&weight) / 1e3));
    }
    if args.json {
        let types = speeds.iter().map(
            |(name, bits, speed)| json!({ "type": name, "bits_per_weight": bits, "gelem_per_second": speed }),
        );
        return Ok(printer.json(&json!({
            "rows": ROWS,
            "cols": COLS,
            "instruction_set": Isa::detect().name(),
            "types": types.collect::<Vec<_>>(),
        }))?);
    }
    let mut text = format!("{:<8} {:>8} {:>10}\n", "type", "bits", "Gelem/s");
    for (name, bits, speed) in speeds {
        writeln!(text, "{name:<8} {bits:>8.4} {speed:>10.2}")?;
    }
    Ok(printer.data(&text)?)
}

/// One tile of normally distributed numbers in every type of the list, or in all that can be written.
fn weights(types: &[WeightType]) -> anyhow::Result<Vec<BaseWeight>> {
    let mut values = vec![0.0; ROWS * COLS];
    RngKey { seed: 0, stream: 0 }.fill_normal(&mut values, 0.02);
    let ggml = GgmlType::ALL.into_iter().filter(|t| t.quantizer() != Quantizer::Never);
    let four_bit = |quant_type, double| WeightType::FourBit { quant_type, double };
    let others = [
        four_bit(QuantType::Nf4, false),
        four_bit(QuantType::Nf4, true),
        four_bit(QuantType::Fp4, false),
        WeightType::Int8,
    ];
    let all: Vec<WeightType> = ggml.map(WeightType::Ggml).chain(others).collect();
    let types = if types.is_empty() { &all } else { types };
    let weights = types.iter().map(|&to| {
        let WeightType::Ggml(dtype) = to else {
            return Ok(BaseWeight::from_f32(ROWS, COLS, &values)?.quantized(to)?);
        };
        // All columns alike: some types are not written without importance.
        let importance = (dtype.quantizer() == Quantizer::Required).then_some(&[1.0; COLS][..]);
        let mut bytes = vec![0; ROWS * dtype.row_bytes(COLS)?];
        quantize_rows(dtype, &values, COLS, importance, &mut bytes);
        Ok(BaseWeight::from_ggml(dtype, ROWS, COLS, Bytes::from(bytes))?)
    });
    weights.collect()
}

/// Million elements per second of the fastest call.
fn measure(weight: &BaseWeight) -> f64 {
    let mut tile = vec![0.0; ROWS * COLS];
    let mut fastest = Fastest::none();
    for _ in rounds(5, usize::MAX, TIME) {
        fastest.time(|| {
            for _ in 0..REPEATS {
                weight.dequantize_rows(0..ROWS, black_box(&mut tile));
            }
        });
    }
    fastest.melem_per_second(REPEATS * ROWS * COLS)
}
