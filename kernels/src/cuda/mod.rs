//! The CUDA side in one page: an open device, its stream, its compiled kernels, its memory.
//!
//! Libraries are found at run time ([`library`]), kernels are compiled by NVRTC for the device at hand and kept
//! on disk ([`compile`]), started by one function ([`launch`]), matrix products go to cuBLASLt ([`gemm`]).
//! Everything is enqueued on one stream, but for work that is said to be [side by side](Cuda::side_by_side); nothing here
//! waits for the device unless it says so.

pub mod compile;
mod errand;
pub mod gemm;
pub mod graph;
mod lanes;
pub mod launch;
pub mod library;
pub mod memory;
mod profile;
pub mod sources;
pub mod spans;
pub mod tensor_map;
pub mod transfer;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use cudarc::driver::result::DriverError;
use cudarc::driver::{CudaContext, CudaStream, sys};

pub use compile::{Arch, Source};
pub(crate) use errand::Errand;
pub use launch::{Arg, Grid, WORDS};
pub use memory::{Buffer, Loan, Scratch};
pub use tensor_map::TensorMap;

use crate::error::{Error, Result};

/// An open CUDA device.
#[derive(Debug)]
pub struct Cuda {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    lanes: lanes::Lanes,
    arch: Arch,
    sms: usize,
    modules: Mutex<Modules>,
    memory: memory::Memory,
    gemm: Mutex<gemm::Plans>,
    profile: Mutex<Option<Vec<profile::Span>>>,
}

// SAFETY: contexts, streams, modules and functions may be used from any thread; tables are behind mutexes.
unsafe impl Send for Cuda {}
// SAFETY: as above.
unsafe impl Sync for Cuda {}

/// Compiled kernel files and the kernels in them.
#[derive(Debug, Default)]
struct Modules {
    loaded: HashMap<&'static str, sys::CUmodule>,
    functions: HashMap<(&'static str, &'static str), Function>,
}

/// A kernel, and the dynamic shared memory that it is allowed.
#[derive(Debug)]
struct Function {
    handle: sys::CUfunction,
    shared: usize,
}

impl Cuda {
    /// Opens device number `ordinal`: libraries, context, stream.
    ///
    /// # Errors
    /// A library is missing, there is no such device, or it is too old.
    pub fn open(ordinal: usize) -> Result<Arc<Cuda>> {
        let refuse = |reason: String| Error::Device { device: format!("cuda:{ordinal}"), reason };
        library::driver()?;
        library::nvrtc()?;
        library::cublaslt()?;
        let count = Cuda::count()?;
        if ordinal >= count {
            return Err(refuse(format!("there is no such device: the driver shows {count}")));
        }
        let context =
            CudaContext::new(ordinal).map_err(|e| refuse(format!("cannot create a context: {e}")))?;
        let ask = |e: DriverError| refuse(format!("the device does not answer: {e}"));
        let (major, minor) = context.compute_capability().map_err(ask)?;
        let arch = Arch { major: major as u32, minor: minor as u32 };
        if arch < Arch::OLDEST {
            let model = context.name().map_err(ask)?;
            return Err(refuse(format!(
                "the {model} has compute capability {major}.{minor}, expected 8.0 or newer (Ampere): the kernels \
                 use bf16 tensor cores"
            )));
        }
        let attribute = sys::CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let sms = context.attribute(attribute).map_err(ask)? as usize;
        let stream = context.new_stream().map_err(ask)?;
        let lanes = lanes::Lanes::new(&context).map_err(ask)?;
        let gemm = Mutex::new(gemm::Plans::new().map_err(|e| refuse(e.to_string()))?);
        Ok(Arc::new(Cuda {
            context,
            stream,
            lanes,
            arch,
            sms,
            modules: Mutex::default(),
            memory: memory::Memory::default(),
            gemm,
            profile: Mutex::new(None),
        }))
    }

    /// How many devices the driver shows; `CUDA_VISIBLE_DEVICES` hides some.
    ///
    /// # Errors
    /// There is no driver, or it does not start.
    pub fn count() -> Result<usize> {
        library::driver()?;
        match CudaContext::device_count() {
            Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => Ok(0),
            Err(e) => Err(Error::Device {
                device: "cuda".to_owned(),
                reason: format!("the driver does not start: {e}"),
            }),
        }
    }

    /// The number of the device.
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// `cuda:0`.
    pub fn name(&self) -> String {
        format!("cuda:{}", self.ordinal())
    }

    /// What the vendor calls it: `NVIDIA H200`.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn model(&self) -> Result<String> {
        self.context.name().map_err(|e| self.error("asking for the name", e))
    }

    /// What its kernels are compiled for.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// Multiprocessors.
    pub fn sms(&self) -> usize {
        self.sms
    }

    /// Waits until everything enqueued is done.
    ///
    /// # Errors
    /// Something enqueued failed, or the device is gone.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|e| self.error("waiting for the device", e))
    }

    /// Makes the context that of this thread.
    fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(|e| self.error("binding the context", e))
    }

    fn error(&self, what: &str, e: impl std::fmt::Display) -> Error {
        Error::Device { device: self.name(), reason: format!("{what}: {e}") }
    }
}
