//! The decompositions against each other and against what makes them one, on the CPU and on CUDA.

use super::*;
use crate::tensor::View;
use crate::testing::cuda::device;
use crate::testing::{Mat as TestMat, same_on_one_and_four_threads};
use crate::weight::BaseWeight;

/// |W - U diag(s) V|^2 in f64.
fn residual(w: &[f32], svd: &LowRankSvd, n: usize, k: usize) -> f64 {
    let rank = svd.s.len();
    let at = |i: usize, j: usize| -> f64 {
        (0..rank).map(|r| svd.u[i * rank + r] as f64 * svd.s[r] as f64 * svd.v[r * k + j] as f64).sum()
    };
    (0..n * k).map(|i| (w[i] as f64 - at(i / k, i % k)).powi(2)).sum()
}

fn assert_orthonormal(svd: &LowRankSvd, n: usize, k: usize) {
    let rank = svd.s.len();
    for a in 0..rank {
        for b in 0..rank {
            let left: f64 = (0..n).map(|i| svd.u[i * rank + a] as f64 * svd.u[i * rank + b] as f64).sum();
            let right: f64 = (0..k).map(|j| svd.v[a * k + j] as f64 * svd.v[b * k + j] as f64).sum();
            let expected = f64::from(u8::from(a == b));
            assert!((left - expected).abs() < 1e-5 && (right - expected).abs() < 1e-5, "{left} {right}");
        }
    }
}

/// Noise plus a few directions of decaying size: the shape of a trained weight's spectrum.
fn weight_like(n: usize, k: usize) -> Vec<f32> {
    let mut w = TestMat::random(1, n, k, 0.02).values();
    let (u, v) = (TestMat::random(2, n, 30, 1.0).values(), TestMat::random(3, 30, k, 1.0).values());
    for (i, w) in w.iter_mut().enumerate() {
        *w += (0..30).map(|r| u[i / k * 30 + r] * v[r * k + i % k] * 0.05 / (r + 1) as f32).sum::<f32>();
    }
    w
}

#[test]
fn randomized_reaches_the_energy_of_the_exact_decomposition() {
    for (n, k, rank) in [(200, 300, 16), (300, 200, 16), (150, 129, 1), (257, 255, 40)] {
        let w = weight_like(n, k);
        let view = View::from_slice(&w, n, k);
        let exact = exact_svd(view, rank).unwrap();
        let nearly = randomized_svd(view, rank, &SvdOptions::default()).unwrap();
        assert_orthonormal(&exact, n, k);
        assert_orthonormal(&nearly, n, k);
        let (best, found) = (residual(&w, &exact, n, k), residual(&w, &nearly, n, k));
        assert!(found <= best * 1.004, "{n} x {k}, rank {rank}: residual {found} for {best}");
        let energy = |svd: &LowRankSvd| svd.s.iter().map(|&s| s as f64 * s as f64).sum::<f64>();
        let (best, found) = (energy(&exact), energy(&nearly));
        assert!((1.0 - found / best).abs() < 2e-3, "{n} x {k}, rank {rank}: energy {found} for {best}");
    }
}

#[test]
fn exact_reproduces_the_matrix_and_its_norm() {
    let (n, k) = (40, 33);
    let w = TestMat::random(5, n, k, 1.0).values();
    let svd = exact_svd(View::from_slice(&w, n, k), 33).unwrap();
    let total: f64 = w.iter().map(|&x| x as f64 * x as f64).sum();
    assert!(residual(&w, &svd, n, k) < 1e-11 * total);
    assert!(svd.s.windows(2).all(|pair| pair[0] >= pair[1]));
    // A full-rank request is served by the randomized one as well.
    assert_eq!(randomized_svd(View::from_slice(&w, n, k), 33, &SvdOptions::default()).unwrap(), svd);
}

#[test]
fn a_matrix_of_lower_rank_than_asked_for_gives_orthonormal_vectors_and_zeros() {
    let (n, k) = (120, 150);
    let (u, v) = (TestMat::random(1, n, 2, 1.0).values(), TestMat::random(2, 2, k, 1.0).values());
    let w: Vec<f32> = (0..n * k).map(|i| u[i / k * 2] * v[i % k] + u[i / k * 2 + 1] * v[k + i % k]).collect();
    for w in [w, vec![0.0; n * k]] {
        let svd = randomized_svd(View::from_slice(&w, n, k), 5, &SvdOptions::default()).unwrap();
        assert_orthonormal(&svd, n, k);
        assert!(svd.s[2..].iter().all(|&s| s <= 1e-5 * svd.s[0]), "{:?}", svd.s);
        let total: f64 = w.iter().map(|&x| x as f64 * x as f64).sum();
        assert!(residual(&w, &svd, n, k) <= 1e-11 * total);
    }
}

