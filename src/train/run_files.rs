//! `qpeft.json`: what made the adapter that lies beside it.
//!
//! It ties an adapter to its base by a fingerprint and keeps the settings that trained it, so that
//! every later command can refuse the wrong base and anyone can run the training again.

use std::fs::{File, TryLockError};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::TrainConfig;
use super::error::{Error, Result};
use crate::adapters::folder::RUN_FILE;
use crate::adapters::staged::FileId;

/// The layout that this version writes.
const LAYOUT: u32 = 1;

/// The folder of a run, taken by one process: a lock of the system, which goes with the process however it ends.
#[derive(Debug)]
pub struct RunLock {
    _folder: Option<File>,
}

impl RunLock {
    /// Takes the folder `run`. Where the system cannot lock a folder, nothing is taken.
    ///
    /// # Errors
    /// Another process has it.
    pub fn take(run: &Path) -> Result<RunLock> {
        let Ok(folder) = File::open(run) else { return Ok(RunLock { _folder: None }) };
        match folder.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Error::Taken { path: run.to_owned() }),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(RunLock { _folder: Some(folder) }),
        }
    }
}

/// The content of `qpeft.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunFile {
    /// Layout of this file.
    pub layout: u32,
    /// Version of qpeft that wrote it.
    pub qpeft_version: String,
    /// The base model.
    pub base: FileId,
    /// Training data, then evaluation data if it is a file of its own.
    pub data: Vec<FileId>,
    /// The settings.
    pub config: TrainConfig,
}

impl RunFile {
    /// What this version writes for a run.
    pub fn new(base: FileId, data: Vec<FileId>, config: TrainConfig) -> RunFile {
        RunFile { layout: LAYOUT, qpeft_version: env!("CARGO_PKG_VERSION").to_owned(), base, data, config }
    }

    /// Writes `qpeft.json` into the folder `run`.
    ///
    /// # Errors
    /// The folder is missing or read-only, or the disk is full.
    pub fn write(&self, run: &Path) -> Result<()> {
        let path = run.join(RUN_FILE);
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|source| Error::Json { path: path.clone(), source })?;
        text.push(b'\n');
        Ok(qpeft_formats::file::write_atomic(&path, &text)?)
    }

    /// Reads `qpeft.json` from the folder `run`; `None` if there is none (an adapter of another program).
    ///
    /// # Errors
    /// The file cannot be read, has another layout, or lacks a field.
    pub fn read(run: &Path) -> Result<Option<RunFile>> {
        let path = run.join(RUN_FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        read_layout(&path, &text, LAYOUT)?;
        serde_json::from_slice(&text).map(Some).map_err(|source| Error::Json { path, source })
    }
}

/// Refuses another layout before a missing field of it is reported.
pub(super) fn read_layout(path: &Path, text: &[u8], expected: u32) -> Result<()> {
    #[derive(Deserialize)]
    struct Layout {
        layout: u32,
    }
    let Layout { layout: found } =
        serde_json::from_slice(text).map_err(|source| Error::Json { path: path.to_owned(), source })?;
    if found == expected { Ok(()) } else { Err(Error::Version { path: path.to_owned(), expected, found }) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::config::tests::example;

    fn file() -> RunFile {
        let used = |name: &str| FileId { name: name.into(), fingerprint: format!("blake3:{name}") };
        RunFile::new(used("base.gguf"), vec![used("chat.jsonl")], example())
    }

    #[test]
    fn a_run_file_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RunFile::read(dir.path()).unwrap(), None);
        file().write(dir.path()).unwrap();
        assert_eq!(RunFile::read(dir.path()).unwrap(), Some(file()));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn another_layout_and_a_broken_file_are_refused_by_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(RUN_FILE);
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            RunFile::read(dir.path()).unwrap_err()
        };
        assert!(matches!(refused(r#"{"layout": 2}"#), Error::Version { expected: 1, found: 2, .. }));
        assert!(matches!(refused(r#"{"layout": 1}"#), Error::Json { .. }));
        assert!(matches!(refused("{"), Error::Json { .. }));
        assert!(refused("[]").to_string().contains(RUN_FILE));
    }

    #[test]
    fn a_missing_folder_is_refused() {
        assert!(matches!(file().write(Path::new("no/such/folder")), Err(Error::Format(_))));
    }
}
