//! The kernels byte for byte against the codecs, on values that decide how a code is rounded.

use qpeft_formats::bitsandbytes::QuantType;

use super::*;
use crate::tensor::Tensor;
use crate::testing::{Mat, cuda};

/// Types that a device packs.
const SERVED: [&str; 15] = [
    "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k", "q6_k", "nf4", "nf4-dq",
    "fp4", "fp4-dq",
];

fn empty(of: &str, rows: usize, cols: usize) -> BaseWeight {
    BaseWeight::empty(of.parse().unwrap(), rows, cols).unwrap()
}

/// Matrices with a name each: ordinary ones, and such that a slip in the order of sums, a contraction or another
/// rounding would show on.
fn samples() -> Vec<(String, Mat)> {
    let mut samples = Vec::new();
    let mut add = |name: &str, rows: usize, cols: usize, values: Vec<f32>| {
        samples.push((format!("{name} {rows} x {cols}"), Mat::new(rows, cols, values)));
    };
    for (rows, cols) in [(1, 256), (3, 768), (37, 1024), (300, 4096)] {
        add("normal", rows, cols, Mat::random(1, rows, cols, 0.05).values());
    }
    let (rows, cols) = (41, 1024);
    let normal = Mat::random(2, rows, cols, 1.0).values();
    let with = |f: &dyn Fn(usize, f32) -> f32| -> Vec<f32> {
        normal.iter().enumerate().map(|(i, &x)| f(i, x)).collect()
    };
    add("zeros", rows, cols, with(&|_, _| 0.0));
    add("zeros of either sign", rows, cols, with(&|_, x| 0.0_f32.copysign(x)));
    add("positive", rows, cols, with(&|_, x| x.abs() + 0.1));
    add("negative", rows, cols, with(&|_, x| -x.abs() - 0.1));
    add("equal in a row", rows, cols, with(&|i, _| (i / cols) as f32 - 20.0));
    add("nearly equal", rows, cols, with(&|_, x| -1.0 - 1e-7 * x));
    add("whole", rows, cols, with(&|_, x| x.round()));
    add("mostly zero", rows, cols, with(&|i, x| if i % 11 == 3 { x } else { 0.0 }));
    add("outliers", rows, cols, with(&|i, x| if i % 97 == 5 { 1000.0 * x } else { x }));
    // Every scale from subnormal numbers to those whose scale overflows f16, another for every row.
    add("scales", rows, cols, with(&|i, x| x * 10_f32.powi((i / cols) as i32 - 33)));
    add("small scales", rows, cols, with(&|i, x| x * 1e-20 * 2_f32.powi(-((i / cols) as i32) - 40)));
    add(
        "largest",
        rows,
        cols,
        with(&|i, x| (x * 10_f32.powi((i / cols) as i32 % 20 + 20)).clamp(-3e38, 3e38)),
    );
    // Midpoints between codes: of blocks whose scale is 1 or a power of two, and of NF4 and FP4.
    for (name, top, steps) in
        [("ties of 8 bits", 127.0, 254), ("ties of 4 bits", -8.0, 31), ("ties of 5 bits", -16.0, 63)]
    {
        let tie = |i: usize| (i * 7 % steps) as f32 / 2.0 - steps as f32 / 4.0 - 0.25;
        add(
            name,
            rows,
            cols,
            with(&|i, _| 2_f32.powi((i / 64) as i32 % 9) * if i % 32 == 9 { top } else { tie(i) }),
        );
    }
    for of in QuantType::ALL {
        let value = |place: usize| of.table()[usize::from(of.order()[place])];
        let tie = |i: usize| {
            let sum = value(i % 15) + value(i % 15 + 1);
            // Not `f32::midpoint`, which goes through f64 as the codec does not.
            sum / 2.0
        };
        add(of.name(), rows, cols, with(&|i, _| if i % 64 == 0 { 1.0 } else { tie(i) }));
    }
    samples
}

