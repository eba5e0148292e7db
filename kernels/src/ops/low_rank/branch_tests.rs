//! Both gradients of a branch at once: the CPU against the definition, the CUDA twin against the same.

use super::*;
use crate::cuda::graph::Graph;
use crate::ops::convert::fill;
use crate::tensor::{Dtype, Tensor};
use crate::testing::cuda::{check_cuda, device};
use crate::testing::{Mat, Out, Tolerance, check_fast, tolerance};

/// As in the tests of the single products: of `terms` in f32.
fn close(terms: usize) -> Tolerance {
    tolerance(1e-6, 1e-7 * (terms as f64 + 8.0) * 4.0)
}

/// dy, b, h, g, and what db starts with.
fn inputs([t, n, r]: [usize; 3]) -> [Mat; 5] {
    [(t, n), (n, r), (t, r), (1, n), (n, r)]
        .map(|(rows, cols)| Mat::random((rows * 5 + cols) as u64, rows, cols, 1.0).rounded())
}

/// s = 0.5, and g if the branch is scaled.
fn scale(g: View<'_>, scaled: bool) -> OutScale<'_> {
    OutScale { scaling: 0.5, rows: scaled.then_some(g) }
}

/// dh and db.
fn naive([dy, b, h, g, start]: [&Mat; 5], scaled: bool) -> [Vec<f64>; 2] {
    let shape @ [tokens, n_rows, rank] = [dy.rows, dy.cols, h.cols];
    let g = if scaled { g.f64() } else { vec![1.0; n_rows] };
    let (mut dh, mut db) = (vec![0.0; tokens * rank], start.f64());
    let values = [&dy.f64()[..], &b.f64(), &h.f64()];
    branch_gradients_naive([&mut dh, &mut db], values, 0.5, &g, shape);
    [dh, db]
}

#[test]
fn both_gradients_of_a_branch_equal_the_definition() {
    for shape @ [t, n, r] in [[1, 129, 7], [7, 97, 3], [130, 200, 16], [33, 40, 8], [0, 3, 2]] {
        let mats @ [dy, b, h, g, start] = &inputs(shape);
        for scaled in [false, true] {
            let [dh, db] = naive(mats.each_ref(), scaled);
            check_fast(
                &format!("{shape:?}, row scale: {scaled}"),
                [(Out::Set(t, r), &dh), (Out::Set(t, r), &dh), (Out::Add(start), &db)],
                [dy, b, h, g],
                close(t.max(n)),
                |[dh, twin, db], [dy, b, h, g]| {
                    low_rank_branch_gradients(dh, Some(twin), db, dy, b, h, scale(g, scaled))
                },
            );
        }
    }
}

#[test]
fn operands_of_both_gradients_that_do_not_belong_together_are_refused() {
    // T 2, N 5, R 3: dh, its twin, db, dy, b, h, row scale; one of them wrong at a time.
    let right = [(2, 3), (2, 3), (5, 3), (2, 5), (5, 3), (2, 3), (1, 5)];
    for (wrong, shape, expected) in [
        (0, (1, 3), "rows of dh is 1, expected 2"),
        (0, (2, 2), "columns of dh is 2, expected 3"),
        (1, (1, 3), "rows of the twin is 1, expected 2"),
        (1, (2, 2), "columns of the twin is 2, expected 3"),
        (2, (4, 3), "rows of db is 4, expected 5"),
        (2, (5, 2), "columns of db is 2, expected 3"),
        (4, (4, 3), "rows of b is 4, expected 5"),
        (4, (5, 2), "columns of b is 2, expected 3"),
        (5, (1, 3), "rows of h is 1, expected 2"),
        (6, (2, 5), "rows of the row scale is 2, expected 1"),
        (6, (1, 4), "columns of the row scale is 4, expected 5"),
    ] {
        let mut shapes = right;
        shapes[wrong] = shape;
        let [mut dh, mut twin, mut db, dy, b, h, g] =
            shapes.map(|(rows, cols)| Mat::new(rows, cols, vec![0.0; rows * cols]));
        let out_scale = OutScale { scaling: 1.0, rows: Some(g.view()) };
        let (to, db) = (dh.view_mut(), db.view_mut());
        let error = low_rank_branch_gradients(
            to,
            Some(twin.view_mut()),
            db,
            dy.view(),
            b.view(),
            h.view(),
            out_scale,
        );
        assert_eq!(error.unwrap_err().to_string(), format!("low_rank_branch_gradients: {expected}"));
    }
}

/// Rows that are not aligned, the ranks 12 and 72 and 1546 outputs go to the library.
#[test]
fn cuda_makes_both_gradients_of_a_branch_in_one_pass() {
    use Dtype::{Bf16, F32};
    let Some(device) = device() else { return };
    for t in [1, 33, 129, 512] {
        for (n, r) in [8, 512, 520, 1544]
            .into_iter()
            .flat_map(|n| [8, 16, 24, 32, 64].map(|r| (n, r)))
            .chain([(520, 12), (512, 72), (1546, 16)])
        {
            let mats @ [dy, b, h, g, start] = &inputs([t, n, r]);
            for scaled in [false, true] {
                let [dh, db] = naive(mats.each_ref(), scaled);
                let what = format!("T {t}, N {n}, R {r}, row scale: {scaled}");
                let inputs = [(dy, Bf16), (b, Bf16), (h, Bf16), (g, F32)];
                let set = || (Out::Set(t, r), Bf16, &dh[..]);
                let add = || (Out::Add(start), F32, &db[..]);
                check_cuda(
                    &device,
                    &what,
                    [set(), set(), add()],
                    inputs,
                    close(t),
                    |[dh, twin, db], [dy, b, h, g]| {
                        low_rank_branch_gradients(dh, Some(twin), db, dy, b, h, scale(g, scaled))
                    },
                );
                let what = format!("{what}, without a twin");
                check_cuda(&device, &what, [set(), add()], inputs, close(t), |[dh, db], [dy, b, h, g]| {
                    low_rank_branch_gradients(dh, None, db, dy, b, h, scale(g, scaled))
                });
            }
        }
    }
}

/// Each as alone, whatever stands beside it: branches of one kernel, of two, and one that goes to the library.
#[test]
fn branches_together_equal_the_definition_also_on_cuda() {
    for (t, shapes) in [
        (1, [(520, 16), (8, 16), (136, 16)]),
        (200, [(1032, 16), (256, 8), (256, 16)]),
        (130, [(520, 16), (128, 32), (128, 16)]),
        (65, [(520, 64), (130, 64), (128, 40)]),
        (0, [(8, 8), (8, 8), (8, 8)]),
    ] {
        let mats = shapes.map(|(n, r)| inputs([t, n, r]));
        let scaled = [true, false, true];
        let expected: [[Vec<f64>; 2]; 3] = std::array::from_fn(|i| naive(mats[i].each_ref(), scaled[i]));
        let [q, k, v] = &mats;
        let what = format!("T {t}, {shapes:?}");
        let run =
            |[dh_q, dh_k, dh_v, twin, db_q, db_k, db_v]: [ViewMut<'_>; 7],
             [dy_q, b_q, h_q, g_q, dy_k, b_k, h_k, dy_v, b_v, h_v, g_v]: [View<'_>; 11]| {
                let out_scale = OutScale { scaling: 0.5, rows: None };
                let [of_q, of_v] = [g_q, g_v].map(|g| scale(g, true));
                low_rank_branch_gradients_together([
                    (dy_q, Branch { dh: dh_q, twin: None, db: db_q, b: b_q, h: h_q, out_scale: of_q }),
                    (dy_k, Branch { dh: dh_k, twin: Some(twin), db: db_k, b: b_k, h: h_k, out_scale }),
                    (dy_v, Branch { dh: dh_v, twin: None, db: db_v, b: b_v, h: h_v, out_scale: of_v }),
                ])
            };
        let dhs = [0, 1, 2, 1].map(|i| (Out::Set(t, shapes[i].1), &expected[i][0][..]));
        let dbs = [0, 1, 2].map(|i| (Out::Add(&mats[i][4]), &expected[i][1][..]));
        let operands = [&q[0], &q[1], &q[2], &q[3], &k[0], &k[1], &k[2], &v[0], &v[1], &v[2], &v[3]];
        let most = shapes.iter().map(|(n, _)| *n).max().unwrap_or(0).max(t);
        let [a, b, c, d] = dhs;
        let [e, f, g] = dbs;
        let outputs = [a, b, c, d, e, f, g];
        check_fast(&what, outputs, operands, close(most), run);
        let Some(device) = device() else { continue };
        use Dtype::{Bf16, F32};
        let dtypes = [Bf16, Bf16, Bf16, F32, Bf16, Bf16, Bf16, Bf16, Bf16, Bf16, F32];
        let typed = std::array::from_fn(|i| (operands[i], dtypes[i]));
        let of = |i| if i < 4 { Bf16 } else { F32 };
        let outputs: [_; 7] = std::array::from_fn(|i| (outputs[i].0, of(i), outputs[i].1));
        check_cuda(&device, &what, outputs, typed, close(t), run);
    }
}

/// `cargo test --release -p qpeft-kernels cuda_timing_of_branch_gradients -- --ignored --nocapture`
#[test]
#[ignore = "prints a timing"]
fn cuda_timing_of_branch_gradients() {
    const CALLS: usize = 50;
    let Some(device) = device() else { return };
    let cuda = device.cuda().unwrap();
    let t = 8192;
    for (n, r) in
        [512, 1024, 2048, 4096, 8192, 14336].map(|n| (n, 16)).into_iter().chain([(4096, 32), (4096, 64)])
    {
        let tensor = |rows, cols| {
            let mut tensor = Tensor::activations(&device, rows, cols).unwrap();
            fill(tensor.view_mut(), 0.37).unwrap();
            tensor
        };
        // So many that no cache holds them all.
        let bytes = t * n * Dtype::Bf16.size();
        let all_dy: Vec<Tensor> = (0..(256_usize << 20).div_ceil(bytes)).map(|_| tensor(t, n)).collect();
        let (b, h, mut dh, mut twin) = (tensor(n, r), tensor(t, r), tensor(t, r), tensor(t, r));
        let (mut db, g) = (Tensor::zeros(&device, n, r).unwrap(), Tensor::zeros(&device, 1, n).unwrap());
        let out_scale = OutScale { scaling: 0.5, rows: Some(g.view()) };
        let mut record = |run: &dyn Fn(ViewMut, ViewMut, ViewMut, View)| {
            let mut enqueue = |calls: usize| {
                for dy in all_dy.iter().cycle().take(calls) {
                    run(dh.view_mut(), twin.view_mut(), db.view_mut(), dy.view());
                }
                Ok::<_, Error>(())
            };
            // Kernels are compiled and scratch is made before anything is recorded.
            cuda.tuning(|| enqueue(1)).unwrap();
            Graph::record(cuda, || enqueue(CALLS)).unwrap()
        };
        let (b, h) = (b.view(), h.view());
        let mut graphs = [
            record(&|dh, twin, db, dy| {
                low_rank_branch_gradients(dh, Some(twin), db, dy, b, h, out_scale).unwrap();
            }),
            record(&|dh, _, _, dy| cuda::dh_by_library(cuda, &dh, dy, b).unwrap()),
            record(&|_, _, db, dy| cuda::db_by_library(cuda, &db, dy, h, out_scale).unwrap()),
        ];
        let mut best = [f64::INFINITY; 3];
        for _ in 0..7 {
            for (graph, best) in graphs.iter_mut().zip(&mut best) {
                cuda.synchronize().unwrap();
                let start = std::time::Instant::now();
                graph.launch().unwrap();
                cuda.synchronize().unwrap();
                *best = best.min(start.elapsed().as_secs_f64() / CALLS as f64);
            }
        }
        let [both, dh, db] = best.map(|seconds| 1e6 * seconds);
        println!(
            "N {n}, R {r}: both gradients {both:.1} us ({:.2} TB/s of dy); by the library dh {dh:.1} us, dB {db:.1} us",
            bytes as f64 / both / 1e6,
        );
    }
}
