//! Any source -> one GGUF (or a split one) in which every tensor has the type that a mixture chooses.
//!
//! First the plan: types, sizes, metadata, everything that can be refused without reading a weight. Then
//! the work: pieces of rows are read, quantized and written at the same time, in the order of the file,
//! with a bounded number on the way. Order of tensors and keys are llama-quantize's.

use std::ops::Range;
use std::path::{Path, PathBuf};

use qpeft_formats::gguf::split::{self, SplitLimit, part_path};
use qpeft_formats::gguf::{GgufWriter, Metadata, TensorDecl, Value};
use qpeft_formats::imatrix::Imatrix;
use qpeft_formats::mixture::{FileType, Mixture, ModelFacts, file_order};
use qpeft_formats::{GgmlType, blocks};
use qpeft_kernels::cpu::quantize::quantize_rows;
use qpeft_kernels::ops::quantize::Packers;
use qpeft_kernels::weight::WeightType;

use super::gguf::read_packed;
use super::pipeline::in_order;
use super::source::Source;
use crate::error::{Error, Result};
use crate::model::save::refuse_not_finite;

/// `general.quantization_version`: the layout of ggml's blocks.
const QUANTIZATION_VERSION: u32 = 2;

/// Bytes that all pieces on the way may take together, with the scratch of the workers.
const MEMORY: usize = 192 << 20;

/// Elements of a piece, at most: a few milliseconds of work.
const LARGEST_PIECE: usize = 1 << 20;

/// Bytes written between two waits for the disk.
const SYNC_EVERY: usize = 64 << 20;

/// One tensor of the plan.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// Its place in the source.
    pub source: usize,
    /// What the new file declares.
    pub decl: TensorDecl,
    /// Its type in the source.
    pub from: GgmlType,
    /// The type that it would have if its row length were a whole number of blocks.
    pub wanted: GgmlType,
    /// Bytes in the new file.
    pub bytes: u64,
    /// It becomes another type, with importance or without.
    converted: bool,
    has_importance: bool,
}

/// What a source becomes.
#[derive(Debug)]
pub struct Plan<'a> {
    source: &'a dyn Source,
    imatrix: Option<&'a Imatrix>,
    split: Option<SplitLimit>,
    metadata: Metadata,
    tensors: Vec<PlannedTensor>,
    /// The first tensor that would be garbage without importance, and its type.
    lacking: Option<(String, GgmlType)>,
}

impl std::fmt::Debug for dyn Source + '_ {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Source({} tensors)", self.tensors().len())
    }
}

