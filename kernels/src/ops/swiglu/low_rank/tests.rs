//! The joined op: the CPU against the definitions of its parts, the CUDA twin against the same.

use super::super::{backward_naive, forward_naive};
use super::*;
use crate::ops::convert::fill;
use crate::ops::low_rank::OutScale;
use crate::ops::low_rank::{branch_gradients_naive, projection_backward_naive};
use crate::tensor::Tensor;
use crate::testing::cuda::device;
use crate::testing::{Mat, Out, Tolerance, assert_close, check_fast, same_bits, tolerance};

/// T, N and the ranks of down, gate and up.
type Shape = (usize, usize, [usize; 3]);

const SCALING: f32 = 0.5;

/// What goes in, and what the results that are added to begin with.
struct Case {
    dy: Mat,
    gate: Mat,
    up: Mat,
    dh: Mat,
    /// Of gate and up.
    b: [Mat; 2],
    h: [Mat; 2],
    factors: [Mat; 2],
    scales: [Mat; 2],
    /// dA, dB of gate and up, dscales.
    starts: [Mat; 5],
}

/// What comes out: dgate, dup, dA, dh and dB of gate and of up, dscales.
type Results = [Vec<f64>; 9];

impl Case {
    fn new((t, n, [down, gate, up]): Shape) -> Case {
        let random = |seed, rows, cols| Mat::random(seed, rows, cols, 1.0);
        let rounded = |seed, rows, cols| random(seed, rows, cols).rounded();
        Case {
            dy: rounded(1, t, n),
            gate: Mat::random(2, t, n, 3.0).rounded(),
            up: rounded(3, t, n),
            dh: rounded(4, t, down),
            b: [rounded(5, n, gate), rounded(6, n, up)],
            h: [rounded(7, t, gate), rounded(8, t, up)],
            factors: [9, 10].map(|seed| random(seed, 1, n)),
            scales: [11, 12].map(|seed| random(seed, 1, n)),
            starts: [
                random(13, down, n),
                random(14, n, gate),
                random(15, n, up),
                random(16, 1, n),
                random(17, 1, n),
            ],
        }
    }

    /// By the definitions of the parts; `round` stands between them.
    fn naive(&self, scaled: bool, round: impl Fn(Vec<f64>) -> Vec<f64>) -> Results {
        let (t, n) = (self.gate.rows, self.gate.cols);
        let factors = self.factors.each_ref().map(|f| if scaled { f.f64() } else { vec![1.0; n] });
        let by = |x: &[f64], factors: &[f64]| -> Vec<f64> {
            x.iter().enumerate().map(|(i, x)| x * factors[i % n]).collect()
        };
        let (x, z) = (by(&self.gate.f64(), &factors[0]), by(&self.up.f64(), &factors[1]));
        let [mut y, mut dgate, mut dup] = [0; 3].map(|_| vec![0.0; t * n]);
        forward_naive(&mut y, &x, &z);
        backward_naive(&mut dgate, &mut dup, &self.dy.f64(), &x, &z);
        let [mut da, mut gate_db, mut up_db, mut gate_scale, mut up_scale] =
            self.starts.each_ref().map(Mat::f64);
        for (to, dx, x, scale) in
            [(&mut gate_scale, &dgate, &x, &self.scales[0]), (&mut up_scale, &dup, &z, &self.scales[1])]
        {
            for (i, (dx, x)) in dx.iter().zip(x).enumerate() {
                to[i % n] += dx * x / scale.f64()[i % n];
            }
        }
        let (y, dgate, dup) = (round(y), round(by(&dgate, &factors[0])), round(by(&dup, &factors[1])));
        let down = self.dh.cols;
        let none = vec![0.0; down * n];
        projection_backward_naive(
            [&mut vec![0.0; t * n], &mut da],
            [&self.dh.f64(), &y, &none],
            [t, n, down],
        );
        let branch = |dy: &[f64], i: usize, db: &mut [f64]| {
            let rank = self.h[i].cols;
            let mut dh = vec![0.0; t * rank];
            let values = [dy, &self.b[i].f64(), &self.h[i].f64()];
            branch_gradients_naive([&mut dh, db], values, f64::from(SCALING), &vec![1.0; n], [t, n, rank]);
            dh
        };
        let gate_dh = branch(&dgate, 0, &mut gate_db);
        let up_dh = branch(&dup, 1, &mut up_db);
        [dgate, dup, da, gate_dh, gate_db, up_dh, up_db, gate_scale, up_scale]
    }
}

fn out_scale() -> OutScale<'static> {
    OutScale { scaling: SCALING, rows: None }
}

