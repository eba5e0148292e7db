//! What must hold for every codec beyond the golden rows: error bounds, stability, hostile input.

use super::{check_finite, dequantize_row, quantize_row};
use crate::dtype::{GgmlType, Quantizer};

/// Unit roundoff of f16 and bf16.
const F16: f32 = 1.0 / 2048.0;
const BF16: f32 = 1.0 / 256.0;
/// Below this the roundings of f16 no longer shrink with the number.
const F16_MIN: f32 = 1.0 / 16384.0;

/// `(type, element, rms)`: largest error of an element as a fraction of the largest magnitude in its
/// block, and rms error as a fraction of the rms of Gaussian data.
///
/// `element` follows from the format: half a step (a whole step where the range is not symmetric and
/// the far end is cut off) plus the f16 roundings of d and m. The K-quants minimize a sum of squares
/// and promise nothing for one element; the 8-bit scales of NVFP4 have an absolute spacing. `rms` is the
/// measured value with 2 % to spare.
const ERROR_BOUNDS: [(GgmlType, Option<f32>, f64); 25] = [
    (GgmlType::F32, Some(0.0), 0.0),
    (GgmlType::F16, Some(F16), 2.12e-4),
    (GgmlType::BF16, Some(BF16), 1.70e-3),
    (GgmlType::Q4_0, Some(1.0 / 8.0 + F16), 0.0864),
    (GgmlType::Q4_1, Some(1.0 / 15.0 + 3.0 * F16), 0.0789),
    (GgmlType::Q5_0, Some(1.0 / 16.0 + F16), 0.0429),
    (GgmlType::Q5_1, Some(1.0 / 31.0 + 3.0 * F16), 0.0382),
    (GgmlType::Q8_0, Some(0.5 / 127.0 + F16), 5.37e-3),
    (GgmlType::Q2_K, None, 0.2994),
    (GgmlType::Q3_K, None, 0.1519),
    (GgmlType::Q4_K, None, 0.0718),
    (GgmlType::Q5_K, None, 0.0364),
    (GgmlType::Q6_K, None, 0.0179),
    (GgmlType::IQ1_M, None, 0.592),
    (GgmlType::IQ2_S, None, 0.268),
    (GgmlType::IQ3_XXS, None, 0.216),
    (GgmlType::IQ3_S, None, 0.168),
    (GgmlType::IQ4_NL, None, 0.0768),
    (GgmlType::IQ4_XS, None, 0.0774),
    (GgmlType::TQ1_0, Some(0.5 + F16), 0.811),
    (GgmlType::TQ2_0, Some(0.5 + F16), 0.811),
    (GgmlType::MXFP4, Some(0.25), 0.120),
    (GgmlType::NVFP4, None, 0.0981),
    (GgmlType::Q1_0, Some(1.0 + F16), 0.608),
    (GgmlType::Q2_0, Some(0.5 + F16), 0.726),
];

/// `(type, rms)` as in [`ERROR_BOUNDS`] for the types that need importance, under importance 1.
const RMS_BOUNDS_WITH_IMPORTANCE: [(GgmlType, f64); 3] =
    [(GgmlType::IQ1_S, 0.493), (GgmlType::IQ2_XXS, 0.348), (GgmlType::IQ2_XS, 0.305)];

/// A fixed stream of 64-bit numbers (SplitMix64).
struct Stream(u64);

impl Stream {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Close to a standard normal number: the sum of twelve uniform ones.
    fn gaussian(&mut self) -> f32 {
        let sum: f64 = (0..12).map(|_| (self.next() >> 11) as f64 / (1u64 << 53) as f64).sum();
        (sum - 6.0) as f32
    }

    fn row(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.gaussian() * 0.05).collect()
    }
}

fn quantized(dtype: GgmlType, row: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(row.len()).expect("whole blocks")];
    quantize_row(dtype, row, None, &mut bytes);
    bytes
}

fn weighted(dtype: GgmlType, row: &[f32], importance: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; dtype.row_bytes(row.len()).expect("whole blocks")];
    quantize_row(dtype, row, Some(importance), &mut bytes);
    bytes
}

/// The types in which values can be written with importance.
fn writable_with_importance() -> impl Iterator<Item = GgmlType> {
    GgmlType::ALL.into_iter().filter(|t| t.require_quantizer(true).is_ok())
}

