//! A borrowed matrix to write to; what it can be read for, it asks of its [`View`].

use std::sync::Arc;

use super::view::{Data, OnCuda, View, span};
use crate::cuda::Cuda;
use crate::cuda::gemm::Matrix;
use crate::error::{Error, Result};

/// A mutably borrowed matrix: element (i, j) is `data[i * stride + j]`.
#[derive(Debug)]
pub struct ViewMut<'a> {
    /// Rows (tokens, output features).
    pub rows: usize,
    /// Columns (channels, input features).
    pub cols: usize,
    /// Elements between the starts of two rows; at least `cols`.
    pub stride: usize,
    pub(super) data: DataMut<'a>,
}

#[derive(Debug)]
pub(super) enum DataMut<'a> {
    Cpu(&'a mut [f32]),
    Cuda(OnCuda<'a>),
    Meta,
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