#[test]
fn the_cpu_makes_what_the_parts_make() {
    for shape @ (t, n, [down, gate, up]) in [(1, 1, [1, 2, 3]), (7, 33, [4, 3, 8]), (0, 8, [8, 8, 8])] {
        let case = Case::new(shape);
        let close = tolerance(2e-6, 1e-6 * (t.max(n) as f64 + 8.0));
        for scaled in [false, true] {
            let results = case.naive(scaled, |x| x);
            let [dgate, dup, da, gate_dh, gate_db, up_dh, up_db, gate_scale, up_scale] = &results;
            let [da_start, gate_start, up_start, gate_scale_start, up_scale_start] = &case.starts;
            let untouched = [gate_scale_start.f64(), up_scale_start.f64()];
            check_fast(
                &format!("{shape:?}, scaled: {scaled}"),
                [
                    (Out::Set(t, n), dgate),
                    (Out::Set(t, n), dup),
                    (Out::Add(da_start), da),
                    (Out::Set(t, gate), gate_dh),
                    (Out::Set(t, gate), gate_dh),
                    (Out::Add(gate_start), gate_db),
                    (Out::Set(t, up), up_dh),
                    (Out::Add(up_start), up_db),
                    (Out::Add(gate_scale_start), if scaled { gate_scale } else { &untouched[0] }),
                    (Out::Add(up_scale_start), if scaled { up_scale } else { &untouched[1] }),
                ],
                [
                    &case.dh,
                    &case.dy,
                    &case.gate,
                    &case.up,
                    &case.b[0],
                    &case.b[1],
                    &case.h[0],
                    &case.h[1],
                    &case.factors[0],
                    &case.factors[1],
                    &case.scales[0],
                    &case.scales[1],
                ],
                close,
                |[dgate, dup, da, gate_dh, twin, gate_db, up_dh, up_db, gate_scale, up_scale],
                 [dh, dy, gate, up, gate_b, up_b, gate_h, up_h, f0, f1, s0, s1]| {
                    let out_scale = out_scale();
                    let twin = Some(twin);
                    let branches = [
                        Branch { dh: gate_dh, twin, db: gate_db, b: gate_b, h: gate_h, out_scale },
                        Branch { dh: up_dh, twin: None, db: up_db, b: up_b, h: up_h, out_scale },
                    ];
                    let scales = scaled.then_some(Scales {
                        dscales: [gate_scale, up_scale],
                        factors: [f0, f1],
                        scales: [s0, s1],
                    });
                    swiglu_backward_low_rank(dgate, dup, da, branches, scales, dh, dy, gate, up)
                },
            );
            assert_eq!(down, da.len() / n, "as many rows as the rank of down");
        }
    }
}

/// The operands on a device as a layer has them: gate and up with padding, in which the gradients of the low-rank
/// activations lie.
struct There {
    wide: [Tensor; 3],
    beside: [Tensor; 2],
    narrow: [Tensor; 5],
    vectors: [Tensor; 4],
    twins: [Tensor; 2],
    sums: [Tensor; 5],
}

impl There {
    fn new(device: &Device, case: &Case) -> There {
        let (t, n) = (case.gate.rows, case.gate.cols);
        let put = |mut tensor: Tensor, mat: &Mat| {
            tensor.write(&mat.values()).unwrap();
            tensor
        };
        let activations = |mat: &Mat| put(Tensor::activations(device, mat.rows, mat.cols).unwrap(), mat);
        let parameters = |mat: &Mat| put(Tensor::zeros(device, mat.rows, mat.cols).unwrap(), mat);
        let padded = |mat: &Mat, rank: usize| {
            let (tensor, mut beside) = Tensor::with_padding(device, t, n, &[rank]).unwrap();
            let beside = put(beside.remove(0), &Mat::poisoned(t, rank));
            (put(tensor, mat), beside)
        };
        let ((gate, beside_gate), (up, beside_up)) =
            (padded(&case.gate, case.h[0].cols), padded(&case.up, case.h[1].cols));
        There {
            wide: [activations(&case.dy), gate, up],
            beside: [beside_gate, beside_up],
            narrow: [&case.dh, &case.b[0], &case.b[1], &case.h[0], &case.h[1]].map(activations),
            vectors: [&case.factors[0], &case.factors[1], &case.scales[0], &case.scales[1]].map(parameters),
            twins: [0, 1].map(|i| activations(&Mat::poisoned(t, case.h[i].cols))),
            sums: case.starts.each_ref().map(parameters),
        }
    }

