//! A weight's own bf16 copy on a device, for runs with memory to spare: no dequantization per product.
//!
//! The copy holds what products read: rows scaled, adapter columns in their padding, rows of the adapter's first factor
//! below. All change with every optimizer step, so the copy knows whether it is up to date.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::cuda::Buffer;
use crate::tensor::Dtype;

/// Where a low-rank branch lies in the padding of the rows beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// First column of the branch, counted from the end of the row.
    pub offset: usize,
    /// Columns of padding.
    pub padding: usize,
}

/// What a copy holds beside the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Contents {
    scaled: bool,
    place: Option<Place>,
}

/// What the caller has to write before it reads a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// It is up to date.
    Nothing,
    /// The branch has changed, the rows have not.
    Columns,
    /// All of it.
    Everything,
}

/// A copy with room for the rows of an adapter's first factor below those of the weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// Address of the weight's first row.
    pub(crate) ptr: u64,
    /// Elements between the starts of two rows.
    pub(crate) stride: usize,
    /// Whether the factor's rows of now are there; otherwise the caller writes them.
    pub(crate) is_filled: bool,
}

/// Room for rows of bf16 and what is in it.
#[derive(Debug)]
pub(super) struct Copy {
    buffer: Buffer,
    /// Whether it is for products with an adapter; products without one use scratch then.
    adapted: bool,
    contents: Mutex<Option<Contents>>,
    fresh: AtomicBool,
    /// The same of the rows below.
    filled: AtomicBool,
}

impl Copy {
    /// An empty copy in `buffer`.
    pub(super) fn new(buffer: Buffer, adapted: bool) -> Copy {
        Copy {
            buffer,
            adapted,
            contents: Mutex::new(None),
            fresh: AtomicBool::new(false),
            filled: AtomicBool::new(false),
        }
    }

    /// The address, and what the caller has to write there first. `None`: this use has no place here.
    pub(super) fn take(
        &self,
        rows: usize,
        cols: usize,
        scaled: bool,
        place: Option<Place>,
    ) -> Option<(u64, Missing)> {
        let wanted = Contents { scaled, place };
        let stride = cols + place.map_or(0, |place| place.padding);
        if self.adapted != (scaled || place.is_some())
            || rows * stride * Dtype::Bf16.size() > self.buffer.bytes()
        {
            return None;
        }
        let mut contents = self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = match (*contents == Some(wanted), self.fresh.swap(true, Ordering::Relaxed)) {
            (false, _) => Missing::Everything,
            (true, true) => Missing::Nothing,
            (true, false) if scaled => Missing::Everything,
            (true, false) => Missing::Columns,
        };
        if *contents != Some(wanted) {
            self.filled.store(false, Ordering::Relaxed);
        }
        *contents = Some(wanted);
        Some((self.buffer.ptr(), missing))
    }

    /// As it was last written, if it is up to date, for this use, and has room for so many rows `below`.
    pub(super) fn with_room(&self, rows: usize, cols: usize, scaled: bool, below: usize) -> Option<Room> {
        let contents = *self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let contents = contents.filter(|contents| contents.scaled == scaled && self.is_fresh())?;
        let stride = cols + contents.place.map_or(0, |place| place.padding);
        let fits = (rows + below) * stride * Dtype::Bf16.size() <= self.buffer.bytes();
        let is_filled = below > 0 && fits && self.filled.swap(true, Ordering::Relaxed);
        (self.adapted && fits).then(|| Room { ptr: self.buffer.ptr(), stride, is_filled })
    }

    /// The address and stride of so many rows `below` those of the weight, if it was written before.
    pub(super) fn below(&self, rows: usize, cols: usize, below: usize) -> Option<(u64, usize)> {
        let contents = (*self.contents.lock().unwrap_or_else(PoisonError::into_inner))?;
        let stride = cols + contents.place.map_or(0, |place| place.padding);
        let fits = (rows + below) * stride * Dtype::Bf16.size() <= self.buffer.bytes();
        (self.adapted && fits)
            .then(|| (self.buffer.ptr() + (rows * stride * Dtype::Bf16.size()) as u64, stride))
    }

    /// The address and stride of the rows, and whether they are scaled: if they are there as they are, or with the row
    /// scale of now.
    pub(super) fn rows(&self, cols: usize) -> Option<(u64, usize, bool)> {
        let contents = *self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let Contents { place, scaled } = contents.filter(|contents| !contents.scaled || self.is_fresh())?;
        Some((self.buffer.ptr(), cols + place.map_or(0, |place| place.padding), scaled))
    }

    /// The address of the rows, and where the branch lies behind them, if they were written with a row scale before.
    pub(super) fn to_scale_anew(&self) -> Option<(u64, Option<Place>)> {
        let contents = (*self.contents.lock().unwrap_or_else(PoisonError::into_inner))?;
        contents.scaled.then(|| (self.buffer.ptr(), contents.place))
    }

    /// Whether all that an adapter changes was made anew with it.
    pub(super) fn was_refreshed(&self) -> bool {
        let contents = *self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        contents.is_some_and(|contents| contents.scaled || contents.place.is_some())
    }

    /// The address and stride of the columns behind the rows where the branch lies, if only that changes with a step.
    pub(super) fn branch(&self, cols: usize) -> Option<(u64, usize)> {
        let contents = *self.contents.lock().unwrap_or_else(PoisonError::into_inner);
        let Contents { place, .. } = contents.filter(|contents| !contents.scaled)?;
        let place = place?;
        Some((self.buffer.ptr() + ((cols + place.offset) * Dtype::Bf16.size()) as u64, cols + place.padding))
    }

    /// Whether it holds what was last asked for.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh.load(Ordering::Relaxed)
    }

    /// Says whether the rows below are those of now.
    pub(super) fn set_filled(&self, filled: bool) {
        self.filled.store(filled, Ordering::Relaxed);
    }

    /// Says whether it holds what was last asked for: a replayed recording fills it without asking.
    pub(super) fn set_fresh(&self, fresh: bool) {
        if self.adapted {
            self.fresh.store(fresh, Ordering::Relaxed);
        }
    }
}
