//! Passes that were recorded once and are replayed with one call: a small model's step is bound by the host
//! otherwise.

use std::collections::HashMap;
use std::sync::Arc;

use qpeft_kernels::cuda::Cuda;
use qpeft_kernels::cuda::graph::Graph;

use crate::error::Result;

/// Everything that the launches of a pass depend on beside the contents of the buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Tokens, sequences, supervised rows.
    pub sizes: [usize; 3],
    /// Where the parameters and their gradients are.
    pub places: [u64; 2],
    /// Which buffer of losses is written to.
    pub slot: usize,
    /// Bits of the factor of the gradients.
    pub scale: u32,
    /// Whether the bf16 copies of the weights are up to date.
    pub fresh: bool,
    /// Changes when scratch moves.
    pub scratch: usize,
}

/// Recordings kept at once: data of ever new lengths would fill memory with passes that never come back.
const KEPT: usize = 32;

/// What was run before, and the recordings of what came back.
#[derive(Debug, Default)]
pub struct Replays {
    recorded: HashMap<Key, Option<Graph>>,
}

impl Replays {
    /// Runs a pass: as it is the first time, recorded the second time, replayed from then on.
    ///
    /// # Errors
    /// `enqueue` fails, or the device refuses.
    pub fn run(&mut self, cuda: &Arc<Cuda>, key: Key, enqueue: impl FnOnce() -> Result<()>) -> Result<()> {
        match self.recorded.get_mut(&key) {
            // The first run also compiles kernels and sizes scratch, neither of which can be recorded.
            None => {
                enqueue()?;
                if self.recorded.len() >= KEPT {
                    self.recorded.clear();
                }
                let key = Key { scratch: cuda.scratch_moves(), ..key };
                self.recorded.insert(key, None);
            }
            Some(slot @ None) => {
                let graph = slot.insert(Graph::record(cuda, enqueue)?);
                graph.launch()?;
            }
            Some(Some(graph)) => graph.launch()?,
        }
        Ok(())
    }
}
