//! Every codec against files that llama.cpp's own quantizer wrote (testdata/ggml/blocks.safetensors).

use super::{dequantize_row, quantize_row};
use crate::dtype::GgmlType;
use safetensors::SafeTensors;

/// The tensors of the golden file: rows of a real model, the same with noise, and edge cases.
const TENSORS: [&str; 3] = ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.2.ffn_up.weight"];

const GOLDEN: &[u8] = include_bytes!("../../../testdata/ggml/blocks.safetensors");

fn tensor(file: &SafeTensors<'_>, name: &str) -> Option<(usize, Vec<u8>)> {
    let view = file.tensor(name).ok()?;
    Some((*view.shape().last().expect("two dimensions"), view.data().to_vec()))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Dequantizes every golden tensor of a type and compares all bits.
fn dequantizes(dtype: GgmlType) {
    let file = SafeTensors::deserialize(GOLDEN).expect("the golden file is a safetensors file");
    let mut compared = 0;
    for name in TENSORS {
        let Some((_, expected)) = tensor(&file, &format!("{dtype}.{name}.f32")) else { continue };
        let (_, bytes) = tensor(&file, &format!("{dtype}.{name}.bytes")).expect("bytes go with f32");
        let expected = floats(&expected);
        let mut values = vec![0.0; expected.len()];
        dequantize_row(dtype, &bytes, &mut values);
        for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(value.to_bits(), expected.to_bits(), "{dtype} {name} element {i}");
        }
        compared += values.len();
    }
    assert_eq!(compared, 2 * 768 + 4 * 512, "{dtype}");
}

/// Quantizes every source tensor and compares all bytes.
fn quantizes(dtype: GgmlType) {
    let file = SafeTensors::deserialize(GOLDEN).expect("the golden file is a safetensors file");
    for name in TENSORS {
        let (columns, source) = tensor(&file, &format!("F32.{name}")).expect("the source rows");
        let (row_bytes, expected) =
            tensor(&file, &format!("{dtype}.{name}.bytes")).expect("the bytes of the type");
        for (r, (row, expected)) in
            floats(&source).chunks(columns).zip(expected.chunks(row_bytes)).enumerate()
        {
            let mut bytes = vec![0xa5; row_bytes];
            quantize_row(dtype, row, None, &mut bytes);
            assert_eq!(bytes, expected, "{dtype} {name} row {r}");
        }
    }
}

#[test]
fn f32_passes_through() {
    let file = SafeTensors::deserialize(GOLDEN).expect("the golden file is a safetensors file");
    let (_, bytes) = tensor(&file, "F32.blk.2.ffn_up.weight").expect("the source rows");
    let mut values = vec![0.0; bytes.len() / 4];
    dequantize_row(GgmlType::F32, &bytes, &mut values);
    assert_eq!(values, floats(&bytes));
    let mut back = vec![0; bytes.len()];
    quantize_row(GgmlType::F32, &values, None, &mut back);
    assert_eq!(back, bytes);
}

macro_rules! golden {
    ($($dtype:ident)*) => {$(
        #[allow(non_snake_case)]
        mod $dtype {
            #[test]
            fn dequantizes_to_the_bits_of_llama_cpp() {
                super::dequantizes(super::GgmlType::$dtype);
            }

            #[test]
            fn quantizes_to_the_bytes_of_llama_cpp() {
                super::quantizes(super::GgmlType::$dtype);
            }
        }
    )*};
}
golden!(F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q4_K Q5_K Q6_K);

/// Rows, importances, bytes and values of the K-quants (testdata/make/k_blocks.py).
const K_BLOCKS: &[u8] = include_bytes!("../../../testdata/ggml/k_blocks.safetensors");

/// Dequantizes what was quantized, and blocks of random bytes, and compares all bits.
fn k_dequantizes(dtype: GgmlType) {
    let file = SafeTensors::deserialize(K_BLOCKS).expect("the golden file is a safetensors file");
    for (blocks, values) in [("bytes", "f32"), ("random", "random.f32")] {
        let (_, bytes) = tensor(&file, &format!("{dtype}.{blocks}")).expect("the blocks");
        let expected = floats(&tensor(&file, &format!("{dtype}.{values}")).expect("their values").1);
        let mut values = vec![0.0; expected.len()];
        dequantize_row(dtype, &bytes, &mut values);
        for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
            assert_eq!(value.to_bits(), expected.to_bits(), "{dtype}.{blocks} element {i}");
        }
    }
}

/// Quantizes the rows without importance and with each, and compares all bytes.
fn k_quantizes(dtype: GgmlType) {
    let file = SafeTensors::deserialize(K_BLOCKS).expect("the golden file is a safetensors file");
    let (columns, rows) = tensor(&file, "rows").expect("the rows");
    let importances = floats(&tensor(&file, "importance").expect("weights of the columns").1);
    let weighted = importances.chunks(columns).enumerate().map(|(i, w)| (format!("weighted.{i}"), Some(w)));
    for (name, importance) in std::iter::once(("bytes".to_owned(), None)).chain(weighted) {
        let (row_bytes, expected) = tensor(&file, &format!("{dtype}.{name}")).expect("the bytes");
        for (r, (row, expected)) in floats(&rows).chunks(columns).zip(expected.chunks(row_bytes)).enumerate()
        {
            let mut bytes = vec![0xa5; row_bytes];
            quantize_row(dtype, row, importance, &mut bytes);
            assert_eq!(bytes, expected, "{dtype} {name} row {r}");
        }
    }
}

