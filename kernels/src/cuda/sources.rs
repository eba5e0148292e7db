//! Every kernel file of this crate, so that one test compiles them all for every architecture.

use super::compile::Source;
use crate::ops::{dequantize, low_rank};

/// The kernel files; an op that has one lists it here.
pub static SOURCES: &[&Source] = &[
    &dequantize::DENSE,
    &dequantize::BLOCKS,
    &dequantize::CODE_BOOKS,
    &dequantize::FOUR_BIT,
    &low_rank::SOURCE,
];
