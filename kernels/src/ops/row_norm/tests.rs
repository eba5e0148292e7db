//! The norms against the rows themselves, on the CPU and on CUDA.

use super::*;
use crate::cuda::graph::Graph;
use crate::ops::convert::fill;
use crate::ops::quant_linear::Branch;
use crate::tensor::Dtype::{Bf16, F32};
use crate::tensor::padding;
use crate::testing::cuda::{self, check_cuda};
use crate::testing::{Mat as TestMat, Out, assert_close, check_fast, tolerance};
use crate::weight::WeightType;
use crate::{Device, Tensor};

fn f64s(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| x as f64).collect()
}

/// (w_squared, wa) as a training step prepares them.
fn prepared(weight: &BaseWeight, a: &TestMat) -> (TestMat, TestMat) {
    let mut w_squared = TestMat::poisoned(1, weight.rows());
    weight.row_norms_squared(w_squared.view_mut()).unwrap();
    let mut wa = TestMat::poisoned(a.rows, weight.rows());
    quant_linear_forward(wa.view_mut(), a.view(), weight, None, None).unwrap();
    (w_squared, wa)
}

fn check_case(what: &str, weight: &BaseWeight, a: &TestMat, b: &TestMat, scaling: f32, rel: f64) {
    let (w_squared, wa) = prepared(weight, a);
    let mut norm = vec![0.0; weight.rows()];
    forward_naive(&mut norm, &f64s(&weight.dequantize()), &a.f64(), &b.f64(), scaling as f64);
    check_fast(
        what,
        [(Out::Set(1, weight.rows()), &norm)],
        [&w_squared, &wa, a, b],
        tolerance(rel, 0.0),
        |[norm], [w_squared, wa, a, b]| row_norm_forward(norm, w_squared, wa, a, b, scaling, weight),
    );
}

#[test]
fn factored_norms_equal_the_norms_of_the_rows() {
    for (n, k, r) in [(1, 1, 1), (7, 129, 1), (129, 127, 7), (70, 300, 16)] {
        let weight = BaseWeight::from_f32(n, k, &TestMat::random(1, n, k, 1.0).values()).unwrap();
        let a = TestMat::random(2, r, k, 0.5);
        for (size, scaling) in [(0.0, 2.0), (0.01, 1.0), (0.5, 0.5), (5.0, 2.0)] {
            let b = TestMat::random(3, n, r, size);
            // A row may come near the cancellation limit by chance when k = 1.
            let rel = if k == 1 { 1e-4 } else { 1e-6 };
            check_case(&format!("{n} x {k}, rank {r}, b {size}"), &weight, &a, &b, scaling, rel);
        }
    }
}

#[test]
fn rows_that_the_adapter_cancels_are_measured_directly() {
    let (n, k, r, scaling) = (40, 64, 4, 2.0f32);
    let (a, b) = (TestMat::random(1, r, k, 1.0), TestMat::random(2, n, r, 1.0));
    let noise = TestMat::random(3, n, k, 1e-5).values();
    let (a_values, b_values) = (a.values(), b.values());
    let minus_ba = |i: usize| {
        let (n, k_) = (i / k, i % k);
        -scaling * (0..r).map(|r_| b_values[n * r + r_] * a_values[r_ * k + k_]).sum::<f32>()
    };
    let values: Vec<f32> = (0..n * k).map(|i| minus_ba(i) + noise[i]).collect();
    let weight = BaseWeight::from_f32(n, k, &values).unwrap();
    check_case("cancelled", &weight, &a, &b, scaling, 1e-6);
}

