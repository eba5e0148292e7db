//! Passes that come back: the second time their products are tuned, from the third time on they are replayed from a
//! recording with one call, because a small model's step is bound by the host otherwise.

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

/// How far a pass has come.
#[derive(Debug)]
enum Stage {
    /// It ran once: kernels are compiled and scratch has its size.
    Ran,
    /// Its products use their fastest algorithms.
    Tuned,
    /// It is replayed.
    Recorded(Graph),
}

/// The passes that were run before.
#[derive(Debug, Default)]
pub struct Replays {
    passes: HashMap<Key, Stage>,
}

impl Replays {
    /// Runs a pass. `records`: whether it may be recorded: it does the same every time.
    ///
    /// # Errors
    /// `enqueue` fails, or the device refuses.
    pub fn run(
        &mut self,
        cuda: &Arc<Cuda>,
        key: Key,
        records: bool,
        enqueue: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match self.passes.get_mut(&key) {
            None => {
                enqueue()?;
                if self.passes.len() >= KEPT {
                    self.passes.clear();
                }
                let key = Key { scratch: cuda.scratch_moves(), ..key };
                self.passes.insert(key, Stage::Ran);
            }
            Some(stage @ Stage::Ran) => {
                cuda.tuning(enqueue)?;
                *stage = Stage::Tuned;
            }
            Some(Stage::Tuned) if !records => enqueue()?,
            Some(stage @ Stage::Tuned) => {
                let mut graph = Graph::record(cuda, enqueue)?;
                graph.launch()?;
                *stage = Stage::Recorded(graph);
            }
            Some(Stage::Recorded(graph)) => graph.launch()?,
        }
        Ok(())
    }
}