/// The bytes of a packed weight, scales and all.
fn bytes(weight: &BaseWeight) -> Vec<u8> {
    match (weight.ggml(), weight.four_bit()) {
        (Some((_, bytes)), _) => bytes.to_vec(),
        (_, Some(weight)) => weight.tensors("w").iter().flat_map(|tensor| tensor.bytes.to_vec()).collect(),
        _ => unreachable!("the types here are ggml's and 4-bit"),
    }
}

fn assert_same(what: &str, found: &BaseWeight, expected: &BaseWeight) {
    let (found, expected) = (bytes(found), bytes(expected));
    let first = found.iter().zip(&expected).position(|(a, b)| a != b);
    assert!(found.len() == expected.len() && first.is_none(), "{what}: another byte at {first:?}");
}

/// Bit for bit, but that a NaN (of an infinite scale) is any.
fn same_values(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan())
}

#[test]
fn the_host_packs_with_its_codecs_and_writes_what_is_stored() {
    for of in ["q4_k", "nf4-dq", "int8", "bf16"] {
        let x = Mat::random(3, 5, 512, 1.0);
        let like = empty(of, 5, 512);
        let expected = like.requantize(&x.values()).unwrap();
        for x in [x.padded(0), x.padded(8)] {
            let mut stored = Mat::poisoned(5, 512).padded(3);
            let packed = quantize(x.view(), Some(stored.view_mut()), &like).unwrap().unwrap();
            assert_eq!(packed.dequantize(), expected.dequantize());
            assert_eq!(stored.values(), expected.dequantize());
        }
    }
    let error =
        quantize(View::from_slice(&[0.0; 64], 2, 32), None, &empty("q8_0", 2, 64)).unwrap_err().to_string();
    assert_eq!(error, "quantize: columns of x is 32, expected 64");
    let error = quantize(View::from_slice(&[f32::NAN; 32], 1, 32), None, &empty("q8_0", 1, 32)).unwrap_err();
    assert_eq!(error.to_string(), "requantize: row 0, column 0 is `NaN`, expected a finite number");
}

#[test]
fn cuda_packs_the_bytes_of_the_codecs() {
    let Some(device) = cuda::device() else { return };
    for (name, x) in samples() {
        let (rows, cols) = (x.rows, x.cols);
        let tensor = Tensor::from_slice(&device, rows, cols, &x.values()).unwrap();
        for of in SERVED {
            let what = format!("{of}, {name}");
            let like = empty(of, rows, cols);
            assert!(is_packed_on_device(&like), "{what}");
            let expected = like.requantize(&x.values()).unwrap();
            let mut stored = Tensor::from_slice(&device, rows, cols, &vec![f32::NAN; rows * cols]).unwrap();
            let found = quantize(tensor.view(), Some(stored.view_mut()), &like).unwrap().unwrap();
            assert_same(&what, &found, &expected);
            assert_eq!(found.weight_type(), expected.weight_type());
            assert!(same_values(&stored.read().unwrap(), &expected.dequantize()), "{what}: what is stored");
            let found = quantize(tensor.view(), None, &like).unwrap().unwrap();
            assert_same(&what, &found, &expected);
        }
    }
}