fn dequantized(dtype: GgmlType, bytes: &[u8]) -> Vec<f32> {
    let mut row = vec![0.0; bytes.len() / dtype.block_bytes() * dtype.block_len()];
    dequantize_row(dtype, bytes, &mut row);
    row
}

#[test]
fn errors_stay_within_the_bounds_of_the_type() {
    assert!(ERROR_BOUNDS.iter().map(|bound| bound.0).eq(GgmlType::writable()));
    for (dtype, element_bound, rms_bound) in ERROR_BOUNDS {
        let row = Stream(1).row(256 * 256);
        let back = dequantized(dtype, &quantized(dtype, &row));
        let (mut errors, mut squares) = (0.0, 0.0);
        for (x, y) in row.chunks(dtype.block_len()).zip(back.chunks(dtype.block_len())) {
            let largest = x.iter().fold(F16_MIN, |largest, x| largest.max(x.abs()));
            for (x, y) in x.iter().zip(y) {
                let error = (x - y).abs();
                if let Some(bound) = element_bound {
                    // The last factor covers the f32 roundings of this comparison.
                    assert!(error <= bound * largest * 1.00001, "{dtype}: {x} became {y}");
                }
                errors += f64::from(error).powi(2);
                squares += f64::from(*x).powi(2);
            }
        }
        let rms = (errors / squares).sqrt();
        assert!(rms <= rms_bound, "{dtype}: rms error {rms:.3e} of the data's rms");
    }
}

#[test]
fn errors_stay_within_the_bounds_of_the_types_that_need_importance() {
    let required = GgmlType::ALL.into_iter().filter(|t| t.quantizer() == Quantizer::Required);
    assert!(RMS_BOUNDS_WITH_IMPORTANCE.iter().map(|bound| bound.0).eq(required));
    for (dtype, rms_bound) in RMS_BOUNDS_WITH_IMPORTANCE {
        let row = Stream(1).row(256 * 256);
        let back = dequantized(dtype, &weighted(dtype, &row, &vec![1.0; row.len()]));
        let squares = |x: &mut dyn Iterator<Item = f32>| x.map(|x| f64::from(x).powi(2)).sum::<f64>();
        let errors = squares(&mut row.iter().zip(&back).map(|(x, y)| x - y));
        let rms = (errors / squares(&mut row.iter().copied())).sqrt();
        assert!(rms <= rms_bound, "{dtype}: rms error {rms:.3e} of the data's rms");
    }
}

#[test]
fn importance_lowers_the_error_that_it_weighs() {
    for dtype in GgmlType::ALL.into_iter().filter(|t| t.quantizer() == Quantizer::Weighted) {
        let mut stream = Stream(6);
        let row = stream.row(64 * 256);
        let importance: Vec<f32> = row.iter().map(|_| stream.gaussian().exp()).collect();
        let error = |bytes: &[u8]| -> f64 {
            let back = dequantized(dtype, bytes);
            let errors = row.iter().zip(&back).map(|(x, y)| f64::from(x - y).powi(2));
            errors.zip(&importance).map(|(error, weight)| error * f64::from(*weight)).sum()
        };
        let (with, without) = (error(&weighted(dtype, &row, &importance)), error(&quantized(dtype, &row)));
        assert!(with < without, "{dtype}: {with:.4e} with importance, {without:.4e} without");
    }
}

#[test]
fn quantizing_with_importance_overwrites_every_byte() {
    for dtype in writable_with_importance() {
        let mut stream = Stream(7);
        let mut row = stream.row(4 * 256);
        row[256..512].fill(0.0);
        row[600..700].fill(0.0);
        let mut importance: Vec<f32> = row.iter().map(|_| stream.gaussian().abs()).collect();
        importance[..100].fill(0.0);
        let mut ones = vec![0xff; dtype.row_bytes(row.len()).expect("whole blocks")];
        quantize_row(dtype, &row, Some(&importance), &mut ones);
        assert_eq!(ones, weighted(dtype, &row, &importance), "{dtype}");
    }
}

#[test]
fn a_zero_row_stays_zero_under_any_importance() {
    for dtype in writable_with_importance() {
        for importance in [0.0, 1.0, f32::MAX] {
            let back = dequantized(dtype, &weighted(dtype, &[0.0; 512], &[importance; 512]));
            assert!(back.iter().all(|x| *x == 0.0), "{dtype}");
        }
    }
}

