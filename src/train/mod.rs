//! Training: time, data order, learning rates and the files of a run live here.

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod error;
pub mod fit;
pub mod log;
pub mod optimizer;
pub mod run_files;
pub mod schedule;
mod start;
pub mod trainer;

pub use config::TrainConfig;
pub use error::{Error, Result};
