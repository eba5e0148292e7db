//! Where tensors live and ops run: the CPU, or one CUDA device found at run time.
//!
//! The libraries of CUDA are looked for when a device is first asked for, so the same program runs on a machine that has none
//! ([`crate::cuda::library`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cuda::{Cuda, library};
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
    /// No device: what is allocated there is only counted, as a CUDA device would allocate it. What a run will
    /// take is found by building it here.
    Meta(Arc<Meter>),
}

/// Counts what would be allocated.
#[derive(Debug, Default)]
pub struct Meter {
    bytes: AtomicUsize,
}

impl Meter {
    /// Counts one allocation.
    pub fn add(&self, bytes: usize) {
        self.bytes.fetch_add(crate::cuda::memory::rounded(bytes), Ordering::Relaxed);
    }

    /// Everything so far.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }
}

impl Device {
    /// Opens what `--device` names: `auto`, `cpu`, `cuda` (the first device) or `cuda:N`.
    ///
    /// # Errors
    /// The name is none of these, or no such CUDA device can be opened; the error says which part is missing.
    pub fn open(name: &str) -> Result<Device> {
        match Device::ordinal(name)? {
            Some(ordinal) => Ok(Device::Cuda(Cuda::open(ordinal)?)),
            None if name == "auto" => Ok(Device::auto().0),
            None => Ok(Device::Cpu),
        }
    }

    /// The number of the CUDA device that a name of [`Device::open`] means; `None` for `auto` and `cpu`. Opens nothing.
    ///
    /// # Errors
    /// The name is none of those.
    pub fn ordinal(name: &str) -> Result<Option<usize>> {
        let refuse = |reason: &str| Error::Device { device: name.to_owned(), reason: reason.to_owned() };
        match name.strip_prefix("cuda") {
            Some("") => Ok(Some(0)),
            Some(rest) => rest
                .strip_prefix(':')
                .and_then(|n| n.parse::<usize>().ok())
                .map(Some)
                .ok_or_else(|| refuse("expected `cuda` or `cuda:N` with a device number N")),
            None if matches!(name, "auto" | "cpu") => Ok(None),
            None => Err(refuse("expected `auto`, `cpu`, `cuda` or `cuda:N`")),
        }
    }

    /// The first CUDA device that the kernels run on, else the CPU; and, if a GPU is there that cannot be used, what stands in the way.
    pub fn auto() -> (Device, Option<Error>) {
        let count = match Cuda::count() {
            Ok(count) => count,
            // A machine without a driver is no machine with a GPU.
            Err(Error::CudaLibrary { .. }) => return (Device::Cpu, None),
            Err(e) => return (Device::Cpu, Some(e)),
        };
        let mut obstacle = None;
        for ordinal in 0..count {
            match Cuda::open(ordinal) {
                Ok(cuda) => return (Device::Cuda(cuda), None),
                Err(e) => obstacle = obstacle.or(Some(e)),
            }
        }
        (Device::Cpu, obstacle)
    }

    /// The device and what it works with: `cuda:0 (NVIDIA H200, sm_90, driver for CUDA 13.0, NVRTC 13.2, cuBLASLt 13.1)`.
    pub fn describe(&self) -> String {
        match self {
            Device::Cpu | Device::Meta(_) => self.to_string(),
            Device::Cuda(cuda) => {
                let model = cuda.model().unwrap_or_else(|_| "unnamed".to_owned());
                format!("{} ({model}, {}, {})", cuda.name(), cuda.arch(), library::describe())
            }
        }
    }

    /// The type of activations here.
    pub const fn activation_dtype(&self) -> Dtype {
        match self {
            Device::Cpu => Dtype::F32,
            Device::Cuda(_) | Device::Meta(_) => Dtype::Bf16,
        }
    }

    /// The CUDA device, if it is one.
    pub const fn cuda(&self) -> Option<&Arc<Cuda>> {
        match self {
            Device::Cpu | Device::Meta(_) => None,
            Device::Cuda(cuda) => Some(cuda),
        }
    }

    /// Whether activations have another type than parameters.
    pub const fn rounds(&self) -> bool {
        !matches!(self, Device::Cpu)
    }

    /// Whether nothing is stored here.
    pub const fn is_meta(&self) -> bool {
        matches!(self, Device::Meta(_))
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(cuda) => f.write_str(&cuda.name()),
            Device::Meta(_) => f.write_str("meta"),
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
    fn cuda_without_a_driver_says_what_is_missing_and_what_to_do() {
        if library::driver().is_ok() {
            println!("skipped: there is a driver");
            return;
        }
        for name in ["cuda", "cuda:0", "cuda:7"] {
            let error = Device::open(name).unwrap_err();
            assert!(error.to_string().contains("libcuda.so.1"), "{error}");
            assert!(error.hint().is_some_and(|hint| hint.contains("--device cpu")), "{error}");
        }
        let (device, obstacle) = Device::auto();
        assert!(matches!(device, Device::Cpu) && obstacle.is_none(), "{device} {obstacle:?}");
    }

    #[test]
    fn a_cuda_device_that_is_not_there_is_refused_with_their_number() {
        match Cuda::count() {
            Err(e) => println!("skipped: {e}"),
            Ok(count) => {
                // Before the device is looked for, every library must be there.
                let text = Device::open(&format!("cuda:{count}")).unwrap_err().to_string();
                let missing = library::nvrtc().and_then(|()| library::cublaslt()).is_err();
                assert!(missing || text.contains(&format!("the driver shows {count}")), "{text}");
            }
        }
    }

    #[test]
    fn auto_opens_cuda_where_it_can_and_otherwise_says_why_not() {
        match Device::auto() {
            (Device::Cuda(cuda), obstacle) => {
                assert!(
                    obstacle.is_none() && Device::Cuda(cuda.clone()).describe().starts_with(&cuda.name())
                );
            }
            (Device::Cpu | Device::Meta(_), obstacle) => {
                assert_eq!(obstacle.is_some(), Cuda::count().is_ok_and(|count| count > 0), "{obstacle:?}");
                assert_eq!(Device::Cpu.describe(), "cpu");
            }
        }
    }
}