#[test]
fn a_row_of_zeros_has_norm_zero_and_nan_stays_visible() {
    let weight = BaseWeight::from_f32(2, 3, &[0.0, 0.0, 0.0, 1.0, 2.0, 2.0]).unwrap();
    let a = TestMat::random(1, 2, 3, 1.0);
    let (w_squared, wa) = prepared(&weight, &a);
    let norm = |b: TestMat| {
        let mut norm = TestMat::poisoned(1, 2);
        let (w_squared, wa, a) = (w_squared.view(), wa.view(), a.view());
        row_norm_forward(norm.view_mut(), w_squared, wa, a, b.view(), 1.0, &weight).unwrap();
        norm.values()
    };
    assert_eq!(norm(TestMat::new(2, 2, vec![0.0; 4])), [0.0, 3.0]);
    let found = norm(TestMat::new(2, 2, vec![f32::NAN, 0.0, 0.0, 0.0]));
    assert!(found[0].is_nan() && found[1] == 3.0, "{found:?}");
}

#[test]
fn operands_that_do_not_belong_together_are_refused() {
    // N 5, K 4, R 3: norm, w_squared, wa, a, b; one of them wrong at a time.
    let weight = BaseWeight::from_f32(5, 4, &[0.0; 20]).unwrap();
    let right = [(1, 5), (1, 5), (3, 5), (3, 4), (5, 3)];
    for (wrong, shape, expected) in [
        (0, (2, 5), "rows of norm is 2, expected 1"),
        (0, (1, 4), "columns of norm is 4, expected 5"),
        (1, (2, 5), "rows of w_squared is 2, expected 1"),
        (1, (1, 4), "columns of w_squared is 4, expected 5"),
        (2, (2, 5), "rows of wa is 2, expected 3"),
        (2, (3, 4), "columns of wa is 4, expected 5"),
        (3, (3, 5), "columns of a is 5, expected 4"),
        (4, (4, 3), "rows of b is 4, expected 5"),
        (4, (5, 2), "columns of b is 2, expected 3"),
    ] {
        let mut shapes = right;
        shapes[wrong] = shape;
        let [mut norm, w_squared, wa, a, b] =
            shapes.map(|(rows, cols)| TestMat::new(rows, cols, vec![0.0; rows * cols]));
        let (w_squared, wa, a, b) = (w_squared.view(), wa.view(), a.view(), b.view());
        let error = row_norm_forward(norm.view_mut(), w_squared, wa, a, b, 1.0, &weight);
        assert_eq!(error.unwrap_err().to_string(), format!("row_norm_forward: {expected}"));
    }
}

#[test]
fn what_is_folded_with_a_norm_follows_from_it_also_on_cuda() {
    let device = cuda::device();
    for (n, k, r) in [(1, 1, 1), (7, 129, 1), (129, 127, 7), (70, 300, 16), (40, 576, 40)] {
        let [a, w] = [(1, r), (3, n)].map(|(seed, rows)| TestMat::random(seed, rows, k, 0.7).rounded());
        let (b, m, s) = (TestMat::random(2, n, r, 0.7), TestMat::random(4, 1, n, 1.0), 2.0_f32);
        let weight = BaseWeight::from_f32(n, k, &w.values()).unwrap();
        let (w_squared, _) = prepared(&weight, &a);
        let mut norm = vec![0.0; n];
        forward_naive(&mut norm, &w.f64(), &a.f64(), &b.f64(), f64::from(s));
        let g: Vec<f64> = m.f64().iter().zip(&norm).map(|(m, norm)| m / norm).collect();
        let folded: Vec<f64> = b.f64().iter().enumerate().map(|(i, b)| f64::from(s) * g[i / r] * b).collect();
        let close = tolerance(if k == 1 { 1e-4 } else { 1e-5 }, 0.0);
        let what = format!("row_norm_fold {n} x {k}, rank {r}");
        check_fast(
            &what,
            [(Out::Set(1, n), &norm), (Out::Set(1, n), &g), (Out::Set(n, r), &folded)],
            [&w_squared, &a, &b, &m],
            close,
            |[norm, g, folded], [w_squared, a, b, m]| {
                row_norm_fold(norm, g, folded, w_squared, a, b, m, s, &weight)
            },
        );
        let Some(device) = &device else { continue };
        let weight = weight.to_device(device).unwrap();
        let outputs = [
            (Out::Set(1, n), F32, &norm[..]),
            (Out::Set(1, n), F32, &g[..]),
            (Out::Set(n, r), Bf16, &folded[..]),
        ];
        let inputs = [(&w_squared, F32), (&a, Bf16), (&b, F32), (&m, F32)];
        // B has 2^-18 of rounding there, and one column may cancel by chance.
        let close = if k == 1 { tolerance(2e-4, 0.0) } else { close };
        check_cuda(device, &what, outputs, inputs, close, |[norm, g, folded], [w_squared, a, b, m]| {
            row_norm_fold(norm, g, folded, w_squared, a, b, m, s, &weight)
        });
    }
}

