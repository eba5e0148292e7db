//! Every codec against files that llama.cpp's own quantizer wrote (testdata/ggml/blocks.safetensors).

use super::{dequantize_row, quantize_row};
use crate::dtype::GgmlType;
use safetensors::SafeTensors;

/// The tensors of the golden file: rows of a real model, the same with noise, and edge cases.
const TENSORS: [&str; 3] = ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight", "blk.2.ffn_up.weight"];

const GOLDEN: &[u8] = include_bytes!("../../../testdata/ggml/blocks.safetensors");

/// The same rows in the IQ types, with and without importance, and blocks of random bits.
const IQ_GOLDEN: &[u8] = include_bytes!("../../../testdata/ggml/iq_blocks.safetensors");

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

/// Dequantizes blocks of random bits and compares all bits.
fn dequantizes_random_bits(dtype: GgmlType) {
    let file = SafeTensors::deserialize(IQ_GOLDEN).expect("the golden file is a safetensors file");
    let (_, bytes) = tensor(&file, &format!("{dtype}.random.bytes")).expect("random blocks");
    let (_, expected) = tensor(&file, &format!("{dtype}.random.f32")).expect("and their values");
    let expected = floats(&expected);
    let mut values = vec![0.0; expected.len()];
    dequantize_row(dtype, &bytes, &mut values);
    for (i, (value, expected)) in values.iter().zip(&expected).enumerate() {
        assert_eq!(value.to_bits(), expected.to_bits(), "{dtype} element {i}");
    }
}

/// Quantizes every source tensor, with its importance and where the type allows it without.
fn quantizes_with_and_without_importance(dtype: GgmlType) {
    let file = SafeTensors::deserialize(GOLDEN).expect("the golden file is a safetensors file");
    let iq_file = SafeTensors::deserialize(IQ_GOLDEN).expect("the golden file is a safetensors file");
    let check = |name: &str, kind: &str, importance: Option<&[f32]>| {
        let (columns, source) = tensor(&file, &format!("F32.{name}")).expect("the source rows");
        let (row_bytes, expected) =
            tensor(&iq_file, &format!("{dtype}.{name}.{kind}")).expect("the bytes of the type");
        for (r, (row, expected)) in
            floats(&source).chunks(columns).zip(expected.chunks(row_bytes)).enumerate()
        {
            let mut bytes = vec![0xa5; row_bytes];
            quantize_row(dtype, row, importance, &mut bytes);
            assert_eq!(bytes, expected, "{dtype} {name} row {r} {kind}");
        }
    };
    for name in TENSORS {
        let (_, importance) = tensor(&iq_file, &format!("importance.{name}")).expect("the importance");
        check(name, "weighted", Some(&floats(&importance)));
        if dtype.require_quantizer(false).is_ok() {
            check(name, "plain", None);
        }
    }
}

macro_rules! iq_golden {
    ($($dtype:ident)*) => {$(
        #[allow(non_snake_case)]
        mod $dtype {
            #[test]
            fn quantizes_to_the_bytes_of_llama_cpp_with_and_without_importance() {
                super::quantizes_with_and_without_importance(super::GgmlType::$dtype);
            }

            #[test]
            fn dequantizes_random_bits_to_the_bits_of_llama_cpp() {
                super::dequantizes_random_bits(super::GgmlType::$dtype);
            }
        }
    )*};
}
iq_golden!(IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS);