impl<'a> Plan<'a> {
    /// Chooses the types. Without a mixture every tensor is copied.
    ///
    /// # Errors
    /// A type does not fit, cannot be written, or the importance matrix belongs to another model. That a
    /// tensor lacks importance is refused by [`Plan::write`].
    pub fn new(
        source: &'a dyn Source,
        mixture: Option<&Mixture>,
        imatrix: Option<&'a Imatrix>,
        split: Option<SplitLimit>,
    ) -> Result<Plan<'a>> {
        let decls = source.tensors();
        let choices = match mixture {
            Some(mixture) => {
                let facts = ModelFacts::read(source.metadata())?;
                Some(mixture.choose(&facts, decls, imatrix.is_some())?)
            }
            None => None,
        };
        let (mut tensors, mut lacking) = (Vec::with_capacity(decls.len()), None);
        for i in file_order(decls) {
            let mut decl = decls[i].clone();
            let from = decl.dtype;
            let choice = choices.as_ref().map(|choices| choices[i]);
            decl.dtype = choice.map_or(from, |choice| choice.dtype);
            let converted = decl.dtype != from || source.packed(i).is_none();
            let mut has_importance = false;
            if converted && decl.dtype != from && !decl.dtype.is_dense() {
                has_importance = importance(imatrix, &decl)?.is_some();
                let required = choice.is_some_and(|choice| choice.requires_importance)
                    || decl.dtype.require_quantizer(has_importance).is_err()
                        && decl.dtype.require_quantizer(true).is_ok();
                if required && !has_importance {
                    lacking.get_or_insert_with(|| (decl.name.clone(), decl.dtype));
                } else {
                    decl.dtype
                        .require_quantizer(has_importance)
                        .map_err(|e| e.at(qpeft_formats::error::Place::Tensor(decl.name.clone())))?;
                }
            }
            tensors.push(PlannedTensor {
                source: i,
                from,
                wanted: choice.map_or(from, |choice| choice.wanted),
                bytes: tensor_bytes(&decl)?,
                converted,
                has_importance,
                decl,
            });
        }
        let metadata = metadata(source.metadata(), mixture.map(|m| m.file_type), imatrix);
        Ok(Plan { source, imatrix, split, metadata, tensors, lacking })
    }

    /// The tensors, in the order of the new file.
    pub fn tensors(&self) -> &[PlannedTensor] {
        &self.tensors
    }

    /// The first tensor that would be garbage without importance, and its type.
    pub fn lacking(&self) -> Option<(&str, GgmlType)> {
        self.lacking.as_ref().map(|(name, dtype)| (name.as_str(), *dtype))
    }

    /// Tensors whose row length does not fit the type of their role.
    pub fn fallbacks(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.tensors.iter().filter(|t| t.decl.dtype != t.wanted)
    }

    /// Tensors that become another type although they are quantized already.
    pub fn requantized(&self) -> impl Iterator<Item = &PlannedTensor> {
        self.tensors.iter().filter(|t| t.decl.dtype != t.from && !t.from.is_dense())
    }

    /// Whether a tensor becomes another type.
    pub fn is_converted(&self, tensor: &PlannedTensor) -> bool {
        tensor.converted
    }

    /// Elements that a device can take part in packing: those that become a type that is worth it, without importance.
    pub fn elements_to_share(&self) -> u64 {
        let shared = |t: &&PlannedTensor| {
            t.converted && !t.has_importance && Packers::is_shared(WeightType::Ggml(t.decl.dtype))
        };
        self.tensors.iter().filter(shared).map(|t| t.decl.shape.iter().product::<u64>()).sum()
    }

    /// The files that [`Plan::write`] makes for an output path.
    ///
    /// # Errors
    /// See [`SplitLimit::plan`].
    pub fn outputs(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let Some(limit) = self.split else { return Ok(vec![path.to_owned()]) };
        let count = limit.plan(&self.decls())?.len();
        Ok((0..count).map(|no| part_path(path, no, count)).collect())
    }

    fn decls(&self) -> Vec<TensorDecl> {
        self.tensors.iter().map(|t| t.decl.clone()).collect()
    }

    /// Reads, quantizes and writes on `threads` threads, which share the packing with `packers`; `progress` gets bytes
    /// written and to write.
    ///
    /// # Errors
    /// A tensor lacks importance, a value is not finite or too large for its type, or a file fails. Nothing
    /// is at `path` then.
    pub fn write(
        &self,
        path: &Path,
        threads: usize,
        packers: &Packers,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<()> {
        if let Some((name, dtype)) = &self.lacking {
            return Err(Error::refused(format!(
                "tensor `{name}`: as {dtype} it would be garbage without importance, and there is none for it"
            ))
            .with_hint(
                "give an importance matrix of this model with `--imatrix FILE`, or another `--quant`",
            ));
        }
        let decls = self.decls();
        let mut writer = match self.split {
            Some(limit) => GgufWriter::create_split(path, &self.metadata, &decls, limit)?,
            None => GgufWriter::create(path, &self.metadata, &decls)?,
        };
        // One more than there are cores to compute: it reads while the others are busy.
        let workers = if threads > 1 { threads + 1 } else { 1 };
        let window = 2 * workers + 2;
        let pieces = self.pieces(MEMORY / (workers * 8 + window * 4));
        let total = self.tensors.iter().map(|t| t.bytes).sum();
        let (mut written, mut unsynced) = (0, 0);
        in_order(
            pieces.len(),
            workers,
            window,
            Vec::new,
            |values, i, out| self.make(&pieces[i], packers, values, out),
            |i, bytes| {
                writer.write(&self.tensors[pieces[i].tensor].decl.name, bytes)?;
                written += bytes.len() as u64;
                unsynced += bytes.len();
                if unsynced >= SYNC_EVERY {
                    writer.sync()?;
                    unsynced = 0;
                }
                progress(written, total);
                Ok(())
            },
        )?;
        Ok(writer.finish()?)
    }

    /// Cuts all tensors into pieces of about `elements` elements.
    fn pieces(&self, elements: usize) -> Vec<Piece> {
        let elements = elements.clamp(1, LARGEST_PIECE);
        let mut pieces = Vec::new();
        for (tensor, planned) in self.tensors.iter().enumerate() {
            let (step, end) = if planned.converted {
                let source = &self.source.tensors()[planned.source];
                ((elements / source.row_len().max(1)).max(1), source.n_rows())
            } else {
                // Whole blocks, so that their scales can be looked at.
                let block = planned.from.block_bytes();
                ((4 * elements / block).max(1) * block, planned.bytes as usize)
            };
            if planned.bytes == 0 {
                continue;
            }
            let mut start = 0;
            while start < end {
                let stop = end.min(start + step);
                pieces.push(Piece { tensor, range: start..stop });
                start = stop;
            }
        }
        pieces
    }

    fn make(&self, piece: &Piece, packers: &Packers, values: &mut Vec<f32>, out: &mut Vec<u8>) -> Result<()> {
        let planned = &self.tensors[piece.tensor];
        let source = &self.source.tensors()[planned.source];
        if !planned.converted {
            let packed = self.source.packed(planned.source).expect("a copied tensor is packed");
            out.resize(piece.range.len(), 0);
            read_packed(&packed, piece.range.start, out)?;
            let first = piece.range.start / planned.from.block_bytes();
            return blocks::check_scales(planned.from, out).map_err(|(block, value)| {
                let element = (first + block) * planned.from.block_len();
                let (row, column) = (element / source.row_len(), element % source.row_len());
                let what = if planned.from.is_dense() { "" } else { "the scale at " };
                Error::refused(format!(
                    "tensor `{}`: {what}row {row}, column {column} is {value}; only finite weights can be stored",
                    planned.decl.name
                ))
            });
        }
        let (dtype, row_len) = (planned.decl.dtype, source.row_len());
        let rows = piece.range.clone();
        if planned.has_importance || !self.source.quantized(planned.source, dtype, rows, out)? {
            self.quantize(piece, packers, values, out)?;
        }
        if let Err((block, scale)) = blocks::check_scales(dtype, out) {
            let row = piece.range.start + block / (row_len / dtype.block_len());
            return Err(Error::refused(format!(
                "tensor `{}`: row {row} is too large for {dtype}: a block becomes {scale}",
                planned.decl.name
            ))
            .with_hint("keep the tensor in a wider type: `--tensor-type NAME=bf16`"));
        }
        Ok(())
    }

    /// Rows of a tensor from f32.
    fn quantize(
        &self,
        piece: &Piece,
        packers: &Packers,
        values: &mut Vec<f32>,
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let planned = &self.tensors[piece.tensor];
        let source = &self.source.tensors()[planned.source];
        let (dtype, row_len) = (planned.decl.dtype, source.row_len());
        values.resize(piece.range.len() * row_len, 0.0);
        self.source.rows(planned.source, piece.range.clone(), values)?;
        refuse_not_finite(values, row_len, piece.range.start, &planned.decl.name)?;

        let row_bytes = dtype.row_bytes(row_len)?;
        out.resize(piece.range.len() * row_bytes, 0);
        let importance = if planned.has_importance { importance(self.imatrix, &planned.decl)? } else { None };
        let Some(importance) = importance else { return Ok(packers.ggml(dtype, values, out)?) };
        // Rows of one matrix have the same importance; a piece may reach into the next.
        let matrix_rows = source.shape.get(1).map_or(1, |&rows| rows as usize).max(1);
        let mut row = piece.range.start;
        while row < piece.range.end {
            let matrix = row / matrix_rows;
            let stop = piece.range.end.min((matrix + 1) * matrix_rows);
            let local = row - piece.range.start..stop - piece.range.start;
            quantize_rows(
                dtype,
                &values[local.start * row_len..local.end * row_len],
                row_len,
                Some(&importance[matrix * row_len..(matrix + 1) * row_len]),
                &mut out[local.start * row_bytes..local.end * row_bytes],
            );
            row = stop;
        }
        Ok(())
    }
}

