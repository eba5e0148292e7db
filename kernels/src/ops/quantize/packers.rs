//! Rows of host memory packed by whoever is free: the calling threads, and a device that takes some of them over the bus.
//!
//! A device has a few desks, each with pinned memory that its kernels read and write themselves, and a stream. A thread that
//! has rows to pack takes them to a desk if one is free, which is faster, and otherwise packs them itself; the bytes are the
//! same. So no thread waits for another, and no memory of the device is taken. Only types that are packed slowly enough go
//! there.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::{QuantType, quantize_blocks};

use super::kernels::{Blocks, FourBitTo, TABLE_BYTES, table_bytes};
use crate::cpu::by_isa;
use crate::cpu::quantize::quantize_rows;
use crate::cuda::{Buffer, Cuda, Errand};
use crate::device::Device;
use crate::error::Result;
use crate::weight::WeightType;

/// Desks of a device: so many threads may be there at once.
const DESKS: usize = 8;

/// Elements that a desk takes at once, at most; whole blocks of every type.
const LARGEST: usize = 1 << 20;

/// Fewer elements stay with their thread: by estimate a launch and the wait for it take as long.
const SMALLEST: usize = 1 << 14;

/// Who packs rows of host memory.
#[derive(Debug, Default)]
pub struct Packers {
    desks: Vec<Mutex<Desk>>,
    /// Elements that the device has packed.
    on_device: AtomicUsize,
}

/// A place of a device where rows are packed.
#[derive(Debug)]
struct Desk {
    errand: Errand,
    values: Buffer,
    packed: Buffer,
    table: Buffer,
}

impl Packers {
    /// The calling threads, and `device` if it is one that packs.
    ///
    /// # Errors
    /// The device refuses, or the host has too little memory to pin.
    pub fn of(device: &Device) -> Result<Packers> {
        let Some(cuda) = device.cuda() else { return Ok(Packers::default()) };
        let desks = (0..DESKS).map(|_| Ok(Mutex::new(Desk::new(cuda)?))).collect::<Result<_>>()?;
        Ok(Packers { desks, on_device: AtomicUsize::new(0) })
    }

    /// Whether a device can take part in packing this type.
    pub fn is_shared(of: WeightType) -> bool {
        match of {
            WeightType::Ggml(dtype) => Blocks::over_bus(dtype).is_some(),
            WeightType::FourBit { .. } => true,
            WeightType::Int8 => false,
        }
    }

    /// Elements of a task: what the second-level cache of a core holds, or, with a device, what makes up for the way there.
    pub(crate) fn task(&self) -> usize {
        if self.desks.is_empty() { 1 << 16 } else { 1 << 18 }
    }

    /// Elements that a device has packed so far.
    pub fn elements_on_device(&self) -> usize {
        self.on_device.load(Ordering::Relaxed)
    }

