//! Errands: what one thread has a device do beside everything else, and waits for.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::Cuda;
use super::lanes::OnLane;
use crate::error::Error;

/// A stream for the work of one thread, which does not wait for what others enqueue, nor they for it.
#[derive(Debug)]
pub(crate) struct Errand {
    cuda: Arc<Cuda>,
    stream: Arc<CudaStream>,
}

impl Errand {
    /// A new stream.
    ///
    /// # Errors
    /// The device refuses.
    pub(crate) fn new(cuda: &Arc<Cuda>) -> Result<Errand, Error> {
        cuda.bind()?;
        let stream = cuda.context.new_stream().map_err(|e| cuda.error("opening a stream", e))?;
        Ok(Errand { cuda: Arc::clone(cuda), stream })
    }

    /// The device.
    pub(crate) fn cuda(&self) -> &Arc<Cuda> {
        &self.cuda
    }

    /// Calls `enqueue`, and waits until what it enqueued is done.
    ///
    /// # Errors
    /// `enqueue` fails, or what it enqueued.
    pub(crate) fn run(&self, enqueue: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let enqueued = {
            let _lane = OnLane::begin(Some(self.stream.cu_stream()));
            enqueue()
        };
        // Also after an error: what was enqueued before it may still be at work.
        let done = self.stream.synchronize().map_err(|e| self.cuda.error("waiting for the device", e));
        enqueued.and(done)
    }
}