/// The kernel that is chosen for them or, where rows are aligned, this one with so many warps a block, on bf16 rows `w`
/// (N, K) that are multiplied by `g` if `scaled`, against the definition.
fn check_kernel(
    device: &Device,
    kernel: Option<(Kernel, usize)>,
    [n, k, r]: [usize; 3],
    size: f32,
    scaled: bool,
    cancels: bool,
) {
    let run = |norm: &ViewMut, operands: Operands, w: View, folded: Option<View>, fold: Option<Fold>| {
        let cuda = w.cuda().unwrap();
        match kernel {
            Some((kernel, warps)) if aligned(w)? && aligned(operands.a)? => {
                launch(cuda, kernel, warps, norm, operands, w, folded, fold)
            }
            _ => forward_cuda(cuda, norm, operands, w, folded, fold),
        }
    };
    let (a, b, s) = (TestMat::random(1, r, k, 0.7).rounded(), TestMat::random(2, n, r, size), 2.0_f32);
    let (m, mut w) = (TestMat::random(4, 1, n, 1.0), TestMat::random(3, n, k, 0.7));
    let mut g: Vec<f32> = TestMat::random(5, 1, n, 0.2).values().iter().map(|x| 1.0 + x).collect();
    g.iter_mut().skip(5).step_by(50).for_each(|g| *g = 0.0);
    if !scaled {
        g.fill(1.0);
    }
    if cancels {
        let (a, b, mut values) = (a.f64(), b.f64(), w.values());
        for (i, row) in values.chunks_mut(k).enumerate().skip(1).step_by(3) {
            for (j, w) in row.iter_mut().enumerate() {
                let ba: f64 = (0..r).map(|q| b[i * r + q] * a[q * k + j]).sum();
                *w = (1e-4 * *w as f64 - s as f64 * ba) as f32 * g[i];
            }
        }
        w = TestMat::new(n, k, values);
    }
    let w = w.rounded();
    // A row of g = 0 has its length from |W|^2 and B A alone.
    let rows = w.f64().into_iter().enumerate();
    let w64: Vec<f64> = rows.map(|(i, w)| if g[i / k] == 0.0 { 0.0 } else { w / g[i / k] as f64 }).collect();
    let own = |i: usize| if g[i] == 0.0 { 2.0 } else { w64[i * k..][..k].iter().map(|w| w * w).sum() };
    let w_squared = TestMat::new(1, n, (0..n).map(|i| own(i) as f32).collect());
    let mut norm = vec![0.0; n];
    forward_naive(&mut norm, &w64, &a.f64(), &b.f64(), s as f64);
    for (norm, _) in norm.iter_mut().zip(&g).filter(|(_, g)| **g == 0.0) {
        *norm = norm.hypot(f64::sqrt(2.0));
    }
    let factors: Vec<f64> = m.f64().iter().zip(&norm).map(|(m, norm)| m / norm).collect();
    let folded: Vec<f64> = b.f64().iter().enumerate().map(|(i, b)| s as f64 * factors[i / r] * b).collect();
    let g = TestMat::new(1, n, g);
    // B has 2^-18 of rounding; a row of few columns may come near the cancellation limit by chance.
    let close = tolerance(
        if cancels {
            1e-4
        } else if k <= 8 {
            5e-5
        } else {
            1e-5
        },
        0.0,
    );
    let by =
        kernel.map_or("row_norm".to_owned(), |(kernel, warps)| format!("{} of {warps} warps", kernel.name));
    let what = format!("{by} {n} x {k}, rank {r}, b {size}, scaled {scaled}, cancels {cancels}");
    let inputs = [(&w_squared, F32), (&a, Bf16), (&b, F32), (&m, F32), (&w, Bf16), (&g, F32)];
    let outputs = [
        (Out::Set(1, n), F32, &norm[..]),
        (Out::Add(&g), F32, &factors[..]),
        (Out::Set(n, r), Bf16, &folded[..]),
    ];
    check_cuda(device, &what, outputs, inputs, close, |[norm, g, folded], [w_squared, a, b, m, w, _]| {
        let operands = Operands { w_squared, a, b, scaling: s };
        let fold = Fold { m, g: g.as_view(), folded: folded.as_view() };
        run(&norm, operands, w, scaled.then_some(g.as_view()), Some(fold))
    });
    let outputs = [(Out::Set(1, n), F32, &norm[..])];
    check_cuda(device, &what, outputs, inputs, close, |[norm], [w_squared, a, b, _, w, g]| {
        run(&norm, Operands { w_squared, a, b, scaling: s }, w, scaled.then_some(g), None)
    });
}