    /// The gradients of gate and up go to their own place, or to tensors apart.
    fn run(mut self, device: &Device, scaled: bool, in_place: bool) -> Result<[Vec<f32>; 9]> {
        let (t, n) = (self.wide[0].rows(), self.wide[0].cols());
        let [mut dgate, mut dup] = [1, 2].map(|i| {
            if in_place {
                self.wide[i].in_place().expect("on a device")
            } else {
                let mut apart = Tensor::with_padding(device, t, n, &[8]).unwrap().0;
                apart.write(&Mat::poisoned(t, n).values()).unwrap();
                apart
            }
        });
        let [dh, gate_b, up_b, gate_h, up_h] = self.narrow.each_ref().map(Tensor::view);
        let [f0, f1, s0, s1] = self.vectors.each_ref().map(Tensor::view);
        let [beside_gate, beside_up] = self.beside.each_mut().map(Tensor::view_mut);
        let [gate_twin, _] = self.twins.each_mut().map(Tensor::view_mut);
        let [da, gate_db, up_db, gate_scale, up_scale] = self.sums.each_mut().map(Tensor::view_mut);
        let out_scale = out_scale();
        let twin = Some(gate_twin);
        let branches = [
            Branch { dh: beside_gate, twin, db: gate_db, b: gate_b, h: gate_h, out_scale },
            Branch { dh: beside_up, twin: None, db: up_db, b: up_b, h: up_h, out_scale },
        ];
        let scales = Scales { dscales: [gate_scale, up_scale], factors: [f0, f1], scales: [s0, s1] };
        let [dy, gate, up] = self.wide.each_ref().map(Tensor::view);
        let scales = scaled.then_some(scales);
        let (to_gate, to_up) = (dgate.view_mut(), dup.view_mut());
        swiglu_backward_low_rank(to_gate, to_up, da, branches, scales, dh, dy, gate, up)?;
        let [beside_gate, beside_up] = self.beside.each_ref().map(|tensor| tensor.read().unwrap());
        let twin = self.twins[0].read().unwrap();
        assert!(same_bits(&beside_gate, &twin), "the twin has other values");
        let [da, gate_db, up_db, gate_scale, up_scale] =
            self.sums.each_ref().map(|tensor| tensor.read().unwrap());
        let (dgate, dup) = (dgate.read().unwrap(), dup.read().unwrap());
        Ok([dgate, dup, da, beside_gate, gate_db, beside_up, up_db, gate_scale, up_scale])
    }
}

#[test]
fn the_cuda_kernel_makes_what_the_parts_make() {
    let Some(device) = device() else { return };
    let shapes = [1, 15, 33, 200, 700].into_iter().flat_map(|t| [8, 264, 512, 1544].map(|n| (t, n)));
    for (i, (t, n)) in shapes.enumerate() {
        let ranks = [[16, 16, 16], [8, 16, 8], [16, 8, 16], [8, 8, 8]][i % 4];
        if !serves(&device, n, ranks) {
            println!("skipped: no kernel for {device}");
            return;
        }
        let case = Case::new((t, n, ranks));
        for scaled in [false, true] {
            let what = format!("T {t}, N {n}, ranks {ranks:?}, scaled: {scaled}");
            let run = |in_place| There::new(&device, &case).run(&device, scaled, in_place).unwrap();
            let found = run(false);
            for (i, (apart, again)) in found.iter().zip(run(true)).enumerate() {
                assert!(same_bits(apart, &again), "{what}, output {i}: other bits in place");
            }
            let round = |x: Vec<f64>| {
                let x = Mat::new(1, x.len(), x.into_iter().map(|x| x as f32).collect());
                x.rounded().f64()
            };
            let mut expected = case.naive(scaled, round);
            if !scaled {
                for (expected, start) in expected[7..].iter_mut().zip(&case.starts[3..]) {
                    *expected = start.f64();
                }
            }
            // An element at the middle between two bf16 may be rounded to the other one, 2^-8 of it away: once in a
            // thousand. Sums over tokens or columns have a few such terms, of which none is larger than this.
            let largest = |x: &[f64]| x.iter().fold(0.0f64, |largest, x| largest.max(x.abs()));
            let term = largest(&expected[0]).max(largest(&expected[1])).max(10.0) * 4.0;
            let sums = tolerance(2_f64.powi(-8), 4.0 * term * 2_f64.powi(-8));
            let element = tolerance(2_f64.powi(-7), term * 2_f64.powi(-14));
            let scales = Tolerance { rel: 1e-4, abs: 1e-5 * term * term * (t as f64).sqrt() };
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let close = match i {
                    0 | 1 => element,
                    7 | 8 => scales,
                    _ => sums,
                };
                assert_close(&format!("{what}, output {i}"), found, expected, close);
            }
        }
    }
}

