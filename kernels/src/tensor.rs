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

use std::sync::Arc;

use cudarc::cublaslt::sys::cudaDataType_t;

use crate::cuda::gemm::Matrix;
use crate::cuda::{Buffer, Cuda};
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

/// A borrowed matrix: element (i, j) is `data[i * stride + j]`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Rows (tokens, output features).
    pub rows: usize,
    /// Columns (channels, input features).
    pub cols: usize,
    /// Elements between the starts of two rows; at least `cols`.
    pub stride: usize,
    data: Data<'a>,
}

/// A mutably borrowed matrix: element (i, j) is `data[i * stride + j]`.
#[derive(Debug)]
pub struct ViewMut<'a> {
    /// Rows (tokens, output features).
    pub rows: usize,
    /// Columns (channels, input features).
    pub cols: usize,
    /// Elements between the starts of two rows; at least `cols`.
    pub stride: usize,
    data: DataMut<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Data<'a> {
    Cpu(&'a [f32]),
    Cuda(OnCuda<'a>),
    Meta,
}

#[derive(Debug)]
enum DataMut<'a> {
    Cpu(&'a mut [f32]),
    Cuda(OnCuda<'a>),
    Meta,
}

/// Where a view on a device starts.
#[derive(Debug, Clone, Copy)]
struct OnCuda<'a> {
    cuda: &'a Arc<Cuda>,
    ptr: u64,
    dtype: Dtype,
}

impl<'a> OnCuda<'a> {
    fn at(self, elements: usize) -> OnCuda<'a> {
        OnCuda { ptr: self.ptr + (elements * self.dtype.size()) as u64, ..self }
    }

    fn expect(self, op: &'static str, dtype: Dtype) -> Result<u64> {
        if self.dtype == dtype {
            return Ok(self.ptr);
        }
        Err(Error::NoKernel { op, device: format!("{} with {:?} elements", self.cuda.name(), self.dtype) })
    }
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

fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::Bf16 => {
            bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
    }
}

impl<'a> View<'a> {
    /// A host matrix over a contiguous slice.
    ///
    /// # Panics
    /// `data` does not hold rows x cols elements.
    pub fn from_slice(data: &'a [f32], rows: usize, cols: usize) -> View<'a> {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} view");
        View { rows, cols, stride: cols, data: Data::Cpu(data) }
    }

