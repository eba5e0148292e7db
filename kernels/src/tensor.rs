//! Tensors: a matrix on a device, and borrowed row-strided views of it.
//!
//! Two dimensions are enough for a decoder: activations are (tokens, channels) with the sequences of
//! a batch laid end to end, weights are (out, in), vectors are one row. Ops take [`View`]s, so that a
//! buffer allocated once for the largest batch serves every smaller one ([`Tensor::top`]), one flat
//! parameter buffer serves every adapter matrix ([`View::reshaped`]), and a padded row (the CUDA
//! linear appends adapter columns to its operands) is only a larger `stride`.
//!
//! The CPU computes in f32. On CUDA activations are bf16 ([`Tensor::activations`]); statistics, parameters
//! and their gradients stay f32 ([`Tensor::zeros`]).

mod view;
mod view_mut;

use cudarc::cublaslt::sys::cudaDataType_t;

pub use view::View;
pub use view_mut::ViewMut;

use self::view::{Data, OnCuda};
use self::view_mut::DataMut;
use crate::cuda::Buffer;
use crate::device::Device;
use crate::error::{Error, Result};

/// The type of a tensor's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// Everything on the CPU; statistics and parameters on CUDA.
    F32,
    /// Activations on CUDA: the upper half of an f32.
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }

    /// What cuBLASLt calls it.
    pub(crate) const fn cuda(self) -> cudaDataType_t {
        match self {
            Dtype::F32 => cudaDataType_t::CUDA_R_32F,
            Dtype::Bf16 => cudaDataType_t::CUDA_R_16BF,
        }
    }
}

/// An owned row-major matrix. Allocated once; the step loop only borrows it.
#[derive(Debug)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    /// Elements between the starts of two rows.
    stride: usize,
    dtype: Dtype,
    device: Device,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Cpu(Vec<f32>),
    /// The buffer, and the byte in it at which the first row starts.
    Cuda(Buffer, usize),
    Meta,
}

impl Tensor {
    /// A (rows, cols) matrix of f32 zeros on `device`.
    ///
    /// # Errors
    /// The size overflows or the device is out of memory.
    pub fn zeros(device: &Device, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::of(device, Dtype::F32, rows, cols, 0)
    }

    /// A (rows, cols) matrix of zeros of the type that activations have on `device`.
    ///
    /// # Errors
    /// The size overflows or the device is out of memory.
    pub fn activations(device: &Device, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::of(device, device.activation_dtype(), rows, cols, 0)
    }

    /// Activations (rows, cols), and further ones with as many rows and these widths.
    ///
    /// On CUDA the further ones lie side by side in the padding behind the rows of the first, so that one matrix
    /// product reads them together ([`quant_linear`](crate::ops::quant_linear)); the padding is a multiple of
    /// [`PADDING`] columns and zero where nothing lies. On the CPU they are separate.
    ///
    /// # Errors
    /// The size overflows or the device is out of memory.
    pub fn with_padding(
        device: &Device,
        rows: usize,
        cols: usize,
        widths: &[usize],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let dtype = device.activation_dtype();
        if let Device::Cpu = device {
            let more = widths.iter().map(|&width| Tensor::of(device, dtype, rows, width, 0));
            return Ok((Tensor::of(device, dtype, rows, cols, 0)?, more.collect::<Result<_>>()?));
        }
        // The next row starts aligned, too.
        let first = Tensor::of(device, dtype, rows, cols, padding(cols, widths))?;
        let mut at = cols;
        let mut more = Vec::new();
        for &width in widths {
            let storage = match &first.storage {
                Storage::Cuda(buffer, start) => Storage::Cuda(buffer.clone(), start + at * dtype.size()),
                Storage::Meta => Storage::Meta,
                Storage::Cpu(_) => unreachable!("the device is not the CPU"),
            };
            more.push(Tensor { rows, cols: width, device: device.clone(), storage, ..first });
            at += width;
        }
        Ok((first, more))
    }

    fn of(device: &Device, dtype: Dtype, rows: usize, cols: usize, padding: usize) -> Result<Tensor> {
        let refuse = |reason| Error::Device { device: device.to_string(), reason };
        let stride = cols + padding;
        let len =
            rows.checked_mul(stride).ok_or_else(|| refuse(format!("a {rows} x {cols} tensor overflows")))?;
        let storage = match device {
            Device::Cpu => Storage::Cpu(vec![0.0; len]),
            Device::Cuda(cuda) => {
                let buffer = cuda.alloc(len * dtype.size())?;
                cuda.zero(buffer.ptr(), buffer.bytes())?;
                Storage::Cuda(buffer, 0)
            }
            Device::Meta(meter) => {
                meter.add(len * dtype.size());
                Storage::Meta
            }
        };
        Ok(Tensor { rows, cols, stride, dtype, device: device.clone(), storage })
    }

