//! Block Krylov iteration on a CUDA device: all that is as large as the weight is a matrix product there.
//!
//! W is dequantized once to bf16 for the iteration and once to f32 for the projection. Blocks are made orthonormal by
//! Cholesky QR: the Gram matrix of a block comes to the host, its triangular factor is inverted there in f64, and the block is
//! multiplied by it; again until the columns are orthonormal. The eigenvectors of the small projection are found on the host, too.
//! While one thread computes there, the device works for others, so that several weights should be decomposed at once.

use faer::Side;

use super::{LowRankSvd, SOURCE, SvdOptions, with_fixed_signs};
use crate::cuda::gemm::{Matrix, transposed};
use crate::cuda::{Arg, Cuda, Grid, Loan};
use crate::error::{Error, Result};
use crate::ops::convert::convert;
use crate::ops::dequantize::{dequantize_rows, row_norms_squared};
use crate::tensor::{Dtype, ViewMut};
use crate::weight::DeviceWeight;

const OP: &str = "weight_svd";

/// Rows of bf16 matrices start at multiples of this many elements: what tensor cores load at once.
const ALIGNMENT: usize = 8;

/// A block is projected and multiplied by its triangular factor at most this often.
const PASSES: usize = 5;

/// A factor computed from columns that are this close to orthonormal leaves them so within rounding.
const NEARLY_ORTHONORMAL: f64 = 1e-3;

/// Singular values below this part of the largest are rounding errors of the f32 projection.
const NOISE: f32 = 1e-6;

/// A matrix in borrowed memory of a device.
pub(super) struct Dense<'a> {
    pub matrix: Matrix,
    _loan: Loan<'a>,
}

impl<'a> Dense<'a> {
    pub fn new(cuda: &'a Cuda, rows: usize, cols: usize, dtype: Dtype) -> Result<Dense<'a>> {
        let stride = cols.next_multiple_of(ALIGNMENT);
        let loan = cuda.borrow(rows.saturating_mul(stride).saturating_mul(dtype.size()))?;
        Ok(Dense { matrix: Matrix { ptr: loan.ptr(), rows, cols, stride, dtype }, _loan: loan })
    }

    /// The unpacked weight.
    pub fn of(weight: &'a DeviceWeight, dtype: Dtype) -> Result<Dense<'a>> {
        let dense = Dense::new(weight.cuda(), weight.rows(), weight.cols(), dtype)?;
        let out = ViewMut::on_cuda(weight.cuda(), dense.matrix);
        dequantize_rows(out, weight, 0..weight.rows(), None, None)?;
        Ok(dense)
    }

    /// An f32 matrix with these values, row by row.
    pub fn from_slice(cuda: &'a Cuda, rows: usize, cols: usize, values: &[f32]) -> Result<Dense<'a>> {
        let mut dense = Dense::new(cuda, rows, cols, Dtype::F32)?;
        // Without gaps, so that one copy does.
        dense.matrix.stride = cols;
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        cuda.write(dense.matrix.ptr, &bytes)?;
        Ok(dense)
    }

    /// The same without gaps between the rows.
    fn packed(mut self) -> Dense<'a> {
        self.matrix.stride = self.matrix.cols;
        self
    }
}

/// An f32 matrix without gaps, in host memory.
fn read(cuda: &Cuda, matrix: Matrix) -> Result<Vec<f32>> {
    let mut bytes = vec![0; matrix.rows * matrix.cols * Dtype::F32.size()];
    cuda.read(matrix.ptr, &mut bytes)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x)).collect())
}

/// Columns `start .. start + cols` of a matrix.
fn columns(matrix: Matrix, start: usize, cols: usize) -> Matrix {
    Matrix { ptr: matrix.ptr + (start * matrix.dtype.size()) as u64, cols, ..matrix }
}

