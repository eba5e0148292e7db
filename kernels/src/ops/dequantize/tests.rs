//! The CPU path against the codecs, and the kernels bit for bit against the CPU path.

use std::sync::{Arc, LazyLock};

use half::bf16;
use qpeft_formats::bitsandbytes::{FourBit, Int8, QuantState};
use qpeft_formats::blocks::check_scales;
use qpeft_formats::file::Bytes;

use super::*;
use crate::device::Device;
use crate::rng::RngKey;
use crate::tensor::Tensor;
use crate::testing::{Mat, assert_close, tolerance};

/// Blocks of random bytes, as far as their scales are finite.
fn random_blocks(dtype: GgmlType, rows: usize, cols: usize) -> BaseWeight {
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
    BaseWeight::from_ggml(dtype, rows, cols, Bytes::from(bytes)).unwrap()
}

fn four_bit(
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
fn weights() -> Vec<(String, BaseWeight)> {
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

#[test]
fn rows_are_those_of_the_codec_scaled_with_adapter_columns_behind() {
    for (name, weight) in weights() {
        let (n, k, r) = (weight.rows(), weight.cols(), 3);
        let (g, b) = (Mat::random(1, 1, n, 1.0), Mat::random(2, n, r, 1.0));
        let rows = n / 3..n;
        let whole = weight.dequantize();
        let mut expected = Vec::new();
        for i in rows.clone() {
            expected.extend(whole[i * k..][..k].iter().map(|x| x * g.values()[i]));
            expected.extend([0.0, 0.0]);
            expected.extend(&b.values()[i * r..][..r]);
            expected.push(0.0);
        }
        for gap in [0, 5] {
            let mut out = Mat::poisoned(rows.len(), k + 6).padded(gap);
            let columns = Columns { b: b.view(), offset: 2 };
            dequantize_rows(out.view_mut(), &weight, rows.clone(), Some(g.view()), Some(columns)).unwrap();
            assert_eq!(out.values(), expected, "{name}");
        }
    }
}

#[test]
fn operands_that_do_not_belong_together_are_refused() {
    let weight = BaseWeight::from_f32(3, 4, &[0.0; 12]).unwrap();
    let m = |rows, cols| Mat::new(rows, cols, vec![0.0; rows * cols]);
    let error = |mut out: Mat, rows: Range<usize>, g: Option<&Mat>, b: Option<(&Mat, usize)>| {
        let columns = b.map(|(b, offset)| Columns { b: b.view(), offset });
        dequantize_rows(out.view_mut(), &weight, rows, g.map(Mat::view), columns).unwrap_err().to_string()
    };
    for (message, expected) in [
        (error(m(3, 4), 1..4, None, None), "end of rows 4 is outside of 0..4"),
        (error(m(3, 4), 1..3, None, None), "rows of out is 3, expected 2"),
        (error(m(2, 3), 1..3, None, None), "columns of out is 3, expected 4"),
        (error(m(2, 4), 1..3, Some(&m(1, 2)), None), "columns of row_scale is 2, expected 3"),
        (error(m(2, 4), 1..3, Some(&m(3, 3)), None), "rows of row_scale is 3, expected 1"),
        (error(m(2, 6), 1..3, None, Some((&m(2, 2), 0))), "rows of b is 2, expected 3"),
        (error(m(2, 6), 1..3, None, Some((&m(3, 2), 1))), "end of b behind the weight 3 is outside of 0..3"),
    ] {
        assert_eq!(message, format!("dequantize_rows: {expected}"));
    }
}

#[test]
fn quotients_by_multiplication_are_exact() {
    let divisors =
        (2..70).chain([72, 127, 128, 129, 511, 512, 513, 1792, 16383, 65537, (1 << 28) - 1, 1 << 28]);
    for by in divisors {
        let (mul, shift) = divisor(by);
        let by = by as u64;
        let last = (1_u64 << 31) - 1;
        let edges = (0..5).map(|i| i * by).chain((0..5).map(|i| last / by * by - i * by.min(last / by / 5)));
        for n in edges.flat_map(|n| [n.saturating_sub(1), n, n + 1]).chain([last]).filter(|&n| n <= last) {
            let high = (n * u64::from(mul)) >> 32;
            assert_eq!(high >> shift, n / by, "{n} / {by}");
        }
    }
}

// --------------------------------------------------------------------------------------------- CUDA

/// The device of the tests; the reason why there is none is printed.
fn device() -> Option<&'static Arc<Cuda>> {
    static DEVICE: LazyLock<Result<Arc<Cuda>>> = LazyLock::new(|| Cuda::open(0));
    DEVICE.as_ref().inspect_err(|e| println!("skipped: {e}")).ok()
}

fn to_bf16(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&x| bf16::from_f32(x).to_f32()).collect()
}