#[test]
fn cuda_packs_rows_of_any_length_and_alignment() {
    let Some(device) = cuda::device() else { return };
    let shapes = [(3, 7), (1, 1), (9, 32), (5, 96), (2, 64), (7, 256), (64, 3)];
    for (rows, cols) in shapes {
        let x = Mat::random(5, rows, cols, 1.0).values();
        for start in [0, 1, 4] {
            let shifted =
                Tensor::from_slice(&device, 1, start + rows * cols, &[&vec![9.0; start][..], &x].concat())
                    .unwrap();
            let mut stored =
                Tensor::from_slice(&device, 1, start + rows * cols, &vec![7.0; start + rows * cols]).unwrap();
            for of in SERVED {
                let Ok(like) = BaseWeight::empty(of.parse().unwrap(), rows, cols) else { continue };
                let what = format!("{of}, {rows} x {cols} from {start}");
                let out = stored.view_mut().into_slice(start, rows, cols);
                let found = quantize(shifted.view().slice(start, rows, cols), Some(out), &like).unwrap();
                assert_eq!(found.is_some(), is_packed_on_device(&like), "{what}");
                let Some(found) = found else { continue };
                let expected = like.requantize(&x).unwrap();
                assert_same(&what, &found, &expected);
                let stored = stored.read().unwrap();
                assert!(
                    stored[..start].iter().all(|&x| x == 7.0)
                        && same_values(&stored[start..], &expected.dequantize()),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn cuda_leaves_to_the_host_what_it_does_not_pack() {
    let Some(device) = cuda::device() else { return };
    let x = Tensor::from_slice(&device, 3, 256, &Mat::random(6, 3, 256, 1.0).values()).unwrap();
    for like in [
        empty("q2_k", 3, 256),
        empty("int8", 3, 256),
        empty("iq4_nl", 3, 256),
        empty("q8_0", 3, 256).scaled_by(2.0),
    ] {
        assert!(quantize(x.view(), None, &like).unwrap().is_none() && !is_packed_on_device(&like));
    }
    // A block that is cut.
    let like = empty("nf4", 3, 250);
    assert!(
        quantize(x.view().slice(0, 3, 250), None, &like).unwrap().is_none() && !is_packed_on_device(&like)
    );
    // Rows with gaps.
    let like = empty("q8_0", 3, 224);
    assert!(quantize(x.view().column_range(0, 224), None, &like).unwrap().is_none());
}

/// By all threads at once, with more tasks than desks.
#[test]
fn cuda_packers_write_the_bytes_of_the_host() {
    let Some(device) = cuda::device() else { return };
    let packers = Packers::of(&device).unwrap();
    for (rows, cols) in [(600, 1024), (37, 4096), (130, 192), (3, 32)] {
        for round in 0..3 {
            let values = Mat::random(7 + round, rows, cols, 1.0).values();
            for of in SERVED {
                let Ok(like) = BaseWeight::empty(of.parse().unwrap(), rows, cols) else { continue };
                let before = packers.elements_on_device();
                let found = like.requantize_by(&packers, &values).unwrap();
                assert_same(&format!("{of}, {rows} x {cols}"), &found, &like.requantize(&values).unwrap());
                let shared = Packers::is_shared(like.weight_type());
                let taken = packers.elements_on_device() > before;
                assert_eq!(taken, shared && rows * cols > 1 << 14, "{of}, {rows} x {cols}: by a desk");
            }
        }
    }
    // More than a desk takes at once, and blocks of another size than that of the first pair of each lane.
    let values = Mat::random(11, 3, 1 << 20, 1.0).values();
    let (mut found, mut expected) = (vec![1; values.len() / 256 * 144], vec![2; values.len() / 256 * 144]);
    packers.ggml(GgmlType::Q4_K, &values, &mut found).unwrap();
    Packers::default().ggml(GgmlType::Q4_K, &values, &mut expected).unwrap();
    assert!(found == expected);
    for blocksize in [32, 64, 128, 4096] {
        let (values, blocks) = (&values[..1 << 16], (1 << 16) / blocksize);
        let pack = |packers: &Packers| {
            let (mut codes, mut absmax) = (vec![7; 1 << 15], vec![f32::NAN; blocks]);
            packers.four_bit(QuantType::Nf4, blocksize, values, &mut codes, &mut absmax).unwrap();
            (codes, absmax)
        };
        assert!(pack(&packers) == pack(&Packers::default()), "blocks of {blocksize}");
    }
    // One that is refused names its element, whoever has the others.
    let mut values = Mat::random(12, 400, 1024, 1.0).values();
    values[300 * 1024 + 5] = f32::NAN;
    let error = empty("q4_k", 400, 1024).requantize_by(&packers, &values).unwrap_err().to_string();
    assert_eq!(error, "requantize: row 300, column 5 is `NaN`, expected a finite number");
}