/// See [`weight_svd`](super::weight_svd); `None` leaves the weight to the host: the subspace would be as large as it, it is
/// not finite, or its rank is lower.
pub(super) fn randomized_svd(
    weight: &DeviceWeight,
    rank: usize,
    options: &SvdOptions,
) -> Result<Option<LowRankSvd>> {
    let cuda = weight.cuda();
    let (n, k) = (weight.rows(), weight.cols());
    let limit = n.min(k);
    let block = rank.saturating_add(options.oversampling).min(limit).next_multiple_of(ALIGNMENT);
    let width = options.iterations.saturating_add(1).saturating_mul(block);
    if width >= limit || !is_finite(weight)? {
        return Ok(None);
    }
    let basis = Dense::new(cuda, n, width, Dtype::F32)?;
    krylov_basis(weight, basis.matrix, block, options)?;

    // Q^T W = P^T, and P^T P = Y L Y^T: the triples are (Q Y, |Y^T P^T|, Y^T P^T by their lengths).
    let projected = Dense::new(cuda, k, width, Dtype::F32)?;
    let w = Dense::of(weight, Dtype::F32)?;
    cuda.gemm(projected.matrix, transposed(w.matrix), basis.matrix, 1.0, 0.0)?;
    drop(w);
    let small = Dense::new(cuda, width, width, Dtype::F32)?;
    cuda.gemm(small.matrix, transposed(projected.matrix), projected.matrix, 1.0, 0.0)?;
    let vectors = leading_eigenvectors(&read(cuda, small.matrix)?, width, rank)?;
    let vectors = Dense::from_slice(cuda, width, rank, &vectors)?;
    let u = Dense::new(cuda, n, rank, Dtype::F32)?.packed();
    cuda.gemm(u.matrix, basis.matrix, vectors.matrix, 1.0, 0.0)?;
    let scaled = Dense::new(cuda, rank, k, Dtype::F32)?.packed();
    cuda.gemm(scaled.matrix, transposed(vectors.matrix), transposed(projected.matrix), 1.0, 0.0)?;
    Ok(triples(read(cuda, u.matrix)?, read(cuda, scaled.matrix)?, rank))
}

fn is_finite(weight: &DeviceWeight) -> Result<bool> {
    let cuda = weight.cuda();
    let norms = Dense::new(cuda, 1, weight.rows(), Dtype::F32)?;
    row_norms_squared(ViewMut::on_cuda(cuda, norms.matrix), weight)?;
    Ok(read(cuda, norms.matrix)?.iter().all(|x| x.is_finite()))
}

/// Fills the columns of `basis` (N, blocks x block) with orthonormal ones that span (W X, (W W^T) W X, ...).
fn krylov_basis(weight: &DeviceWeight, basis: Matrix, block: usize, options: &SvdOptions) -> Result<()> {
    let cuda = weight.cuda();
    let (n, k) = (weight.rows(), weight.cols());
    let w = Dense::of(weight, Dtype::Bf16)?;
    // X, then W^T times the newest block.
    let right = Dense::new(cuda, k, block, Dtype::Bf16)?;
    let left = Dense::new(cuda, n, block, Dtype::Bf16)?;
    let room = Room::new(cuda, n, basis.cols, block)?;
    let key = options.start();
    let args =
        [Arg::Ptr(right.matrix.ptr), Arg::I64((k * block) as i64), Arg::U64(key.seed), Arg::U64(key.stream)];
    cuda.launch(&SOURCE, "svd_start", Grid::over((k * block).div_ceil(4), 256), &args)?;
    for i in 0..=options.iterations {
        if i > 0 {
            let mut newest = ViewMut::on_cuda(cuda, columns(basis, (i - 1) * block, block));
            convert(ViewMut::on_cuda(cuda, left.matrix), newest.reborrow().as_view())?;
            cuda.gemm(right.matrix, transposed(w.matrix), left.matrix, 1.0, 0.0)?;
        }
        cuda.gemm(room.blocks[0].matrix, w.matrix, right.matrix, 1.0, 0.0)?;
        room.append(cuda, basis, i * block)?;
    }
    Ok(())
}

/// Memory for making a block orthonormal.
struct Room<'a> {
    /// (N, block): the newest block before and after a pass.
    blocks: [Dense<'a>; 2],
    /// (width, block): its products with the basis so far.
    shared: Dense<'a>,
    /// (block, block).
    gram: Dense<'a>,
}

