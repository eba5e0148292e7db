//! Indices that ops take: token ids, positions, boundaries of sequences, rows.
//!
//! An op checks them in host memory, where a wrong one becomes an error; its kernel reads the copy on the device.

use std::ops::Range;
use std::sync::Arc;

use crate::cuda::{Buffer, Cuda};
use crate::device::Device;
use crate::error::{Error, Result, check};

/// Indices, and their copy on a device. Allocated once; the step loop only overwrites it.
#[derive(Debug)]
pub struct IdBuffer {
    host: Vec<u32>,
    capacity: usize,
    device: Option<(Arc<Cuda>, Buffer)>,
}

/// Borrowed indices.
#[derive(Debug, Clone, Copy)]
pub struct Ids<'a> {
    host: &'a [u32],
    device: Option<u64>,
}

impl IdBuffer {
    /// Room for `capacity` indices.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(device: &Device, capacity: usize) -> Result<IdBuffer> {
        let bytes = capacity * size_of::<u32>();
        let device = match device {
            Device::Cpu => None,
            Device::Cuda(cuda) => Some((Arc::clone(cuda), cuda.alloc(bytes)?)),
            Device::Meta(meter) => {
                meter.add(bytes);
                None
            }
        };
        Ok(IdBuffer { host: Vec::with_capacity(capacity), capacity, device })
    }

    /// Replaces the indices, in stream order.
    ///
    /// # Errors
    /// There are more than there is room for, or the device refuses.
    pub fn set(&mut self, ids: &[u32]) -> Result<()> {
        if ids.len() > self.capacity {
            check("indices", "number of them", self.capacity, ids.len())?;
        }
        self.host.clear();
        self.host.extend_from_slice(ids);
        if let Some((cuda, buffer)) = &self.device {
            let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
            cuda.write(buffer.ptr(), &bytes)?;
        }
        Ok(())
    }

    /// All indices.
    pub fn ids(&self) -> Ids<'_> {
        Ids { host: &self.host, device: self.device.as_ref().map(|(_, buffer)| buffer.ptr()) }
    }

    /// Room.
    pub fn capacity(&self) -> usize {
        self.capacity
    }
}

impl<'a> Ids<'a> {
    /// The indices in host memory.
    pub fn host(self) -> &'a [u32] {
        self.host
    }

    /// How many.
    pub fn len(self) -> usize {
        self.host.len()
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.host.is_empty()
    }

    /// Some of them.
    ///
    /// # Panics
    /// The range ends behind the last one.
    #[must_use]
    pub fn slice(self, range: Range<usize>) -> Ids<'a> {
        let device = self.device.map(|ptr| ptr + (range.start * size_of::<u32>()) as u64);
        Ids { host: &self.host[range], device }
    }

    /// Address of the copy on the device.
    ///
    /// # Errors
    /// [`Error::NoKernel`]: there is none.
    pub fn device(self, op: &'static str) -> Result<u64> {
        self.device.ok_or_else(|| Error::NoKernel { op, device: "indices in host memory".to_owned() })
    }
}

impl<'a> From<&'a [u32]> for Ids<'a> {
    fn from(host: &'a [u32]) -> Ids<'a> {
        Ids { host, device: None }
    }
}

impl<'a> From<&'a Vec<u32>> for Ids<'a> {
    fn from(host: &'a Vec<u32>) -> Ids<'a> {
        Ids { host, device: None }
    }
}

impl<'a, const N: usize> From<&'a [u32; N]> for Ids<'a> {
    fn from(host: &'a [u32; N]) -> Ids<'a> {
        Ids { host, device: None }
    }
}
