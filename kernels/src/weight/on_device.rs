//! The weight where ops on a device read it: its packed planes there, and the bf16 copy that a run with memory to
//! spare keeps beside them. What the copy holds and when it is of now, [`copy`](super::copy) says.

use std::sync::Arc;

use qpeft_formats::GgmlType;

use super::copy::{Copy, Missing, Place, Room};
use super::device::GROUP;
use super::{BaseWeight, DeviceWeight, WeightType};
use crate::cuda::gemm::Matrix;
use crate::device::Device;
use crate::error::Result;
use crate::tensor::{Dtype, ViewMut};

/// The same weight where ops on a device read it.
#[derive(Debug)]
pub(super) struct OnDevice {
    packed: DeviceWeight,
    copy: Option<Copy>,
}

impl BaseWeight {
    /// The same weight, packed, where `device` computes. The host keeps its mapped bytes.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn to_device(mut self, device: &Device) -> Result<BaseWeight> {
        match device {
            Device::Cpu => {}
            Device::Cuda(cuda) => {
                let packed = DeviceWeight::upload(cuda, &self)?;
                self.on_device = Some(Arc::new(OnDevice { packed, copy: None }));
            }
            Device::Meta(meter) => meter.add(DeviceWeight::bytes_of(&self)),
        }
        Ok(self)
    }

    /// As [`BaseWeight::to_device`], but in pinned host memory, which kernels read over the bus: for a table of
    /// which a step needs some rows.
    ///
    /// # Errors
    /// The host has not so much memory to pin.
    pub fn to_pinned(mut self, device: &Device) -> Result<BaseWeight> {
        if let Device::Cuda(cuda) = device {
            let packed = DeviceWeight::pin(cuda, &self)?;
            self.on_device = Some(Arc::new(OnDevice { packed, copy: None }));
        }
        Ok(self)
    }

    /// The packed weight on the device, if it is there.
    pub fn device(&self) -> Option<&DeviceWeight> {
        self.on_device.as_ref().map(|on_device| &on_device.packed)
    }

    /// Gives a weight on a device room for a bf16 copy with so many columns of padding, so that products do
    /// not dequantize it each time. `adapted`: for products with a row scale or a branch.
    ///
    /// # Errors
    /// The device is out of memory.
    ///
    /// # Panics
    /// The weight is shared already.
    pub fn keep_copy(&mut self, device: &Device, padding: usize, rank: usize, adapted: bool) -> Result<()> {
        let bytes = (self.rows + rank) * (self.cols + padding) * Dtype::Bf16.size();
        match (device, &mut self.on_device) {
            (Device::Cuda(cuda), Some(on_device)) => {
                let on_device = Arc::get_mut(on_device).expect("a weight that is not shared yet");
                on_device.copy = Some(Copy::new(cuda.alloc(bytes)?, adapted));
            }
            (Device::Meta(meter), _) => meter.add(bytes),
            _ => {}
        }
        Ok(())
    }

    /// Bytes that it takes, or would take, on a device.
    pub fn device_bytes(&self) -> usize {
        DeviceWeight::bytes_of(self)
    }

    /// Whether it has room for a bf16 copy.
    pub fn is_cached(&self) -> bool {
        self.copy().is_some()
    }

    fn copy(&self) -> Option<&Copy> {
        self.on_device.as_ref()?.copy.as_ref()
    }

    /// Address of the bf16 copy for this use, and what the caller has to write there first.
    pub(crate) fn cached_copy(&self, scaled: bool, place: Option<Place>) -> Option<(u64, Missing)> {
        self.copy()?.take(self.rows, self.cols, scaled, place)
    }

    /// The bf16 copy as it was last written, if it is for this use and of now and has room for so many rows `below`.
    pub(crate) fn copy_with_room(&self, scaled: bool, below: usize) -> Option<Room> {
        self.copy()?.with_room(self.rows, self.cols, scaled, below)
    }

    /// Whether there is a bf16 copy of the rows, as they are or scaled by the row scale of now.
    pub fn has_rows_in_copy(&self) -> bool {
        self.rows_in_copy().is_some()
    }

    /// The address and stride of the rows in the bf16 copy, and whether they are scaled by the row scale of now.
    pub(crate) fn rows_in_copy(&self) -> Option<(u64, usize, bool)> {
        self.copy()?.rows(self.cols)
    }

    /// Address of the rows on the device, where they are bf16 already and nothing is multiplied in.
    pub(crate) fn dense_bf16(&self) -> Option<u64> {
        let device = self.device()?;
        let plain = device.weight_type() == WeightType::Ggml(GgmlType::BF16) && device.factor() == 1.0;
        (plain && self.cols.is_multiple_of(GROUP)).then(|| device.address(device.layout().planes[0]))
    }

    /// The columns of the bf16 copy on a device that a branch of this rank lies in, if its rows stay as they are: whoever
    /// changes the branch writes it there, too.
    pub fn branch_in_copy(&self, rank: usize) -> Option<ViewMut<'_>> {
        let on_device = self.on_device.as_ref()?;
        let (ptr, stride) = on_device.copy.as_ref()?.branch(self.cols)?;
        let dtype = Dtype::Bf16;
        let matrix = Matrix { ptr, rows: self.rows, cols: rank, stride, dtype };
        Some(ViewMut::on_cuda(on_device.packed.cuda(), matrix))
    }

    /// Rows below those of the bf16 copy on a device for the first factor of an adapter of this rank, where the copy was
    /// in use before: whoever changes the factor writes it there, too.
    pub fn rows_below_copy(&self, rank: usize) -> Option<ViewMut<'_>> {
        let (ptr, stride) = self.copy()?.below(self.rows, self.cols, rank)?;
        let matrix = Matrix { ptr, rows: rank, cols: self.cols, stride, dtype: Dtype::Bf16 };
        Some(ViewMut::on_cuda(self.on_device.as_ref()?.packed.cuda(), matrix))
    }

    /// Where a bf16 copy on a device is to be written with the row scale of now, and where the branch lies behind its
    /// rows, if a product wrote it with a row scale before.
    pub(crate) fn copy_to_scale_anew(&self) -> Option<(u64, Option<Place>)> {
        self.copy()?.to_scale_anew()
    }

    /// Says that the adapter's parts of the copy were made anew, where it was in use before
    /// ([`BaseWeight::branch_in_copy`], [`BaseWeight::rows_below_copy`],
    /// [`scale_copy_anew`](crate::ops::quant_linear::scale_copy_anew)); otherwise that they have to be.
    pub fn set_refreshed(&self, rank: usize) {
        let Some(copy) = self.copy() else { return };
        copy.set_fresh(copy.was_refreshed());
        copy.set_filled(copy.below(self.rows, self.cols, rank).is_some());
    }

    /// Says whether row scales and adapter columns that were folded into the copy are those of now.
    pub fn set_fresh(&self, fresh: bool) {
        if let Some(copy) = self.copy() {
            copy.set_fresh(fresh);
        }
    }

    /// Whether there is no copy, or one that is up to date.
    pub fn is_fresh(&self) -> bool {
        self.copy().is_none_or(Copy::is_fresh)
    }
}
