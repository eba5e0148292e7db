//! Dense rows packed: what a merge or a split leaves of a weight, in the type of a file.
//!
//! A device packs the types of one table, `kernel`; what it does not pack is left to the host. That is no fallback in
//! what comes out: kernels and codecs write the same bytes. A kernel also writes what the packed rows stand for, so that
//! whoever measures what packing took need not unpack them.
//!
//! The kernels are in `quantize/`, what starts them in `quantize/kernels.rs`; rows that are in host memory go through
//! [`Packers`].

mod kernels;
mod packers;

use std::sync::Arc;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::{FourBit, QuantState};
use qpeft_formats::file::Bytes;
use qpeft_formats::safetensors::Dtype as Element;

pub(crate) use self::kernels::{BLOCKS, K};
use self::kernels::{Blocks, FourBitTo, TABLE_BYTES, THREADS, table_bytes};
pub use self::packers::Packers;
use crate::cuda::{Arg, Cuda, Grid, Loan};
use crate::error::{Result, check};
use crate::tensor::{View, ViewMut};
use crate::weight::{BaseWeight, WeightType};

const OP: &str = "quantize";

/// `packed = Q(x)` in the type of `like`, in host memory, and `stored`, what that stands for.
///
/// `None`: x is on a device that has no kernel for this, and the host has to pack; see [`is_packed_on_device`].
///
/// - `Shapes`: x, stored and like (N, K). The values of `like` do not matter.
/// - `Accumulates`: `stored =`.
/// - `Precision`: the bytes of [`BaseWeight::requantize`] and the bits of [`BaseWeight::dequantize`], wherever x is.
/// - `Errors`: other shapes, operands in different places, or the device refuses. In host memory an element that is not
///   finite is named; on a device the caller makes sure that there is none, and gets bytes without meaning otherwise.
/// - `Source`: the codecs of `qpeft-formats`, which have the bytes of llama.cpp and bitsandbytes.
pub fn quantize(x: View<'_>, stored: Option<ViewMut<'_>>, like: &BaseWeight) -> Result<Option<BaseWeight>> {
    check_shapes(&x, stored.as_ref(), like)?;
    let Some(cuda) = x.cuda() else { return quantize_cpu(x, stored, like).map(Some) };
    let has_gaps = x.stride != x.cols || stored.as_ref().is_some_and(|stored| stored.stride != x.cols);
    let Some(packing) = Packing::new(cuda, like)?.filter(|_| !has_gaps) else { return Ok(None) };
    packing.enqueue(x, stored.as_ref())?;
    packing.read(stored.as_ref()).map(Some)
}

/// Whether devices have a kernel that packs in the type and shape of `like`, given rows without gaps.
pub fn is_packed_on_device(like: &BaseWeight) -> bool {
    kernel(like).is_some()
}

fn check_shapes(x: &View<'_>, stored: Option<&ViewMut<'_>>, like: &BaseWeight) -> Result<()> {
    check(OP, "rows of x", like.rows(), x.rows)?;
    check(OP, "columns of x", like.cols(), x.cols)?;
    let Some(stored) = stored else { return Ok(()) };
    check(OP, "rows of stored", like.rows(), stored.rows)?;
    check(OP, "columns of stored", like.cols(), stored.cols)
}

// ---------------------------------------------------------------------------------------------- CPU

fn quantize_cpu(x: View<'_>, stored: Option<ViewMut<'_>>, like: &BaseWeight) -> Result<BaseWeight> {
    let packed = if x.stride == x.cols { like.requantize(x.cpu(OP)?)? } else { like.requantize(&x.read()?)? };
    if let Some(stored) = stored {
        let (cols, stride) = (stored.cols, stored.stride.max(1));
        for (row, out) in stored.cpu(OP)?.chunks_mut(stride).enumerate() {
            packed.dequantize_rows(row..row + 1, &mut out[..cols]);
        }
    }
    Ok(packed)
}

// --------------------------------------------------------------------------------------------- CUDA

/// What packs a type on a device.
#[derive(Debug, Clone, Copy)]
enum Kernel {
    /// The bytes of x themselves.
    Copy,
    Blocks(Blocks),
    /// 4-bit codes, and scales behind them.
    FourBit(QuantState),
}

fn kernel(like: &BaseWeight) -> Option<Kernel> {
    if like.factor() != 1.0 {
        return None;
    }
    match like.weight_type() {
        WeightType::Ggml(GgmlType::F32) => Some(Kernel::Copy),
        WeightType::Ggml(dtype) => Blocks::of(dtype).map(Kernel::Blocks),
        WeightType::FourBit { .. } => {
            let state = *like.four_bit().expect("a 4-bit weight has 4-bit codes").state();
            // bitsandbytes divides the elements of a block that is cut by another number.
            state.elements().is_multiple_of(state.blocksize).then_some(Kernel::FourBit(state))
        }
        WeightType::Int8 => None,
    }
}

/// A weight that is being packed on a device.
#[derive(Debug)]
pub struct Packing<'a> {
    cuda: &'a Arc<Cuda>,
    like: &'a BaseWeight,
    kernel: Kernel,
    /// As files have it; of 4-bit weights the codes, then an f32 scale per block.
    packed: Loan<'a>,
    bytes: usize,
    /// Of 4-bit weights the values of the codes.
    table: Option<Loan<'a>>,
}

