//! bitsandbytes NF4 and FP4: blocks run over the flat matrix and may cross its rows.

use std::ops::Range;

use qpeft_formats::bitsandbytes::FourBit;

use crate::cpu::by_isa;

/// Elements of a row that share a scale: a whole block where it divides the row, else none for sure.
pub(super) fn block_len(weight: &FourBit) -> usize {
    let state = weight.state();
    if state.cols.is_multiple_of(state.blocksize) { state.blocksize } else { 1 }
}

by_isa! {
    /// `out.len()` elements of the flat matrix from `start` on.
    fn dequantize(weight: &FourBit, start: usize, out: &mut [f32]) {
        weight.dequantize(start, out);
    }
}

by_isa! {
    /// `width` columns from `col` on of the rows from `row` on.
    fn dequantize_strided(weight: &FourBit, row: usize, col: usize, width: usize, out: &mut [f32]) {
        for (r, out) in out.chunks_exact_mut(width).enumerate() {
            weight.dequantize((row + r) * weight.state().cols + col, out);
        }
    }
}

pub(super) fn range(weight: &FourBit, start: usize, out: &mut [f32]) {
    dequantize(weight, start, out);
}

/// Some columns of some rows; at least one column.
pub(super) fn tile(weight: &FourBit, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
    dequantize_strided(weight, rows.start, cols.start, cols.len(), out);
}

#[cfg(test)]
mod tests {
    use super::super::{BaseWeight, WeightType};
    use super::*;
    use crate::testing::Mat;
    use qpeft_formats::bitsandbytes::{QuantState, QuantType};
    use qpeft_formats::safetensors::Dtype;

    #[test]
    fn rows_and_tiles_are_parts_of_the_whole_also_where_blocks_cross_rows() {
        for (rows, cols) in [(37, 192), (9, 48), (7, 131), (130, 1)] {
            for quant_type in QuantType::ALL {
                for double in [false, true] {
                    let dense =
                        BaseWeight::from_f32(rows, cols, &Mat::random(1, rows, cols, 1.0).values()).unwrap();
                    let weight = dense.quantized(WeightType::FourBit { quant_type, double }).unwrap();
                    let whole = weight.dequantize();
                    let mut out = vec![f32::NAN; 3 * cols];
                    weight.dequantize_rows(rows - 4..rows - 1, &mut out);
                    assert_eq!(out, whole[(rows - 4) * cols..(rows - 1) * cols]);
                    let (from, to) = if block_len_of(&weight) == 1 { (cols / 3, cols) } else { (64, 128) };
                    let mut out = vec![f32::NAN; 4 * (to - from)];
                    weight.dequantize_tile(2..6, from..to, &mut out);
                    for (r, tile) in out.chunks(to - from).enumerate() {
                        assert_eq!(tile, &whole[(2 + r) * cols..][from..to], "row {r} of {rows} x {cols}");
                    }
                    assert_eq!(weight.requantize(&whole).unwrap().type_name(), weight.type_name());
                }
            }
        }
    }

    fn packed(state: QuantState, double: bool, values: &[f32]) -> FourBit {
        let of = WeightType::FourBit { quant_type: state.quant_type, double };
        let empty = BaseWeight::empty_from(of, state.rows, state.cols, state.dtype).unwrap();
        empty.requantize(values).unwrap().four_bit().unwrap().clone()
    }

    fn block_len_of(weight: &BaseWeight) -> usize {
        weight.block_len()
    }

    #[test]
    fn tasks_quantize_as_one_pass_does() {
        let (rows, cols) = (300, 331);
        let values = Mat::random(5, rows, cols, 1.0).values();
        let state = QuantState { quant_type: QuantType::Nf4, blocksize: 64, rows, cols, dtype: Dtype::BF16 };
        let (a, b) = (packed(state, true, &values), FourBit::quantize(state, &values, true));
        for (a, b) in a.tensors("w").iter().zip(b.tensors("w")) {
            assert!(a.name == b.name && a.bytes[..] == b.bytes[..], "{}", a.name);
        }
    }

    /// `cargo test --release -p qpeft-kernels four_bit_speed -- --ignored --nocapture`
    #[test]
    #[ignore = "prints elements per second; asserts nothing, because machines differ"]
    fn four_bit_speed() {
        let (rows, cols) = (96, 4096);
        let values = Mat::random(5, rows, cols, 1.0).values();
        let mut out = vec![0.0; 16 * cols];
        for quant_type in QuantType::ALL {
            for double in [false, true] {
                for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
                    let state = QuantState { quant_type, blocksize: 64, rows, cols, dtype };
                    let weight = BaseWeight::from_four_bit(packed(state, double, &values));
                    let mut best = f64::INFINITY;
                    for _ in 0..200 {
                        let clock = std::time::Instant::now();
                        for row in (0..rows).step_by(16) {
                            weight.dequantize_rows(row..row + 16, &mut out);
                            std::hint::black_box(&mut out);
                        }
                        best = best.min(clock.elapsed().as_secs_f64());
                    }
                    let rate = (rows * cols) as f64 / best * 1e-9;
                    println!("{:7} of {dtype:?}: {rate:.2} Gelem/s", weight.type_name());
                }
            }
        }
    }
}
