//! Tensors, packed base weights and the ops that train adapters on them.
//!
//! The only crate with `unsafe` (processor features, CUDA launches, a library that the user names); every block says why it is sound.
#![deny(clippy::undocumented_unsafe_blocks)]

pub mod cpu;
pub mod cuda;
pub mod device;
pub mod error;
pub mod ggml_library;
pub mod ids;
pub mod ops;
pub mod rng;
pub mod svd;
pub mod tensor;
#[cfg(test)]
pub(crate) mod testing;
pub mod weight;

pub use device::Device;
pub use error::{Error, Result};
pub use ids::{IdBuffer, Ids};
pub use tensor::{Dtype, Tensor, View, ViewMut};
pub use weight::BaseWeight;
