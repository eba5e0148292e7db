//! What the tests of the linear ops share: reproducible values, matrices with poisoned gaps, thread pools.

use crate::cpu::gemm::{Mat, MatMut};
use crate::tensor::{View, ViewMut};

/// `len` values in (-1, 1): splitmix64 of seed and index.
pub fn values(seed: u64, len: usize) -> Vec<f32> {
    let value = |i: u64| {
        let mut z = (seed << 32 | i).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..len as u64).map(value).collect()
}

/// A matrix whose rows have NaN between them, so that reading a gap shows.
#[derive(Debug, Clone)]
pub struct Padded {
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
    pub data: Vec<f32>,
}

impl Padded {
    /// Values in (-1, 1).
    pub fn random(seed: u64, rows: usize, cols: usize, pad: usize) -> Padded {
        let mut matrix = Padded::filled(rows, cols, pad, 0.0);
        for (row, values) in
            matrix.data.chunks_mut(cols + pad).zip(values(seed, rows * cols).chunks(cols.max(1)))
        {
            row[..cols].copy_from_slice(values);
        }
        matrix
    }

    /// One value everywhere; NaN for a destination that must be overwritten.
    pub fn filled(rows: usize, cols: usize, pad: usize, value: f32) -> Padded {
        let stride = cols + pad;
        let data = (0..rows * stride).map(|i| if i % stride < cols { value } else { f32::NAN }).collect();
        Padded { rows, cols, stride, data }
    }

    pub fn view(&self) -> View<'_> {
        let mut view = View::from_slice(&self.data, self.rows, self.stride);
        view.cols = self.cols;
        view
    }

    pub fn view_mut(&mut self) -> ViewMut<'_> {
        let mut view = ViewMut::from_slice(&mut self.data, self.rows, self.stride);
        view.cols = self.cols;
        view
    }

    pub fn mat(&self) -> Mat<'_> {
        Mat::new(&self.data, self.rows, self.cols, self.stride)
    }

    pub fn mat_mut(&mut self) -> MatMut<'_> {
        MatMut::new(&mut self.data, self.rows, self.cols, self.stride)
    }

    pub fn at(&self, i: usize, j: usize) -> f32 {
        self.data[i * self.stride + j]
    }

    /// The elements without the gaps, after checking that no gap was written.
    pub fn elements(&self) -> Vec<f32> {
        let mut out = Vec::new();
        for row in self.data.chunks(self.stride.max(1)) {
            assert!(row[self.cols..].iter().all(|x| x.is_nan()), "a gap between rows was written");
            out.extend_from_slice(&row[..self.cols]);
        }
        out
    }

    pub fn bits(&self) -> Vec<u32> {
        self.data.iter().map(|x| x.to_bits()).collect()
    }
}

/// Every element within `tolerance`, which the caller derives from the size of the terms summed.
#[track_caller]
pub fn assert_close(found: &Padded, expected: &Padded, tolerance: f64) {
    let (found, expected) = (found.elements(), expected.elements());
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = (f64::from(*found) - f64::from(*expected)).abs();
        assert!(error <= tolerance, "element {i}: {found} for {expected}, {error:e} > {tolerance:e}");
    }
}

/// Runs `work` on a pool of its own.
pub fn with_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool").install(work)
}
