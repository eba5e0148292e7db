//! Tensors: a matrix of f32 on a device, and borrowed row-strided views of it.
//!
//! Two dimensions are enough for a decoder: activations are (tokens, channels) with the sequences of
//! a batch laid end to end, weights are (out, in), vectors are one row. Ops take [`View`]s, so that a
//! buffer allocated once for the largest batch serves every smaller one ([`Tensor::top`]), one flat
//! parameter buffer serves every adapter matrix ([`View::reshaped`]), and a padded row (the CUDA
//! linear appends adapter columns to its operands) is only a larger `stride`.

use cudarc::driver::CudaSlice;

use crate::device::Device;
use crate::error::{Error, Result};

/// An owned row-major matrix. Allocated once; the step loop only borrows it.
#[derive(Debug)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    device: Device,
    storage: Storage,
}

#[derive(Debug)]
enum Storage {
    Cpu(Vec<f32>),
    Cuda(CudaSlice<f32>),
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
    Cuda(&'a Device),
}

#[derive(Debug)]
enum DataMut<'a> {
    Cpu(&'a mut [f32]),
    Cuda(&'a Device),
}

impl Tensor {
    /// A (rows, cols) matrix of zeros on `device`.
    ///
    /// # Errors
    /// The size overflows or the device is out of memory.
    pub fn zeros(device: &Device, rows: usize, cols: usize) -> Result<Tensor> {
        let refuse = |reason| Error::Device { device: device.to_string(), reason };
        let len =
            rows.checked_mul(cols).ok_or_else(|| refuse(format!("a {rows} x {cols} tensor overflows")))?;
        let storage = match device {
            Device::Cpu => Storage::Cpu(vec![0.0; len]),
            Device::Cuda(stream) => Storage::Cuda(
                stream.alloc_zeros(len).map_err(|e| refuse(format!("allocating {len} f32: {e}")))?,
            ),
        };
        Ok(Tensor { rows, cols, device: device.clone(), storage })
    }

    /// A (rows, cols) matrix with these values, row by row.
    ///
    /// # Errors
    /// `values` does not hold rows x cols elements, or the device refuses.
    pub fn from_slice(device: &Device, rows: usize, cols: usize, values: &[f32]) -> Result<Tensor> {
        crate::error::check("tensor", "values", rows * cols, values.len())?;
        let mut tensor = Tensor::zeros(device, rows, cols)?;
        tensor.write(values)?;
        Ok(tensor)
    }

    /// Overwrites all elements from host memory.
    ///
    /// # Errors
    /// The length differs, or the device refuses.
    pub fn write(&mut self, values: &[f32]) -> Result<()> {
        crate::error::check("tensor write", "values", self.len(), values.len())?;
        match (&mut self.storage, &self.device) {
            (Storage::Cpu(data), _) => data.copy_from_slice(values),
            (Storage::Cuda(data), Device::Cuda(stream)) => stream
                .memcpy_htod(values, data)
                .map_err(|e| Error::Device { device: self.device.to_string(), reason: e.to_string() })?,
            (Storage::Cuda(_), Device::Cpu) => unreachable!("storage and device are set together"),
        }
        Ok(())
    }

    /// Copies all elements to host memory. On CUDA this waits for the stream.
    ///
    /// # Errors
    /// The device refuses.
    pub fn read(&self) -> Result<Vec<f32>> {
        match (&self.storage, &self.device) {
            (Storage::Cpu(data), _) => Ok(data.clone()),
            (Storage::Cuda(data), Device::Cuda(stream)) => stream
                .clone_dtoh(data)
                .map_err(|e| Error::Device { device: self.device.to_string(), reason: e.to_string() }),
            (Storage::Cuda(_), Device::Cpu) => unreachable!("storage and device are set together"),
        }
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

    /// Where the elements live.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The whole matrix.
    pub fn view(&self) -> View<'_> {
        let data = match &self.storage {
            Storage::Cpu(data) => Data::Cpu(data),
            Storage::Cuda(_) => Data::Cuda(&self.device),
        };
        View { rows: self.rows, cols: self.cols, stride: self.cols, data }
    }

    /// The whole matrix, to write to.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let data = match &mut self.storage {
            Storage::Cpu(data) => DataMut::Cpu(data),
            Storage::Cuda(_) => DataMut::Cuda(&self.device),
        };
        ViewMut { rows: self.rows, cols: self.cols, stride: self.cols, data }
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
            cuda @ Data::Cuda(_) => cuda,
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
            other => other,
        };
        View { cols, data, ..self }
    }

    /// The elements in host memory (rows `stride` apart; the last row ends the slice).
    ///
    /// # Errors
    /// [`Error::NoKernel`]: the view is on another device, which `op` does not serve.
    pub fn cpu(self, op: &'static str) -> Result<&'a [f32]> {
        match self.data {
            Data::Cpu(data) => Ok(data),
            Data::Cuda(device) => Err(Error::NoKernel { op, device: device.to_string() }),
        }
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

    /// The same view for a shorter time, so that it can be passed on and used again.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        let data = match &mut self.data {
            DataMut::Cpu(data) => DataMut::Cpu(data),
            DataMut::Cuda(device) => DataMut::Cuda(device),
        };
        ViewMut { rows: self.rows, cols: self.cols, stride: self.stride, data }
    }

    /// The view to read from.
    pub fn as_view(&self) -> View<'_> {
        let data = match &self.data {
            DataMut::Cpu(data) => Data::Cpu(data),
            DataMut::Cuda(device) => Data::Cuda(device),
        };
        View { rows: self.rows, cols: self.cols, stride: self.stride, data }
    }

    /// Sets every element to zero.
    ///
    /// # Errors
    /// [`Error::NoKernel`]: the view is on another device, which `op` does not serve.
    pub fn zero(self, op: &'static str) -> Result<()> {
        let (cols, stride) = (self.cols, self.stride.max(1));
        self.cpu(op)?.chunks_mut(stride).for_each(|row| row[..cols].fill(0.0));
        Ok(())
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
            cuda @ DataMut::Cuda(_) => cuda,
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
            DataMut::Cuda(device) => (DataMut::Cuda(device), DataMut::Cuda(device)),
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
            cuda @ DataMut::Cuda(_) => cuda,
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
            DataMut::Cuda(device) => Err(Error::NoKernel { op, device: device.to_string() }),
        }
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
