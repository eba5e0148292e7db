//! Device memory for the time of a call, for work that comes back with the same sizes.
//!
//! What is given back is lent again without asking the driver, whose calls wait for the device. Work that borrows is
//! enqueued on one stream, so the next borrower comes after the last one there, too.

use std::sync::PoisonError;

use super::{Buffer, rounded};
use crate::cuda::Cuda;
use crate::error::{Error, Result};

/// A borrowed piece of device memory with any contents; dropping it gives it back.
#[derive(Debug)]
pub struct Loan<'a> {
    cuda: &'a Cuda,
    buffer: Buffer,
}

impl Loan<'_> {
    /// Device address of the first byte; a multiple of 256.
    pub fn ptr(&self) -> u64 {
        self.buffer.ptr()
    }
}

impl Drop for Loan<'_> {
    fn drop(&mut self) {
        let mut idle = self.cuda.memory.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.push(self.buffer.clone());
    }
}

impl Cuda {
    /// At least `bytes` of device memory, and at most twice as much, outside of the reservation.
    ///
    /// # Errors
    /// The device has not so much memory left, not even when everything idle is given back.
    ///
    /// # Panics
    /// Work [side by side](Cuda::side_by_side) asks for it.
    pub fn borrow(&self, bytes: usize) -> Result<Loan<'_>> {
        assert!(!Cuda::is_side_by_side(), "borrowed memory is not for work side by side");
        let size = rounded(bytes);
        let mut idle = self.memory.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let fitting = idle.iter().enumerate().filter(|(_, b)| (size..=2 * size).contains(&b.bytes()));
        if let Some((at, _)) = fitting.min_by_key(|(_, b)| b.bytes()) {
            return Ok(Loan { cuda: self, buffer: idle.swap_remove(at) });
        }
        let buffer = match self.block_of(size) {
            Err(Error::OutOfMemory { .. }) if !idle.is_empty() => {
                // The driver waits for what is enqueued before it takes memory back.
                idle.clear();
                self.block_of(size)?
            }
            other => other?,
        };
        Ok(Loan { cuda: self, buffer })
    }
}
