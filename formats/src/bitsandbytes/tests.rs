//! Every case of the goldens: bytes and values that bitsandbytes itself made on a CPU.

use super::*;
use crate::file::Bytes;
use crate::safetensors::{SafetensorsFile, TensorView};
use std::collections::BTreeMap;
use std::path::Path;

fn open(bytes: &'static [u8]) -> SafetensorsFile {
    SafetensorsFile::from_bytes(Path::new("golden"), Bytes::from(bytes.to_vec())).unwrap()
}

fn quantized() -> SafetensorsFile {
    open(include_bytes!("../../../testdata/bitsandbytes/quantized.safetensors"))
}

fn source() -> SafetensorsFile {
    open(include_bytes!("../../../testdata/bitsandbytes/source.safetensors"))
}

/// The cases: `edge_f32.nf4_dq`.
fn cases(file: &SafetensorsFile) -> Vec<String> {
    let mut cases: Vec<String> =
        file.names().filter_map(|n| n.strip_suffix(".weight.quant_map")).map(str::to_owned).collect();
    cases.dedup();
    cases
}

fn read(file: &SafetensorsFile, case: &str) -> FourBit {
    FourBit::read(&format!("{case}.weight"), &|name| file.tensor(name)).unwrap().unwrap()
}

fn dequantized(weight: &FourBit) -> Vec<f32> {
    let mut values = vec![f32::NAN; weight.state().elements()];
    weight.dequantize(0, &mut values);
    values
}

#[test]
fn the_tables_are_those_of_bitsandbytes() {
    let file = open(include_bytes!("../../../testdata/bitsandbytes/codebooks.safetensors"));
    for (name, table) in [
        ("nf4", &QuantType::Nf4.table()[..]),
        ("fp4", &QuantType::Fp4.table()[..]),
        ("dynamic_8bit_signed", &nested::DYNAMIC_MAP[..]),
    ] {
        assert_eq!(file.require(name).unwrap().to_f32().unwrap(), table, "{name}");
    }
}

#[test]
fn every_case_dequantizes_to_the_values_of_bitsandbytes() {
    let expected = open(include_bytes!("../../../testdata/bitsandbytes/dequantized.safetensors"));
    let file = quantized();
    let mut compared = 0;
    for case in cases(&file) {
        let weight = read(&file, &case);
        let Some(expected) = expected.tensor(&case) else { continue };
        assert_eq!(expected.shape, [weight.state().rows, weight.state().cols]);
        assert_eq!(dequantized(&weight), expected.to_f32().unwrap(), "{case}");
        compared += 1;
    }
    assert_eq!(compared, 24);
}

#[test]
fn every_source_quantizes_to_the_bytes_of_bitsandbytes() {
    let (file, source) = (quantized(), source());
    let cases = cases(&file);
    assert_eq!(cases.len(), 30);
    for case in cases {
        let theirs = read(&file, &case);
        let (name, _) = case.split_once('.').unwrap();
        let values = source.require(name).unwrap().to_f32().unwrap();
        let ours = FourBit::quantize(*theirs.state(), &values, theirs.is_double());
        for tensor in ours.tensors(&format!("{case}.weight")) {
            let expected = file.require(&tensor.name).unwrap();
            // One case is stored as elements of another type, which is a view of the same bytes.
            if !case.ends_with("bf16storage") {
                assert_eq!((tensor.dtype, &tensor.shape), (expected.dtype, &expected.shape), "{case}");
            }
            assert!(tensor.bytes[..] == expected.bytes[..], "{}", tensor.name);
        }
    }
}

#[test]
fn any_range_is_a_part_of_the_whole() {
    let file = quantized();
    for case in ["nested_odd_bf16.nf4_dq", "odd_f32.fp4", "half_f16.nf4", "normal_f32.nf4_bs128_dq"] {
        let weight = read(&file, case);
        let whole = dequantized(&weight);
        for start in (0..whole.len()).step_by(37) {
            for len in [0, 1, 2, 3, 31, 64, 65, 128, 200] {
                let len = len.min(whole.len() - start);
                let mut part = vec![f32::NAN; len];
                weight.dequantize(start, &mut part);
                assert_eq!(part, whole[start..start + len], "{case} from {start}");
            }
        }
    }
}

#[test]
fn a_weight_is_read_as_it_was_written() {
    let values: Vec<f32> = (0..33 * 70).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect();
    for quant_type in QuantType::ALL {
        for blocksize in BLOCK_SIZES {
            for double in [false, true] {
                let state = QuantState { quant_type, blocksize, rows: 33, cols: 70, dtype: Dtype::F16 };
                let weight = FourBit::quantize(state, &values, double);
                let tensors: BTreeMap<String, TensorView> =
                    weight.tensors("w").into_iter().map(|t| (t.name.clone(), t)).collect();
                let back = FourBit::read("w", &|name| tensors.get(name).cloned()).unwrap().unwrap();
                assert_eq!((back.state(), back.is_double()), (&state, double));
                assert_eq!(dequantized(&back), dequantized(&weight));
            }
        }
    }
}

#[test]
fn what_was_dequantized_quantizes_to_the_same_codes() {
    let file = quantized();
    for case in ["normal_f32.nf4", "normal_f32.fp4", "odd_f32.nf4"] {
        let weight = read(&file, case);
        let again = FourBit::quantize(*weight.state(), &dequantized(&weight), false);
        assert_eq!(dequantized(&again), dequantized(&weight), "{case}");
    }
}

#[test]
fn int8_has_the_values_of_bitsandbytes() {
    let file = open(include_bytes!("../../../testdata/bitsandbytes/int8.safetensors"));
    let weight = Int8::read("layer.weight", &|name| file.tensor(name)).unwrap().unwrap();
    let expected = file.require("dequantized_f32").unwrap().to_f32().unwrap();
    let (rows, cols) = (weight.rows(), weight.cols());
    let mut values = vec![f32::NAN; rows * cols];
    values.chunks_mut(cols).enumerate().for_each(|(row, out)| weight.dequantize(row, 0..cols, out));
    assert_eq!(values, expected);

    let source = file.require("source.weight_f16").unwrap().to_f32().unwrap();
    for tensor in Int8::quantize(cols, &source).tensors("layer.weight") {
        let expected = file.require(&tensor.name).unwrap();
        assert_eq!((tensor.dtype, &tensor.shape), (expected.dtype, &expected.shape));
        assert!(tensor.bytes[..] == expected.bytes[..], "{}", tensor.name);
    }
}

/// `cargo test --release -p qpeft-formats four_bit_speed -- --ignored --nocapture`
#[test]
#[ignore = "prints elements per second; asserts nothing, because machines differ"]
fn four_bit_speed() {
    let values: Vec<f32> = (0..256 * 256).map(|i| ((i * 37 % 1013) as f32 - 500.0) * 0.01).collect();
    for quant_type in QuantType::ALL {
        let state = QuantState { quant_type, blocksize: 64, rows: 256, cols: 256, dtype: Dtype::F32 };
        let clock = std::time::Instant::now();
        for _ in 0..20 {
            std::hint::black_box(FourBit::quantize(state, std::hint::black_box(&values), false));
        }
        let rate = 20.0 * values.len() as f64 / clock.elapsed().as_secs_f64();
        println!("{} quantize {:.3} Gelem/s", quant_type.name(), rate * 1e-9);
    }
}
