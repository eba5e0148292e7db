//! What the files of a run can be refused for: each with the path, what was expected and what was found.

use std::path::{Path, PathBuf};

/// Shorthand used across the module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A file of a run that cannot be written, read or used here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {doing} `{}`: {source}", path.display())]
    Io {
        /// The verb: open, read, write.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file of a finished checkpoint or run is not there.
    #[error("`{}` is missing", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// Two runs would mix their files.
    #[error("another run is writing to `{}`", path.display())]
    Taken {
        /// The folder of the run.
        path: PathBuf,
    },
    /// There is nothing to resume from.
    #[error("`{}` has no checkpoint", path.display())]
    NoCheckpoint {
        /// The folder of the run.
        path: PathBuf,
    },
    /// A JSON file that does not have the fields it must have.
    #[error("`{}`: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where, and what was expected.
        source: serde_json::Error,
    },
    /// A file written by another version of the layout.
    #[error("`{}`: layout version {found}, expected {expected}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// The version that this program writes.
        expected: u32,
        /// The version in the file.
        found: u32,
    },
    /// The bytes are not those that were written.
    #[error("`{}`: blake3 is `{found}`, expected `{expected}`", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// The hash that was stored with it.
        expected: String,
        /// The hash of its bytes.
        found: String,
    },
    /// A checkpoint whose tensors are not f32.
    #[error("`{}`: tensor `{name}` is {found}, expected F32", path.display())]
    NotF32 {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type.
        found: String,
    },
    /// The checkpoint belongs to a run with other settings.
    #[error("the checkpoint was made with other settings: {}", differences(settings))]
    OtherConfig {
        /// Setting, value in the checkpoint, value now.
        settings: Vec<(String, String, String)>,
    },
    /// The checkpoint belongs to other data.
    #[error("the checkpoint was made with other data: blake3 is `{found}`, expected `{expected}`")]
    OtherData {
        /// The hash in the checkpoint.
        expected: String,
        /// The hash of the data given now.
        found: String,
    },
    /// The same data became other examples.
    #[error(
        "the tokenizer or the chat template makes other examples of the data than at the run's start: blake3 is `{found}`, expected `{expected}`"
    )]
    OtherExamples {
        /// The hash in the checkpoint.
        expected: String,
        /// The hash of the examples made now.
        found: String,
    },
    /// The checkpoint belongs to another base model.
    #[error(
        "the checkpoint was made with another base model: fingerprint is `{found}`, expected `{expected}`"
    )]
    OtherBase {
        /// The fingerprint in the checkpoint.
        expected: String,
        /// The fingerprint of the model given now.
        found: String,
    },
    /// Training went wrong numerically.
    #[error("step {step}: the loss is {loss} and the gradient norm {grad_norm}; training stopped{}", kept(last_checkpoint.as_deref()))]
    NotFinite {
        /// The step that was not taken.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
        /// The newest checkpoint that gave a finite loss.
        last_checkpoint: Option<PathBuf>,
    },
    /// The device failed in the middle of a run.
    #[error("the device failed after step {step}: {source}{}", resumable(last_checkpoint.as_deref()))]
    Interrupted {
        /// The last step that was taken.
        step: u64,
        /// What the device says.
        source: Box<qpeft_kernels::Error>,
        /// What the run can be resumed from.
        last_checkpoint: Option<PathBuf>,
    },
    /// The training or evaluation data cannot be used.
    #[error(transparent)]
    Data(#[from] super::data::DataError),
    /// The base, the adapter or an op was refused.
    #[error(transparent)]
    Pipeline(#[from] crate::Error),
    /// A container file is malformed or cannot be written.
    #[error(transparent)]
    Format(#[from] qpeft_formats::Error),
}

fn kept(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(path) => format!(", `{}` is kept", path.display()),
        None => ", and no checkpoint before it is known to be good".to_owned(),
    }
}

fn resumable(checkpoint: Option<&Path>) -> String {
    checkpoint.map_or_else(String::new, |path| format!("; `{}` is kept", path.display()))
}

fn differences(settings: &[(String, String, String)]) -> String {
    let each = settings.iter().map(|(key, then, now)| format!("`{key}` is `{now}`, expected `{then}`"));
    each.collect::<Vec<_>>().join("; ")
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: &Path, source: std::io::Error) -> Error {
        Error::Io { doing, path: path.to_owned(), source }
    }

    /// `error` as the end of a run whose last step was `step`, if the device is at fault.
    pub(crate) fn interrupted(error: Error, step: u64, last_checkpoint: Option<PathBuf>) -> Error {
        use qpeft_kernels::Error as Kernel;
        match error {
            Error::Pipeline(crate::Error::Kernel(
                source @ (Kernel::Device { .. } | Kernel::OutOfMemory { .. }),
            )) => Error::Interrupted { step, source: Box::new(source), last_checkpoint },
            other => other,
        }
    }

    /// What the user can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Io { .. } => None,
            Error::Taken { .. } => Some("wait for it to end, or give another `--output`".to_owned()),
            Error::NoCheckpoint { .. } => {
                Some("start the run again with `--overwrite-output` in place of `--resume`".to_owned())
            }
            Error::Missing { path } | Error::Corrupt { path, .. } | Error::NotF32 { path, .. } => {
                Some(format!(
                    "delete `{}` to resume from the checkpoint before it",
                    path.parent().unwrap_or(path).display()
                ))
            }
            Error::Json { .. } => Some("the file was edited or is not one of qpeft's".to_owned()),
            Error::Version { .. } => Some("use the version of qpeft that wrote it".to_owned()),
            Error::OtherConfig { .. } => {
                Some("resume with the same settings, or start a new run in another `--output`".to_owned())
            }
            Error::OtherData { .. } => {
                Some("give the same `--data` file, or start a new run in another `--output`".to_owned())
            }
            Error::OtherExamples { .. } => {
                Some("give the same `--tokenizer`, or start a new run in another `--output`".to_owned())
            }
            Error::OtherBase { .. } => {
                Some("give the same `--model` and `--base-quant`, or start a new run in another `--output`".to_owned())
            }
            Error::NotFinite { last_checkpoint, .. } => {
                let lower = "lower `--learning-rate` or `--max-grad-norm`, warm up longer with `--warmup-steps`, and look for broken examples in the data";
                let on = last_checkpoint.as_ref().map(|path| {
                    format!("; `--init-adapter {}` goes on from the checkpoint in a new run", path.display())
                });
                Some(format!("{lower}{}", on.unwrap_or_default()))
            }
            Error::Interrupted { source, last_checkpoint, .. } => {
                let cause = match source.as_ref() {
                    qpeft_kernels::Error::OutOfMemory { .. } => {
                        "stop what else uses the device, set `--gradient-checkpointing`, or lower `--memory-limit`"
                    }
                    _ => "the driver's log (`nvidia-smi`, `dmesg`) says more",
                };
                Some(match last_checkpoint {
                    Some(_) => format!("{cause}; `--resume` goes on from the checkpoint"),
                    None => format!("{cause}; a smaller `--save-steps` leaves checkpoints to resume from"),
                })
            }
            Error::Data(e) => e.hint(),
            // What a run can give up for memory, other commands do not have.
            Error::Pipeline(crate::Error::Kernel(qpeft_kernels::Error::OutOfMemory { .. })) => Some(
                "lower `--batch-size` or `--max-seq-length`, set `--gradient-checkpointing`, or stop what else \
                 uses the device; a `--memory-limit` below what is free leaves room for it"
                    .to_owned(),
            ),
            Error::Pipeline(e) => e.hint(),
            Error::Format(e) => e.hint(),
        }
    }
}

