//! The frozen base weight: packed rows behind one interface, the seam between methods and formats.
//!
//! A linear layer holds one [`BaseWeight`] and asks it for f32 rows or tiles; an adapter never learns
//! in which type they are stored, and a new type is one more `Storage` variant here. The bytes stay
//! packed and usually mapped from the file: a clone is a pointer, and only the tile at work is f32.
//! N rows are output features, K columns are input features.

use std::ops::Range;

use qpeft_formats::GgmlType;
use qpeft_formats::blocks;
use qpeft_formats::file::Bytes;
use rayon::prelude::*;

use crate::cpu::by_isa;
use crate::cpu::quantize::quantize_rows;
use crate::cpu::scratch::with_scratch;
use crate::error::{Error, Result, check};
use crate::tensor::ViewMut;

/// A frozen (N, K) matrix in the type of its checkpoint.
#[derive(Debug, Clone)]
pub struct BaseWeight {
    rows: usize,
    cols: usize,
    storage: Storage,
}

/// How the rows are stored.
#[derive(Debug, Clone)]
enum Storage {
    /// Rows of ggml blocks, one after another; F32, F16 and BF16 are blocks of one element. Every element
    /// is multiplied by `factor`, mostly 1.
    Ggml { dtype: GgmlType, bytes: Bytes, factor: f32 },
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
        Ok(BaseWeight { rows, cols, storage: Storage::Ggml { dtype, bytes, factor: 1.0 } })
    }

    /// The same blocks with every element times `factor`, as a file has it that keeps a factor of the whole
    /// tensor beside the blocks (NVFP4). [`BaseWeight::requantize`] keeps the factor.
    #[must_use]
    pub fn scaled_by(mut self, by: f32) -> BaseWeight {
        match &mut self.storage {
            Storage::Ggml { factor, .. } => *factor = by,
        }
        self
    }

    /// What every element of the blocks is multiplied by; 1 if nothing was said.
    pub fn factor(&self) -> f32 {
        match &self.storage {
            Storage::Ggml { factor, .. } => *factor,
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

    /// Output features, N.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features, K.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The storage type as its format calls it: `Q4_K`.
    pub fn type_name(&self) -> &str {
        match &self.storage {
            Storage::Ggml { dtype, .. } => dtype.name(),
        }
    }

    /// Bytes of the packed rows.
    pub fn size_bytes(&self) -> usize {
        match &self.storage {
            Storage::Ggml { bytes, .. } => bytes.len(),
        }
    }

    /// Elements of a row that share a scale; tiles start and end at a multiple of it.
    pub fn block_len(&self) -> usize {
        match &self.storage {
            Storage::Ggml { dtype, .. } => dtype.block_len(),
        }
    }

    /// The ggml type and its bytes, for writing files; `None` when stored otherwise. The values are those of
    /// the bytes times [`BaseWeight::factor`].
    pub fn ggml(&self) -> Option<(GgmlType, &Bytes)> {
        match &self.storage {
            Storage::Ggml { dtype, bytes, .. } => Some((*dtype, bytes)),
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
                // Rows are whole blocks, so that any number of them decodes as one long row.
                let row_bytes = self.size_bytes() / self.rows.max(1);
                dequantize_blocks(*dtype, &bytes[rows.start * row_bytes..rows.end * row_bytes], out);
                multiply(out, *factor);
            }
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
                let block_bytes = dtype.block_bytes();
                let row_bytes = self.cols / block_len * block_bytes;
                let (start, end) = (cols.start / block_len * block_bytes, cols.end / block_len * block_bytes);
                dequantize_strided(
                    *dtype,
                    &bytes[rows.start * row_bytes..rows.end * row_bytes],
                    row_bytes,
                    start..end,
                    out,
                    cols.len(),
                );
                multiply(out, *factor);
            }
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
        if let Some(at) = values.par_iter().position_first(|x| !(x / factor).is_finite()) {
            return Err(Error::NotFinite {
                op: "requantize",
                row: at / self.cols,
                col: at % self.cols,
                value: values[at] / factor,
            });
        }
        let storage = match &self.storage {
            Storage::Ggml { dtype, bytes, .. } => {
                dtype.require_quantizer(false)?;
                let mut packed = vec![0; bytes.len()];
                let row_bytes = dtype.row_bytes(self.cols)?;
                packed.par_chunks_mut(row_bytes.max(1)).zip(values.par_chunks(self.cols.max(1))).for_each(
                    |(packed, row)| {
                        with_scratch(row.len(), |unscaled| {
                            unscaled.iter_mut().zip(row).for_each(|(unscaled, x)| *unscaled = x / factor);
                            quantize_rows(*dtype, unscaled, self.cols, None, packed);
                        });
                    },
                );
                Storage::Ggml { dtype: *dtype, bytes: Bytes::from(packed), factor }
            }
        };
        Ok(BaseWeight { storage, ..*self })
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
    fn dequantize_blocks(dtype: GgmlType, bytes: &[u8], out: &mut [f32]) {
        blocks::dequantize_row(dtype, bytes, out);
    }
}

by_isa! {
    /// Bytes `part` of every row of `row_bytes`, each to `width` elements.
    fn dequantize_strided(
        dtype: GgmlType,
        bytes: &[u8],
        row_bytes: usize,
        part: Range<usize>,
        out: &mut [f32],
        width: usize,
    ) {
        for (row, out) in bytes.chunks_exact(row_bytes).zip(out.chunks_exact_mut(width)) {
            blocks::dequantize_row(dtype, &row[part.start..part.end], out);
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
        let error = weight.requantize(&[0.0; 63]).unwrap_err().to_string();
        assert_eq!(error, "requantize: elements is 63, expected 64");
    }
}
