//! The frozen base weight: packed rows behind one interface, the seam between methods and formats.
//!
//! A linear layer holds one [`BaseWeight`] and asks it for f32 rows or tiles; an adapter never learns
//! in which type they are stored, and a new type is one more `Storage` variant here. The bytes stay
//! packed and usually mapped from the file: a clone is a pointer, and only the tile at work is f32.
//! N rows are output features, K columns are input features. Each storage has a file of its own.

mod copy;
pub mod device;
mod four_bit;
mod ggml;
mod int8;
mod kind;

use std::ops::Range;
use std::sync::Arc;

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::{FourBit, Int8};
use qpeft_formats::file::Bytes;
use qpeft_formats::safetensors::{Dtype, TensorView};
use rayon::prelude::*;

pub use copy::Place;
pub(crate) use copy::{Missing, Room};
pub use device::DeviceWeight;
pub use ggml::dequantize_blocks;
pub use kind::WeightType;

use crate::cpu::by_isa;
use crate::cpu::scratch::with_scratch;
use crate::cuda::gemm::Matrix;
use crate::device::Device;
use crate::error::{Error, Result, check};
use crate::tensor::ViewMut;

/// A frozen (N, K) matrix in the type of its checkpoint.
#[derive(Debug, Clone)]
pub struct BaseWeight {
    rows: usize,
    cols: usize,
    storage: Storage,
    on_device: Option<Arc<OnDevice>>,
}

/// The same weight where ops on a device read it.
#[derive(Debug)]
struct OnDevice {
    packed: DeviceWeight,
    copy: Option<copy::Copy>,
}

/// How the rows are stored.
#[derive(Debug, Clone)]
enum Storage {
    /// Rows of ggml blocks, one after another; F32, F16 and BF16 are blocks of one element. Every element
    /// is multiplied by `factor`, mostly 1.
    Ggml { dtype: GgmlType, bytes: Bytes, factor: f32 },
    /// bitsandbytes NF4 or FP4: blocks over the flat matrix.
    FourBit(FourBit),
    /// bitsandbytes LLM.int8: a scale per row.
    Int8(Int8),
}

/// Rows that one task converts; small enough to stay in the second-level cache.
const ROWS_PER_TASK: usize = 16;

impl BaseWeight {
    /// `rows` x `cols` elements of `dtype`, row by row, as a GGUF tensor stores them.
    ///
    /// # Errors
    /// `cols` is not a whole number of blocks, or `bytes` has another length than the shape asks for.
    pub fn from_ggml(dtype: GgmlType, rows: usize, cols: usize, bytes: Bytes) -> Result<BaseWeight> {
        let expected = dtype.row_bytes(cols)?.saturating_mul(rows);
        check("weight", "size in bytes", expected, bytes.len())?;
        Ok(BaseWeight { rows, cols, storage: Storage::Ggml { dtype, bytes, factor: 1.0 }, on_device: None })
    }

    /// The same blocks with every element times `factor`, as a file has it that keeps a factor of the whole
    /// tensor beside the blocks (NVFP4). [`BaseWeight::requantize`] keeps the factor.
    ///
    /// # Panics
    /// The weight is not stored in ggml blocks: the other formats have no such factor.
    #[must_use]
    pub fn scaled_by(mut self, by: f32) -> BaseWeight {
        match &mut self.storage {
            Storage::Ggml { factor, .. } => *factor = by,
            Storage::FourBit(_) | Storage::Int8(_) => panic!("{} has no factor", self.type_name()),
        }
        self
    }

    /// What every element of the blocks is multiplied by; 1 if nothing was said.
    pub fn factor(&self) -> f32 {
        match &self.storage {
            Storage::Ggml { factor, .. } => *factor,
            Storage::FourBit(_) | Storage::Int8(_) => 1.0,
        }
    }

