//! Base folder + adapter as the source of a GGUF: every matrix of the decoder as it was trained, adapted.
//!
//! What is written is then a matter of [`quantize`](super::quantize), with mixtures, splits and bounded
//! memory; what storing took from the change is measured on the finished file.

use std::ops::Range;
use std::path::Path;

use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{GgufFile, Metadata, names};
use qpeft_formats::mixture::{FileType, Mixture};
use rayon::prelude::*;

use super::gguf::GgufSource;
use super::hf::HfSource;
use super::merge::{MergeOptions, MergeReport};
use super::quantize::Plan;
use super::source::{Source, SourceTensor};
use crate::error::Result;
use crate::model::save::slot_of;
use crate::model::{Decoder, Linear, Parameters};

/// Rows that one task compares.
const ROWS_PER_TASK: usize = 64;

/// A folder whose matrices are those of a decoder, with its adapters.
struct MergedSource<'a> {
    inner: HfSource,
    /// The linear of each tensor that is one, and the heads by which a GGUF orders its rows.
    linears: Vec<Option<(&'a Linear, Option<usize>)>>,
    values: &'a [f32],
}

impl<'a> MergedSource<'a> {
    fn new(inner: HfSource, decoder: &'a Decoder, values: &'a [f32]) -> MergedSource<'a> {
        let linear = |tensor: usize| {
            let (layer, slot) = slot_of(&inner.hf_name(tensor)?)?;
            let linear = &decoder.layers.get(layer)?.linears[slot as usize];
            Some((linear, slot.permuted_heads(&decoder.config)))
        };
        let linears = (0..inner.tensors().len()).map(linear).collect();
        MergedSource { inner, linears, values }
    }

    /// Rows of the base that was trained on, in GGUF order; with the adapter if `adapted`.
    fn linear_rows(&self, tensor: usize, rows: Range<usize>, adapted: bool, out: &mut [f32]) {
        let (linear, heads) = self.linears[tensor].expect("callers ask for linears only");
        let fill = |rows: Range<usize>, out: &mut [f32]| {
            linear.weight.dequantize_rows(rows.clone(), out);
            if let Some(adapter) = linear.adapter.as_ref().filter(|_| adapted) {
                adapter.merge(rows, out, self.values);
            }
        };
        let Some(heads) = heads else { return fill(rows, out) };
        let head_dim = linear.weight.rows() / heads;
        for (row, out) in rows.zip(out.chunks_exact_mut(linear.weight.cols())) {
            let from = names::hf_row_of_gguf_row(row, heads, head_dim);
            fill(from..from + 1, out);
        }
    }
}

impl Source for MergedSource<'_> {
    fn metadata(&self) -> &Metadata {
        self.inner.metadata()
    }

    fn tensors(&self) -> &[SourceTensor] {
        self.inner.tensors()
    }

    fn rows(&self, tensor: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        if self.linears[tensor].is_none() {
            return self.inner.rows(tensor, rows, out);
        }
        self.linear_rows(tensor, rows, true, out);
        Ok(())
    }

    fn packed(&self, tensor: usize) -> Option<Bytes> {
        self.inner.packed(tensor).filter(|_| self.linears[tensor].is_none())
    }
}

/// The file type of the folder's dense matrices: what is written if nobody asks for another.
fn dense_mixture(source: &MergedSource<'_>) -> Option<Mixture> {
    let linear = source.linears.iter().position(Option::is_some)?;
    FileType::from_name(source.tensors()[linear].dtype.name()).map(Mixture::new)
}

/// Writes the merged model of the folder `dir`, as the decoder was trained on it, to a GGUF at `path`.
///
/// `progress` gets the mebibytes that are written and their number.
///
/// # Errors
/// The folder cannot be converted, a merged value is not finite or too large for its type, or the file
/// cannot be written; nothing is left at `path` then.
pub fn merge_folder_to_gguf(
    dir: &Path,
    decoder: &Decoder,
    params: &Parameters,
    options: &MergeOptions,
    path: &Path,
    mut progress: impl FnMut(usize, usize),
) -> Result<MergeReport> {
    let values = params.values.read()?;
    let source = MergedSource::new(HfSource::open(dir)?, decoder, &values);
    let mixture = options.mixture.clone().or_else(|| dense_mixture(&source));
    let plan = Plan::new(&source, mixture.as_ref(), None, options.split)?;
    let mib = |bytes: u64| bytes.div_ceil(1 << 20) as usize;
    plan.write(path, rayon::current_num_threads(), |done, total| progress(mib(done), mib(total)))?;

    let mut report = MergeReport::default();
    for tensor in plan.fallbacks() {
        report.fallbacks.push((tensor.decl.name.clone(), tensor.wanted, tensor.decl.dtype));
    }
    let first = plan.outputs(path)?.swap_remove(0);
    let written = GgufSource::new(GgufFile::open(&first)?);
    for (tensor, described) in source.tensors().iter().enumerate() {
        let Some((linear, _)) = source.linears[tensor] else {
            let copied = plan.tensors().iter().any(|t| t.source == tensor && !plan.is_converted(t));
            *(if copied { &mut report.copied } else { &mut report.converted }) += 1;
            continue;
        };
        if linear.adapter.is_none() {
            report.converted += 1;
            continue;
        }
        report.merged += 1;
        let stored = written.tensors().iter().position(|t| t.name == described.name);
        measure(&mut report, &source, tensor, &written, stored.expect("every planned tensor was written"))?;
    }
    Ok(report)
}

/// Adds what became of the change of one tensor to the report.
fn measure(
    report: &mut MergeReport,
    source: &MergedSource<'_>,
    tensor: usize,
    written: &GgufSource,
    stored_at: usize,
) -> Result<()> {
    let (rows, cols) = (source.tensors()[tensor].n_rows(), source.tensors()[tensor].row_len());
    let sums = (0..rows.div_ceil(ROWS_PER_TASK))
        .into_par_iter()
        .map(|task| {
            let range = task * ROWS_PER_TASK..rows.min((task + 1) * ROWS_PER_TASK);
            let [mut base, mut merged, mut stored] = [(); 3].map(|()| vec![0.0; range.len() * cols]);
            source.linear_rows(tensor, range.clone(), false, &mut base);
            source.linear_rows(tensor, range.clone(), true, &mut merged);
            written.rows(stored_at, range, &mut stored)?;
            let mut sums = [0.0; 4];
            for ((base, merged), stored) in base.iter().zip(&merged).zip(&stored) {
                let (merged, change) = (f64::from(*merged), f64::from(merged - base));
                sums[0] += merged * merged;
                sums[1] += change * change;
                sums[2] += f64::from(stored - base) * change;
                sums[3] += (f64::from(*stored) - merged).powi(2);
            }
            Ok(sums)
        })
        .collect::<Result<Vec<[f64; 4]>>>()?;
    for [adapted, change, arrived, noise] in sums {
        report.adapted += adapted;
        report.change += change;
        report.arrived += arrived;
        report.noise += noise;
    }
    Ok(())
}