impl From<qpeft_kernels::Error> for Error {
    fn from(error: qpeft_kernels::Error) -> Error {
        Error::Pipeline(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_fails_in_the_middle_says_what_is_held_and_how_to_go_on() {
        let memory = qpeft_kernels::Error::OutOfMemory {
            device: "cuda:0".to_owned(),
            wanted: 300,
            free: 200,
            total: 1000,
            held: 700,
            cause: "out of memory".to_owned(),
        };
        let checkpoint = Path::new("run").join("checkpoints").join("step-20");
        let failed = Error::interrupted(memory.into(), 25, Some(checkpoint.clone()));
        assert_eq!(
            failed.to_string(),
            format!(
                "the device failed after step 25: device `cuda:0` is out of memory: 300 bytes wanted, 200 of 1000 \
                 free, 700 held by this run (out of memory); `{}` is kept",
                checkpoint.display()
            )
        );
        let hint = failed.hint().unwrap();
        assert!(hint.contains("`--gradient-checkpointing`") && hint.contains("`--resume`"), "{hint}");

        let gone = qpeft_kernels::Error::Device {
            device: "cuda:0".to_owned(),
            reason: "waiting for the device: the GPU has fallen off the bus".to_owned(),
        };
        let failed = Error::interrupted(gone.into(), 3, None);
        assert!(failed.to_string().ends_with("fallen off the bus"), "{failed}");
        assert!(failed.hint().unwrap().contains("`--save-steps`"), "{failed:?}");
        // Whatever else is wrong stays as it is.
        let other = crate::Error::refused("a batch does not fit");
        assert_eq!(Error::interrupted(other.into(), 3, None).to_string(), "a batch does not fit");
    }
}
