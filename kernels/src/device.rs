//! Where tensors live and ops run: the CPU, or one CUDA device found at run time.
//!
//! `cudarc` loads the driver when it is first asked, so this file compiles and runs on a machine
//! that has none. A CUDA device can be opened, filled and read back here; the ops refuse it by name
//! ([`crate::Error::NoKernel`]) until their kernels exist.

use std::sync::Arc;

use crate::cuda::Cuda;
use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// A place where tensors live.
#[derive(Debug, Clone, Default)]
pub enum Device {
    /// The host: rayon threads, AVX2 or AVX-512 where the processor has them.
    #[default]
    Cpu,
    /// One CUDA device, with the stream on which all its work is enqueued.
    Cuda(Arc<Cuda>),
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
        Ok(Device::Cuda(Cuda::open(ordinal)?))
    }

    /// The type of activations here.
    pub const fn activation_dtype(&self) -> Dtype {
        match self {
            Device::Cpu => Dtype::F32,
            Device::Cuda(_) => Dtype::Bf16,
        }
    }

    /// The CUDA device, if it is one.
    pub const fn cuda(&self) -> Option<&Arc<Cuda>> {
        match self {
            Device::Cpu => None,
            Device::Cuda(cuda) => Some(cuda),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(cuda) => f.write_str(&cuda.name()),
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
        if let Err(e) = Device::open("cuda:0") {
            assert!(e.to_string().contains("cuda"), "{e}");
        }
    }
}
