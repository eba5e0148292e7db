//! A safetensors file written tensor by tensor, so that a model need not be in memory.

use std::collections::BTreeMap;
use std::path::Path;

use super::write::describe_entries;
use super::{Dtype, Entry};
use crate::error::{Error, Kind, Place, Result};
use crate::file::AtomicFile;

/// Writes one safetensors file; it appears under its name only when [`SafetensorsWriter::finish`] has
/// succeeded.
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    entries: Vec<(String, Entry)>,
    current: usize,
    written: usize,
}

impl SafetensorsWriter {
    /// Checks and writes the description: name, type, shape (slowest dimension first) of each tensor. Data
    /// follows in this order; readers do not care which it is.
    ///
    /// # Errors
    /// A name appears twice or is reserved, a size overflows, or the file cannot be written.
    pub fn create(
        path: &Path,
        tensors: &[(String, Dtype, Vec<usize>)],
        metadata: &BTreeMap<String, String>,
    ) -> Result<SafetensorsWriter> {
        let mut entries = Vec::with_capacity(tensors.len());
        let mut begin = 0_usize;
        for (name, dtype, shape) in tensors {
            let end = shape
                .iter()
                .try_fold(dtype.bitsize() / 8, |bytes, &dim| bytes.checked_mul(dim))
                .and_then(|bytes| begin.checked_add(bytes))
                .ok_or_else(|| Error::new(Kind::SizeOverflow { what: "tensor bytes" }))
                .map_err(|e| e.at(Place::Tensor(name.clone())).in_file(path))?;
            entries.push((name.clone(), Entry { dtype: *dtype, shape: shape.clone(), begin, end }));
            begin = end;
        }
        let header = describe_entries(&entries, metadata).map_err(|e| e.in_file(path))?;
        let mut file = AtomicFile::create(path)?;
        file.write(&(header.len() as u64).to_le_bytes())?;
        file.write(header.as_bytes())?;
        Ok(SafetensorsWriter { file, entries, current: 0, written: 0 })
    }

    /// Appends data of the tensor whose turn it is; it may come in several parts.
    ///
    /// # Errors
    /// Another tensor's turn it is, or this one gets too many bytes; or the disk is full or fails.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        while self.left() == Some(0) {
            (self.current, self.written) = (self.current + 1, 0);
        }
        let refuse =
            |kind| Err(Error::new(kind).at(Place::Tensor(name.to_owned())).in_file(self.file.path()));
        let Some((current, entry)) = self.entries.get(self.current) else {
            return if bytes.is_empty() { Ok(()) } else { refuse(Kind::UndeclaredTensor) };
        };
        if current != name {
            let expected = current.as_str().into();
            return if bytes.is_empty() { Ok(()) } else { refuse(Kind::OutOfOrder { expected }) };
        }
        let (expected, found) = (entry.end - entry.begin, self.written + bytes.len());
        if found > expected {
            return refuse(Kind::WrongLength { expected: expected as u64, found: found as u64 });
        }
        self.file.write(bytes)?;
        self.written = found;
        Ok(())
    }

    /// Syncs the file and gives it its name.
    ///
    /// # Errors
    /// A tensor is incomplete, or the disk is full or fails; nothing then appears under the name.
    pub fn finish(mut self) -> Result<()> {
        while self.left() == Some(0) {
            (self.current, self.written) = (self.current + 1, 0);
        }
        if let Some((name, entry)) = self.entries.get(self.current) {
            let (expected, found) = ((entry.end - entry.begin) as u64, self.written as u64);
            return Err(Error::new(Kind::WrongLength { expected, found })
                .at(Place::Tensor(name.clone()))
                .in_file(self.file.path()));
        }
        self.file.commit()
    }

    /// Bytes that the current tensor still needs.
    fn left(&self) -> Option<usize> {
        self.entries.get(self.current).map(|(_, entry)| entry.end - entry.begin - self.written)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safetensors::{SafetensorsFile, write_safetensors};

    #[test]
    fn a_streamed_file_has_the_bytes_of_one_that_was_written_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let (streamed, whole) = (dir.path().join("a"), dir.path().join("b"));
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let tensors = [
            ("a".to_owned(), Dtype::F16, vec![2, 1]),
            ("b".to_owned(), Dtype::F16, vec![0]),
            ("c".to_owned(), Dtype::F16, vec![1]),
        ];
        let mut writer = SafetensorsWriter::create(&streamed, &tensors, &metadata).unwrap();
        writer.write("a", &[1, 2]).unwrap();
        assert!(matches!(writer.write("c", &[1]).unwrap_err().kind, Kind::OutOfOrder { .. }));
        assert!(matches!(
            writer.write("a", &[1; 3]).unwrap_err().kind,
            Kind::WrongLength { expected: 4, found: 5 }
        ));
        writer.write("a", &[3, 4]).unwrap();
        writer.write("c", &[5, 6]).unwrap();
        writer.finish().unwrap();
        let refs: [(&str, Dtype, &[usize], &[u8]); 3] = [
            ("a", Dtype::F16, &[2, 1], &[1, 2, 3, 4]),
            ("b", Dtype::F16, &[0], &[]),
            ("c", Dtype::F16, &[1], &[5, 6]),
        ];
        write_safetensors(&whole, &refs, &metadata).unwrap();
        assert_eq!(std::fs::read(&streamed).unwrap(), std::fs::read(&whole).unwrap());
        assert_eq!(SafetensorsFile::open(&streamed).unwrap().names().count(), 3);

        let incomplete = dir.path().join("c");
        let writer = SafetensorsWriter::create(&incomplete, &tensors, &metadata).unwrap();
        assert!(matches!(writer.finish().unwrap_err().kind, Kind::WrongLength { expected: 4, found: 0 }));
        assert!(!incomplete.exists());
    }
}
