//! Packed weights of every type, for tests of ops that read them.

use qpeft_formats::GgmlType;
use qpeft_formats::bitsandbytes::{FourBit, Int8, QuantState, QuantType};
use qpeft_formats::blocks::check_scales;
use qpeft_formats::file::Bytes;
use qpeft_formats::safetensors::Dtype as Element;

use super::Mat;
use crate::rng::RngKey;
use crate::weight::BaseWeight;

/// Blocks of random bytes, as far as their scales are finite.
pub(crate) fn random_blocks(dtype: GgmlType, rows: usize, cols: usize) -> BaseWeight {
    let key = RngKey { seed: dtype as u64, stream: (rows * cols) as u64 };
    let mut words = (0..).map(|i| key.word(i));
    let blocks = rows * cols / dtype.block_len();
    let mut bytes = Vec::new();
    while bytes.len() < blocks * dtype.block_bytes() {
        let block: Vec<u8> = words.by_ref().map(|word| (word >> 8) as u8).take(dtype.block_bytes()).collect();
        if check_scales(dtype, &block).is_ok() {
            bytes.extend(block);
        }
    }
    BaseWeight::from_ggml(dtype, rows, cols, Bytes::from(bytes)).expect("the bytes are as many as the shape says")
}

pub(crate) fn four_bit(
    quant_type: QuantType,
    double: bool,
    dtype: Element,
    blocksize: usize,
    rows: usize,
    cols: usize,
) -> BaseWeight {
    let state = QuantState { quant_type, blocksize, rows, cols, dtype };
    let values = Mat::random(blocksize as u64, rows, cols, 0.03).values();
    BaseWeight::from_four_bit(FourBit::quantize(state, &values, double))
}

/// Every type at odd sizes: one block a row, three blocks, and longer rows.
pub(crate) fn weights() -> Vec<(String, BaseWeight)> {
    let mut weights = Vec::new();
    let mut add = |name: String, weight: BaseWeight| weights.push((name, weight));
    for dtype in GgmlType::ALL {
        let len = dtype.block_len();
        let shapes = match len {
            1 => vec![(1, 1), (3, 7), (5, 131), (37, 576)],
            256 => vec![(3, 256), (5, 768), (7, 1536)],
            _ => vec![(1, len), (5, 3 * len), (37, 576 / len * len)],
        };
        for (rows, cols) in shapes {
            add(format!("{dtype} {rows} x {cols}"), random_blocks(dtype, rows, cols));
        }
    }
    for quant_type in QuantType::ALL {
        for double in [false, true] {
            for dtype in [Element::F32, Element::F16, Element::BF16] {
                for (blocksize, rows, cols) in
                    [(64, 37, 576), (64, 9, 131), (128, 50, 72), (32, 3, 13), (4096, 70, 250)]
                {
                    let name =
                        format!("{} {double} {dtype:?} {blocksize}: {rows} x {cols}", quant_type.name());
                    add(name, four_bit(quant_type, double, dtype, blocksize, rows, cols));
                }
            }
        }
    }
    for (rows, cols) in [(19, 77), (37, 576)] {
        let values = Mat::random(3, rows, cols, 1.0).values();
        add(format!("int8 {rows} x {cols}"), BaseWeight::from_int8(Int8::quantize(cols, &values)));
    }
    let scaled = random_blocks(GgmlType::NVFP4, 5, 192).scaled_by(-0.37);
    add("NVFP4 with a factor".to_owned(), scaled);
    weights
}