    /// `bytes = Q(values)`: whole blocks of `dtype` one after another.
    ///
    /// - `Shapes`: values (blocks, block_len), bytes (blocks, block_bytes).
    /// - `Precision`: the bytes of [`quantize_rows`] without importance, whoever packs.
    /// - `Errors`: the device refuses. Callers refuse what is not finite, and types that cannot be written.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn ggml(&self, dtype: GgmlType, values: &[f32], bytes: &mut [u8]) -> Result<()> {
        let (len, width) = (dtype.block_len(), dtype.block_bytes());
        assert!(
            values.len().is_multiple_of(len) && bytes.len() == values.len() / len * width,
            "{} elements of {dtype} are not {} bytes",
            values.len(),
            bytes.len()
        );
        let kernel = Blocks::over_bus(dtype);
        for (values, bytes) in values.chunks(LARGEST).zip(bytes.chunks_mut(LARGEST / len * width)) {
            match kernel.and_then(|kernel| Some((kernel, self.free_desk(values.len())?))) {
                Some((kernel, mut desk)) => {
                    desk.ggml(kernel, values, bytes)?;
                    self.count(values.len());
                }
                None => quantize_rows(dtype, values, len, None, bytes),
            }
        }
        Ok(())
    }

    /// Codes and scales of `values` in NF4 or FP4, blocks of `blocksize` one after another; the last may be cut.
    ///
    /// - `Shapes`: values (blocks * blocksize), codes half as many, absmax (blocks).
    /// - `Precision`: those of [`quantize_blocks`], whoever packs.
    /// - `Errors`: the device refuses. Callers refuse what is not finite.
    ///
    /// # Panics
    /// The lengths do not belong together.
    pub fn four_bit(
        &self,
        quant_type: QuantType,
        blocksize: usize,
        values: &[f32],
        codes: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<()> {
        assert!(
            codes.len() == values.len().div_ceil(2) && absmax.len() == values.len().div_ceil(blocksize),
            "{} elements are not {} bytes of codes and {} scales",
            values.len(),
            codes.len(),
            absmax.len()
        );
        // A block that is cut is divided by another number (the table of types says so, too).
        let is_whole = values.len().is_multiple_of(blocksize);
        let fits =
            values.len() <= LARGEST && codes.len() + size_of_val(absmax) + size_of::<f32>() <= 2 * LARGEST;
        let desk = if is_whole && fits { self.free_desk(values.len()) } else { None };
        let Some(mut desk) = desk else {
            quantize_blocks_here(quant_type, blocksize, values, codes, absmax);
            return Ok(());
        };
        desk.four_bit(quant_type, blocksize, values, codes, absmax)?;
        self.count(values.len());
        Ok(())
    }

    fn count(&self, elements: usize) {
        self.on_device.fetch_add(elements, Ordering::Relaxed);
    }

    fn free_desk(&self, elements: usize) -> Option<MutexGuard<'_, Desk>> {
        if elements < SMALLEST {
            return None;
        }
        self.desks.iter().find_map(|desk| match desk.try_lock() {
            Ok(desk) => Some(desk),
            // Nothing is left on a desk from one use to the next.
            Err(TryLockError::Poisoned(desk)) => Some(PoisonError::into_inner(desk)),
            Err(TryLockError::WouldBlock) => None,
        })
    }
}

by_isa! {
    fn quantize_blocks_here(
        quant_type: QuantType,
        blocksize: usize,
        values: &[f32],
        codes: &mut [u8],
        absmax: &mut [f32],
    ) {
        quantize_blocks(quant_type, blocksize, values, codes, absmax);
    }
}

impl Desk {
    fn new(cuda: &Arc<Cuda>) -> Result<Desk> {
        Ok(Desk {
            errand: Errand::new(cuda)?,
            values: cuda.alloc_host(LARGEST * size_of::<f32>())?,
            // No type here has more than two bytes an element, scales and all.
            packed: cuda.alloc_host(2 * LARGEST)?,
            table: cuda.alloc_host(TABLE_BYTES)?,
        })
    }

    fn ggml(&mut self, kernel: Blocks, values: &[f32], bytes: &mut [u8]) -> Result<()> {
        let cuda = self.errand.cuda();
        self.values.write_host_f32(values);
        self.errand.run(|| kernel.launch(cuda, self.packed.ptr(), 0, self.values.ptr(), values.len()))?;
        self.packed.read_host(0, bytes);
        Ok(())
    }

    fn four_bit(
        &mut self,
        quant_type: QuantType,
        blocksize: usize,
        values: &[f32],
        codes: &mut [u8],
        absmax: &mut [f32],
    ) -> Result<()> {
        let cuda = self.errand.cuda();
        self.values.write_host_f32(values);
        self.table.write_host(0, &table_bytes(quant_type));
        let scales_at = codes.len().next_multiple_of(size_of::<f32>());
        let to = FourBitTo {
            codes: self.packed.ptr(),
            absmax: self.packed.ptr() + scales_at as u64,
            table: self.table.ptr(),
        };
        self.errand.run(|| to.launch(cuda, quant_type, blocksize, self.values.ptr(), absmax.len()))?;
        self.packed.read_host(0, codes);
        let mut scales = vec![0; size_of_val(absmax)];
        self.packed.read_host(scales_at, &mut scales);
        for (absmax, bytes) in absmax.iter_mut().zip(scales.as_chunks::<4>().0) {
            *absmax = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }
}
