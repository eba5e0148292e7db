//! Reading the packed rows on the host: rows, tiles or all of them as f32, and their lengths.

use std::ops::Range;

use rayon::prelude::*;

use super::{BaseWeight, Storage, four_bit, ggml, int8};
use crate::cpu::by_isa;
use crate::cpu::scratch::with_scratch;
use crate::error::{Result, check};
use crate::tensor::ViewMut;

/// Rows that one task converts; small enough to stay in the second-level cache.
pub(super) const ROWS_PER_TASK: usize = 16;

impl BaseWeight {
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
    fn sum_of_squares(x: &[f32]) -> f64 {
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
    use qpeft_formats::GgmlType;

    use crate::testing::Mat;
    use crate::weight::BaseWeight;
    use crate::weight::tests::zeros;

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
    fn row_norms_are_summed_in_f64() {
        let weight = BaseWeight::from_f32(40, 129, &Mat::random(3, 40, 129, 100.0).values()).unwrap();
        let mut out = Mat::poisoned(1, 40);
        weight.row_norms_squared(out.view_mut()).unwrap();
        for (row, found) in weight.dequantize().chunks(129).zip(out.values()) {
            let expected: f64 = row.iter().map(|&x| x as f64 * x as f64).sum();
            assert!((found as f64 - expected).abs() <= expected * 6e-8, "{found} for {expected}");
        }
    }
}