    /// An unquantized weight, row by row.
    ///
    /// # Errors
    /// `values` does not hold rows x cols elements.
    pub fn from_f32(rows: usize, cols: usize, values: &[f32]) -> Result<BaseWeight> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        BaseWeight::from_ggml(GgmlType::F32, rows, cols, Bytes::from(bytes))
    }

    /// A weight of this type whose values do not matter.
    ///
    /// # Errors
    /// `cols` is not a whole number of blocks.
    pub fn empty(of: WeightType, rows: usize, cols: usize) -> Result<BaseWeight> {
        BaseWeight::empty_from(of, rows, cols, Dtype::BF16)
    }

    /// As [`BaseWeight::empty`], as if the elements had been of `dtype` (F32, F16 or BF16): dequantized 4-bit values
    /// are rounded to it.
    ///
    /// # Errors
    /// See [`BaseWeight::empty`].
    pub fn empty_from(of: WeightType, rows: usize, cols: usize, dtype: Dtype) -> Result<BaseWeight> {
        of.empty(rows, cols, dtype)
    }

    /// A weight in NF4 or FP4.
    pub fn from_four_bit(weight: FourBit) -> BaseWeight {
        let state = *weight.state();
        BaseWeight { rows: state.rows, cols: state.cols, storage: Storage::FourBit(weight), on_device: None }
    }

    /// A weight in LLM.int8.
    pub fn from_int8(weight: Int8) -> BaseWeight {
        BaseWeight {
            rows: weight.rows(),
            cols: weight.cols(),
            storage: Storage::Int8(weight),
            on_device: None,
        }
    }

    /// Output features, N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features, K.
    pub fn cols(&self) -> usize {
        self.cols
    }

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
        let bytes = (self.rows + rank) * (self.cols + padding) * crate::tensor::Dtype::Bf16.size();
        match (device, &mut self.on_device) {
            (Device::Cuda(cuda), Some(on_device)) => {
                let on_device = Arc::get_mut(on_device).expect("a weight that is not shared yet");
                on_device.copy = Some(copy::Copy::new(cuda.alloc(bytes)?, adapted));
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

    fn copy(&self) -> Option<&copy::Copy> {
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

    /// The address and stride of the bf16 copy, where its rows are scaled by the row scale of now.
    pub(crate) fn scaled_copy(&self) -> Option<(u64, usize)> {
        self.copy()?.scaled(self.cols)
    }

    /// Address of the rows on the device, where they are bf16 already and nothing is multiplied in.
    pub(crate) fn dense_bf16(&self) -> Option<u64> {
        let device = self.device()?;
        let plain = device.weight_type() == WeightType::Ggml(GgmlType::BF16) && device.factor() == 1.0;
        (plain && self.cols.is_multiple_of(device::GROUP)).then(|| device.address(device.layout().planes[0]))
    }

    /// The columns of the bf16 copy on a device that a branch of this rank lies in, if its rows stay as they are: whoever
    /// changes the branch writes it there, too.
    pub fn branch_in_copy(&self, rank: usize) -> Option<ViewMut<'_>> {
        let on_device = self.on_device.as_ref()?;
        let (ptr, stride) = on_device.copy.as_ref()?.branch(self.cols)?;
        let dtype = crate::tensor::Dtype::Bf16;
        let matrix = Matrix { ptr, rows: self.rows, cols: rank, stride, dtype };
        Some(ViewMut::on_cuda(on_device.packed.cuda(), matrix))
    }

    /// Rows below those of the bf16 copy on a device for the first factor of an adapter of this rank, where the copy was
    /// in use before: whoever changes the factor writes it there, too, and says so ([`BaseWeight::set_filled`]).
    pub fn rows_below_copy(&self, rank: usize) -> Option<ViewMut<'_>> {
        let (ptr, stride) = self.copy()?.below(self.rows, self.cols, rank)?;
        let matrix = Matrix { ptr, rows: rank, cols: self.cols, stride, dtype: crate::tensor::Dtype::Bf16 };
        Some(ViewMut::on_cuda(self.on_device.as_ref()?.packed.cuda(), matrix))
    }

    /// Says that the factor of now lies in [`BaseWeight::rows_below_copy`].
    pub fn set_filled(&self) {
        if let Some(copy) = self.copy() {
            copy.set_filled(true);
        }
    }

    /// Says that the adapter's parts of the copy were made anew, where they are in [`BaseWeight::branch_in_copy`] and
    /// [`BaseWeight::rows_below_copy`]; otherwise that they have to be.
    pub fn set_refreshed(&self, rank: usize) {
        let Some(copy) = self.copy() else { return };
        copy.set_fresh(copy.branch(self.cols).is_some());
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
        self.copy().is_none_or(copy::Copy::is_fresh)
    }

    /// How the rows are stored.
    pub fn weight_type(&self) -> WeightType {
        match &self.storage {
            Storage::Ggml { dtype, .. } => WeightType::Ggml(*dtype),
            Storage::FourBit(weight) => {
                WeightType::FourBit { quant_type: weight.state().quant_type, double: weight.is_double() }
            }
            Storage::Int8(_) => WeightType::Int8,
        }
    }

    /// The storage type as its format calls it: `Q4_K`, `nf4-dq`.
    pub fn type_name(&self) -> &'static str {
        self.weight_type().name()
    }

    /// Bytes of the packed rows.
    pub fn size_bytes(&self) -> usize {
        match &self.storage {
            Storage::Ggml { bytes, .. } => bytes.len(),
            Storage::FourBit(weight) => weight.size_bytes(),
            Storage::Int8(weight) => weight.size_bytes(),
        }
    }

    /// Elements of a row that share a scale; tiles start and end at a multiple of it.
    pub fn block_len(&self) -> usize {
        match &self.storage {
            Storage::Ggml { dtype, .. } => dtype.block_len(),
            Storage::FourBit(weight) => four_bit::block_len(weight),
            Storage::Int8(_) => 1,
        }
    }

    /// The ggml type and its bytes, for writing files; `None` when stored otherwise. The values are those of
    /// the bytes times [`BaseWeight::factor`].
    pub fn ggml(&self) -> Option<(GgmlType, &Bytes)> {
        match &self.storage {
            Storage::Ggml { dtype, bytes, .. } => Some((*dtype, bytes)),
            Storage::FourBit(_) | Storage::Int8(_) => None,
        }
    }

    /// The tensors that store the weight in a safetensors folder under `name`; `None` for ggml blocks,
    /// which such a folder cannot hold.
    pub fn tensors(&self, name: &str) -> Option<Vec<TensorView>> {
        match &self.storage {
            Storage::Ggml { dtype, bytes, factor } => {
                let dtype = match dtype {
                    _ if *factor != 1.0 => return None,
                    GgmlType::F32 => Dtype::F32,
                    GgmlType::F16 => Dtype::F16,
                    GgmlType::BF16 => Dtype::BF16,
                    _ => return None,
                };
                let shape = vec![self.rows, self.cols];
                Some(vec![TensorView { name: name.to_owned(), dtype, shape, bytes: bytes.clone() }])
            }
            Storage::FourBit(weight) => Some(weight.tensors(name)),
            Storage::Int8(weight) => Some(weight.tensors(name)),
        }
    }

    /// Some rows as f32, one after another; on the calling thread.
    ///
    /// # Panics
    /// The rows lie outside of the weight, or `out` does not hold them.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert_eq!(out.len(), rows.len() * self.cols, "{} rows of {}", rows.len(), self.cols);
        match &self.storage {
            Storage::Ggml { dtype, bytes, factor } => {
                ggml::rows(*dtype, bytes, self.cols, rows, out);
                multiply(out, *factor);
            }
            Storage::FourBit(weight) => four_bit::range(weight, rows.start * self.cols, out),
            Storage::Int8(weight) => int8::tile(weight, rows, 0..self.cols, out),
        }
    }

    /// Some columns of some rows as f32, row by row; on the calling thread.
    ///
    /// # Panics
    /// The tile lies outside of the weight, `cols` splits a block, or `out` does not hold the tile.
    pub fn dequantize_tile(&self, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        assert_eq!(out.len(), rows.len() * cols.len(), "a {} x {} tile", rows.len(), cols.len());
        let block_len = self.block_len();
        assert!(
            cols.start.is_multiple_of(block_len) && cols.end.is_multiple_of(block_len),
            "columns {cols:?} split a block of {block_len}"
        );
        if cols.is_empty() {
            return;
        }
        match &self.storage {
            Storage::Ggml { dtype, bytes, factor } => {
                ggml::tile(*dtype, bytes, self.cols, rows, cols, out);
                multiply(out, *factor);
            }
            Storage::FourBit(weight) => four_bit::tile(weight, rows, cols, out),
            Storage::Int8(weight) => int8::tile(weight, rows, cols, out),
        }
    }

    /// The whole weight as f32, in parallel. N x K x 4 bytes: for tests and the SVD, never in a step.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        out.par_chunks_mut(ROWS_PER_TASK * self.cols.max(1)).enumerate().for_each(|(i, chunk)| {
            let start = i * ROWS_PER_TASK;
            self.dequantize_rows(start..(start + ROWS_PER_TASK).min(self.rows), chunk);
        });
        out
    }

    /// Other values in the same type and shape, rounded to it row by row, in parallel.
    ///
    /// # Errors
    /// `values` has another length; values cannot be written in the type; an element is not finite (the first one is named).
    pub fn requantize(&self, values: &[f32]) -> Result<BaseWeight> {
        check("requantize", "elements", self.rows * self.cols, values.len())?;
        let factor = self.factor();
        if let Some(at) = first_not_finite(values, factor) {
            return Err(Error::NotFinite {
                op: "requantize",
                row: at / self.cols,
                col: at % self.cols,
                value: values[at] / factor,
            });
        }
        let storage = match &self.storage {
            Storage::Ggml { dtype, .. } => {
                let bytes = ggml::quantize(*dtype, self.cols, values, factor)?;
                Storage::Ggml { dtype: *dtype, bytes, factor }
            }
            Storage::FourBit(weight) => {
                Storage::FourBit(four_bit::quantize(*weight.state(), weight.is_double(), values))
            }
            Storage::Int8(_) => Storage::Int8(Int8::quantize(self.cols, values)),
        };
        Ok(BaseWeight { rows: self.rows, cols: self.cols, storage, on_device: None })
    }

    /// NF4 and FP4.
    pub(crate) fn four_bit(&self) -> Option<&FourBit> {
        match &self.storage {
            Storage::FourBit(weight) => Some(weight),
            Storage::Ggml { .. } | Storage::Int8(_) => None,
        }
    }

    /// The same values in another type, rounded to it, in parallel.
    ///
    /// # Errors
    /// Rows are not whole blocks of the type, values cannot be written in it, or one is not finite.
    pub fn quantized(&self, to: WeightType) -> Result<BaseWeight> {
        self.quantized_from(to, self.element_type())
    }

    /// As [`BaseWeight::quantized`], as if the elements had been of `dtype` (F32, F16 or BF16): dequantized
    /// 4-bit values are rounded to it.
    ///
    /// # Errors
    /// See [`BaseWeight::quantized`].
    pub fn quantized_from(&self, to: WeightType, dtype: Dtype) -> Result<BaseWeight> {
        let zeros = to.empty(self.rows, self.cols, dtype)?;
        zeros.requantize(&self.dequantize())
    }

    /// A weight of this shape in another type whose values do not matter, to be requantized; itself where that is
    /// its type. A factor that a file keeps beside the blocks stays.
    ///
    /// # Errors
    /// Rows are not whole blocks of the type.
    pub fn retyped(&self, to: WeightType) -> Result<BaseWeight> {
        if to == self.weight_type() {
            return Ok(self.clone());
        }
        let empty = to.empty(self.rows, self.cols, self.element_type())?;
        Ok(if matches!(to, WeightType::Ggml(_)) { empty.scaled_by(self.factor()) } else { empty })
    }

    /// The type of the elements that were stored or quantized: F32, F16 or BF16.
    pub fn element_type(&self) -> Dtype {
        match &self.storage {
            Storage::Ggml { dtype: GgmlType::BF16, .. } => Dtype::BF16,
            Storage::Ggml { dtype: GgmlType::F16, .. } | Storage::Int8(_) => Dtype::F16,
            Storage::Ggml { .. } => Dtype::F32,
            Storage::FourBit(weight) => weight.state().dtype,
        }
    }

    /// `out_n = Σ_k W_nk²`, the squared length of every row; constant, so the caller keeps it.
    ///
    /// `Shapes`: out (1, N). `Accumulates`: `out =`. `Precision`: summed in f64, rounded once.
    ///
    /// # Errors
    /// `out` has another shape or lives on another device.
    pub fn row_norms_squared(&self, out: ViewMut<'_>) -> Result<()> {
        const OP: &str = "row_norms_squared";
        check(OP, "rows of out", 1, out.rows)?;
        check(OP, "columns of out", self.rows, out.cols)?;
        out.cpu(OP)?.par_chunks_mut(ROWS_PER_TASK).enumerate().for_each(|(i, out)| {
            let start = i * ROWS_PER_TASK;
            with_scratch(out.len() * self.cols, |tile| {
                self.dequantize_rows(start..start + out.len(), tile);
                for (r, out) in out.iter_mut().enumerate() {
                    *out = sum_of_squares(&tile[r * self.cols..][..self.cols]) as f32;
                }
            });
        });
        Ok(())
    }
}