#[test]
fn the_largest_component_of_every_left_vector_is_positive() {
    let w = weight_like(200, 220);
    let view = View::from_slice(&w, 200, 220);
    for svd in [exact_svd(view, 7).unwrap(), randomized_svd(view, 7, &SvdOptions::default()).unwrap()] {
        for r in 0..7 {
            let column = svd.u.iter().skip(r).step_by(7);
            let largest = column.copied().max_by(|a, b| a.abs().total_cmp(&b.abs())).unwrap();
            assert!(largest > 0.0);
        }
    }
}

#[test]
fn the_result_depends_on_the_seed_and_not_on_the_threads() {
    let w = weight_like(210, 230);
    let run = |seed| {
        let options = SvdOptions { seed, ..SvdOptions::default() };
        let svd = randomized_svd(View::from_slice(&w, 210, 230), 8, &options).unwrap();
        [svd.u, svd.s, svd.v].concat()
    };
    let first = same_on_one_and_four_threads("randomized_svd", || run(1));
    assert_ne!(first, run(2));
}

#[test]
fn rows_of_a_larger_buffer_are_served() {
    let w = weight_like(130, 140);
    let padded: Vec<f32> = w.chunks(140).flat_map(|row| row.iter().copied().chain([f32::NAN; 3])).collect();
    let mut view = View::from_slice(&padded, 130, 143);
    view.cols = 140;
    let options = SvdOptions::default();
    let plain = randomized_svd(View::from_slice(&w, 130, 140), 4, &options).unwrap();
    assert_eq!(randomized_svd(view, 4, &options).unwrap(), plain);
}

#[test]
fn impossible_ranks_and_elements_that_are_not_finite_are_refused() {
    let mut w = vec![1.0; 12];
    for rank in [0, 4] {
        let error = exact_svd(View::from_slice(&w, 3, 4), rank).unwrap_err().to_string();
        assert_eq!(error, format!("exact_svd: rank {rank} is outside of 1..=3"));
    }
    w[6] = f32::NAN;
    let error = randomized_svd(View::from_slice(&w, 3, 4), 1, &SvdOptions::default()).unwrap_err();
    assert_eq!(error.to_string(), "randomized_svd: row 1, column 2 is `NaN`, expected a finite number");
}

// --------------------------------------------------------------------------------------------- CUDA

fn packed(values: &[f32], n: usize, k: usize, to: &str) -> BaseWeight {
    BaseWeight::from_f32(n, k, values).unwrap().quantized(to.parse().unwrap()).unwrap()
}

#[test]
fn the_rest_of_a_weight_is_what_its_factors_leave() {
    let (n, k, rank) = (64, 96, 4);
    let weight = packed(&weight_like(n, k), n, k, "nf4");
    let svd = weight_svd(&weight, rank, &SvdOptions::default()).unwrap();
    let b: Vec<f32> = svd.u.chunks(rank).flat_map(|u| u.iter().zip(&svd.s).map(|(u, s)| u * s)).collect();
    let rest = subtract(&weight, &b, &svd.v, 1.0, weight.weight_type()).unwrap();
    let w = weight.dequantize();
    let total: f64 = w.iter().map(|&x| f64::from(x).powi(2)).sum();
    let expected = residual(&w, &svd, n, k);
    assert!((rest.remainder - expected).abs() < 1e-5 * total, "{} for {expected}", rest.remainder);
    assert_eq!(rest.weight, total);
    assert!(rest.quantization > 0.0 && rest.quantization < 0.02 * rest.remainder);
    // Another type changes how the rest is stored, and nothing else.
    let finer = subtract(&weight, &b, &svd.v, 1.0, "q8_0".parse().unwrap()).unwrap();
    assert_eq!(
        (finer.packed.type_name(), finer.weight, finer.remainder),
        ("Q8_0", rest.weight, rest.remainder)
    );
    assert!(finer.quantization > 0.0 && finer.quantization < 0.01 * rest.quantization);
    let error = subtract(&weight, &b, &svd.v, 1.0, "q6_k".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("96 is not a multiple of the Q6_K block length 256"), "{error}");
    let error = subtract(&weight, &b, &svd.v[1..], 1.0, weight.weight_type()).unwrap_err().to_string();
    assert_eq!(error, "subtract: elements of a is 383, expected 384");
}

#[test]
fn cuda_leaves_no_more_of_a_weight_than_the_cpu() {
    let Some(device) = device() else { return };
    for (n, k, rank) in [(768, 512, 16), (512, 1088, 16), (515, 643, 5), (1024, 1536, 64)] {
        let flat = TestMat::random(9, n, k, 0.02).values();
        for (name, values) in [("decaying", weight_like(n, k)), ("flat", flat)] {
            for to in ["nf4", "f32"] {
                let host = packed(&values, n, k, to);
                let w = host.dequantize();
                let there = host.clone().to_device(&device).unwrap();
                let options = SvdOptions::default();
                let expected = weight_svd(&host, rank, &options).unwrap();
                let found = weight_svd(&there, rank, &options).unwrap();
                assert_orthonormal(&found, n, k);
                assert!(found.s.windows(2).all(|pair| pair[0] >= pair[1]));
                let (best, error) = (residual(&w, &expected, n, k), residual(&w, &found, n, k));
                println!("{name} {to} {n} x {k}, rank {rank}: residual {error:.6e}, on the CPU {best:.6e}");
                assert!(error <= best * 1.001, "{name} {to} {n} x {k}, rank {rank}: {error} for {best}");
                let energy = |svd: &LowRankSvd| svd.s.iter().map(|&s| f64::from(s).powi(2)).sum::<f64>();
                assert!(energy(&found) >= 0.999 * energy(&expected));
                assert_eq!(weight_svd(&there, rank, &options).unwrap(), found, "not the same bits again");
            }
        }
    }
}