#[test]
fn operands_that_do_not_belong_together_are_refused() {
    let mat = |rows, cols| Mat::new(rows, cols, vec![0.0; rows * cols]);
    // T 2, N 4, R 3: dgate, dup, da, dh, dy, gate, up; a branch's dh, db, b, h.
    let right = [(2, 4), (2, 4), (3, 4), (2, 3), (2, 4), (2, 4), (2, 4), (2, 3), (4, 3), (4, 3), (2, 3)];
    for (wrong, shape, expected) in [
        (0, (2, 5), "columns of dgate is 5, expected 4"),
        (2, (2, 4), "rows of da is 2, expected 3"),
        (2, (3, 5), "columns of da is 5, expected 4"),
        (3, (1, 3), "rows of dh is 1, expected 2"),
        (7, (1, 3), "rows of a branch's dh is 1, expected 2"),
        (8, (4, 2), "columns of db is 2, expected 3"),
        (9, (5, 3), "rows of b is 5, expected 4"),
        (10, (3, 3), "rows of h is 3, expected 2"),
    ] {
        let mut shapes = right;
        shapes[wrong] = shape;
        let [mut dgate, mut dup, mut da, dh, dy, gate, up, mut own, mut db, b, h] =
            shapes.map(|(rows, cols)| mat(rows, cols));
        let (mut other, mut other_db) = (mat(2, 3), mat(4, 3));
        let (other_b, other_h, out_scale) = (mat(4, 3), mat(2, 3), out_scale());
        let branches = [
            Branch { dh: own.view_mut(), twin: None, db: db.view_mut(), b: b.view(), h: h.view(), out_scale },
            Branch {
                dh: other.view_mut(),
                twin: None,
                db: other_db.view_mut(),
                b: other_b.view(),
                h: other_h.view(),
                out_scale,
            },
        ];
        let (to_gate, to_up, da) = (dgate.view_mut(), dup.view_mut(), da.view_mut());
        let (dh, dy, gate, up) = (dh.view(), dy.view(), gate.view(), up.view());
        let error = swiglu_backward_low_rank(to_gate, to_up, da, branches, None, dh, dy, gate, up);
        assert_eq!(error.unwrap_err().to_string(), format!("swiglu_backward_low_rank: {expected}"));
    }
}

#[test]
fn the_sizes_are_those_of_the_kernel_file() {
    for line in [
        format!(
            "constexpr int TOKENS = {TOKENS}, RANK = {RANK}, WIDTH = 64, WARPS = {WARPS}, COLUMNS = {COLUMNS}, "
        ),
        format!("STAGES = {STAGES};\n"),
        format!("constexpr int FINISHERS = {FINISHERS};\n"),
    ] {
        assert!(SOURCE.text.contains(&line), "{line}");
    }
    const { assert!(SHARED <= 227 << 10, "more than a block may have on 9.0") };
}

#[test]
fn blocks_share_all_tokens_and_their_sums_fit_what_is_predicted() {
    for cols in [8, 512, 520, 4096, 8192, 14336, 1 << 20] {
        let most = swiglu_low_rank_scratch(8192, cols);
        for tokens in [1, 15, 64, 65, 511, 1000, 8191, 8192] {
            for multiprocessors in [1, 28, 108, 132, 148, 192, 1000] {
                let blocks @ Blocks { columns, tokens: count, rows } =
                    Blocks::of(tokens, cols, multiprocessors);
                let what = format!("{tokens} x {cols} on {multiprocessors}: {blocks:?}");
                assert!(
                    rows % TOKENS == 0 && rows * count >= tokens && rows * (count - 1) < tokens,
                    "{what}"
                );
                assert!(columns * COLUMNS >= cols, "{what}");
                assert!(blocks.sums(tokens, cols).iter().sum::<usize>() <= most, "{what}");
            }
        }
    }
    // What was found to be the fastest on a GPU with so many.
    assert_eq!(Blocks::of(8192, 8192, 132), Blocks { columns: 16, tokens: 8, rows: 1024 });
    assert_eq!(Blocks::of(8192, 14336, 132), Blocks { columns: 28, tokens: 9, rows: 912 });
}

