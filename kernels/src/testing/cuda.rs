//! The harness of the CUDA twins: an op on the device against the naive version in f64.
//!
//! Inputs that the device keeps as bf16 must be bf16 numbers already ([`Mat::rounded`]), so that both compute with the
//! same ones. What then differs is arithmetic in f32, about 1e-6 of a row's largest terms, and one rounding of the
//! result: 2^-9 of an element, or its neighbour where the f32 result lay on the other side of the middle, hence 2^-8.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{Mat, Out, Tolerance, assert_close, same_bits};
use crate::device::Device;
use crate::error::Result;
use crate::ids::IdBuffer;
use crate::tensor::{Dtype, Tensor, View, ViewMut};

/// Elements before and behind every row: none; whole 16 bytes; and so many that no row is aligned.
const GAPS: [[usize; 2]; 3] = [[0, 0], [16, 8], [1, 2]];

/// Sizes around the borders of the kernels: a span of 8, a warp, the rows that a block keeps in registers.
pub(crate) const SHAPES: [(usize, usize); 13] = [
    (1, 1),
    (2, 7),
    (7, 127),
    (3, 129),
    (129, 8),
    (33, 576),
    (2, 1024),
    (5, 1536),
    (3, 4096),
    (2, 8192),
    (1, 8200),
    (600, 264),
    (0, 8),
];

/// The first device. `None`, with the reason printed, where there is none that serves; one that served before and does
/// not now fails the test, or what one test does to it would let all others pass.
pub(crate) fn device() -> Option<Device> {
    static SERVED: AtomicBool = AtomicBool::new(false);
    match Device::open("cuda:0") {
        Ok(device) => {
            SERVED.store(true, Ordering::Relaxed);
            Some(device)
        }
        Err(e) => {
            assert!(!SERVED.load(Ordering::Relaxed), "the GPU served before, but {e}");
            println!("skipped: {e}");
            None
        }
    }
}

/// Indices with their copy on the device.
pub(crate) fn ids(device: &Device, values: &[u32]) -> IdBuffer {
    let mut ids = IdBuffer::new(device, values.len()).expect("the device serves the test");
    ids.set(values).expect("the device serves the test");
    ids
}

/// A matrix on the device with poison around its rows.
struct Padded {
    tensor: Tensor,
    gap: [usize; 2],
}

impl Padded {
    fn new(device: &Device, dtype: Dtype, values: &Mat, gap: [usize; 2]) -> Padded {
        let wide = gap[0] + values.cols + gap[1];
        let mut tensor = match dtype {
            Dtype::Bf16 => {
                Tensor::activations(device, values.rows, wide).expect("the device serves the test")
            }
            Dtype::F32 => Tensor::zeros(device, values.rows, wide).expect("the device serves the test"),
        };
        let mut all = vec![f32::NAN; values.rows * wide];
        if values.cols > 0 {
            for (to, from) in all.chunks_exact_mut(wide).zip(values.values().chunks_exact(values.cols)) {
                to[gap[0]..gap[0] + values.cols].copy_from_slice(from);
            }
        }
        tensor.write(&all).expect("the device serves the test");
        Padded { tensor, gap }
    }

    fn cols(&self) -> usize {
        self.tensor.cols() - self.gap[0] - self.gap[1]
    }

    fn view(&self) -> View<'_> {
        self.tensor.view().column_range(self.gap[0], self.cols())
    }

    fn view_mut(&mut self) -> ViewMut<'_> {
        let (before, cols) = (self.gap[0], self.cols());
        self.tensor.view_mut().into_column_range(before, cols)
    }

    /// The values; what lies beside them must still be poison.
    fn read(&self, what: &str) -> Vec<f32> {
        let (start, end) = (self.gap[0], self.gap[0] + self.cols());
        let all = self.tensor.read().expect("the device serves the test");
        if all.is_empty() {
            return all;
        }
        let rows = all.chunks_exact(self.tensor.cols());
        let beside = rows.clone().flat_map(|row| row[..start].iter().chain(&row[end..]));
        assert!(beside.into_iter().all(|x| x.is_nan()), "{what} is written outside of its columns");
        rows.flat_map(|row| &row[start..end]).copied().collect()
    }
}

