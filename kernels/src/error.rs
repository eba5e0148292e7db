//! What an op or a device can refuse.

/// Shorthand used across the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A refused op or an unusable device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two operands do not belong together.
    #[error("{op}: {what} is {found}, expected {expected}")]
    ShapeMismatch {
        /// The op that was called.
        op: &'static str,
        /// The operand and dimension at fault.
        what: &'static str,
        /// The size that the other operands ask for.
        expected: usize,
        /// The size that was given.
        found: usize,
    },
    /// An index (token id, position, sequence boundary) lies outside of its table.
    #[error("{op}: {what} {index} is outside of 0..{limit}")]
    IndexOutOfRange {
        /// The op that was called.
        op: &'static str,
        /// What the index counts.
        what: &'static str,
        /// The index.
        index: usize,
        /// One past the largest allowed.
        limit: usize,
    },
    /// No kernel of this op runs on the device of its operands.
    #[error("{op} has no kernel for {device}")]
    NoKernel {
        /// The op that was called.
        op: &'static str,
        /// The device of the destination.
        device: String,
    },
    /// The device cannot be opened or used.
    #[error("device `{device}`: {reason}")]
    Device {
        /// The device as the user named it.
        device: String,
        /// Why not.
        reason: String,
    },
    /// The device has too little memory left.
    #[error(
        "device `{device}` is out of memory: {wanted} bytes wanted, {free} of {total} free, {held} held by this run ({cause})"
    )]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        wanted: usize,
        /// Bytes that it has left.
        free: usize,
        /// Bytes that it has.
        total: usize,
        /// Bytes that this program holds.
        held: usize,
        /// What the driver says.
        cause: String,
    },
    /// A library of CUDA is not there, or not usable.
    #[error("cannot use {library}: {reason}")]
    CudaLibrary {
        /// What it is: the driver, NVRTC or cuBLASLt.
        library: &'static str,
        /// What was looked for, where, and what was found.
        reason: String,
        /// How to get it.
        hint: &'static str,
    },
    /// The driver is older than what this program needs of it.
    #[error("the NVIDIA driver supports CUDA {found}, expected {expected} or newer")]
    DriverTooOld {
        /// The newest CUDA version that the driver supports.
        found: String,
        /// The oldest that is enough.
        expected: String,
    },
    /// NVRTC refuses a kernel file.
    #[error("cannot compile `{file}` for {arch}: {log}")]
    Compile {
        /// The kernel file.
        file: String,
        /// The architecture, `sm_90`.
        arch: String,
        /// What NVRTC says, with file and line.
        log: String,
    },
    /// A shared library that cannot be used.
    #[error("cannot use `{path}` as llama.cpp's library: {reason}")]
    Library {
        /// The file as the user named it.
        path: String,
        /// Why not.
        reason: String,
    },
    /// A value that cannot be stored or computed with.
    #[error("{op}: row {row}, column {col} is `{value}`, expected a finite number")]
    NotFinite {
        /// The op that was called.
        op: &'static str,
        /// Row of the first such element.
        row: usize,
        /// Column of the first such element.
        col: usize,
        /// The element.
        value: f32,
    },
    /// A rank that a matrix of this size cannot have.
    #[error("{op}: rank {rank} is outside of 1..={limit}")]
    RankOutOfRange {
        /// The op that was called.
        op: &'static str,
        /// The rank asked for.
        rank: usize,
        /// The smaller side of the matrix.
        limit: usize,
    },
    /// An iteration did not reach its tolerance.
    #[error("{op} does not converge")]
    NoConvergence {
        /// The op that was called.
        op: &'static str,
    },
    /// A packed weight does not fit its description.
    #[error(transparent)]
    Format(#[from] qpeft_formats::Error),
}

impl Error {
    /// What the user can do about it, if there is something.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Device { .. } | Error::NoKernel { .. } => Some("run with `--device cpu`".to_owned()),
            Error::OutOfMemory { .. } => {
                Some("stop what else uses the device, or run with `--device cpu`".to_owned())
            }
            Error::CudaLibrary { hint, .. } => Some(format!("{hint}, or run with `--device cpu`")),
            Error::DriverTooOld { .. } => {
                Some("install a newer NVIDIA driver, or run with `--device cpu`".to_owned())
            }
            Error::Compile { .. } => {
                Some("the newest NVRTC knows every GPU: `pip install --upgrade nvidia-cuda-nvrtc`".to_owned())
            }
            Error::Library { .. } => {
                Some("give the path of llama.cpp's `libggml-base.so` (ggml 0.25.3 or newer)".to_owned())
            }
            Error::Format(e) => e.hint(),
            Error::ShapeMismatch { .. }
            | Error::IndexOutOfRange { .. }
            | Error::NotFinite { .. }
            | Error::RankOutOfRange { .. }
            | Error::NoConvergence { .. } => None,
        }
    }
}

/// Refuses operands whose sizes differ: `check(op, "rows of y", expected, found)?`.
pub(crate) fn check(op: &'static str, what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(Error::ShapeMismatch { op, what, expected, found }) }
}
