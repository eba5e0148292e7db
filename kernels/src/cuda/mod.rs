//! The CUDA engine: libraries found at run time, kernels compiled for the device that is there.

pub mod compile;
pub mod library;
pub mod sources;
