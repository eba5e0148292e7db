//! The decoder: a list of ops forward and the mirrored list backward over a frozen, packed base.
//!
//! This floor owns the seam [`linear::Adapter`] and names no adapter method.

pub mod base;
pub mod batch;
pub mod buffers;
pub mod chat;
pub mod config;
pub mod decoder;
pub mod layer;
pub mod linear;
pub mod load;
pub mod memory;
pub mod replay;
pub mod residual;
pub mod sample;
pub mod save;
pub mod save_folder;
pub mod streams;
pub mod synthetic;
pub mod tokenizer;
pub mod weight_name;

pub use base::Base;
pub use batch::Batch;
pub use buffers::{Buffers, Keep};
pub use config::Config;
pub use decoder::{Cache, Decoder, Loss};
pub use linear::{Adapter, BaseWeight, Entry, Linear, Parameters, Pass};
