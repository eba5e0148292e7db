//! A description and data to the bytes of a GGUF file, version 3, streamed into an atomic file.
//!
//! The description passes the reader's checks before the first byte is written.

use std::path::Path;

use super::layout::{Layout, align_up};
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

/// Writes one GGUF file; it appears under its name only when [`GgufWriter::finish`] has succeeded.
#[derive(Debug)]
pub struct GgufWriter {
    file: AtomicFile,
    alignment: u64,
    tensors: Vec<TensorInfo>,
    /// The tensor being written, and how many of its bytes are.
    current: usize,
    written: u64,
}

impl GgufWriter {
    /// Checks the description and writes it; `general.alignment` of the metadata is obeyed.
    ///
    /// # Errors
    /// The reader would refuse the description, or the file cannot be written.
    pub fn create(path: &Path, metadata: &Metadata, tensors: &[TensorDecl]) -> Result<GgufWriter> {
        let (header, alignment, tensors) = describe(metadata, tensors).map_err(|e| e.in_file(path))?;
        let mut writer =
            GgufWriter { file: AtomicFile::create(path)?, alignment, tensors, current: 0, written: 0 };
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
                let declared = self.tensors.iter().find(|t| t.name == name);
                return match (declared, current) {
                    (Some(done), _) if bytes.is_empty() && done.size == 0 => Ok(()),
                    (None, _) => refuse(Kind::UndeclaredTensor),
                    (Some(next), Some(current)) if next.offset > current.offset => {
                        refuse(Kind::OutOfOrder { expected: current.name.as_str().into() })
                    }
                    (Some(done), _) => {
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

    /// Syncs the file and gives it its name.
    ///
    /// # Errors
    /// A tensor is incomplete, or the disk is full or fails; nothing then appears under the name.
    pub fn finish(self) -> Result<()> {
        if let Some(tensor) = self.tensors.get(self.current) {
            return Err(Error::new(Kind::WrongLength { expected: tensor.size, found: self.written })
                .at(Place::Tensor(tensor.name.clone()))
                .in_file(self.file.path()));
        }
        self.file.commit()
    }

    /// Pads and passes every tensor that has all its bytes.
    fn skip_complete(&mut self) -> Result<()> {
        while self.tensors.get(self.current).is_some_and(|t| t.size == self.written) {
            self.pad()?;
            self.current += 1;
            self.written = 0;
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
