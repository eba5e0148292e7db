//! A description and data to the bytes of a GGUF file, version 3, streamed into an atomic file.
//!
//! The description passes the reader's checks before the first byte is written.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use super::layout::{Layout, align_up};
use super::split::{self, SplitLimit};
use super::{Array, MAGIC, Metadata, TensorInfo, Value, check};
use crate::dtype::GgmlType;
use crate::error::{Error, Kind, Place, Result};
use crate::file::AtomicFile;

/// One tensor to write: what the reader will find.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDecl {
    /// Its name, at most 63 bytes.
    pub name: String,
    /// Its size, row length first.
    pub shape: Vec<u64>,
    /// The type of its elements.
    pub dtype: GgmlType,
}

impl TensorDecl {
    /// Elements in a row; 1 for a scalar.
    pub fn row_len(&self) -> usize {
        super::row_len(&self.shape)
    }

    /// Rows, over all further dimensions; 1 for a vector.
    pub fn n_rows(&self) -> usize {
        super::n_rows(&self.shape)
    }
}

/// Writes one GGUF model, in one file or several; what it writes appears under its names only when
/// [`GgufWriter::finish`] has succeeded.
#[derive(Debug)]
pub struct GgufWriter {
    file: AtomicFile,
    alignment: u64,
    /// Of all files.
    tensors: Vec<TensorInfo>,
    /// The tensor being written, and how many of its bytes are.
    current: usize,
    written: u64,
    /// Files of a split model that have their tensors, and those that wait for them.
    complete: Vec<AtomicFile>,
    waiting: VecDeque<Part>,
}

/// A file to come.
#[derive(Debug)]
struct Part {
    path: PathBuf,
    header: Vec<u8>,
    alignment: u64,
}

