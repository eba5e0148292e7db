//! Where tensors live and ops run: the CPU, or one CUDA device found at run time.
//!
//! `cudarc` loads the driver when it is first asked, so this file compiles and runs on a machine
//! that has none. A CUDA device can be opened, filled and read back here; the ops refuse it by name
//! ([`crate::Error::NoKernel`]) until their kernels exist.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaStream};

use crate::error::{Error, Result};

/// A place where tensors live.
#[derive(Debug, Clone, Default)]
pub enum Device {
    /// The host: rayon threads, AVX2 or AVX-512 where the processor has them.
    #[default]
    Cpu,
    /// One CUDA device and the stream on which all its work is enqueued.
    Cuda(Arc<CudaStream>),
}

impl Device {
    /// Opens what `--device` names: `auto`, `cpu`, `cuda` or `cuda:N`.
    ///
    /// `auto` is the CPU as long as no op has a CUDA kernel.
    ///
    /// # Errors
    /// The name is none of these, or no such CUDA device can be opened; the error says which part is missing.
    pub fn open(name: &str) -> Result<Device> {
        let refuse = |reason: String| Error::Device { device: name.to_owned(), reason };
        match name {
            "auto" | "cpu" => return Ok(Device::Cpu),
            _ => {}
        }
        let ordinal = match name.strip_prefix("cuda") {
            Some("") => 0,
            Some(rest) => rest
                .strip_prefix(':')
                .and_then(|n| n.parse::<usize>().ok())
                .ok_or_else(|| refuse("expected `cuda` or `cuda:N` with a device number N".to_owned()))?,
            None => return Err(refuse("expected `auto`, `cpu`, `cuda` or `cuda:N`".to_owned())),
        };
        // cudarc panics on a missing library when it is used, so ask first.
        // SAFETY: only looks for the driver library by name and loads it; nothing is called in it.
        if !unsafe { cudarc::driver::sys::is_culib_present() } {
            return Err(refuse(
                "the NVIDIA driver library (libcuda.so.1) is not installed on this machine".to_owned(),
            ));
        }
        let count =
            CudaContext::device_count().map_err(|e| refuse(format!("the driver does not start: {e}")))?;
        if ordinal >= usize::try_from(count).unwrap_or(0) {
            return Err(refuse(format!("the driver reports {count} CUDA device(s)")));
        }
        let context =
            CudaContext::new(ordinal).map_err(|e| refuse(format!("cannot create a context: {e}")))?;
        Ok(Device::Cuda(context.default_stream()))
    }

    /// Whether the ops of this version run here.
    pub fn has_ops(&self) -> bool {
        matches!(self, Device::Cpu)
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(stream) => write!(f, "cuda:{}", stream.context().ordinal()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_names_are_refused_with_the_known_ones() {
        for name in ["gpu", "cuda:", "cuda:x", "cuda1", ""] {
            let error = Device::open(name).unwrap_err().to_string();
            assert!(error.contains("expected"), "{name}: {error}");
        }
    }

    #[test]
    fn cuda_without_a_driver_says_what_is_missing() {
        match Device::open("cuda:0") {
            Ok(device) => assert!(!device.has_ops()),
            Err(e) => assert!(e.to_string().starts_with("device `cuda:0`: "), "{e}"),
        }
    }
}