    /// Rows `start..start + rows`.
    ///
    /// # Panics
    /// The range lies outside of the view.
    #[must_use]
    pub fn row_range(self, start: usize, rows: usize) -> View<'a> {
        assert!(start + rows <= self.rows, "rows {start}..{} of {}", start + rows, self.rows);
        let data = match self.data {
            Data::Cpu(data) => Data::Cpu(&data[span(start, rows, self.cols, self.stride)]),
            Data::Cuda(data) => Data::Cuda(data.at(start * self.stride)),
            Data::Meta => Data::Meta,
        };
        View { rows, data, ..self }
    }

    /// The same elements of a contiguous view as another shape.
    ///
    /// # Panics
    /// The view has gaps or another number of elements.
    #[must_use]
    pub fn reshaped(self, rows: usize, cols: usize) -> View<'a> {
        assert!(
            self.stride == self.cols && self.rows * self.cols == rows * cols,
            "reshape to {rows} x {cols}"
        );
        View { rows, cols, stride: cols, data: self.data }
    }

    /// `len` elements of a contiguous view from `start` on, as (rows, cols): one matrix of a flat buffer.
    ///
    /// # Panics
    /// The view has gaps or ends before.
    #[must_use]
    pub fn slice(self, start: usize, rows: usize, cols: usize) -> View<'a> {
        assert!(self.stride == self.cols, "a slice of a view with gaps");
        self.reshaped(1, self.rows * self.cols).column_range(start, rows * cols).with_shape(rows, cols)
    }

    fn with_shape(self, rows: usize, cols: usize) -> View<'a> {
        View { rows, cols, stride: cols, data: self.data }
    }

    /// Columns `start..start + cols` of every row; the stride stays.
    ///
    /// # Panics
    /// The range lies outside of the view.
    #[must_use]
    pub fn column_range(self, start: usize, cols: usize) -> View<'a> {
        assert!(start + cols <= self.cols, "columns {start}..{} of {}", start + cols, self.cols);
        let data = match self.data {
            Data::Cpu(data) if self.rows > 0 => {
                Data::Cpu(&data[start..start + (self.rows - 1) * self.stride + cols])
            }
            Data::Cuda(data) => Data::Cuda(data.at(start)),
            other => other,
        };
        View { cols, data, ..self }
    }

    /// Both as one, if on a device every row of `right` lies right behind that of this view.
    pub fn joined(self, right: View<'a>) -> Option<View<'a>> {
        let (Data::Cuda(left), Data::Cuda(data)) = (self.data, right.data) else { return None };
        let adjacent = self.rows == right.rows
            && self.stride == right.stride
            && left.dtype == data.dtype
            && left.at(self.cols).ptr == data.ptr
            && self.cols + right.cols <= self.stride;
        adjacent.then_some(View { cols: self.cols + right.cols, ..self })
    }

    /// The elements in host memory (rows `stride` apart; the last row ends the slice).
    ///
    /// # Errors
    /// [`Error::NoKernel`]: the view is on another device, which `op` does not serve.
    pub fn cpu(self, op: &'static str) -> Result<&'a [f32]> {
        match self.data {
            Data::Cpu(data) => Ok(data),
            Data::Cuda(data) => Err(Error::NoKernel { op, device: data.cuda.name() }),
            Data::Meta => Err(Error::NoKernel { op, device: "meta".to_owned() }),
        }
    }

    /// The device, if the elements are on one.
    pub fn cuda(&self) -> Option<&'a Arc<Cuda>> {
        match self.data {
            Data::Cpu(_) | Data::Meta => None,
            Data::Cuda(data) => Some(data.cuda),
        }
    }

    /// Address of the first element, a bf16 on a device.
    ///
    /// # Errors
    /// [`Error::NoKernel`]: `op` serves no other elements and no other place.
    pub fn bf16(&self, op: &'static str) -> Result<u64> {
        self.address(op, Dtype::Bf16)
    }

    /// Address of the first element, an f32 on a device.
    ///
    /// # Errors
    /// [`Error::NoKernel`]: `op` serves no other elements and no other place.
    pub fn f32(&self, op: &'static str) -> Result<u64> {
        self.address(op, Dtype::F32)
    }

    fn address(&self, op: &'static str, dtype: Dtype) -> Result<u64> {
        match self.data {
            Data::Cpu(_) | Data::Meta => {
                Err(Error::NoKernel { op, device: "cpu beside operands on CUDA".to_owned() })
            }
            Data::Cuda(data) => data.expect(op, dtype),
        }
    }

    /// As an operand of a matrix product on a device.
    ///
    /// # Errors
    /// [`Error::NoKernel`]: the elements are in host memory.
    pub fn matrix(&self, op: &'static str) -> Result<Matrix> {
        match self.data {
            Data::Cpu(_) | Data::Meta => {
                Err(Error::NoKernel { op, device: "cpu beside operands on CUDA".to_owned() })
            }
            Data::Cuda(OnCuda { ptr, dtype, .. }) => {
                Ok(Matrix { ptr, rows: self.rows, cols: self.cols, stride: self.stride, dtype })
            }
        }
    }

    /// Copies the elements to host memory as f32, row by row. On CUDA this waits for the stream.
    ///
    /// # Errors
    /// The device refuses.
    pub fn read(&self) -> Result<Vec<f32>> {
        if self.rows == 0 || self.cols == 0 {
            return Ok(Vec::new());
        }
        let spanned = (self.rows - 1) * self.stride + self.cols;
        let copied;
        let elements = match self.data {
            Data::Cpu(data) => data,
            Data::Meta => return Err(Error::NoKernel { op: "read", device: "meta".to_owned() }),
            Data::Cuda(data) => {
                let mut bytes = vec![0; spanned * data.dtype.size()];
                data.cuda.read(data.ptr, &mut bytes)?;
                copied = decode(&bytes, data.dtype);
                &copied
            }
        };
        Ok(elements.chunks(self.stride).flat_map(|row| &row[..self.cols]).copied().collect())
    }
}