#[test]
fn the_cuda_norms_equal_those_of_the_rows_also_where_the_adapter_cancels_them() {
    let Some(device) = cuda::device() else { return };
    let mut case = 0;
    for n in [1, 63, 64, 200, 1024] {
        for k in [8, 96, 520, 2048] {
            for r in [1, 4, 8, 16, 24, 32, 64, 72] {
                let size = if case % 5 < 2 { 0.01 } else { 0.7 };
                check_kernel(&device, None, [n, k, r], size, case % 2 == 1, case % 3 == 2);
                case += 1;
            }
        }
    }
    // More groups of ranks than are kept; blocks for more than one wave of blocks; odd sizes.
    for (shape, scaled) in [([40, 136, 300], true), ([10_000, 96, 16], false), ([129, 127, 7], true)] {
        check_kernel(&device, None, shape, 0.7, scaled, scaled);
    }
}

#[test]
fn every_cuda_kernel_by_products_equals_the_norms_of_the_rows() {
    let Some(device) = cuda::device() else { return };
    let mut case = 0;
    for kernel in PRODUCTS {
        for warps in [8, 16] {
            for n in [1, 15, 57, 130, 300] {
                for k in [32, 96, 576, 2048] {
                    for r in [1, 8, 16] {
                        let size = if case % 5 < 2 { 0.01 } else { 0.7 };
                        let by = Some((kernel, warps));
                        check_kernel(&device, by, [n, k, r], size, case % 2 == 1, case % 7 == 2);
                        case += 1;
                    }
                }
            }
        }
    }
}

#[test]
fn the_kernel_for_some_rows_fills_the_device() {
    let name = |rows, cols, rank| Kernel::choose(true, rows, cols, rank, 132).name;
    assert_eq!(name(14336, 4096, 16), "row_norm_products_56");
    assert_eq!(name(8192, 2048, 8), "row_norm_products_32");
    assert_eq!(name(4096, 14336, 1), "row_norm_products_16");
    assert_eq!(name(1, 32, 16), "row_norm_products_16");
    assert_eq!(name(4096, 4104, 16), "row_norm_forward_aligned_r16");
    assert_eq!(name(4096, 4096, 0), "row_norm_forward_aligned_r16");
    assert_eq!(name(4096, 4096, 24), "row_norm_forward_aligned");
    assert_eq!(Kernel::choose(false, 4096, 4096, 16, 132).name, "row_norm_forward");
}

