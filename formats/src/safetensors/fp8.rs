//! Elements of 8 bits: E4M3 (finite only) and E5M2, and the scales that lie beside such a weight.
//!
//! `x = element * scale`, in f32. The scale of a weight `m.weight` is `m.weight_scale` or `m.weight_scale_inv`
//! (a factor too, despite its name): one for all, one per row, or one per block of rows and columns.
//! Source: the OCP 8-bit floating point specification; transformers' fine-grained fp8 and
//! compressed-tensors' `float-quantized`, read for the names.

use super::{Dtype, TensorView};
use crate::blocks::half::f16_to_f32;
use crate::error::{Error, Kind, Place, Result};

/// E4M3: bias 7, no infinity, NaN is all ones. Exact in f32.
fn e4m3(byte: u8) -> f32 {
    let magnitude = byte & 0x7f;
    let value = if magnitude == 0x7f {
        f32::NAN
    } else if magnitude < 8 {
        f32::from(magnitude) / 512.0
    } else {
        // The exponent moves from bias 7 to bias 127, the mantissa from bit 0 to bit 20.
        f32::from_bits((u32::from(magnitude) << 20) + ((127 - 7) << 23))
    };
    if byte & 0x80 == 0 { value } else { -value }
}

/// E5M2: the upper byte of a binary16.
fn e5m2(byte: u8) -> f32 {
    f16_to_f32(u16::from(byte) << 8)
}

/// The values of all bytes, for the two types that are supported.
pub(super) fn table(dtype: Dtype) -> Option<[f32; 256]> {
    let value: fn(u8) -> f32 = match dtype {
        Dtype::F8_E4M3 => e4m3,
        Dtype::F8_E5M2 => e5m2,
        _ => return None,
    };
    Some(std::array::from_fn(|byte| value(byte as u8)))
}

/// The name of the scale that `find` has for the weight `name`.
pub fn scale_name(name: &str, find: &dyn Fn(&str) -> Option<TensorView>) -> Option<String> {
    ["_scale_inv", "_scale"].into_iter().map(|suffix| format!("{name}{suffix}")).find(|n| find(n).is_some())
}

impl TensorView {
    /// Whether the elements are of 8 bits and have a scale of their own.
    pub fn is_fp8(&self) -> bool {
        table(self.dtype).is_some()
    }

    /// A matrix of 8-bit elements times its scale.
    ///
    /// `block`: rows and columns of a block, where the scale is one of blocks.
    ///
    /// # Errors
    /// The shape of the scale is none that belongs to the matrix, or an element type is not supported.
    pub fn to_f32_scaled(&self, scale: &TensorView, block: Option<[usize; 2]>) -> Result<Vec<f32>> {
        let mut values = self.to_f32()?;
        let factors = scale.to_f32()?;
        let [rows, cols] = self.shape[..] else {
            let found = format!("{:?}", self.shape).into();
            let kind = Kind::WrongShape { expected: "the two sizes of a matrix".into(), found };
            return Err(Error::new(kind).at(Place::Tensor(self.name.clone())));
        };
        let blocks = block.map(|[r, c]| [rows.div_ceil(r), cols.div_ceil(c)]);
        let [block_rows, block_cols] = match scale.shape[..] {
            [] | [1] | [1, 1] => [rows.max(1), cols.max(1)],
            [r] if r == rows => [1, cols.max(1)],
            [r, 1] if r == rows => [1, cols.max(1)],
            [r, c] if blocks == Some([r, c]) => block.expect("there are blocks only with a size"),
            _ => {
                let per_block = blocks.map_or_else(String::new, |shape| format!(" or {shape:?}"));
                let kind = Kind::WrongShape {
                    expected: format!("[], [1], [{rows}], [{rows}, 1]{per_block}").into(),
                    found: format!("{:?}", scale.shape).into(),
                };
                return Err(Error::new(kind).at(Place::Tensor(scale.name.clone())));
            }
        };
        let across = cols.div_ceil(block_cols);
        for (row, values) in values.chunks_mut(cols.max(1)).enumerate() {
            let factors = &factors[row / block_rows * across..];
            for (values, factor) in values.chunks_mut(block_cols).zip(factors) {
                for x in values {
                    *x *= factor;
                }
            }
        }
        Ok(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> TensorView {
        TensorView { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes: bytes.into() }
    }

    fn scale(shape: &[usize], values: &[f32]) -> TensorView {
        view("w_scale", Dtype::F32, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    #[test]
    fn the_marks_of_both_types_are_those_of_the_specification() {
        // Smallest subnormal, largest subnormal, smallest normal, one, largest, NaN.
        let e4 = [
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x7e, 448.0),
        ];
        let e5 = [
            (0x01, 2f32.powi(-16)),
            (0x03, 3.0 * 2f32.powi(-16)),
            (0x04, 2f32.powi(-14)),
            (0x3c, 1.0),
            (0x7b, 57344.0),
        ];
        for (dtype, marks) in [(Dtype::F8_E4M3, e4), (Dtype::F8_E5M2, e5)] {
            let table = table(dtype).unwrap();
            for (byte, value) in marks {
                assert_eq!(table[byte], value, "{dtype} {byte:#04x}");
                assert_eq!(table[byte | 0x80], -value, "{dtype} {byte:#04x}");
            }
            assert!(table[0x7f].is_nan() && table[0xff].is_nan());
        }
        assert_eq!(e5m2(0x7c), f32::INFINITY);
    }

    #[test]
    fn a_scale_is_one_for_all_per_row_or_per_block() {
        // 3 x 5 ones.
        let weight = view("w", Dtype::F8_E4M3, &[3, 5], vec![0x38; 15]);
        let scaled = |scale: &TensorView, block| weight.to_f32_scaled(scale, block).unwrap();
        assert_eq!(scaled(&scale(&[], &[2.0]), None), [2.0; 15]);
        assert_eq!(scaled(&scale(&[1], &[2.0]), Some([2, 2])), [2.0; 15]);
        let rows = [1., 1., 1., 1., 1., 2., 2., 2., 2., 2., 3., 3., 3., 3., 3.];
        assert_eq!(scaled(&scale(&[3, 1], &[1.0, 2.0, 3.0]), None), rows);
        assert_eq!(scaled(&scale(&[3], &[1.0, 2.0, 3.0]), None), rows);
        let blocks = scale(&[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let expected = [1., 1., 2., 2., 3., 1., 1., 2., 2., 3., 4., 4., 5., 5., 6.];
        assert_eq!(scaled(&blocks, Some([2, 2])), expected);
        let error = weight.to_f32_scaled(&blocks, Some([2, 1])).unwrap_err().to_string();
        assert_eq!(error, "tensor `w_scale`: has shape [2, 3], expected [], [1], [3], [3, 1] or [2, 5]");
    }
}
