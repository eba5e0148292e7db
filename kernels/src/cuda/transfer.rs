//! Copies between the device and pinned host memory beside the computation: a second stream, ordered by events.

use std::sync::Arc;

use cudarc::driver::{CudaStream, result, sys};

use super::{Buffer, Cuda};
use crate::error::Result;

/// A point in the work of one of the two streams, to wait for in the other.
#[derive(Debug)]
struct Mark(sys::CUevent);

// SAFETY: an event may be recorded and waited for from any thread.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: created by `Lane::mark`, owned; the driver keeps what is still waited for.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

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
        let mark =
            || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map(Mark).map_err(refuse);
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
        // SAFETY: events and streams are alive; both ranges belong to buffers that the caller keeps, and pinned
        // memory has the same address on the device.
        unsafe {
            result::event::record(self.computed.0, self.cuda.stream())
                .and_then(|()| wait(copies, self.computed.0))
                .and_then(|()| result::memcpy_dtod_async(to, from, bytes, copies))
                .and_then(|()| result::event::record(self.copied[slot].0, copies))
        }
        .map_err(|e| self.cuda.error("copying beside the computation", e))
    }

    /// What is enqueued from now on waits for the last copy of this slot.
    ///
    /// # Errors
    /// The device refuses.
    pub fn wait_for(&self, slot: usize) -> Result<()> {
        self.cuda.bind()?;
        // SAFETY: the event and the stream are alive; an event that was never recorded counts as reached.
        unsafe { wait(self.cuda.stream(), self.copied[slot].0) }
            .map_err(|e| self.cuda.error("waiting for a copy", e))
    }
}

/// # Safety
/// Stream and event are alive.
unsafe fn wait(stream: sys::CUstream, event: sys::CUevent) -> Result<(), result::DriverError> {
    // SAFETY: the caller's.
    unsafe { result::stream::wait_event(stream, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
}