impl GgufWriter {
    /// Checks the description and writes it; `general.alignment` of the metadata is obeyed.
    ///
    /// # Errors
    /// The reader would refuse the description, or the file cannot be written.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorDecl]) -> Result<GgufWriter> {
        split::refuse(metadata).map_err(|e| e.in_file(path))?;
        let (header, alignment, tensors) = describe(metadata, tensors).map_err(|e| e.in_file(path))?;
        GgufWriter::start(tensors, VecDeque::from([Part { path: path.to_owned(), header, alignment }]))
    }

    /// As [`GgufWriter::create`], in files of at most `limit` next to each other: `NAME-00001-of-00003.gguf`
    /// and so on for the path `NAME.gguf`, also where there is only one.
    ///
    /// # Errors
    /// See [`GgufWriter::create`].
    pub fn create_split(
        path: &Path,
        metadata: &Metadata,
        tensors: &[TensorDecl],
        limit: SplitLimit,
    ) -> Result<GgufWriter> {
        let plan = limit.plan(tensors).map_err(|e| e.in_file(path))?;
        let (mut all, mut parts) = (Vec::with_capacity(tensors.len()), VecDeque::new());
        // Names must differ across files too.
        check::names(tensors.iter().map(|t| t.name.as_str())).map_err(|e| e.in_file(path))?;
        for (no, range) in plan.iter().enumerate() {
            let path = split::part_path(path, no, plan.len());
            let (header, alignment, mut infos) = split::metadata(metadata, no, plan.len(), tensors.len())
                .and_then(|metadata| describe(&metadata, &tensors[range.clone()]))
                .map_err(|e| e.in_file(&path))?;
            for info in &mut infos {
                info.file = no;
            }
            all.extend(infos);
            parts.push_back(Part { path, header, alignment });
        }
        GgufWriter::start(all, parts)
    }

    fn start(tensors: Vec<TensorInfo>, mut parts: VecDeque<Part>) -> Result<GgufWriter> {
        let Part { path, header, alignment } = parts.pop_front().expect("a model has at least one file");
        let file = AtomicFile::create(&path)?;
        let mut writer = GgufWriter {
            file,
            alignment,
            tensors,
            current: 0,
            written: 0,
            complete: Vec::new(),
            waiting: parts,
        };
        writer.file.write(&header)?;
        if !writer.tensors.is_empty() {
            writer.pad()?;
        }
        writer.skip_complete()?;
        Ok(writer)
    }

    /// Appends data of a tensor. Tensors come in declared order; a tensor may come in several parts.
    ///
    /// # Errors
    /// The tensor is not declared, its turn has not come or is over, or it gets too many bytes; or the
    /// disk is full or fails.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let refuse =
            |kind| Err(Error::new(kind).at(Place::Tensor(name.to_owned())).in_file(self.file.path()));
        match self.tensors.get(self.current) {
            Some(current) if current.name == name => {
                let found = self.written + bytes.len() as u64;
                if found > current.size {
                    return refuse(Kind::WrongLength { expected: current.size, found });
                }
            }
            current => {
                let declared = self.tensors.iter().enumerate().find(|(_, t)| t.name == name);
                return match (declared, current) {
                    (Some((_, done)), _) if bytes.is_empty() && done.size == 0 => Ok(()),
                    (None, _) => refuse(Kind::UndeclaredTensor),
                    (Some((i, _)), Some(current)) if i > self.current => {
                        refuse(Kind::OutOfOrder { expected: current.name.as_str().into() })
                    }
                    (Some((_, done)), _) => {
                        let found = done.size + bytes.len() as u64;
                        refuse(Kind::WrongLength { expected: done.size, found })
                    }
                };
            }
        }
        self.file.write(bytes)?;
        self.written += bytes.len() as u64;
        self.skip_complete()
    }

    /// Waits until what was written so far is on the disk, so that little is left to wait for at the end.
    ///
    /// # Errors
    /// The disk is full or fails.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync()
    }

    /// Syncs the files and gives them their names.
    ///
    /// # Errors
    /// A tensor is incomplete, or the disk is full or fails; nothing then appears under the names.
    pub fn finish(mut self) -> Result<()> {
        if let Some(tensor) = self.tensors.get(self.current) {
            return Err(Error::new(Kind::WrongLength { expected: tensor.size, found: self.written })
                .at(Place::Tensor(tensor.name.clone()))
                .in_file(self.file.path()));
        }
        self.complete.push(self.file);
        AtomicFile::commit_all(self.complete)
    }

    /// Pads and passes every tensor that has all its bytes, on to the next file after the last of one.
    fn skip_complete(&mut self) -> Result<()> {
        while let Some(tensor) = self.tensors.get(self.current).filter(|t| t.size == self.written) {
            let file = tensor.file;
            self.pad()?;
            self.current += 1;
            self.written = 0;
            if self.tensors.get(self.current).is_some_and(|next| next.file != file) {
                let part = self.waiting.pop_front().expect("every file was described");
                let mut complete = std::mem::replace(&mut self.file, AtomicFile::create(&part.path)?);
                complete.seal()?;
                self.complete.push(complete);
                self.alignment = part.alignment;
                self.file.write(&part.header)?;
                self.pad()?;
            }
        }
        Ok(())
    }

    fn pad(&mut self) -> Result<()> {
        let len = self.file.len();
        let padded = align_up(len, self.alignment).expect("a file on disk is far shorter than 2^63");
        self.file.write(&vec![0; (padded - len) as usize])
    }
}

/// The bytes before the data (not padded), the alignment, and where each tensor goes.
fn describe(metadata: &Metadata, decls: &[TensorDecl]) -> Result<(Vec<u8>, u64, Vec<TensorInfo>)> {
    let alignment = check::metadata(metadata)?;
    let mut layout = Layout::new(alignment);
    let mut tensors = Vec::with_capacity(decls.len());
    for decl in decls {
        let extent =
            layout.push(decl.dtype, &decl.shape).map_err(|e| e.at(Place::Tensor(decl.name.clone())))?;
        tensors.push(TensorInfo {
            name: decl.name.clone(),
            shape: decl.shape.clone(),
            dtype: decl.dtype,
            offset: extent.offset,
            size: extent.size,
            file: 0,
        });
    }
    check::tensors(&tensors, alignment)?;

    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(3_u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(&mut out, key);
        out.extend(value.type_id().to_le_bytes());
        put_value(&mut out, value);
    }
    for tensor in &tensors {
        put_string(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        out.extend(tensor.shape.iter().flat_map(|dim| dim.to_le_bytes()));
        out.extend(tensor.dtype.id().to_le_bytes());
        out.extend(tensor.offset.to_le_bytes());
    }
    Ok((out, alignment, tensors))
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => put_string(out, v),
        Value::Array(v) => put_array(out, v),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.type_id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(v) => out.extend(v),
        Array::I8(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I16(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::U32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F32(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::Bool(v) => out.extend(v.iter().map(|&x| u8::from(x))),
        Array::String(v) => v.iter().for_each(|s| put_string(out, s)),
        Array::U64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::I64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        Array::F64(v) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
    }
}
