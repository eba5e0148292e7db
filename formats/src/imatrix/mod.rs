//! Importance matrices: how much an error in each column of a weight matters, as llama-imatrix measures it.
//!
//! A weight of `rows` x `cols` has `cols` values, the mean square of each input feature over a text; a
//! weight of several experts has `cols` for each. Two containers: a GGUF with sums and counts
//! (`gguf.rs`), and the legacy `.dat` (`legacy.rs`). Source: llama.cpp's imatrix and quantize tools, by fact.

mod gguf;
mod legacy;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Place, Result};
use crate::file::Bytes;

/// An importance matrix, checked: every value is finite and not negative.
#[derive(Debug, Clone)]
pub struct Imatrix {
    path: PathBuf,
    contents: Contents,
}

/// What both containers hold.
#[derive(Debug, Clone, Default)]
struct Contents {
    /// By the name of the weight.
    entries: BTreeMap<String, Vec<f32>>,
    datasets: Vec<String>,
    chunk_count: u32,
}

impl Imatrix {
    /// Reads a file of either kind.
    ///
    /// # Errors
    /// The file cannot be read, is damaged or is not an importance matrix; see [`Kind`].
    pub fn open(path: &Path) -> Result<Imatrix> {
        Imatrix::from_bytes(path, Bytes::map(path)?)
    }

    /// As [`Imatrix::open`], for bytes that are already there; `path` serves the messages.
    ///
    /// # Errors
    /// See [`Imatrix::open`].
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Imatrix> {
        let contents = if bytes.starts_with(b"GGUF") {
            gguf::read(path, bytes)
        } else {
            legacy::read(&bytes).map_err(|e| e.in_file(path))
        }?;
        for (name, values) in &contents.entries {
            check("value", values)
                .map_err(|kind| Error::new(kind).at(Place::Tensor(name.clone())).in_file(path))?;
        }
        if contents.entries.is_empty() {
            return Err(Error::new(Kind::NoImportance).in_file(path));
        }
        Ok(Imatrix { path: path.to_owned(), contents })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The texts it was measured on.
    pub fn datasets(&self) -> &[String] {
        &self.contents.datasets
    }

    /// Chunks of text it was measured on; 0 if the file does not say.
    pub fn chunk_count(&self) -> u32 {
        self.contents.chunk_count
    }

    /// Number of weights that have importance.
    pub fn len(&self) -> usize {
        self.contents.entries.len()
    }

    /// Whether there are none; the reader refuses such a file.
    pub fn is_empty(&self) -> bool {
        self.contents.entries.is_empty()
    }

    /// The names of the weights, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.contents.entries.keys().map(String::as_str)
    }

    /// The importance of a weight of `matrices` matrices (experts) with rows of `row_len`: `row_len` values
    /// for each matrix, one after another; `None` if the file has none for it.
    ///
    /// # Errors
    /// The file has another number of values.
    pub fn of(&self, name: &str, row_len: usize, matrices: usize) -> Result<Option<&[f32]>> {
        let Some(values) = self.contents.entries.get(name) else { return Ok(None) };
        let expected = row_len.saturating_mul(matrices);
        if values.len() == expected {
            return Ok(Some(values));
        }
        let (expected, found) = (expected as u64, values.len() as u64);
        Err(Error::new(Kind::ImportanceLength { expected, found })
            .at(Place::Tensor(name.to_owned()))
            .in_file(&self.path))
    }
}

/// Sums of squares, their counts and their quotients are finite and not negative.
fn check(what: &'static str, values: &[f32]) -> Result<(), Kind> {
    match values.iter().position(|x| !(x.is_finite() && *x >= 0.0)) {
        Some(index) => Err(Kind::BadImportance { what, index: index as u64, value: values[index] }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn testdata(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/imatrix").join(name)
    }

    #[test]
    fn sums_are_divided_by_counts_for_each_expert_and_an_unseen_expert_counts_evenly() {
        let imatrix = Imatrix::open(&testdata("tiny.gguf")).unwrap();
        assert_eq!(
            imatrix.names().collect::<Vec<_>>(),
            ["blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight"]
        );
        assert_eq!(imatrix.datasets(), ["calibration.txt"]);
        assert_eq!((imatrix.chunk_count(), imatrix.len(), imatrix.is_empty()), (5, 2, false));
        let q = imatrix.of("blk.0.attn_q.weight", 4, 1).unwrap().unwrap();
        assert_eq!(q, [1.0 / 3.0, 2.0 / 3.0, 1.0, 0.0]);
        let down = imatrix.of("blk.0.ffn_down_exps.weight", 2, 3).unwrap().unwrap();
        assert_eq!(down, [0.5, 1.0, 1.0, 1.0, 2.5, 3.0]);
        assert_eq!(imatrix.of("output.weight", 4, 1).unwrap(), None);
    }

    #[test]
    fn the_legacy_form_divides_by_the_number_of_calls() {
        let imatrix = Imatrix::open(&testdata("tiny.dat")).unwrap();
        assert_eq!(imatrix.datasets(), ["calibration.txt"]);
        assert_eq!((imatrix.chunk_count(), imatrix.len()), (5, 2));
        let q = imatrix.of("blk.0.attn_q.weight", 4, 1).unwrap().unwrap();
        assert_eq!(q, [0.2, 0.4, 0.6, 0.0]);
        // No calls: values as they are.
        let down = imatrix.of("blk.0.ffn_down_exps.weight", 2, 3).unwrap().unwrap();
        assert_eq!(down, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    #[test]
    fn the_chunks_at_the_end_of_the_legacy_form_may_be_left_out() {
        let whole = std::fs::read(testdata("tiny.dat")).unwrap();
        let bytes = whole[..whole.len() - 8 - "calibration.txt".len()].to_vec();
        let imatrix = Imatrix::from_bytes(Path::new("a.dat"), bytes.into()).unwrap();
        assert_eq!((imatrix.chunk_count(), imatrix.datasets().len()), (0, 0));
    }

    #[test]
    fn a_weight_of_another_size_is_refused() {
        let path = testdata("tiny.dat");
        let error = Imatrix::open(&path).unwrap().of("blk.0.attn_q.weight", 8, 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "`{}`: tensor `blk.0.attn_q.weight`: has 4 values of importance, the weight has 8 columns over all experts",
                path.display()
            )
        );
    }
}