/// `cargo test --release -p qpeft-kernels cuda_timing_of_row_norms -- --ignored --nocapture`
#[test]
#[ignore = "prints a timing"]
fn cuda_timing_of_row_norms() {
    let Some(device) = cuda::device() else { return };
    let cuda = device.cuda().unwrap();
    let r = 16;
    for (n, k) in
        [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (8192, 2048), (2048, 2048), (512, 2048)]
    {
        let full = |mut to: Tensor, x: f32| {
            fill(to.view_mut(), x).unwrap();
            to
        };
        let bf16s = |rows, cols| full(Tensor::activations(&device, rows, cols).unwrap(), 0.37);
        let f32s = |rows, cols, x| full(Tensor::zeros(&device, rows, cols).unwrap(), x);
        // So many that no cache holds them all.
        let bytes = n * k * Bf16.size();
        let all_w: Vec<Tensor> = (0..(256_usize << 20).div_ceil(bytes)).map(|_| bf16s(n, k)).collect();
        let (a, b, w_squared) = (bf16s(r, k), f32s(n, r, 0.01), f32s(1, n, 0.1 * k as f32));
        let (m, mut norm, g, folded) = (f32s(1, n, 1.0), f32s(1, n, 0.0), f32s(1, n, 1.0), bf16s(n, r));
        let calls = all_w.len().max(50);
        let mut record = |kernel: Kernel, warps| {
            let norm = norm.view_mut();
            let operands = Operands { w_squared: w_squared.view(), a: a.view(), b: b.view(), scaling: 2.0 };
            let fold = Some(Fold { m: m.view(), g: g.view(), folded: folded.view() });
            let enqueue = |calls| {
                all_w.iter().cycle().take(calls).try_for_each(|w| {
                    launch(cuda, kernel, warps, &norm, operands, w.view(), Some(g.view()), fold)
                })
            };
            // Kernels are compiled before anything is recorded.
            enqueue(1).unwrap();
            Graph::record(cuda, || enqueue(calls)).unwrap()
        };
        let warps_of = |kernel: Kernel| Kernel::warps(n.div_ceil(kernel.rows), cuda.sms());
        let chosen = Kernel::choose(true, n, k, r, cuda.sms());
        let mut kernels = vec![(chosen, warps_of(chosen)), (ALIGNED_R16, warps_of(ALIGNED_R16))];
        kernels.extend(PRODUCTS.iter().flat_map(|&kernel| [8, 16].map(|warps| (kernel, warps))));
        let mut runs: Vec<_> =
            kernels.iter().map(|&(kernel, warps)| (record(kernel, warps), f64::INFINITY)).collect();
        for _ in 0..7 {
            for (graph, best) in &mut runs {
                cuda.synchronize().unwrap();
                let start = std::time::Instant::now();
                graph.launch().unwrap();
                cuda.synchronize().unwrap();
                *best = best.min(1e6 * start.elapsed().as_secs_f64() / calls as f64);
            }
        }
        println!("{n} x {k}, rank {r}, first the chosen one:");
        for ((kernel, warps), (_, us)) in kernels.iter().zip(&runs) {
            let (name, rate) = (kernel.name, bytes as f64 / us / 1e6);
            println!("  {name} of {warps} warps {us:.1} us ({rate:.2} TB/s of w)");
        }
    }
}