/// Runs an op on the device with rows of every alignment, twice each; f32 results must equal `expected` within the
/// tolerance, bf16 results within their rounding, and the second run must give the same bits.
pub(crate) fn check_cuda<const O: usize, const I: usize>(
    device: &Device,
    what: &str,
    outputs: [(Out<'_>, Dtype, &[f64]); O],
    inputs: [(&Mat, Dtype); I],
    tolerance: Tolerance,
    op: impl Fn([ViewMut<'_>; O], [View<'_>; I]) -> Result<()>,
) {
    for (i, (input, dtype)) in inputs.iter().enumerate() {
        let exact = *dtype == Dtype::F32 || same_bits(&input.values(), &input.rounded().values());
        assert!(exact, "{what}: input {i} is not of bf16 numbers");
    }
    for gap in GAPS {
        let what = format!("{what}, {gap:?} elements around the rows");
        let inputs = inputs.map(|(input, dtype)| Padded::new(device, dtype, input, gap));
        let run = || {
            let mut found = outputs.each_ref().map(|(out, dtype, _)| match out {
                Out::Set(rows, cols) => Padded::new(device, *dtype, &Mat::poisoned(*rows, *cols), gap),
                Out::Add(start) => Padded::new(device, *dtype, start, gap),
            });
            op(found.each_mut().map(Padded::view_mut), inputs.each_ref().map(Padded::view))
                .unwrap_or_else(|e| panic!("{what}: {e}"));
            found.each_ref().map(|padded| padded.read(&what))
        };
        let (first, second) = (run(), run());
        for (i, (out, dtype, expected)) in outputs.iter().enumerate() {
            let what = format!("{what}, output {i}");
            assert!(same_bits(&first[i], &second[i]), "{what}: a second run gives other bits");
            match dtype {
                Dtype::F32 => assert_close(&what, &first[i], expected, tolerance),
                Dtype::Bf16 => {
                    let (Out::Set(_, cols) | Out::Add(Mat { cols, .. })) = out;
                    assert_rounded(&what, &first[i], expected, *cols);
                }
            }
        }
    }
}

/// Row by row: within 2^-8 of an element, and 2^-14 of the largest where terms cancel. A whole row may cancel (the
/// gradient of a certain prediction): then what is left of terms of about 1, 2^-24.
fn assert_rounded(what: &str, found: &[f32], expected: &[f64], cols: usize) {
    assert_eq!(found.len(), expected.len(), "{what}: number of elements");
    for (i, (found, expected)) in found.chunks(cols.max(1)).zip(expected.chunks(cols.max(1))).enumerate() {
        let largest = expected.iter().fold(2_f64.powi(-10), |largest, x| largest.max(x.abs()));
        let tolerance = Tolerance { rel: 2_f64.powi(-8), abs: largest * 2_f64.powi(-14) };
        assert_close(&format!("{what}, row {i}"), found, expected, tolerance);
    }
}

/// The gradients of gate and up, those of the scales; dy, gate and up, factors, scales.
type Scaled =
    fn([ViewMut<'_>; 2], [ViewMut<'_>; 2], [View<'_>; 3], [View<'_>; 2], [View<'_>; 2]) -> Result<()>;

/// dgate and dup, from dy, gate and up.
type BackwardNaive = fn(&mut [f64], &mut [f64], &[f64], &[f64], &[f64]);

/// A gated activation: its name, its definition and its ops.
pub(crate) struct Gated {
    pub(crate) name: &'static str,
    pub(crate) forward_naive: fn(&mut [f64], &[f64], &[f64]),
    pub(crate) backward_naive: BackwardNaive,
    pub(crate) forward: fn(ViewMut<'_>, View<'_>, View<'_>) -> Result<()>,
    pub(crate) forward_scaled: fn(ViewMut<'_>, View<'_>, View<'_>, [View<'_>; 2]) -> Result<()>,
    pub(crate) backward: fn([ViewMut<'_>; 2], [View<'_>; 3]) -> Result<()>,
    pub(crate) scaled: Scaled,
}

/// Checks all ops of a gated activation on gate, up and dy.
pub(crate) fn check_gated(device: &Device, [gate, up, dy]: [&Mat; 3], gated: &Gated) {
    use Dtype::{Bf16, F32};
    let (rows, cols) = (gate.rows, gate.cols);
    let (what, set) = (format!("{} {rows} x {cols}", gated.name), || Out::Set(rows, cols));
    let none = Tolerance { rel: 0.0, abs: 0.0 };
    let naive = |gate: &[f64], up: &[f64]| {
        let [mut y, mut dgate, mut dup] = [0; 3].map(|_| vec![0.0; rows * cols]);
        (gated.forward_naive)(&mut y, gate, up);
        (gated.backward_naive)(&mut dgate, &mut dup, &dy.f64(), gate, up);
        [y, dgate, dup]
    };
    let [y, dgate, dup] = naive(&gate.f64(), &up.f64());
    let inputs = [(gate, Bf16), (up, Bf16)];
    check_cuda(device, &what, [(set(), Bf16, &y)], inputs, none, |[y], [gate, up]| {
        (gated.forward)(y, gate, up)
    });
    let outputs = [(set(), Bf16, &dgate[..]), (set(), Bf16, &dup[..])];
    let inputs = [(dy, Bf16), (gate, Bf16), (up, Bf16)];
    check_cuda(device, &what, outputs, inputs, none, |gradients, inputs| (gated.backward)(gradients, inputs));

    // Around 1; and scales of 0, which add nothing.
    let around_one = |seed| {
        let values = Mat::random(seed, 1, cols, 0.1).values();
        Mat::new(1, cols, values.iter().map(|x| 1.0 + x).collect())
    };
    let factors = [15, 16].map(around_one);
    let scales = [11, 12].map(|seed| {
        let mut values = around_one(seed).values();
        values.iter_mut().skip(2).step_by(5).for_each(|x| *x = 0.0);
        Mat::new(1, cols, values)
    });
    let starts = [13, 14].map(|seed| Mat::random(seed, 1, cols, 1.0));
    let times = |x: &[f64], by: &Mat| -> Vec<f64> {
        let by = by.f64();
        x.iter().enumerate().map(|(i, x)| x * by[i % cols]).collect()
    };
    let [y, dgate, dup] = naive(&times(&gate.f64(), &factors[0]), &times(&up.f64(), &factors[1]));
    let (dgate, dup) = (times(&dgate, &factors[0]), times(&dup, &factors[1]));
    let what = format!("{what}, scaled");
    let [f0, f1] = [&factors[0], &factors[1]].map(|factor| (factor, F32));
    let inputs = [(gate, Bf16), (up, Bf16), f0, f1];
    check_cuda(device, &what, [(set(), Bf16, &y)], inputs, none, |[y], [gate, up, f0, f1]| {
        (gated.forward_scaled)(y, gate, up, [f0, f1])
    });
    let sums = |i: usize, gradient: &[f64], input: &Mat| {
        let (mut sums, scales, input) = (starts[i].f64(), scales[i].f64(), input.f64());
        for (j, (gradient, input)) in gradient.iter().zip(&input).enumerate() {
            if scales[j % cols] != 0.0 {
                sums[j % cols] += gradient * input / scales[j % cols];
            }
        }
        sums
    };
    let (gate_sums, up_sums) = (sums(0, &dgate, gate), sums(1, &dup, up));
    // Terms of up to some hundred (a gate of deviation 4, squared), each with the error of fast exponentials.
    let close = Tolerance { rel: 4e-6, abs: 2e-5 * (rows as f64).sqrt().max(1.0) };
    check_cuda(
        device,
        &what,
        [
            (set(), Bf16, &dgate),
            (set(), Bf16, &dup),
            (Out::Add(&starts[0]), F32, &gate_sums),
            (Out::Add(&starts[1]), F32, &up_sums),
        ],
        [(dy, Bf16), (gate, Bf16), (up, Bf16), f0, f1, (&scales[0], F32), (&scales[1], F32)],
        close,
        |[dgate, dup, a, b], [dy, gate, up, f0, f1, scale_a, scale_b]| {
            (gated.scaled)([dgate, dup], [a, b], [dy, gate, up], [f0, f1], [scale_a, scale_b])
        },
    );
}
