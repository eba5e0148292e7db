//! Base folder + adapter as the source of a GGUF: every matrix of the decoder as it was trained, adapted.
//!
//! What is written is then a matter of [`quantize`](super::quantize), with mixtures, splits and bounded
//! memory; what storing took from the change is measured on the finished file. A device packs whole matrices, of which the last
//! few stay here until the pieces of them are written.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use qpeft_formats::GgmlType;
use qpeft_formats::file::Bytes;
use qpeft_formats::gguf::{GgufFile, Metadata, TensorDecl, names};
use qpeft_formats::mixture::{FileType, Mixture};
use qpeft_kernels::Device;
use qpeft_kernels::ops::packing_loss::PackingLoss;
use qpeft_kernels::ops::quantize::{Packers, is_packed_on_device};
use qpeft_kernels::weight::WeightType;

use super::adapted::{Merger, add_loss, merged_rows};
use super::gguf::GgufSource;
use super::hf::HfSource;
use super::merge::{MergeOptions, MergeReport};
use super::quantize::Plan;
use super::source::Source;
use crate::error::{Error, Result};
use crate::model::save::{linear_of, repack};
use crate::model::{BaseWeight, Decoder, Linear, Parameters};

/// A folder whose matrices are those of a decoder, with its adapters.
struct MergedSource<'a> {
    inner: HfSource,
    /// The linear of each tensor that is one, and the heads by which a GGUF orders its rows.
    linears: Vec<Option<(&'a Linear, Option<usize>)>>,
    values: &'a [f32],
    /// With a device.
    packer: Option<Mutex<Packer>>,
}

/// What a device packs, one matrix after another.
struct Packer {
    merger: Merger,
    /// Tensors as the file has them.
    recent: VecDeque<(usize, Bytes)>,
    /// What packing took from the tensors that were packed.
    losses: HashMap<usize, PackingLoss>,
}

/// Packed tensors that are kept: pieces are made in order, by threads that may be in the next one already.
const RECENT: usize = 4;

impl<'a> MergedSource<'a> {
    fn new(
        inner: HfSource,
        decoder: &'a Decoder,
        values: &'a [f32],
        packer: Option<Packer>,
    ) -> MergedSource<'a> {
        let linear = |tensor: usize| {
            let (linear, slot) = linear_of(decoder, &inner.hf_name(tensor)?)?;
            Some((linear, slot.permuted_heads(&decoder.config)))
        };
        let linears = (0..inner.tensors().len()).map(linear).collect();
        MergedSource { inner, linears, values, packer: packer.map(Mutex::new) }
    }

    /// Rows of the base that was trained on, in GGUF order; with the adapter if `adapted`.
    fn linear_rows(&self, tensor: usize, rows: Range<usize>, adapted: bool, out: &mut [f32]) -> Result<()> {
        let (linear, heads) = self.linears[tensor].expect("callers ask for linears only");
        let cols = linear.weight.cols();
        let fill = |rows: Range<usize>, out: &mut [f32]| {
            if adapted {
                return merged_rows(linear, self.values, rows, out);
            }
            linear.weight.dequantize_rows(rows, out);
            Ok(())
        };
        let Some(heads) = heads else { return fill(rows, out) };
        let head_dim = linear.weight.rows() / heads;
        rows.zip(out.chunks_exact_mut(cols)).try_for_each(|(row, out)| {
            let from = names::hf_row_of_gguf_row(row, heads, head_dim);
            fill(from..from + 1, out)
        })
    }
}

impl Source for MergedSource<'_> {
    fn metadata(&self) -> &Metadata {
        self.inner.metadata()
    }

    fn tensors(&self) -> &[TensorDecl] {
        self.inner.tensors()
    }

    fn rows(&self, tensor: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        if self.linears[tensor].is_none() {
            return self.inner.rows(tensor, rows, out);
        }
        self.linear_rows(tensor, rows, true, out)
    }

    fn quantized(
        &self,
        tensor: usize,
        dtype: GgmlType,
        rows: Range<usize>,
        out: &mut Vec<u8>,
    ) -> Result<bool> {
        let (Some(packer), Some((linear, heads))) = (&self.packer, self.linears[tensor]) else {
            return Ok(false);
        };
        let (of, cols) = (WeightType::Ggml(dtype), linear.weight.cols());
        if !is_packed_on_device(&BaseWeight::empty(of, 1, cols)?) {
            return Ok(false);
        }
        let row_bytes = dtype.row_bytes(cols)?;
        let mut packer = packer.lock().unwrap_or_else(PoisonError::into_inner);
        let Packer { merger, recent, losses } = &mut *packer;
        let found = recent.iter().find(|(of, _)| *of == tensor).map(|(_, bytes)| bytes.clone());
        let bytes = if let Some(bytes) = found {
            bytes
        } else {
            let (like, mut loss) =
                (BaseWeight::empty(of, linear.weight.rows(), cols)?, PackingLoss::default());
            let packed = merger.pack(&self.tensors()[tensor].name, linear, &like, &mut loss)?;
            let bytes = repack(&packed, heads)?.bytes;
            losses.insert(tensor, loss);
            recent.truncate(RECENT - 1);
            recent.push_front((tensor, bytes.clone()));
            bytes
        };
        drop(packer);
        out.extend_from_slice(&bytes[rows.start * row_bytes..rows.end * row_bytes]);
        Ok(true)
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

/// Writes the merged model of the folder `dir`, as the decoder was trained on it, to a GGUF at `path`, computing on
/// `device`.
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
    device: &Device,
    path: &Path,
    mut progress: impl FnMut(usize, usize),
) -> Result<MergeReport> {
    let values = params.values.read()?;
    let packer = device.cuda().map(|_| {
        let merger = Merger::new(decoder, params, device)?;
        Ok::<_, Error>(Packer { merger, recent: VecDeque::new(), losses: HashMap::new() })
    });
    let source = MergedSource::new(HfSource::open(dir)?, decoder, &values, packer.transpose()?);
    let mixture = options.mixture.clone().or_else(|| dense_mixture(&source));
    let plan = Plan::new(&source, mixture.as_ref(), None, options.split)?;
    let mib = |bytes: u64| bytes.div_ceil(1 << 20) as usize;
    let packers = if plan.elements_to_share() > 0 { Packers::of(device)? } else { Packers::default() };
    let threads = rayon::current_num_threads();
    plan.write(path, threads, &packers, |done, total| progress(mib(done), mib(total)))?;

    let mut report = MergeReport::default();
    for tensor in plan.fallbacks() {
        report.fallbacks.push((tensor.decl.name.clone(), tensor.wanted, tensor.decl.dtype));
    }
    let first = plan.outputs(path)?.swap_remove(0);
    let written = GgufSource::new(GgufFile::open(&first)?);
    let losses = source.packer.as_ref().map(|packer| {
        let packer = packer.lock().unwrap_or_else(PoisonError::into_inner);
        packer.losses.clone()
    });
    let losses = losses.unwrap_or_default();
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
        if let Some(&loss) = losses.get(&tensor) {
            report.loss += loss;
            continue;
        }
        let stored_at = written.tensors().iter().position(|t| t.name == described.name);
        let stored_at = stored_at.expect("every planned tensor was written");
        add_loss(
            &mut report.loss,
            described.n_rows(),
            described.row_len(),
            |rows, [base, merged, stored]| {
                source.linear_rows(tensor, rows.clone(), false, base)?;
                source.linear_rows(tensor, rows.clone(), true, merged)?;
                written.rows(stored_at, rows, stored)
            },
        )?;
    }
    Ok(report)
}