#[test]
fn the_cuda_norms_of_a_scaled_copy_are_those_of_the_weight() {
    let Some(device) = cuda::device() else { return };
    let (n, k, r, s) = (70, 576, 16, 2.0_f32);
    let (w, a) = (TestMat::random(1, n, k, 1.0), TestMat::random(2, r, k, 0.7).rounded());
    let (b, m) = (TestMat::random(3, n, r, 0.02), TestMat::random(4, 1, n, 1.0));
    let g: Vec<f32> = TestMat::random(5, 1, n, 0.2).values().iter().map(|x| 1.0 + x).collect();
    let weight = BaseWeight::from_f32(n, k, &w.values()).unwrap();
    let (w_squared, _) = prepared(&weight, &a);
    let mut norm = vec![0.0; n];
    forward_naive(&mut norm, &w.f64(), &a.f64(), &b.f64(), f64::from(s));

    let mut weight = weight.to_device(&device).unwrap();
    weight.keep_copy(&device, padding(k, &[r]), r, true).unwrap();
    let put = |mut to: Tensor, values: &[f32]| {
        to.write(values).unwrap();
        to
    };
    let f32s = |mat: &TestMat| put(Tensor::zeros(&device, mat.rows, mat.cols).unwrap(), &mat.values());
    let zeros = |rows, cols| Tensor::activations(&device, rows, cols).unwrap();
    let a = put(zeros(r, k), &a.values());
    let (w_squared, b, m) = (f32s(&w_squared), f32s(&b), f32s(&m));
    let mut g = f32s(&TestMat::new(1, n, g));
    // A product writes the copy.
    let ((x, h), mut y, mut folded) =
        (Tensor::with_padding(&device, 3, k, &[r]).unwrap(), zeros(3, n), zeros(n, r));
    let branch = Branch { h: h[0].view(), b: folded.view() };
    quant_linear_forward(y.view_mut(), x.view(), &weight, Some(g.view()), Some(branch)).unwrap();
    assert!(weight.rows_in_copy().is_some_and(|(_, _, scaled)| scaled));

    // W is rounded to bf16 there, 2^-9 of an element, of which a product with a tenth of it sees 1e-5.
    let close = tolerance(5e-5, 0.0);
    let mut found = f32s(&TestMat::poisoned(1, n));
    let (w_squared, a, b, m) = (w_squared.view(), a.view(), b.view(), m.view());
    row_norm_packed(found.view_mut(), w_squared, a, b, s, &weight, g.view()).unwrap();
    assert_close("norm", &found.read().unwrap(), &norm, close);
    let (norm_to, g_to) = (found.view_mut(), g.view_mut());
    row_norm_fold(norm_to, g_to, folded.view_mut(), w_squared, a, b, m, s, &weight).unwrap();
    assert_close("norm", &found.read().unwrap(), &norm, close);
    let factors: Vec<f64> = m.read().unwrap().iter().zip(&norm).map(|(&m, norm)| m as f64 / norm).collect();
    assert_close("g", &g.read().unwrap(), &factors, close);
}

/// Of every type that can be written here.
#[test]
fn cuda_norms_of_packed_rows_equal_those_of_the_rows() {
    let Some(device) = cuda::device() else { return };
    let (mut case, served) = (0, Cell::new(0));
    for of in WeightType::writable() {
        for (n, k, r) in [(1, 256, 1), (33, 768, 16), (130, 2048, 8), (300, 256, 16)] {
            let Ok(empty) = BaseWeight::empty(of, n, k) else { continue };
            case += 1;
            let mut values = TestMat::random(case, n, k, 0.7).values();
            let (a, b) = (TestMat::random(1, r, k, 0.7).rounded(), TestMat::random(2, n, r, 0.3));
            if case % 3 == 0 {
                // Rows that the adapter nearly cancels, as near as the type comes to them.
                let (a, b) = (a.f64(), b.f64());
                for (i, row) in values.chunks_mut(k).enumerate().skip(1).step_by(3) {
                    for (j, w) in row.iter_mut().enumerate() {
                        *w = -2.0 * (0..r).map(|q| b[i * r + q] * a[q * k + j]).sum::<f64>() as f32;
                    }
                }
            }
            let mut weight = empty.requantize(&values).unwrap();
            if case % 4 == 0 && matches!(of, WeightType::Ggml(_)) {
                weight = weight.scaled_by(0.75);
            }
            let what = format!("{of} {n} x {k}, rank {r}");
            let rows = TestMat::new(n, k, weight.dequantize()).rounded();
            let mut w_squared = TestMat::poisoned(1, n);
            let of_rows = BaseWeight::from_f32(n, k, &rows.values()).unwrap();
            of_rows.row_norms_squared(w_squared.view_mut()).unwrap();
            let m = TestMat::random(4, 1, n, 1.0);
            let mut norm = vec![0.0; n];
            forward_naive(&mut norm, &rows.f64(), &a.f64(), &b.f64(), 2.0);
            let g: Vec<f64> = m.f64().iter().zip(&norm).map(|(m, norm)| m / norm).collect();
            let folded: Vec<f64> = b.f64().iter().enumerate().map(|(i, b)| 2.0 * g[i / r] * b).collect();
            let weight = weight.to_device(&device).unwrap();
            let outputs = [
                (Out::Set(1, n), F32, &norm[..]),
                (Out::Set(1, n), F32, &g[..]),
                (Out::Set(n, r), Bf16, &folded[..]),
            ];
            let inputs = [(&w_squared, F32), (&a, Bf16), (&b, F32), (&m, F32)];
            // Those of the op, near the cancellation limit and elsewhere.
            let close = tolerance(if case % 3 == 0 { 1e-4 } else { 1e-5 }, 0.0);
            check_cuda(&device, &what, outputs, inputs, close, |[norm, g, folded], [w_squared, a, b, m]| {
                served.set(served.get() + u64::from(packed_rows(&weight, a).is_some()));
                row_norm_fold(norm, g, folded, w_squared, a, b, m, 2.0, &weight)
            });
        }
    }
    // Operands that are not aligned, which are among those of a check, and rows that are bf16 already, go another way.
    assert!(case > 60 && served.get() > case, "{served:?} of {case} cases");
}

