//! Train parameter-efficient adapters directly on quantized language models.
#![forbid(unsafe_code)]

pub mod adapters;
pub mod cli;
pub mod convert;
pub mod error;
pub mod model;
pub mod train;

pub use error::{Error, Result};