impl<'a> Packing<'a> {
    /// Room for a weight in the type and shape of `like`; `None` where the device has no kernel for it.
    ///
    /// # Errors
    /// The device has too little memory left.
    pub fn new(cuda: &'a Arc<Cuda>, like: &'a BaseWeight) -> Result<Option<Packing<'a>>> {
        let Some(kernel) = kernel(like) else { return Ok(None) };
        let bytes = match kernel {
            Kernel::FourBit(state) => scales_at(&state) + state.blocks() * size_of::<f32>(),
            Kernel::Copy | Kernel::Blocks(_) => like.size_bytes(),
        };
        let table = match kernel {
            Kernel::FourBit(state) => {
                let table = cuda.borrow(TABLE_BYTES)?;
                cuda.write(table.ptr(), &table_bytes(state.quant_type))?;
                Some(table)
            }
            Kernel::Copy | Kernel::Blocks(_) => None,
        };
        Ok(Some(Packing { cuda, like, kernel, packed: cuda.borrow(bytes)?, bytes, table }))
    }

    /// Enqueues the kernel on x, an f32 matrix without gaps on the device. Writes `stored`, too, but that of 4-bit
    /// weights, whose scales are rounded by the host: [`Packing::read`] writes that.
    ///
    /// # Errors
    /// Another shape, rows with gaps, another place, or the device refuses.
    pub fn enqueue(&self, x: View<'_>, stored: Option<&ViewMut<'_>>) -> Result<()> {
        check_shapes(&x, stored, self.like)?;
        check(OP, "stride of x", x.cols, x.stride)?;
        let elements = x.rows * x.cols;
        let from = x.f32(OP)?;
        let to = match stored {
            Some(stored) => {
                check(OP, "stride of stored", x.cols, stored.stride)?;
                stored.f32(OP)?
            }
            None => 0,
        };
        match self.kernel {
            Kernel::Copy => {
                self.cuda.copy(self.packed.ptr(), from, self.bytes)?;
                if to != 0 { self.cuda.copy(to, from, self.bytes) } else { Ok(()) }
            }
            Kernel::Blocks(kernel) => kernel.launch(self.cuda, self.packed.ptr(), to, from, elements),
            Kernel::FourBit(state) => {
                let scales = self.packed.ptr() + scales_at(&state) as u64;
                let to = FourBitTo { codes: self.packed.ptr(), absmax: scales, table: self.table() };
                to.launch(self.cuda, state.quant_type, state.blocksize, from, state.blocks())
            }
        }
    }

    /// What was packed, in host memory; waits for the device. `stored`: see [`Packing::enqueue`].
    ///
    /// # Errors
    /// The device refuses.
    pub fn read(&self, stored: Option<&ViewMut<'_>>) -> Result<BaseWeight> {
        let mut bytes = vec![0; self.bytes];
        self.cuda.read(self.packed.ptr(), &mut bytes)?;
        let (rows, cols) = (self.like.rows(), self.like.cols());
        let state = match (self.kernel, self.like.weight_type()) {
            (Kernel::FourBit(state), _) => state,
            (_, WeightType::Ggml(dtype)) => {
                return BaseWeight::from_ggml(dtype, rows, cols, Bytes::from(bytes));
            }
            _ => unreachable!("the table has 4-bit and ggml types"),
        };
        let scales = bytes.split_off(scales_at(&state));
        bytes.truncate(state.code_bytes());
        let absmax: Vec<f32> = scales.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect();
        let double = matches!(self.like.weight_type(), WeightType::FourBit { double: true, .. });
        let packed = FourBit::from_parts(state, bytes, &absmax, double);
        if let Some(stored) = stored {
            self.write_stored(stored, &state, &packed)?;
        }
        Ok(BaseWeight::from_four_bit(packed))
    }

    /// What the codes on the device stand for with the scales of `packed`.
    fn write_stored(&self, stored: &ViewMut<'_>, state: &QuantState, packed: &FourBit) -> Result<()> {
        let scales = self.packed.ptr() + scales_at(state) as u64;
        let rounded: Vec<u8> = (0..state.blocks()).flat_map(|i| packed.absmax(i).to_le_bytes()).collect();
        self.cuda.write(scales, &rounded)?;
        let rounding = match state.dtype {
            Element::F16 => 1,
            Element::BF16 => 2,
            _ => 0,
        };
        let pairs = state.elements() / 2;
        let args = [
            Arg::Ptr(stored.f32(OP)?),
            Arg::Ptr(self.packed.ptr()),
            Arg::Ptr(scales),
            Arg::Ptr(self.table()),
            Arg::I32(rounding),
            Arg::size(state.blocksize.trailing_zeros() as usize),
            Arg::I64(pairs as i64),
        ];
        self.cuda.launch(&BLOCKS, "quantize_four_bit_stored", Grid::over(pairs, THREADS), &args)
    }

    fn table(&self) -> u64 {
        self.table.as_ref().map_or(0, Loan::ptr)
    }
}

/// Where the scales of a 4-bit weight lie behind its codes.
fn scales_at(state: &QuantState) -> usize {
    state.code_bytes().next_multiple_of(size_of::<f32>())
}

#[cfg(test)]
mod tests;