/// The first element that is not finite over `factor`; whole chunks are looked at, so that the loop is vectorized.
fn first_not_finite(values: &[f32], factor: f32) -> Option<usize> {
    const CHUNK: usize = 1 << 14;
    let is_bad = |x: &f32| !(x / factor).is_finite();
    let bad = |chunk: &[f32]| chunk.iter().map(|x| u32::from(is_bad(x))).sum::<u32>() > 0;
    let start = CHUNK * values.par_chunks(CHUNK).position_first(bad)?;
    values[start..].iter().position(is_bad).map(|at| start + at)
}

/// `out *= factor`
fn multiply(out: &mut [f32], factor: f32) {
    if factor != 1.0 {
        for x in out {
            *x *= factor;
        }
    }
}

by_isa! {
    /// Σ x² in f64, in eight interleaved sums that the compiler can keep in vector registers.
    pub(crate) fn sum_of_squares(x: &[f32]) -> f64 {
        let mut sums = [0.0f64; 8];
        let chunks = x.chunks_exact(8);
        let rest: f64 = chunks.remainder().iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        for chunk in chunks {
            for (sum, &x) in sums.iter_mut().zip(chunk) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        sums.iter().sum::<f64>() + rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Mat;

    fn zeros(dtype: GgmlType, rows: usize, cols: usize) -> BaseWeight {
        BaseWeight::from_ggml(dtype, rows, cols, Bytes::from(vec![0; rows * dtype.row_bytes(cols).unwrap()]))
            .unwrap()
    }

    #[test]
    fn rows_and_tiles_of_every_type_are_parts_of_the_whole() {
        for dtype in GgmlType::writable() {
            let (rows, cols) = (37, 768);
            let weight =
                zeros(dtype, rows, cols).requantize(&Mat::random(1, rows, cols, 1.0).values()).unwrap();
            let whole = weight.dequantize();
            let mut out = vec![f32::NAN; 3 * cols];
            weight.dequantize_rows(34..37, &mut out);
            assert_eq!(out, whole[34 * cols..], "{dtype}");
            let mut out = vec![f32::NAN; 5 * 256];
            weight.dequantize_tile(7..12, 256..512, &mut out);
            for (r, tile) in out.chunks(256).enumerate() {
                assert_eq!(tile, &whole[(7 + r) * cols + 256..][..256], "{dtype} row {r}");
            }
            assert_eq!(weight.type_name(), dtype.name());
            assert_eq!(weight.block_len(), dtype.block_len());
            assert_eq!(weight.size_bytes(), rows * dtype.row_bytes(cols).unwrap());
        }
    }

    #[test]
    fn values_on_the_grid_of_a_type_requantize_to_themselves() {
        // The symmetric types with one scale per block reproduce their own grid exactly.
        for dtype in [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q4_0, GgmlType::Q8_0] {
            let weight = zeros(dtype, 5, 64).requantize(&Mat::random(1, 5, 64, 1.0).values()).unwrap();
            let again = weight.requantize(&weight.dequantize()).unwrap();
            assert_eq!(again.dequantize(), weight.dequantize(), "{dtype}");
        }
    }

    #[test]
    fn a_factor_multiplies_what_is_read_and_divides_what_is_written() {
        for (dtype, factor) in [(GgmlType::NVFP4, 0.25), (GgmlType::Q8_0, -3.0)] {
            let values = Mat::random(1, 6, 128, 1.0).values();
            let plain = zeros(dtype, 6, 128).requantize(&values).unwrap();
            let scaled = plain.clone().scaled_by(factor);
            let expected: Vec<f32> = plain.dequantize().iter().map(|x| x * factor).collect();
            assert_eq!(scaled.dequantize(), expected, "{dtype}");
            let mut tile = vec![f32::NAN; 2 * 64];
            scaled.dequantize_tile(3..5, 64..128, &mut tile);
            assert_eq!(tile[64..], expected[4 * 128 + 64..5 * 128], "{dtype}");

            let values: Vec<f32> = values.iter().map(|x| x * factor).collect();
            let again = scaled.requantize(&values).unwrap();
            assert_eq!(again.factor(), factor);
            assert_eq!(again.ggml().unwrap().1[..], plain.ggml().unwrap().1[..], "{dtype}");
        }
        let scaled = zeros(GgmlType::NVFP4, 6, 128).scaled_by(0.25);
        let bf16 =
            scaled.retyped(WeightType::Ggml(GgmlType::BF16)).unwrap().requantize(&[3.0; 6 * 128]).unwrap();
        assert_eq!((bf16.factor(), bf16.dequantize()[0]), (0.25, 3.0), "the factor goes on in another type");
        let tiny = zeros(GgmlType::NVFP4, 1, 64).scaled_by(1e-38);
        let error = tiny.requantize(&[1e4; 64]).unwrap_err().to_string();
        assert_eq!(error, "requantize: row 0, column 0 is `inf`, expected a finite number");
    }

    #[test]
    fn row_norms_are_summed_in_f64() {
        let weight = BaseWeight::from_f32(40, 129, &Mat::random(3, 40, 129, 100.0).values()).unwrap();
        let mut out = Mat::poisoned(1, 40);
        weight.row_norms_squared(out.view_mut()).unwrap();
        for (row, found) in weight.dequantize().chunks(129).zip(out.values()) {
            let expected: f64 = row.iter().map(|&x| x as f64 * x as f64).sum();
            assert!((found as f64 - expected).abs() <= expected * 6e-8, "{found} for {expected}");
        }
    }

    #[test]
    fn a_size_that_does_not_fit_the_shape_is_refused() {
        let error = |dtype, rows, cols, bytes: usize| {
            BaseWeight::from_ggml(dtype, rows, cols, Bytes::from(vec![0; bytes])).unwrap_err().to_string()
        };
        assert_eq!(error(GgmlType::Q8_0, 2, 64, 135), "weight: size in bytes is 135, expected 136");
        assert!(error(GgmlType::Q8_0, 2, 63, 0).contains("63 is not a multiple of the Q8_0 block length 32"));
        assert!(error(GgmlType::F32, usize::MAX, 64, 4).starts_with("weight: size in bytes is 4, expected "));
        assert_eq!(
            BaseWeight::from_f32(2, 3, &[0.0; 5]).unwrap_err().to_string(),
            "weight: size in bytes is 20, expected 24"
        );
    }

    #[test]
    fn requantize_names_the_first_element_that_is_not_finite() {
        let weight = zeros(GgmlType::Q4_0, 2, 32);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = vec![1.0; 64];
            values[32 + 5] = bad;
            values[32 + 9] = bad;
            assert_eq!(
                weight.requantize(&values).unwrap_err().to_string(),
                format!("requantize: row 1, column 5 is `{bad}`, expected a finite number")
            );
        }
        let weight = zeros(GgmlType::Q4_0, 700, 64);
        let mut values = vec![1.0; 700 * 64];
        for row in [699, 601, 600] {
            values[row * 64 + 7] = f32::NAN;
            let error = weight.requantize(&values).unwrap_err().to_string();
            assert_eq!(error, format!("requantize: row {row}, column 7 is `NaN`, expected a finite number"));
        }
        let weight = zeros(GgmlType::Q4_0, 2, 32);
        let error = weight.requantize(&[0.0; 63]).unwrap_err().to_string();
        assert_eq!(error, "requantize: elements is 63, expected 64");
    }
}
