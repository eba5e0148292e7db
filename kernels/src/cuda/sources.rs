//! Every kernel file of this crate, so that one test compiles them all for every architecture.

use super::compile::Source;

/// The kernel files; an op that has one lists it here.
pub static SOURCES: &[&Source] = &[];
