//! A borrowed matrix to read from: where it starts, its shape, and its parts without a copy.

use std::ops::Range;
use std::sync::Arc;

use super::Dtype;
use crate::cuda::Cuda;
use crate::cuda::gemm::Matrix;
use crate::error::{Error, Result};

/// A borrowed matrix: element (i, j) is `data[i * stride + j]`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// Rows (tokens, output features).
    pub rows: usize,
    /// Columns (channels, input features).
    pub cols: usize,
    /// Elements between the starts of two rows; at least `cols`.
    pub stride: usize,
    pub(super) data: Data<'a>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Data<'a> {
    Cpu(&'a [f32]),
    Cuda(OnCuda<'a>),
    Meta,
}

/// Where a view on a device starts.
#[derive(Debug, Clone, Copy)]
pub(super) struct OnCuda<'a> {
    pub(super) cuda: &'a Arc<Cuda>,
    pub(super) ptr: u64,
    pub(super) dtype: Dtype,
}

impl<'a> OnCuda<'a> {
    pub(super) fn at(self, elements: usize) -> OnCuda<'a> {
        OnCuda { ptr: self.ptr + (elements * self.dtype.size()) as u64, ..self }
    }

    fn expect(self, op: &'static str, dtype: Dtype) -> Result<u64> {
        if self.dtype == dtype {
            return Ok(self.ptr);
        }
        Err(Error::NoKernel { op, device: format!("{} with {:?} elements", self.cuda.name(), self.dtype) })
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

/// The elements that `rows` rows from `start` on span, gaps between them included.
pub(super) fn span(start: usize, rows: usize, cols: usize, stride: usize) -> Range<usize> {
    let begin = start * stride;
    let end = if rows == 0 { begin } else { (start + rows - 1) * stride + cols };
    begin.min(end)..end
}

/// The f32 values of elements in memory.
fn decode(bytes: &[u8], dtype: Dtype) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::Bf16 => {
            bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
        }
    }
}