#[test]
fn other_shapes_have_no_kernel() {
    assert!(!serves(&Device::Cpu, 8192, [16; 3]), "the CPU has its own way");
    let meta = Device::Meta(std::sync::Arc::default());
    assert!(serves(&meta, 8192, [16, 8, 16]));
    for (cols, ranks) in
        [(8190, [16; 3]), (0, [16; 3]), (8192, [16, 12, 16]), (8192, [32, 16, 16]), (8192, [0, 8, 8])]
    {
        assert!(!serves(&meta, cols, ranks), "{cols} {ranks:?}");
    }
    let arch = |major, minor| Arch { major, minor };
    assert!(
        [(9, 0), (10, 0), (10, 3)].into_iter().all(|(major, minor)| has_shared_memory(arch(major, minor)))
    );
    assert!([(8, 0), (8, 6), (8, 9), (12, 0)].into_iter().all(|(a, b)| !has_shared_memory(arch(a, b))));
}

/// `cargo test --release -p qpeft-kernels cuda_timing_of_joined -- --ignored --nocapture`
#[test]
#[ignore = "prints a timing"]
fn cuda_timing_of_joined_gradients() {
    const CALLS: usize = 20;
    let Some(device) = device() else { return };
    let cuda = device.cuda().unwrap();
    let (t, rank) = (8192, 16);
    if !serves(&device, t, [rank; 3]) {
        println!("skipped: no kernel for {device}");
        return;
    }
    for n in [8192, 14336] {
        let filled = |rows, cols, value| {
            let mut tensor = Tensor::activations(&device, rows, cols).unwrap();
            fill(tensor.view_mut(), value).unwrap();
            tensor
        };
        let zeros = |rows, cols| Tensor::zeros(&device, rows, cols).unwrap();
        let [dy, gate, up] = [0.5, 1.5, -0.5].map(|value| filled(t, n, value));
        let [mut dgate, mut dup, mut y] = [0; 3].map(|_| filled(t, n, 0.0));
        let [dh, h] = [0.25, 0.75].map(|value| filled(t, rank, value));
        let (b, mut to) = (filled(n, rank, 0.125), [0; 2].map(|_| filled(t, rank, 0.0)));
        let (mut da, mut dbs) = (zeros(rank, n), [0; 2].map(|_| zeros(n, rank)));
        let mut dscales = [0; 2].map(|_| zeros(1, n));
        let one = Tensor::from_slice(&device, 1, n, &vec![1.0; n]).unwrap();
        let (inputs, ones) = ([dy.view(), gate.view(), up.view()], [one.view(); 2]);
        for scaled in [false, true] {
            let mut joined = || {
                let [gate_db, up_db] = dbs.each_mut().map(Tensor::view_mut);
                let [gate_dh, up_dh] = to.each_mut().map(Tensor::view_mut);
                let branch =
                    |dh, db| Branch { dh, twin: None, db, b: b.view(), h: h.view(), out_scale: out_scale() };
                let branches = [branch(gate_dh, gate_db), branch(up_dh, up_db)];
                let dscales = dscales.each_mut().map(Tensor::view_mut);
                let scales = scaled.then_some(Scales { dscales, factors: ones, scales: ones });
                let ([dy, gate, up], dh) = (inputs, dh.view());
                let (dgate, dup) = (dgate.view_mut(), dup.view_mut());
                swiglu_backward_low_rank(dgate, dup, da.view_mut(), branches, scales, dh, dy, gate, up)
                    .unwrap();
            };
            let best = |run: &mut dyn FnMut()| {
                let mut best = f64::INFINITY;
                for _ in 0..CALLS {
                    cuda.synchronize().unwrap();
                    let start = std::time::Instant::now();
                    run();
                    cuda.synchronize().unwrap();
                    best = best.min(start.elapsed().as_secs_f64());
                }
                1e6 * best
            };
            let joined = best(&mut joined);
            let mut apart = || {
                let (to_gate, to_up, output) = (dgate.view_mut(), dup.view_mut(), Some(y.view_mut()));
                let [dy, gate, up] = inputs;
                if scaled {
                    let dscales = dscales.each_mut().map(Tensor::view_mut);
                    swiglu_backward_scaled(to_gate, to_up, output, dscales, dy, gate, up, ones, ones)
                        .unwrap();
                } else {
                    swiglu_backward(to_gate, to_up, output, dy, gate, up).unwrap();
                }
                low_rank_projection_backward(da.view_mut(), dh.view(), y.view()).unwrap();
                let gradients = [dgate.view(), dup.view()];
                for ((dy, dh), db) in gradients.into_iter().zip(&mut to).zip(&mut dbs) {
                    let (dh, db) = (dh.view_mut(), db.view_mut());
                    low_rank_branch_gradients(dh, None, db, dy, b.view(), h.view(), out_scale()).unwrap();
                }
            };
            let apart = best(&mut apart);
            println!("T {t}, N {n}, scaled {scaled}: {joined:.0} us, apart {apart:.0} us, launches included");
        }
    }
}
