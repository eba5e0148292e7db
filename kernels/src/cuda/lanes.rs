//! Work side by side: launches that do not depend on each other, spread over a few streams, so that a small kernel does
//! not wait for the end of another one.

use std::cell::Cell;
use std::sync::Arc;

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, CudaStream, sys};

use super::Cuda;
use crate::error::Error;

/// Streams beside the main one. More bring nothing: what is enqueued once a step is bound by memory by then.
const BESIDE: usize = 3;

/// A point in the work of a stream, to wait for in another.
#[derive(Debug)]
pub(super) struct Mark(sys::CUevent);

// SAFETY: an event may be recorded and waited for from any thread.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: created by `new`, owned; the driver keeps what is still waited for.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Mark {
    pub(super) fn new() -> Result<Mark, DriverError> {
        result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).map(Mark)
    }

    /// What is enqueued on `stream` from now on waits for what is on `of` now.
    pub(super) fn order(&self, of: sys::CUstream, stream: sys::CUstream) -> Result<(), DriverError> {
        self.record(of)?;
        self.wait(stream)
    }

    /// Marks what is on `stream` now.
    pub(super) fn record(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the event is alive, and so are streams of an open device.
        unsafe { result::event::record(self.0, stream) }
    }

    /// What is enqueued on `stream` from now on waits for what was marked last, if anything was.
    pub(super) fn wait(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: as above.
        unsafe { result::stream::wait_event(stream, self.0, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
    }
}

/// The streams beside the main one, and where each of them begins and ends.
#[derive(Debug)]
pub(super) struct Lanes {
    streams: Vec<(Arc<CudaStream>, Mark)>,
    begun: Mark,
}

impl Lanes {
    pub(super) fn new(context: &Arc<CudaContext>) -> Result<Lanes, DriverError> {
        let lane = |_| Ok((context.new_stream()?, Mark::new()?));
        Ok(Lanes { streams: (0..BESIDE).map(lane).collect::<Result<_, _>>()?, begun: Mark::new()? })
    }

    fn fork(&self, main: sys::CUstream) -> Result<(), DriverError> {
        self.begun.record(main)?;
        self.streams.iter().try_for_each(|(stream, _)| self.begun.wait(stream.cu_stream()))
    }

    fn join(&self, main: sys::CUstream) -> Result<(), DriverError> {
        self.streams.iter().try_for_each(|(stream, done)| done.order(stream.cu_stream(), main))
    }
}

thread_local! {
    /// What this thread enqueues on, if not the main stream as all do.
    static LANE: Cell<Option<sys::CUstream>> = const { Cell::new(None) };
}

/// Ends the work on a lane, also where it panics; has what the thread enqueued on before.
pub(super) struct OnLane(Option<sys::CUstream>);

impl OnLane {
    pub(super) fn begin(stream: Option<sys::CUstream>) -> OnLane {
        OnLane(LANE.replace(stream))
    }
}

impl Drop for OnLane {
    fn drop(&mut self) {
        LANE.set(self.0);
    }
}

impl Cuda {
    /// Calls `enqueue` for each item; what it enqueues for one does not wait for what it enqueues for another, but that
    /// items of which `uses_scratch` says yes, for scratch there is one, are done one after another. What was enqueued
    /// before is done first, and what comes after waits for all of it.
    ///
    /// While launches are timed, one after another.
    ///
    /// # Errors
    /// `enqueue` fails, or the device refuses.
    ///
    /// # Panics
    /// `enqueue` asks for scratch for another item.
    pub fn side_by_side<T, E: From<Error>>(
        &self,
        items: impl IntoIterator<Item = T>,
        uses_scratch: impl Fn(&T) -> bool,
        mut enqueue: impl FnMut(T) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.is_profiling() {
            return items.into_iter().try_for_each(enqueue);
        }
        let refuse = |e: DriverError| self.error("working side by side", e);
        self.bind()?;
        self.lanes.fork(self.stream()).map_err(refuse)?;
        let mut lanes = (0..=BESIDE).cycle();
        let done = items.into_iter().try_for_each(|item| {
            // The main stream is outside of all lanes, where scratch may be used.
            let lane = if uses_scratch(&item) { None } else { lanes.next() };
            let _lane = OnLane::begin(lane.map(|lane| match lane {
                0 => self.stream.cu_stream(),
                lane => self.lanes.streams[lane - 1].0.cu_stream(),
            }));
            enqueue(item)
        });
        self.lanes.join(self.stream()).map_err(refuse)?;
        done
    }

    /// The stream to enqueue on: the main one, but for work side by side and errands.
    pub(super) fn stream(&self) -> sys::CUstream {
        LANE.get().unwrap_or_else(|| self.stream.cu_stream())
    }

    /// Whether this thread enqueues work side by side, or an errand.
    pub(super) fn is_side_by_side() -> bool {
        LANE.get().is_some()
    }
}

#[cfg(test)]
mod tests {
    use crate::cuda::Scratch;
    use crate::cuda::gemm::Matrix;
    use crate::ops::convert::{convert, fill};
    use crate::testing::cuda::device;
    use crate::{Dtype, Tensor, ViewMut};

    /// Chains of launches on every lane, between launches that they depend on and that depend on them.
    #[test]
    fn cuda_work_side_by_side_comes_after_what_was_before_and_before_what_comes_after() {
        let Some(device) = device() else { return };
        let cuda = device.cuda().unwrap();
        let zeros = |_| Tensor::zeros(&device, 1000, 1024).unwrap();
        let (mut from, mut to): (Vec<_>, Vec<_>) =
            ((0..10).map(zeros).collect(), (0..10).map(zeros).collect());
        let (mut middle, mut last): (Vec<_>, Vec<_>) =
            ((0..10).map(zeros).collect(), (0..10).map(zeros).collect());
        for round in 1..20 {
            for (i, from) in from.iter_mut().enumerate() {
                fill(from.view_mut(), (100 * round + i) as f32).unwrap();
            }
            let chains = from.iter().zip(&mut middle).zip(&mut to);
            // Some of them by scratch.
            let uses_scratch = |(i, _): &(usize, _)| i % 3 == 1;
            cuda.side_by_side(chains.enumerate(), uses_scratch, |(i, ((from, middle), to))| {
                if i % 3 != 1 {
                    convert(middle.view_mut(), from.view())?;
                    return convert(to.view_mut(), middle.view());
                }
                let ptr = cuda.scratch(Scratch::Partials, 4_096_000)?;
                let matrix = Matrix { ptr, rows: 1000, cols: 1024, stride: 1024, dtype: Dtype::F32 };
                convert(ViewMut::on_cuda(cuda, matrix), from.view())?;
                convert(to.view_mut(), ViewMut::on_cuda(cuda, matrix).as_view())
            })
            .unwrap();
            for (to, last) in to.iter().zip(&mut last) {
                convert(last.view_mut(), to.view()).unwrap();
            }
            for (i, last) in last.iter().enumerate() {
                let wrong = last.read().unwrap().iter().filter(|&&x| x != (100 * round + i) as f32).count();
                assert_eq!(wrong, 0, "round {round}, chain {i}");
            }
        }
    }
}
