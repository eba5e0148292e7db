//! Quantizing rows with the best instructions of this processor; the codecs are those of the formats.

use qpeft_formats::{GgmlType, blocks};

use super::by_isa;

by_isa! {
    /// Quantizes rows of `row_len` one after another, on the calling thread.
    ///
    /// `Shapes`: rows (R, row_len), importance (row_len): one weight per column, as an importance matrix
    /// has it. `Precision`: the bytes of the reference, whatever the instruction set. Callers ask
    /// [`GgmlType::require_quantizer`] first and refuse what is not finite.
    ///
    /// # Panics
    /// The lengths do not belong together, or values cannot be written in the type.
    pub fn quantize_rows(
        dtype: GgmlType,
        rows: &[f32],
        row_len: usize,
        importance: Option<&[f32]>,
        bytes: &mut [u8],
    ) {
        let row_bytes = row_len / dtype.block_len() * dtype.block_bytes();
        assert!(
            row_len.is_multiple_of(dtype.block_len())
                && rows.len().is_multiple_of(row_len.max(1))
                && bytes.len() == rows.len() / dtype.block_len() * dtype.block_bytes(),
            "rows of {row_len} {dtype} are {row_bytes} bytes each"
        );
        if importance.is_none() {
            // Blocks do not depend on each other, and the codecs are fastest with many of them.
            return blocks::quantize_row(dtype, rows, None, bytes);
        }
        for (row, bytes) in rows.chunks_exact(row_len.max(1)).zip(bytes.chunks_exact_mut(row_bytes.max(1))) {
            blocks::quantize_row(dtype, row, importance, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Mat;

    #[test]
    fn every_instruction_set_writes_the_bytes_of_the_portable_codec() {
        let (rows, cols) = (24, 768);
        let mut values = Mat::random(1, rows, cols, 0.05).values();
        values[cols..2 * cols].fill(0.0);
        values[2 * cols..3 * cols].iter_mut().for_each(|x| *x *= 1e-12);
        values[3 * cols..4 * cols].iter_mut().for_each(|x| *x = x.abs() + 0.1);
        let importance: Vec<f32> =
            Mat::random(2, 1, cols, 1.0).values().iter().map(|x| (x * x - 0.2).max(0.0)).collect();
        for dtype in GgmlType::ALL {
            for importance in [None, Some(&importance[..])] {
                if dtype.require_quantizer(importance.is_some()).is_err() {
                    continue;
                }
                let row_bytes = dtype.row_bytes(cols).unwrap();
                let (mut found, mut expected) = (vec![0xa5; rows * row_bytes], vec![0x5a; rows * row_bytes]);
                quantize_rows(dtype, &values, cols, importance, &mut found);
                for (row, bytes) in values.chunks(cols).zip(expected.chunks_mut(row_bytes)) {
                    blocks::quantize_row(dtype, row, importance, bytes);
                }
                assert!(found == expected, "{dtype}, importance: {}", importance.is_some());
            }
        }
    }

    #[test]
    #[should_panic(expected = "rows of 256 Q4_K are 144 bytes each")]
    fn too_few_bytes_panic() {
        quantize_rows(GgmlType::Q4_K, &[0.0; 512], 256, None, &mut [0; 144]);
    }
}
