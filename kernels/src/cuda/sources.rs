//! Every kernel file of this crate, so that one test compiles them all for every architecture.

use super::compile::Source;
use crate::ops::{attention, dequantize, low_rank};

/// The kernel files; an op that has one lists it here.
pub static SOURCES: &[&Source] = &[
    &attention::cuda::D64.source,
    &attention::cuda::D80.source,
    &attention::cuda::D96.source,
    &attention::cuda::D128.source,
    &attention::cuda::D256.source,
    &dequantize::DENSE,
    &dequantize::BLOCKS,
    &dequantize::CODE_BOOKS,
    &dequantize::FOUR_BIT,
    &low_rank::SOURCE,
];