fn assert_same_bits(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let differ = found.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    let first = found.iter().zip(expected).position(|(a, b)| a.to_bits() != b.to_bits());
    if let Some(i) = first {
        panic!(
            "{what}: {differ} of {} differ, element {i} is {:e}, expected {:e}",
            found.len(),
            found[i],
            expected[i]
        );
    }
}

/// NaN everywhere, of a type; the rows `gap` elements longer than the view that [`part`] gives.
fn poisoned(cuda: &Arc<Cuda>, dtype: Dtype, rows: usize, cols: usize) -> Tensor {
    let device = Device::Cuda(Arc::clone(cuda));
    let mut tensor = match dtype {
        Dtype::F32 => Tensor::zeros(&device, rows, cols),
        Dtype::Bf16 => Tensor::activations(&device, rows, cols),
    }
    .unwrap();
    tensor.write(&vec![f32::NAN; rows * cols]).unwrap();
    tensor
}

#[test]
fn cuda_rows_of_every_type_have_the_bits_of_the_codec_rounded_once() {
    let Some(cuda) = device() else { return };
    for (name, weight) in weights() {
        let on_device = DeviceWeight::upload(cuda, &weight).unwrap();
        let (n, k) = (weight.rows(), weight.cols());
        let whole = weight.dequantize();
        for (dtype, expected) in [(Dtype::Bf16, to_bf16(&whole)), (Dtype::F32, whole)] {
            // A gap of eight keeps rows aligned, one of three does not.
            for gap in [0, 8, 3] {
                let mut out = poisoned(cuda, dtype, n, k + gap);
                dequantize_rows(out.view_mut().into_column_range(0, k), &on_device, 0..n, None, None)
                    .unwrap();
                let what = format!("{name} to {dtype:?}, gap {gap}");
                assert_same_bits(&what, &out.view().column_range(0, k).read().unwrap(), &expected);
                let beyond = out.view().column_range(k, gap).read().unwrap();
                assert!(beyond.iter().all(|x| x.is_nan()), "{what}: written beyond its columns");
            }
        }
    }
}

#[test]
fn cuda_row_ranges_row_scales_and_adapter_columns_have_the_bits_of_the_cpu() {
    let Some(cuda) = device() else { return };
    let place = Device::Cuda(Arc::clone(cuda));
    for (name, weight) in weights() {
        let on_device = DeviceWeight::upload(cuda, &weight).unwrap();
        let (n, k) = (weight.rows(), weight.cols());
        let rows = n / 3..n;
        let g = Mat::random(1, 1, n, 1.0);
        let mut g_there = Tensor::zeros(&place, 1, n).unwrap();
        g_there.write(&g.values()).unwrap();
        for (rank, offset, pad) in [(16, 0, 64), (16, 24, 64), (3, 2, 6), (1, 0, 1), (8, 5, 13)] {
            let b = Mat::new(n, rank, to_bf16(&Mat::random(2, n, rank, 1.0).values()));
            let mut b_there = Tensor::activations(&place, n, rank).unwrap();
            b_there.write(&b.values()).unwrap();
            for (dtype, scaled) in [(Dtype::Bf16, true), (Dtype::F32, true), (Dtype::Bf16, false)] {
                let mut expected = Mat::poisoned(rows.len(), k + pad);
                let g_here = scaled.then(|| g.view());
                let columns = Columns { b: b.view(), offset };
                dequantize_rows(expected.view_mut(), &weight, rows.clone(), g_here, Some(columns)).unwrap();
                let expected = match dtype {
                    Dtype::Bf16 => to_bf16(&expected.values()),
                    Dtype::F32 => expected.values(),
                };
                let mut out = poisoned(cuda, dtype, rows.len(), k + pad);
                let g_there = scaled.then(|| g_there.view());
                let columns = Columns { b: b_there.view(), offset };
                dequantize_rows(out.view_mut(), &on_device, rows.clone(), g_there, Some(columns)).unwrap();
                let what = format!("{name} to {dtype:?}, rank {rank} at {offset} of {pad}, scaled {scaled}");
                assert_same_bits(&what, &out.read().unwrap(), &expected);
            }
        }
    }
}

