//! `qpeft bench quantize`: million elements per second of every quantizer, beside llama.cpp's own.
//!
//! Both sides get the same rows of a normal distribution in the same pieces on the same threads, and take
//! turns round by round, so that a noisy machine is noisy to both; the fastest round counts. What they
//! write must be equal byte by byte. A GPU is measured by `quantize_cuda`.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use qpeft_formats::GgmlType;
use qpeft_formats::dtype::Quantizer;
use qpeft_kernels::Device;
use qpeft_kernels::cpu::Isa;
use qpeft_kernels::cpu::quantize::quantize_rows;
use qpeft_kernels::ggml_library::GgmlLibrary;
use qpeft_kernels::rng::RngKey;
use qpeft_kernels::weight::WeightType;
use rayon::ThreadPool;
use rayon::prelude::*;
use serde_json::json;

use super::{Fastest, quantize_cuda, rounds};
use crate::cli::args::BenchQuantizeArgs;
use crate::cli::printer::Printer;
use crate::cli::progress::Progress;

/// Elements of a row: a common width of a model, and whole blocks of every type.
pub(super) const ROW_LEN: usize = 4096;
/// Elements, if nobody says how many.
const ELEMENTS: usize = 1 << 20;
/// Time for one type after its first rounds.
const TIME: Duration = Duration::from_secs(2);

/// Runs the command.
///
/// # Errors
/// A type cannot be written with what is at hand, the library is refused, or its bytes are other than ours.
pub fn run(args: &BenchQuantizeArgs, printer: &Printer) -> anyhow::Result<()> {
    let device =
        Device::open(&args.device).with_context(|| format!("cannot use the device `{}`", args.device))?;
    if let Device::Cuda(cuda) = &device {
        return quantize_cuda::run(cuda, args, printer);
    }
    let types = types(args)?;
    let threads = args.threads.unwrap_or(1);
    let library = args.ggml_library.as_deref().map(GgmlLibrary::open).transpose()?;
    if let Some(library) = &library {
        types.iter().try_for_each(|dtype| library.check(*dtype))?;
    }
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .with_context(|| format!("cannot start {threads} threads"))?;
    let bench = Bench::new(args, &pool, library.as_ref());
    let mut bar = Progress::start(printer, "type", 0, types.len() as u64);
    let mut results = Vec::new();
    for (i, dtype) in types.into_iter().enumerate() {
        results.push(bench.measure(dtype)?);
        bar.update(i as u64 + 1, dtype.name());
    }
    bar.finish();

    if args.json {
        printer.json(&bench.report(&results, args.ggml_library.as_deref()))?;
    } else {
        printer.data(&bench.table(&results)?)?;
    }
    let other: Vec<&str> =
        results.iter().filter(|r| r.bytes_equal == Some(false)).map(|r| r.dtype.name()).collect();
    anyhow::ensure!(other.is_empty(), "the bytes of {} differ from those of llama.cpp", other.join(", "));
    Ok(())
}

/// The types that were named, or all that can be written with what is at hand.
fn types(args: &BenchQuantizeArgs) -> anyhow::Result<Vec<GgmlType>> {
    if !args.types.is_empty() {
        let dtype = |of: &WeightType| match of {
            WeightType::Ggml(dtype) => Ok(dtype.require_quantizer(args.importance).map(|()| *dtype)?),
            WeightType::FourBit { .. } | WeightType::Int8 => {
                anyhow::bail!("`{of}` is no type of ggml: it is measured on a GPU, with `--device cuda`")
            }
        };
        return args.types.iter().map(dtype).collect();
    }
    let wanted = |dtype: &GgmlType| match dtype.quantizer() {
        Quantizer::Never => false,
        Quantizer::Plain => !args.importance && !dtype.is_dense(),
        Quantizer::Weighted => true,
        Quantizer::Required => args.importance,
    };
    Ok(GgmlType::ALL.into_iter().filter(wanted).collect())
}

/// What both sides are given.
struct Bench<'a> {
    rows: Vec<f32>,
    importance: Option<Vec<f32>>,
    /// Rows of a piece.
    piece: usize,
    pool: &'a ThreadPool,
    library: Option<&'a GgmlLibrary>,
}

/// One line of the table.
struct Speed {
    dtype: GgmlType,
    ours: f64,
    theirs: Option<f64>,
    bytes_equal: Option<bool>,
}