impl<'a> Room<'a> {
    fn new(cuda: &'a Cuda, n: usize, width: usize, block: usize) -> Result<Room<'a>> {
        let dense = |rows| Dense::new(cuda, rows, block, Dtype::F32);
        Ok(Room { blocks: [dense(n)?, dense(n)?], shared: dense(width)?, gram: dense(block)? })
    }

    /// Makes the first of `blocks` orthonormal, also to the `found` columns of `basis`, behind which it is written.
    fn append(&self, cuda: &Cuda, basis: Matrix, found: usize) -> Result<()> {
        let [mut from, mut to] = self.blocks.each_ref().map(|block| block.matrix);
        let block = from.cols;
        let before = columns(basis, 0, found);
        let shared = Matrix { rows: found, ..self.shared.matrix };
        for pass in 1..=PASSES {
            if found > 0 {
                cuda.gemm(shared, transposed(before), from, 1.0, 0.0)?;
                cuda.gemm(from, before, shared, -1.0, 1.0)?;
            }
            cuda.gemm(self.gram.matrix, transposed(from), from, 1.0, 0.0)?;
            let factor = TriangularFactor::of(&read(cuda, self.gram.matrix)?, block);
            let inverse = Dense::from_slice(cuda, block, block, &factor.inverse)?;
            let is_last = factor.deviation < NEARLY_ORTHONORMAL || pass == PASSES;
            if is_last {
                to = columns(basis, found, block);
            }
            cuda.gemm(to, from, transposed(inverse.matrix), 1.0, 0.0)?;
            if is_last {
                break;
            }
            std::mem::swap(&mut from, &mut to);
        }
        Ok(())
    }
}

/// L of a Gram matrix L L^T.
struct TriangularFactor {
    /// L^-1, row by row: the columns of Z (L^-1)^T are orthonormal if L belongs to Z^T Z.
    inverse: Vec<f32>,
    /// Largest distance of an element of the Gram matrix from the identity's.
    deviation: f64,
}

impl TriangularFactor {
    /// A pivot that is a rounding error of f32 beside its diagonal is raised above them: what the columns before leave
    /// of its column becomes long enough for the next pass to see it, and nothing is taken out of later columns along
    /// it. A column of zeros stays one.
    fn of(gram: &[f32], size: usize) -> TriangularFactor {
        const LEAST_PIVOT: f64 = 1e-5;
        let mut l = vec![0.0f64; size * size];
        let mut is_weak = vec![false; size];
        let mut deviation = 0.0f64;
        for i in 0..size {
            let diagonal = f64::from(gram[i * size + i]);
            let (above, row) = l.split_at_mut(i * size);
            let is_zero = diagonal <= f64::from(f32::MIN_POSITIVE);
            for j in 0..i {
                let g = f64::from(gram[i * size + j]);
                deviation = deviation.max(g.abs());
                let other = &above[j * size..][..=j];
                if !is_zero && !is_weak[j] {
                    row[j] = (g - dot(&row[..j], &other[..j])) / other[j];
                }
            }
            if !is_zero {
                deviation = deviation.max((diagonal - 1.0).abs());
                let pivot = diagonal - dot(&row[..i], &row[..i]);
                is_weak[i] = pivot < LEAST_PIVOT * diagonal;
                row[i] = pivot.max(LEAST_PIVOT * diagonal).sqrt();
            } else {
                is_weak[i] = true;
            }
        }
        // Row i of the inverse: (e_i - sum_j L_ij inverse_j) / L_ii.
        let mut inverse = vec![0.0f64; size * size];
        for i in 0..size {
            let (above, row) = inverse.split_at_mut(i * size);
            let (row, l) = (&mut row[..size], &l[i * size..][..size]);
            if l[i] == 0.0 {
                continue;
            }
            for j in 0..i {
                row.iter_mut().zip(&above[j * size..][..=j]).for_each(|(x, y)| *x -= l[j] * y);
            }
            row[i] = 1.0;
            row[..=i].iter_mut().for_each(|x| *x /= l[i]);
        }
        TriangularFactor { inverse: inverse.into_iter().map(|x| x as f32).collect(), deviation }
    }
}

/// In eight interleaved sums that the compiler can keep in vector registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..8 {
            sums[i] += a[i] * b[i];
        }
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// (size, rank): the eigenvectors of the largest eigenvalues as columns, of a symmetric matrix.
fn leading_eigenvectors(matrix: &[f32], size: usize, rank: usize) -> Result<Vec<f32>> {
    let eigen = faer::Mat::<f64>::from_fn(size, size, |i, j| f64::from(matrix[i * size + j]))
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| Error::NoConvergence { op: OP })?;
    // Ascending.
    let vectors = eigen.U();
    Ok((0..size * rank).map(|i| vectors[(i / rank, size - 1 - i % rank)] as f32).collect())
}