    /// A (rows, cols) matrix of f32 with these values, row by row.
    ///
    /// # Errors
    /// `values` does not hold rows x cols elements, or the device refuses.
    pub fn from_slice(device: &Device, rows: usize, cols: usize, values: &[f32]) -> Result<Tensor> {
        crate::error::check("tensor", "values", rows * cols, values.len())?;
        let mut tensor = Tensor::zeros(device, rows, cols)?;
        tensor.write(values)?;
        Ok(tensor)
    }

    /// Another tensor over the same memory, on a device: for a kernel that may write where it reads. `None` on the
    /// CPU, where every tensor has its own.
    pub fn in_place(&self) -> Option<Tensor> {
        let storage = match &self.storage {
            Storage::Cpu(_) => return None,
            Storage::Cuda(buffer, start) => Storage::Cuda(buffer.clone(), *start),
            Storage::Meta => Storage::Meta,
        };
        Some(Tensor { device: self.device.clone(), storage, ..*self })
    }

    /// Overwrites all elements from host memory, rounded to the tensor's type.
    ///
    /// # Errors
    /// The length differs, or the device refuses.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        crate::error::check("tensor write", "values", self.len(), values.len())?;
        match (&mut self.storage, &self.device) {
            (Storage::Cpu(data), _) => data.copy_from_slice(values),
            (Storage::Cuda(buffer, start), Device::Cuda(cuda)) => {
                let start = buffer.ptr() + *start as u64;
                let bytes = encode(values, self.dtype);
                if self.stride == self.cols {
                    return cuda.write(start, &bytes);
                }
                let (row, pitch) = (self.cols * self.dtype.size(), self.stride * self.dtype.size());
                for (i, row) in bytes.chunks_exact(row.max(1)).enumerate() {
                    cuda.write(start + (i * pitch) as u64, row)?;
                }
            }
            (Storage::Meta, _) => {}
            (Storage::Cuda(..), _) => unreachable!("storage and device are set together"),
        }
        Ok(())
    }

    /// Copies all elements to host memory as f32. On CUDA this waits for the stream.
    ///
    /// # Errors
    /// The device refuses.
    pub fn read(&self) -> Result<Vec<f32>> {
        self.view().read()
    }

    /// Rows allocated.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// rows x cols.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all elements.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Where the elements live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The whole matrix.
    pub fn view(&self) -> View<'_> {
        let data = match &self.storage {
            Storage::Cpu(data) => Data::Cpu(data),
            Storage::Cuda(..) => Data::Cuda(self.on_cuda()),
            Storage::Meta => Data::Meta,
        };
        View { rows: self.rows, cols: self.cols, stride: self.stride, data }
    }

    /// The whole matrix, to write to.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let (rows, cols, stride) = (self.rows, self.cols, self.stride);
        let data = match self.storage {
            Storage::Cuda(..) => DataMut::Cuda(self.on_cuda()),
            Storage::Meta => DataMut::Meta,
            Storage::Cpu(ref mut data) => DataMut::Cpu(data),
        };
        ViewMut { rows, cols, stride, data }
    }

    fn on_cuda(&self) -> OnCuda<'_> {
        match (&self.storage, &self.device) {
            (Storage::Cuda(buffer, start), Device::Cuda(cuda)) => {
                OnCuda { cuda, ptr: buffer.ptr() + *start as u64, dtype: self.dtype }
            }
            _ => unreachable!("called for tensors on CUDA only"),
        }
    }

    /// The first `rows` rows: a batch smaller than the buffer.
    pub fn top(&self, rows: usize) -> View<'_> {
        self.view().row_range(0, rows)
    }

    /// The first `rows` rows, to write to.
    pub fn top_mut(&mut self, rows: usize) -> ViewMut<'_> {
        self.view_mut().into_row_range(0, rows)
    }
}

/// Columns of padding that a product is fastest with: the depth of its tiles.
pub const PADDING: usize = 64;

/// Columns of padding behind rows of `cols` that hold matrices of these widths on a device.
pub fn padding(cols: usize, widths: &[usize]) -> usize {
    let used: usize = widths.iter().sum();
    if used == 0 { 0 } else { (cols + used).next_multiple_of(PADDING) - cols }
}

/// The bytes of `values` in another type, rounded to nearest.
fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Dtype::Bf16 => values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_cover_rows_and_slices_of_a_flat_buffer() {
        let values: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let mut tensor = Tensor::from_slice(&Device::Cpu, 4, 3, &values).unwrap();
        assert_eq!(tensor.top(2).cpu("test").unwrap(), &values[..6]);
        assert_eq!(tensor.view().row_range(1, 2).cpu("test").unwrap(), &values[3..9]);
        assert_eq!(tensor.view().slice(4, 2, 4).cpu("test").unwrap(), &values[4..12]);
        tensor.view_mut().into_slice(4, 1, 2).cpu("test").unwrap().fill(0.0);
        assert_eq!(tensor.read().unwrap()[3..7], [3.0, 0.0, 0.0, 6.0]);
        assert!(tensor.top(0).cpu("test").unwrap().is_empty());
        let columns = tensor.view().column_range(1, 2);
        assert_eq!((columns.rows, columns.cols, columns.stride), (4, 2, 3));
        assert_eq!(columns.cpu("test").unwrap().len(), 11);
    }
}
