//! The training loop and its data.

pub mod data;
