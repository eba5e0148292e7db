//! Every codec against what ggml's own library makes of the same rows (testdata/ggml/*_blocks.safetensors).
//!
//! A file holds source rows, importances of their columns, and for a type the bytes without and with each
//! importance, the values of those bytes, and random blocks with their values. A type is compared on every
//! file that mentions it, and the test counts what was compared.

use super::{dequantize_row, quantize_row};
use crate::dtype::{GgmlType, Quantizer};
use safetensors::SafeTensors;

/// Rows of a real model, the same with noise, and edge cases, as llama-quantize writes them; their names.
const ROWS: &[u8] = include_bytes!("../../../testdata/ggml/blocks.safetensors");
const ROW_NAMES: [&str; 3] = ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.2.ffn_up.weight"];

/// The same rows in the IQ types, with and without importance.
const IQ_TYPES: &[u8] = include_bytes!("../../../testdata/ggml/iq_blocks.safetensors");

/// Files with rows of their own: the K-quants, and what is neither a K-quant nor an IQ type.
const OTHER_TYPES: [&[u8]; 2] = [
    include_bytes!("../../../testdata/ggml/k_blocks.safetensors"),
    include_bytes!("../../../testdata/ggml/simple_blocks.safetensors"),
];

/// Elements that were compared.
#[derive(Default)]
struct Compared {
    values: usize,
    plain: usize,
    weighted: usize,
}

/// A tensor of a golden file: bytes, and how many belong to a row.
struct Golden<'a> {
    bytes: &'a [u8],
    row_bytes: usize,
}

impl Golden<'_> {
    fn floats(&self) -> Vec<f32> {
        self.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

fn open(file: &'static [u8]) -> SafeTensors<'static> {
    SafeTensors::deserialize(file).expect("the golden file is a safetensors file")
}

fn find<'a>(file: &SafeTensors<'a>, name: &str) -> Option<Golden<'a>> {
    let view = file.tensor(name).ok()?;
    let rows: usize = view.shape()[..view.shape().len() - 1].iter().product();
    Some(Golden { bytes: view.data(), row_bytes: view.data().len() / rows })
}

/// Quantizes `rows` and compares all bytes; how many elements, none if the file has no such bytes.
fn quantizes(
    dtype: GgmlType,
    rows: &Golden<'_>,
    importance: Option<&[f32]>,
    expected: Option<Golden<'_>>,
) -> usize {
    let Some(expected) = expected else { return 0 };
    let (values, columns) = (rows.floats(), rows.row_bytes / 4);
    assert_eq!(values.len() / columns, expected.bytes.len() / expected.row_bytes, "{dtype}: rows");
    for (r, (row, expected)) in
        values.chunks(columns).zip(expected.bytes.chunks(expected.row_bytes)).enumerate()
    {
        let mut bytes = vec![0xa5; expected.len()];
        quantize_row(dtype, row, importance, &mut bytes);
        let blocks = bytes.chunks(dtype.block_bytes()).zip(expected.chunks(dtype.block_bytes()));
        for (b, (bytes, expected)) in blocks.enumerate() {
            let weighted = importance.is_some();
            assert_eq!(bytes, expected, "{dtype} row {r} block {b}, importance: {weighted}");
        }
    }
    values.len()
}

/// Dequantizes blocks and compares all bits; how many elements, none if the file has no such blocks.
fn dequantizes(dtype: GgmlType, blocks: Option<Golden<'_>>, expected: Option<Golden<'_>>) -> usize {
    let Some((blocks, expected)) = blocks.zip(expected) else { return 0 };
    let expected = expected.floats();
    let mut values = vec![f32::NAN; expected.len()];
    dequantize_row(dtype, blocks.bytes, &mut values);
    for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
        assert_eq!(value.to_bits(), expected.to_bits(), "{dtype} element {i}: {value} for {expected}");
    }
    values.len()
}

/// Compares a type with everything that the files have of it.
fn compare(dtype: GgmlType) -> Compared {
    let mut compared = Compared::default();
    let (file, iq_file) = (open(ROWS), open(IQ_TYPES));
    for name in ROW_NAMES {
        let rows = find(&file, &format!("F32.{name}")).expect("the source rows");
        let bytes = || find(&file, &format!("{dtype}.{name}.bytes"));
        let importance =
            find(&iq_file, &format!("importance.{name}")).expect("importance of the rows").floats();
        compared.values += dequantizes(dtype, bytes(), find(&file, &format!("{dtype}.{name}.f32")));
        compared.plain += quantizes(dtype, &rows, None, bytes());
        compared.plain += quantizes(dtype, &rows, None, find(&iq_file, &format!("{dtype}.{name}.plain")));
        let weighted = find(&iq_file, &format!("{dtype}.{name}.weighted"));
        compared.weighted += quantizes(dtype, &rows, Some(&importance), weighted);
    }
    for file in [iq_file, open(OTHER_TYPES[0]), open(OTHER_TYPES[1])] {
        let of_type = |name: &str| find(&file, &format!("{dtype}.{name}"));
        compared.values += dequantizes(dtype, of_type("bytes"), of_type("f32"));
        let random = of_type("random").or_else(|| of_type("random.bytes"));
        compared.values += dequantizes(dtype, random, of_type("random.f32"));
        let Some(rows) = find(&file, "rows") else { continue };
        compared.plain += quantizes(dtype, &rows, None, of_type("bytes"));
        let importances = find(&file, "importance").expect("importance of the columns").floats();
        for (i, importance) in importances.chunks(rows.row_bytes / 4).enumerate() {
            let weighted = of_type(&format!("weighted.{i}")).or_else(|| of_type("weighted"));
            compared.weighted += quantizes(dtype, &rows, Some(importance), weighted);
        }
    }
    compared
}

#[test]
fn every_type_has_the_bits_and_bytes_of_ggml() {
    for dtype in GgmlType::ALL.into_iter().filter(|&t| t != GgmlType::F32) {
        let found = compare(dtype);
        assert!(found.values > 0, "{dtype}: no golden values");
        let (plain, weighted) = match dtype.quantizer() {
            Quantizer::Never => (false, false),
            Quantizer::Plain => (true, found.weighted > 0),
            Quantizer::Weighted => (true, true),
            Quantizer::Required => (false, true),
        };
        assert_eq!((found.plain > 0, found.weighted > 0), (plain, weighted), "{dtype}: golden bytes");
    }
}

#[test]
fn f32_passes_through() {
    let bytes = find(&open(ROWS), "F32.blk.2.ffn_up.weight").expect("the source rows");
    let mut values = vec![0.0; bytes.bytes.len() / 4];
    dequantize_row(GgmlType::F32, bytes.bytes, &mut values);
    assert_eq!(values, bytes.floats());
    let mut back = vec![0; bytes.bytes.len()];
    quantize_row(GgmlType::F32, &values, None, &mut back);
    assert_eq!(back, bytes.bytes);
}