#[test]
fn no_floats_and_no_importance_make_quantizing_panic() {
    let mut stream = Stream(8);
    for dtype in writable_with_importance() {
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, -1.0, 0.0, 1e-45] {
            let row = stream.row(256);
            let _ = weighted(dtype, &row, &[special; 256]);
            let mut importance = stream.row(256);
            importance[100] = special;
            let _ = weighted(dtype, &row, &importance);
            let _ = weighted(dtype, &importance, &row);
        }
        let mut bits = || (0..64 * 256).map(|_| f32::from_bits(stream.next() as u32)).collect::<Vec<f32>>();
        let _ = weighted(dtype, &bits(), &bits());
    }
}

#[test]
fn bytes_of_types_without_offset_survive_dequantizing_and_quantizing_again() {
    let stable = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::BF16,
        GgmlType::Q4_0,
        GgmlType::Q5_0,
        GgmlType::Q8_0,
        GgmlType::TQ1_0,
        GgmlType::TQ2_0,
        GgmlType::MXFP4,
        GgmlType::Q1_0,
        GgmlType::Q2_0,
    ];
    for dtype in stable {
        let mut row = Stream(2).row(64 * 256);
        row[..64].fill(0.0);
        row[64..96].fill(-0.25);
        let bytes = quantized(dtype, &row);
        assert_eq!(quantized(dtype, &dequantized(dtype, &bytes)), bytes, "{dtype}");
    }
}

#[test]
fn quantizing_overwrites_every_byte() {
    for dtype in GgmlType::writable() {
        let mut row = Stream(3).row(4 * 256);
        row[256..512].fill(0.0);
        let mut ones = vec![0xff; dtype.row_bytes(row.len()).expect("whole blocks")];
        quantize_row(dtype, &row, None, &mut ones);
        assert_eq!(ones, quantized(dtype, &row), "{dtype}");
    }
}

#[test]
fn a_zero_row_stays_zero() {
    for dtype in GgmlType::writable() {
        let mut bytes = quantized(dtype, &[0.0; 512]);
        assert!(dequantized(dtype, &bytes).iter().all(|x| *x == 0.0), "{dtype}");
        quantize_row(dtype, &[0.0; 512], Some(&[1.0; 512]), &mut bytes);
        assert!(dequantized(dtype, &bytes).iter().all(|x| *x == 0.0), "{dtype} with importance");
    }
}

#[test]
fn no_floats_make_quantizing_panic() {
    let mut stream = Stream(4);
    for dtype in GgmlType::writable() {
        for special in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 1e-45] {
            let _ = quantized(dtype, &[special; 256]);
            let mut row = stream.row(256);
            row[100] = special;
            let mut bytes = quantized(dtype, &row);
            for importance in [special, 0.0, 1.0] {
                quantize_row(dtype, &row, Some(&[importance; 256]), &mut bytes);
            }
        }
        let bits: Vec<f32> = (0..64 * 256).map(|_| f32::from_bits(stream.next() as u32)).collect();
        let _ = quantized(dtype, &bits);
    }
}

#[test]
fn no_bytes_make_dequantizing_panic() {
    let mut stream = Stream(5);
    for dtype in GgmlType::ALL {
        let bytes = dtype.row_bytes(64 * 256).expect("whole blocks");
        let bytes: Vec<u8> = (0..bytes).map(|_| stream.next() as u8).collect();
        let _ = dequantized(dtype, &bytes);
        let _ = dequantized(dtype, &vec![0xff; bytes.len()]);
    }
}

#[test]
#[should_panic(expected = "the same number of whole blocks")]
fn dequantizing_into_a_longer_row_panics() {
    dequantize_row(GgmlType::Q4_K, &[0; 144], &mut [0.0; 512]);
}

#[test]
#[should_panic(expected = "the same number of whole blocks")]
fn quantizing_part_of_a_block_panics() {
    quantize_row(GgmlType::Q8_0, &[0.0; 40], None, &mut [0; 34]);
}

#[test]
fn the_first_element_that_is_not_finite_is_named() {
    let mut row = [1.0; 64];
    assert_eq!(check_finite(&row), Ok(()));
    row[41] = f32::NEG_INFINITY;
    row[63] = f32::NAN;
    assert_eq!(check_finite(&row), Err(41));
    let error = crate::Error::new(crate::error::Kind::NotFinite { index: 41, value: row[41] });
    assert_eq!(error.to_string(), "element 41 is `-inf`, and only finite numbers can be quantized");
}
