//! bitsandbytes LLM.int8: a signed byte per element, an f32 per row.

use std::ops::Range;

use qpeft_formats::bitsandbytes::Int8;

use crate::cpu::by_isa;

by_isa! {
    /// Some columns of some rows; at least one column.
    fn dequantize(weight: &Int8, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(cols.len())) {
            weight.dequantize(row, cols.start..cols.end, out);
        }
    }
}

pub(super) fn tile(weight: &Int8, rows: Range<usize>, cols: Range<usize>, out: &mut [f32]) {
    if !cols.is_empty() {
        dequantize(weight, rows, cols, out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::BaseWeight;
    use super::*;
    use crate::testing::Mat;

    #[test]
    fn rows_and_tiles_are_parts_of_the_whole() {
        let (rows, cols) = (19, 77);
        let weight = BaseWeight::from_int8(Int8::quantize(cols, &Mat::random(1, rows, cols, 1.0).values()));
        let whole = weight.dequantize();
        let mut out = vec![f32::NAN; 5 * 30];
        weight.dequantize_tile(3..8, 11..41, &mut out);
        for (r, tile) in out.chunks(30).enumerate() {
            assert_eq!(tile, &whole[(3 + r) * cols..][11..41]);
        }
        assert_eq!((weight.type_name(), weight.size_bytes()), ("int8", rows * (cols + 4)));
    }
}