#[test]
fn cuda_leaves_weights_of_low_rank_to_the_host() {
    let Some(device) = device() else { return };
    let (n, k) = (320, 256);
    let (u, v) = (TestMat::random(1, n, 2, 1.0).values(), TestMat::random(2, 2, k, 1.0).values());
    let low: Vec<f32> =
        (0..n * k).map(|i| u[i / k * 2] * v[i % k] + u[i / k * 2 + 1] * v[k + i % k]).collect();
    for values in [low, vec![0.0; n * k]] {
        let host = BaseWeight::from_f32(n, k, &values).unwrap();
        let expected = weight_svd(&host, 5, &SvdOptions::default()).unwrap();
        let there = host.to_device(&device).unwrap();
        assert_eq!(weight_svd(&there, 5, &SvdOptions::default()).unwrap(), expected);
    }
    let mut values = vec![1.0; n * k];
    values[k + 2] = f32::NAN;
    let there = BaseWeight::from_f32(n, k, &values).unwrap().to_device(&device).unwrap();
    let error = weight_svd(&there, 5, &SvdOptions::default()).unwrap_err().to_string();
    assert_eq!(error, "randomized_svd: row 1, column 2 is `NaN`, expected a finite number");
}

#[test]
fn cuda_packs_the_rest_as_the_cpu_packs_it() {
    let Some(device) = device() else { return };
    let same = ["nf4", "nf4-dq", "fp4", "q8_0", "q4_0", "int8", "bf16"].map(|of| (of, of));
    let other = [
        ("bf16", "nf4"),
        ("fp4", "nf4-dq"),
        ("q4_1", "q8_0"),
        ("nf4-dq", "bf16"),
        ("bf16", "int8"),
        ("nf4", "q4_k"),
        ("q4_k", "q4_k"),
        ("q5_1", "q6_k"),
    ];
    for (n, k) in [(256, 512), (130, 192), (65, 131)] {
        for (of, to) in same.into_iter().chain(other) {
            let lacks_blocks =
                |name: &&str| name.starts_with('q') && k % 32 != 0 || name.ends_with("_k") && k % 256 != 0;
            if [of, to].iter().any(lacks_blocks) {
                continue;
            }
            let host = packed(&weight_like(n, k), n, k, of);
            let there = host.clone().to_device(&device).unwrap();
            let subtract =
                |weight, b: &[f32], a: &[f32]| subtract(weight, b, a, 2.0, to.parse().unwrap()).unwrap();
            // Without a product the rest is the weight itself, bit by bit.
            let (b, a) = (vec![0.0; n], TestMat::random(4, 1, k, 1.0).values());
            let (expected, found) = (subtract(&host, &b, &a), subtract(&there, &b, &a));
            assert_eq!(found.packed.weight_type(), expected.packed.weight_type());
            assert_eq!(found.packed.dequantize(), expected.packed.dequantize(), "{of} to {to} {n} x {k}");
            assert!((found.weight / expected.weight - 1.0).abs() < 1e-12);
            assert!((found.quantization - expected.quantization).abs() <= 1e-9 * expected.weight);
            let b = TestMat::random(5, n, 1, 0.1).values();
            let (expected, found) = (subtract(&host, &b, &a), subtract(&there, &b, &a));
            // Sums of two products that are contracted or not.
            assert!((found.remainder / expected.remainder - 1.0).abs() < 1e-6, "{of} to {to} {n} x {k}");
            assert!(
                (found.quantization / expected.quantization.max(1e-30) - 1.0).abs() < 1e-3 || to == "bf16"
            );
            let differing = found
                .packed
                .dequantize()
                .iter()
                .zip(expected.packed.dequantize())
                .filter(|(a, b)| **a != *b)
                .count();
            assert!(differing <= n * k / 100, "{of} to {to} {n} x {k}: {differing} elements");
        }
    }
    let host = packed(&weight_like(64, 128), 64, 128, "nf4");
    let there = host.to_device(&device).unwrap();
    let mut b = vec![0.0; 64];
    b[3] = f32::INFINITY;
    let error = subtract(&there, &b, &[1.0; 128], 1.0, there.weight_type()).unwrap_err().to_string();
    assert_eq!(error, "requantize: row 3, column 0 is `-inf`, expected a finite number");
}