/// Rows of a tensor, or bytes of one that is copied.
#[derive(Debug)]
struct Piece {
    tensor: usize,
    range: Range<usize>,
}

/// The importance of a tensor. A token embedding may have another size: it is looked up, not multiplied,
/// and only a head that shares it has importance.
fn importance<'a>(imatrix: Option<&'a Imatrix>, decl: &TensorDecl) -> Result<Option<&'a [f32]>> {
    let Some(imatrix) = imatrix else { return Ok(None) };
    let matrices = decl.shape.iter().skip(2).product::<u64>() as usize;
    match imatrix.of(&decl.name, decl.row_len(), matrices) {
        Err(_) if decl.name.ends_with("token_embd.weight") => Ok(None),
        other => Ok(other?),
    }
}

fn tensor_bytes(decl: &TensorDecl) -> Result<u64> {
    Ok(decl.dtype.row_bytes(decl.row_len())? as u64 * decl.n_rows() as u64)
}

/// The source's metadata with what was done, in llama-quantize's order.
fn metadata(source: &Metadata, file_type: Option<FileType>, imatrix: Option<&Imatrix>) -> Metadata {
    /// Bytes of a text that llama-quantize keeps.
    const LONGEST: usize = 127;
    let text = |text: &str| {
        let end = (0..=text.len().min(LONGEST)).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
        Value::String(text[..end].to_owned())
    };
    let mut metadata = source.clone();
    split::remove_keys(&mut metadata);
    let mut append = |key: &str, value| {
        metadata.remove(key);
        metadata.insert(key, value);
    };
    append("general.quantization_version", Value::U32(QUANTIZATION_VERSION));
    let present = source.get("general.file_type").cloned();
    if let Some(value) = file_type.map(|t| Value::U32(t.id())).or(present) {
        append("general.file_type", value);
    }
    if let Some(imatrix) = imatrix {
        append("quantize.imatrix.file", text(&imatrix.path().to_string_lossy()));
        if let Some(dataset) = imatrix.datasets().first() {
            append("quantize.imatrix.dataset", text(dataset));
        }
        append("quantize.imatrix.entries_count", Value::U32(imatrix.len() as u32));
        if imatrix.chunk_count() > 0 {
            append("quantize.imatrix.chunks_count", Value::U32(imatrix.chunk_count()));
        }
    }
    metadata
}