macro_rules! k_golden {
    ($($dtype:ident $quantizes:ident $dequantizes:ident;)*) => {$(
        #[test]
        fn $quantizes() {
            k_quantizes(GgmlType::$dtype);
        }

        #[test]
        fn $dequantizes() {
            k_dequantizes(GgmlType::$dtype);
        }
    )*};
}
k_golden! {
    Q2_K q2_k_with_and_without_importance_has_the_bytes_of_llama_cpp q2_k_has_the_values_of_llama_cpp;
    Q3_K q3_k_with_and_without_importance_has_the_bytes_of_llama_cpp q3_k_has_the_values_of_llama_cpp;
    Q4_K q4_k_with_and_without_importance_has_the_bytes_of_llama_cpp q4_k_has_the_values_of_llama_cpp;
    Q5_K q5_k_with_and_without_importance_has_the_bytes_of_llama_cpp q5_k_has_the_values_of_llama_cpp;
    Q6_K q6_k_with_and_without_importance_has_the_bytes_of_llama_cpp q6_k_has_the_values_of_llama_cpp;
}

/// Rows, importance, bytes and values of the types that are neither K-quants nor IQ types
/// (testdata/make/simple_blocks.py).
const SIMPLE: &[u8] = include_bytes!("../../../testdata/ggml/simple_blocks.safetensors");

/// Dequantizes the blocks under a name and compares all bits.
fn simple_dequantizes(dtype: GgmlType, name: &str) {
    let file = SafeTensors::deserialize(SIMPLE).expect("the golden file is a safetensors file");
    let (_, bytes) = tensor(&file, &format!("{dtype}.{name}")).expect("the blocks");
    let values = format!("{dtype}.{name}.f32").replace(".bytes", "");
    let expected = floats(&tensor(&file, &values).expect("their values").1);
    let mut values = vec![0.0; expected.len()];
    dequantize_row(dtype, &bytes, &mut values);
    for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
        assert_eq!(value.to_bits(), expected.to_bits(), "{dtype}.{name} element {i}: {value} for {expected}");
    }
}

/// Quantizes the rows without and with importance and compares all bytes.
fn simple_quantizes(dtype: GgmlType) {
    let file = SafeTensors::deserialize(SIMPLE).expect("the golden file is a safetensors file");
    let (columns, rows) = tensor(&file, "rows").expect("the rows");
    let importance = floats(&tensor(&file, "importance").expect("one weight per column").1);
    for (name, importance) in [("bytes", None), ("weighted", Some(&*importance))] {
        let (row_bytes, expected) = tensor(&file, &format!("{dtype}.{name}")).expect("the bytes");
        for (r, (row, expected)) in floats(&rows).chunks(columns).zip(expected.chunks(row_bytes)).enumerate()
        {
            let mut bytes = vec![0xa5; row_bytes];
            quantize_row(dtype, row, importance, &mut bytes);
            for (b, (bytes, expected)) in
                bytes.chunks(dtype.block_bytes()).zip(expected.chunks(dtype.block_bytes())).enumerate()
            {
                assert_eq!(bytes, expected, "{dtype} {name} row {r} block {b}");
            }
        }
    }
}

#[test]
fn simple_types_dequantize_to_the_bits_of_llama_cpp() {
    let written = [
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::TQ1_0,
        GgmlType::TQ2_0,
        GgmlType::MXFP4,
        GgmlType::NVFP4,
        GgmlType::Q1_0,
        GgmlType::Q2_0,
    ];
    let read_only = [
        GgmlType::F64,
        GgmlType::I8,
        GgmlType::I16,
        GgmlType::I32,
        GgmlType::I64,
        GgmlType::Q8_1,
        GgmlType::Q8_K,
    ];
    for dtype in written {
        simple_dequantizes(dtype, "bytes");
    }
    for dtype in written.into_iter().chain(read_only) {
        simple_dequantizes(dtype, "random");
    }
}

macro_rules! simple_golden {
    ($($name:ident: $dtype:ident;)*) => {$(
        #[test]
        fn $name() {
            simple_quantizes(GgmlType::$dtype);
        }
    )*};
}
simple_golden! {
    q4_0_with_and_without_importance_has_the_bytes_of_llama_cpp: Q4_0;
    q4_1_with_and_without_importance_has_the_bytes_of_llama_cpp: Q4_1;
    q5_0_with_and_without_importance_has_the_bytes_of_llama_cpp: Q5_0;
    q5_1_with_and_without_importance_has_the_bytes_of_llama_cpp: Q5_1;
    q8_0_with_and_without_importance_has_the_bytes_of_llama_cpp: Q8_0;
    tq1_0_with_and_without_importance_has_the_bytes_of_llama_cpp: TQ1_0;
    tq2_0_with_and_without_importance_has_the_bytes_of_llama_cpp: TQ2_0;
    mxfp4_with_and_without_importance_has_the_bytes_of_llama_cpp: MXFP4;
    nvfp4_with_and_without_importance_has_the_bytes_of_llama_cpp: NVFP4;
    q1_0_with_and_without_importance_has_the_bytes_of_llama_cpp: Q1_0;
    q2_0_with_and_without_importance_has_the_bytes_of_llama_cpp: Q2_0;
}