/// `cargo test --release -p qpeft-kernels cuda_timing_of_packed_row_norms -- --ignored --nocapture`
#[test]
#[ignore = "prints a timing"]
fn cuda_timing_of_packed_row_norms() {
    let Some(device) = cuda::device() else { return };
    let cuda = device.cuda().unwrap();
    let r = 16;
    for of in ["nf4", "nf4-dq", "q4_k", "q6_k", "q8_0"] {
        for (n, k) in [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096), (8192, 2048), (2048, 8192)] {
            let values: Vec<f32> = TestMat::random(1, n, k, 0.02).values();
            let empty = BaseWeight::empty(of.parse().unwrap(), n, k).unwrap();
            let packed = empty.requantize(&values).unwrap();
            // So many that no cache holds them all.
            let count = (256_usize << 20).div_ceil(packed.size_bytes());
            let weights: Vec<_> = (0..count).map(|_| packed.clone().to_device(&device).unwrap()).collect();
            let full = |mut to: Tensor, x: f32| {
                fill(to.view_mut(), x).unwrap();
                to
            };
            let bf16s = |rows, cols| full(Tensor::activations(&device, rows, cols).unwrap(), 0.37);
            let f32s = |rows, cols, x| full(Tensor::zeros(&device, rows, cols).unwrap(), x);
            let (a, b, w_squared) = (bf16s(r, k), f32s(n, r, 0.01), f32s(1, n, 0.1 * k as f32));
            let (m, mut norm, g, folded) = (f32s(1, n, 1.0), f32s(1, n, 0.0), f32s(1, n, 1.0), bf16s(n, r));
            let norm = norm.view_mut();
            let operands = Operands { w_squared: w_squared.view(), a: a.view(), b: b.view(), scaling: 2.0 };
            let fold = Some(Fold { m: m.view(), g: g.view(), folded: folded.view() });
            let calls = count.max(50);
            let mut micros = [f64::INFINITY; 2];
            for (is_packed, micros) in [true, false].into_iter().zip(&mut micros) {
                let enqueue = |calls| {
                    weights.iter().cycle().take(calls).try_for_each(|weight| {
                        match packed_rows(weight, a.view()) {
                            Some(weight) if is_packed => packed::forward(&norm, operands, weight, fold),
                            // Of one tile.
                            _ => for_each_tile(cuda, weight, |_, w| {
                                forward_cuda(cuda, &norm, operands, w, None, fold)
                            }),
                        }
                    })
                };
                // Kernels are compiled before anything is recorded.
                enqueue(1).unwrap();
                let mut graph = Graph::record(cuda, || enqueue(calls)).unwrap();
                for _ in 0..5 {
                    cuda.synchronize().unwrap();
                    let start = std::time::Instant::now();
                    graph.launch().unwrap();
                    cuda.synchronize().unwrap();
                    *micros = micros.min(1e6 * start.elapsed().as_secs_f64() / calls as f64);
                }
            }
            let rate = packed.size_bytes() as f64 / micros[0] / 1e6;
            println!("{of} {n} x {k}: {:.1} us ({rate:.2} TB/s), by scratch {:.1} us", micros[0], micros[1]);
        }
    }
}
