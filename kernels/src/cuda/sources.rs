//! Every kernel file of this crate, so that one test compiles them all for every architecture.

use super::compile::Source;
use super::gemm::tune;
use crate::ops::{
    adamw, attention, convert, cross_entropy, dequantize, dropout, fold, gather, global_norm, low_rank,
    merge, packing_loss, quantize, rms_norm, rope, row_norm, row_scale, swiglu,
};
use crate::svd;

/// The kernel files; an op that has one lists it here.
pub static SOURCES: &[&Source] = &[
    &adamw::SOURCE,
    &attention::cuda::D16.source,
    &attention::cuda::D32.source,
    &attention::cuda::D64.source,
    &attention::cuda::D80.source,
    &attention::cuda::D96.source,
    &attention::cuda::D128.source,
    &attention::cuda::D256.source,
    &attention::hopper::D64.source,
    &attention::hopper::D128.source,
    &convert::SOURCE,
    &cross_entropy::SOURCE,
    &dequantize::DENSE,
    &dequantize::BLOCKS,
    &dequantize::CODE_BOOKS,
    &dequantize::FOUR_BIT,
    &dropout::SOURCE,
    &fold::SOURCE,
    &gather::SOURCE,
    &global_norm::SOURCE,
    &low_rank::SOURCE,
    &merge::SOURCE,
    &packing_loss::SOURCE,
    &quantize::BLOCKS,
    &quantize::K,
    &rms_norm::SOURCE,
    &rope::SOURCE,
    &row_norm::SOURCE,
    &row_scale::SOURCE,
    &svd::SOURCE,
    &swiglu::SOURCE,
    &swiglu::low_rank::SOURCE,
    &tune::SOURCE,
];
