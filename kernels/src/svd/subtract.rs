//! What is left of a weight without its low-rank product, packed in its own type or another: in host memory or on the
//! device.
//!
//! What [`quantize`] does not pack on a device comes to the host, whose codecs have the same bits.

use rayon::prelude::*;

use super::cuda::Dense;
use super::{Remainder, SOURCE};
use crate::cuda::gemm::Matrix;
use crate::cuda::{Arg, Cuda, Grid, Loan};
use crate::error::Result;
use crate::ops::quantize::{is_packed_on_device, quantize};
use crate::tensor::{Dtype, ViewMut};
use crate::weight::{BaseWeight, DeviceWeight};

/// `like`: a weight of the type to pack in.
pub(super) fn on_cpu(
    weight: &BaseWeight,
    b: &[f32],
    a: &[f32],
    scaling: f32,
    like: &BaseWeight,
) -> Result<Remainder> {
    let (n, k) = (weight.rows(), weight.cols());
    let dense = weight.dequantize();
    let mut rest = dense.clone();
    let rank = b.len() / n.max(1);
    rest.par_chunks_exact_mut(k.max(1)).zip(b.par_chunks_exact(rank.max(1))).for_each(|(row, b)| {
        for (b, a) in b.iter().zip(a.chunks_exact(k.max(1))) {
            let factor = -scaling * b;
            row.iter_mut().zip(a).for_each(|(w, a)| *w += factor * a);
        }
    });
    let packed = like.requantize(&rest)?;
    let mut stored = dense;
    let square = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    let (weight, remainder) = (square(&stored), square(&rest));
    packed.dequantize_rows(0..n, &mut stored);
    let quantization = rest.iter().zip(&stored).map(|(r, q)| f64::from(r - q).powi(2)).sum();
    Ok(Remainder { packed, weight, remainder, quantization })
}

/// `like`: a weight of the type to pack in.
pub(super) fn on_cuda(
    weight: &DeviceWeight,
    b: &[f32],
    a: &[f32],
    scaling: f32,
    like: &BaseWeight,
) -> Result<Remainder> {
    let cuda = weight.cuda();
    let (n, k) = (weight.rows(), weight.cols());
    let rank = b.len() / n.max(1);
    let rest = Dense::of(weight, Dtype::F32)?;
    let before = Squares::of(cuda, rest.matrix, None)?;
    let factors = (Dense::from_slice(cuda, n, rank, b)?, Dense::from_slice(cuda, rank, k, a)?);
    cuda.gemm(rest.matrix, factors.0.matrix, factors.1.matrix, -scaling, 1.0)?;
    let (before, after) = (before.read(cuda)?, Squares::of(cuda, rest.matrix, None)?.read(cuda)?);
    let remainder =
        |packed, quantization| Remainder { packed, weight: before, remainder: after, quantization };
    // What is not finite is named by the host.
    if after.is_finite() && is_packed_on_device(like) {
        let stored = Dense::new(cuda, n, k, Dtype::F32)?;
        let view = |matrix| ViewMut::on_cuda(cuda, matrix);
        if let Some(packed) = quantize(view(rest.matrix).as_view(), Some(view(stored.matrix)), like)? {
            return Ok(remainder(packed, Squares::of(cuda, rest.matrix, Some(stored.matrix))?.read(cuda)?));
        }
    }
    let packed = like.requantize(&read_rows(cuda, rest.matrix)?)?;
    let uploaded = DeviceWeight::upload(cuda, &packed)?;
    let stored = Dense::of(&uploaded, Dtype::F32)?;
    Ok(remainder(packed, Squares::of(cuda, rest.matrix, Some(stored.matrix))?.read(cuda)?))
}

/// Threads of a block, as `svd.cu` has it.
const THREADS: usize = 256;

/// Blocks of a sum of squares, each with a partial sum; fixed, so that sums have the same bits on every device.
const PARTIALS: usize = 1024;

/// |x - y|^2 or |x|^2, being computed.
struct Squares<'a>(Loan<'a>);

impl<'a> Squares<'a> {
    fn of(cuda: &'a Cuda, x: Matrix, y: Option<Matrix>) -> Result<Squares<'a>> {
        let partials = cuda.borrow(PARTIALS * size_of::<f64>())?;
        let args = [
            Arg::Ptr(partials.ptr()),
            Arg::Ptr(x.ptr),
            Arg::Ptr(y.map_or(0, |y| y.ptr)),
            Arg::size(x.stride),
            Arg::size(x.rows),
            Arg::size(x.cols),
        ];
        cuda.launch(&SOURCE, "svd_distance", Grid::of(PARTIALS, THREADS), &args)?;
        Ok(Squares(partials))
    }

    fn read(self, cuda: &Cuda) -> Result<f64> {
        let mut bytes = vec![0; PARTIALS * size_of::<f64>()];
        cuda.read(self.0.ptr(), &mut bytes)?;
        Ok(bytes.as_chunks::<8>().0.iter().map(|&x| f64::from_le_bytes(x)).sum())
    }
}

/// An f32 matrix in host memory, without the gaps.
fn read_rows(cuda: &Cuda, matrix: Matrix) -> Result<Vec<f32>> {
    let size = Dtype::F32.size();
    let mut bytes = vec![0; matrix.rows * matrix.stride * size];
    cuda.read(matrix.ptr, &mut bytes)?;
    let rows = bytes.chunks_exact((matrix.stride * size).max(1));
    Ok(rows
        .flat_map(|row| row.as_chunks::<4>().0[..matrix.cols].iter().map(|&x| f32::from_le_bytes(x)))
        .collect())
}
