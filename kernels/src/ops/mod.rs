//! The ops: one name each, forward and backward, naive and fast CPU, CUDA next to it.
//!
//! Letters used in every op: T tokens of the batch (all sequences end to end), C channels, V vocabulary,
//! H query heads, G key/value heads, D head dimension, N output features, K input features, R rank.
//! Argument order: destination, saved for backward, inputs, sizes. Gradients are `d` + name.
//!
//! The law of accumulation: gradients of parameters are added to (`+=`), gradients of activations are
//! overwritten (`=`), except where an op says `Accumulates`.

pub mod adamw;
pub mod attention;
pub mod convert;
pub mod cross_entropy;
pub mod dequantize;
pub mod dropout;
pub mod embedding;
pub mod fold;
mod gated;
pub mod gather;
pub mod geglu;
pub mod global_norm;
pub mod low_rank;
pub mod merge;
pub mod packing_loss;
pub mod quant_linear;
pub mod quantize;
pub mod rms_norm;
pub mod rope;
pub mod row_norm;
pub mod row_scale;
pub mod swiglu;
