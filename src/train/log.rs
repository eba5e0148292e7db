//! `log.jsonl`: one JSON object per line, flushed as it is written, the same numbers the terminal shows.
//!
//! Every line has `step` and `loss`; lines of an evaluation also have `"split":"eval"`. A number that
//! is not finite is written as `null`, which is what JSON has for it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{Error, Result};

/// Name of the log in the folder of a run.
pub const FILE_NAME: &str = "log.jsonl";

/// One optimizer step, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StepRecord {
    /// Optimizer steps done, this one included.
    pub step: u64,
    /// Mean loss per trained token before the step, in nats.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Total gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens of the step, trained or not, without padding.
    pub tokens: u64,
    /// `tokens` per second of the step.
    pub tokens_per_second: f64,
    /// Seconds since the run (or its resumption) began.
    pub elapsed_seconds: f64,
    /// Passes over the data so far, fractional.
    pub epoch: f64,
}

/// One evaluation on held-out data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EvalRecord {
    /// Optimizer steps done.
    pub step: u64,
    /// Mean loss per trained token, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Trained tokens that were scored.
    pub tokens: u64,
    /// Seconds since the run (or its resumption) began.
    pub elapsed_seconds: f64,
    /// Passes over the data so far, fractional.
    pub epoch: f64,
}

/// Writes `log.jsonl`.
#[derive(Debug)]
pub struct LogWriter {
    path: PathBuf,
    file: File,
}

/// The part of a line that resuming needs.
#[derive(Deserialize)]
struct Line {
    step: u64,
}

/// An [`EvalRecord`] with its split, in the order in which people read it.
#[derive(Serialize)]
struct EvalLine<'a> {
    split: &'static str,
    #[serde(flatten)]
    record: &'a EvalRecord,
}

impl LogWriter {
    /// Starts an empty log in the folder `run`.
    pub fn create(run: &Path) -> Result<LogWriter> {
        let path = run.join(FILE_NAME);
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        Ok(LogWriter { path, file })
    }

    /// Continues the log in the folder `run` after step `step`: lines of later steps, and a last line
    /// that a kill cut short, are dropped first. A missing log is begun.
    ///
    /// # Errors
    /// The file cannot be read or replaced.
    pub fn resume(run: &Path, step: u64) -> Result<LogWriter> {
        let path = run.join(FILE_NAME);
        let io = |doing| move |path: &Path, e| Error::io(doing, path, e);
        let mut kept = Vec::new();
        match File::open(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io("open")(&path, e)),
            Ok(file) => {
                for line in BufReader::new(file).split(b'\n') {
                    let line = line.map_err(|e| io("read")(&path, e))?;
                    if serde_json::from_slice::<Line>(&line).is_ok_and(|l| l.step <= step) {
                        kept.extend_from_slice(&line);
                        kept.push(b'\n');
                    }
                }
            }
        }
        qpeft_formats::file::write_atomic(&path, &kept)?;
        let file = File::options().append(true).open(&path).map_err(|e| io("open")(&path, e))?;
        Ok(LogWriter { path, file })
    }

    /// Adds the line of a step.
    pub fn step(&mut self, record: &StepRecord) -> Result<()> {
        self.line(record)
    }

    /// Adds the line of an evaluation.
    pub fn eval(&mut self, record: &EvalRecord) -> Result<()> {
        self.line(&EvalLine { split: "eval", record })
    }

    fn line(&mut self, record: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_vec(record).expect("a record of numbers has a JSON form");
        text.push(b'\n');
        // One write per line: a reader that follows the file never sees half of one.
        self.file.write_all(&text).map_err(|e| Error::io("write", &self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64, loss: f64) -> StepRecord {
        StepRecord {
            step,
            loss,
            learning_rate: 1e-4,
            grad_norm: 0.5,
            tokens: 64,
            tokens_per_second: 128.0,
            elapsed_seconds: 0.5 * step as f64,
            epoch: 0.25,
        }
    }

    fn eval(step: u64) -> EvalRecord {
        EvalRecord { step, loss: 1.0, perplexity: 2.5, tokens: 10, elapsed_seconds: 0.25, epoch: 0.25 }
    }

    fn steps(run: &Path) -> Vec<u64> {
        let text = std::fs::read_to_string(run.join(FILE_NAME)).unwrap();
        text.lines().map(|line| serde_json::from_str::<Line>(line).unwrap().step).collect()
    }

    #[test]
    fn every_line_has_its_numbers_and_is_there_at_once() {
        let run = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(run.path()).unwrap();
        log.step(&record(1, 2.0)).unwrap();
        log.eval(&eval(1)).unwrap();
        let text = std::fs::read_to_string(run.path().join(FILE_NAME)).unwrap();
        assert_eq!(
            text,
            "{\"step\":1,\"loss\":2.0,\"learning_rate\":0.0001,\"grad_norm\":0.5,\"tokens\":64,\
             \"tokens_per_second\":128.0,\"elapsed_seconds\":0.5,\"epoch\":0.25}\n\
             {\"split\":\"eval\",\"step\":1,\"loss\":1.0,\"perplexity\":2.5,\"tokens\":10,\
             \"elapsed_seconds\":0.25,\"epoch\":0.25}\n"
        );
    }

    #[test]
    fn a_loss_that_is_not_finite_is_null() {
        let run = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(run.path()).unwrap();
        log.step(&record(1, f64::NAN)).unwrap();
        log.step(&record(2, f64::INFINITY)).unwrap();
        let text = std::fs::read_to_string(run.path().join(FILE_NAME)).unwrap();
        for line in text.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(line["loss"].is_null(), "{line}");
        }
    }

    #[test]
    fn resuming_drops_later_steps_and_a_line_that_was_cut_short() {
        let run = tempfile::tempdir().unwrap();
        let mut log = LogWriter::create(run.path()).unwrap();
        for step in 1..=4 {
            log.step(&record(step, 1.0)).unwrap();
            log.eval(&eval(step)).unwrap();
        }
        drop(log);
        let path = run.path().join(FILE_NAME);
        let mut text = std::fs::read(&path).unwrap();
        text.extend_from_slice(b"{\"step\":1,\"lo");
        std::fs::write(&path, text).unwrap();

        let mut log = LogWriter::resume(run.path(), 2).unwrap();
        assert_eq!(steps(run.path()), [1, 1, 2, 2]);
        log.step(&record(3, 1.0)).unwrap();
        assert_eq!(steps(run.path()), [1, 1, 2, 2, 3]);
    }

    #[test]
    fn resuming_without_a_log_begins_one() {
        let run = tempfile::tempdir().unwrap();
        LogWriter::resume(run.path(), 5).unwrap().step(&record(6, 1.0)).unwrap();
        assert_eq!(steps(run.path()), [6]);
    }

    #[test]
    fn a_missing_folder_is_refused_by_path() {
        let error = LogWriter::create(Path::new("no/such/folder")).unwrap_err();
        assert!(error.to_string().starts_with("cannot create `no/such/folder/log.jsonl`"), "{error}");
    }
}
