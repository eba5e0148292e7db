//! Every kernel file of this crate, so that one test compiles them all for every architecture.

use super::compile::Source;
use crate::ops::low_rank;

/// The kernel files; an op that has one lists it here.
pub static SOURCES: &[&Source] = &[&low_rank::SOURCE];
