//! Train parameter-efficient adapters directly on quantized language models.
#![forbid(unsafe_code)]

pub mod cli;
pub mod train;
