//! Read, check and write quantized checkpoints: GGUF, safetensors, bitsandbytes, PEFT adapter folders;
//! importance matrices and the mixtures of types that a checkpoint is quantized to.
//!
//! The promise of this crate: no bytes make it panic, no count in a file is believed before it is
//! compared with the bytes that are left, and nothing is written that the reader would refuse.
#![deny(unsafe_code)]

pub mod bitsandbytes;
pub mod blocks;
mod bytes;
pub mod dtype;
pub mod error;
pub mod file;
pub mod gguf;
pub mod imatrix;
pub mod json;
pub mod limits;
pub mod mixture;
pub mod peft;
pub mod safetensors;

pub use dtype::GgmlType;
pub use error::{Error, Result};
