//! Device memory: blocks from the driver, buffers inside of them, scratch that outlives a call.
//!
//! A run reserves one block for all its tensors ([`Cuda::reserve`]) and carves them out of it; what is
//! allocated without a reservation, or beyond it, gets a block of its own. A block goes back to the driver
//! with the last buffer in it.

mod loan;

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, result};

pub use self::loan::Loan;
use super::Cuda;
use crate::error::{Error, Result};

/// Starts of buffers: what the widest vector load and cuBLASLt's fastest kernels want.
const ALIGNMENT: usize = 256;

/// What an allocation of `bytes` takes.
pub(crate) fn rounded(bytes: usize) -> usize {
    bytes.max(1).next_multiple_of(ALIGNMENT)
}

/// Bytes obtained from the driver at once.
#[derive(Debug)]
struct Block {
    context: Arc<CudaContext>,
    counters: Arc<Counters>,
    ptr: u64,
    bytes: usize,
    /// Pinned memory of the host, which the device reads over the bus.
    on_host: bool,
}

/// Bytes held now, and the most that were held.
#[derive(Debug, Default)]
struct Counters {
    now: AtomicUsize,
    peak: AtomicUsize,
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: `ptr` came from the allocation of its kind and nobody holds a buffer in the block any more. A
            // device that vanished has no memory to give back, so its error says nothing new.
            let _ = unsafe {
                if self.on_host {
                    result::free_host(self.ptr as *mut std::ffi::c_void)
                } else {
                    result::free_sync(self.ptr)
                }
            };
        }
        if !self.on_host {
            self.counters.now.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

/// A piece of device memory.
#[derive(Debug, Clone)]
pub struct Buffer {
    block: Arc<Block>,
    ptr: u64,
    bytes: usize,
}

impl Buffer {
    /// Device address of the first byte; a multiple of 256.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Copies into pinned host memory, now; nothing that uses it may be on its way.
    ///
    /// # Panics
    /// The range lies outside of the buffer, or the buffer is not on the host.
    pub(crate) fn write_host(&mut self, at: usize, bytes: &[u8]) {
        let to = self.host(at, bytes.len());
        // SAFETY: `host` checked the range, which neither a clone of the buffer nor anything enqueued uses: weights are
        // filled before they are shared and first read, and a desk's buffers are behind its lock, where an errand is
        // waited for before the next. So the source does not overlap it either.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// As `write_host` at the start, numbers.
    ///
    /// # Panics
    /// See there.
    pub(crate) fn write_host_f32(&mut self, values: &[f32]) {
        let to = self.host(0, size_of_val(values));
        // SAFETY: as above; every bit pattern of an f32 is four bytes.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr().cast(), to, size_of_val(values)) };
    }

    /// Copies out of pinned host memory, now; nothing that writes there may be on its way.
    ///
    /// # Panics
    /// The range lies outside of the buffer, or the buffer is not on the host.
    pub(crate) fn read_host(&self, at: usize, bytes: &mut [u8]) {
        let from = self.host(at, bytes.len());
        // SAFETY: `host` checked the range, which nothing writes any more: the caller waited for what did.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    /// The address of a range of pinned host memory.
    fn host(&self, at: usize, bytes: usize) -> *mut u8 {
        let end = at.checked_add(bytes).expect("a length of memory");
        assert!(self.block.on_host && end <= self.bytes, "a range of a buffer on the host");
        (self.ptr as *mut u8).wrapping_add(at)
    }
}

/// What a scratch buffer is for: two of one purpose are never needed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scratch {
    /// A dequantized weight on its way into a matrix product.
    Weight,
    /// cuBLASLt's workspace.
    Gemm,
    /// Partial sums of reductions, a small product on its way into another kernel.
    Partials,
}

/// All memory of one device.
#[derive(Debug, Default)]
pub(super) struct Memory {
    counters: Arc<Counters>,
    /// The reserved block and the bytes of it that are taken.
    arena: Mutex<Option<(Arc<Block>, usize)>>,
    scratch: Mutex<HashMap<Scratch, Buffer>>,
    /// What was lent and came back.
    idle: Mutex<Vec<Buffer>>,
    /// How often a scratch buffer was put in another place.
    moves: AtomicUsize,
}

impl Cuda {
    /// Obtains one block from which later allocations are carved; an earlier reservation gives up its rest.
    ///
    /// # Errors
    /// The device has not so much memory left.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        let block = Arc::new(self.block(bytes)?);
        *self.memory.arena.lock().unwrap_or_else(PoisonError::into_inner) = Some((block, 0));
        Ok(())
    }

    /// Gives up what is left of the reservation, so that its block can go when its tensors go, and what is idle.
    pub fn release(&self) {
        self.memory.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
        *self.memory.arena.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.memory.scratch.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// `bytes` of memory with any contents.
    ///
    /// # Errors
    /// The device has not so much memory left.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let size = rounded(bytes);
        let mut arena = self.memory.arena.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((block, used)) = &mut *arena
            && block.bytes - *used >= size
        {
            let ptr = block.ptr + *used as u64;
            *used += size;
            return Ok(Buffer { block: Arc::clone(block), ptr, bytes });
        }
        drop(arena);
        self.block_of(bytes)
    }

    /// A buffer with a block of its own.
    fn block_of(&self, bytes: usize) -> Result<Buffer> {
        let block = self.block(rounded(bytes))?;
        Ok(Buffer { ptr: block.ptr, block: Arc::new(block), bytes })
    }

    fn block(&self, bytes: usize) -> Result<Block> {
        self.bind()?;
        // SAFETY: the context is current; the block frees what it holds exactly once.
        let ptr = unsafe { result::malloc_sync(bytes) }.map_err(|e| {
            let (free, total) = self.free_memory().unwrap_or((0, 0));
            let (held, _) = self.held_bytes();
            Error::OutOfMemory { device: self.name(), wanted: bytes, free, total, held, cause: e.to_string() }
        })?;
        let counters = Arc::clone(&self.memory.counters);
        let now = counters.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        counters.peak.fetch_max(now, Ordering::Relaxed);
        Ok(Block { context: Arc::clone(&self.context), counters, ptr, bytes, on_host: false })
    }

    /// `bytes` of pinned host memory that kernels can read and write at the speed of the bus.
    ///
    /// # Errors
    /// The host has not so much memory left to pin.
    pub fn alloc_host(&self, bytes: usize) -> Result<Buffer> {
        self.bind()?;
        // SAFETY: the context is current; the block frees what it holds exactly once. With unified addresses,
        // which every 64-bit device has, the device uses the same address.
        let ptr = unsafe { result::malloc_host(bytes.max(1), 0) }
            .map_err(|e| self.error(&format!("pinning {bytes} bytes of host memory"), e))?
            as u64;
        let counters = Arc::clone(&self.memory.counters);
        let block = Block { context: Arc::clone(&self.context), counters, ptr, bytes, on_host: true };
        Ok(Buffer { ptr, bytes, block: Arc::new(block) })
    }

    /// Address of a scratch buffer of at least `bytes`, which keeps its place until a larger one is asked for.
    ///
    /// Growing waits for the device, so it belongs into the first step of a run, never into a capture.
    ///
    /// # Errors
    /// The device has not so much memory left.
    ///
    /// # Panics
    /// Work [side by side](Cuda::side_by_side) or an errand asks for it.
    pub fn scratch(&self, purpose: Scratch, bytes: usize) -> Result<u64> {
        assert!(!Cuda::is_side_by_side(), "scratch is not for work side by side");
        let mut all = self.memory.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(buffer) = all.get(&purpose)
            && buffer.bytes >= bytes
        {
            return Ok(buffer.ptr);
        }
        if all.remove(&purpose).is_some() {
            // What is enqueued may still use the old one.
            self.synchronize()?;
        }
        let buffer = self.alloc(bytes)?;
        let ptr = buffer.ptr;
        all.insert(purpose, buffer);
        self.memory.moves.fetch_add(1, Ordering::Relaxed);
        Ok(ptr)
    }

    /// Changes when a scratch buffer gets another address, which recordings hold.
    pub fn scratch_moves(&self) -> usize {
        self.memory.moves.load(Ordering::Relaxed)
    }

    /// Bytes held from the driver now, and the most that were held at once.
    pub fn held_bytes(&self) -> (usize, usize) {
        let counters = &self.memory.counters;
        (counters.now.load(Ordering::Relaxed), counters.peak.load(Ordering::Relaxed))
    }

    /// Bytes free on the device and its size, as the driver says.
    ///
    /// # Errors
    /// The device does not answer.
    pub fn free_memory(&self) -> Result<(usize, usize)> {
        self.bind()?;
        result::mem_get_info().map_err(|e| self.error("asking for free memory", e))
    }

    /// Sets `bytes` bytes at `ptr` to zero, in stream order.
    ///
    /// # Errors
    /// The device refuses.
    pub(crate) fn zero(&self, ptr: u64, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: callers pass ranges of buffers that they hold.
        unsafe { result::memset_d8_async(ptr, 0, bytes, self.stream()) }
            .map_err(|e| self.error("clearing memory", e))
    }

    /// Zeroes `rows` rows of `width` bytes that start `pitch` bytes apart, in stream order.
    ///
    /// # Errors
    /// The device refuses.
    pub(crate) fn zero_rows(&self, ptr: u64, pitch: usize, width: usize, rows: usize) -> Result<()> {
        if width == pitch || rows <= 1 {
            return self.zero(ptr, width * rows);
        }
        self.bind()?;
        // SAFETY: callers pass ranges of buffers that they hold.
        unsafe { cudarc::driver::sys::cuMemsetD2D8Async(ptr, pitch, 0, width, rows, self.stream()) }
            .result()
            .map_err(|e| self.error("clearing memory", e))
    }

    /// Copies host memory to the device in stream order; the host memory may be reused on return.
    ///
    /// # Errors
    /// The device refuses.
    pub fn write(&self, ptr: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: callers pass a range of a buffer that they hold. Pageable host memory is staged by the driver
        // before the call returns.
        unsafe { result::memcpy_htod_async(ptr, bytes, self.stream()) }
            .map_err(|e| self.error("copying to the device", e))
    }

    /// Copies device memory to the host; waits for everything enqueued before.
    ///
    /// # Errors
    /// The device refuses.
    pub fn read(&self, ptr: u64, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.bind()?;
        // SAFETY: callers pass a range of a buffer that they hold; the stream is awaited before `bytes` is used.
        unsafe { result::memcpy_dtoh_async(bytes, ptr, self.stream()) }
            .map_err(|e| self.error("copying from the device", e))?;
        self.synchronize()
    }

    /// Copies between device addresses in stream order.
    ///
    /// # Errors
    /// The device refuses.
    pub fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        // SAFETY: callers pass ranges of buffers that they hold.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream()) }
            .map_err(|e| self.error("copying on the device", e))
    }
}
