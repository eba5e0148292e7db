//! CUDA graphs: a step recorded once and replayed with one call, so that small models are not bound by launches.

use std::sync::Arc;

use cudarc::driver::{result, sys};

use super::Cuda;
use crate::error::Result;

/// Everything that was enqueued while recording.
#[derive(Debug)]
pub struct Graph {
    cuda: Arc<Cuda>,
    exec: sys::CUgraphExec,
}

// SAFETY: a graph handle may be used from any thread, one at a time; `&mut` access guards launching.
unsafe impl Send for Graph {}
// SAFETY: as above; nothing is done with a shared reference.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle is owned; an error on a lost device says nothing new.
        let _ = unsafe { result::graph::exec_destroy(self.exec) };
    }
}

impl Graph {
    /// Records what `enqueue` enqueues instead of running it. Scratch must have its size already, and nothing in
    /// it may read from the device.
    ///
    /// # Errors
    /// `enqueue` fails, or does what cannot be recorded.
    pub fn record<E: From<crate::Error>>(
        cuda: &Arc<Cuda>,
        enqueue: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        cuda.bind()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not recording: recording is ended below before anything returns.
        unsafe { result::stream::begin_capture(cuda.stream(), mode) }
            .map_err(|e| cuda.error("recording a graph", e))?;
        let enqueued = enqueue();
        // SAFETY: the recording was begun above.
        let graph = unsafe { result::stream::end_capture(cuda.stream()) };
        enqueued?;
        let graph = graph.map_err(|e| cuda.error("recording a graph", e))?;
        // SAFETY: the graph is whole; the instance does not need it any more.
        let exec = unsafe {
            let exec = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            exec
        }
        .map_err(|e| cuda.error("building a graph", e))?;
        Ok(Graph { cuda: Arc::clone(cuda), exec })
    }

    /// Enqueues everything again, on the same addresses.
    ///
    /// # Errors
    /// The device refuses.
    pub fn launch(&mut self) -> Result<()> {
        self.cuda.bind()?;
        // SAFETY: the tensors that the graph writes to are kept by whoever keeps the graph.
        unsafe { result::graph::launch(self.exec, self.cuda.stream()) }
            .map_err(|e| self.cuda.error("replaying a graph", e))
    }
}