impl<'a> ViewMut<'a> {
    /// A host matrix over a contiguous slice.
    ///
    /// # Panics
    /// `data` does not hold rows x cols elements.
    pub fn from_slice(data: &'a mut [f32], rows: usize, cols: usize) -> ViewMut<'a> {
        assert_eq!(data.len(), rows * cols, "a {rows} x {cols} view");
        ViewMut { rows, cols, stride: cols, data: DataMut::Cpu(data) }
    }

    /// A matrix in scratch memory of a device.
    pub(crate) fn on_cuda(cuda: &'a Arc<Cuda>, matrix: Matrix) -> ViewMut<'a> {
        let Matrix { ptr, rows, cols, stride, dtype } = matrix;
        ViewMut { rows, cols, stride, data: DataMut::Cuda(OnCuda { cuda, ptr, dtype }) }
    }

    /// The same view for a shorter time, so that it can be passed on and used again.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        let data = match &mut self.data {
            DataMut::Cpu(data) => DataMut::Cpu(data),
            DataMut::Cuda(data) => DataMut::Cuda(*data),
            DataMut::Meta => DataMut::Meta,
        };
        ViewMut { rows: self.rows, cols: self.cols, stride: self.stride, data }
    }

    /// The view to read from.
    pub fn as_view(&self) -> View<'_> {
        let data = match &self.data {
            DataMut::Cpu(data) => Data::Cpu(data),
            DataMut::Cuda(data) => Data::Cuda(*data),
            DataMut::Meta => Data::Meta,
        };
        View { rows: self.rows, cols: self.cols, stride: self.stride, data }
    }

    /// Sets every element to zero.
    ///
    /// # Errors
    /// The device refuses.
    pub fn zero(self, op: &'static str) -> Result<()> {
        let (cols, stride) = (self.cols, self.stride.max(1));
        if let DataMut::Cuda(data) = &self.data {
            let size = data.dtype.size();
            return data.cuda.zero_rows(data.ptr, stride * size, cols * size, self.rows);
        }
        self.cpu(op)?.chunks_mut(stride).for_each(|row| row[..cols].fill(0.0));
        Ok(())
    }

    /// Both as one, to write to; see [`View::joined`].
    #[expect(clippy::needless_pass_by_value, reason = "the joined view writes to what `right` borrows")]
    pub fn joined(self, right: ViewMut<'a>) -> Option<ViewMut<'a>> {
        let View { rows, cols, stride, .. } = self.as_view().joined(right.as_view())?;
        Some(ViewMut { rows, cols, stride, data: self.data })
    }

    /// Rows `start..start + rows`.
    ///
    /// # Panics
    /// The range lies outside of the view.
    #[must_use]
    pub fn into_row_range(self, start: usize, rows: usize) -> ViewMut<'a> {
        assert!(start + rows <= self.rows, "rows {start}..{} of {}", start + rows, self.rows);
        let data = match self.data {
            DataMut::Cpu(data) => DataMut::Cpu(&mut data[span(start, rows, self.cols, self.stride)]),
            DataMut::Cuda(data) => DataMut::Cuda(data.at(start * self.stride)),
            DataMut::Meta => DataMut::Meta,
        };
        ViewMut { rows, cols: self.cols, stride: self.stride, data }
    }

    /// Columns `start..start + cols` of every row; the stride stays.
    ///
    /// # Panics
    /// The range lies outside of the view.
    #[must_use]
    pub fn into_column_range(self, start: usize, cols: usize) -> ViewMut<'a> {
        assert!(start + cols <= self.cols, "columns {start}..{} of {}", start + cols, self.cols);
        let data = match self.data {
            DataMut::Cpu(data) if self.rows > 0 => {
                DataMut::Cpu(&mut data[start..start + (self.rows - 1) * self.stride + cols])
            }
            DataMut::Cuda(data) => DataMut::Cuda(data.at(start)),
            other => other,
        };
        ViewMut { rows: self.rows, cols, stride: self.stride, data }
    }

    /// One row cut in two: columns before `at` and from it on.
    ///
    /// # Panics
    /// The view has more than one row or fewer columns.
    pub fn split_row(self, at: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        assert!(self.rows == 1 && at <= self.cols, "one row of {at} columns or more");
        let rest = self.cols - at;
        let (left, right) = match self.data {
            DataMut::Cpu(data) => {
                let (left, right) = data.split_at_mut(at);
                (DataMut::Cpu(left), DataMut::Cpu(right))
            }
            DataMut::Cuda(data) => (DataMut::Cuda(data), DataMut::Cuda(data.at(at))),
            DataMut::Meta => (DataMut::Meta, DataMut::Meta),
        };
        (
            ViewMut { rows: 1, cols: at, stride: at, data: left },
            ViewMut { rows: 1, cols: rest, stride: rest, data: right },
        )
    }

    /// `rows x cols` elements of a contiguous view from `start` on: one matrix of a flat buffer.
    ///
    /// # Panics
    /// The view has gaps or ends before.
    #[must_use]
    pub fn into_slice(self, start: usize, rows: usize, cols: usize) -> ViewMut<'a> {
        assert!(self.stride == self.cols, "a slice of a view with gaps");
        assert!(start + rows * cols <= self.rows * self.cols, "a slice outside of the view");
        let data = match self.data {
            DataMut::Cpu(data) => DataMut::Cpu(&mut data[start..start + rows * cols]),
            DataMut::Cuda(data) => DataMut::Cuda(data.at(start)),
            DataMut::Meta => DataMut::Meta,
        };
        ViewMut { rows, cols, stride: cols, data }
    }

    /// The elements in host memory (rows `stride` apart; the last row ends the slice).
    ///
    /// # Errors
    /// [`Error::NoKernel`]: the view is on another device, which `op` does not serve.
    pub fn cpu(self, op: &'static str) -> Result<&'a mut [f32]> {
        match self.data {
            DataMut::Cpu(data) => Ok(data),
            DataMut::Cuda(data) => Err(Error::NoKernel { op, device: data.cuda.name() }),
            DataMut::Meta => Err(Error::NoKernel { op, device: "meta".to_owned() }),
        }
    }

    /// The device, if the elements are on one.
    pub fn cuda(&self) -> Option<Arc<Cuda>> {
        self.as_view().cuda().cloned()
    }

    /// Address of the first element, a bf16 on a device; see [`View::bf16`].
    ///
    /// # Errors
    /// [`Error::NoKernel`]: `op` serves no other elements and no other place.
    pub fn bf16(&self, op: &'static str) -> Result<u64> {
        self.as_view().bf16(op)
    }

    /// Address of the first element, an f32 on a device; see [`View::f32`].
    ///
    /// # Errors
    /// [`Error::NoKernel`]: `op` serves no other elements and no other place.
    pub fn f32(&self, op: &'static str) -> Result<u64> {
        self.as_view().f32(op)
    }

    /// As the result of a matrix product on a device; see [`View::matrix`].
    ///
    /// # Errors
    /// [`Error::NoKernel`]: the elements are in host memory.
    pub fn matrix(&self, op: &'static str) -> Result<Matrix> {
        self.as_view().matrix(op)
    }
}

/// The elements that `rows` rows from `start` on span, gaps between them included.
fn span(start: usize, rows: usize, cols: usize, stride: usize) -> std::ops::Range<usize> {
    let begin = start * stride;
    let end = if rows == 0 { begin } else { (start + rows - 1) * stride + cols };
    begin.min(end)..end
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