/// The triples of u (N, R) and of the right vectors times their singular values; `None` if some of these are noise.
fn triples(u: Vec<f32>, mut scaled: Vec<f32>, rank: usize) -> Option<LowRankSvd> {
    let cols = scaled.len() / rank;
    let length = |row: &[f32]| row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let mut s: Vec<f32> = scaled.chunks_exact(cols).map(|row| length(row) as f32).collect();
    // The eigenvalues were in order; their rounding errors need not be those of the lengths.
    for i in 1..rank {
        s[i] = s[i].min(s[i - 1]);
    }
    if s[rank - 1] <= NOISE * s[0] {
        return None;
    }
    for (row, s) in scaled.chunks_exact_mut(cols).zip(&s) {
        row.iter_mut().for_each(|x| *x /= s);
    }
    Some(with_fixed_signs(LowRankSvd { u, s, v: scaled }, rank))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Mat;

    /// Z^T Z in f32, as a device leaves it.
    fn gram(z: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        let product = |i: usize, j: usize| (0..rows).map(|r| z[r * cols + i] * z[r * cols + j]).sum();
        (0..cols * cols).map(|i| product(i / cols, i % cols)).collect()
    }

    fn times_transposed(z: &[f32], inverse: &[f32], cols: usize) -> Vec<f32> {
        let element = |row: &[f32], j: usize| (0..cols).map(|i| row[i] * inverse[j * cols + i]).sum::<f32>();
        z.chunks(cols).flat_map(|row| (0..cols).map(move |j| element(row, j))).collect()
    }

    #[test]
    fn repeated_factors_make_columns_orthonormal_also_where_some_depend_on_others() {
        let (rows, cols) = (300, 24);
        let independent = Mat::random(1, rows, cols, 1.0).values();
        let mut graded = independent.clone();
        let mut dependent = independent.clone();
        for row in 0..rows {
            for col in 0..cols {
                graded[row * cols + col] *= 10f32.powi(-(col as i32) / 3);
                graded[row * cols + col] += 30.0 * independent[row * cols];
            }
            dependent[row * cols + 7] = dependent[row * cols + 3];
            dependent[row * cols + 11] = 0.0;
        }
        for (name, z, zeros) in
            [("random", independent, 0), ("graded", graded, 0), ("dependent", dependent, 1)]
        {
            let mut z = z;
            let mut passes = 0;
            loop {
                let factor = TriangularFactor::of(&gram(&z, rows, cols), cols);
                z = times_transposed(&z, &factor.inverse, cols);
                passes += 1;
                if factor.deviation < NEARLY_ORTHONORMAL {
                    break;
                }
            }
            assert!(passes <= PASSES, "{name}: {passes}");
            let mut empty = 0;
            for (i, &g) in gram(&z, rows, cols).iter().enumerate() {
                let is_diagonal = i / cols == i % cols;
                empty += usize::from(is_diagonal && g == 0.0);
                let expected = f32::from(u8::from(is_diagonal && g != 0.0));
                assert!((g - expected).abs() < 1e-5, "{name}: {g} at {i} after {passes} passes");
            }
            // Two equal columns may leave exactly nothing of the second.
            assert!((zeros..=2 * zeros).contains(&empty), "{name}: {empty} columns of zeros");
        }
    }

    #[test]
    fn singular_values_are_lengths_in_order_and_noise_is_left_to_the_host() {
        let u = vec![1.0, 0.0, 0.0, -1.0];
        let svd = triples(u.clone(), vec![0.0, 3.0, 2.0, 0.0], 2).unwrap();
        assert_eq!(
            (svd.s, svd.v, svd.u),
            (vec![3.0, 2.0], vec![0.0, 1.0, -1.0, 0.0], vec![1.0, 0.0, 0.0, 1.0])
        );
        assert!(triples(u.clone(), vec![0.0, 3.0, 1e-7, 0.0], 2).is_none());
        assert!(triples(u, vec![0.0; 4], 2).is_none());
    }
}
