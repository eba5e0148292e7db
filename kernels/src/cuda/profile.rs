//! Where the time of a step goes: events around every launch, added up per kernel file.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use cudarc::driver::{result, sys};

use super::{Cuda, library};
use crate::error::Result;

/// One timed launch.
#[derive(Debug)]
pub(super) struct Span {
    what: &'static str,
    begin: sys::CUevent,
    end: sys::CUevent,
}

impl Cuda {
    /// From now on every launch is timed. Events cost a little time themselves.
    pub fn start_profile(&self) {
        *self.profile.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    /// Milliseconds per kernel file (`gemm` for matrix products, `gemm_low_rank` for narrow ones) since [`Cuda::start_profile`].
    ///
    /// # Errors
    /// The device refuses.
    pub fn stop_profile(&self) -> Result<BTreeMap<&'static str, f64>> {
        let spans = self.profile.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        self.synchronize()?;
        // The bindings are of CUDA 13 and ask for the function of that version.
        library::require_driver_function("cuEventElapsedTime_v2", (12, 8))?;
        let mut sums = BTreeMap::new();
        for span in spans {
            // SAFETY: both events were recorded on this device's stream, which is idle now.
            let elapsed = unsafe { result::event::elapsed(span.begin, span.end) };
            let elapsed = elapsed.map_err(|e| self.error("timing", e))?;
            *sums.entry(span.what).or_insert(0.0) += f64::from(elapsed);
            for event in [span.begin, span.end] {
                // SAFETY: created by `record` below, used nowhere else.
                unsafe { result::event::destroy(event) }.map_err(|e| self.error("timing", e))?;
            }
        }
        Ok(sums)
    }

    /// Whether launches are timed.
    pub fn is_profiling(&self) -> bool {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// An event before a launch, if launches are timed.
    pub(super) fn profile_begin(&self) -> Result<Option<sys::CUevent>> {
        if self.is_profiling() { self.record().map(Some) } else { Ok(None) }
    }

    /// The event after it.
    pub(super) fn profile_end(&self, what: &'static str, begin: Option<sys::CUevent>) -> Result<()> {
        let Some(begin) = begin else { return Ok(()) };
        let end = self.record()?;
        if let Some(spans) = &mut *self.profile.lock().unwrap_or_else(PoisonError::into_inner) {
            spans.push(Span { what, begin, end });
        }
        Ok(())
    }

    fn record(&self) -> Result<sys::CUevent> {
        self.bind()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT)
            .map_err(|e| self.error("timing", e))?;
        // SAFETY: the event is new and the stream is this device's.
        unsafe { result::event::record(event, self.stream()) }.map_err(|e| self.error("timing", e))?;
        Ok(event)
    }
}