impl<'a> Bench<'a> {
    fn new(args: &BenchQuantizeArgs, pool: &'a ThreadPool, library: Option<&'a GgmlLibrary>) -> Bench<'a> {
        let n_rows = args.elements.unwrap_or(ELEMENTS).div_ceil(ROW_LEN);
        let mut rows = vec![0.0; n_rows * ROW_LEN];
        RngKey { seed: 0, stream: 0 }.fill_normal(&mut rows, 0.02);
        let importance = args.importance.then(|| {
            let mut activations = vec![0.0; ROW_LEN];
            RngKey { seed: 0, stream: 1 }.fill_normal(&mut activations, 1.0);
            activations.into_iter().map(|x: f32| x * x).collect()
        });
        let piece = n_rows.div_ceil(pool.current_num_threads() * 4).max(1);
        Bench { rows, importance, piece, pool, library }
    }

    fn measure(&self, dtype: GgmlType) -> anyhow::Result<Speed> {
        let row_bytes = dtype.row_bytes(ROW_LEN)?;
        let size = self.rows.len() / ROW_LEN * row_bytes;
        let (mut ours, mut theirs) = (vec![0; size], vec![0; if self.library.is_some() { size } else { 0 }]);
        let (mut our_time, mut their_time) = (Fastest::none(), Fastest::none());
        let importance = self.importance.as_deref();
        // The first round also loads what is made at the first use; it never is the fastest.
        for _ in rounds(3, 50, TIME) {
            our_time.time(|| {
                self.pieces(&mut ours, row_bytes, |rows, bytes| {
                    quantize_rows(dtype, rows, ROW_LEN, importance, bytes);
                });
            });
            if let Some(library) = self.library {
                their_time.time(|| {
                    self.pieces(&mut theirs, row_bytes, |rows, bytes| {
                        library.quantize_rows(dtype, rows, ROW_LEN, importance, bytes);
                    });
                });
            }
        }
        Ok(Speed {
            dtype,
            ours: our_time.melem_per_second(self.rows.len()),
            theirs: self.library.map(|_| their_time.melem_per_second(self.rows.len())),
            bytes_equal: self.library.map(|_| ours == theirs),
        })
    }

    fn pieces(&self, bytes: &mut [u8], row_bytes: usize, quantize: impl Fn(&[f32], &mut [u8]) + Sync) {
        let (rows, packed) = (self.piece * ROW_LEN, self.piece * row_bytes);
        self.pool.install(|| {
            bytes
                .par_chunks_mut(packed)
                .zip(self.rows.par_chunks(rows))
                .for_each(|(bytes, rows)| quantize(rows, bytes));
        });
    }

    fn table(&self, results: &[Speed]) -> Result<String, std::fmt::Error> {
        let mut text = format!("{:<8} {:>10}", "type", "Melem/s");
        if self.library.is_some() {
            write!(text, " {:>10} {:>7} {:>6}", "llama.cpp", "ratio", "bytes")?;
        }
        text.push('\n');
        for speed in results {
            write!(text, "{:<8} {:>10.1}", speed.dtype.name(), speed.ours)?;
            if let (Some(theirs), Some(equal)) = (speed.theirs, speed.bytes_equal) {
                let bytes = if equal { "equal" } else { "DIFFER" };
                write!(text, " {theirs:>10.1} {:>7.2} {bytes:>6}", speed.ours / theirs)?;
            }
            text.push('\n');
        }
        Ok(text)
    }

    fn report(&self, results: &[Speed], library: Option<&Path>) -> serde_json::Value {
        let types = results.iter().map(|speed| {
            json!({
                "type": speed.dtype.name(),
                "melem_per_second": speed.ours,
                "llama_cpp_melem_per_second": speed.theirs,
                "ratio": speed.theirs.map(|theirs| speed.ours / theirs),
                "bytes_equal": speed.bytes_equal,
            })
        });
        json!({
            "elements": self.rows.len(),
            "row_len": ROW_LEN,
            "threads": self.pool.current_num_threads(),
            "instruction_set": Isa::detect().name(),
            "importance": self.importance.is_some(),
            "ggml_library": library,
            "types": types.collect::<Vec<_>>(),
        })
    }
}