#[test]
fn rows_below_the_weight_are_those_of_the_adapter_also_on_cuda() {
    for (name, weight) in weights() {
        let (n, k, pad) = (weight.rows(), weight.cols(), 6);
        for r in [1, 8] {
            let (a, b, g) = (Mat::random(1, r, k, 1.0), Mat::random(2, n, r, 1.0), Mat::random(3, 1, n, 1.0));
            let (a, b) = (a.rounded(), b.rounded());
            let mut above = Mat::poisoned(n, k + pad + 8);
            let columns = Columns { b: b.view(), offset: 0 };
            dequantize_rows(above.view_mut(), &weight, 0..n, Some(g.view()), Some(columns)).unwrap();
            // Behind the rows of the factor nothing is written.
            let rows_below = a.values();
            let rows_below = rows_below.chunks(k).flat_map(|row| row.iter().copied().chain([f32::NAN; 14]));
            let expected: Vec<f32> = above.values().into_iter().chain(rows_below).collect();
            let mut out = Mat::poisoned(n + r, k + pad + 8);
            dequantize_rows_above(out.view_mut(), &weight, 0..n, Some(g.view()), Some(columns), a.view())
                .unwrap();
            let bits = |values: &[f32]| {
                values.iter().map(|x| if x.is_nan() { 1 } else { x.to_bits() }).collect::<Vec<_>>()
            };
            assert_eq!(bits(&out.values()), bits(&expected), "{name}, rank {r}");

            let Some(cuda) = device() else { continue };
            let place = Device::Cuda(Arc::clone(cuda));
            let there = |mat: &Mat, mut tensor: Tensor| {
                tensor.write(&mat.values()).unwrap();
                tensor
            };
            let [a, b] = [&a, &b].map(|m| there(m, Tensor::activations(&place, m.rows, m.cols).unwrap()));
            let g = there(&g, Tensor::zeros(&place, 1, n).unwrap());
            let on_device = DeviceWeight::upload(cuda, &weight).unwrap();
            let mut out = poisoned(cuda, Dtype::Bf16, n + r, k + pad + 8);
            let columns = Columns { b: b.view(), offset: 0 };
            dequantize_rows_above(out.view_mut(), &on_device, 0..n, Some(g.view()), Some(columns), a.view())
                .unwrap();
            assert_eq!(bits(&out.read().unwrap()), bits(&to_bf16(&expected)), "{name} on cuda, rank {r}");
        }
    }
}

#[test]
fn cuda_rows_longer_than_a_sweep_of_the_grid_are_all_written() {
    let Some(cuda) = device() else { return };
    for weight in [
        random_blocks(GgmlType::Q4_K, 3000, 4096),
        four_bit(QuantType::Nf4, true, Element::BF16, 64, 3000, 4096),
        random_blocks(GgmlType::IQ1_S, 3000, 4096),
    ] {
        let on_device = DeviceWeight::upload(cuda, &weight).unwrap();
        let mut out = poisoned(cuda, Dtype::Bf16, 3000, 4096);
        dequantize_rows(out.view_mut(), &on_device, 0..3000, None, None).unwrap();
        assert_same_bits(weight.type_name(), &out.read().unwrap(), &to_bf16(&weight.dequantize()));
    }
}

#[test]
fn cuda_row_norms_are_within_a_millionth_and_the_same_every_time() {
    let Some(cuda) = device() else { return };
    for (name, weight) in weights() {
        let on_device = DeviceWeight::upload(cuda, &weight).unwrap();
        let n = weight.rows();
        let expected: Vec<f64> = weight
            .dequantize()
            .chunks(weight.cols())
            .map(|row| row.iter().map(|&x| f64::from(x) * f64::from(x)).sum())
            .collect();
        // Squares of random f32 and f64 bits leave the range of f32.
        if expected.iter().any(|&x| x > 1e37 || (x > 0.0 && x < 1e-30)) {
            continue;
        }
        let mut first = None;
        for _ in 0..3 {
            let mut out = poisoned(cuda, Dtype::F32, 1, n);
            row_norms_squared(out.view_mut(), &on_device).unwrap();
            let found = out.read().unwrap();
            // Sums of at most a hundred f32 terms one after another, then a tree.
            assert_close(&name, &found, &expected, tolerance(1e-6, 0.0));
            assert_same_bits(&name, &found, first.get_or_insert_with(|| found.clone()));
        }
    }
}

#[test]
fn cuda_operands_elsewhere_are_refused() {
    let Some(cuda) = device() else { return };
    let weight = random_blocks(GgmlType::Q8_0, 2, 32);
    let on_device = DeviceWeight::upload(cuda, &weight).unwrap();
    let mut out = Mat::poisoned(2, 32);
    let error = dequantize_rows(out.view_mut(), &on_device, 0..2, None, None).unwrap_err().to_string();
    assert_eq!(error, "dequantize_rows has no kernel for cuda:0 and cpu together");
    let mut out = poisoned(cuda, Dtype::F32, 2, 32);
    let error = dequantize_rows(out.view_mut(), &weight, 0..2, None, None).unwrap_err().to_string();
    assert_eq!(error, "dequantize_rows has no kernel for cuda:0");
}
