//! Train parameter-efficient adapters directly on quantized language models.
#![forbid(unsafe_code)]

pub mod model;
pub mod train;
