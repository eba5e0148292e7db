//! Copies between the device and pinned host memory beside the computation: a second stream, ordered by events.

use std::sync::Arc;

use cudarc::driver::{CudaStream, result};

use super::lanes::Mark;
use super::{Buffer, Cuda};
use crate::error::Result;

/// A stream for copies, and what its slots wait for.
#[derive(Debug)]
pub struct Lane {
    cuda: Arc<Cuda>,
    stream: Arc<CudaStream>,
    /// Per slot: its last copy.
    copied: Vec<Mark>,
    /// Work enqueued so far, wherever it is recorded.
    computed: Mark,
}

impl Lane {
    /// A lane for copies from and to `slots` places on the device.
    ///
    /// # Errors
    /// The device refuses.
    pub fn new(cuda: &Arc<Cuda>, slots: usize) -> Result<Lane> {
        cuda.bind()?;
        let refuse = |e: result::DriverError| cuda.error("opening a stream for copies", e);
        let mark = || Mark::new().map_err(refuse);
        Ok(Lane {
            stream: cuda.context.new_stream().map_err(refuse)?,
            copied: (0..slots).map(|_| mark()).collect::<Result<_>>()?,
            computed: mark()?,
            cuda: Arc::clone(cuda),
        })
    }

    /// Copies `bytes` from the device to the host once everything enqueued so far is done.
    ///
    /// # Errors
    /// The device refuses.
    pub fn to_host(&self, slot: usize, host: &Buffer, from: u64, bytes: usize) -> Result<()> {
        self.copy(slot, host.ptr(), from, bytes)
    }

    /// Copies `bytes` from the host to the device once everything enqueued so far is done.
    ///
    /// # Errors
    /// The device refuses.
    pub fn to_device(&self, slot: usize, to: u64, host: &Buffer, bytes: usize) -> Result<()> {
        self.copy(slot, to, host.ptr(), bytes)
    }

    fn copy(&self, slot: usize, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.cuda.bind()?;
        let copies = self.stream.cu_stream();
        let copy = || {
            self.computed.order(self.cuda.stream(), copies)?;
            // SAFETY: the stream is alive; both ranges belong to buffers that the caller keeps, and pinned memory has
            // the same address on the device.
            unsafe { result::memcpy_dtod_async(to, from, bytes, copies) }?;
            self.copied[slot].record(copies)
        };
        copy().map_err(|e| self.cuda.error("copying beside the computation", e))
    }

    /// What is enqueued from now on waits for the last copy of this slot.
    ///
    /// # Errors
    /// The device refuses.
    pub fn wait_for(&self, slot: usize) -> Result<()> {
        self.cuda.bind()?;
        let waited = self.copied[slot].wait(self.cuda.stream());
        waited.map_err(|e| self.cuda.error("waiting for a copy", e))
    }
}
