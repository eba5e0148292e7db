//! Every kernel file of this crate, so that one test compiles them all for every architecture.

use super::compile::Source;
use crate::ops::{
    adamw, convert, cross_entropy, dropout, fold, gather, global_norm, residual, rms_norm, rope, row_norm,
    row_scale, swiglu,
};

/// The kernel files; an op that has one lists it here.
pub static SOURCES: &[&Source] = &[
    &adamw::SOURCE,
    &convert::SOURCE,
    &cross_entropy::SOURCE,
    &dropout::SOURCE,
    &fold::SOURCE,
    &gather::SOURCE,
    &global_norm::SOURCE,
    &residual::SOURCE,
    &rms_norm::SOURCE,
    &rope::SOURCE,
    &row_norm::SOURCE,
    &row_scale::SOURCE,
    &swiglu::SOURCE,
];
