//! Other values in the type of a weight, and its values in another type.

use std::ops::Range;

use qpeft_formats::bitsandbytes::{FourBit, Int8};
use qpeft_formats::blocks;
use qpeft_formats::file::Bytes;
use qpeft_formats::safetensors::Dtype;
use rayon::prelude::*;

use super::{BaseWeight, Storage, WeightType};
use crate::cpu::scratch::with_scratch;
use crate::error::{Error, Result, check};
use crate::ops::quantize::Packers;

impl BaseWeight {
    /// Other values in the same type and shape, rounded to it row by row, in parallel.
    ///
    /// # Errors
    /// `values` has another length; values cannot be written in the type; an element is not finite (the first one is named).
    pub fn requantize(&self, values: &[f32]) -> Result<BaseWeight> {
        self.requantize_by(&Packers::default(), values)
    }

    /// As [`BaseWeight::requantize`], by `packers`.
    ///
    /// # Errors
    /// See there; or a device refuses.
    pub fn requantize_by(&self, packers: &Packers, values: &[f32]) -> Result<BaseWeight> {
        check("requantize", "elements", self.rows * self.cols, values.len())?;
        let cols = self.cols;
        self.filled(packers, |rows, out| out.copy_from_slice(&values[rows.start * cols..rows.end * cols]))
    }

    /// The same values in another type, rounded to it, in parallel.
    ///
    /// # Errors
    /// Rows are not whole blocks of the type, values cannot be written in it, or one is not finite.
    pub fn quantized(&self, to: WeightType) -> Result<BaseWeight> {
        self.quantized_by(&Packers::default(), to, self.element_type())
    }

    /// As [`BaseWeight::quantized`], by `packers`, as if the elements had been of `dtype` (F32, F16 or BF16): dequantized
    /// 4-bit values are rounded to it.
    ///
    /// # Errors
    /// See [`BaseWeight::quantized`]; or a device refuses.
    pub fn quantized_by(&self, packers: &Packers, to: WeightType, dtype: Dtype) -> Result<BaseWeight> {
        let zeros = to.empty(self.rows, self.cols, dtype)?;
        zeros.filled(packers, |rows, out| self.dequantize_rows(rows, out))
    }

    /// This type and shape with the values of `fill`, which gets rows and room for them.
    fn filled(
        &self,
        packers: &Packers,
        fill: impl Fn(Range<usize>, &mut [f32]) + Sync,
    ) -> Result<BaseWeight> {
        let (rows, cols, factor) = (self.rows, self.cols, self.factor());
        // Blocks of 4 bits run over the flat matrix: a task begins with a block.
        let blocksize = self.four_bit().map_or(1, |weight| weight.state().blocksize);
        let whole_blocks = blocksize >> cols.trailing_zeros().min(blocksize.trailing_zeros());
        let step = (packers.task() / cols.max(1)).max(1).next_multiple_of(whole_blocks);
        let values = |task: usize, values: &mut [f32]| {
            let first = task * step;
            fill(first..first + values.len() / cols.max(1), values);
            if factor != 1.0 {
                for x in values.iter_mut() {
                    *x /= factor;
                }
            }
            blocks::check_finite(values).map_err(|at| Error::NotFinite {
                op: "requantize",
                row: first + at / cols,
                col: at % cols,
                value: values[at],
            })
        };
        let storage = match &self.storage {
            Storage::Ggml { dtype, .. } => {
                dtype.require_quantizer(false)?;
                let row_bytes = dtype.row_bytes(cols)?;
                let mut bytes = vec![0; rows * row_bytes];
                let tasks = bytes.par_chunks_mut((step * row_bytes).max(1)).enumerate();
                first_error(tasks.map(|(task, bytes)| {
                    with_scratch(bytes.len() / dtype.block_bytes() * dtype.block_len(), |rows| {
                        values(task, rows)?;
                        packers.ggml(*dtype, rows, bytes)
                    })
                }))?;
                Storage::Ggml { dtype: *dtype, bytes: Bytes::from(bytes), factor }
            }
            Storage::FourBit(weight) => {
                let state = *weight.state();
                let (mut codes, mut absmax) = (vec![0; state.code_bytes()], vec![0.0; state.blocks()]);
                let task_blocks = step * cols / blocksize;
                let tasks = codes
                    .par_chunks_mut((step * cols / 2).max(1))
                    .zip(absmax.par_chunks_mut(task_blocks.max(1)))
                    .enumerate();
                first_error(tasks.map(|(task, (codes, absmax))| {
                    let elements = (step * cols).min(state.elements() - task * step * cols);
                    with_scratch(elements, |rows| {
                        values(task, rows)?;
                        packers.four_bit(state.quant_type, blocksize, rows, codes, absmax)
                    })
                }))?;
                Storage::FourBit(FourBit::from_parts(state, codes, &absmax, weight.is_double()))
            }
            Storage::Int8(_) => {
                let mut all = vec![0.0; rows * cols];
                let tasks = all.par_chunks_mut((step * cols).max(1)).enumerate();
                first_error(tasks.map(|(task, rows)| values(task, rows)))?;
                Storage::Int8(Int8::quantize(cols, &all))
            }
        };
        Ok(BaseWeight { rows, cols, storage, on_device: None })
    }

    /// A weight of this shape in another type whose values do not matter, to be requantized; itself where that is
    /// its type. A factor that a file keeps beside the blocks stays.
    ///
    /// # Errors
    /// Rows are not whole blocks of the type.
    pub fn retyped(&self, to: WeightType) -> Result<BaseWeight> {
        if to == self.weight_type() {
            return Ok(self.clone());
        }
        let empty = to.empty(self.rows, self.cols, self.element_type())?;
        Ok(if matches!(to, WeightType::Ggml(_)) { empty.scaled_by(self.factor()) } else { empty })
    }
}

/// The first error of tasks in their order, once all are done.
fn first_error(tasks: impl IndexedParallelIterator<Item = Result<()>>) -> Result<()> {
    tasks.collect::<Vec<_>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use qpeft_formats::GgmlType;

    use crate::testing::Mat;
    use crate::weight::WeightType;
    use crate::weight::tests::zeros;

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
        let scaled = zeros(GgmlType::NVFP4, 6, 128).scaled_by(0.25);
        let bf16 =
            scaled.retyped(WeightType::Ggml(GgmlType::BF16)).unwrap().requantize(&[3.0; 6 * 128]).unwrap();
        assert_eq!((bf16.factor(), bf16.dequantize()[0]), (0.25, 3.0), "the factor goes on in another type");
        let tiny = zeros(GgmlType::NVFP4, 1, 64).scaled_by(1e-38);
        let error = tiny.requantize(&[1e4; 64]).unwrap_err().to_string();
        assert_eq!(error, "requantize: row 0, column 0 is `inf`, expected a finite number");
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
        let weight = zeros(GgmlType::Q4_0, 700, 64);
        let mut values = vec![1.0; 700 * 64];
        for row in [699, 601, 600] {
            values[row * 64 + 7] = f32::NAN;
            let error = weight.requantize(&values).unwrap_err().to_string();
            assert_eq!(error, format!("requantize: row {row}, column 7 is `NaN`, expected a finite number"));
        }
        let weight = zeros(GgmlType::Q4_0, 2, 32);
        let error = weight.requantize(&[0.0; 63]).unwrap_err().to_string();
        assert_eq!(error, "requantize: elements is 63, expected 64");
    }
}
